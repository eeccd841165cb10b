"""What a step sends between GPUs, and how long it takes on a cluster: by ZeRO stage and by expert parallelism.

Bytes are counted from shapes, by what DeepSpeed and `moe/parallel.py` send (tests/plan/test_cluster.py counts those of
the latter as they are sent). Seconds are bytes over the links' rates, and operations over a share of the devices' peak:
no latency, no contention, no rank that waits for another. Expert parallelism waits for its passages; reductions of
gradients and ZeRO-3's gathering run beside the arithmetic as far as it lasts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from llava_compete.moe.block import SparseMoeBlock, moe_blocks
from llava_compete.moe.experts import PackedExperts
from llava_compete.parts import Part

# What a training step reached of one H200's peak, softmax router, at Phi-3.5's widths: eval/results/gpu_h200.
EFFICIENCY = 0.404
SECONDS_A_DAY = 86_400
# The share of a step's arithmetic that is backward, beside which gradients are reduced.
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Cluster:
    """So many machines alike.

    link, network: bytes a second that one GPU sends to the others of its machine, and beyond it (each way).
    peak: FLOP/s of one GPU; efficiency: the share of it that arithmetic alone reaches.
    """

    nodes: int
    gpus_per_node: int
    link: float = 450e9
    network: float = 50e9
    peak: float = 989e12
    efficiency: float = EFFICIENCY

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def seconds(self, sent: Sent) -> float:
        """Both kinds of links work at once."""
        return max(sent.inside / self.link, sent.beyond / self.network)


@dataclass(frozen=True)
class Sent:
    """Bytes that one GPU sends: to others of its machine, and beyond."""

    inside: float = 0.0
    beyond: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.inside + other.inside, self.beyond + other.beyond)

    def __mul__(self, times: float) -> Sent:
        return Sent(self.inside * times, self.beyond * times)


@dataclass(frozen=True)
class Weights:
    """Bytes: of all weights, of those that train, and of experts among both."""

    total: int
    trained: int
    experts: int
    trained_experts: int


@dataclass(frozen=True)
class Layer:
    """One mixture in one micro-batch: tokens, their width and their outputs', choices that travel, experts, bytes of a
    number; `lent`: parameters of a shared expert, which travels in place of its tokens."""

    part: Part
    tokens: int
    width: int
    output: int
    choices: int
    experts: int
    itemsize: int
    judged: bool
    lent: int = 0


@dataclass(frozen=True)
class Step:
    """One optimizer step: what is sent by purpose, and its seconds."""

    sent: Mapping[str, Sent]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def layers_of(model: nn.Module, tokens: Mapping[str, int], itemsize: int) -> list[Layer]:
    """The model's mixtures; `tokens` of a micro-batch by layer (`StepCost.layer_tokens`)."""
    return [_layer(block, tokens[name], itemsize) for name, block in moe_blocks(model).items()]


def _layer(block: SparseMoeBlock, tokens: int, itemsize: int) -> Layer:
    packed = next(module for module in block.experts.modules() if isinstance(module, PackedExperts))  # maybe adapted
    output, width = packed.down_proj.shape[1], block.hidden_size
    choices, experts = block.config.num_experts_per_tok, block.config.num_experts
    judged = block.config.competition_judge == "loss" and block.config.competition_answers != "mean"
    lent = sum(parameter[0].numel() for parameter in packed.parameters(recurse=False)) if block.router.num_shared else 0
    choices -= lent > 0
    return Layer(block.part, tokens, width, output, choices, experts, itemsize, judged, lent)  # type: ignore[arg-type]


