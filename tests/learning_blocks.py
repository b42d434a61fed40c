"""A block whose forward each test of learning writes."""

from torch import nn

SIZE = 6


class Block(nn.Module):
    """A layer and a norm, for some forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE)
