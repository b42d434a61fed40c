"""diffusers' models and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import diffusers
import tiny
import torch
import transformers
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from diffusers.utils import convert_state_dict_to_diffusers
from loops import adapted, close, fit, trained
from torch import Tensor, nn
from workflow import Values, workflow

TOOL = "diffusers"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
STATES = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))
TIMES = torch.tensor([3, 7])


@workflow(TOOL, "a UNet is adapted, trained, saved and loaded")
def unet_trained(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _unet(), *ATTENTION)
    losses = fit(model, lambda: _denoised(model).square().mean(), lr=0.01)
    model.save_pretrained(str(folder))
    close(_denoised(peft.PeftModel.from_pretrained(_unet(), str(folder))), _denoised(model))
    return {"losses": losses}


@workflow(TOOL, "a UNet's attention, time embedding and convolutions, with DoRA, and merged")
def unet_convolutions(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _unet(), *ATTENTION, "conv1", "time_emb_proj", "proj_in", use_dora=True)
    losses = fit(model, lambda: _denoised(model).square().mean(), lr=0.01)
    expected = _denoised(model)
    close(_denoised(model.merge_and_unload()), expected, 1e-3)
    return {"losses": losses}


@workflow(
    TOOL,
    "unet.add_adapter(config)",
    apart="Diffusers calls PEFT's own inject_adapter_in_model: call get_peft_model(unet, config)",
)
def added(peft: Any, folder: Path) -> Values:
    unet = _unet().requires_grad_(False)
    torch.manual_seed(1)
    unet.add_adapter(_config(peft))
    return {"losses": fit(unet, lambda: _denoised(unet).square().mean(), lr=0.01)}


@workflow(
    TOOL,
    "a file is loaded by unet.load_lora_adapter beside an adapter that is there",
    apart="Diffusers lets PEFT wrap layers: load it before the model is adapted, or by model.load_adapter",
)
def loaded_beside(peft: Any, folder: Path) -> Values:
    first = adapted(peft, _unet(), *ATTENTION)
    state = peft.get_peft_model_state_dict(first)
    tensors = {name.removeprefix("base_model.model."): tensor.clone() for name, tensor in state.items()}
    unet = _unet()
    torch.manual_seed(1)
    peft.inject_adapter_in_model(_config(peft), unet)
    unet.load_lora_adapter(tensors, prefix=None, adapter_name="second")
    unet.set_adapters(["second"])
    return {"sum": _denoised(unet).sum().item()}


@workflow(TOOL, "inject_adapter_in_model as the training scripts' add_adapter, with trained parameters in float32")
def injected(peft: Any, folder: Path) -> Values:
    unet = _unet().requires_grad_(False).to(torch.bfloat16)
    torch.manual_seed(1)
    unet = peft.inject_adapter_in_model(_config(peft), unet)
    cast_training_params(unet, dtype=torch.float32)
    assert {parameter.dtype for parameter in trained(unet)} == {torch.float32}

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _denoised(unet).float().square().mean()

    return {"losses": [round(value, 2) for value in fit(unet, loss, lr=0.01)]}


@workflow(TOOL, "an adapter is saved as a pipeline's LoRA weights, and loaded by load_lora_weights")
def lora_weights(peft: Any, folder: Path) -> Values:
    unet = adapted(peft, _unet(), *ATTENTION)
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    layers = {name.removeprefix("base_model.model."): value for name, value in layers.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers)
    pipeline = _pipeline()
    pipeline.load_lora_weights(str(folder))
    pipeline.unet.set_adapters(pipeline.get_list_adapters()["unet"], weights=[1.5])  # α / r
    close(_denoised(pipeline.unet), _denoised(unet))
    return {"image": _image(pipeline)}


@workflow(TOOL, "a pipeline runs with an adapted UNet and text encoder")
def whole_pipeline(peft: Any, folder: Path) -> Values:
    pipeline = _pipeline()
    pipeline.unet = adapted(peft, pipeline.unet, *ATTENTION)
    pipeline.text_encoder = adapted(peft, pipeline.text_encoder, "q_proj", "v_proj")
    return {"image": _image(pipeline)}


@workflow(TOOL, "two adapters of a UNet by set_adapters with weights, and disable_lora")
def weighted(peft: Any, folder: Path) -> Values:
    unet = adapted(peft, _unet(), *ATTENTION)
    first = _denoised(unet)
    torch.manual_seed(2)
    unet.add_adapter("other", _config(peft, r=2))
    unet.set_adapters(["default", "other"], [0.5, 0.25])
    both = _denoised(unet)
    unet.disable_lora()
    base = _denoised(unet)
    close(base, _denoised(_unet()))
    unet.enable_lora()
    close(_denoised(unet), both)
    unet.set_adapters("default")
    close(_denoised(unet), first)
    unet.delete_adapters("other")
    return {"both": both.square().sum().item(), "base": base.square().sum().item(), "left": list(unet.peft_config)}


@workflow(TOOL, "fuse_lora with a scale and unfuse_lora of a UNet")
def fused(peft: Any, folder: Path) -> Values:
    unet = adapted(peft, _unet(), *ATTENTION)
    before = _denoised(unet)
    unet.fuse_lora(lora_scale=0.5)
    fused = _denoised(unet)
    assert (fused - before).abs().max() > 1e-3
    unet.unfuse_lora()
    return {"fused": fused.square().sum().item()}


@workflow(TOOL, "cross_attention_kwargs scale the adapters of a call")
def scaled(peft: Any, folder: Path) -> Values:
    unet = adapted(peft, _unet(), *ATTENTION)
    full, half = _denoised(unet), _denoised(unet, cross_attention_kwargs={"scale": 0.5})
    close(_denoised(unet), full)
    assert (half - full).abs().max() > 1e-3
    return {"half": half.square().sum().item()}


@workflow(TOOL, "save_lora_adapter of a UNet, read by another's load_lora_adapter")
def lora_adapter(peft: Any, folder: Path) -> Values:
    unet = adapted(peft, _unet(), *ATTENTION, lora_alpha=4)
    unet.save_lora_adapter(str(folder))
    other = _unet()
    other.load_lora_adapter(str(folder), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    close(_denoised(other), _denoised(unet))
    return {"output": _denoised(other).square().sum().item(), "files": sorted(file.name for file in folder.iterdir())}


@workflow(TOOL, "a DreamBooth loop: accelerate, min-SNR weights, an average, a text encoder, weights saved")
def dreambooth(peft: Any, folder: Path) -> Values:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=20)
    unet, encoder = adapted(peft, _unet(), *ATTENTION), adapted(peft, _encoder(), "q_proj", "v_proj")
    parameters = [*trained(unet), *trained(encoder)]
    average = EMAModel(trained(unet), decay=0.9)
    unet, encoder, optimizer = accelerator.prepare(unet, encoder, torch.optim.AdamW(parameters, lr=0.01))
    ids, losses = torch.arange(3, 13).reshape(2, 5), []
    torch.manual_seed(6)
    for _ in range(4):
        with accelerator.accumulate(unet, encoder):
            noise, times = torch.randn_like(LATENTS), torch.randint(0, 20, (2,))
            noisy = scheduler.add_noise(LATENTS, noise, times)  # type: ignore[arg-type]
            found = unet(noisy, times, encoder(ids)[0]).sample
            weights = compute_snr(scheduler, times).clamp(max=5.0) / compute_snr(scheduler, times)
            loss = (weights * (found - noise).square().mean((1, 2, 3))).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(trained(unet))
        losses.append(loss.item())
    average.copy_to(trained(unet))
    values = [peft.get_peft_model_state_dict(accelerator.unwrap_model(each)) for each in (unet, encoder)]
    layers = [{n.removeprefix("base_model.model."): v for n, v in each.items()} for each in values]
    diffusers.StableDiffusionPipeline.save_lora_weights(
        str(folder), unet_lora_layers=layers[0], text_encoder_lora_layers=layers[1]
    )
    pipeline = _pipeline()
    pipeline.load_lora_weights(str(folder))
    return {"losses": losses, "tensors": [len(each) for each in values], "image": _image(pipeline)}


@workflow(TOOL, "gradient checkpointing of a UNet")
def checkpointed(peft: Any, folder: Path) -> Values:
    unet = adapted(peft, _unet().train(), *ATTENTION)
    unet.enable_gradient_checkpointing()
    return {"losses": fit(unet, lambda: _denoised(unet).square().mean(), lr=0.01)}


@workflow(TOOL, "DiT: a transformer with classes")
def dit(peft: Any, folder: Path) -> Values:
    torch.manual_seed(0)
    base = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    ).eval()
    classes = torch.tensor([1, 5])
    return _transformer(
        peft, base, lambda model: model(LATENTS, timestep=TIMES, class_labels=classes).sample, ATTENTION
    )


@workflow(TOOL, "SD3: joint attention over images and texts")
def sd3(peft: Any, folder: Path) -> Values:
    torch.manual_seed(0)
    size = {"attention_head_dim": 4, "num_attention_heads": 2, "num_layers": 2, "joint_attention_dim": 16}
    base = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, patch_size=2, caption_projection_dim=8, pooled_projection_dim=6, **size
    ).eval()
    pooled = torch.ones(2, 6)
    targets = (*ATTENTION, "add_q_proj", "add_v_proj", "ff.net.2")
    return _transformer(peft, base, lambda model: model(LATENTS, STATES, pooled, TIMES).sample, targets)


@workflow(TOOL, "Flux: double and single blocks")
def flux(peft: Any, folder: Path) -> Values:
    torch.manual_seed(0)
    size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    base = diffusers.FluxTransformer2DModel(
        in_channels=4, patch_size=1, joint_attention_dim=16, pooled_projection_dim=6, axes_dims_rope=(2, 4, 2), **size
    ).eval()
    tokens = {"hidden_states": LATENTS.flatten(2).transpose(1, 2), "encoder_hidden_states": STATES}
    places = {"img_ids": torch.arange(192.0).reshape(64, 3) % 8, "txt_ids": torch.zeros(5, 3)}
    rest = {"pooled_projections": torch.ones(2, 6), "timestep": TIMES / 10}
    return _transformer(
        peft, base, lambda model: model(**tokens, **places, **rest).sample, ("to_q", "to_v", "add_q_proj", "proj_mlp")
    )


@workflow(TOOL, "a VAE's attention and convolutions")
def vae(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _vae(), "to_q", "to_v", "conv1")
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return {"losses": fit(model, lambda: (model(images).sample - images).square().mean(), lr=0.01)}


def _unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def _vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


def _encoder() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=len(tiny.LETTERS), max_position_embeddings=12, eos_token_id=1, **size)
    ).eval()


def _pipeline() -> Any:
    letters = tiny.tokenizer()
    letters.model_max_length = 12
    pipeline = diffusers.StableDiffusionPipeline(
        _vae(),
        _encoder(),
        letters,
        _unet(),
        diffusers.DDIMScheduler(),
        None,
        None,
        requires_safety_checker=False,  # type: ignore[arg-type]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _image(pipeline: Any) -> float:
    generator = torch.Generator().manual_seed(8)
    options = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    images = pipeline("a cat", generator=generator, **options).images
    return float(images.sum())


def _config(peft: Any, **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(ATTENTION), "init_lora_weights": False}
    return peft.LoraConfig(**settings | options)


def _denoised(unet: Any, **options: Any) -> Tensor:
    dtype = next(unet.parameters()).dtype
    return unet(LATENTS.to(dtype), TIMES, STATES.to(dtype), **options).sample


def _transformer(peft: Any, base: Any, call: Any, targets: tuple[str, ...]) -> Values:
    model = adapted(peft, base, *targets)
    losses = fit(model, lambda: call(model).square().mean(), lr=0.01)
    expected = call(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, nn.ModuleDict) for module in merged.modules())
    close(call(merged), expected, 1e-3)
    return {"losses": losses}
