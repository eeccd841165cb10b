"""TensorBoard's event files of a run that was stopped and went on."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback


class ResumedTensorBoardCallback(TensorBoardCallback):
    """Declares the steps past the one that the run goes on from void, so that a reader shows each step once.

    The earlier run's file holds steps after its last checkpoint, which are trained and written again.
    """

    tb_writer: Any

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.tb_writer is None:
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)
