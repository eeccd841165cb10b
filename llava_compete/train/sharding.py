"""What DeepSpeed's ZeRO must be told of our models: never to shard them while they are built.

No module is a ZeRO-3 leaf: a leaf's gradient hook fires before its own backward where no input requires a gradient (the
first trainable block behind a frozen front), and crashes or loses that gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


def sharding_of(arguments: Any) -> Any:
    """The Trainer's DeepSpeed config, or None without DeepSpeed."""
    return getattr(arguments, "hf_deepspeed_config", None)  # set by TrainingArguments only with DeepSpeed


def zero_stage(arguments: Any) -> int:
    """1 to 3; 0 without DeepSpeed."""
    sharding = sharding_of(arguments)
    return sharding.get_value("zero_optimization.stage", 0) if sharding is not None else 0


@contextmanager
def whole(sharding: Any) -> Iterator[None]:
    """Models are built whole inside, never under zero.Init: DeepSpeed shards afterwards (design rule 6)."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            set_hf_deepspeed_config(sharding)
