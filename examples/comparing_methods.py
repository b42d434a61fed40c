"""Eight methods on one model and one task: how many parameters each trains, and what it reaches.

Also as a notebook, `notebooks/comparing_methods.ipynb`. Takes about 20 s on one core. Run it with
``python examples/comparing_methods.py``.
"""

# %% [markdown]
# A small timm vision transformer reads upright digits, and is adapted to digits on their side by one method after
# the other. Each starts from the same base with the same batches.

# %%
import copy
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer

import graphpeft

torch.manual_seed(0)
torch.set_num_threads(1)  # a model this small gains nothing from more

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
train_x, test_x, train_y, test_y = train_test_split(x, torch.tensor(labels), test_size=0.25, random_state=0)


def turned(images):
    return images.rot90(1, (2, 3))


def train(model, x, rate, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), train_y[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model, x):
    return (model(x).argmax(-1) == test_y).float().mean().item()


# %%
base = VisionTransformer(img_size=8, patch_size=(1, 8), in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=4)
train(base, train_x, rate=3e-3, steps=200)
before = accuracy(base, turned(test_x))
print(f"upright {accuracy(base, test_x):.1%}, on their side {before:.1%}")

# %% [markdown]
# The layers are the same for all methods; the sizes are ordinary ones.

# %%
layers = ["qkv", "attn.proj", "fc1", "fc2"]
configs = {
    "LoRA": (graphpeft.LoraConfig(r=4, lora_alpha=8, target_modules=layers), 1e-2),
    "DoRA": (graphpeft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=layers), 1e-2),
    "LoHa": (graphpeft.LoHaConfig(r=4, alpha=8, target_modules=layers), 1e-2),
    "LoKr": (graphpeft.LoKrConfig(r=4, alpha=8, target_modules=layers), 1e-2),
    "OFT": (graphpeft.OFTConfig(oft_block_size=16, target_modules=layers), 1e-2),
    "MiSS": (graphpeft.MissConfig(r=8, target_modules=layers), 1e-2),
    "VeRA": (graphpeft.VeraConfig(r=32, target_modules=layers), 5e-2),
    "(IA)³": (graphpeft.IA3Config(target_modules=layers, feedforward_modules=["fc2"]), 5e-2),
}

# %% [markdown]
# `get_peft_model` is the same for all of them, and so are saving, merging and everything else.

# %%
results = {}
for name, (config, rate) in configs.items():
    torch.manual_seed(1)
    model = graphpeft.get_peft_model(copy.deepcopy(base), config)
    start = time.perf_counter()
    train(model, turned(train_x), rate, steps=120)
    seconds = time.perf_counter() - start
    results[name] = (model.get_nb_trainable_parameters()[0], accuracy(model, turned(test_x)), seconds)

print(f"{'method':8}{'trained':>10}{'accuracy':>10}{'seconds':>9}")
for name, (trained, after, seconds) in sorted(results.items(), key=lambda row: -row[1][1]):
    print(f"{name:8}{trained:10,}{after:10.1%}{seconds:9.1f}")

# %% [markdown]
# What the last one looks like in the graph of a layer:

# %%
picture = graphpeft.show(model, "build/comparing_methods.html")
picture
