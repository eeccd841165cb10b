"""What is compared: every router of the package, competition in each of its forms, controls, and rules of other papers.

A rule says how a layer routes; all else (data, order, start, learning rate, steps) is the same in every run of a seed.
"""

from __future__ import annotations

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
    """A competition that the loss judges; the fields are the `competition_*` keys of the configuration.

    answers: the asked experts' own, their running `mean` without asking, or `both`: the mean where none is asked.
    """

    subtracts_output: bool = True
    margin: float = 0.0
    contenders: int | None = None
    answers: Literal["full", "mean", "both"] = "full"
    rate: float = 1.0


@dataclass(frozen=True)
class Rule:
    """`router` is one of the package's, a control, or one of another paper; `title` is for people."""

    name: str
    title: str
    router: str = "softmax"
    response: Response | None = None
    judge: Judge | None = None
    dense: Literal["", "active", "all"] = ""
    coupling_coef: float = 0.0

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
    Rule("fixed", "fixed by hash", router="fixed"),
    Rule("dense_active", "dense, size of the active experts", router="dense", dense="active"),
    _judged("judge_all_none", "judged, no baseline, all asked", subtracts_output=False),
    _judged("judge_c95", "contested c .95, baseline output", margin=0.95),
    _judged("judge_c50", "contested c .5, baseline output", margin=0.5),
    _judged("judge_c50_none", "contested c .5, no baseline", margin=0.5, subtracts_output=False),
    _judged("judge_next1", "next 1, baseline output", contenders=1),
    _judged("judge_next1_none", "next 1, no baseline", contenders=1, subtracts_output=False),
    _judged("judge_next2", "next 2, baseline output", contenders=2),
    _judged("judge_next2_none", "next 2, no baseline", contenders=2, subtracts_output=False),
    _judged("judge_mean_none", "running means, no baseline", answers="mean", subtracts_output=False),
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
RULES = {rule.name: rule for rule in _ALL}
COMPETITION = COMPETITION_COEFS
