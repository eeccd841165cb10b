"""Training of adapters that is large enough to be seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logits_after_two_steps(adapted: Any, inputs: Any, learning_rate: float) -> Tensor:
    """Of a model in peft's wrapper, which is left in evaluation mode."""
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=learning_rate)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**inputs).loss.backward()
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        return adapted(**inputs).logits
