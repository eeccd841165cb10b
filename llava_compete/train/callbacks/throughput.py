"""What a step took and saw: tokens, images, seconds, utilisation, and what competitions add to a step's time."""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.train.callbacks.competition import CompetitionCallback
from llava_compete.train.mfu import Utilisation
from llava_compete.train.trainer import StageTrainer

logger = logging.getLogger(__name__)


class ThroughputCallback(TrainerCallback):
    """Counts and times of each step and of the steps between two log lines; the agreement to stop rides along."""

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
        self._window_images += counts.tiles
        self._window_supervised += counts.num_supervised
        self._checksum = (self._checksum * 31 + counts.sample_checksum) % 2**32
        self.tokens += counts.tokens
        self.samples += counts.samples
        if counts.stop:
            logger.warning("told to stop: saving at step %d", state.global_step)
            control.should_save = control.should_training_stop = True

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
