"""Models that generate, and operators between functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case, with_other_values
from torch import nn


def neuraloperator() -> Iterator[Case]:
    """Yields operators between functions, with weights of complex numbers."""
    from neuralop import models

    def field() -> tuple[torch.Tensor]:
        return (torch.randn(2, 1, 16, 16),)

    name = "neuraloperator"
    convolutions = (nn.Conv1d,)
    yield Case(name, "FNO", lambda: models.FNO((4, 4), 1, 2, 8, n_layers=2), field, convolutions)
    yield Case(name, "TFNO", lambda: models.TFNO((4, 4), 1, 2, 8, n_layers=2, rank=0.3), field, convolutions)
    yield Case(
        name,
        "UNO",
        lambda: models.UNO(
            1,
            2,
            8,
            n_layers=3,
            uno_out_channels=[8, 8, 8],
            uno_n_modes=[[4, 4]] * 3,
            uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2, 2]],
            lifting_channels=8,
            projection_channels=8,
            channel_mlp_skip="linear",
        ),
        field,
        convolutions,
    )
    yield Case(
        name,
        "CODANO",
        lambda: models.CODANO(
            hidden_variable_codimension=4,
            lifting_channels=8,
            projection_channels=8,
            n_layers=2,
            n_heads=[2, 2],
            n_modes=[[4, 4]] * 2,
            attention_scaling_factors=[1, 1],
            per_layer_scaling_factors=[[1, 1]] * 2,
            variable_ids=["a"],
        ),
        lambda: (torch.randn(2, 1, 16, 16),),
        convolutions,
    )


def denoising_diffusion_pytorch() -> Iterator[Case]:
    """Yields UNets of diffusion, one with weights that are normed in each call, and a loss around one."""
    import denoising_diffusion_pytorch as diffusion
    from denoising_diffusion_pytorch.karras_unet import KarrasUnet

    def images(channels: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return lambda: (torch.randn(2, channels, 16, 16), torch.tensor([3, 8]))

    def unet() -> nn.Module:
        return diffusion.Unet(dim=8, dim_mults=(1, 2), flash_attn=False)

    name = "denoising-diffusion-pytorch"
    yield Case(name, "Unet", unet, images(3))
    yield Case(name, "Unet with its convolutions", unet, images(3), (nn.Conv2d,))
    yield Case(
        name,
        "KarrasUnet",
        lambda: with_other_values(
            KarrasUnet(
                image_size=16,
                dim=8,
                dim_max=16,
                num_downsamples=2,
                num_blocks_per_stage=1,
                attn_res=(8,),
                attn_dim_head=8,
            )
        ),
        images(4),
    )
    yield Case(
        name,
        "GaussianDiffusion",
        lambda: diffusion.GaussianDiffusion(unet(), image_size=16, timesteps=10),
        lambda: (torch.rand(2, 3, 16, 16),),
        (nn.Conv2d,),
    )


def diffusers() -> Iterator[Case]:
    """Yields transformers and UNets of diffusion, with processors."""
    import diffusers as package

    name = "diffusers"
    yield Case(
        name,
        "UNet2DConditionModel",
        lambda: package.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        lambda: (torch.randn(2, 4, 8, 8), torch.tensor([3, 8]), torch.randn(2, 5, 12)),
    )
    yield Case(
        name,
        "AutoencoderKL",
        lambda: package.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1),
        lambda: (torch.randn(1, 3, 16, 16),),
        (nn.Conv2d,),
    )
    yield Case(
        name,
        "FluxTransformer2DModel",
        lambda: package.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: {
            "hidden_states": torch.randn(1, 6, 4),
            "encoder_hidden_states": torch.randn(1, 3, 12),
            "pooled_projections": torch.randn(1, 8),
            "timestep": torch.tensor([0.3]),
            "img_ids": torch.zeros(6, 3),
            "txt_ids": torch.zeros(3, 3),
            "guidance": None,
        },
    )
    yield Case(
        name,
        "SD3Transformer2DModel",
        lambda: package.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        lambda: (torch.randn(1, 4, 8, 8), torch.randn(1, 3, 12), torch.randn(1, 8), torch.tensor([3.0])),
    )


def zuko() -> Iterator[Case]:
    """Yields flows, which return distributions, with masked layers."""
    import zuko as package

    class Density(nn.Module):
        def __init__(self, flow: nn.Module) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.flow(context).log_prob(x)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(4, 3), torch.randn(4, 2)

    yield Case("zuko", "NSF", lambda: Density(package.flows.NSF(3, 2, transforms=2, hidden_features=(16, 16))), pair)
    yield Case("zuko", "CNF", lambda: Density(package.flows.CNF(3, 2, hidden_features=(16, 16))), pair)


def nflows() -> Iterator[Case]:
    """Yields a flow of autoregressive networks."""
    from nflows import distributions, flows, transforms

    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            steps = [transforms.MaskedAffineAutoregressiveTransform(3, 16), transforms.ReversePermutation(3)]
            self.flow = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([3]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.flow.log_prob(x)

    yield Case("nflows", "masked autoregressive flow", Density, lambda: (torch.randn(4, 3),))


def gpytorch() -> Iterator[Case]:
    """Yields a Gaussian process on features that a network computes."""
    import gpytorch as package

    class DeepKernel(package.models.ExactGP):
        def __init__(self) -> None:
            likelihood = package.likelihoods.GaussianLikelihood()
            super().__init__(None, None, likelihood)
            self.features = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            self.mean, self.kernel = package.means.ConstantMean(), package.kernels.RBFKernel()

        def forward(self, x: torch.Tensor) -> Any:
            features = self.features(x)
            return package.distributions.MultivariateNormal(self.mean(features), self.kernel(features))


PACKAGES = (neuraloperator, denoising_diffusion_pytorch, diffusers, zuko, nflows)
