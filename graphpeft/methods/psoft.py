"""PSOFT: the weight is rotated within the subspace of its largest singular values.

    ΔW = s B (R − 1) A        W ≈ s B A of rank r: A = Vᵀ, B = U S / s, of the weight's own decomposition, s = α / r
    R = diag(b) Q diag(a)     Q a rotation made of a skew matrix, or any matrix; b and a start with ones

Only R is trained and saved: A and B are computed from the base's weight, also when a file is loaded.

Source: "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", openreview FSHrinMArK; the same numbers
as PEFT's ``tuners/psoft/layer.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.factored import Factored, sizes_of
from graphpeft.methods.matrices import svd_by_seed
from graphpeft.methods.skew import cayley, neumann, skew
from graphpeft.rules.options import Editable, InitWeights, InputDropout, Seed, Size, Within
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Psoft(Factored):
    """The change of a weight.

    Attributes:
        rank: r.
        is_orthogonal: Whether Q is a rotation.
        terms: The number of terms of Neumann's series; None for the exact map.
        eps: The norm to which the skew matrix is shortened for the series; None for any.
    """

    rank: int
    is_orthogonal: bool = True
    terms: int | None = None
    eps: float | None = None

    def at_site(self, site: Any, dtype: torch.dtype) -> Psoft:
        """Returns the rule for a site; A and B are of single precision beside half precision, whatever R is."""
        own: Any = super().at_site(site, dtype)
        return dataclasses.replace(own, casts=site.dtype != torch.promote_types(site.dtype, torch.float32))

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses ranks above the weight's, and weights whose numbers aren't known."""
        reason, sizes = self.numbers_unknown(site) or super().check(site, config), self.sizes
        is_above = reason is None and self.rank > min(sizes.rows, sizes.columns)
        return f"r={self.rank} is above the rank of its {sizes.rows}×{sizes.columns} weight" if is_above else reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns R's matrix and vectors, and the frozen A and B."""
        stack, rank = self.sizes.stack, self.rank
        own = (rank * (rank - 1) // 2,) if self.is_orthogonal else (rank, rank)
        made = {"psoft_R": ParameterSpec((*stack, *own), "psoft_R.weight")}
        names = [name for name in ("vector_b", "vector_a") if getattr(config, f"psoft_mag_{name[-1]}")]
        made |= {f"psoft_{name}": ParameterSpec((*stack, rank), f"psoft_R.{name}") for name in names}
        # also beside half precision, in which the product of both would be another one
        of_base = {"is_trained": False, "is_saved": False, "dtype": torch.promote_types(site.dtype, torch.float32)}
        shapes = {"psoft_A": (*stack, rank, self.sizes.columns), "psoft_B": (*stack, self.sizes.rows, rank)}
        return made | {name: ParameterSpec(shape, name, **of_base) for name, shape in shapes.items()}

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s."""
        return {"scale": config.psoft_alpha / self.rank}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Makes R the identity, or draws its matrix; computes A and B from the weight."""
        matrix = parameters["psoft_R"].zero_()
        if self.is_orthogonal and not config.init_weights:
            matrix.normal_(std=0.1)
        elif not self.is_orthogonal:
            noise = 0 if config.init_weights else torch.randn(matrix.shape) * 0.1
            matrix.copy_(torch.eye(self.rank) + noise)
        for name in {"psoft_vector_a", "psoft_vector_b"} & parameters.keys():
            parameters[name].fill_(1)
        u, s, vh = config.decomposed(self.numbers(site, module))
        s = s / (config.psoft_alpha / self.rank)
        on_a, on_b = (s**0.5, s**0.5) if config.ab_svd_init == "pissa_init" else (torch.ones_like(s), s)
        parameters["psoft_A"].copy_(on_a[..., None] * vh)
        parameters["psoft_B"].copy_(u * on_b[..., None, :])

    def product(
        self,
        psoft_A: Any,
        psoft_B: Any,
        psoft_R: Any,
        scale: Any,
        psoft_vector_b: Any = None,
        psoft_vector_a: Any = None,
    ) -> Product:
        """Returns s B (R − 1) A."""
        size = self.rank if self.is_orthogonal else None
        turned = turning(psoft_R, psoft_vector_b, psoft_vector_a, size, self.terms, self.eps)
        return Product((psoft_B, turned.to(psoft_A.dtype), psoft_A), scale)


@recorded
def turning(
    matrix: Tensor, b: Tensor | None, a: Tensor | None, size: int | None, terms: int | None, eps: float | None
) -> Tensor:
    """Returns diag(b) Q diag(a) − 1.

    Args:
        matrix: The upper triangle of a skew matrix, (…, size · (size − 1) / 2); or Q, (…, r, r), if `size` is None.
        b: The factors of rows, (…, r), if there are any.
        a: The factors of columns, likewise.
        size: r, for a rotation.
        terms: The number of terms of Neumann's series; None for the exact map.
        eps: The norm to which the skew matrix is shortened for the series; None for any.
    """
    if size is not None:
        skewed = skew(matrix, size)
        if eps is not None:
            norms = torch.linalg.matrix_norm(skewed, keepdim=True)
            skewed = torch.where(norms > eps, skewed * (eps / (norms + 1e-12)), skewed)
        matrix = cayley(-skewed) if terms is None else neumann(skewed, terms)
    made = matrix if b is None else b[..., None] * matrix
    made = made if a is None else made * a[..., None, :]
    return made - torch.eye(made.shape[-1], dtype=made.dtype, device=made.device)


@register
@dataclass(kw_only=True)
class PsoftConfig(TargetedConfig):
    """The options of PSOFT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", openreview FSHrinMArK.

    Attributes:
        r: The rank of the subspace, that of the weight at the most.
        psoft_alpha: α; the scale is α/r, and B is divided by it.
        psoft_dropout: The probability of dropping an element of the branch's input in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        ab_svd_init: ``"psoft_init"``: A has orthonormal rows. ``"pissa_init"``: A has roots of the singular values.
        psoft_svd: Whether the weight is decomposed exactly, ``"full"``, or with random numbers, ``"lowrank"``.
        psoft_svd_lowrank_niter: The number of steps of the latter.
        random_seed: The seed of the latter.
        psoft_orth: Whether Q is a rotation; if False, any matrix.
        psoft_mag_b: Whether rows of R have factors.
        psoft_mag_a: Whether columns of R have factors.
        use_cayley_neumann: Whether the rotation is Neumann's series, which is faster than the exact map.
        num_cayley_neumann_terms: The number of terms of the series.
        cayley_neumann_eps: The norm to which the skew matrix is shortened for the series, between 0 and 1.
        init_weights: Whether R is the identity at first; if False, its matrix is drawn.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), PsoftConfig(r=4, target_modules=["0"]))
        >>> {name: tuple(t.shape) for name, t in model[0].default.named_parameters() if t.requires_grad}
        {'psoft_R': (6,), 'psoft_vector_b': (4,), 'psoft_vector_a': (4,)}
    """

    peft_type: ClassVar[PeftType] = PeftType.PSOFT
    prefix: ClassVar[str | None] = "psoft_"
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 32
    psoft_alpha: Annotated[float, Within("a number above 0", 1e-6, 3.4e38)] = 32
    psoft_dropout: InputDropout = 0.0
    fan_in_fan_out: Editable[bool] = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: Annotated[int, Within("a whole number from 0 on", 0, 100)] = 10
    random_seed: Seed = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Annotated[int, Within("a positive integer", 1, 100)] = 5
    cayley_neumann_eps: Annotated[float, Within("a number between 0 and 1", 1e-12, 1 - 1e-12)] | None = None
    init_weights: InitWeights = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Psoft:
        """Returns the rule for a linear operation or a call, or for a weight in any other use."""
        return Psoft(
            sizes=sizes_of(site),
            rank=self.r,
            is_orthogonal=self.psoft_orth,
            terms=self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
            eps=self.cayley_neumann_eps if self.use_cayley_neumann else None,
        )

    def decomposed(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the first r left singular vectors, singular values, and right singular vectors as rows.

        Args:
            weight: The weight, (…, out, in). It is decomposed where it is, as in PEFT.
        """
        if self.psoft_svd == "full":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            return u[..., : self.r], s[..., : self.r], vh[..., : self.r, :]
        u, s, v = svd_by_seed(weight, self.r, self.psoft_svd_lowrank_niter, self.random_seed)
        return u, s, v.mT
