"""Sums over a layer's tokens that say how it routed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class RoutingMetrics:
    """Sums over a layer's counted tokens, detached and on device; sums of several (`+`, all-reduce) stay valid.

    load_E counts all K choices of the output actually computed; margin is the router's probability of its last
    chosen expert minus that of the best expert left out; dropped counts choices that add nothing to their token's
    output, for their weight is 0; recall counts winners that the router's top-K also has; response_entropy is that of
    the softmax of the responses (affinities); asked is the share of the experts not chosen that the token asked.
    """

    tokens: Tensor
    load_E: Tensor
    entropy_sum: Tensor
    margin_sum: Tensor
    dropped: Tensor
    recall_sum: Tensor
    competition_tokens: Tensor
    response_entropy_sum: Tensor
    asked_sum: Tensor
    asking_tokens: Tensor

    def __add__(self, other: RoutingMetrics) -> RoutingMetrics:
        return RoutingMetrics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def vector(self) -> Tensor:
        """All sums in one float32 vector [9 + E], as a `LayerStack` computes them, to reduce over ranks."""
        return torch.cat([getattr(self, field.name).reshape(-1) for field in fields(self)])

    @classmethod
    def from_vector(cls, vector: Tensor) -> RoutingMetrics:
        """The inverse of `vector`."""
        return cls(vector[0], vector[1:-8], *vector[-8:])

    def summary(self) -> dict[str, float | list[float] | None]:
        """Means for a log line (synchronises with the device: once a logging step). Without tokens all are None."""
        tokens, competed, asking = (float(t) for t in (self.tokens, self.competition_tokens, self.asking_tokens))
        load = [float(count) for count in self.load_E]
        choices = sum(load)
        return {
            "expert_load": [count / choices for count in load] if choices else None,
            "router_entropy": float(self.entropy_sum) / tokens if tokens else None,
            "router_margin": float(self.margin_sum) / tokens if tokens else None,
            "dropped": float(self.dropped),
            "router_agreement": float(self.recall_sum) / competed if competed else None,
            "response_entropy": float(self.response_entropy_sum) / competed if competed else None,
            "asked_share": float(self.asked_sum) / asking if asking else None,
        }
