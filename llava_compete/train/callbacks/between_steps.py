"""What happens between steps: competition schedule, counts and times, non-finite steps, the agreement to stop.

Each callback owns one concern and reads the trainer it is given. The schedule callback is the only writer of
`model.routing.competing` (CompeteSMoE, section 3.3: which layers compete in which step).
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.train.mfu import Utilisation
from llava_compete.train.trainer import StageTrainer
from llava_compete.train.waiting import SharedError

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
            self.schedule = CompetitionSchedule.extended(
                self.moe.seed,
                self.trainer.plan.ends,
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
    """Closes each step: counts, times and throughput, non-finite steps, the agreement to stop."""

    _window_tokens: int
    _window_images: int
    _window_supervised: int
    _checksum: int

    def __init__(
        self, trainer: StageTrainer, competition: CompetitionCallback, utilisation: Utilisation | None
    ) -> None:
        self.trainer = trainer
        self.competition = competition
        self.utilisation = utilisation
        trainer.take_window = self.take_window
        self.bad_in_a_row = 0
        self.tokens = self.samples = 0
        self._seconds: dict[str, list[float]] = {}
        self._reset_window()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        counts = self.trainer.step_counts
        assert counts is not None
        layers = sorted(self.competition.layers_at(state.global_step - 1))
        kind = "competition_step" if layers else "router_step"
        seconds = time.perf_counter() - self._begun
        for times in (self._times, self._seconds):
            times.setdefault(kind, []).append(seconds)
        self._layers.update(layers)
        self._window_tokens += counts.tokens
        self._window_images += counts.images
        self._window_supervised += counts.num_supervised
        self._checksum = (self._checksum * 31 + counts.sample_checksum) % 2**32
        self.tokens += counts.tokens
        self.samples += counts.samples
        self._guard(state)
        if counts.stop:
            logger.warning("told to stop: saving at step %d", state.global_step)
            control.should_save = control.should_training_stop = True

    def _guard(self, state: TrainerState) -> None:
        bad = self.trainer.bad_step
        culprits = self.trainer.step_metrics.end_step(bad=bad)
        if not bad:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        names = _on_any_rank(culprits)
        if not any(name.startswith("layer ") for name in names):
            names = [f"layer {name}" for name in _on_any_rank(self.trainer.first_bad_layer())[:1]] + names
        if not names:
            layers = _on_any_rank(self.trainer.first_bad_gradient())
            names = ["the gradient norm", *(f"the gradient at the output of layer {name}" for name in layers[:1])]
        where = ", ".join(names)
        limit = self.trainer.config.guards.max_bad_steps
        if self.bad_in_a_row > limit:
            raise SharedError(
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
        if self.utilisation is not None:
            window["mfu"] = self.utilisation.mfu(
                self._window_tokens, self._window_supervised, self._window_images, seconds
            )
        for kind, times in self._times.items():
            window[f"time/{kind}"] = sum(times) / len(times)
        steps = {kind: len(times) for kind, times in self._times.items()}
        window["competition_share"] = steps.get("competition_step", 0) / max(sum(steps.values()), 1)
        self._reset_window()
        return window

    def competition_overhead(self) -> float | None:
        """What competitions added to this run's step time, as a share: router steps are the softmax router's steps.

        Medians, since a few first steps compile and allocate; None until there were steps of both kinds.
        """
        router, competition = (self._seconds.get(kind) for kind in ("router_step", "competition_step"))
        if not router or not competition:
            return None
        share = len(competition) / (len(router) + len(competition))
        return share * (statistics.median(competition) / statistics.median(router) - 1)

    def _reset_window(self) -> None:
        self._times: dict[str, list[float]] = {}
        self._layers: set[str] = set()
        self._window_tokens = self._window_supervised = self._window_images = self._checksum = 0
        self._mark = time.perf_counter()


def _on_any_rank(names: list[str]) -> list[str]:
    """Names given by any rank; called only where all ranks know that the step is bad."""
    everyone: list[list[str]] = [names] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return list(dict.fromkeys(name for names in everyone for name in names))
