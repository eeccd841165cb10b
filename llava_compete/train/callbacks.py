"""What happens between steps: competition schedule, guards, time and throughput, console line, metrics.jsonl.

Each callback owns one concern and reads the trainer it is given. The schedule callback is the only writer of
`model.routing.competing` (CompeteSMoE, section 3.3: which layers compete in which step).
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.errors import UserError
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.train.metrics import expert_loads
from llava_compete.train.trainer import StageTrainer

logger = logging.getLogger(__name__)


class CompetitionCallback(TrainerCallback):
    """Sets which layers compete in each optimizer step; the same on every rank, nothing of it is saved."""

    def __init__(self, trainer: StageTrainer, moe: MoeConfig | None) -> None:
        self.trainer = trainer
        self.moe = moe
        self.schedule: CompetitionSchedule | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.moe is None:
            return
        parts = self.moe.parts()
        names = [name for name in moe_blocks(self.trainer.core_model) if _competes(parts, name)]
        if names:
            self.schedule = CompetitionSchedule.build(
                self.moe.seed,
                state.max_steps,
                names,
                self.moe.competition_rate,
                self.moe.competition_warmup_ratio,
                self.moe.max_competing_layers,
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.core_model.routing.competing = self.layers_at(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.core_model.routing.competing = frozenset()

    def layers_at(self, step: int) -> frozenset[str]:
        """Names of the layers that compete in 0-based optimizer step `step`."""
        return self.schedule.layers_at(step) if self.schedule else frozenset()

    def count(self, steps: int) -> int:
        """How many of the first `steps` optimizer steps have a competing layer."""
        return sum(bool(self.layers_at(step)) for step in range(steps))


def _competes(parts: dict[str, Any], name: str) -> bool:
    return parts[name.split(".")[0]].router == "competition"


class StepCallback(TrainerCallback):
    """Closes each step: counts, times and throughput, non-finite steps, the agreement to stop on SIGTERM."""

    _window_tokens: int
    _window_supervised: int
    _checksum: int

    def __init__(self, trainer: StageTrainer, competition: CompetitionCallback) -> None:
        self.trainer = trainer
        self.competition = competition
        self.bad_in_a_row = 0
        self.tokens = self.supervised = self.samples = self.competition_steps = self.steps = 0
        self._reset_window()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()
        optimizer: Any = getattr(self.trainer.deepspeed, "optimizer", None)
        if hasattr(optimizer, "check_grad_overflow"):
            # DeepSpeed looks for non-finite gradients in half precision only; a NaN must not reach float32 weights.
            optimizer.check_grad_overflow = True
        self._mark = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        counts = self.trainer.step_counts
        assert counts is not None
        layers = sorted(self.competition.layers_at(state.global_step - 1))
        kind = "competition_step" if layers else "router_step"
        self._times.setdefault(kind, []).append(time.perf_counter() - self._begun)
        self._layers.update(layers)
        self._window_tokens += counts.tokens
        self._window_supervised += counts.num_supervised
        self._checksum = (self._checksum * 31 + counts.sample_checksum) % 2**32
        self.tokens += counts.tokens
        self.supervised += counts.num_supervised
        self.samples += counts.samples
        self.steps += 1
        self.competition_steps += bool(layers)
        self._guard(state)
        if counts.stop:
            logger.warning("told to stop: saving at step %d", state.global_step)
            control.should_save = control.should_training_stop = True

    def _guard(self, state: TrainerState) -> None:
        culprits = self.trainer.step_metrics.end_step(bad=self.trainer.bad_step)
        if not self.trainer.bad_step:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        where = ", ".join(culprits) or "the gradient norm"
        limit = self.trainer.config.guards.max_bad_steps
        if self.bad_in_a_row > limit:
            raise UserError(
                f"step {state.global_step}: not finite: {where}; stopped after {self.bad_in_a_row} such steps in a row "
                f"(guards.max_bad_steps is {limit}); the last checkpoint is untouched"
            )
        logger.warning("step %d skipped, not finite: %s", state.global_step, where)

    def take_window(self) -> dict[str, Any]:
        """Throughput and times since the last call."""
        seconds = max(time.perf_counter() - self._mark, 1e-9)
        window: dict[str, Any] = {
            "tokens_per_second": self._window_tokens / seconds,
            "supervised_tokens_per_second": self._window_supervised / seconds,
            "sample_checksum": self._checksum,
            "competition_layers": sorted(self._layers),
        }
        for kind, times in self._times.items():
            window[f"time/{kind}"] = sum(times) / len(times)
        steps = {kind: len(times) for kind, times in self._times.items()}
        window["competition_share"] = steps.get("competition_step", 0) / max(sum(steps.values()), 1)
        self._reset_window()
        return window

    def _reset_window(self) -> None:
        self._times: dict[str, list[float]] = {}
        self._layers: set[str] = set()
        self._window_tokens = self._window_supervised = self._checksum = 0
        self._mark = time.perf_counter()


class WatchCallback(TrainerCallback):
    """Rank 0's console (a bar, one line a logging step) and `run/metrics.jsonl`; warns when experts starve."""

    def __init__(self, trainer: StageTrainer, steps: StepCallback, path: Path) -> None:
        self.trainer = trainer
        self.steps = steps
        self.path = path
        self.bar: Any = None
        self._starved: dict[str, int] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            _cut_after(self.path, state.global_step)
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.trainer.config.stage,
                unit="step",
                disable=args.disable_tqdm,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        record = {"step": state.global_step, "epoch": state.epoch, **self.trainer.record}
        if "loss" in record:
            record |= self.steps.take_window()
        if not state.is_world_process_zero:
            return
        if "loss" in record:
            self._check_collapse(record)
            logger.info("%s", _console_line(record, state.max_steps))
        if "train_runtime" not in record:
            self._write(record)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def write_end(self, content: dict[str, Any]) -> None:
        """The closing line of the file."""
        self._write({"event": "end", **content})

    def _write(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def _check_collapse(self, record: dict[str, Any]) -> None:
        guards = self.trainer.config.guards
        for layer, load in expert_loads(record):
            low = min(range(len(load)), key=load.__getitem__)
            starved = load[low] < guards.collapse_share
            self._starved[layer] = self._starved.get(layer, 0) + 1 if starved else 0
            if self._starved[layer] == guards.collapse_patience:
                logger.warning(
                    "step %d: router collapse in %s: expert %d got %.2f%% of tokens for %d logging steps",
                    *(record["step"], layer, low, 100 * load[low], guards.collapse_patience),
                )


class StopOnSignal:
    """While entered, SIGTERM asks the trainer to save and stop after the step; a second one kills as usual."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGTERM, self._request)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.trainer.stop_requested = True


def _console_line(record: dict[str, Any], max_steps: int) -> str:
    parts = [f"step {record['step']}/{max_steps}", f"loss {record['loss']:.4f}"]
    if "lm_loss" in record:
        parts.append(f"lm {record['lm_loss']:.4f}")
    parts += [f"{key.split('/')[0]} aux {value:.4f}" for key, value in record.items() if key.endswith("/aux_loss")]
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.2f}")
    parts.append(f"lr {record['learning_rate']:.2e}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record["competition_layers"]:
        parts.append(f"competed: {', '.join(record['competition_layers'])}")
    return "  ".join(parts)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _cut_after(path: Path, step: int) -> None:
    """Drop lines past the step that a resumed run starts from, so that no step is logged twice."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line).get("step", step + 1) <= step]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
