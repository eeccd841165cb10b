"""What is compared: every router of the package, competition in each of its forms, controls, and rules of other papers.

A rule says how a layer routes; all else (data, order, start, learning rate, steps) is the same in every run of a seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.terms import COMPETITION_COEFS, ROUTER_COEFS

Controls = ("random", "fixed", "dense")


@dataclass(frozen=True)
class Response:
    """A competition by response: `output` is the winners' or the router's; with `always` also at inference."""

    rate: float = 0.05
    warmup: float = 0.05
    output: Literal["winners", "router"] = "winners"
    always: bool = False


@dataclass(frozen=True)
class Judge:
    """A competition that the loss judges; the first fields are the `competition_*` keys of the configuration.

    Attributes:
        answers: the asked experts' own, an estimate (`mean`) without asking, or `both`: the estimate where none is
            asked.
        baseline: what an answer is compared with: the output, nothing, the answer of the `last` of the choice, whose
            place an expert would take, or the `estimate` of the output, from those of the chosen.
        period: from which to which share of the steps it judges.
        last_margin: to which the margin goes, linearly, by the end.
        deep_margin: of every layer but the first.
        contested: experts a token that are asked; the margin moves by 5% a step to hold it.
        relative: the term is divided by the probability of the choice, as the weights of the output are.
        estimate: the running mean of an expert's answers to the tokens that chose it; to those of which it was the
            `last` choice; by `pair`: to those that also chose the token's first choice; of answers over the token's
            `norm`, times that of the asking token; or a `linear` map of the token, by least squares.
        decay: of what an estimate remembers, a step.
    """

    baseline: Literal["output", "none", "last", "estimate"] = "output"
    margin: float = 0.0
    contenders: int | None = None
    answers: Literal["full", "mean", "both"] = "full"
    rate: float = 1.0
    period: tuple[float, float] = (0.0, 1.0)
    last_margin: float | None = None
    deep_margin: float | None = None
    contested: float | None = None
    relative: bool = False
    estimate: Literal["mean", "last", "pair", "norm", "linear"] = "mean"
    decay: float = 0.9


@dataclass(frozen=True)
class Rule:
    """`router` is one of the package's, a control, or one of another paper; `title` is for people. `expert_start`: a
    dense layer's weights start as wide as those of one expert. `router_std`: of a router's start, in place of the
    package's. `even`: a fixed choice gives each expert as many tasks of facts."""

    name: str
    title: str
    router: str = "softmax"
    response: Response | None = None
    judge: Judge | None = None
    dense: Literal["", "active", "all"] = ""
    coupling_coef: float = 0.0
    expert_start: bool = False
    router_std: float | None = None
    even: bool = False

    @property
    def has_router(self) -> bool:
        return self.router not in Controls

    @property
    def shared(self) -> int:
        """Experts that are always on."""
        return ROUTER_CLASSES[self.router].num_shared if self.router in ROUTER_CLASSES else 0

    @property
    def balance_coef(self) -> float:
        if not self.has_router or self.router == "remoe":  # the latter balances inside its own regularisation
            return 0.0
        return (
            ROUTER_CLASSES[self.router].balance_coef if self.router in ROUTER_CLASSES else ROUTER_COEFS["balance_coef"]
        )

    @property
    def router_z_coef(self) -> float:
        if not self.has_router or self.router == "remoe":
            return 0.0
        default = ROUTER_COEFS["router_z_coef"]
        return ROUTER_CLASSES[self.router].router_z_coef if self.router in ROUTER_CLASSES else default


def _judged(name: str, title: str, **fields: object) -> Rule:
    return Rule(name, title, judge=Judge(**fields))  # type: ignore[arg-type]


