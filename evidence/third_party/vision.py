"""Models of images and volumes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case, with_other_values
from torch import nn


def open_clip() -> Iterator[Case]:
    """Yields models of images and texts with attentions of PyTorch and of timm."""
    import open_clip as clip

    name = "open_clip_torch"
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    tower = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    images = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}

    def pair() -> dict[str, Any]:
        return {"image": torch.randn(2, 3, 32, 32), "text": torch.randint(1, 64, (2, 12))}

    yield Case(name, "CLIP", lambda: clip.model.CLIP(16, tower, text), pair)
    yield Case(
        name, "CLIP with ResNet", lambda: with_other_values(clip.model.CLIP(16, images, text)), pair, (nn.Conv2d,)
    )
    yield Case(name, "CoCa", lambda: _captioner(text, tower), pair)


def _captioner(text: dict[str, Any], tower: dict[str, Any]) -> nn.Module:
    import open_clip as clip

    return with_other_values(
        clip.CoCa(
            32,
            {**text, "mlp_ratio": 2},
            {**text, "embed_cls": True, "output_tokens": True},
            {**tower, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        ),
        "text_decoder.text_projection",
    )


def clip_anytorch() -> Iterator[Case]:
    """Yields OpenAI's CLIP."""
    import clip

    def build() -> nn.Module:
        return clip.model.CLIP(16, 32, 2, 64, 8, 12, 64, 32, 2, 2)

    yield Case("clip-anytorch", "CLIP", build, lambda: (torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, 12))))


def segmentation_models_pytorch() -> Iterator[Case]:
    """Yields segmenters, whose encoders and decoders are convolutions and transformers."""
    import segmentation_models_pytorch as smp

    name = "segmentation-models-pytorch"
    for build, encoder, layers in (
        (smp.Unet, "resnet18", (nn.Conv2d,)),
        (smp.DeepLabV3Plus, "mobilenet_v2", (nn.Conv2d,)),
        (smp.FPN, "efficientnet-b0", (nn.Conv2d,)),
        (smp.Segformer, "mit_b0", ()),
    ):
        yield Case(name, f"{build.__name__} on {encoder}", _segmenter(build, encoder), _images(3, 64), layers)


def _segmenter(build: Any, encoder: str) -> Callable[[], nn.Module]:
    return lambda: build(encoder_name=encoder, encoder_weights=None, classes=2)


def monai() -> Iterator[Case]:
    """Yields networks of medical volumes and images."""
    from monai.networks import nets

    name = "monai"
    convolutions = (nn.Conv2d, nn.Conv3d)
    yield Case(name, "UNet", lambda: nets.UNet(3, 1, 2, (4, 8), (2,), num_res_units=1), _volumes(16), convolutions)
    yield Case(name, "ViT", lambda: nets.ViT(1, (16,) * 3, 8, 32, 64, 2, 2, classification=True), _volumes(16))
    yield Case(
        name,
        "UNETR",
        lambda: nets.UNETR(1, 2, 32, feature_size=4, hidden_size=32, mlp_dim=64, num_heads=2),
        _volumes(32),
    )
    yield Case(
        name,
        "SwinUNETR",
        lambda: nets.SwinUNETR(1, 2, feature_size=12, depths=(1,) * 4, spatial_dims=2),
        _images(1, 64),
    )
    yield Case(
        name,
        "DiffusionModelUNet",
        lambda: nets.DiffusionModelUNet(
            2,
            1,
            1,
            channels=(8, 16),
            attention_levels=(False, True),
            num_res_blocks=1,
            norm_num_groups=4,
            num_head_channels=8,
            with_conditioning=True,
            cross_attention_dim=6,
        ),
        lambda: (torch.randn(2, 1, 16, 16), torch.tensor([3, 7]), torch.randn(2, 4, 6)),
        convolutions,
    )
    yield Case(name, "AttentionUnet", lambda: nets.AttentionUnet(2, 1, 2, (4, 8), (2,)), _images(1, 32), convolutions)
    yield Case(name, "DynUNet", _dynamic_unet, _images(1, 32), convolutions)
    yield Case(name, "TorchVisionFCModel", _with_head, _images(3, 64), convolutions)


def _dynamic_unet() -> nn.Module:
    from monai.networks import nets

    return nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16])


def _with_head() -> nn.Module:
    from monai.networks import nets

    return nets.TorchVisionFCModel("resnet18", 3, use_conv=True, pool=None)


