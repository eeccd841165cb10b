"""Answers of one model, piece by piece: template, stop tokens and pictures by the code that training uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import stop_token_ids
from llava_compete.model.checkpoint import load_checkpoint
from llava_compete.model.devices import usable_device
from llava_compete.talk.routed import RoutedTokens, expert_use, routing_recorded
from llava_compete.talk.sampling import Sampling

Message = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """text: without control tokens; finish: ended by the model, by the limit of tokens or context, or by the user;
    token_ids: of the answer; image_places_T: where in the prompt a picture's features stand."""

    text: str
    prompt_tokens: int
    token_ids: list[int]
    finish: Literal["stop", "length", "stopped"]
    image_places_T: Tensor
    routed: dict[str, RoutedTokens] = field(default_factory=dict)

    def expert_use(self) -> dict[str, dict[str, list[float]]]:
        """`routed.expert_use` of this answer."""
        return expert_use(self.routed, self.image_places_T)


class Talker:
    """One model, one answer at a time (others wait).

    Args:
        model, processor: as `load_checkpoint` returns them; the model decides device and dtype.
        records_routing: keep each answer's choices of experts.

    Raises:
        UserError: a checkpoint without a chat template.
    """

    def __init__(self, model: Any, processor: Any, records_routing: bool = True) -> None:
        if processor.tokenizer.chat_template is None:
            raise UserError("this checkpoint has no chat template: it goes on with texts, and cannot be talked to")
        self.model, self.processor, self.records_routing = model.eval(), processor, records_routing
        self.stop_ids = stop_token_ids(processor.tokenizer)
        self._turn = threading.Lock()

    def stream(
        self, messages: list[Message], sampling: Sampling, stop: threading.Event | None = None
    ) -> Generator[str, None, Answer]:
        """The pieces of the answer to `messages` (the last is the user's), and the whole as the generator's value.

        A picture is a content part {"type": "image", "image": anything that `vision.image_inputs` takes}. Setting
        `stop`, or closing the generator, ends the answer where it is.

        Raises:
            UserError: a broken picture, or a conversation longer than the model's context.
        """
        inputs = self._inputs(messages)
        length = inputs["input_ids"].shape[1]
        room = fitting(self.model, length, sampling.max_new_tokens)
        stop = stop or threading.Event()
        left = threading.Event()  # nobody reads on
        streamer = Pieces(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        results: list[Any] = []
        with self._turn:
            run = threading.Thread(
                target=self._generate,
                args=(inputs, sampling, room, _UntilSet(stop, left), streamer, results),
                daemon=True,
            )
            run.start()
            text, has_begun = "", False
            try:
                for piece in streamer:
                    if piece and not has_begun:
                        # Some templates write a space before an answer, as SentencePiece spells a first word.
                        piece, has_begun = piece.removeprefix(" "), True
                    text += piece
                    if piece:
                        yield piece
            finally:
                left.set()
                run.join()
        if isinstance(results[0], BaseException):
            raise results[0]
        output, routed, was_stopped = results[0]
        token_ids = output[0, length:].tolist()
        ended = bool(token_ids) and token_ids[-1] in self.stop_ids
        places = inputs["input_ids"][0].cpu() == self.model.config.image_token_id
        finish: Any = "stop" if ended else "stopped" if was_stopped else "length"
        return Answer(text, length, token_ids, finish, places, routed)

    def ask(self, messages: list[Message], sampling: Sampling) -> Answer:
        """The whole answer; errors as for `stream`."""
        return say_pieces(self.stream(messages, sampling), lambda _: None)

    def _inputs(self, messages: list[Message]) -> Any:
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return inputs.to(self.model.device)

    def _generate(
        self,
        inputs: Any,
        sampling: Sampling,
        room: int,
        watch: _UntilSet,
        streamer: Pieces,
        results: list[Any],
    ) -> None:
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            with torch.inference_mode(), routing_recorded(self.model if self.records_routing else None) as routed:
                output = self.model.generate(
                    **inputs,
                    max_new_tokens=room,
                    eos_token_id=self.stop_ids,
                    pad_token_id=self.stop_ids[0],
                    stopping_criteria=StoppingCriteriaList([watch]),
                    streamer=streamer,
                    **sampling.options(),
                )
            results.append((output, routed, watch.has_stopped))
        except BaseException as error:  # noqa: BLE001 - raised again where the pieces are read
            results.append(error)
        finally:
            streamer.end()


class Pieces(TextIteratorStreamer):
    """An answer's text in pieces that are what the tokenizer makes of the whole.

    transformers' own forgets the tokens of a line that has ended. A SentencePiece tokenizer takes the next line's first
    space for the one that it writes before a text, and leaves it out: code lost a space of each line's indent.
    """

    token_cache: list[int]
    print_len: int

    def put(self, value: Tensor) -> None:
        """As there; the last token of a line stays, so that the next ones do not begin a text."""
        is_prompt = self.skip_prompt and self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt and not self.token_cache:
            self.token_cache = value.flatten().tolist()[-1:]
            self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))


def say_pieces(pieces: Generator[str, None, Answer], say: Callable[[str], None]) -> Answer:
    """Say each piece, and return what the generator returns."""
    while True:
        try:
            say(next(pieces))
        except StopIteration as end:
            answer: Answer = end.value
            return answer


class _UntilSet(StoppingCriteria):
    """Ends all rows once one of some events is set."""

    def __init__(self, *events: threading.Event) -> None:
        self.events, self.has_stopped = events, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.has_stopped = any(event.is_set() for event in self.events)
        return torch.full((len(input_ids),), self.has_stopped, device=input_ids.device)


def fitting(model: Any, prompt_tokens: int, asked: int) -> int:
    """New tokens, at most `asked`, that fit into the context behind a prompt.

    Raises:
        UserError: a prompt that leaves no room.
    """
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    if context is None:
        return asked
    if prompt_tokens >= context:
        raise UserError(
            f"the conversation has {prompt_tokens} tokens, pictures included, and the model's context is {context}: "
            "ask something shorter, or begin anew"
        )
    return min(asked, context - prompt_tokens)


def load_talker(checkpoint: str, device: str | None = None, dtype: str | None = None) -> Talker:
    """A checkpoint on a device (default: the GPU, if there is one), in the dtype it is stored in unless one is given.

    Raises:
        UserError: no checkpoint of ours, an unknown dtype, or a device that is not there.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype: found {dtype!r}, expected float32, bfloat16 or float16")
    place = usable_device(device)  # before weights are read
    model, processor = load_checkpoint(checkpoint, dtype=None if dtype is None else getattr(torch, dtype))
    try:
        return Talker(model.to(place), processor)
    except RuntimeError as error:
        raise UserError(f"--device: {str(place)!r} cannot hold the model: {str(error).splitlines()[0]}") from error
