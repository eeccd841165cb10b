"""What a user watches: a bar and one line a logging step on the console, everything in `run/metrics.jsonl`.

Also where starving experts are noticed. Rank 0 writes; the other ranks only take part in what is collective.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.moe.block import moe_blocks
from llava_compete.train.held_out import greedy_answers
from llava_compete.train.metrics import expert_loads
from llava_compete.train.step_lines import append, cut_after
from llava_compete.train.trainer import StageTrainer

logger = logging.getLogger(__name__)


class WatchCallback(TrainerCallback):
    """Rank 0's console (a bar, one line a logging step) and `run/metrics.jsonl`; warns when experts starve."""

    def __init__(self, trainer: StageTrainer, path: Path) -> None:
        self.trainer = trainer
        self.path = path
        self.bar: Any = None
        self._starved: dict[str, int] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            cut_after(self.path, state.global_step)
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.trainer.config.stage,
                unit="step",
                # In a log file a bar that moves every 0.1 s is thousands of lines.
                mininterval=0.1 if sys.stderr.isatty() else 15,
                disable=args.disable_tqdm,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "epoch": state.epoch, **self.trainer.record}
        if "loss" in record:
            self._check_collapse(record)
            logger.info("%s", _console_line(record, state.max_steps))
        elif "eval_loss" in record:
            logger.info("step %d/%d  held-out loss %.4f", state.global_step, state.max_steps, record["eval_loss"])
        if "train_runtime" not in record:
            append(self.path, [record])

    def close(self) -> None:
        """End the bar's line, so that an error has one of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def write_end(self, content: dict[str, Any]) -> None:
        """The closing line of the file."""
        append(self.path, [{"event": "end", **content}])

    def _check_collapse(self, record: dict[str, Any]) -> None:
        guards = self.trainer.config.guards
        blocks = moe_blocks(self.trainer.core_model)
        for layer, load in expert_loads(record):
            low = min(range(len(load)), key=load.__getitem__)
            # A token makes K choices, so an expert's share of tokens is K times its share of choices.
            share = load[low] * blocks[layer].config.num_experts_per_tok
            self._starved[layer] = self._starved.get(layer, 0) + 1 if share < guards.collapse_share else 0
            if self._starved[layer] == guards.collapse_patience:
                logger.warning(
                    "step %d: router collapse in %s: expert %d got %.2f%% of tokens for %d logging steps",
                    *(record["step"], layer, low, 100 * share, guards.collapse_patience),
                )


class AnswersCallback(TrainerCallback):
    """Every `sample_steps` steps, greedy answers to some held-out rows into `run/answers.jsonl`; all ranks generate."""

    COUNT = 3

    def __init__(self, trainer: StageTrainer, path: Path) -> None:
        self.trainer = trainer
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            cut_after(self.path, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        every = self.trainer.config.sample_steps
        counts = self.trainer.step_counts
        if not every or state.global_step % every or (counts is not None and counts.stop):
            return
        answers = greedy_answers(
            self.trainer.core_model,
            self.trainer.eval_dataset,
            self.trainer.processing_class,
            count=self.COUNT,
            device=args.device,
            synced=bool(args.world_size > 1),
        )
        if state.is_world_process_zero:
            append(self.path, [{"step": state.global_step, **answer} for answer in answers])


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
