"""Typed configuration of a model's mixtures of experts: which parts have them, and the schedule that they share.

`MoeConfig` is the `moe:` section of a YAML and, as a plain dict, `config.moe` of a checkpoint.
"""

from __future__ import annotations

import logging
from typing import Any

from pydantic import Field, model_validator

from llava_compete.config import StrictConfig
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.router_table import ROUTER_CLASSES

log = logging.getLogger(__name__)


class MoeConfig(StrictConfig):
    """Where the model has MoE layers, and the schedule of competition that they share."""

    competition_rate: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description=(
            "probability that a layer competes in a step after warm-up; 0.05, for language pre-training 0.07 "
            "(CompeteSMoE); a part with competition_judge loss has its own"
        ),
    )
    competition_warmup_ratio: float = Field(
        default=0.05, ge=0, description="share of all steps at the start in which no layer competes"
    )
    max_competing_layers: int = Field(default=3, ge=1, description="layers that may compete in one step")
    vision: MoeLayerConfig | None = Field(default=None, description="mixtures in the tower")
    projector: MoeLayerConfig | None = Field(default=None, description="mixture in the projector")
    language: MoeLayerConfig | None = Field(default=None, description="mixtures in the language model")
    seed: int = Field(default=0, ge=0, description="of the schedule of competitions")
    expert_parallel: int = Field(
        default=1,
        ge=1,
        description=(
            "ranks over which each layer's experts are spread in training, to which tokens then travel; with zero1 or "
            "zero2, for parts that train in full or not at all"
        ),
    )

    @model_validator(mode="after")
    def _check_expert_parallel(self) -> MoeConfig:
        for name, part in self.parts().items():
            if ROUTER_CLASSES[part.router].factorises and self.expert_parallel > 1:
                raise ValueError(
                    f"expert_parallel: found {self.expert_parallel} beside router {part.router!r} in {name}, expected "
                    "1, for every rank's tokens need the first half of all experts"
                )
            if part.couples and self.expert_parallel > 1:
                raise ValueError(
                    f"expert_parallel: found {self.expert_parallel} beside {name}.coupling_coef, expected 1, for that "
                    "loss reads the weights of all experts of a layer"
                )
            if part.num_experts % self.expert_parallel:
                raise ValueError(
                    f"expert_parallel: found {self.expert_parallel}, expected a divisor of {name}.num_experts "
                    f"= {part.num_experts}"
                )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> MoeConfig:
        competes = any(part.holds_contests for part in self.parts().values())
        if self.competition_warmup_ratio > 1 or (competes and self.competition_warmup_ratio == 1):
            raise ValueError(
                f"competition_warmup_ratio: found {self.competition_warmup_ratio}, expected below 1, "
                "or competition would start after the end of training"
            )
        return self

    def parts(self) -> dict[str, MoeLayerConfig]:
        """The parts that have MoE layers, in forward order."""
        parts = {"vision": self.vision, "projector": self.projector, "language": self.language}
        return {name: part for name, part in parts.items() if part is not None}

    def of_model(self) -> dict[str, Any]:
        """What a checkpoint's config.json holds: nothing of how its experts were spread in training."""
        return self.model_dump(mode="json", exclude={"expert_parallel"})

    def warn_of_moved_starts(self) -> None:
        """Name the parts whose judgement is not 0 with equal experts: without a baseline it is <g, y> for each one,
        and a running mean is far from what any expert says of one token."""
        for name, part in self.parts().items():
            if part.competition_baseline == "none":
                log.warning(
                    "moe.%s: competition_baseline none moves the router of an upcycled start, whose experts still "
                    "agree; output leaves it",
                    name,
                )
            if part.competition_answers in ("mean", "both"):
                log.warning(
                    "moe.%s: competition_answers %s moves the router of an upcycled start, whose experts still agree: "
                    "there its gradient was 60 times the task's; full leaves it",
                    name,
                    part.competition_answers,
                )

    def name_the_other_judge(self) -> None:
        """One line where parts hold the published competition: that the loss may judge it, and what was measured."""
        published = [name for name, part in self.parts().items() if part.competition_output == "winners"]
        if published:
            log.info(
                "moe.%s: the published competition, judged by responses; sft_loss.yaml beside this recipe lets the "
                "loss judge (competition_judge: loss), and README.md has what was measured of both",
                ", moe.".join(published),
            )

    def warn_of_untaught_routers(self) -> None:
        """Name the parts whose router learns nothing from the task: one routed choice beside the shared expert.

        Its weight is normalised over the choices, so it is 1 whatever the router says (SharedE-V2 and V3 at K = 2).
        """
        for name, part in self.parts().items():
            if part.num_experts_per_tok - 1 == ROUTER_CLASSES[part.router].num_shared > 0:
                log.warning(
                    "moe.%s: router %s with num_experts_per_tok 2 routes one expert, of weight 1, beside its shared "
                    "one: the task gives this router no gradient; 3 would",
                    name,
                    part.router,
                )
