"""Batched answers and log-likelihoods of a checkpoint, the same whatever the batch size.

Prompts come from the checkpoint's own chat template; batches are padded on the left, formed from prompts of similar
length and of equal generation settings, and results return in request order. Images are loaded with their batch, so
that a benchmark never sits in memory. Nothing here knows lmms-eval: the callers are `evaluation.lmms_model` and
`bench.generate`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from llava_compete.evaluation.generation_settings import GenerationSettings, cut_at
from llava_compete.language.chat_encoding import encode_answer, encode_conversation, images_before, stop_token_ids
from llava_compete.model.build import load_checkpoint
from llava_compete.model.lora import load_adapter
from llava_compete.vision.image_decoder import full_size
from llava_compete.vision.image_inputs import load_images

ResultT = TypeVar("ResultT")
_PLACEHOLDER = re.compile(r"<image(?: \d+)?>")
_NUMBERED = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class Prompt:
    """One question: its text, how to get its images, and the name of its document for error messages."""

    text: str
    images: Callable[[], list[Image.Image]] = list
    name: str = "prompt"


class LikelihoodResult(NamedTuple):
    """Summed negative log-likelihood of a continuation (nats), and whether greedy decoding would have written it."""

    negative_log_likelihood: float
    is_greedy: bool


class DocumentError(RuntimeError):
    """Something failed on a named document; the run stops rather than score an empty answer."""


class _Loaded(NamedTuple):
    """A prompt ready for the model: token ids up to where the answer begins (images expanded), and its images."""

    name: str
    messages: list[dict[str, Any]]
    input_ids: list[int]
    images: list[Image.Image]


class _Choice(NamedTuple):
    """A prompt and the token ids of one continuation."""

    name: str
    prompt: _Loaded
    continuation_ids: list[int]


class Answerer:
    """Answers prompts with one model.

    Args:
        model, processor: as `model.build.load_checkpoint` returns them; the model decides device and dtype.
        batch_size: prompts in one batch.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int) -> None:
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.tokenizer = processor.tokenizer
        self.chat = self.tokenizer.chat_template is not None
        self.stop_ids = stop_token_ids(self.tokenizer) if self.chat else [self.tokenizer.eos_token_id]
        self.pad_id = self.stop_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        # Called with the number of prompts just finished.
        self.progress: Callable[[int], Any] = lambda count: None

    def generate(self, prompts: Sequence[Prompt], settings: Sequence[GenerationSettings]) -> list[str]:
        """The answer to each prompt, cut at its stop strings."""
        answers = [""] * len(prompts)
        for indices in self._batches([prompt.text for prompt in prompts], settings):
            loaded = {index: self._load(prompts[index]) for index in indices}
            chosen = settings[indices[0]]
            rooms = {index: self._room(item, chosen.max_new_tokens) for index, item in loaded.items()}
            # Almost always one room: a prompt near the end of the context must not shorten its neighbours' answers.
            for room in dict.fromkeys(rooms.values()):
                part = [index for index in indices if rooms[index] == room]
                run = partial(self._generate_batch, settings=chosen, max_new_tokens=room)
                for index, text in zip(part, _guarded([loaded[index] for index in part], run), strict=True):
                    answers[index] = text
            self.progress(len(indices))
        return answers

    def log_likelihoods(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[LikelihoodResult]:
        """How likely the model is to answer each prompt with its continuation (without the end of the turn)."""
        results: dict[int, LikelihoodResult] = {}
        whole = [prompt.text + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
        for indices in self._batches(whole, [None] * len(prompts)):
            batch = [self._load_choice(prompts[index], continuations[index]) for index in indices]
            results.update(zip(indices, _guarded(batch, self._likelihood_batch), strict=True))
            self.progress(len(indices))
        return [results[index] for index in range(len(prompts))]

    def _load(self, prompt: Prompt) -> _Loaded:
        with document_errors(prompt.name):
            images = prompt.images()
            images = self._decoded([images[index] for index in reading_order(prompt.text, len(images))])
            messages = [{"role": "user", "content": content_parts(prompt.text, len(images))}]
            if not self.chat:
                return _Loaded(prompt.name, messages, self._plain_ids(prompt.text, images), images)
            encoded = encode_conversation(
                self.tokenizer,
                messages,
                tokens_per_image=self._tokens_per_image(images),
                add_generation_prompt=True,
            )
            return _Loaded(prompt.name, messages, encoded.input_ids, images)

    def _load_choice(self, prompt: Prompt, continuation: str) -> _Choice:
        loaded = self._load(prompt)
        with document_errors(prompt.name):
            if not self.chat:  # the text as a whole, so that a word is not cut in two
                whole = self._plain_ids(prompt.text + continuation, loaded.images)
                shared = _common_prefix(loaded.input_ids, whole)
                shared = min(shared, len(whole) - 1)
                return _Choice(prompt.name, loaded._replace(input_ids=whole[:shared]), whole[shared:])
            # As in training; a leading space was meant for plain text.
            prompt_ids, ids = encode_answer(
                self.tokenizer,
                loaded.messages,
                continuation.lstrip(),
                tokens_per_image=self._tokens_per_image(loaded.images),
            )
            if not ids:
                raise ValueError(f"continuation {continuation!r} has no tokens")
            return _Choice(prompt.name, loaded._replace(input_ids=prompt_ids), ids)

    def _decoded(self, images: list[Any]) -> list[Image.Image]:
        image_processor = self.processor.image_processor
        return load_images(images) if image_processor is None else image_processor.fetch_images(images)

    def _tokens_per_image(self, images: Sequence[Image.Image]) -> int | list[int]:
        return self.processor.tokens_per_image(full_size(image) for image in images)

    def _plain_ids(self, text: str, images: Sequence[Image.Image]) -> list[int]:
        """Ids for a language model without a chat template; such a model has no place for images."""
        if images:
            raise ValueError("the checkpoint has no chat template, which says where an image goes")
        return self.tokenizer(text).input_ids or self.stop_ids[:1]

    def _room(self, prompt: _Loaded, max_new_tokens: int) -> int:
        """Tokens that may follow a prompt within the context; at least 1: a longer prompt fails in the model."""
        context = getattr(self.model.config.text_config, "max_position_embeddings", None)
        return max_new_tokens if context is None else max(min(max_new_tokens, context - len(prompt.input_ids)), 1)

    @torch.inference_mode()
    def _generate_batch(self, batch: Sequence[_Loaded], settings: GenerationSettings, max_new_tokens: int) -> list[str]:
        inputs = self._inputs([item.input_ids for item in batch], batch)
        prompt_length = inputs["input_ids"].shape[1]
        stops = [StopStrings(self.tokenizer, settings.until, prompt_length)] if settings.until else []
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
            stopping_criteria=StoppingCriteriaList(stops),
            **dict(settings.options),
        )
        answers = self.tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
        # Some templates write a space before an answer, as SentencePiece spells a first word.
        return [cut_at(answer.removeprefix(" "), settings.until) for answer in answers]

    @torch.inference_mode()
    def _likelihood_batch(self, batch: Sequence[_Choice]) -> list[LikelihoodResult]:
        rows = [item.prompt.input_ids + item.continuation_ids for item in batch]
        inputs = self._inputs(rows, [item.prompt for item in batch])
        longest = max(len(item.continuation_ids) for item in batch)
        logits = self.model(**inputs, logits_to_keep=longest + 1).logits.float()
        results = []
        for row, item in enumerate(batch):
            count = len(item.continuation_ids)
            # With padding on the left the continuation is the end of the row; position t predicts token t + 1.
            target_ids = inputs["input_ids"][row, -count:]
            log_probs = torch.log_softmax(logits[row, -count - 1 : -1], dim=-1)
            log_likelihood = log_probs.gather(1, target_ids[:, None]).sum().item()
            results.append(LikelihoodResult(-log_likelihood, bool((log_probs.argmax(dim=-1) == target_ids).all())))
        return results

    def _inputs(self, rows: Sequence[list[int]], batch: Sequence[_Loaded]) -> dict[str, Any]:
        """Pad on the left; images of the batch in reading order."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        images = [image for item in batch for image in item.images]
        if images:
            inputs.update(self.processor.image_processor.preprocess(images, return_tensors="pt"))
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.device)  # sizes are read on the host
        return inputs

    def _batches(self, texts: Sequence[str], keys: Sequence[Any]) -> Iterator[list[int]]:
        """Indices by batch, longest first (running out of memory shows at once), never mixing settings."""
        by_key: dict[Any, list[int]] = {}
        for index, key in enumerate(keys):
            by_key.setdefault(key, []).append(index)
        for indices in by_key.values():
            ordered = sorted(indices, key=lambda index: (-len(texts[index]), index))
            for start in range(0, len(ordered), self.batch_size):
                yield ordered[start : start + self.batch_size]


def load_for_inference(
    checkpoint: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    adapter: str | None = None,
) -> tuple[Any, Any]:
    """Model (with its LoRA adapter merged in, if one is given) and processor on one device; no dtype: as stored."""
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model, processor = load_checkpoint(checkpoint, dtype=dtype, **extra)
    if adapter is not None:
        model = load_adapter(model, adapter).merge_and_unload()
    return model.to(device).eval(), processor


class StopStrings(StoppingCriteria):
    """Ends a row once its answer holds a stop string; the other rows go on."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.until, self.prompt_length = tokenizer, tuple(until), prompt_length
        # A token is at least one byte, so a stop string that has just ended lies within this many tokens.
        self.window = max(len(stop.encode()) for stop in self.until) + 1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        ended = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class document_errors:  # noqa: N801 - a context manager, used like a function
    """Puts the name of a document on whatever goes wrong inside."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, DocumentError):
            raise DocumentError(f"{self.name}: {_describe(error)}") from error


def content_parts(text: str, num_images: int) -> list[dict[str, str]]:
    """The parts of a message about `num_images` images.

    Images stand where the text names them (`<image>` or `<image 1>`, as many as there are images), else in front of it,
    each on a line of its own, as in training.
    """
    pieces = _PLACEHOLDER.split(text)
    if num_images and len(pieces) == num_images + 1:
        parts: list[dict[str, str]] = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece}]
        return [part for part in parts if part["type"] == "image" or part["text"]]
    return images_before(num_images, [{"type": "text", "text": text}])


def reading_order(text: str, num_images: int) -> list[int]:
    """Which image stands at each place of the text: MMMU gives them by number and may mention the second one first."""
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    if len(numbers) == num_images == len(set(numbers)):
        return [sorted(numbers).index(number) for number in numbers]
    return list(range(num_images))


def _guarded(batch: list[Any], run: Callable[[list[Any]], list[ResultT]]) -> list[ResultT]:
    """Run a batch; when it fails, find the document at fault by running each alone."""
    try:
        return run(batch)
    except Exception as error:
        names = [item.name for item in batch]
        if len(batch) > 1:
            for name, item in zip(names, batch, strict=True):
                with document_errors(name):
                    run([item])
        advice = "; each passes alone: lower the batch size" if len(batch) > 1 else ""
        raise DocumentError(f"{'; '.join(names)}: {_describe(error)}{advice}") from error


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
