"""One request's own seed, stop strings and end, in front of the generation that all requests of a server share.

transformers seeds when a request comes in, while another may be drawing or wait before it; it leaves a stop string in
the answer, which OpenAI's protocol leaves out; and it takes an answer that ends at its last token for one cut off.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import BaseGenerateManager, _StreamError


class OneRequest:
    """A request's generation, in the place of the manager that all share.

    Args:
        shared: transformers' manager.
        seed: of the draws; None for none.
        stops: strings that end the answer.
    """

    def __init__(self, shared: BaseGenerateManager, seed: int | None, stops: Sequence[str]) -> None:
        self.shared, self.seed, self.stops = shared, seed, stops

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any
    ) -> tuple[_Pieces, Any]:
        """As the shared one does, with a queue that gives the answer's text up to a stop string."""
        inputs, end = self._inputs(processor, inputs, gen_config)
        queue, streamer = self.shared.generate_streaming(model, processor, inputs, gen_config, **options)
        return _Pieces(queue, end, gen_config), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any
    ) -> tuple[str, int, Any]:
        """As the shared one does: the text up to a stop string, the prompt's tokens, the answer's ids."""
        inputs, end = self._inputs(processor, inputs, gen_config)
        text, length, ids = await self.shared.generate_non_streaming(model, processor, inputs, gen_config, **options)
        end.tell(gen_config)
        text = text.removeprefix(" ")
        return text[: _place(text, self.stops)], length, ids

    def _inputs(self, processor: Any, inputs: Any, settings: Any) -> tuple[dict[str, Any], _End]:
        """Arguments of `generate`: what is here travels among them to the thread that draws."""
        end = _End(processor, inputs["input_ids"].shape[1], settings.eos_token_id, self.stops)
        more: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([end])}
        if self.seed is not None:
            more["logits_processor"] = LogitsProcessorList([_Seeded(self.seed)])
        return {**inputs, **more}, end


class _Seeded(LogitsProcessor):
    """Changes no scores, and seeds before the first token is drawn from them."""

    def __init__(self, seed: int) -> None:
        self.seed: int | None = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.seed is not None:
            torch.manual_seed(self.seed)
            self.seed = None
        return scores


class _End(StoppingCriteria):
    """Ends an answer whose text has a stop string, and knows whether it ended by itself."""

    def __init__(self, processor: Any, prompt_tokens: int, eos_ids: int | Sequence[int], stops: Sequence[str]) -> None:
        self.processor, self.prompt_tokens, self.stops = processor, prompt_tokens, stops
        self.eos_ids = {eos_ids} if isinstance(eos_ids, int) else set(eos_ids or ())
        self.has_ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ids = input_ids[0, self.prompt_tokens :].tolist()
        text = self.processor.decode(ids, skip_special_tokens=True) if self.stops else ""
        found = _place(text, self.stops) is not None
        self.has_ended = found or ids[-1] in self.eos_ids
        return torch.full((len(input_ids),), found, device=input_ids.device)

    def tell(self, settings: Any) -> None:
        """Whoever asks `settings` behind the answer whether its limit was met learns that it was not."""
        if self.has_ended:
            settings.max_new_tokens = None


class _Pieces:
    """The queue of an answer's pieces, up to a stop string: text that may be the beginning of one waits."""

    def __init__(self, queue: asyncio.Queue[Any], end: _End, settings: Any) -> None:
        self._queue, self._end, self._settings = queue, end, settings
        self._waiting, self._next = "", list[None]()
        self._has_begun = self._is_cut = False

    async def get(self) -> Any:
        return self._next.pop() if self._next else self._kept(await self._queue.get())

    def get_nowait(self) -> Any:
        return self._next.pop() if self._next else self._kept(self._queue.get_nowait())

    def _kept(self, item: Any) -> Any:
        if item is None:
            self._end.tell(self._settings)
            rest, self._waiting = self._waiting, ""
            self._next = [None] if rest else []
            return rest or None
        if isinstance(item, _StreamError):
            item.msg = json.dumps(item.msg)[1:-1]  # it is put between quotation marks as it is
        return self._text(item) if type(item) is str else item

    def _text(self, piece: str) -> str:
        if self._is_cut:
            return ""
        if piece and not self._has_begun:
            piece, self._has_begun = piece.removeprefix(" "), True
        text = self._waiting + piece
        place = _place(text, self._end.stops)
        self._is_cut = place is not None
        if place is None:
            place = len(text) - max((_begun(text, stop) for stop in self._end.stops), default=0)
        self._waiting = "" if self._is_cut else text[place:]
        return text[:place]


def _place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def _begun(text: str, stop: str) -> int:
    """Characters at the text's end with which a stop string may begin."""
    return next(count for count in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:count]))
