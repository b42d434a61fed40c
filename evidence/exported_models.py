"""Writes the table of docs/export.md: which models of other libraries are exported.

Each model has an adapter whose change is felt. It is exported in the simplest form and in the one that asks most, both
with all sizes open, and checked by `graphpeft.export`.
"""

from __future__ import annotations

import importlib
import os
import re
import string
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm

import graphpeft

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
HEAD = "| model | of | merged, pt2 | inputs, ONNX | inputs of the program |"
FORMS = (("merged", "pt2"), ("inputs", "onnx"))
"""Adapter modes and formats."""

IDS = {"input_ids": torch.arange(16).view(2, 8) + 3}
DECODER = {**IDS, "decoder_input_ids": torch.arange(10).view(2, 5) + 3, "use_cache": False}
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class Model:
    """A small model of a library.

    Attributes:
        library: The library.
        build: Makes the model from the library's Python module.
        example: The example inputs.
        targets: The layers that LoRA adapts.
        open_sizes: Whether all sizes are open, which takes an hour where each comes from windows of an image.
    """

    library: str
    build: Callable[[Any], Any]
    example: Callable[[], Any]
    targets: list[str]
    open_sizes: bool = True


def transformers_model(config: str, cls: str, targets: list[str], example: Any, **options: Any) -> Model:
    """Returns a model of Transformers, of a config with these options."""

    def build(library: Any) -> Any:
        return getattr(library, cls)(getattr(library, config)(**options))

    return Model("transformers", build, lambda: example, targets)


def timm_model(name: str, targets: list[str], size: int = 32, **options: Any) -> Model:
    """Returns a model of timm with five classes."""
    return Model(
        "timm",
        lambda library: library.create_model(name, pretrained=False, num_classes=5, **options),
        lambda: (torch.randn(2, 3, size, size),),
        targets,
    )


def diffusers_model(cls: str, targets: list[str], example: Callable[[], dict[str, Any]], **options: Any) -> Model:
    """Returns a model of diffusers, which returns a tuple."""
    return Model(
        "diffusers",
        lambda library: getattr(library, cls)(**options),
        lambda: {**example(), "return_dict": False},
        targets,
    )


def _noise(channels: int = 4, size: int = 8) -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, channels, size, size), "timestep": torch.tensor([1, 7])}


ATTENTION = ["to_q", "to_v", "to_out.0"]

MODELS: dict[str, Model] = {
    "BERT": transformers_model(
        "BertConfig", "BertForSequenceClassification", ["query", "value", "dense"], IDS, **SIZES
    ),
    "DeBERTa v2": transformers_model(
        "DebertaV2Config",
        "DebertaV2Model",
        ["query_proj", "value_proj", "dense"],
        IDS,
        **SIZES,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "Llama": transformers_model(
        "LlamaConfig",
        "LlamaForCausalLM",
        ["q_proj", "v_proj", "up_proj"],
        {**IDS, "use_cache": False},
        **SIZES,
    ),
    "Mixtral": transformers_model(
        "MixtralConfig",
        "MixtralForCausalLM",
        ["q_proj", "v_proj"],
        {**IDS, "use_cache": False},
        **SIZES,
        num_key_value_heads=2,
        num_local_experts=3,
    ),
    "T5": transformers_model(
        "T5Config",
        "T5ForConditionalGeneration",
        ["q", "v", "wo"],
        DECODER,
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
    ),
    "Wav2Vec2": transformers_model(
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        ["q_proj", "v_proj", "intermediate_dense"],
        {"input_values": torch.linspace(-1, 1, 1600).view(2, 800)},
        **SIZES,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "Reformer": transformers_model(
        "ReformerConfig",
        "ReformerModel",
        ["query", "value"],
        {"input_ids": torch.arange(64).view(2, 32) % 47 + 3, "use_cache": False},
        vocab_size=50,
        hidden_size=16,
        attention_head_size=8,
        num_attention_heads=2,
        feed_forward_size=16,
        attn_layers=["local", "lsh"],
        axial_pos_shape=(4, 8),
        axial_pos_embds_dim=(8, 8),
        num_buckets=4,
        lsh_attn_chunk_length=8,
        local_attn_chunk_length=8,
        is_decoder=False,
    ),
    "Swin2SR": transformers_model(
        "Swin2SRConfig",
        "Swin2SRForImageSuperResolution",
        ["query", "value"],
        {"pixel_values": torch.linspace(0, 1, 1536).view(2, 3, 16, 16)},
        image_size=16,
        embed_dim=12,
        depths=[2],
        num_heads=[2],
        window_size=4,
    ),
    "ViT": timm_model("vit_tiny_patch16_224", ["qkv", "attn.proj", "fc1"], img_size=32, embed_dim=24, num_heads=2),
    "ConvNeXt": timm_model("convnext_atto", ["fc1", "fc2"], size=64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "Swin": timm_model(
        "swin_tiny_patch4_window7_224",
        ["qkv", "proj", "fc1"],
        img_size=32,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
    ),
    "DeepLab v3": Model(
        "torchvision",
        lambda library: library.models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=3
        ),
        lambda: (torch.randn(2, 3, 64, 64),),
        ["classifier.1", "classifier.4"],
    ),
    "Faster R-CNN": Model(
        "torchvision",
        lambda library: library.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=3
        ),
        lambda: ([torch.rand(3, 64, 64)],),
        ["fc6", "fc7", "cls_score"],
    ),
    "UNet": diffusers_model(
        "UNet2DConditionModel",
        ["to_q", "to_k", "to_v", "to_out.0"],
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": torch.randn(2, 5, 12),
        },
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ),
    "DiT": diffusers_model(
        "DiTTransformer2DModel",
        ATTENTION,
        lambda: {**_noise(), "class_labels": torch.tensor([1, 2])},
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ),
    "SD3": diffusers_model(
        "SD3Transformer2DModel",
        [*ATTENTION, "add_k_proj"],
        lambda: {
            **_noise(),
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "pooled_projections": torch.randn(2, 16),
        },
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    ),
    "Flux": diffusers_model(
        "FluxTransformer2DModel",
        [*ATTENTION, "proj_mlp"],
        lambda: {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 5, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.tensor([1.0, 0.5]),
            "img_ids": torch.randn(16, 3),
            "txt_ids": torch.randn(5, 3),
        },
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ),
    "PixArt": diffusers_model(
        "PixArtTransformer2DModel",
        ATTENTION,
        lambda: {
            **_noise(),
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        norm_num_groups=4,
    ),
    "AutoencoderKL": diffusers_model(
        "AutoencoderKL",
        ["to_q", "to_v"],
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ),
    "GCN": Model(
        "torch_geometric",
        lambda library: library.nn.models.GCN(8, 16, 2, 4),
        lambda: (torch.randn(6, 8), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])),
        ["lin"],
    ),
    "CLIP": Model(
        "open_clip",
        lambda library: library.model.CLIP(
            embed_dim=16,
            vision_cfg={"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
            text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
        ),
        lambda: (torch.randn(2, 3, 16, 16), torch.arange(16).view(2, 8) + 3),
        ["c_fc", "c_proj"],
    ),
    "Decoder": Model(
        "x_transformers",
        lambda library: library.TransformerWrapper(
            num_tokens=50, max_seq_len=32, attn_layers=library.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8)
        ),
        lambda: (torch.arange(16).view(2, 8) + 3,),
        ["to_q", "to_v", "to_out"],
    ),
    "ViT of lucidrains": Model(
        "vit_pytorch",
        lambda library: library.ViT(
            image_size=32, patch_size=8, num_classes=5, dim=16, depth=2, heads=2, mlp_dim=32, dim_head=8
        ),
        lambda: (torch.randn(2, 3, 32, 32),),
        ["to_qkv", "to_out.0"],
    ),
    "SwinUNETR": Model(
        "monai",
        lambda library: library.networks.nets.SwinUNETR(
            in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), spatial_dims=2
        ),
        lambda: (torch.randn(1, 1, 64, 64),),
        ["qkv", "proj", "linear1"],
        open_sizes=False,
    ),
}


