"""Generation settings: what a task asks for, checked and named as transformers names it.

A task's `generation_kwargs` mix transformers' names, lm-eval's (`until`, `max_gen_toks`) and other models' private
ones; the latter are ignored and named once in the log.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 1024  # textvqa_val, mmstar and seedbench name none
# Passed on to `generate` as they are; the sampling ones only when sampling.
_PASSED_ON = ("num_beams", "min_new_tokens", "length_penalty", "repetition_penalty", "no_repeat_ngram_size")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_warned: set[str] = set()


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one request; requests with equal settings may share a batch.

    Attributes:
        until: strings at which the answer ends (and is cut).
        max_new_tokens: most tokens to generate.
        options: other arguments of `generate`, sorted by name.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def from_task(cls, generation_kwargs: dict[str, Any]) -> GenerationSettings:
        """Read a request's `generation_kwargs`; a wrong value is a `ValueError` that names it."""
        given = {key: value for key, value in generation_kwargs.items() if value is not None}
        until = given.pop("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"until: found {until!r}, expected a string or a list of strings")
        max_new_tokens = given.pop("max_new_tokens", given.pop("max_gen_toks", DEFAULT_MAX_NEW_TOKENS))
        given.pop("max_gen_toks", None)
        if int(max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens: found {max_new_tokens!r}, expected at least 1")

        # A temperature of 0 is greedy whatever do_sample says: sampling divides by it.
        asked = given.pop("do_sample", "temperature" in given)
        sample = bool(asked) and float(given.get("temperature", 1.0)) > 0
        options: dict[str, Any] = {"do_sample": sample}
        options.update({key: given[key] for key in _PASSED_ON if key in given})
        if sample:
            options.update({key: given[key] for key in _SAMPLING if key in given})
        unknown = sorted(set(given) - set(_PASSED_ON) - set(_SAMPLING) - _warned)
        if unknown:
            _warned.update(unknown)
            log.info("generation settings of other models, ignored: %s", ", ".join(unknown))
        return cls(tuple(stop for stop in until if stop), int(max_new_tokens), tuple(sorted(options.items())))


def cut_at(text: str, until: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    ends = [position for position in (text.find(stop) for stop in until) if position >= 0]
    return text[: min(ends)] if ends else text
