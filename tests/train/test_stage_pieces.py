"""The pieces of a stage that need no launcher: config, arguments, trainable map, checkpoints, counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from stage_kit import stage_config, write_data
from tiny import TEXTS, tiny_model
from torch import nn

from llava_compete.config import parse_config
from llava_compete.data.sampler import GlobalBatchSampler
from llava_compete.errors import UserError
from llava_compete.language.tokenizer import train_byte_level_bpe
from llava_compete.moe.block import competition_layers, moe_blocks
from llava_compete.train import checkpoints, trainable
from llava_compete.train import resharding as universal
from llava_compete.train import step_counts as counts
from llava_compete.train.adapters import with_adapters
from llava_compete.train.config import DEEPSPEED_DIR, PartTraining, TrainConfig
from llava_compete.train.distributed import Rank
from llava_compete.train.identity import SPLIT
from llava_compete.train.resume import check_identity
from llava_compete.train.starting_point import start_model
from llava_compete.train.trainer import StageTrainer


def _parse(**changes: object) -> TrainConfig:
    return parse_config(TrainConfig, {**stage_config("sft", Path("d.json"), Path("out")), **changes}, source="x.yaml")


def test_unknown_training_argument_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"x\.yaml.*training\.learning_rat'.*did you mean 'learning_rate'"):
        _parse(training={"learning_rat": 1e-3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"seed": 1}}, r"training\.seed is not set here: set the top-level key seed"),
        ({"training": {"activation_checkpointing_kwargs": {"use_reentrant": True}}}, "use_reentrant: must be false"),
        ({"deepspeed": "zero9"}, r"'zero9', expected null or one of .*zero2"),
        ({"trainable": {"vision": "frozen"}}, "no part is trained"),
        ({"trainable": {"visoin": "full"}}, "visoin"),
        ({"stagee": "sft"}, "did you mean 'stage'"),
    ],
)
def test_config_mistakes_name_the_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _parse(**changes)


def test_every_deepspeed_file_leaves_geometry_to_the_training_arguments() -> None:
    stages = {}
    for path in sorted(DEEPSPEED_DIR.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["train_micro_batch_size_per_gpu"] == content["gradient_accumulation_steps"] == "auto"
        stages[path.stem] = content["zero_optimization"]["stage"]
    assert stages == {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_nvme": 3, "zero3_offload": 3}


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = nn.Linear(2, 3)
        self.model.multi_modal_projector = nn.Linear(3, 4)
        self.model.language_model = nn.Linear(4, 3)
        self.lm_head = nn.Linear(1, 5)


def test_trainable_map_sets_gradients_groups_and_table() -> None:
    model = _Parts()
    parts = {
        "projector": PartTraining(mode="full", learning_rate=1e-3),
        "language": PartTraining(mode="full", weight_decay=0.0),
    }
    trainable.apply(model, parts)  # type: ignore[arg-type]
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    groups = trainable.optimizer_groups(
        model,
        parts,  # type: ignore[arg-type]
        learning_rate=1e-4,
        weight_decay=0.1,
        decayed={"model.multi_modal_projector.weight", "model.language_model.weight", "lm_head.weight"},
    )
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found == {
        "projector": (1e-3, 0.1, 1),
        "projector/no_decay": (1e-3, 0.0, 1),
        "language": (1e-4, 0.0, 2),
        "language/no_decay": (1e-4, 0.0, 2),
    }
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in model.parameters())
    rows = trainable.table(model, parts, learning_rate=1e-4, weight_decay=0.1)  # type: ignore[arg-type]
    assert [(row.part, row.mode, row.parameters, row.trainable_parameters) for row in rows] == [
        ("vision", "frozen", 9, 0),
        ("projector", "full", 16, 16),
        ("language", "full", 25, 25),
    ]


def test_no_norm_is_decayed_whatever_its_name() -> None:
    """The RMS norms of AIMv2 are called `norm1` and `norm2`."""
    with torch.device("meta"):
        model = timm.create_model("aimv2_large_patch14_224")
    decayed = StageTrainer.get_decay_parameter_names(StageTrainer.__new__(StageTrainer), model)
    assert [name for name in decayed if "norm" in name] == []
    assert "blocks.0.attn.qkv.weight" in decayed


def test_trainable_part_that_the_model_lacks_is_refused() -> None:
    model = _Parts()
    del model.model.vision_tower
    for mode in ("full", "frozen"):
        with pytest.raises(UserError, match=r"trainable\.vision: the model has no vision part"):
            trainable.apply(model, {"vision": PartTraining(mode=mode)})  # type: ignore[arg-type]


def test_routers_train_in_full_in_a_part_that_trains_by_lora() -> None:
    model, _ = tiny_model(moe={"language": {"router": "xmoe"}, "projector": {}})
    parts = {"projector": PartTraining(mode="full"), "language": PartTraining(mode="lora", lora_rank=2)}
    adapted = with_adapters(model, parts)  # type: ignore[arg-type]
    trainable.apply(adapted, parts)  # type: ignore[arg-type]
    for name, block in moe_blocks(model).items():
        assert all(parameter.requires_grad for parameter in block.router.parameters()), name
    free = [name for name, p in adapted.named_parameters() if p.requires_grad and "language_model" in name]
    assert {"router" if ".router." in name else "lora_" for name in free} == {"router", "lora_"}
    assert all("lora_" in name or ".router." in name for name in free)


def test_losses_of_a_frozen_part_are_refused() -> None:
    zero = {"balance_coef": 0, "router_z_coef": 0}
    none = {**zero, "distillation_coef": 0, "winner_distillation_coef": 0, "diversity_coef": 0}
    parts = {"language": PartTraining(mode="full")}
    for moe, message in (
        ({}, "vision's balance_coef, router_z_coef, distillation_coef, .* competition_balance_coef to 0"),
        ({**none}, r"frozen, so that nothing learns .* set moe\.vision's competition_balance_coef to 0"),
        ({"router": "softmax", "balance_coef": 0}, r"set moe\.vision's router_z_coef to 0"),
    ):
        model, _ = tiny_model(moe={"vision": moe, "language": {}})
        with pytest.raises(UserError, match=r"trainable\.vision: .*" + message):
            trainable.apply(model, parts)  # type: ignore[arg-type]
    model, _ = tiny_model(moe={"vision": {**none, "competition_balance_coef": 0}, "language": {}})
    trainable.apply(model, parts)  # type: ignore[arg-type]
    assert competition_layers(model) == ["language.0", "language.1"]


def test_new_control_tokens_need_a_language_model_that_trains(tmp_path: Path) -> None:
    plain = train_byte_level_bpe(TEXTS, vocab_size=320)
    plain.save_pretrained(tmp_path / "lm")
    model = {"language_model": {"name": str(tmp_path / "lm")}, "chat_template": "chatml"}
    for part in ({"projector": "full"}, {"language": {"mode": "lora"}}):
        config = _parse(stage="pretrain_align", model=model, trainable=part, moe=None)
        with pytest.raises(
            UserError, match=r"model\.chat_template: 'chatml' needs <\|im_start\|>, <\|im_end\|>, which"
        ):
            start_model(config, Rank(0, 0, 1, False))


def test_the_data_of_the_launched_tests_has_a_step_with_text_alone_on_one_rank(tmp_path: Path) -> None:
    rows = 48
    records = json.loads(write_data(tmp_path / "data", rows).read_text(encoding="utf-8"))
    modalities = np.array(["image" in record for record in records], dtype=np.int8)
    ranks = [GlobalBatchSampler(np.ones(rows), modalities, 8, 4, 2, rank, 0) for rank in range(2)]
    kinds = [tuple(set(modalities[batch].tolist()) for batch in step) for step in zip(*ranks, strict=True)]
    assert ({0}, {1}) in kinds


def test_counts_of_a_step() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, 3, -100]])
    batch = {
        "labels": labels,
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "pixel_values": torch.zeros(3, 3, 2, 2),
        "sample_ids": ["a", "b"],
    }
    found = counts.gather([batch, _filler()], torch.device("cpu"), stop=False)
    assert int(found.supervised_tokens) == found.num_supervised == 3
    assert (found.tokens, found.samples, found.images, found.stop) == (7, 2, 3, False)
    assert {name: float(value) for name, value in found.sequences.items()} == {
        "vision": 3.0,
        "projector": 3.0,
        "language": 2.0,
    }
    assert "sample_ids" not in batch


def _filler() -> dict[str, object]:
    return {
        "labels": torch.tensor([[-100]]),
        "attention_mask": torch.ones(1, 1, dtype=torch.long),
        "sequence_ids": torch.tensor([[-1]]),
        "sample_ids": [],
    }


def test_a_checkpoint_counts_only_when_published(tmp_path: Path) -> None:
    staged = _stage(tmp_path, "checkpoint-3")
    assert checkpoints.list_complete(tmp_path) == []
    checkpoints.publish(tmp_path, "checkpoint-3", {"identity": _identity(2, 4, 1)})
    assert not staged.exists()
    for name in ("checkpoint-9", "checkpoint-3.old"):
        (tmp_path / name).mkdir()
    assert checkpoints.list_complete(tmp_path) == [tmp_path / "checkpoint-3"]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_checkpoint_that_lost_a_file_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    _publish(tmp_path, "checkpoint-3", "checkpoint-6")
    torn = tmp_path / "checkpoint-6" / "global_step6" / "weights"
    torn.write_text("w", encoding="utf-8") if damage == "cut" else torn.unlink()
    with caplog.at_level("WARNING"):
        assert checkpoints.list_complete(tmp_path) == [tmp_path / "checkpoint-3"]
    assert "checkpoint-6: incomplete checkpoint skipped (global_step6/weights should have 7 bytes" in caplog.text


def _publish(output_dir: Path, *names: str) -> None:
    for name in names:
        _stage(output_dir, name)
        checkpoints.publish(output_dir, name, {"identity": _identity(2, 4, 1)})


def _kept(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (None, ["checkpoint-3", "checkpoint-6", "checkpoint-9"]),
        (2, ["checkpoint-3", "checkpoint-6"]),
        (1, ["checkpoint-6"]),
    ],
)
def test_the_checkpoint_just_written_outlives_one_of_later_steps(
    tmp_path: Path, limit: int | None, kept: list[str]
) -> None:
    """The run began before step 9: that checkpoint is damaged, or of a branch that had decayed."""
    _publish(tmp_path, "checkpoint-3", "checkpoint-9", "checkpoint-6")
    checkpoints.rotate(tmp_path, limit, 6)
    assert _kept(tmp_path) == kept


@pytest.mark.parametrize("again", [False, True], ids=["rotated", "written again"])
def test_a_kill_while_a_checkpoint_is_removed_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    _publish(tmp_path, "checkpoint-3", "checkpoint-6")

    def killed(path: Path) -> None:
        (path / checkpoints.COMPLETE).unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            _publish(tmp_path, "checkpoint-6") if again else checkpoints.rotate(tmp_path, 1, 6)
    checkpoints.clear_staging(tmp_path)
    assert _kept(tmp_path) == (["checkpoint-3", "checkpoint-6"] if again else ["checkpoint-6"])
    assert next(checkpoints.sound(tmp_path)).name == "checkpoint-6"


def test_a_result_takes_the_place_of_one_in_other_shards(tmp_path: Path) -> None:
    """transformers would load the one file that an earlier save left, and never look at the index."""
    staged = tmp_path / checkpoints.STAGING / "final"
    staged.mkdir(parents=True)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in (*shards, "config.json"):
        (staged / name).write_text("new", encoding="utf-8")
    for name in ("model.safetensors", "model-00001-of-00003.safetensors", "config.json", "notes.txt"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    checkpoints.install_model(staged, tmp_path)
    assert _kept(tmp_path) == sorted([*shards, "config.json", "notes.txt"])
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "new"


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / checkpoints.COMPLETE).write_text('{"identity": {}, "bytes": {}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"checkpoint-3: written by an earlier version.*model\.checkpoint="):
        next(checkpoints.sound(tmp_path))


def test_what_changed_is_named_unless_allowed(tmp_path: Path) -> None:
    saved = {"seed": 1, "data": "a", "trainable.vision.mode": "full", **_identity(2, 4, 1)}
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "scheduler.pt").touch()
    assert check_identity(checkpoint, saved, saved, allow_changed=False) == {}
    changed = {**saved, "seed": 2, "data": "b"}
    with pytest.raises(UserError, match=r"data was 'a', is 'b'; seed was 1, is 2.*--allow-changed"):
        check_identity(checkpoint, saved, changed, allow_changed=False)
    assert set(check_identity(checkpoint, saved, changed, allow_changed=True)) == {"data", "seed"}
    weights_only = r"another output_dir, and model\.checkpoint=.*checkpoint-3"
    for stage, engine in ((0, "without DeepSpeed"), (3, "with ZeRO-3")):
        with pytest.raises(UserError, match=f"written with ZeRO-2, which a run {engine} cannot read.*{weights_only}"):
            check_identity(checkpoint, saved, {**saved, "zero_stage": stage}, allow_changed=True)
    with pytest.raises(UserError, match=rf"trainable\.vision\.mode was 'full', is 'lora'.*{weights_only}"):
        check_identity(checkpoint, saved, {**saved, "trainable.vision.mode": "lora"}, allow_changed=True)
    (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(UserError, match="holds the model alone"):
        check_identity(checkpoint, saved, saved, allow_changed=True)


def _stage(output_dir: Path, name: str) -> Path:
    """What the trainer has written of a checkpoint before it is published."""
    staged = output_dir / checkpoints.STAGING / name
    (staged / "global_step6").mkdir(parents=True)
    (staged / "global_step6" / "weights").write_text("weights", encoding="utf-8")
    (staged / "scheduler.pt").touch()
    return staged


def _identity(world: int, micro: int, accumulation: int, zero_stage: int = 2) -> dict[str, int]:
    return {**dict(zip(SPLIT, (world, micro, accumulation), strict=True)), "zero_stage": zero_stage}


def test_the_same_global_batch_may_be_split_over_another_number_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "scheduler.pt").touch()
    saved = _identity(2, 4, 1)
    assert check_identity(tmp_path, saved, _identity(1, 4, 2), allow_changed=False) == {}
    with pytest.raises(UserError, match="world_size was 2, is 1"):
        check_identity(tmp_path, saved, _identity(1, 4, 1), allow_changed=False)
    with pytest.raises(UserError, match="per_device_train_batch_size was 4, is 2"):
        check_identity(tmp_path, saved, _identity(2, 2, 2), allow_changed=False)


def test_second_run_on_one_directory_is_refused(tmp_path: Path) -> None:
    with (
        checkpoints.output_lock(tmp_path),
        pytest.raises(UserError, match="another run is writing here"),
        checkpoints.output_lock(tmp_path),
    ):
        pass
    with checkpoints.output_lock(tmp_path):
        pass


def test_loaded_universal_state_gets_its_own_steps_and_settings() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [p], "name": name} for p, name in zip(parameters, ("a", "b"), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    shared = torch.tensor(3.0)
    for parameter in parameters:
        optimizer.state[parameter]["step"] = shared
    optimizer.param_groups[1].update(name="a", weight_decay=0.0)
    universal.mend_loaded_state(optimizer, settings, [0.01, 0.02])
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    steps[0] += 1
    assert [float(step) for step in steps] == [4.0, 3.0]
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("a", 0.01, 0.5),
        ("b", 0.02, 0.5),
    ]


def test_buffers_come_with_a_universal_checkpoint(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    trained, fresh = model(), model()
    trained(torch.randn(4, 2))
    state, weights = trained.state_dict(), fresh[0].weight.detach().clone()
    (tmp_path / "latest_universal").write_text("global_step1_universal", encoding="utf-8")
    file = tmp_path / "global_step1_universal" / "mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save({"module": state}, file)
    universal.load_buffers(fresh, tmp_path)
    assert torch.equal(fresh[1].running_mean, trained[1].running_mean)
    assert int(fresh[1].num_batches_tracked) == 1
    assert torch.equal(fresh[0].weight, weights), "DeepSpeed reads parameters"
    del state["1.running_var"]
    torch.save({"module": state}, file)
    with pytest.raises(UserError, match=r"has no buffer 1\.running_var"):
        universal.load_buffers(fresh, tmp_path)