def adapted(name: str, library: Any) -> tuple[Any, Any]:
    """Returns a model with an adapter, and its example inputs."""
    torch.manual_seed(0)
    of = MODELS[name]
    model, example = of.build(library).eval(), of.example()
    config = graphpeft.LoraConfig(r=2, lora_alpha=5, target_modules=of.targets, init_lora_weights=False)
    return graphpeft.get_peft_model(model, config), example


def cells(name: str, library: Any) -> list[str]:
    """Returns the cells of a model's row: its library, how each form ended, and the shapes of the inputs."""
    model, example = adapted(name, library)
    ends, shapes = [], ""
    with tempfile.TemporaryDirectory() as folder:
        for mode, format in FORMS:
            try:
                report = graphpeft.export(
                    model, example, Path(folder) / f"model.{format}", format, mode, dynamic=MODELS[name].open_sizes
                )
            except graphpeft.ExportError as error:
                ends.append("nor is the base" if "The base without its adapters" in str(error) else f"no: {error}")
            else:
                ends.append("yes")
                shapes = ", ".join(f"`{key} {shape}`" for key, shape in report.inputs.items())
    return [MODELS[name].library, *ends, _lettered(shapes)]


def _lettered(shapes: str) -> str:
    """Returns shapes with a letter for each symbol, in order, since PyTorch's numbers of symbols vary."""
    symbols = dict.fromkeys(re.findall(r"\bs\d+\b", shapes))
    for symbol, letter in zip(symbols, string.ascii_lowercase, strict=False):
        shapes = re.sub(rf"\b{symbol}\b", letter, shapes)
    return shapes


def rows_of(page: str) -> dict[str, list[str]]:
    """Returns the cells of the table's rows in a page, by model."""
    found = {}
    for line in page.partition(HEAD)[2].splitlines()[2:]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[name] = cells
    return found


def lines(rows: dict[str, list[str]]) -> Iterator[str]:
    """Yields the lines of the table, in the order of `MODELS`."""
    yield HEAD
    yield "| --- | --- | --- | --- | --- |"
    for name in MODELS:
        if name in rows:
            yield f"| {' | '.join([name, *rows[name]])} |"


def write(rows: dict[str, list[str]]) -> None:
    """Writes the table into the page."""
    above, _, below = PAGE.read_text(encoding="utf-8").partition(HEAD)
    behind = below.partition("\n\n")[2]
    PAGE.write_text(f"{above}{chr(10).join(lines(rows))}\n\n{behind}", encoding="utf-8")


def main(names: list[str]) -> None:
    """Exports these models, or all, and writes each row when it is known; libraries that aren't there are left out."""
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    for name in tqdm(names or MODELS):
        try:
            library = importlib.import_module(MODELS[name].library)
        except ImportError:
            continue
        rows[name] = cells(name, library)
        write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
