"""A byte language model on six sources, one source a sequence; score: bits a byte on held-out text.

Two blocks of causal attention (4 heads) and a sparse layer, RMS norm before each, learned positions. Bytes before the
8th of a sequence are not scored. Suffixes: R runs, B sequences, N bytes of one, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.study.routing.draws import generator_of, normal, uniform
from llava_compete.study.routing.layer import Widths, layers
from llava_compete.study.routing.operators import RmsNorm
from llava_compete.study.routing.rules import Rule
from llava_compete.study.routing.sources import Source, read_sources

WIDTHS = Widths(num_experts=8, num_chosen=2, hidden=64, intermediate=24)
LENGTH, SEQUENCES, HEADS, LAYERS, UNSCORED = 64, 8, 4, 2, 8
HELD_OUT_SEQUENCES = 40  # of each source


class ByteText:
    """One rule on the byte streams of R seeds, which differ in what is drawn when."""

    warmup, floor = 0.05, 0.05

    def __init__(self, rule: Rule, seeds: Sequence[int], steps: int, device: str):
        sources = _sources()
        self.train = [torch.frombuffer(bytearray(source.train), dtype=torch.uint8) for source in sources]
        self.held_out_SN, self.source_S = _held_out(sources)
        self.generators = [generator_of(seed, "bytes") for seed in seeds]
        self.device, self.runs = device, len(seeds)
        hidden = WIDTHS.hidden
        self.embeddings = normal((256, hidden), 1.0, seeds, ("embeddings",), device)
        self.positions = normal((LENGTH, hidden), 1.0, seeds, ("positions",), device)
        self.head = uniform((256, hidden), hidden, seeds, ("head",), device)
        self.attention = [uniform((4 * hidden, hidden), hidden, seeds, ("attention", n), device) for n in range(LAYERS)]
        self.layers = layers(rule, WIDTHS, seeds, LAYERS, device)
        scores = [
            torch.rand(len(sources), WIDTHS.num_experts, generator=generator_of("hash", n)) for n in range(LAYERS)
        ]
        self.fixed = [torch.zeros_like(s).scatter_(1, s.topk(WIDTHS.num_chosen).indices, 1.0).bool() for s in scores]
        self.always = rule.response is not None and rule.response.always

    @property
    def parameters(self) -> list[Tensor]:
        own = [self.embeddings, self.positions, self.head, *self.attention]
        return own + [parameter for layer in self.layers for parameter in layer.parameters]

    def loss_R(self, step: int, competing_LR: list[Tensor | None]) -> Tensor:
        """Mean cross-entropy in nats of all bytes of a step, with the mean of the layers' auxiliary losses."""
        batches = [self._batch(generator) for generator in self.generators]
        bytes_RBN = torch.stack([text for text, _ in batches]).to(self.device)
        source_RB = torch.stack([source for _, source in batches])
        nats = self._nats(bytes_RBN, source_RB, True, competing_LR)
        return nats.mean((1, 2)) + sum(layer.aux_R for layer in self.layers) / LAYERS

    @torch.no_grad()
    def score_R(self) -> Tensor:
        """Bits a byte of the held-out text, scored bytes only."""
        every = torch.ones(self.runs, dtype=torch.bool, device=self.device) if self.always else None
        sums, pieces = torch.zeros(self.runs, device=self.device), 0
        for text_BN, source_B in zip(self.held_out_SN.split(16), self.source_S.split(16), strict=True):
            text = text_BN.to(self.device).expand(self.runs, -1, -1)
            nats = self._nats(text, source_B.expand(self.runs, -1), False, [every] * LAYERS)
            sums += nats[..., UNSCORED:].sum((1, 2))
            pieces += nats[0, :, UNSCORED:].numel()
        return sums / pieces / math.log(2)

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        source_B = torch.randint(len(self.train), (SEQUENCES,), generator=generator)
        rows = []
        for source in source_B.tolist():
            text = self.train[source]
            start = int(torch.randint(len(text) - LENGTH - 1, (1,), generator=generator))
            rows.append(text[start : start + LENGTH + 1])
        return torch.stack(rows).long(), source_B

    def _nats(self, text_RBM: Tensor, source_RB: Tensor, training: bool, competing: list[Tensor | None]) -> Tensor:
        """Of each byte after the first, [R, B, N]."""
        runs, batch, length = text_RBM.shape[0], text_RBM.shape[1], text_RBM.shape[2] - 1
        index = text_RBM[..., :-1] + torch.arange(runs, device=text_RBM.device).view(-1, 1, 1) * 256
        x = F.embedding(index, self.embeddings.flatten(0, 1)) + self.positions[:, None, :length]
        x = x.flatten(1, 2)
        for layer, weights, fixed, asks in zip(self.layers, self.attention, self.fixed, competing, strict=True):
            x = x + _attend(RmsNorm.apply(x), weights, batch)
            chosen = None
            if layer.rule.router == "fixed":
                chosen = fixed[source_RB].to(x.device).repeat_interleave(length, 1)
            x = x + layer(RmsNorm.apply(x), sequences=batch, training=training, competing_R=asks, fixed_RTE=chosen)
        logits = torch.bmm(RmsNorm.apply(x), self.head.transpose(1, 2))
        nats = F.cross_entropy(logits.flatten(0, 1), text_RBM[..., 1:].flatten(), reduction="none")
        return nats.view(runs, batch, length)


def _attend(x: Tensor, weights: Tensor, batch: int) -> Tensor:
    """Causal attention of R runs: rows of `weights` [R, 4 D, D] are queries, keys, values, output."""
    runs, tokens, hidden = x.shape
    joint, out = weights.split([3 * hidden, hidden], 1)
    parts = torch.bmm(x, joint.transpose(1, 2)).view(runs * batch, tokens // batch, 3, HEADS, hidden // HEADS)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return torch.bmm(mixed.transpose(1, 2).reshape(runs, tokens, hidden), out.transpose(1, 2))


@functools.cache
def _sources() -> list[Source]:
    return read_sources()


def _held_out(sources: list[Source]) -> tuple[Tensor, Tensor]:
    """Evenly spread pieces [S, N + 1] of each source's held-out bytes, and their source."""
    pieces, numbers = [], []
    for number, source in enumerate(sources):
        text = torch.frombuffer(bytearray(source.held_out), dtype=torch.uint8)
        for start in torch.linspace(0, len(text) - LENGTH - 1, HELD_OUT_SEQUENCES).long().tolist():
            pieces.append(text[start : start + LENGTH + 1].long())
            numbers.append(number)
    return torch.stack(pieces), torch.tensor(numbers)
