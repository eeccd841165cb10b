"""When each layer competes: a pure function of its arguments, computed on the host, the same on every rank.

Warm-up steps have no competition. After them every layer draws with probability `competition_rate` at each step; at
most `max_competing_layers` compete in one step, and a draw that finds its step full moves to the nearest earlier step
with room, else to the nearest later one, so that a layer keeps its number of competitions. CompeteSMoE, arXiv
2505.13380, section 3.3. Nothing of it is saved with the weights.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompetitionSchedule:
    """`competing[step]` holds the numbers of the layers that compete at optimizer step `step` (0-based)."""

    layer_names: tuple[str, ...]
    competing: tuple[tuple[int, ...], ...]

    @classmethod
    def build(
        cls,
        seed: int | tuple[int, int],
        total_steps: int,
        layer_names: Sequence[str],
        competition_rate: float,
        competition_warmup_ratio: float,
        max_competing_layers: int,
    ) -> CompetitionSchedule:
        """Draw, then move what does not fit. The draws do not depend on `max_competing_layers`."""
        draw_rng, keep_rng = np.random.default_rng(seed).spawn(2)
        warmup = int(competition_warmup_ratio * total_steps)
        drawn = draw_rng.random((total_steps - warmup, len(layer_names))) < competition_rate
        steps: list[list[int]] = [np.flatnonzero(row).tolist() for row in drawn]
        overflow: list[tuple[int, int]] = []
        for step, layers in enumerate(steps):
            if len(layers) > max_competing_layers:
                order = keep_rng.permutation(layers).tolist()
                steps[step] = order[:max_competing_layers]
                overflow += [(step, layer) for layer in order[max_competing_layers:]]
        dropped = _place(steps, overflow, max_competing_layers)
        if dropped:
            drawn_count = int(drawn.sum())
            logger.warning(
                "competition_rate %g over %d layers draws %.2f layers a step, above max_competing_layers = %d: "
                "%d of %d competitions left out, effective rate %.4g",
                competition_rate,
                len(layer_names),
                drawn_count / len(steps),
                max_competing_layers,
                dropped,
                drawn_count,
                (drawn_count - dropped) / drawn.size,
            )
        competing = [()] * warmup + [tuple(sorted(layers)) for layers in steps]
        return cls(tuple(layer_names), tuple(competing))

    @classmethod
    def extended(
        cls,
        seed: int,
        ends: Sequence[int],
        layer_names: Sequence[str],
        competition_rate: float,
        competition_warmup_ratio: float,
        max_competing_layers: int,
    ) -> CompetitionSchedule:
        """Of a run that was planned to end at step `ends[0]`, then made longer to end at `ends[1]`, and so on.

        What was planned stays as it was; each extension has its own draws, and no warm-up.
        """
        first = (competition_rate, competition_warmup_ratio, max_competing_layers)
        schedule = cls.build(seed, ends[0], layer_names, *first)
        for start, end in itertools.pairwise(ends):
            longer = cls.build((seed, start), end - start, layer_names, competition_rate, 0.0, max_competing_layers)
            schedule = cls(schedule.layer_names, schedule.competing + longer.competing)
        return schedule

    def layers_at(self, step: int) -> frozenset[str]:
        """Names of the layers that compete at optimizer step `step`; `IndexError` outside the run."""
        if not 0 <= step < len(self.competing):
            raise IndexError(f"step {step}: the competition schedule covers steps 0 to {len(self.competing) - 1}")
        return frozenset(self.layer_names[layer] for layer in self.competing[step])

    def count(self, layer_name: str | None = None) -> int:
        """Number of competitions in the whole run: of one layer, or of all."""
        if layer_name is None:
            return sum(len(layers) for layers in self.competing)
        layer = self.layer_names.index(layer_name)
        return sum(layer in layers for layers in self.competing)


class _StepsWithRoom:
    """Nearest step with room in one direction: union-find that skips steps as they fill."""

    def __init__(self, full: list[bool], direction: int) -> None:
        last = len(full)
        # Position `last` (also reached as -1) stands for "no such step".
        self.target = [(step + direction) % (last + 1) if full[step] else step for step in range(last)] + [last]
        self.none = last
        self.direction = direction

    def find(self, step: int) -> int | None:
        root = step % (self.none + 1)
        while self.target[root] != root:
            root = self.target[root]
        while self.target[step] != root and step != root:
            self.target[step], step = root, self.target[step]
        return None if root == self.none else root

    def fill(self, step: int) -> None:
        self.target[step] = (step + self.direction) % (self.none + 1)


def _place(steps: list[list[int]], overflow: list[tuple[int, int]], limit: int) -> int:
    """Move each (step, layer) of `overflow` into `steps`; the number that no step has room for."""
    full = [len(layers) >= limit for layers in steps]
    directions = [_StepsWithRoom(full, -1), _StepsWithRoom(full, +1)]
    for position, (step, layer) in enumerate(overflow):
        target = None
        for rooms in directions:
            target = rooms.find(step)
            while target is not None and layer in steps[target]:
                target = rooms.find(target + rooms.direction)
            if target is not None:
                break
        if target is None:
            target = next((t for rooms in directions if (t := rooms.find(step)) is not None), None)
            if target is None:
                return len(overflow) - position
            # Every step with room has this layer already: it goes to its own step, and one from there moves.
            moved = next(other for other in steps[step] if other not in steps[target])
            steps[step].remove(moved)
            steps[step].append(layer)
            layer = moved
        steps[target].append(layer)
        if len(steps[target]) >= limit:
            for rooms in directions:
                rooms.fill(target)
    return 0
