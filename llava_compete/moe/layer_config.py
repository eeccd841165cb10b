"""Typed configuration of one part's mixture layers, with the paper's defaults.

Everything that can be refused without a model is refused here, naming the key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PositiveInt, field_validator, model_validator

from llava_compete.config import StrictConfig
from llava_compete.errors import did_you_mean
from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.terms import (
    ASKING_KEYS,
    COMPETITION_COEFS,
    COMPETITION_MEMORY,
    EXTRA_COEFS,
    JUDGED_DEFAULTS,
    RESPONSE_KEYS,
    ROUTER_COEFS,
    ROUTERS,
    WINNERS_KEYS,
    competition_defaults,
)

AffinityName = Literal["softplus", "relu", "silu", "sigmoid", "l2"]
# The first four are ours, the others transformers' (`transformers.integrations.moe`).
ExpertsImplementation = Literal["auto", "eager", "grouped_mm", "dense", "batched_mm", "sonicmoe", "deepgemm"]
KeptActivations = Literal["everything", "pre_activations", "input"]
# Kernels of the chosen experts that are ours, from which the means are taken.
OWN_KERNELS = ("auto", "eager", "grouped_mm", "dense")


class EveryNth(StrictConfig):
    """Layers `offset`, `offset + every`, `offset + 2 every`, ..."""

    every: int = Field(ge=1, description="distance of the chosen layers")
    offset: int = Field(default=0, ge=0, description="the first chosen layer")


class MoeLayerConfig(StrictConfig):
    """One part's MoE layers. A coefficient left out takes the paper's value; its router must have a term for it."""

    num_experts: int = Field(default=4, ge=1, description="experts E of a layer")
    num_experts_per_tok: int = Field(
        default=2, ge=1, description="experts K chosen for a token; a shared expert counts"
    )
    router: str = Field(default="competition", description=f"how a token's K experts are chosen: {', '.join(ROUTERS)}")
    layers: Literal["all"] | EveryNth | list[int] = Field(
        default="all", description="which blocks become mixtures: all, numbers from 0, or {every, offset}"
    )
    affinity: AffinityName | None = Field(
        default=None,
        description=(
            "competition: neural response that wins it: mean of this function over the outputs, or their norm; "
            "default softplus (CompeteSMoE, arXiv 2505.13380, section 3.1)"
        ),
    )
    balance_over: Literal["first_choice", "all_choices"] = Field(
        default="first_choice",
        description="choices that the balance loss counts: the first (the paper's) or all K (Switch)",
    )
    balance_coef: float | None = Field(
        default=None,
        description="of a router step's balance loss; default 0.01 (the paper's), 0 for bias_balanced",
    )
    router_z_coef: float | None = Field(
        default=None,
        description="of the mean square of the router's logsumexp; default 0.001 (the paper's), 0 for autonomy",
    )
    coupling_coef: float | None = Field(
        default=None,
        description=(
            "of the expert-router coupling loss (arXiv 2512.23447, which has it at 1), with any router that has rows; "
            "default none"
        ),
    )
    coupling_alpha: float | None = Field(
        default=None,
        ge=0,
        description="how strong an answer may be beside an expert's own before the coupling loss counts it; default 1",
    )
    null_reward_coef: float | None = Field(
        default=None,
        description="tc_moe: of the reward for choices that run no expert, their probability; default 1e-5 (LibMoE's)",
    )
    autonomy_rank: int | None = Field(
        default=None,
        ge=1,
        description=(
            "autonomy: rank of the experts' first projection, whose lower half every expert computes; default the full "
            "rank, with which an upcycled model answers as its parent (the paper's best is a third of the width)"
        ),
    )
    distillation_coef: float | None = Field(
        default=None,
        description="competition: of the router's distillation to the competition's probabilities; default 0.01",
    )
    winner_distillation_coef: float | None = Field(
        default=None,
        description=(
            "competition: the paper's theta, the weight inside the distillation of its term at the winners; default 0.1"
        ),
    )
    diversity_coef: float | None = Field(
        default=None, description="competition: of the cosine between winners' outputs; default 0.01"
    )
    competition_balance_coef: float | None = Field(
        default=None, description="competition: of the balance loss of a competition step; default 0.01"
    )
    competition_output: Literal["winners", "router"] | None = Field(
        default=None,
        description=(
            "competition: whose outputs a competition step takes: the winners' (default, the paper's), or still those "
            "of the router's choice, so that a competition only teaches the router and no expert"
        ),
    )
    competition_judge: Literal["response", "loss"] = Field(
        default="response",
        description=(
            "competition: what says which expert should have been chosen: the experts' responses (the paper's "
            "affinity, in competition steps), or the loss: the router then also learns by how much the loss would "
            "change, to first order, had an expert that it did not choose spoken; the forward is the router's"
        ),
    )
    competition_baseline: Literal["output", "none"] | None = Field(
        default=None,
        description=(
            "competition_judge loss: what an expert's answer is compared with, the block's output (default) or "
            "nothing, which moves an upcycled start, where all experts still agree"
        ),
    )
    competition_answers: Literal["full", "mean", "both"] | None = Field(
        default=None,
        description=(
            "competition_judge loss: what an expert answers that was not chosen: what it would have said (full, "
            "default); the running mean of what it said where it was chosen (mean), for hardly any arithmetic; or "
            "both: contested experts are asked, for the others their means answer. Means move an upcycled start, where "
            "all experts still agree"
        ),
    )
    competition_margin: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=(
            "competition_judge loss: asks experts whose probability is at least this share of the last chosen one's; "
            "default 0.8, 0 for every expert"
        ),
    )
    competition_contenders: Literal["all"] | PositiveInt | None = Field(
        default=None,
        description="competition_judge loss: asks at most so many experts, the likeliest not chosen; default all",
    )
    competition_rate: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=(
            "competition_judge loss: probability that a layer asks in a step, without warm-up and without "
            "max_competing_layers; default 1"
        ),
    )
    experts_implementation: ExpertsImplementation = Field(
        default="auto",
        description="kernel of the chosen experts; auto takes what is fastest on the device and for the widths",
    )
    competition_chunk_tokens: int | None = Field(
        default=None,
        ge=1,
        description="competition: tokens at a time that are computed again in backward, to save memory",
    )
    competition_keeps: KeptActivations | None = Field(
        default=None,
        description=(
            "competition: what is kept for backward: everything, the pre-activations (one product of six is "
            "done again), or the input alone (a third more arithmetic); default everything, or input with "
            "competition_chunk_tokens"
        ),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _resolve_coefs(cls, data: Any, handler: ModelWrapValidatorHandler[MoeLayerConfig]) -> MoeLayerConfig:
        """Fill in the paper's value of each term that this router has, so that the saved config shows it.

        Filled-in values do not count as set: laid over a checkpoint's settings, they must not replace them.
        """
        if not isinstance(data, dict):
            return handler(data)
        router = data.get("router", "competition")
        defaults = ROUTER_COEFS | (competition_defaults(data) if router == "competition" else {})
        if router in ROUTER_CLASSES:
            defaults |= {key: getattr(ROUTER_CLASSES[router], key) for key in ROUTER_COEFS}
            defaults |= ROUTER_CLASSES[router].extra_coefs
            if router != "competition" and data.get("affinity") == "softplus":
                # Checkpoints of earlier versions hold it for every router.
                data = {key: value for key, value in data.items() if key != "affinity"}
        if data.get("coupling_coef") is not None:
            defaults |= {"coupling_alpha": 1.0}
        config = handler({**data, **{key: value for key, value in defaults.items() if data.get(key) is None}})
        config.model_fields_set.intersection_update(data)
        return config

    @field_validator("router")
    @classmethod
    def _check_router(cls, value: str) -> str:
        if value not in ROUTERS:
            raise ValueError(f"found {value!r}, expected one of {', '.join(ROUTERS)}{did_you_mean(value, ROUTERS)}")
        return value

    @field_validator(*ROUTER_COEFS, *EXTRA_COEFS, *COMPETITION_COEFS, "coupling_coef")
    @classmethod
    def _check_coef(cls, value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected a finite coefficient >= 0, found {value}")
        return value

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | EveryNth | list[int]) -> str | EveryNth | list[int]:
        if isinstance(value, list) and (not value or min(value) < 0 or len(set(value)) != len(value)):
            raise ValueError(f"expected distinct layer numbers >= 0, at least one; found {value}")
        return value

    @model_validator(mode="after")
    def _check(self) -> MoeLayerConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: found {self.num_experts_per_tok}, "
                f"expected at most num_experts = {self.num_experts}"
            )
        if ROUTER_CLASSES[self.router].even_experts and self.num_experts % 2:
            raise ValueError(
                f"num_experts: found {self.num_experts}, expected an even number, "
                f"for router {self.router!r} reduces tokens to num_experts / 2 dimensions"
            )
        if self.num_experts_per_tok <= ROUTER_CLASSES[self.router].num_shared:
            raise ValueError(
                f"num_experts_per_tok: found {self.num_experts_per_tok}, expected at least 2, "
                f"for router {self.router!r} always uses its shared expert"
            )
        if self.router != "competition":
            keys = dict.fromkeys((*RESPONSE_KEYS, *COMPETITION_MEMORY, *JUDGED_DEFAULTS))
            unused = [key for key in keys if getattr(self, key) is not None]
            unused += ["competition_judge"] if self.competition_judge != "response" else []
            if unused:
                raise ValueError(f"{unused[0]}: router {self.router!r} has no such term, only 'competition' has")
        self._check_coupling()
        for key in EXTRA_COEFS:
            if key not in ROUTER_CLASSES[self.router].extra_coefs and getattr(self, key) is not None:
                owners = [name for name, router in ROUTER_CLASSES.items() if key in router.extra_coefs]
                raise ValueError(f"{key}: router {self.router!r} has no such term, only {', '.join(owners)} has")
        self._check_judge()
        self._check_factorised()
        if self.competition_keeps == "everything" and self.competition_chunk_tokens is not None:
            raise ValueError(
                "competition_keeps: found 'everything' beside competition_chunk_tokens, expected 'pre_activations' or "
                "'input', since chunks are for what is computed again"
            )
        return self

    def _check_coupling(self) -> None:
        if self.coupling_coef is None:
            if self.coupling_alpha is not None:
                raise ValueError(f"coupling_alpha: found {self.coupling_alpha} without coupling_coef, which it is of")
        elif not ROUTER_CLASSES[self.router].has_rows:
            raise ValueError(f"coupling_coef: found with router {self.router!r}, which has no rows to couple")
        elif self.num_experts - ROUTER_CLASSES[self.router].num_shared < 2:
            raise ValueError("coupling_coef: found with one routed expert, expected two or more to tell apart")

    def _check_factorised(self) -> None:
        if not ROUTER_CLASSES[self.router].factorises:
            if self.autonomy_rank is not None:
                raise ValueError(f"autonomy_rank: router {self.router!r} has no such rank, only autonomy has")
        elif self.experts_implementation not in OWN_KERNELS:
            raise ValueError(
                f"experts_implementation: found {self.experts_implementation!r}, expected one of "
                f"{', '.join(OWN_KERNELS)}, for the experts of {self.router!r} go on from what chose them"
            )

    def _check_judge(self) -> None:
        judged = self.competition_judge == "loss"
        self._refuse(RESPONSE_KEYS if judged else JUDGED_DEFAULTS, "competition_judge")
        if self.competition_output == "router":
            self._refuse(WINNERS_KEYS, "competition_output")
        if self.competition_answers == "mean":
            self._refuse(ASKING_KEYS, "competition_answers")
        if self.competition_answers in ("mean", "both") and self.experts_implementation not in OWN_KERNELS:
            raise ValueError(
                f"experts_implementation: found {self.experts_implementation!r}, expected one of "
                f"{', '.join(OWN_KERNELS)}, for competition_answers {self.competition_answers!r} reads what experts say"
            )
        others = self.num_experts - self.num_experts_per_tok
        if judged and others == 0:
            raise ValueError(
                f"competition_judge: found 'loss' with num_experts_per_tok = num_experts = {self.num_experts}, "
                "expected an expert that is not chosen, whom the loss can judge"
            )
        if isinstance(self.competition_contenders, int) and self.competition_contenders > others:
            raise ValueError(
                f"competition_contenders: found {self.competition_contenders}, expected at most the {others} experts "
                "that are not chosen"
            )

    def _refuse(self, keys: Iterable[str], because: str) -> None:
        """Raise for a key of `keys` that is set, though the value of `because` leaves it nothing to do."""
        for key in keys:
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key}: found {getattr(self, key)!r}, expected none, "
                    f"for {because} {getattr(self, because)!r} has no such term"
                )

    @property
    def holds_contests(self) -> bool:
        """Whether all experts run in competition steps and their responses win: not where the loss judges."""
        return self.router == "competition" and self.competition_judge == "response"

    @property
    def couples(self) -> bool:
        """Whether it has the coupling loss."""
        return bool(self.coupling_coef)

    @property
    def competition_kept(self) -> KeptActivations:
        """`competition_keeps`, or its default."""
        return self.competition_keeps or ("everything" if self.competition_chunk_tokens is None else "input")

    def select_layers(self, num_layers: int) -> list[int]:
        """Numbers of the layers to replace, of `num_layers`; `ValueError` if one does not exist or none is chosen."""
        if isinstance(self.layers, list):
            if max(self.layers) >= num_layers:
                raise ValueError(f"layers: found {max(self.layers)}, expected numbers below {num_layers}")
            return sorted(self.layers)
        if self.layers == "all":
            return list(range(num_layers))
        chosen = list(range(self.layers.offset, num_layers, self.layers.every))
        if not chosen:
            raise ValueError(f"layers.offset: found {self.layers.offset}, expected below {num_layers}")
        return chosen

    def loss_coefs(self, competing: bool) -> dict[str, float]:
        """Loss term -> the factor it enters the auxiliary loss with, on a competition step or on a router step."""
        of_router = {"balance_loss": _set(self.balance_coef), "router_z_loss": _set(self.router_z_coef)}
        coupled = {"coupling_loss": _set(self.coupling_coef)} if self.couples else {}
        if not competing:
            extra = {key: _set(getattr(self, key)) for key in ROUTER_CLASSES[self.router].extra_coefs}
            return of_router | coupled | {f"{key.removesuffix('_coef')}_loss": coef for key, coef in extra.items()}
        distillation = _set(self.distillation_coef)
        taught = {
            "distillation_loss": distillation,
            "winner_distillation_loss": distillation * _set(self.winner_distillation_coef),
        }
        if self.competition_output == "router":
            return taught | of_router | coupled
        return (
            taught
            | coupled
            | {
                "diversity_loss": _set(self.diversity_coef),
                "balance_loss": _set(self.competition_balance_coef),
            }
        )


def _set(coef: float | None) -> float:
    """A coefficient that validation has filled in."""
    assert coef is not None
    return coef
