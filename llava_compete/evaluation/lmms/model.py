"""The model class that lmms-eval runs: `--model llava_compete --model_args pretrained=DIR,...`.

It turns lmms-eval's requests into prompts and hands them to `evaluation.generation`. lmms-eval shards documents over
ranks and makes the process group itself; here a rank only picks its device. An exception while answering names the
document and stops the run. A simple (not chat) model, because only those get multiple-choice and loglikelihood tasks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import Answerer, DocumentError, Prompt, document_errors, load_for_inference
from llava_compete.evaluation.checkpoint_facts import refuse_competition_at_inference
from llava_compete.evaluation.config import DTYPES
from llava_compete.evaluation.generation_settings import GenerationSettings
from llava_compete.evaluation.lmms.documents import FOLDER_VARIABLE, DocumentWriter
from llava_compete.evaluation.lmms.task_mends import mend_tasks
from llava_compete.model.devices import usable_device

PADDING = "__padding_only__"  # lmms-eval's mark on requests that only even out the ranks
MAX_ROUNDS = 64


class LlavaCompeteLmms(lmms):
    """A checkpoint directory of this package as an lmms-eval model.

    Args:
        pretrained: checkpoint directory.
        batch_size: prompts in one batch; answers do not depend on it.
        device: "cpu", "cuda:1"...; default, and "cuda": the rank's GPU if there is one.
        dtype: "auto" (as stored; float32 on a CPU), "float32", "bfloat16" or "float16".
        attn_implementation: as in transformers ("sdpa", "flash_attention_2", "eager").
        adapter: directory of a LoRA adapter to put on the checkpoint.
        competition_at_inference: route by the competition instead of the router, for study.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        adapter: str | None = None,
        competition_at_inference: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        mend_tasks()  # lmms-eval makes the model before it builds the tasks
        if dtype not in DTYPES:
            raise UserError(f"model_args: dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
        if device in (None, "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else device or "cpu"
        self.device = usable_device(device, "model_args: device")
        on_cpu_float32 = torch.float32 if self.device.type == "cpu" else None
        torch_dtype = on_cpu_float32 if dtype == "auto" else getattr(torch, dtype)
        if competition_at_inference:
            refuse_competition_at_inference(Path(pretrained))
        model, processor = load_for_inference(pretrained, self.device, torch_dtype, attn_implementation, adapter)
        model.config.competition_at_inference = bool(competition_at_inference)
        # The Answerer keeps the model out of reach of lmms-eval's clean(), which deletes attributes that are modules.
        self.answerer = Answerer(model, processor, int(batch_size))
        folder = os.environ.get(FOLDER_VARIABLE)
        self.documents = DocumentWriter(Path(folder) if folder else None)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer a request, in order; padding requests get an empty one that lmms-eval throws away."""
        real = [request for request in requests if PADDING not in request.metadata]
        prompts, settings = [], []
        for request in real:
            context, generation_kwargs, *document = request.args
            prompts.append(self._prompt(context, *document))
            settings.append(_settings(prompts[-1].name, generation_kwargs))
        answers = self._with_progress(len(real), partial(self.answerer.generate, prompts, settings))
        for request, answer in zip(real, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], answer)
        return _fill(requests, answers, "")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(summed negative log-likelihood, is greedy) a request; lmms-eval predicts the choice with the smallest.

        The wrapper takes the pair through lmms-eval's unpacking unharmed: a bare tuple becomes a string there.
        """
        real = [request for request in requests if PADDING not in request.metadata]
        prompts, continuations = [], []
        for request in real:
            context, continuation, *document = request.args
            if document:
                prompts.append(self._prompt(context, *document))
            else:  # the likelihood of a choice without its question, for acc_mutual_info
                prompts.append(Prompt(context, name=f"task {request.task_name}, document {request.doc_id}"))
            if callable(continuation):
                doc_id, task, split = document[1:]
                with document_errors(prompts[-1].name):
                    continuation = continuation(self.task_dict[task][split][doc_id])
            continuations.append(continuation)
        found = self._with_progress(len(real), partial(self.answerer.log_likelihoods, prompts, continuations))
        results = [GenerationResult(text=tuple(item)) for item in found]
        return _fill(requests, results, GenerationResult(text=(0.0, False)))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds, a list a request.

        The task's doc_to_text makes each next prompt from the answers so far, until it says that it is done; requests
        of one round share batches.
        """
        real = [request for request in requests if PADDING not in request.metadata]
        conversations = [_Conversation(self, request) for request in real]

        def run() -> None:
            for _ in range(MAX_ROUNDS):
                running = [item for item in conversations if item.prompt is not None]
                if not running:
                    return
                prompts = [item.prompt for item in running if item.prompt is not None]
                answers = self.answerer.generate(prompts, [item.settings for item in running])
                for item, answer in zip(running, answers, strict=True):
                    item.advance(answer)
            raise DocumentError(f"{running[0].name}: not finished after {MAX_ROUNDS} rounds")

        self._with_progress(len(real), run)
        return _fill(requests, [item.answers for item in conversations], [""])

    def clean(self) -> None:
        """Free cached memory only: the object stays usable for another evaluation."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _prompt(self, context: str, doc_to_visual: Callable[..., Any], doc_id: int, task: str, split: str) -> Prompt:
        def images() -> list[Image.Image]:
            shown = _images(doc_to_visual(self.task_dict[task][split][doc_id]))
            if shown and self.answerer.model.vision_tower is None:
                raise UserError(f"shows {len(shown)} image(s), but the checkpoint has no vision tower")
            self.documents.saw(task, doc_id, context, shown)
            return shown

        return Prompt(context, images, f"task {task}, split {split}, document {doc_id}")

    def _with_progress(self, total: int, run: Callable[[], Any]) -> Any:
        with tqdm(total=total, desc="answering", unit="q", file=sys.stderr, disable=self.rank != 0) as bar:
            self.answerer.progress = bar.update
            found = run()
        self.documents.write(self.rank)
        return found


class _Conversation:
    """One multi-round request; `prompt` is None once the task says that it is over."""

    def __init__(self, model: LlavaCompeteLmms, request: Instance) -> None:
        context, generation_kwargs, doc_to_visual, self.doc_to_text, doc_id, task, split = request.args
        first = model._prompt(context, doc_to_visual, doc_id, task, split)
        self.prompt: Prompt | None = first
        self.name = first.name
        self.settings = _settings(self.name, generation_kwargs)
        self.doc = model.task_dict[task][split][doc_id]
        self.answers: list[str] = []
        self.info: Any = None

    def advance(self, answer: str) -> None:
        """Take this round's answer and ask the task for the next prompt."""
        self.answers.append(answer)
        with document_errors(self.name):
            visuals, context, done, answers, self.info = self.doc_to_text(
                self.doc,
                previous_output=list(self.answers),
                round_idx=len(self.answers),
                previous_round_info=self.info,
            )
        self.answers = list(answers) if answers is not None else self.answers
        self.prompt = None if done else Prompt(context, partial(_images, visuals), self.name)


def _settings(name: str, generation_kwargs: dict[str, Any]) -> GenerationSettings:
    with document_errors(name):
        return GenerationSettings.from_task(generation_kwargs)


def _images(visuals: Any) -> list[Image.Image]:
    """A document's visuals as a flat list of images; None and [] are no image."""
    if visuals is None:
        return []
    flat: list[Any] = []
    for item in visuals if isinstance(visuals, list | tuple) else [visuals]:
        flat += item if isinstance(item, list | tuple) else [item]
    for item in flat:
        if not isinstance(item, Image.Image):
            raise TypeError(f"found a visual of type {type(item).__name__}, expected a PIL image (no video or audio)")
    return flat


def _fill(requests: Sequence[Instance], results: Sequence[Any], padding: Any) -> list[Any]:
    """Results in request order, with `padding` for the requests that were not run."""
    remaining = iter(results)
    return [padding if PADDING in request.metadata else next(remaining) for request in requests]
