"""Compare the project's MoE block with golden vectors: `python tests/golden.py DIR`.

Each *.safetensors file (format: README.md beside the vectors) becomes a `SparseMoeBlock`; every number of the file is
compared, and one row a file shows the largest relative error (norm of the difference over norm) of the output, the
auxiliary loss, its terms, the gradients and the routing tensors, and which tensor has the largest of all. Exit status 1
if an error exceeds its limit, a tensor is missing or not understood, or a file cannot be read.
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
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.moe.terms import COMPETITION_COEFS, ROUTER_COEFS

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
    "tcmoe": "tc_moe",
    "moeplusplus": "moe_plus_plus",
    "aoe": "autonomy",
    "competesmoe": "competition",
}
COEFS = {
    "balance_coef": "balance_loss_coef",
    "router_z_coef": "router_z_loss_coef",
    "distillation_coef": "router_loss_coef",
    "winner_distillation_coef": "router_theta",
    "diversity_coef": "diversity_loss_coef",
    "competition_balance_coef": "bal_comp_loss_coef",
    "null_reward_coef": "reward_factor",
}
# Parameter of our router -> its name in the files.
ROUTER_NAMES = {
    "weight": "weight",
    "inp_reduction": "inp_reduction.weight",
    "expert_embeddings": "expert_embeddings",
    "low_proj": "low_proj",
    "residual": "residual",
    "free_experts.constants": "free_experts.constants",
    "free_experts.gates": "free_experts.gates",
}
COLUMNS = ("output", "aux_loss", "loss", "grad", "routing")


def layer_config(meta: dict[str, Any], rank: int | None = None) -> MoeLayerConfig:
    """The router, its rank where it has one, and the coefficients that the file was computed with."""
    router = ROUTERS[meta["reference"]]
    terms = {*ROUTER_COEFS, *ROUTER_CLASSES[router].extra_coefs}
    terms |= COMPETITION_COEFS.keys() if router == "competition" else set()
    coefs = {term: meta["coefs"][COEFS[term]] for term in terms}
    if router == "competition" and not meta["coefs"]["hybrid"]:
        coefs["winner_distillation_coef"] = 0.0
    return MoeLayerConfig.model_validate(
        {"num_experts": meta["E"], "num_experts_per_tok": meta["K"], "router": router, "autonomy_rank": rank, **coefs}
    )


def build_block(meta: dict[str, Any], tensors: dict[str, Tensor]) -> SparseMoeBlock:
    """Our block with the file's weights, in the mode the file was computed in."""
    state = RoutingState()
    gated = "experts.gate_up_proj" in tensors
    rank = tensors["router.low_proj"].shape[1] if "router.low_proj" in tensors else None
    block = SparseMoeBlock(
        layer_config(meta, rank),
        name="language.0",
        state=state,
        hidden_size=meta["D"],
        intermediate_size=meta["I"],
        output_size=meta["O"],
        activation=meta["activation"],
        gated=gated,
        bias="experts.down_proj_bias" in tensors,
    )
    ours = {theirs: name for name, theirs in ROUTER_NAMES.items()}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("experts.")}
    weights |= {f"router.{ours[name]}": tensors[f"router.{name}"] for name in ours if f"router.{name}" in tensors}
    block.load_state_dict(weights)
    if meta["competition"]:
        state.competing, state.competition_enabled = frozenset({block.name}), True
    return block


def compute(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that the file must hold beside its inputs, from our block, under the file's names."""
    sizes = {"x": [meta["B"], meta["N"], meta["D"]], "probe": [meta["B"], meta["N"], meta["O"]]}
    for name, size in sizes.items():
        if list(tensors[name].shape) != size:
            raise ValueError(f"{name}: found shape {list(tensors[name].shape)}, expected {size}")
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
    contest = block.experts(x_TD).contest
    policies = {
        "router.logits": routing.logits_TR,
        "router.indices_topk": routing.selected_experts_TK,
        "router.weights_topk": routing.routing_weights_TK,
        "competition.affinity": contest.affinity_TE,
        "competition.indices": contest.winners_TK,
        "competition.weights": contest.weights_TK,
    }
    return {name: value.unflatten(0, x.shape[:2]) for name, value in policies.items()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over norm, in float64; infinite for another shape or a NaN."""
    ours, theirs = ours.detach().double(), theirs.double()
    ours = ours.reshape(ours.shape or (1,))  # the files hold scalars as [1]
    if ours.shape != theirs.shape:
        return float("inf")
    difference, norm = (ours - theirs).norm(), theirs.norm()
    error = float(difference / norm) if norm > 0 else float(difference)
    return error if error == error else float("inf")


def check_file(path: Path) -> tuple[dict[str, float], list[str]]:
    """Error of each tensor, and a line for each that is out of its limit."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "meta" not in metadata:
            raise ValueError("no metadata key 'meta'")
        meta = json.loads(metadata["meta"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    ours = compute(meta, tensors)
    inputs = {"x", "probe"} | {name for name in tensors if name.startswith("experts.")}
    inputs |= {f"router.{name}" for name in ROUTER_NAMES.values()}
    missing = {name for name in ours if name.split(".")[0] in COLUMNS} - tensors.keys()
    unknown = tensors.keys() - inputs - ours.keys()
    if missing or unknown:
        raise ValueError(f"tensors missing: {sorted(missing)}, not understood: {sorted(unknown)}")
    errors, failures = {}, []
    for name in sorted(tensors.keys() - inputs):
        errors[name] = error = relative_error(ours[name], tensors[name])
        noisy = name.startswith("grad.router.") and meta["reference"] in ("smoe_share", "smoe_sharev3")
        limit = SHARED_ROUTER_LIMIT if noisy and meta["K"] == 2 else LIMIT
        if not error <= limit:
            failures.append(f"{path.name}: {name}: relative error {error:.2e} exceeds {limit:.0e}")
    return errors, failures


def row(name: str, errors: dict[str, float]) -> str:
    """One line of the table; a column that the file has nothing for is empty."""
    cells = dict.fromkeys(COLUMNS, "")
    for tensor in sorted(errors, key=errors.__getitem__):  # the largest comes last, and stays
        group = tensor.split(".")[0]
        cells[group if group in cells else "routing"] = f"{errors[tensor]:.1e}"
    worst = max(errors, key=errors.__getitem__, default="")
    return f"{name:<52}" + "".join(f"{cell:>10}" for cell in cells.values()) + f"  {worst}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/golden.py DIR", file=sys.stderr)
        return 2
    files = sorted(Path(arguments[0]).glob("*.safetensors"))
    failures = [] if files else [f"{arguments[0]}: no *.safetensors file"]
    print(f"{'file':<52}" + "".join(f"{column:>10}" for column in COLUMNS) + "  largest error")
    for path in files:
        try:
            errors, failed = check_file(path)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with a file, the others are still compared)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            errors, failed = {}, [f"{path.name}: cannot be handled: {reason}"]
        failures += failed
        print(row(path.name, errors))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
