"""What a stage refuses to spread, its optimizer groups, and shards of spread experts put together; no ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llava_compete.errors import UserError
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.parallel import ExpertRanks
from llava_compete.moe.state import RoutingState
from llava_compete.train import expert_parallel
from llava_compete.train.config import PartTraining
from llava_compete.train.expert_resharding import merge_experts
from llava_compete.train.trainable import optimizer_groups

LAYER = {"num_experts": 4}


class Ranks(ExpertRanks):
    """A place among ranks that are not there."""

    def __init__(self, num_experts: int, size: int, rank: int) -> None:
        self.num_experts, self.size, self.rank, self.num_local = num_experts, size, rank, num_experts // size


def whole_model() -> Any:
    sizes = {"hidden_size": 4, "intermediate_size": 6, "activation": "gelu", "gated": False, "bias": True}
    torch.manual_seed(0)
    model = nn.Module()
    layer = MoeLayerConfig.model_validate(LAYER)
    model.block = SparseMoeBlock(layer, name="language.0", state=RoutingState(), **sizes)
    return nn.ModuleDict({"model": nn.ModuleDict({"language_model": model})})


def experts_of(model: Any) -> Any:
    return model["model"]["language_model"].block.experts


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "adapted", "said"),
    [
        (3, 2, False, "moe.expert_parallel: found 2, expected a divisor of the number of ranks, 3"),
        (2, 3, False, "deepspeed: found zero3 beside moe.expert_parallel 2, expected zero1 or zero2"),
        (2, 0, False, "deepspeed: found null beside moe.expert_parallel 2, expected zero1 or zero2"),
        (2, 2, True, "moe.expert_parallel: found 2 beside adapters"),
    ],
)
def test_what_cannot_be_spread_is_refused(ranks: int, zero_stage: int, adapted: bool, said: str) -> None:
    moe = MoeConfig.model_validate({"language": LAYER, "expert_parallel": 2})
    with pytest.raises(UserError, match=said):
        expert_parallel.check(moe, ranks, zero_stage, adapted=adapted)
    expert_parallel.check(MoeConfig.model_validate({"language": LAYER}), ranks, zero_stage, adapted=adapted)
    expert_parallel.check(moe, 4, 1, adapted=False)


def test_experts_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found 3, expected a divisor of language\.num_experts = 4"):
        MoeConfig.model_validate({"language": LAYER, "expert_parallel": 3})


def test_a_checkpoint_does_not_say_how_its_experts_were_spread() -> None:
    spread, whole = (MoeConfig.model_validate({"language": LAYER, "expert_parallel": size}) for size in (2, 1))
    assert spread.of_model() == whole.of_model()
    assert MoeConfig.model_validate(spread.of_model()) == whole


def test_spread_experts_have_groups_of_their_own() -> None:
    model = whole_model()
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}

    def groups() -> list[dict[str, Any]]:
        trainable = {"language": PartTraining()}
        return optimizer_groups(model, trainable, learning_rate=0.1, weight_decay=0.2, decayed=decayed)

    names = [group["name"] for group in groups()]
    expert_parallel.mark(model, 1)
    assert [group["name"] for group in groups()] == names
    expert_parallel.mark(model, 2)
    spread = groups()
    experts = {id(parameter) for parameter in experts_of(model).parameters()}
    for group in spread:
        assert {id(parameter) in experts for parameter in group["params"]} == {"moe" in group}
        if "moe" in group:
            assert group["name"] == "ep_size_2"
            assert group["label"].startswith("language/experts")
    assert sum(len(group["params"]) for group in spread) == len(list(model.parameters()))


def test_a_spread_block_keeps_its_experts_out_of_the_state_dict() -> None:
    model, whole = whole_model(), whole_model()
    names = expert_parallel.expert_names(model)
    experts_of(model).spread(Ranks(4, 2, 1))
    assert names == dict.fromkeys((name for name, _ in whole.named_parameters() if ".experts." in name), 4)
    for name, parameter in experts_of(model).named_parameters():
        assert torch.equal(parameter, experts_of(whole).get_parameter(name)[2:])
    assert model.state_dict().keys() == whole.state_dict().keys() - names.keys()
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="router"):
        model.load_state_dict({})


def _shards(folder: Path, tensors: dict[str, torch.Tensor], experts: set[str], ranks: int, spread: int) -> None:
    """As ZeRO-2 writes them: one group of plain tensors, one of experts, each laid end to end and cut into equal parts
    with zeros at the end."""
    groups: list[dict[str, Any]] = []
    for names, owners in (
        ([name for name in tensors if name not in experts], [list(range(ranks))]),
        ([name for name in tensors if name in experts], [list(range(r, ranks, spread)) for r in range(spread)]),
    ):
        by_rank = {}
        for part, members in enumerate(owners):
            own = {name: tensors[name].chunk(spread)[part] if name in experts else tensors[name] for name in names}
            flat = torch.cat([tensor.flatten() for tensor in own.values()])
            size = -(-len(flat) // len(members))
            flat = torch.cat([flat, torch.zeros(size * len(members) - len(flat))])
            for index, member in enumerate(members):
                mapping, start = {}, 0
                for name, tensor in own.items():
                    low, high = max(start, index * size), min(start + tensor.numel(), (index + 1) * size)
                    if low < high:
                        mapping[name] = SimpleNamespace(start=low - index * size, numel=high - low)
                    start += tensor.numel()
                by_rank[member] = (flat[index * size : (index + 1) * size], mapping)
        shapes = {name: tensor.shape for name, tensor in own.items()}
        groups.append({"by_rank": by_rank, "shapes": shapes})
    (folder / "global_step3").mkdir(parents=True)
    (folder / "latest").write_text("global_step3", encoding="utf-8")
    torch.save(
        {"param_shapes": [group["shapes"] for group in groups]}, folder / "global_step3" / "mp_rank_00_model_states.pt"
    )
    for rank in range(ranks):
        state = {
            "base_optimizer_state": {
                "state": {
                    g: {"step": torch.tensor(3.0), "exp_avg": -group["by_rank"][rank][0]}
                    for g, group in enumerate(groups)
                }
            },
            "single_partition_of_fp32_groups": [group["by_rank"][rank][0] for group in groups],
            "param_slice_mappings": [group["by_rank"][rank][1] for group in groups],
            "ds_version": "0.19.8",
        }
        path = folder / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)


@pytest.mark.parametrize(("ranks", "spread"), [(2, 2), (4, 2), (4, 4), (2, 1)])
def test_shards_are_merged_with_whole_experts(tmp_path: Path, ranks: int, spread: int) -> None:
    tensors = {"a.weight": torch.randn(3, 5), "b.experts.up": torch.randn(4, 3, 2), "b.experts.down": torch.randn(4, 7)}
    experts = {"b.experts.up", "b.experts.down"}
    _shards(tmp_path, tensors, experts, ranks, spread)
    merge_experts(tmp_path, dict.fromkeys(experts, 4), spread)
    merge_experts(tmp_path, {}, spread)  # is there already
    merged = tmp_path / (tmp_path / "latest_universal").read_text(encoding="utf-8") / "zero"
    for name, tensor in tensors.items():
        weights, moment, step = (torch.load(merged / name / f"{key}.pt") for key in ("fp32", "exp_avg", "step"))
        assert torch.equal(weights["param"], tensor)
        assert torch.equal(moment["param"], -tensor)
        assert step == 3
        assert weights.get("ep_num_experts") == (4 if name in experts else None)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    _shards(tmp_path, {"a": torch.ones(4), "b.experts.up": torch.ones(4, 2)}, {"b.experts.up"}, 2, 2)
    (tmp_path / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"cannot be merged: .*expected one of each rank from 0"):
        merge_experts(tmp_path, {"b.experts.up": 4}, 2)
