"""A model of your own, from its first report to a saved adapter, with pictures.

Also as a notebook, `notebooks/quickstart.ipynb`. Takes about 10 s on one core. Run it with
``python examples/quickstart.py``.
"""

# %% [markdown]
# The model is a residual network whose blocks hold two matrices as plain parameters: no layer has them, so that a
# library which exchanges layers finds nothing to exchange. graphpeft finds the operations that use them.

# %%
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import graphpeft

torch.manual_seed(0)
torch.set_num_threads(1)  # a model this small gains nothing from more


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(hidden, width) / hidden**0.5)

    def forward(self, x):
        return x + F.gelu(F.linear(x, self.up)) @ self.down


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(64, 48), nn.Sequential(Block(48, 96), Block(48, 96))
        self.head = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 10))

    def forward(self, images):
        return self.head(self.blocks(self.stem(images)))


# %% [markdown]
# Its base reads scikit-learn's scans of handwritten digits. Upside down it can't read them.

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
base = copy.deepcopy(model)
before = accuracy(model, test_x.flip(1))
print(f"upright {accuracy(model, test_x):.1%}, upside down {before:.1%}")

# %% [markdown]
# `explain` tells what a config would adapt, and changes nothing. With a batch, it tells also whether that would
# learn.

# %%
config = graphpeft.LoraConfig(r=8, lora_alpha=16, target_modules=["stem", "up", "down"])
report = graphpeft.explain(model, config, example_inputs=(train_x[:8],))
report

# %% [markdown]
# `get_peft_model` adapts the model in place: it remains the object that it was. A notebook shows its modules, with
# the adapters at each.

# %%
model = graphpeft.get_peft_model(model, config)
model

# %% [markdown]
# Before a long run, one batch tells whether each adapter gets gradients. LoRA's A waits at first, since B is zero.

# %%
learning = graphpeft.check_learning(model, (train_x[:8],))
learning

# %%
train(model, train_x.flip(1), rate=1e-2)
after = accuracy(model, test_x.flip(1))
with model.disable_adapter():
    disabled = accuracy(model, test_x)
print(f"upside down {after:.1%}; upright, with the adapter disabled, {disabled:.1%}")

# %% [markdown]
# The picture has the graphs before and after, how much each weight changes, and the norms of gradients. A click on
# a node tells its line of code, its rule and its parameters.

# %%
picture = graphpeft.show(model, "build/quickstart.html")
picture

# %% [markdown]
# The adapter is saved in the files of Hugging Face PEFT, and loaded onto a base without adapters.

# %%
model.save_pretrained("build/quickstart-adapter")
loaded = graphpeft.PeftModel.from_pretrained(base, "build/quickstart-adapter")
assert torch.equal(loaded(test_x), model(test_x))
print(loaded.get_model_status())
