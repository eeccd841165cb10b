"""A slow, obvious mixture of experts, written from design.md with loops over tokens, sequences and experts.

Plain MLP experts, one sequence a row. Shares no code with the package. Used to check it, and to make golden vector
files of other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

AFFINITIES = {
    "softplus": lambda y: torch.log(1 + torch.exp(y)).mean(),
    "relu": lambda y: torch.where(y > 0, y, 0 * y).mean(),
    "silu": lambda y: (y / (1 + torch.exp(-y))).mean(),
    "sigmoid": lambda y: (1 / (1 + torch.exp(-y))).mean(),
    "l2": lambda y: (y * y).sum().sqrt(),
}


def largest(scores: list[float], count: int) -> list[int]:
    """Indices of the largest scores, best first, ties to the lowest index."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


def softmax(scores: Tensor) -> Tensor:
    exponentials = torch.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def route(router: str, tensors: dict[str, Tensor], x: Tensor, count: int) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """(logits, probabilities for the balance, choices, weights of the choices) of one token."""
    if router in ("xmoe", "perturbed_cosine"):
        z = tensors["router.inp_reduction.weight"] @ x
        embeddings = tensors["router.expert_embeddings"]
        norms = embeddings.norm(dim=1, keepdim=True)
        if router == "xmoe":
            logits = (embeddings * (1.5 / norms).detach()) @ (z / z.norm().clamp(min=1e-4))
        else:
            logits = (embeddings * (1.5 / (norms + 0.1)).detach()) @ (z / (z.norm() + 0.1))
        probs = softmax(logits / 0.3)
        choices = largest(probs.tolist(), count)
        return logits, probs, choices, softmax(probs[choices])
    if router == "autonomy":
        logits = torch.stack([torch.sqrt((low @ x).square().sum()) for low in tensors["router.low_proj"]])
    else:
        logits = tensors["router.weight"] @ x
    if "router.residual" in tensors:  # of the first layer
        logits = logits + tensors["router.residual"] @ torch.zeros_like(logits)
    probs = softmax(logits)
    scores = 1 / (1 + torch.exp(-logits)) if "sigmoid" in router else probs
    bias = tensors.get("router.bias", torch.zeros_like(scores))  # steers the choice, not the weights
    choices = largest((scores + bias).tolist(), count)
    return logits, probs, choices, scores[choices] / scores[choices].sum()


def route_ternary(tensors: dict[str, Tensor], x: Tensor, count: int) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """As `route`, of TC-MoE: choices among experts, the same subtracted, and slots that run nothing, with weights that
    are not signed. Read off the published TCMoEBlock, whose top-K takes the softmax of biased logits."""
    logits = tensors["router.weight"] @ x
    experts = (len(logits) - count) // 2
    biased = [float(n >= experts) + 9 * float(n >= 2 * experts) for n in range(len(logits))]
    gates = softmax(logits - torch.tensor(biased, dtype=x.dtype))
    choices = largest(gates.tolist(), count)
    whole = gates[2 * experts :].sum() + sum(gates[choice] for choice in choices if choice < 2 * experts)
    return logits, gates, choices, gates[choices] / whole


