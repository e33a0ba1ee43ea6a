"""What the head is told of a loss, so that it can take its gradients while it has the logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Slopes = Callable[[slice, Tensor], Tensor]
"""(rows of a micro-batch's C tokens, their log-probabilities [c]) -> the derivative of the loss by each of these [c], up to one
factor for all rows."""
