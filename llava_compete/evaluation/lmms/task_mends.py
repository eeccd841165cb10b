"""Two habits of lmms-eval's tasks that would make scores of equal answers differ, mended where the tasks are built.

- An answer that holds no letter is scored by a guess of the global random generator (MMMU and its kin), from several
  threads: the score then depends on batch size, process count and chance. Here each question has its own draw.
- A task that names no stop string gets an empty line, the separator of examples in a prompt. It cuts a reasoned answer
  at its first paragraph: only what a task asks for ends an answer, and that separator where there are examples.
"""

from __future__ import annotations

import functools
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from lmms_eval.api.task import ConfigurableTask, TaskConfig

from llava_compete.evaluation.lmms.suites import judged_tasks

_drawing = threading.Lock()


@functools.cache
def mend_tasks() -> None:
    """Mend the tasks that this process builds from now on; a second call changes nothing."""
    ConfigurableTask.process_results = _seeded(ConfigurableTask.process_results)
    TaskConfig.__post_init__ = _without_default_stop(TaskConfig.__post_init__)


def _seeded(process_results: Any) -> Any:
    judged = judged_tasks()

    @functools.wraps(process_results)
    def seeded(task: Any, doc: dict[str, Any], results: Any, *args: Any, **kwargs: Any) -> Any:
        if task.config.task in judged:  # it waits for its judge, and threads must wait together
            return process_results(task, doc, results, *args, **kwargs)
        plain = {key: value for key, value in doc.items() if isinstance(value, str | int | float)}
        with _draws_of(f"{task.config.task} {json.dumps(plain, sort_keys=True)}"):
            return process_results(task, doc, results, *args, **kwargs)

    return seeded


@contextmanager
def _draws_of(question: str) -> Iterator[None]:
    """Inside, the global generators draw what this question always draws; afterwards they go on as if untouched."""
    with _drawing:  # lmms-eval scores in four threads, which share them
        before = random.getstate(), np.random.get_state()
        random.seed(question)
        np.random.seed(random.getrandbits(32))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _without_default_stop(post_init: Any) -> Any:
    @functools.wraps(post_init)
    def mended(config: Any) -> None:
        asked = "until" in (config.generation_kwargs or {})
        post_init(config)
        if not asked and not config.num_fewshot and config.generation_kwargs is not None:
            config.generation_kwargs.pop("until", None)

    return mended
