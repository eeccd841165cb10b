"""Steps whose loss or gradient is not finite: noticed, kept from the weights and the logged means, named, and counted.

A step is bad where its gradient norm is not finite, which every rank sees alike. Where it began is found on all ranks
together (a part under ZeRO-3 is gathered by all or none): by the mixtures' records, else by running the step again and
looking at each layer's output, else at the gradient there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.train.waiting import SharedError

logger = logging.getLogger(__name__)


class BadStepsCallback(TrainerCallback):
    """Judges each step of a `StageTrainer` and ends the run after too many bad ones in a row."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.bad = False
        self.in_a_row = 0
        self._steps = self._good_steps = 0
        self._loss_before: Tensor | None = None
        self._batches: Sequence[Any] = ()

    def begin(self, batches: Sequence[Any], loss_so_far: Tensor) -> None:
        """Before a step: its micro-batches, and the Trainer's sum of losses since the last log line."""
        self._batches, self._loss_before = batches, loss_so_far.clone()

    def judge(self, norm: float, skipped: bool, model: nn.Module, loss_so_far: Tensor) -> float:
        """After the backward pass: the gradient norm to log, NaN for a bad step, whose traces are removed.

        DeepSpeed skips such a step by itself (`skipped`; under ZeRO-3 it then still tells the last good step's norm);
        without it, no gradient means no update.
        """
        self.bad = skipped or not math.isfinite(norm)
        self._steps += 1
        self._good_steps += not self.bad
        if not self.bad:
            return norm
        model.zero_grad()
        assert self._loss_before is not None
        loss_so_far.copy_(self._loss_before)
        return math.nan

    def mean_loss(self, mean: float) -> float:
        """The mean over good steps since the last call; the Trainer divides by all, though a skipped one adds none."""
        good, steps = self._good_steps, self._steps
        self._steps = self._good_steps = 0
        return mean * steps / good if good else math.nan

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        culprits = self.trainer.step_metrics.end_step(bad=self.bad)
        if not self.bad:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        where = ", ".join(self._origin(culprits))
        limit = self.trainer.config.guards.max_bad_steps
        if self.in_a_row > limit:
            raise SharedError(
                f"step {state.global_step}: not finite: {where}; stopped after {self.in_a_row} such steps in a row "
                f"(guards.max_bad_steps is {limit}); the last checkpoint is untouched"
            )
        logger.warning("step %d skipped, not finite: %s", state.global_step, where)

    def _origin(self, culprits: list[str]) -> list[str]:
        """What was not finite on any rank, the place where it began first."""
        names = _on_any_rank(culprits)
        if not any(name.startswith("layer ") for name in names):
            names = [f"layer {name}" for name in _on_any_rank(self._layer())[:1]] + names
        if not names:
            layers = _on_any_rank(self._gradient())
            names = ["the gradient norm", *(f"the gradient at the output of layer {name}" for name in layers[:1])]
        return names

    def _layer(self) -> list[str]:
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            return _first_bad_layer(
                trainer.core_model,
                lambda batch: trainer.model_wrapped(**trainer._prepare_inputs(batch)),
                self._batches,
            )

    def _gradient(self) -> list[str]:
        """Nothing is found out under ZeRO-3, or where the memory does not hold a gradient for each layer's output."""
        trainer = self.trainer
        if trainer.deepspeed is not None and trainer.deepspeed.zero_optimization_stage() == 3:
            return []
        try:
            with trainer.compute_loss_context_manager():
                return _first_bad_gradient(
                    trainer.core_model,
                    lambda batch: trainer.model(**trainer._prepare_inputs(batch)).loss,
                    self._batches,
                )
        except torch.OutOfMemoryError:
            return []


def _on_any_rank(names: list[str]) -> list[str]:
    """Names given by any rank; for places that all ranks reach alike."""
    everyone: list[list[str]] = [names] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return list(dict.fromkeys(name for names in everyone for name in names))


@torch.no_grad()
def _first_bad_layer(module: nn.Module, run: Callable[[Any], Any], batches: Sequence[Any]) -> list[str]:
    """Name of the first module of `module`, in order of running, whose output is not finite; [] if all are.

    Args:
        run: one forward of `module` on one of `batches`.
    """
    found: list[str] = []

    def note(name: str, output: Tensor) -> None:
        if not found and not bool(torch.isfinite(output).all()):
            found.append(name)

    with _each_layers_output(module, note):
        for batch in batches:
            run(batch)
    return found


def _first_bad_gradient(module: nn.Module, run: Callable[[Any], Tensor], batches: Sequence[Any]) -> list[str]:
    """Name of the first module of `module`, in order of the backward, with a non-finite gradient at its output, or [].

    No parameter's gradient is touched, and no hook of a gradient reduction runs. Not for ZeRO-3, whose prefetching
    expects whole backward passes.

    Args:
        run: the loss of `module` on one of `batches`.
    """
    found: list[str] = []
    for batch in batches:  # all of them: a rank that left early would keep the others waiting in a reduction
        outputs: list[tuple[str, Tensor]] = []

        def keep(name: str, output: Tensor, outputs: list[tuple[str, Tensor]] = outputs) -> None:
            if output.requires_grad:
                outputs.append((name, output))

        with _each_layers_output(module, keep):
            loss = run(batch)
        gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
        for (name, _), gradient in zip(reversed(outputs), reversed(gradients), strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                found.append(name)
                break
    return found[:1]


@contextmanager
def _each_layers_output(module: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show `see` the name and output of each module without children, in order of running."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def on_output(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                see(name, output)

        return on_output

    leaves = [(name, part) for name, part in module.named_modules() if next(part.children(), None) is None]
    hooks = [part.register_forward_hook(hook(name)) for name, part in leaves]
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()
