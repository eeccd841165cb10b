"""Arithmetic in the dtypes that tensors have, also where the caller works under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off inside. Entering torch's own context costs a GPU's host as much as some launches, so only if on;
    the meta device has none."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
