"""Golden vectors: the published ones pass, one changed number fails, and files of other sizes are handled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from safetensors.torch import safe_open, save_file
from slow_moe import forward, random_tensors

VECTORS = Path(__file__).parents[1] / "data" / "golden"
FILES = sorted(path.name for path in VECTORS.glob("*.safetensors"))
COEFS = {
    "balance_loss_coef": 0.02,
    "router_z_loss_coef": 0.003,
    "router_loss_coef": 0.04,
    "diversity_loss_coef": 0.05,
    "bal_comp_loss_coef": 0.06,
    "hybrid": True,
    "router_theta": 0.2,
    "reward_factor": 0.5,
}


def test_published_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(FILES) == 9
    assert golden.main([str(VECTORS)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == FILES


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", ["competesmoe_competition-0.safetensors", "xmoe-0.safetensors"])
def test_one_changed_number_fails(name: str, tmp_path: Path) -> None:
    metadata, tensors = read(VECTORS / name)
    for key in tensors:
        changed = {other: tensor.clone() for other, tensor in tensors.items()}
        numbers = changed[key].view(-1)
        numbers[-1] += 1 if key.endswith(("indices", "indices_topk")) else 0.01 * float(numbers.abs().max())
        save_file(changed, tmp_path / name, metadata)
        assert golden.main([str(tmp_path)]) == 1, f"{key}: a changed number was not noticed"


def test_empty_and_broken_directories_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(tmp_path)]) == 1, "an empty directory compares nothing"
    shutil.copy(VECTORS / FILES[0], tmp_path)
    (tmp_path / "broken.safetensors").write_bytes((VECTORS / FILES[0]).read_bytes()[:-1])
    save_file({"x": torch.ones(1)}, tmp_path / "bare.safetensors")
    assert golden.main([str(tmp_path)]) == 1
    named = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert named[1:] == ["bare.safetensors", "broken.safetensors"]


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda meta, tensors: tensors.pop(name)


@pytest.mark.parametrize(
    "damage",
    [
        *(drop(name) for name in ("x", "output", "loss.routerloss", "grad.router.weight", "experts.up_proj_bias")),
        lambda meta, tensors: tensors.update({"loss.other": torch.ones(1)}),
        lambda meta, tensors: tensors.update({"experts.other": torch.ones(1)}),
        lambda meta, tensors: tensors.update(output=tensors["output"].flatten(0, 1)),
        lambda meta, tensors: tensors.update({"experts.down_proj_bias": tensors["experts.down_proj_bias"][:1]}),
        lambda meta, tensors: meta.update(reference="smoe2"),
        lambda meta, tensors: meta.update(N=13),
        lambda meta, tensors: meta.update(K=1),
        lambda meta, tensors: meta.update(competition=False),
        lambda meta, tensors: meta["coefs"].update(hybrid=False),
        lambda meta, tensors: meta["coefs"].pop("router_theta"),
    ],
)
def test_a_file_that_is_not_what_it_says_fails(damage: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    metadata, tensors = read(VECTORS / "competesmoe_competition-0.safetensors")
    meta = json.loads(metadata["meta"])
    damage(meta, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"meta": json.dumps(meta)})
    assert golden.main([str(tmp_path)]) == 1


@pytest.mark.parametrize("reference", sorted(golden.ROUTERS))
@pytest.mark.parametrize("sizes", [{"E": 8, "K": 3, "O": 20}, {"E": 6, "K": 5, "O": 8}])
def test_other_sizes(reference: str, sizes: dict[str, int], tmp_path: Path) -> None:
    router = golden.ROUTERS[reference]
    sizes = {"B": 2, "N": 5, "D": 12, "I": 20, **sizes}
    if router == "moe_plus_plus" and sizes["E"] == 8:  # which copies tokens where it keeps their width
        sizes["D"] = sizes["O"]
    for competing in (False, True) if router == "competition" else (None,):
        meta: dict[str, Any] = {"reference": reference, "seed": 7, **sizes, "activation": "relu2"}
        meta |= {"coefs": COEFS, "competition": competing}
        tensors = random_tensors(router, sizes, seed=7)
        leaves = {name: tensor.double().requires_grad_(name != "probe") for name, tensor in tensors.items()}
        settings = {"K": sizes["K"], "activation": "relu2", "competing": bool(competing), "affinity": "softplus"}
        mask = torch.ones(sizes["B"], sizes["N"])
        output, losses = forward(router, leaves, leaves["x"], mask, {**settings, "all_choices": False})
        if competing:
            losses["routerloss"] = losses.pop("distillation_loss") + 0.2 * losses.pop("winner_distillation_loss")
            coefs = {"routerloss": 0.04, "diversity_loss": 0.05, "balance_loss": 0.06}
        else:
            coefs = {"balance_loss": 0.02, "router_z_loss": 0.003, "null_reward_loss": 0.5}
        aux_loss = sum(coefs[name] * loss for name, loss in losses.items())
        ((output * leaves["probe"]).sum() + aux_loss).backward()
        made = {"output": output, "aux_loss": aux_loss.reshape(1)}
        made |= {f"loss.{name}": value.reshape(1) for name, value in losses.items()}
        made |= {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if "grad.router.expert_embeddings" in made:
            norms = tensors["router.expert_embeddings"].double().norm(dim=1, keepdim=True)
            made["grad.router.expert_embeddings"] *= (norms + (0.1 if router == "perturbed_cosine" else 0)) / 1.5
        tensors |= {name: value.detach().float() for name, value in made.items()}
        save_file(tensors, tmp_path / f"{reference}_{competing}.safetensors", {"meta": json.dumps(meta)})
    assert golden.main([str(tmp_path)]) == 0
