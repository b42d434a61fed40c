"""A method of one's own in a few lines: its rule, the graph before and after, its laws, and how it learns.

Also as a notebook, `notebooks/own_rule.ipynb`. Takes about 10 s on one core. Run it with
``python examples/own_rule.py``.
"""

# %% [markdown]
# The method here scales each element of a weight by 1 plus an element of a product of two small factors: W becomes
# W ∘ (1 + A B). That is a change of a weight, ΔW = W ∘ A B, so its rule is a `DeltaRule`, which says no more than
# this: how the changed weight is used follows from the graph.

# %%
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import graphpeft
from graphpeft.testing import verify

torch.manual_seed(0)
torch.set_num_threads(1)  # a model this small gains nothing from more

# %% [markdown]
# ## The rule
#
# `parameters` says which tensors the rule needs at a site, and their names in files. `initialise` gives them their
# first values: with B = 0 the model computes what it did. `delta` is the equation; it asks by the names of its
# arguments for the weight and for its own tensors.

# %%


@dataclass(frozen=True)
class RowsAndColumns(graphpeft.DeltaRule):
    adapts = (graphpeft.ops.Linear,)

    def parameters(self, site, config):
        return {
            "a": graphpeft.ParameterSpec((site.out_features, config.r), key="rows_a"),
            "b": graphpeft.ParameterSpec((config.r, site.in_features), key="columns_b"),
        }

    def initialise(self, parameters, site, config, module):
        nn.init.normal_(parameters["a"])
        nn.init.zeros_(parameters["b"])

    def delta(self, weight, a, b):
        return weight * (a @ b)


# %% [markdown]
# ## The config
#
# Its class is the method. `register` lets saved adapters find it by its `peft_type`.

# %%


@graphpeft.register
@dataclass(kw_only=True)
class RowsAndColumnsConfig(graphpeft.TargetedConfig):
    peft_type = "ROWS_AND_COLUMNS"
    starts_as_identity = True

    r: int = 1

    def rule_for(self, site, dtype):
        return RowsAndColumns()


# %% [markdown]
# ## The graph before and after
#
# A trace of a model has its code. The weight of the second layer is a plain parameter.

# %%


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64) / 8)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        hidden = F.gelu(self.first(images))
        return self.head(F.gelu(hidden @ self.second))


config = RowsAndColumnsConfig(r=4, target_modules=["first", "second"])
traced = graphpeft.trace(Network(), (torch.randn(2, 64),))
code_before = traced.code
print(code_before)

# %%
graphpeft.get_peft_model(traced, config)
code_after = traced.code
print(code_after)

# %% [markdown]
# ## The laws
#
# `verify` checks on a model what must hold of every method: that it starts as it says, merges and unmerges, is
# saved and loaded, stands beside other adapters, and more.

# %%
verdict = verify(Network(), config, (torch.randn(2, 64),), progress=False, quiet=True)
assert verdict.holds
verdict

# %% [markdown]
# ## Learning
#
# The base reads upright digits; the adapter reads them upside down.

# %%
images, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels), test_size=0.25, random_state=0
)


def train(model, x, rate, steps=300):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), train_y[rows]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model, x):
    return (model(x).argmax(-1) == test_y).float().mean().item()


model = Network()
train(model, train_x, rate=3e-3)
before = accuracy(model, test_x.flip(1))
model = graphpeft.get_peft_model(model, config)
train(model, train_x.flip(1), rate=2e-2)
after = accuracy(model, test_x.flip(1))
print(
    f"upside down: {before:.1%} before, {after:.1%} after, with {model.get_nb_trainable_parameters()[0]:,} parameters"
)

# %% [markdown]
# The method merges as those of the library do.

# %%
with torch.no_grad():
    expected = model(test_x)
    merged = model.merge_and_unload()(test_x)
print(f"merging moves a score by {(merged - expected).abs().max():.1e} at most")
