"""Whole stages in this process: one rank, no launcher."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from stage_kit import read_metrics

from llava_compete.config import parse_config
from llava_compete.train.callbacks import throughput
from llava_compete.train.config import TrainConfig
from llava_compete.train.run import train

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_stage_here(content: dict[str, Any], **options: Any) -> Path:
    """Train, and leave this process as a new one: no group, no log file. Returns the output directory."""
    config = parse_config(TrainConfig, content, source="test.yaml")
    for name in LAUNCHER:
        os.environ.pop(name, None)
    try:
        train(config, **options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for handler in list(logging.getLogger().handlers):
            if isinstance(handler, logging.FileHandler) and handler.baseFilename.endswith("console.log"):
                logging.getLogger().removeHandler(handler)
                handler.close()
        for name in LAUNCHER:
            os.environ.pop(name, None)
    return config.output_dir


def assert_same_curve(left: Path, right: Path, tolerance: float = 1e-5) -> None:
    """Of six steps, all that is logged of losses."""
    pairs = list(zip(read_metrics(left), read_metrics(right), strict=True))
    assert len(pairs) == 6
    for one, other in pairs:
        assert one["sample_checksum"] == other["sample_checksum"]
        assert one["competition_layers"] == other["competition_layers"]
        for key in ("loss", "grad_norm", *(key for key in one if key.endswith("_loss"))):
            # Single terms of a small competition jump by about 1e-8 where a tie falls the other way.
            exact = key in ("loss", "grad_norm", "lm_loss") or key.endswith("aux_loss")
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=1e-9 if exact else 1e-6), (one["step"], key)


def fail(*_: Any, **__: Any) -> None:
    """Stands for a kill."""
    raise KeyboardInterrupt


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Any], None]) -> None:
    """Call `action(callback)` once, after optimizer step `step` and before its log and checkpoint."""
    plain = throughput.ThroughputCallback.on_step_end
    done = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        plain(self, args, state, control, **options)
        if state.global_step == step and not done:
            done.append(step)
            action(self)

    monkeypatch.setattr(throughput.ThroughputCallback, "on_step_end", on_step_end)


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Kill the run in step `step`, the first time it gets there."""
    at_step(monkeypatch, step, fail)