_ALL = (
    Rule("softmax", "softmax"),
    Rule("published", "published: winners' outputs, 5% of steps", response=Response()),
    Rule("distil_only", "the same, output by the router", response=Response(output="router")),
    _judged("judge_all", "judged by the loss, baseline output, all asked"),
    _judged("judge_c80", "contested c .8, baseline output", margin=0.8),
    _judged("judge_mean", "running means for answers, baseline output", answers="mean"),
    Rule("random", "random", router="random"),
    Rule("dense_all", "dense, size of all experts", router="dense", dense="all"),
    Rule("dense_all_start", "the same, started as experts are", router="dense", dense="all", expert_start=True),
    Rule("fixed", "fixed by hash", router="fixed"),
    Rule("dense_active", "dense, size of the active experts", router="dense", dense="active"),
    _judged("judge_all_none", "judged, no baseline, all asked", baseline="none"),
    _judged("judge_c95", "contested c .95, baseline output", margin=0.95),
    _judged("judge_c50", "contested c .5, baseline output", margin=0.5),
    _judged("judge_c50_none", "contested c .5, no baseline", margin=0.5, baseline="none"),
    _judged("judge_next1", "next 1, baseline output", contenders=1),
    _judged("judge_next1_none", "next 1, no baseline", contenders=1, baseline="none"),
    _judged("judge_next2", "next 2, baseline output", contenders=2),
    _judged("judge_next2_none", "next 2, no baseline", contenders=2, baseline="none"),
    _judged("judge_mean_none", "running means, no baseline", answers="mean", baseline="none"),
    _judged("judge_both", "contested c .8 asked, means for the rest, baseline output", margin=0.8, answers="both"),
    _judged("judge_rate20", "all asked in 20% of steps, baseline output", rate=0.2),
    _judged("judge_rate5", "all asked in 5% of steps, baseline output", rate=0.05),
    Rule("always", "always competing, also at inference", response=Response(rate=1.0, warmup=0.0, always=True)),
    *(
        Rule(name, name) if name == "softmax" else Rule(name, name, router=name)
        for name in ROUTER_CLASSES
        if name not in ("softmax", "competition")
    ),
    Rule("coupled", "softmax with expert-router coupling (arXiv 2512.23447)", coupling_coef=1.0),
    Rule("default_moe", "Default MoE (arXiv 2504.12463)", router="default_moe"),
    Rule("remoe", "ReMoE (arXiv 2412.14711)", router="remoe"),
    Rule("sparsemixer", "SparseMixer-v2, GRIN (arXiv 2409.12136)", router="sparsemixer"),
)
# Tried to make the judge better. A margin of infinity asks nobody.
_EXPLORED = (
    _judged("mean_near", "running means where contested, c .5", answers="mean", margin=0.5),
    _judged("mean_pair", "means by the token's first choice", answers="mean", estimate="pair"),
    _judged("last_all", "all asked, baseline the last of the choice", baseline="last"),
    _judged("relative_c80", "c .8, over the probability of the choice", margin=0.8, relative=True),
    _judged("mean_fast", "running means, decay .5", answers="mean", decay=0.5),
    _judged("relative_all", "all asked, over the probability of the choice", relative=True),
    _judged("all_first_half", "all asked, in the first half of the steps", period=(0.0, 0.5)),
    _judged("margin_falls", "c from 1 to .5", margin=1.0, last_margin=0.5),
    _judged("mean_linear", "a linear map of the token for answers", answers="mean", estimate="linear"),
    _judged("mean_last", "means of the answers as last choice", answers="mean", estimate="last"),
    _judged("mean_baseline_last", "running means, baseline the last of the choice", answers="mean", baseline="last"),
    _judged("mean_baseline_mean", "running means, baseline those of the chosen", answers="mean", baseline="estimate"),
    _judged(
        "pair_baseline_pair",
        "means by first choice, baseline those of the chosen",
        answers="mean",
        estimate="pair",
        baseline="estimate",
    ),
    _judged("relative_mean", "running means, over the probability of the choice", answers="mean", relative=True),
    _judged("second_half", "c .8, in the second half of the steps", margin=0.8, period=(0.5, 1.0)),
    _judged("first_half", "c .8, in the first half of the steps", margin=0.8, period=(0.0, 0.5)),
    _judged("margin_rises", "c from .5 to 1", margin=0.5, last_margin=1.0),
    _judged("first_layer", "c .8 in the first layer, none behind", margin=0.8, deep_margin=math.inf),
    _judged("deep_layers", "c .8 behind the first layer, none in it", margin=math.inf, deep_margin=0.8),
    _judged("share_25", "margin that holds .25 contested experts a token", margin=0.8, contested=0.25),
    _judged("mean_slow", "running means, decay .98", answers="mean", decay=0.98),
    _judged("mean_norm", "means scaled by the token's norm", answers="mean", estimate="norm"),
    _judged("all_second_half", "all asked, in the second half of the steps", period=(0.5, 1.0)),
    _judged("both_pair", "c .8 asked, means by first choice for the rest", margin=0.8, answers="both", estimate="pair"),
    _judged("last_c80", "c .8, baseline the last of the choice", margin=0.8, baseline="last"),
)
EXPLORED = tuple(rule.name for rule in _EXPLORED)
FIXED_EVENLY = Rule("fixed_evenly", "fixed, as many tasks an expert", router="fixed", even=True)
RULES = {rule.name: rule for rule in (*_ALL, *_EXPLORED, FIXED_EVENLY)}
COMPETITION = COMPETITION_COEFS
