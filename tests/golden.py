"""Compare the project's MoE block with golden vectors: `python tests/golden.py DIR`.

Each *.safetensors file (format: README.md beside the vectors) becomes a `SparseMoeBlock`; every number of the file is
compared, and one row a file shows the largest relative error (norm of the difference over norm) of the output, the
auxiliary loss, its terms, the gradients and the routing tensors. Exit status 1 if an error exceeds its limit, a tensor
is not understood or a file cannot be read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.competition import CompetitionResult, winning_weights
from llava_compete.moe.config import COMPETITION_COEFS, MoeLayerConfig
from llava_compete.moe.state import RoutingState, TokenGroups

LIMIT = 1e-5
# With a shared expert and K = 2 the router's gradient is rounding noise of the reference beside the auxiliary loss'.
SHARED_ROUTER_LIMIT = 2e-3
ROUTERS = {
    "smoe": "softmax",
    "smoe_sigmoidgating": "sigmoid",
    "xmoe": "xmoe",
    "smoe_perturbed": "perturbed_cosine",
    "smoe_share": "shared_softmax",
    "smoe_sharev3": "shared_sigmoid",
    "competesmoe": "competition",
}
COEFS = {
    "balance_coef": "balance_loss_coef",
    "router_z_coef": "router_z_loss_coef",
    "distillation_coef": "router_loss_coef",
    "winner_distillation_coef": "router_theta",
    "diversity_coef": "diversity_loss_coef",
    "competition_balance_coef": "bal_comp_loss_coef",
}
# Parameter of our router -> its name in the files.
ROUTER_NAMES = {
    "weight": "weight",
    "inp_reduction": "inp_reduction.weight",
    "expert_embeddings": "expert_embeddings",
}
COLUMNS = ("output", "aux_loss", "loss", "grad", "routing")


def layer_config(meta: dict[str, Any]) -> MoeLayerConfig:
    """The router and coefficients that the file was computed with."""
    router = ROUTERS[meta["reference"]]
    coefs = {ours: meta["coefs"][theirs] for ours, theirs in COEFS.items()}
    if not meta["coefs"]["hybrid"]:
        coefs["winner_distillation_coef"] = 0.0
    if router != "competition":
        coefs = {key: value for key, value in coefs.items() if key not in COMPETITION_COEFS}
    return MoeLayerConfig.model_validate(
        {"num_experts": meta["E"], "num_experts_per_tok": meta["K"], "router": router, **coefs}
    )


def build_block(meta: dict[str, Any], tensors: dict[str, Tensor]) -> SparseMoeBlock:
    """Our block with the file's weights, in the mode the file was computed in."""
    state = RoutingState()
    gated = "experts.gate_up_proj" in tensors
    block = SparseMoeBlock(
        layer_config(meta),
        name="language.0",
        state=state,
        hidden_size=meta["D"],
        intermediate_size=meta["I"],
        output_size=meta["O"],
        activation=meta["activation"],
        gated=gated,
        bias="experts.down_proj_bias" in tensors,
    )
    with torch.no_grad():
        for name, parameter in block.experts.named_parameters():
            parameter.copy_(tensors[f"experts.{name}"])
        for name, parameter in block.router.named_parameters():
            parameter.copy_(tensors[f"router.{ROUTER_NAMES[name]}"])
    if meta["competition"]:
        state.competing, state.competition_enabled = frozenset({block.name}), True
    return block


