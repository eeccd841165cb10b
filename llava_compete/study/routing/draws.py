"""Random starts and data: a generator of its own for each key, so that all rules of a seed start and see alike."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def generator_of(*key: int | str) -> torch.Generator:
    """On the CPU, whatever the device: the same numbers everywhere. It reads 32 bits of a seed, no more."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def uniform(shape: tuple[int, ...], fan_in: int, seeds: Sequence[int], key: Key, device: str) -> Tensor:
    """A parameter [R, ...] of U(-1/sqrt(fan in), 1/sqrt(fan in)), as nn.Linear starts."""
    drawn = torch.stack([torch.rand(shape, generator=generator_of(seed, *key)) for seed in seeds])
    return ((2 * drawn - 1) / math.sqrt(fan_in)).to(device).requires_grad_()


def normal(shape: tuple[int, ...], std: float, seeds: Sequence[int], key: Key, device: str) -> Tensor:
    """A parameter [R, ...] of N(0, std)."""
    drawn = torch.stack([torch.randn(shape, generator=generator_of(seed, *key)) for seed in seeds])
    return (std * drawn).to(device).requires_grad_()