def without_arithmetic(tensors: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """What MoE++'s further slots answer: two constants mixed with the token, the token, nothing."""
    answers = []
    for constant, gate in zip(
        tensors["router.free_experts.constants"], tensors["router.free_experts.gates"], strict=True
    ):
        of_x, of_constant = softmax(gate @ x)
        answers.append(of_x * x + of_constant * constant)
    return [*answers, x, torch.zeros_like(x)]


def expert(tensors: dict[str, Tensor], index: int, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """One expert's output for one token."""
    before = tensors["router.low_proj"][index] @ x if "router.low_proj" in tensors else x
    hidden = activation(tensors["experts.up_proj"][index] @ before + tensors["experts.up_proj_bias"][index])
    return tensors["experts.down_proj"][index] @ hidden + tensors["experts.down_proj_bias"][index]


def forward(
    router: str, tensors: dict[str, Tensor], x_BND: Tensor, mask_BN: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output [B, N, O] and the loss terms; `settings`: K, activation, competing, affinity, all_choices."""
    activation, chosen_count = ACT2FN[settings["activation"]], settings["K"]
    experts = tensors["experts.down_proj"].shape[0]
    shared = router.startswith("shared")
    output, per_sequence = [], []
    for x_ND, mask_N in zip(x_BND, mask_BN, strict=True):
        rows = []
        terms: dict[str, list[Tensor]] = {
            "z": [],
            "distillation": [],
            "winner": [],
            "diversity": [],
            "P": [],
            "chosen": [],
            "null": [],
        }
        for x, counts in zip(x_ND, mask_N, strict=True):
            y = [expert(tensors, e, x, activation) for e in range(experts)]
            if "router.free_experts.constants" in tensors:
                y += without_arithmetic(tensors, x)
            how = route_ternary if router == "tc_moe" else partial(route, router)
            logits, probs, choices, weights = how(tensors, x, chosen_count - shared)
            counted, balance_probs = choices, probs
            if router == "tc_moe":
                signs = [1 if n < experts else -1 if n < 2 * experts else 0 for n in choices]
                weights = [sign * weight for sign, weight in zip(signs, weights, strict=True)]
                choices = [n % experts for n in choices]
                null = probs[2 * experts :].sum()
                balance_probs = (probs[:experts] + probs[experts : 2 * experts]) / (1 - null)
            if settings["competing"]:
                s = torch.stack([AFFINITIES[settings["affinity"]](y_e) for y_e in y])
                choices = counted = largest(s.tolist(), chosen_count)
                weights = s[choices] / s[choices].sum()
                balance_probs = softmax(s)
            row = sum(weight * y[choice] for weight, choice in zip(weights, choices, strict=True))
            rows.append(0.5 * row + 0.5 * y[-1] if shared else row)
            if not counts:
                continue
            terms["P"].append(balance_probs)
            chosen = torch.zeros_like(balance_probs)
            for choice in counted if settings["all_choices"] else counted[:1]:
                if router != "tc_moe" or choice < 2 * experts:  # else it runs nothing
                    chosen[choice % experts if router == "tc_moe" else choice] += 1
            terms["chosen"].append(chosen)
            if router == "tc_moe":
                terms["null"].append(-null)
            terms["z"].append(torch.logsumexp(logits, 0) ** 2)
            if settings["competing"]:
                gap = (probs - balance_probs.detach()) ** 2
                terms["distillation"].append(gap.mean())
                terms["winner"].append(gap[choices].mean())
                cells = [
                    y[i] @ y[j] / (y[i].norm() * y[j].norm()) if i != j else torch.zeros((), dtype=x.dtype)
                    for i in choices
                    for j in choices
                ]
                terms["diversity"].append(torch.stack(cells).mean())
        output.append(torch.stack(rows))
        if terms["P"]:
            means = {name: torch.stack(values).mean(0) for name, values in terms.items() if values}
            shares = means["chosen"] / means["chosen"].sum().clamp(min=1e-12)
            if router == "moe_plus_plus":
                shares = torch.cat([shares[:experts], 0.75 * shares[experts:]])
            means["balance"] = len(means["P"]) ** 2 * (means["P"] * shares).mean()
            per_sequence.append(means)
    names = {"balance_loss": "balance"}
    if settings["competing"]:
        names |= {
            "distillation_loss": "distillation",
            "winner_distillation_loss": "winner",
            "diversity_loss": "diversity",
        }
    else:
        names["router_z_loss"] = "z"
        if router == "tc_moe":
            names["null_reward_loss"] = "null"
    losses = {ours: sum(means[theirs] for means in per_sequence) / len(per_sequence) for ours, theirs in names.items()}
    return torch.stack(output), losses


def random_tensors(router: str, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Float32 weights, input and probe of a golden vector file."""
    generator = torch.Generator().manual_seed(seed)
    B, N, D, I, O, E = (sizes[name] for name in "BNDIOE")
    shapes = {
        "x": (B, N, D),
        "probe": (B, N, O),
        "experts.up_proj": (E, I, D),
        "experts.up_proj_bias": (E, I),
        "experts.down_proj": (E, O, I),
        "experts.down_proj_bias": (E, O),
    }
    if router in ("xmoe", "perturbed_cosine"):
        shapes |= {"router.inp_reduction.weight": (E // 2, D), "router.expert_embeddings": (E, E // 2)}
    else:
        shapes["router.weight"] = (E - router.startswith("shared"), D)
    if router == "autonomy":
        del shapes["router.weight"]
        rank = sizes["D"] // 2
        shapes |= {"router.low_proj": (E, rank, D), "experts.up_proj": (E, I, rank)}
    if router == "tc_moe":
        shapes["router.weight"] = (2 * E + sizes["K"], D)
    if router == "moe_plus_plus":
        R = E + 4 if O == D else E
        shapes |= {"router.weight": (R, D), "router.residual": (R, R)}
        if O == D:
            shapes |= {"router.free_experts.constants": (2, D), "router.free_experts.gates": (2, 2, D)}
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if "proj" in name else 1)
        for name, shape in shapes.items()
    }
