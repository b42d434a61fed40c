"""The smallest model of each of torchvision's families, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from case import Case

CLASSIFIERS = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_16",
    "wide_resnet50_2",
]
SEGMENTERS = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")


def cases() -> Iterator[Case]:
    """Yields the models."""
    for name in CLASSIFIERS:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield Case("torchvision", name, _builder(name, **options), _images(299 if name == "inception_v3" else 224))
    for name in SEGMENTERS:
        yield Case("torchvision", name, _segmenter(name), _images(128))
    yield Case("torchvision", "resnet_fpn_backbone", _backbone, _images(128))
    yield Case("torchvision", "raft_small", _flow, _two_images)


def _builder(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def _segmenter(name: str) -> Callable[[], Any]:
    return lambda: torchvision.models.get_model(name, weights=None, weights_backbone=None)


def _backbone() -> Any:
    return torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)


def _flow() -> Any:
    return torchvision.models.optical_flow.raft_small(weights=None)


def _images(side: int) -> Callable[[int, float], tuple[torch.Tensor]]:
    def inputs(batch: int, scale: float) -> tuple[torch.Tensor]:
        size = side if scale == 1 else int(side * scale) // 32 * 32
        return (torch.randn(batch, 3, size, size),)

    return inputs


def _two_images(batch: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    size = int(128 * scale) // 32 * 32
    return torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size)
