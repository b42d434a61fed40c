"""Adapts a Wav2Vec2 of Transformers to sounds of a higher pitch, after `check_learning` has found what can't learn.

    train a base ─▶ adapt all layers ─▶ check_learning: the front is dead, by this line ─▶ adapt what learns

The sounds are scikit-learn's scans of handwritten digits, each read as a spectrogram: columns are moments, rows are
notes. The model runs its convolutions without gradients, as code for frozen features does, so that adapters there would
never change. Takes about 15 s on one core. Run it with ``python examples/audio.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

import graphpeft

RATE = 4000  # samples in a second
NOTE = 64  # samples of a moment


class Result(NamedTuple):
    """What came of it.

    Attributes:
        dead: The sites that would never learn.
        line: The line of code that goes past them.
        before: The share of digits that the base hears at a higher pitch.
        after: The same with the adapter.
    """

    dead: list[str]
    line: str
    before: float
    after: float


class Listener(nn.Module):
    """Wav2Vec2 with a head; its convolutions are features that don't train."""

    def __init__(self) -> None:
        super().__init__()
        config = Wav2Vec2Config(
            conv_dim=(48, 48, 48),
            conv_kernel=(16, 4, 4),
            conv_stride=(4, 2, 2),
            num_feat_extract_layers=3,
            feat_extract_norm="layer",
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
        )
        self.wav2vec2, self.head = Wav2Vec2Model(config), nn.Linear(48, 10)

    def forward(self, sounds: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.wav2vec2.feature_extractor(sounds)
        hidden, _ = self.wav2vec2.feature_projection(features.transpose(1, 2))
        return self.head(self.wav2vec2.encoder(hidden).last_hidden_state.mean(1))


def sounds_of(images: Tensor, pitch: float) -> Tensor:
    """Returns sounds of (count, samples) for scans of (count, 8, 8): each row of a scan is one of eight notes."""
    seconds = torch.arange(8 * NOTE) / RATE
    notes = pitch * 200 * 2 ** (torch.arange(8) / 4)
    waves = (2 * math.pi * notes[:, None] * seconds).sin()
    loudness = images.repeat_interleave(NOTE, 2) / 16
    return (loudness * waves).sum(1)


def train(model: nn.Module, sounds: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(sounds), (48,))
        optimizer.zero_grad()
        F.cross_entropy(model(sounds[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, sounds: Tensor, labels: Tensor) -> float:
    return (model(sounds).argmax(-1) == labels).float().mean().item()


def main() -> Result:
    """Trains the base, checks, trains the adapter, and returns the figures."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    scans = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(scans, torch.tensor(digits), test_size=0.25, random_state=0)
    model = Listener()
    train(model, sounds_of(train_x, pitch=1), train_y, steps=130, rate=4e-3)
    higher, unheard = sounds_of(train_x, pitch=1.5), sounds_of(test_x, pitch=1.5)
    before = accuracy(model, unheard, test_y)

    layers = ["conv", "projection", "q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]
    everywhere = graphpeft.LoraConfig(r=8, lora_alpha=16, target_modules=layers)
    dead = graphpeft.explain(model, everywhere, example_inputs=(higher[:4],)).learning.dead

    learns = graphpeft.LoraConfig(r=8, lora_alpha=16, target_modules=layers[1:], modules_to_save=["head"])
    model = graphpeft.get_peft_model(model, learns)
    assert not graphpeft.check_learning(model, (higher[:4],)).dead
    train(model, higher, train_y, steps=110, rate=1e-2)
    return Result([site.label for site in dead], dead[0].line, before, accuracy(model, unheard, test_y))


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    print(f"dead: {', '.join(result.dead)}, by {result.line}")
    print(f"digits at a higher pitch: {result.before:.1%} heard before, {result.after:.1%} after")
