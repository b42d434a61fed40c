"""Models of tables and of time series."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case, with_other_values
from torch import nn


def pytorch_tabnet() -> Iterator[Case]:
    """Yields steps of attention with layers that they share."""
    from pytorch_tabnet.tab_network import TabNet

    def build() -> nn.Module:
        return TabNet(
            6, 3, n_d=8, n_a=8, cat_idxs=[0], cat_dims=[4], cat_emb_dim=[2], group_attention_matrix=torch.eye(6)
        )

    yield Case(
        "pytorch-tabnet", "TabNet", build, lambda: (torch.cat([torch.randint(0, 4, (8, 1)), torch.randn(8, 5)], 1),)
    )


def rtdl_revisiting_models() -> Iterator[Case]:
    """Yields networks of numbers and categories."""
    import rtdl_revisiting_models as rtdl

    name = "rtdl_revisiting_models"
    options = rtdl.FTTransformer.get_default_kwargs(2)
    yield Case(
        name,
        "FTTransformer",
        lambda: rtdl.FTTransformer(n_cont_features=4, cat_cardinalities=[3, 5], d_out=2, **options),
        lambda: (torch.randn(5, 4), torch.randint(0, 3, (5, 2))),
    )
    yield Case(
        name,
        "ResNet",
        lambda: rtdl.ResNet(
            d_in=6, d_out=2, n_blocks=2, d_block=16, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0
        ),
        lambda: (torch.randn(5, 6),),
    )


def tab_transformer_pytorch() -> Iterator[Case]:
    """Yields attention over the columns of a table, with residual streams."""
    import tab_transformer_pytorch as tab

    def row() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, 3, (4, 2)), torch.randn(4, 3)

    name = "tab-transformer-pytorch"
    sizes: dict[str, Any] = {"categories": (3, 5), "dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
    yield Case(
        name, "TabTransformer", lambda: tab.TabTransformer(num_continuous=3, dim_out=2, mlp_act=nn.ReLU(), **sizes), row
    )
    yield Case(name, "FTTransformer", lambda: tab.FTTransformer(num_continuous=3, dim_out=2, **sizes), row)


def pytorch_tcn() -> Iterator[Case]:
    """Yields causal convolutions with normed weights."""
    from pytorch_tcn import TCN

    def build() -> nn.Module:
        return TCN(4, [8, 8], kernel_size=3, dropout=0.1, output_projection=2)

    yield Case("pytorch-tcn", "TCN", build, lambda: (torch.randn(2, 4, 12),), (nn.Conv1d,))


def chronos_forecasting() -> Iterator[Case]:
    """Yields forecasters that are models of Transformers, one of them of its own code."""
    from chronos.chronos2 import Chronos2CoreConfig, Chronos2Model
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    name = "chronos-forecasting"
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    forecasting = {
        "context_length": 32,
        "prediction_length": 8,
        "input_patch_size": 4,
        "input_patch_stride": 4,
        "quantiles": [0.1, 0.5, 0.9],
        "use_reg_token": True,
    }

    def bolt() -> nn.Module:
        config = T5Config(
            **sizes,
            num_decoder_layers=1,
            vocab_size=2,
            feed_forward_proj="relu",
            reg_token_id=1,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
        config.chronos_config = forecasting
        return ChronosBoltModelForForecasting(config)

    def second() -> nn.Module:
        config = Chronos2CoreConfig(**sizes, vocab_size=2, reg_token_id=1, pad_token_id=0)
        more = {"output_patch_size": 4, "use_arcsinh": True, "max_output_patches": 2, "time_encoding_scale": 32}
        config.chronos_config = {
            **{key: value for key, value in forecasting.items() if key != "prediction_length"},
            **more,
        }
        return Chronos2Model(config)

    yield Case(name, "Chronos-Bolt", bolt, lambda: (torch.randn(2, 32),))
    yield Case(name, "Chronos-2", second, lambda: {"context": torch.randn(2, 32), "num_output_patches": 2})


def timesfm() -> Iterator[Case]:
    """Yields a forecaster by patches."""
    yield Case(
        "timesfm", "TimesFM 2.5", _timesfm, lambda: (torch.randn(2, 4, 8), torch.zeros(2, 4, 8, dtype=torch.bool))
    )


def _timesfm() -> nn.Module:
    import dataclasses

    from timesfm.timesfm_2p5 import timesfm_2p5_torch

    large = timesfm_2p5_torch.TimesFM_2p5_200M_torch_module
    config, change = large.config, dataclasses.replace
    stack = config.stacked_transformers

    class Small(large):
        pass

    Small.config = change(
        config,
        input_patch_len=8,
        output_patch_len=16,
        output_quantile_len=16,
        tokenizer=change(config.tokenizer, input_dims=16, hidden_dims=32, output_dims=32),
        stacked_transformers=change(
            stack, num_layers=2, transformer=change(stack.transformer, model_dims=32, hidden_dims=48, num_heads=2)
        ),
        output_projection_point=change(config.output_projection_point, input_dims=32, hidden_dims=32, output_dims=160),
        output_projection_quantiles=change(
            config.output_projection_quantiles, input_dims=32, hidden_dims=32, output_dims=160
        ),
    )
    return with_other_values(Small())


def gluonts() -> Iterator[Case]:
    """Yields forecasters that return parameters of distributions."""
    from gluonts.torch.model import d_linear, patch_tst, tft

    name = "gluonts"
    yield Case(
        name,
        "TemporalFusionTransformer",
        lambda: tft.module.TemporalFusionTransformerModel(
            context_length=12,
            prediction_length=4,
            d_feat_static_real=[1],
            c_feat_static_cat=[3],
            d_feat_dynamic_real=[2],
            d_past_feat_dynamic_real=[1],
            num_heads=2,
            d_hidden=16,
            d_var=8,
        ),
        lambda: {
            "past_target": torch.randn(2, 12),
            "past_observed_values": torch.ones(2, 12),
            "feat_static_real": torch.randn(2, 1),
            "feat_static_cat": torch.randint(0, 3, (2, 1)),
            "feat_dynamic_real": torch.randn(2, 16, 2),
            "past_feat_dynamic_real": torch.randn(2, 12, 1),
        },
    )

    def window() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, 12), torch.ones(2, 12)

    yield Case(
        name,
        "PatchTST",
        lambda: patch_tst.PatchTSTModel(
            prediction_length=4,
            context_length=12,
            patch_len=4,
            stride=2,
            padding_patch="end",
            d_model=16,
            nhead=2,
            dim_feedforward=32,
            num_feat_dynamic_real=0,
            dropout=0.1,
            activation="relu",
            norm_first=False,
            num_encoder_layers=2,
            scaling="mean",
        ),
        window,
    )
    yield Case(name, "DLinear", lambda: d_linear.DLinearModel(4, 12, 8), window)


PACKAGES = (
    pytorch_tabnet,
    rtdl_revisiting_models,
    tab_transformer_pytorch,
    pytorch_tcn,
    chronos_forecasting,
    timesfm,
    gluonts,
)