def collective(size: float, members: int, apart: int, cluster: Cluster) -> Sent:
    """Of an all-gather or a reduce-scatter of `size` bytes in all over `members` ranks, each `apart` from the next."""
    if members == 1:
        return Sent()
    on_a_node = max(cluster.gpus_per_node // apart, 1)
    nodes = -(-members // on_a_node)
    here = min(members, on_a_node)
    return Sent(
        inside=size * (here - 1) / here if here > 1 else 0.0,
        beyond=size * (nodes - 1) / nodes / here if nodes > 1 else 0.0,
    )


def passage(size: float, ranks: int, cluster: Cluster) -> Sent:
    """Of `size` bytes that a GPU shares out evenly to so many neighbouring ranks, itself among them."""
    here = min(ranks, cluster.gpus_per_node)
    return Sent(size * (here - 1) / ranks, size * (ranks - here) / ranks)


def reductions(weights: Weights, zero_stage: int, spread: int, accumulation: int, cluster: Cluster) -> dict[str, Sent]:
    """Of gradients and weights. DeepSpeed's ZeRO-1 and 2 reduce a bucket to all ranks, each of which keeps its part, so
    that a gradient travels twice; ZeRO-2 and 3 reduce in every micro-batch."""
    gpus, replicas = cluster.gpus, cluster.gpus // spread

    def everywhere(plain: float, experts: float) -> Sent:
        if spread == 1:
            return collective(plain + experts, gpus, 1, cluster)
        return collective(plain, gpus, 1, cluster) + collective(experts / spread, replicas, spread, cluster)

    gradients = everywhere(weights.trained - weights.trained_experts, weights.trained_experts)
    if zero_stage == 3:
        gathered = collective(weights.total, gpus, 1, cluster)
        return {"gradients": gradients * accumulation, "weights": gathered * (2 * accumulation)}
    times = 2 * (accumulation if zero_stage == 2 else 1)
    return {"gradients": gradients * times, "weights": gradients if zero_stage else Sent()}


def travel(layer: Layer, spread: int, checkpointing: bool, cluster: Cluster) -> Sent:
    """Of a router's step: tokens there and outputs back for each choice, and a shared expert's weights, forwards (with
    checkpointing twice) and backwards, where these are gradients in float32."""
    if spread == 1:
        return Sent()
    rows = layer.choices * layer.tokens * (layer.width + layer.output) * layer.itemsize
    forwards = passage(rows + layer.lent * layer.itemsize, spread, cluster)
    return forwards * (2 if checkpointing else 1) + passage(rows + layer.lent * 4, spread, cluster)


def contest(layer: Layer, spread: int, checkpointing: bool, cluster: Cluster) -> Sent:
    """Of a competition: tokens to all ranks, affinities and the winners' outputs back, and the same backwards."""
    if spread == 1:
        return Sent()
    everywhere = spread * layer.tokens * layer.width * layer.itemsize
    affinities = layer.tokens * layer.experts * 4
    won = layer.choices * layer.tokens * layer.output * layer.itemsize
    requests = layer.choices * layer.tokens * 8
    forwards = passage(everywhere + affinities + won + requests, spread, cluster)
    backwards = passage(everywhere + affinities + won, spread, cluster)
    return forwards * (2 if checkpointing else 1) + backwards


def judgement(layer: Layer, spread: int, cluster: Cluster) -> Sent:
    """Of a loss that judges, in backward: tokens and gradients to all ranks, who is asked, and the answers back."""
    if spread == 1 or not layer.judged:
        return Sent()
    everywhere = spread * layer.tokens * (layer.width + layer.output) * layer.itemsize
    return passage(everywhere + layer.tokens * layer.experts * (1 + 4), spread, cluster)


def step(
    cluster: Cluster,
    weights: Weights,
    layers: list[Layer],
    flops: float,
    *,
    zero_stage: int,
    spread: int,
    accumulation: int,
    checkpointing: bool,
    competing: int = 0,
) -> Step:
    """One optimizer step in which so many layers compete, those with the most tokens.

    Args:
        flops: operations of the step over all GPUs.
        spread: ranks over which experts are spread, a divisor of the GPUs.
    """
    by_size = sorted(layers, key=lambda layer: -layer.tokens * layer.width)
    routed = Sent()
    for number, layer in enumerate(by_size):
        one = contest if number < competing else travel
        routed += (one(layer, spread, checkpointing, cluster) + judgement(layer, spread, cluster)) * accumulation
    sent = {**reductions(weights, zero_stage, spread, accumulation, cluster), "tokens": routed}
    arithmetic = flops / cluster.gpus / (cluster.peak * cluster.efficiency)
    seconds = {"arithmetic": arithmetic, "tokens": cluster.seconds(routed)}
    beside = cluster.seconds(sent["gradients"]) + (cluster.seconds(sent["weights"]) if zero_stage == 3 else 0.0)
    hidden = arithmetic * (1.0 if zero_stage == 3 else BACKWARD_SHARE)
    seconds["waiting for links"] = max(0.0, beside - hidden)
    seconds["new weights"] = 0.0 if zero_stage == 3 else cluster.seconds(sent["weights"])
    return Step(sent, seconds)


def days(tokens: float, tokens_a_step: int, seconds_a_step: float) -> float:
    """Of training on so many tokens."""
    return math.ceil(tokens / tokens_a_step) * seconds_a_step / SECONDS_A_DAY
