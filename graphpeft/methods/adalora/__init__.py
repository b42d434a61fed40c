"""AdaLoRA: a product whose ranks go to the weights where they matter most.

    ΔW = s · B (E ⊙ A)        A of shape (r, in), E (r, 1), B (out, r);  s = α / r for the rank r at first

Each rank of each weight is a triplet: a row of A, an element of E and a column of B. As training goes on, ever more
elements of E are set to zero, those of the least important triplets in the whole model. Files have the others alone.

Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512; the same
numbers as PEFT's ``tuners/adalora/layer.py`` and ``model.py``.
"""

from graphpeft.methods.adalora.config import AdaLoraConfig

__all__ = ["AdaLoraConfig"]
