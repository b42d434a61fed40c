"""timm's models and helpers, and torchvision's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from loops import adapted, close, fit, trained
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from workflow import Values, workflow

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([1, 4])


@workflow("timm", "ConvNeXt, by a regular expression")
def convnext(peft: Any, folder: Path) -> Values:
    return _trained(peft, _builder("test_convnext"), folder, r".*\.mlp\.fc\d")


@workflow("timm", "EfficientNet: pointwise convolutions, with a new classifier")
def efficientnet(peft: Any, folder: Path) -> Values:
    return _trained(
        peft, _builder("test_efficientnet"), folder, ["conv_pw", "conv_pwl"], modules_to_save=["classifier"]
    )


@workflow("timm", "ViT with DoRA, whose head is exchanged by reset_classifier before")
def dora(peft: Any, folder: Path) -> Values:
    def build() -> Any:
        model = _builder("test_vit", img_size=64)()
        torch.manual_seed(2)
        model.reset_classifier(7)
        return model

    return _trained(peft, build, folder, ["qkv", "proj"], modules_to_save=["head"], use_dora=True)


@workflow("timm", "create_optimizer_v2 with weight decay, create_scheduler_v2 and ModelEmaV3")
def helpers(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _builder("test_vit", img_size=64)(), "attn.qkv", bias="lora_only")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.05, weight_decay=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained(model))
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=1)
    average = ModelEmaV3(model, decay=0.5)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
        loss.backward()
        optimizer.step()
        scheduler.step(step + 1)
        average.update(model, step=step)
        losses.append(loss.item())
    return {"losses": losses, "average": average.module(IMAGES).square().sum().item()}


@workflow(
    "timm",
    "create_optimizer_v2 with layer_decay: deeper layers learn faster",
    apart="timm knows layers by the names of their parameters, which PEFT changes, so that all learn at one rate",
)
def layer_decay(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _builder("test_vit", img_size=64)(), "attn.qkv")
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, layer_decay=0.5)
    return {"scales": [group["lr_scale"] for group in optimizer.param_groups]}


@workflow("timm", "features: forward_features, forward_head and forward_intermediates of an adapted model")
def features(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _builder("test_vit", img_size=64)(), "attn.qkv").eval()
    tokens = model.forward_features(IMAGES)
    close(model.forward_head(tokens), model(IMAGES))
    _, inside = model.forward_intermediates(IMAGES)
    return {"tokens": tokens.square().sum().item(), "inside": [each.square().sum().item() for each in inside]}


@workflow("timm", "a backbone with features_only inside of a segmentation model of one's own")
def segmentation(peft: Any, folder: Path) -> Values:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = _builder("test_resnet", features_only=True)()
            self.head = nn.Conv2d(self.backbone.feature_info.channels()[-1], 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.backbone(images)[-1])

    def build() -> Any:
        torch.manual_seed(0)
        return Segmenter()

    return _trained(peft, build, folder, r".*layer\d.*conv\d", modules_to_save=["head"])


@workflow("torchvision", "ResNet: its convolutions adapted, the classifier trained")
def resnet(peft: Any, folder: Path) -> Values:
    def build() -> Any:
        torch.manual_seed(0)
        return torchvision.models.resnet18(num_classes=5)

    return _trained(peft, build, folder, ["conv1", "conv2"], modules_to_save=["fc"])


@workflow("torchvision", "Swin: its attention and MLP")
def swin(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _swin(), "mlp.0", "mlp.3").eval()
    return {"losses": fit(model, lambda: nn.functional.cross_entropy(model(IMAGES), LABELS))}


@workflow(
    "torchvision",
    "Swin: the projections of its attention, whose weights a function reads",
    apart="PEFT's adapter has no effect there, and gets no gradient: the loss stays the base's",
)
def swin_attention(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _swin(), "qkv").eval()
    return {"output": model(IMAGES).square().sum().item()}


@workflow("torchvision", "a detector: Faster R-CNN, its box head adapted, with losses in training and boxes after")
def detector(peft: Any, folder: Path) -> Values:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    vars(backbone)["out_channels"] = 8
    anchors = torchvision.models.detection.rpn.AnchorGenerator(((16, 32),), ((1.0,),))
    roi = torchvision.ops.MultiScaleRoIAlign(["0"], 4, 2)
    base = torchvision.models.detection.FasterRCNN(
        backbone, 3, rpn_anchor_generator=anchors, box_roi_pool=roi, min_size=64, max_size=64
    )
    model = adapted(peft, base, "fc6", "fc7", "backbone.0", modules_to_save=["box_predictor"]).train()
    boxes: list[Any] = [
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([label])} for label in (1, 2)
    ]
    losses = fit(model, lambda: sum(model(list(IMAGES), boxes).values()))
    found = model.eval()(list(IMAGES))
    assert {*found[0]} == {"boxes", "labels", "scores"}
    return {"losses": losses}


def _builder(name: str, **options: Any) -> Any:
    def build() -> Any:
        torch.manual_seed(0)
        return timm.create_model(name, **({} if "features_only" in options else {"num_classes": 5}), **options)

    return build


def _swin() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4]}
    return torchvision.models.SwinTransformer(patch_size=[4, 4], stochastic_depth_prob=0.0, num_classes=5, **sizes)


def _trained(peft: Any, build: Any, folder: Path, targets: str | list[str], **options: Any) -> Values:
    """Adapts a model in evaluation, trains it, saves, loads and merges its adapter."""
    model = adapted(peft, build().eval(), target_modules=targets, **options)
    losses = fit(model, lambda: model(IMAGES).square().mean(), lr=0.01)
    output = model(IMAGES).detach()
    model.save_pretrained(str(folder))
    loaded = peft.PeftModel.from_pretrained(build().eval(), str(folder)).eval()
    close(loaded(IMAGES), output)
    close(loaded.merge_and_unload()(IMAGES), output, 1e-3)
    return {"losses": losses, "counts": list(model.get_nb_trainable_parameters())}
