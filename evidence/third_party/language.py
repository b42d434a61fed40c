"""Models of texts, of proteins, and of sequences in general."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case
from torch import nn

TOKENS = 64


def fair_esm() -> Iterator[Case]:
    """Yields models of proteins, with attentions that take their projections' weights to PyTorch's function."""
    import esm

    name = "fair-esm"
    yield Case(name, "ESM-2", lambda: esm.ESM2(2, 32, 4), _proteins)
    yield Case(name, "ESM-2 that returns contacts", lambda: esm.ESM2(2, 32, 4), _proteins_with_contacts)
    yield Case(name, "ESM-1b", _esm_1b, _proteins)
    yield Case(name, "MSA Transformer", _msa_transformer, lambda: (torch.randint(4, 24, (2, 3, 8)),))


def _esm_1b() -> nn.Module:
    import esm

    options = argparse.Namespace(
        arch="roberta_large",
        layers=2,
        embed_dim=32,
        ffn_embed_dim=48,
        attention_heads=4,
        max_positions=64,
        token_dropout=True,
        emb_layer_norm_before=True,
        final_bias=True,
    )
    return esm.ProteinBertModel(options, esm.data.Alphabet.from_architecture("ESM-1b"))


def _msa_transformer() -> nn.Module:
    import esm

    options = argparse.Namespace(
        layers=2,
        embed_dim=32,
        ffn_embed_dim=48,
        attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_tokens=2**14,
        max_positions=64,
        embed_positions_msa=True,
    )
    return esm.MSATransformer(options, esm.data.Alphabet.from_architecture("msa_transformer"))


def _proteins() -> dict[str, Any]:
    return {"tokens": torch.randint(4, 24, (2, 10)), "repr_layers": [1]}


def _proteins_with_contacts() -> dict[str, Any]:
    return {"tokens": torch.randint(4, 24, (2, 10)), "return_contacts": True}


def x_transformers() -> Iterator[Case]:
    """Yields transformers of many options."""
    import x_transformers as x

    name = "x-transformers"

    def decoder(**options: Any) -> Callable[[], nn.Module]:
        return lambda: x.TransformerWrapper(
            num_tokens=TOKENS,
            max_seq_len=32,
            attn_layers=x.Decoder(dim=32, depth=2, heads=2, attn_dim_head=64, **options),
        )

    yield Case(name, "Decoder", decoder(), _tokens())
    yield Case(
        name,
        "Decoder with rotary positions, GLU, RMS norm",
        decoder(rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True),
        _tokens(),
    )
    yield Case(
        name, "Decoder with flash attention, one KV head", decoder(attn_flash=True, attn_one_kv_head=True), _tokens()
    )
    yield Case(
        name,
        "Decoder with gates and memory",
        decoder(attn_gate_values=True, attn_num_mem_kv=3, attn_pre_talking_heads=True),
        _tokens(),
    )
    yield Case(
        name,
        "AutoregressiveWrapper",
        lambda: x.AutoregressiveWrapper(decoder(alibi_pos_bias=True)()),
        _tokens(),
    )
    yield Case(
        name,
        "XTransformer",
        lambda: x.XTransformer(
            dim=32,
            enc_num_tokens=TOKENS,
            enc_depth=1,
            enc_heads=2,
            enc_max_seq_len=32,
            dec_num_tokens=TOKENS,
            dec_depth=1,
            dec_heads=2,
            dec_max_seq_len=32,
        ),
        lambda: (torch.randint(1, TOKENS, (2, 10)), torch.randint(1, TOKENS, (2, 8))),
    )
    yield Case(
        name,
        "ViTransformerWrapper",
        lambda: x.ViTransformerWrapper(
            image_size=32, patch_size=8, num_classes=3, attn_layers=x.Encoder(dim=32, depth=2, heads=2)
        ),
        lambda: (torch.randn(2, 3, 32, 32),),
    )
    yield Case(
        name,
        "ContinuousTransformerWrapper",
        lambda: x.ContinuousTransformerWrapper(
            dim_in=5, dim_out=3, max_seq_len=16, attn_layers=x.Encoder(dim=32, depth=1, heads=2)
        ),
        lambda: (torch.randn(2, 9, 5),),
    )


def performer_pytorch() -> Iterator[Case]:
    """Yields attention by random features."""
    import performer_pytorch as performer

    yield Case(
        "performer-pytorch",
        "PerformerLM",
        lambda: performer.PerformerLM(
            num_tokens=TOKENS, max_seq_len=32, dim=32, depth=2, heads=2, dim_head=16, local_attn_heads=0, nb_features=8
        ),
        _tokens(16),
    )
    yield Case(
        "performer-pytorch",
        "PerformerLM, reversible",
        lambda: _with_gradients_of_inputs(
            performer.PerformerLM(
                num_tokens=TOKENS, max_seq_len=32, dim=32, depth=2, heads=2, dim_head=16, reversible=True, nb_features=8
            )
        ),
        _tokens(16),
        note=REVERSIBLE,
    )


REVERSIBLE = (
    "its blocks have gradients of their own, which give none to adapters unless their input requires one, as in PEFT; "
    "here a hook sees to that"
)


def _with_gradients_of_inputs(model: Any) -> nn.Module:
    """Lets embeddings require gradients, without which reversible blocks compute none for frozen models."""
    model.token_emb.register_forward_hook(_require_gradients)
    return model


def _require_gradients(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    # a copy, since positions are added in place
    return output.requires_grad_(torch.is_grad_enabled()).clone()


def linformer() -> Iterator[Case]:
    """Yields attention whose keys are projected by a parameter."""
    import linformer as lin

    yield Case(
        "linformer",
        "LinformerLM",
        lambda: lin.LinformerLM(num_tokens=TOKENS, dim=32, seq_len=16, depth=2, heads=2, k=4, dim_head=16),
        _tokens(16),
    )


def reformer_pytorch() -> Iterator[Case]:
    """Yields attention by hashes, in reversible blocks that compute again in the backward."""
    import reformer_pytorch as reformer

    yield Case(
        "reformer-pytorch",
        "ReformerLM",
        lambda: _with_gradients_of_inputs(
            reformer.ReformerLM(
                num_tokens=TOKENS, dim=32, depth=2, max_seq_len=64, heads=2, bucket_size=8, n_hashes=2, causal=True
            )
        ),
        _tokens(64),
        note=REVERSIBLE,
    )


def perceiver_pytorch() -> Iterator[Case]:
    """Yields latent arrays that attend to inputs, with layers shared."""
    import perceiver_pytorch as perceiver

    name = "perceiver-pytorch"
    yield Case(
        name,
        "Perceiver",
        lambda: perceiver.Perceiver(
            num_freq_bands=2,
            depth=2,
            max_freq=4.0,
            input_channels=3,
            input_axis=2,
            num_latents=6,
            latent_dim=32,
            cross_heads=1,
            latent_heads=2,
            cross_dim_head=8,
            latent_dim_head=8,
            num_classes=3,
            weight_tie_layers=True,
            self_per_cross_attn=1,
        ),
        lambda: (torch.randn(2, 8, 8, 3),),
    )
    yield Case(
        name,
        "PerceiverLM",
        lambda: perceiver.PerceiverLM(
            num_tokens=TOKENS,
            dim=32,
            depth=2,
            max_seq_len=16,
            num_latents=6,
            latent_dim=24,
            cross_heads=1,
            latent_heads=2,
            cross_dim_head=8,
            latent_dim_head=8,
        ),
        _tokens(12),
    )


def mambapy() -> Iterator[Case]:
    """Yields state spaces in plain PyTorch."""
    from mambapy import mamba

    def build() -> nn.Module:
        return mamba.Mamba(mamba.MambaConfig(d_model=16, n_layers=2, d_state=4))

    yield Case("mambapy", "Mamba", build, lambda: (torch.randn(2, 8, 16),))


def local_attention() -> Iterator[Case]:
    """Yields attention within windows."""
    import local_attention as local

    yield Case(
        "local-attention",
        "LocalTransformer",
        lambda: local.LocalTransformer(
            num_tokens=TOKENS,
            dim=32,
            depth=2,
            max_seq_len=32,
            heads=2,
            dim_head=16,
            causal=True,
            local_attn_window_size=8,
        ),
        _tokens(16),
    )


def colt5_attention() -> Iterator[Case]:
    """Yields layers that route a few tokens through heavy branches."""
    import colt5_attention as colt

    yield Case(
        "CoLT5-attention",
        "ConditionalRoutedTransformerBlock",
        lambda: colt.ConditionalRoutedTransformerBlock(
            dim=32,
            num_heavy_attn_tokens_q=4,
            num_heavy_attn_tokens_kv=4,
            num_heavy_ff_tokens=4,
            light_dim_head=8,
            light_heads=2,
            light_window_size=8,
            heavy_dim_head=8,
            heavy_heads=2,
            light_ff_mult=1,
            heavy_ff_mult=2,
        ),
        lambda: (torch.randn(2, 16, 32),),
    )


def _tokens(length: int = 12) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randint(1, TOKENS, (2, length)),)


PACKAGES = (
    fair_esm,
    x_transformers,
    performer_pytorch,
    linformer,
    reformer_pytorch,
    perceiver_pytorch,
    mambapy,
    local_attention,
    colt5_attention,
)
