"""The device that a user names, looked at before anything is loaded for it."""

from __future__ import annotations

import torch

from llava_compete.errors import UserError


def usable_device(name: str | None, key: str = "--device") -> torch.device:
    """The device of that name; None for the GPU if there is one, else the CPU.

    Raises:
        UserError: torch knows no such device, or has none here; names `key`.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: found {name!r}, expected a device that torch can use here: {reason}") from error
    return device
