"""How an answer is chosen: greedily, or by drawing."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from llava_compete.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Sampling:
    """max_new_tokens: most tokens of an answer; temperature: 0 is greedy; top_p, top_k: draw among the likeliest only
    (1.0 and 0: among all); seed: of the draws, None for another answer each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**64, "a number of 64 bits"),
        }
        for key, (holds, expected) in rules.items():
            if not holds:
                raise UserError(f"{key}: found {getattr(self, key)!r}, expected {expected}")

    def changed(self, setting: str) -> Sampling:
        """With one `key=value` of a user's."""
        key, equals, text = setting.partition("=")
        kinds: dict[str, Any] = {"max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int, "seed": int}
        key, text = key.strip(), text.strip()
        if not equals or key not in kinds:
            names = [field.name for field in fields(self)]
            hint = did_you_mean(key, names) or f"; valid: {', '.join(names)}"
            raise UserError(f"unknown setting {setting!r}{hint}")
        if key == "seed" and text in ("", "none"):
            return replace(self, seed=None)
        try:
            return replace(self, **{key: kinds[key](text)})
        except ValueError as error:
            raise UserError(f"{key}: found {text!r}, expected a number ({kinds[key].__name__})") from error

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`; the length is the caller's."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