def vit_pytorch() -> Iterator[Case]:
    """Yields vision transformers in einops and plain attention."""
    import vit_pytorch as vit
    from vit_pytorch import cait, cct, cross_vit, max_vit, mobile_vit, nest, simple_vit, vivit

    name = "vit-pytorch"
    sizes = {"image_size": 32, "num_classes": 3, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48}
    images = _images(3, 32)
    yield Case(name, "ViT", lambda: vit.ViT(patch_size=8, dropout=0.1, **sizes), images)
    yield Case(name, "SimpleViT", lambda: simple_vit.SimpleViT(patch_size=8, **sizes), images)
    yield Case(
        name,
        "CaiT",
        lambda: cait.CaiT(patch_size=8, cls_depth=1, layer_dropout=0.05, **sizes),
        images,
    )
    yield Case(name, "CCT", lambda: cct.cct_2(img_size=32, n_conv_layers=1, num_classes=3), images)
    yield Case(
        name,
        "NesT",
        lambda: nest.NesT(
            image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=2, block_repeats=(1, 1), num_classes=3
        ),
        images,
        (nn.Conv2d,),
    )
    yield Case(
        name,
        "CrossViT",
        lambda: cross_vit.CrossViT(
            image_size=32,
            num_classes=3,
            depth=1,
            sm_dim=16,
            lg_dim=32,
            sm_patch_size=8,
            sm_enc_depth=1,
            sm_enc_heads=2,
            sm_enc_mlp_dim=32,
            sm_enc_dim_head=8,
            lg_patch_size=16,
            lg_enc_depth=1,
            lg_enc_heads=2,
            lg_enc_mlp_dim=32,
            lg_enc_dim_head=8,
            cross_attn_depth=1,
            cross_attn_heads=2,
            cross_attn_dim_head=8,
        ),
        images,
    )
    yield Case(
        name,
        "MaxViT",
        lambda: max_vit.MaxViT(num_classes=3, dim=16, depth=(1, 1), window_size=4, dim_head=8),
        images,
        (nn.Conv2d,),
    )
    yield Case(
        name,
        "MobileViT",
        lambda: mobile_vit.MobileViT((64, 64), [16, 16, 16], [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 16], 3, depths=(1, 1, 1)),
        _images(3, 64),
    )
    yield Case(
        name,
        "ViViT",
        lambda: vivit.ViViT(
            image_size=16,
            image_patch_size=8,
            frames=4,
            frame_patch_size=2,
            num_classes=3,
            dim=32,
            spatial_depth=1,
            temporal_depth=1,
            heads=2,
            mlp_dim=32,
        ),
        lambda: (torch.randn(2, 3, 4, 16, 16),),
    )


def kornia() -> Iterator[Case]:
    """Yields models of computer vision."""
    from kornia.models import tiny_vit, vit

    name = "kornia"
    yield Case(
        name,
        "VisionTransformer",
        lambda: vit.VisionTransformer(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        _images(3, 32),
    )
    yield Case(
        name,
        "TinyViT",
        lambda: tiny_vit.TinyViT(
            img_size=64,
            num_classes=3,
            embed_dims=(16, 32, 32, 32),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 2),
            window_sizes=(4, 4, 2, 2),
        ),
        _images(3, 64),
        (nn.Conv2d,),
    )


def efficientnet_pytorch() -> Iterator[Case]:
    """Yields EfficientNet with convolutions of its own, whose padding is computed."""
    import efficientnet_pytorch as efficientnet

    def build() -> nn.Module:
        return efficientnet.EfficientNet.from_name("efficientnet-b0", num_classes=3)

    yield Case("efficientnet-pytorch", "b0", build, _images(3, 64), (nn.Conv2d,))


def spandrel() -> Iterator[Case]:
    """Yields models that restore images, and enlarge them."""
    from spandrel.architectures.HAT import HAT
    from spandrel.architectures.SwinIR import SwinIR

    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "img_size": 16, "window_size": 4}
    squeezed = {"compress_ratio": 2, "squeeze_factor": 4}
    for cls, more in ((SwinIR, {}), (HAT, squeezed)):
        build = functools.partial(cls, **sizes, **more, upscale=2, upsampler="pixelshuffle")
        yield Case("spandrel", cls.__name__, build, _images(3, 16), (nn.Conv2d,))


def _images(channels: int, side: int) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(2, channels, side, side),)


def _volumes(side: int, count: int = 2) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(count, 1, side, side, side),)


PACKAGES = (
    open_clip,
    clip_anytorch,
    segmentation_models_pytorch,
    monai,
    vit_pytorch,
    kornia,
    efficientnet_pytorch,
    spandrel,
)
