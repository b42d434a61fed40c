"""Models of sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case, with_other_values
from torch import nn


def speechbrain() -> Iterator[Case]:
    """Yields encoders of speech and of speakers, with convolutions, attentions and recurrent layers of its own."""
    from speechbrain.lobes.models import ECAPA_TDNN, Xvector, conv_tasnet, dual_path

    name = "speechbrain"
    convolutions = (nn.Conv1d,)
    yield Case(
        name,
        "ECAPA-TDNN",
        lambda: ECAPA_TDNN.ECAPA_TDNN(
            8, channels=[16] * 5, attention_channels=8, lin_neurons=12, se_channels=8, res2net_scale=4
        ),
        _frames(20, 8),
        convolutions,
    )
    yield Case(
        name,
        "Xvector",
        lambda: Xvector.Xvector(
            in_channels=8,
            tdnn_blocks=3,
            tdnn_channels=[16] * 3,
            tdnn_kernel_sizes=[5, 3, 1],
            tdnn_dilations=[1, 2, 1],
            lin_neurons=12,
        ),
        _frames(20, 8),
        convolutions,
    )
    yield Case(
        name,
        "MaskNet of Conv-TasNet",
        lambda: conv_tasnet.MaskNet(8, 8, 16, 3, 2, 2, 2, "gLN", False, "softmax"),
        _frames(8, 20),
        convolutions,
    )
    for kind in ("transformer", "conformer"):
        yield Case(name, f"TransformerASR, {kind}", _recogniser(kind), _speech_and_text)
    yield Case(name, "SBTransformerBlock", lambda: dual_path.SBTransformerBlock(1, 16, 2, d_ffn=32), _frames(10, 16))
    yield Case(name, "SepformerWrapper", _separator, lambda: (torch.randn(2, 400),))


def _recogniser(kind: str) -> Callable[[], nn.Module]:
    from speechbrain.lobes.models.transformer import TransformerASR

    positions = {"attention_type": "RelPosMHAXL"} if kind == "conformer" else {}
    return lambda: TransformerASR.TransformerASR(
        tgt_vocab=20,
        input_size=8,
        d_model=16,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=1,
        d_ffn=32,
        encoder_module=kind,
        normalize_before=True,
        kernel_size=3,
        causal=False,
        **positions,
    )


def _separator() -> nn.Module:
    from speechbrain.lobes.models import dual_path

    return dual_path.SepformerWrapper(
        encoder_out_nchannels=16,
        masknet_chunksize=10,
        intra_numlayers=1,
        inter_numlayers=1,
        intra_nhead=2,
        inter_nhead=2,
        intra_dffn=32,
        inter_dffn=32,
    )


def _speech_and_text() -> dict[str, Any]:
    return {"src": torch.randn(2, 12, 8), "tgt": torch.randint(1, 20, (2, 5)), "wav_len": torch.ones(2)}


def encodec() -> Iterator[Case]:
    """Yields a codec of convolutions with normed weights and an LSTM."""
    from encodec import modules

    def build() -> nn.Module:
        sizes: dict[str, Any] = {"dimension": 16, "n_filters": 4, "ratios": [4, 2]}
        return nn.Sequential(modules.SEANetEncoder(**sizes), modules.SEANetDecoder(**sizes))

    yield Case("encodec", "SEANet", build, lambda: (torch.randn(2, 1, 160),), (nn.Conv1d,))


def vocos() -> Iterator[Case]:
    """Yields a vocoder that computes a spectrum."""
    from vocos import heads, models

    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = models.VocosBackbone(8, 16, 32, 2)
            self.head = heads.ISTFTHead(16, 32, 8)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone(features))

    yield Case("vocos", "Vocos", Vocoder, lambda: (torch.randn(2, 8, 12),), (nn.Conv1d,))


def demucs() -> Iterator[Case]:
    """Yields separators of music, on waves and on spectra."""
    from demucs.demucs import Demucs
    from demucs.htdemucs import HTDemucs

    convolutions = (nn.Conv1d, nn.Conv2d)
    yield Case(
        "demucs",
        "Demucs",
        lambda: Demucs(["a", "b"], channels=4, depth=3, dconv_attn=2, dconv_lstm=2, norm_groups=2, norm_starts=2),
        lambda: (torch.randn(1, 2, 2048),),
        convolutions,
    )
    yield Case(
        "demucs",
        "HTDemucs",
        lambda: HTDemucs(
            ["a", "b"],
            channels=8,
            nfft=512,
            depth=3,
            t_layers=3,
            t_heads=2,
            norm_groups=2,
            segment=1,
            samplerate=4096,
            norm_starts=2,
            bottom_channels=32,
        ),
        lambda: (torch.randn(1, 2, 4096),),
        convolutions,
    )


def whisper() -> Iterator[Case]:
    """Yields a recogniser of speech with linear layers and convolutions of its own classes."""
    import whisper as openai

    def build() -> nn.Module:
        sizes = openai.model.ModelDimensions(
            n_mels=8,
            n_audio_ctx=16,
            n_audio_state=32,
            n_audio_head=2,
            n_audio_layer=2,
            n_vocab=40,
            n_text_ctx=12,
            n_text_state=32,
            n_text_head=2,
            n_text_layer=2,
        )
        return with_other_values(openai.model.Whisper(sizes), "decoder.positional_embedding")

    yield Case("openai-whisper", "Whisper", build, lambda: (torch.randn(2, 8, 32), torch.randint(0, 40, (2, 7))))
    yield Case(
        "openai-whisper",
        "Whisper with its convolutions",
        build,
        lambda: (torch.randn(2, 8, 32), torch.randint(0, 40, (2, 7))),
        (nn.Conv1d,),
    )


def torchaudio() -> Iterator[Case]:
    """Yields models of waves and features."""
    from torchaudio import models

    name = "torchaudio"
    yield Case(
        name,
        "Conformer",
        lambda: models.Conformer(16, 2, 32, 2, 5),
        lambda: (torch.randn(2, 10, 16), torch.tensor([10, 7])),
        (nn.Conv1d,),
    )
    yield Case(
        name,
        "ConvTasNet",
        lambda: models.ConvTasNet(2, 8, 16, 3, 8, 16, 2, 2),
        lambda: (torch.randn(2, 1, 160),),
        (nn.Conv1d,),
    )
    yield Case(name, "wav2vec 2.0", _wav2vec, lambda: (torch.randn(2, 800),))
    yield Case(
        name,
        "HuBERT pretraining",
        _hubert,
        lambda: (torch.randn(2, 800), torch.randint(0, 5, (2, 39)), torch.tensor([800, 640])),
    )
    yield Case(
        name,
        "Emformer",
        lambda: models.Emformer(16, 2, 32, 2, 4, right_context_length=1),
        lambda: (torch.randn(2, 13, 16), torch.tensor([12, 8])),
    )
    yield Case(
        name,
        "Tacotron2",
        lambda: models.Tacotron2(
            n_mels=8,
            n_symbol=20,
            symbol_embedding_dim=16,
            encoder_embedding_dim=16,
            decoder_rnn_dim=16,
            attention_rnn_dim=16,
            attention_hidden_dim=8,
            prenet_dim=8,
            postnet_embedding_dim=16,
        ),
        lambda: (torch.randint(0, 20, (2, 6)), torch.tensor([6, 5]), torch.randn(2, 8, 9), torch.tensor([9, 7])),
    )
    yield Case(
        name,
        "WaveRNN",
        lambda: models.WaveRNN([2, 2], 16, 4, n_res_block=2, n_rnn=16, n_fc=16, n_hidden=8, n_freq=8, n_output=8),
        lambda: (torch.randn(2, 1, 24), torch.randn(2, 1, 8, 10)),
        (nn.Conv1d,),
    )
    yield Case(
        name,
        "RNN-T",
        _transducer,
        lambda: (torch.randn(2, 12, 8), torch.tensor([12, 12]), torch.randint(0, 9, (2, 4)), torch.tensor([4, 4])),
    )


def _wav2vec() -> nn.Module:
    from torchaudio import models

    return models.wav2vec2_model(**_speech_sizes, aux_num_out=5)


_speech_sizes: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 2, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 32,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 4,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 48,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
}


def _hubert() -> nn.Module:
    from torchaudio import models

    return models.hubert_pretrain_model(
        **_speech_sizes,
        mask_prob=0.5,
        mask_selection="static",
        mask_other=0.0,
        mask_length=3,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=3,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=False,
        num_classes=5,
        final_dim=8,
        feature_grad_mult=0.5,
    )


def _transducer() -> nn.Module:
    from torchaudio import models

    return models.emformer_rnnt_model(
        input_dim=8,
        encoding_dim=16,
        num_symbols=10,
        segment_length=4,
        right_context_length=0,
        time_reduction_input_dim=8,
        time_reduction_stride=2,
        transformer_num_heads=2,
        transformer_ffn_dim=16,
        transformer_num_layers=1,
        transformer_dropout=0.0,
        transformer_activation="gelu",
        transformer_left_context_length=4,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=8,
        num_lstm_layers=1,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.0,
    )


def conformer() -> Iterator[Case]:
    """Yields blocks of attention and convolution."""
    import conformer as package

    def build() -> nn.Module:
        return package.Conformer(dim=16, depth=2, dim_head=8, heads=2, conv_kernel_size=5)

    yield Case("conformer", "Conformer", build, _frames(10, 16), (nn.Conv1d,))


def _frames(length: int, features: int) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(2, length, features),)


PACKAGES = (speechbrain, encodec, vocos, demucs, whisper, torchaudio, conformer)
