"""After a step on the CPU, the memory of free holes in the heap goes back: rows of other lengths leave other holes."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.moe.allocator import return_freed_memory


class FreedMemoryCallback(TrainerCallback):
    """Keeps the peak of a process near what its largest step needs."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Return the pages that a finished step has left."""
        return_freed_memory()