def compute(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that the file may hold, from our block, under the file's names."""
    block = build_block(meta, tensors)
    x = tensors["x"].clone().requires_grad_()
    block.state.begin("language", TokenGroups.from_mask(torch.ones(x.shape[:2])))
    with block.state.recording():
        output = block(x)
    record = block.state.records[block.name]
    ((output * tensors["probe"]).sum() + record.aux_loss).backward()

    ours = {"output": output, "aux_loss": record.aux_loss, "grad.x": x.grad}
    terms = dict(record.losses)
    if "distillation_loss" in terms:
        winner_coef = block.config.winner_distillation_coef
        terms["routerloss"] = terms.pop("distillation_loss") + winner_coef * terms.pop("winner_distillation_loss")
    ours |= {f"loss.{name}": value for name, value in terms.items()}
    ours |= {f"grad.experts.{name}": parameter.grad for name, parameter in block.experts.named_parameters()}
    for name, parameter in block.router.named_parameters():
        ours[f"grad.router.{ROUTER_NAMES[name]}"] = parameter.grad
    if "expert_embeddings" in dict(block.router.named_parameters()):
        # The files' gradient is with respect to the rows as rescaled in place.
        embeddings = block.router.expert_embeddings.detach()
        ours["grad.router.expert_embeddings"] = block.router.expert_embeddings.grad / block.router.row_scale(embeddings)
    if block.config.router == "competition":
        ours |= both_policies(block, tensors["x"])
    return ours


@torch.no_grad()
def both_policies(block: SparseMoeBlock, x: Tensor) -> dict[str, Tensor]:
    """What the router and the competition each choose on the same input."""
    x_TD = x.flatten(0, 1)
    routing = block.router(x_TD)
    contest: CompetitionResult = block.experts(x_TD)
    policies = {
        "router.logits": routing.logits_TR,
        "router.indices_topk": routing.selected_experts_TK,
        "router.weights_topk": routing.routing_weights_TK,
        "competition.affinity": contest.affinity_TE,
        "competition.indices": contest.winners_TK,
        "competition.weights": winning_weights(contest.affinity_TE, contest.winners_TK),
    }
    return {name: value.unflatten(0, x.shape[:2]) for name, value in policies.items()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over norm, in float64; infinite for another shape or a NaN."""
    if ours.numel() != theirs.numel():
        return float("inf")
    ours, theirs = ours.detach().double().reshape(-1), theirs.double().reshape(-1)
    difference, norm = (ours - theirs).norm(), theirs.norm()
    error = float(difference / norm) if norm > 0 else float(difference)
    return error if error == error else float("inf")


def check_file(path: Path) -> tuple[dict[str, float], list[str]]:
    """Largest error of each column, and a line for each tensor that is out of its limit."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    ours = compute(meta, tensors)
    inputs = {"x", "probe"} | {name for name in tensors if name.startswith("experts.")}
    inputs |= {f"router.{name}" for name in ROUTER_NAMES.values()}
    errors, failures = dict.fromkeys(COLUMNS, 0.0), []
    for name, theirs in tensors.items():
        if name in inputs:
            continue
        error = relative_error(ours[name], theirs) if name in ours else float("inf")
        column = name if name in COLUMNS else name.split(".")[0]
        column = column if column in COLUMNS else "routing"
        errors[column] = max(errors[column], error)
        noisy = name.startswith("grad.router.") and meta["reference"] in ("smoe_share", "smoe_sharev3")
        limit = SHARED_ROUTER_LIMIT if noisy and meta["K"] == 2 else LIMIT
        if not error <= limit:
            failures.append(f"{path.name}: {name}: relative error {error:.2e} exceeds {limit:.0e}")
    return errors, failures


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/golden.py DIR", file=sys.stderr)
        return 2
    files = sorted(Path(arguments[0]).glob("*.safetensors"))
    failures = [] if files else [f"{arguments[0]}: no *.safetensors file"]
    print(f"{'file':<52}" + "".join(f"{column:>11}" for column in COLUMNS))
    for path in files:
        try:
            errors, failed = check_file(path)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with a file, the others are still compared)
            errors, failed = {}, [f"{path.name}: cannot be handled: {type(error).__name__}: {error}"]
        failures += failed
        print(f"{path.name:<52}" + "".join(f"{errors.get(column, float('nan')):>11.1e}" for column in COLUMNS))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
