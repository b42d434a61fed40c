"""Whether what adapters train gets gradients: `check_learning`."""

from __future__ import annotations

from graphpeft.learning.check import check_learning
from graphpeft.learning.learning_report import LearningReport, SiteLearning, TensorLearning

__all__ = ["LearningReport", "SiteLearning", "TensorLearning", "check_learning"]
