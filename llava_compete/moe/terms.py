"""The loss terms and settings that each router of a mixture layer has, with the paper's values.

CompeteSMoE: arXiv 2505.13380, sections 3 and 4.
"""

from __future__ import annotations

from typing import Any

from llava_compete.moe.router_table import ROUTER_CLASSES

ROUTERS = tuple(ROUTER_CLASSES)

# The loss terms of every router, and those that only competition has, with the paper's coefficients; a router may have
# one of its own for the balance loss.
ROUTER_COEFS = {"balance_coef": 0.01, "router_z_coef": 0.001}
EXTRA_COEFS = tuple(key for router in ROUTER_CLASSES.values() for key in router.extra_coefs)
COMPETITION_COEFS = {
    "distillation_coef": 0.01,
    "winner_distillation_coef": 0.1,
    "diversity_coef": 0.01,
    "competition_balance_coef": 0.01,
}

# What only a competition by response has, and what one judged by the loss has instead, with its defaults.
RESPONSE_DEFAULTS: dict[str, Any] = {**COMPETITION_COEFS, "affinity": "softplus", "competition_output": "winners"}
RESPONSE_KEYS = (*RESPONSE_DEFAULTS, "competition_keeps")
JUDGED_DEFAULTS: dict[str, Any] = {
    "competition_baseline": "output",
    "competition_answers": "full",
    "competition_margin": 0.8,
    "competition_contenders": "all",
    "competition_rate": 1.0,
}

# What has no place where the router speaks in competition steps too, for no gradient reaches an expert from them.
WINNERS_KEYS = ("diversity_coef", "competition_balance_coef", "competition_keeps")
# What has no use where running means answer, so that no expert is asked.
ASKING_KEYS = ("competition_margin", "competition_contenders")
COMPETITION_MEMORY = ("competition_chunk_tokens", "competition_keeps")


def competition_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """The terms of a competition with their values where `data`, settings of a layer, do not say."""
    unused: tuple[str, ...]
    if data.get("competition_judge") == "loss":
        defaults, unused = JUDGED_DEFAULTS, ASKING_KEYS if data.get("competition_answers") == "mean" else ()
    else:
        defaults, unused = RESPONSE_DEFAULTS, WINNERS_KEYS if data.get("competition_output") == "router" else ()
    return {key: value for key, value in defaults.items() if key not in unused}


def still_used(stored: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A stored part's settings without what has no use for the judge, output or answers that `changes` names."""
    unused: set[str] = set()
    judged_before = stored.get("competition_judge", "response")
    if changes.get("competition_judge", judged_before) != judged_before:
        unused.update(JUDGED_DEFAULTS if judged_before == "loss" else RESPONSE_KEYS)
    if changes.get("competition_output") == "router":
        unused.update(WINNERS_KEYS)
    if changes.get("competition_answers") == "mean":
        unused.update(ASKING_KEYS)
    return {key: value for key, value in stored.items() if key not in unused}
