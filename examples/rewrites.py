"""Ten rewrites by example, each in a few lines: fused layers, fake quantisation, early exits, attention and more.

Takes about 5 s on one core. Run it with ``python examples/rewrites.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from graphpeft import recorded
from graphpeft.rewrites import Match, Rewrite, either, held, layer

# 1. A normalisation after a convolution scales and shifts what the convolution could scale and shift itself. In
# training it does more, so the pattern has `training=False`, and training keeps its graph.


def conv_and_norm(x, w, b, mean, var, gamma, beta, *, stride, padding, dilation, groups, eps):
    y = F.conv2d(x, w, b, stride, padding, dilation, groups)
    return F.batch_norm(y, mean, var, gamma, beta, training=False, eps=eps)


def one_conv(x, w, b, mean, var, gamma, beta, stride, padding, dilation, groups, eps):
    scale = gamma * torch.rsqrt(var + eps)
    shift = beta - mean * scale if b is None else beta + (b - mean) * scale
    return F.conv2d(x, w * scale.reshape(-1, 1, 1, 1), shift, stride, padding, dilation, groups)


fused_norms = Rewrite(conv_and_norm, one_conv)

# 2. GELU in its tanh form, however it is spelled, as one operation.


def tanh_gelu(x, *, half, one, cubic, root):
    return half * x * (one + torch.tanh(root * (x + cubic * x**3)))


def is_tanh_gelu(match: Match) -> str | None:
    expected = {"half": 0.5, "one": 1, "cubic": 0.044715, "root": math.sqrt(2 / math.pi)}
    others = [name for name, value in expected.items() if abs(match[name] - value) > 1e-6]
    return f"{others[0]} is {match[others[0]]}" if others else None


one_gelu = Rewrite(tanh_gelu, lambda x: F.gelu(x, approximate="tanh"), where=is_tanh_gelu, name="one_gelu")
faster_gelu = Rewrite(lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh"), name="faster_gelu")

# 3. Training with the rounding errors of 8 bits: inputs and weights of linear layers are rounded, and gradients aren't.


def rounded(x):
    scale = (x.detach().abs().amax() / 127).clamp(min=1e-8)
    return x + (torch.round(x / scale) * scale - x).detach()


fake_quantised = Rewrite(
    lambda x, w, b: F.linear(x, w, b), lambda x, w, b: F.linear(rounded(x), rounded(w), b), name="fake_quantised"
)

# 4. RMSNorm, spelled out as in Llama or T5, as PyTorch's one operation.


def norm_of(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def norm_in_float(x, eps):
    return norm_of(x.to(torch.float32), eps).to(x.dtype)


def norm_by_variance_in_float(x, eps):
    return x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)


spelled_norm = either(
    lambda x, w, *, eps: w * norm_of(x, eps),
    lambda x, w, *, eps: w * norm_in_float(x, eps),
    lambda x, w, *, eps: w * norm_by_variance_in_float(x, eps),
)
one_norm = Rewrite(spelled_norm, lambda x, w, eps: F.rms_norm(x, w.shape, w, eps), name="one_norm")

# 5. Residual branches with a scale, as deep networks have against growing activations.


def scaled_residuals(*classes: type[nn.Module], scale: float) -> Rewrite:
    branch = layer(*classes)
    return Rewrite(lambda x: x + branch(x), lambda x: x + scale * branch(x), name="scaled_residuals")


# 6. An early exit: later blocks are left out, and what comes after them is computed from the last one before.


def without_blocks(block: type[nn.Module], *left_out: nn.Module) -> Rewrite:
    one = layer(block)

    def is_left_out(match: Match) -> str | None:
        return None if match.called(one) in left_out else "the block stays"

    return Rewrite(lambda x: one(x), lambda x: x, where=is_left_out, name="without_blocks")


# 7. A tap: each activation is handed to a function as it is computed.


def tapped(take) -> Rewrite:
    @recorded
    def tap(x):
        take(x.detach())
        return x.clone()

    return Rewrite(lambda x: F.relu(x), lambda x: tap(F.relu(x)), name="tapped")


# 8. Tied weights: the head reads the embedding's table.


def tied(head: str, table: str) -> Rewrite:
    def is_head(match: Match) -> str | None:
        return None if match.path("w") == f"{head}.weight" else f"{match.path('w')} isn't the head's"

    return Rewrite(
        lambda x, w: F.linear(x, w), lambda x: F.linear(x, held(f"{table}.weight")), where=is_head, name="tied"
    )


# 9. Attention, spelled out, as PyTorch's one operation.

spelled_attention = either(
    lambda q, k, v, *, scale: torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v,
    lambda q, k, v, *, root: torch.softmax(q @ k.transpose(-2, -1) / root, -1) @ v,
)


def one_operation(q, k, v, scale=None, root=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale if root is None else 1 / root)


one_attention = Rewrite(spelled_attention, one_operation, name="one_attention")

# 10. Dropout that does nothing: in evaluation, or with a probability of zero.

dead_dropout = Rewrite(
    either(lambda x, *, p: F.dropout(x, p, training=False), lambda x, *, training: F.dropout(x, 0.0, training)),
    lambda x: x,
    name="dead_dropout",
)


class Block(nn.Module):
    """A block with some of what the rewrites look for."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        h = self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))
        q, k, v = self.qkv(h).chunk(3, -1)
        scores = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(q.shape[-1])
        return x + self.dropout(self.out(scores.softmax(-1) @ v))


def main():
    torch.manual_seed(0)
    model = nn.Sequential(Block(16), Block(16)).eval()
    x = torch.randn(2, 5, 16)
    before = model(x)
    for rewrite in (one_norm, one_attention, dead_dropout):
        print(rewrite(model, expects=2, example_inputs=(x,)), end="\n\n")
    difference = (model(x) - before).abs().max()
    print(f"the output differs by {difference:.0e}")
    print(model[0].code)
    return model, difference


if __name__ == "__main__":
    main()
