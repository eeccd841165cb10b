"""A stage that goes on with other settings: refused with both values, or obeyed and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_kit import fail, run_stage_here, stop_at_step
from stage_kit import read_metrics, stage_config, tiny_moe, write_data
from transformers import get_scheduler

from llava_compete.config import parse_config
from llava_compete.errors import UserError
from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.train import checkpoints, run
from llava_compete.train.config import TrainConfig
from llava_compete.train.extension import Plan
from llava_compete.train.identity import checkpoint_digest, differences, settings


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model to start from, with its data beside it."""
    folder = tmp_path_factory.mktemp("start")
    data = write_data(folder / "data")
    training = {"max_steps": 1, "save_strategy": "no"}
    return run_stage_here(stage_config("pretrain_align", data, folder / "dense", training=training, deepspeed=None))


def _stage(start: Path, out: Path, **training: Any) -> dict[str, Any]:
    data, model = start.parent / "data" / "data.json", {"checkpoint": str(start)}
    training = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", **training}
    return stage_config("pft", data, out, model=model, training=training, deepspeed=None)


@pytest.fixture(scope="module")
def killed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A stage that was killed in its third step; its checkpoint is of the second."""
    config = _stage(start, tmp_path_factory.mktemp("killed") / "out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at_step(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_stage_here(config)
    return config


@pytest.fixture
def stopped(killed: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same in a folder of its own."""
    out = shutil.copytree(killed["output_dir"], tmp_path / "out")
    return {**killed, "output_dir": str(out)}


def _changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(config))
    node = copy
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return copy


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.learning_rate", 0.02, "training.learning_rate was 0.01, is 0.02"),
        ("training.lr_scheduler_type", "linear", "training.lr_scheduler_type was 'constant', is 'linear'"),
        ("training.weight_decay", 0.5, "training.weight_decay was 0.0, is 0.5"),
        ("training.adam_beta2", 0.9, "training.adam_beta2 was 0.999, is 0.9"),
        ("training.max_grad_norm", 0.1, "training.max_grad_norm was 1.0, is 0.1"),
        ("data.max_length", 64, "data.max_length was 128, is 64"),
        ("data.packing", True, "data.packing was False, is True"),
        ("trainable.vision", {"mode": "full", "learning_rate": 0.1}, "trainable.vision.learning_rate was None, is 0.1"),
        ("seed", 3, "seed was 0, is 3"),
    ],
)
def test_a_changed_setting_is_refused_and_the_record_stays(
    stopped: dict[str, Any], key: str, value: Any, said: str
) -> None:
    run_folder = Path(stopped["output_dir"]) / "run"
    before = [(run_folder / name).read_bytes() for name in ("config.yaml", "manifest.json")]
    with pytest.raises(UserError, match=f"checkpoint-2: cannot go on, the run has changed: .*{said}.*--allow-changed"):
        run_stage_here(_changed(stopped, key, value))
    assert [(run_folder / name).read_bytes() for name in ("config.yaml", "manifest.json")] == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainable.vision", "frozen", "trainable.vision.mode was 'full', is 'frozen'"),
        ("training.optim", "sgd", "training.optim was 'adamw_torch', is 'sgd'"),
        ("training.bf16", True, "training.bf16 was False, is True"),
    ],
)
def test_what_the_checkpoint_holds_the_consequences_of_cannot_be_obeyed(
    stopped: dict[str, Any], key: str, value: Any, said: str
) -> None:
    with pytest.raises(UserError, match=f"{said}.*from its weights alone: another output_dir, and model.checkpoint="):
        run_stage_here(_changed(stopped, key, value), allow_changed=True)


def test_a_changed_parent_or_image_is_refused(stopped: dict[str, Any], start: Path, tmp_path: Path) -> None:
    image = start.parent / "data" / "images" / "1.png"
    content = image.read_bytes()
    try:
        image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
        with pytest.raises(UserError, match=r"the run has changed: data\.tiny\.images was"):
            run_stage_here(stopped)
    finally:
        image.write_bytes(content)
    other = run_stage_here(_stage(start, tmp_path / "other", max_steps=1, save_strategy="no"))
    with pytest.raises(UserError, match=r"the run has changed: model\.checkpoint was"):
        run_stage_here(_changed(stopped, "model.checkpoint", str(other)), allow_changed=True)


def test_a_moved_parent_is_the_same(start: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(start)
    one, other = (
        settings(parse_config(TrainConfig, _stage(folder, out), "x"), None)
        for folder, out in ((start, tmp_path / "a"), (tmp_path / "moved", tmp_path / "b"))
    )
    assert differences(one, other) == {}
    assert checkpoint_digest(start) == one["model.checkpoint"]


def test_changes_are_obeyed_and_recorded(stopped: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The last two steps are those of a run that had the new settings, started from the same state."""
    seen: list[tuple[float, float, tuple[float, float], float]] = []
    config = _changed(_changed(stopped, "training.learning_rate", 0.02), "training.weight_decay", 0.5)
    config = _changed(config, "training.adam_beta2", 0.9)
    plain = torch.optim.AdamW.step

    def step(self: Any, *rest: Any, **options: Any) -> Any:
        group = self.param_groups[0]
        seen.append((group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]))
        return plain(self, *rest, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        out = run_stage_here(config, allow_changed=True)
    assert seen == [(0.02, 0.5, (0.9, 0.9), 1e-8)] * 2
    assert [line["learning_rate/projector"] for line in read_metrics(out)] == [0.01, 0.01, 0.02, 0.02]
    said = "training.learning_rate was 0.01, is 0.02"
    assert said in capsys.readouterr().err
    manifest = json.loads((out / "run" / "manifest.json").read_text("utf-8"))
    (change,) = manifest["changes"]
    assert change["step"] == 2
    assert said in change["changed"]
    assert checkpoints.mark(out / "checkpoint-4")["changes"] == manifest["changes"]


def test_how_often_to_save_is_what_the_config_says_now(stopped: dict[str, Any]) -> None:
    out = run_stage_here(_changed(stopped, "training.save_steps", 1))
    assert [path.name for path in checkpoints.list_complete(out)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_finished_stage_with_other_settings_is_not_finished_already(start: Path, tmp_path: Path) -> None:
    config = _stage(start, tmp_path / "out")
    out = run_stage_here(config)
    weights = (out / "model.safetensors").stat().st_mtime_ns
    run_stage_here(_changed(config, "training.logging_steps", 5))
    assert (out / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(
        UserError, match=r"has finished with other settings or data: training\.learning_rate was 0\.01, is 0\.5"
    ):
        run_stage_here(_changed(config, "training.learning_rate", 0.5))


def test_a_finished_stage_with_other_data_is_not_finished_already(start: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(start.parent / "data", tmp_path / "data")
    config = _changed(_stage(start, tmp_path / "out", max_steps=1, save_strategy="no"), "data.sources", [])
    config["data"]["sources"] = [{"name": "tiny", "path": str(folder / "data.json")}]
    out = run_stage_here(config)
    for changed, key in ((folder / "images" / "1.png", "images"), (folder / "data.json", "rows")):
        content = changed.read_bytes()
        changed.write_bytes(content.replace(b"IEND", b"IENE").replace(b"Which", b"What "))  # of the same size
        with pytest.raises(UserError, match=rf"has finished with other settings or data: data\.tiny\.{key} was"):
            run_stage_here(config)
        changed.write_bytes(content)
        assert run_stage_here(config) == out
    shutil.rmtree(folder)  # nothing to compare with
    assert run_stage_here(config) == out


# ---- a run made longer ----


@pytest.mark.parametrize(
    ("schedule", "jumps"),
    [
        ({"lr_scheduler_type": "constant"}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, False),
        ({"lr_scheduler_type": "cosine"}, True),
        ({"lr_scheduler_type": "linear"}, True),
    ],
)
def test_a_finished_run_is_extended(
    start: Path, tmp_path: Path, schedule: dict[str, Any], jumps: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _stage(start, tmp_path / "out", **schedule)
    out = run_stage_here(config)
    longer = _changed(config, "training.max_steps", 10)
    if jumps:
        expected = (
            r"checkpoint-4: total_steps was 4, is 10: the learning rate of step 5 is 0\.00\d+, by the plan so far 0"
        )
        with pytest.raises(UserError, match=f"{expected}.*--allow-changed"):
            run_stage_here(longer)
        assert checkpoints.read_finished(out) is not None
    run_stage_here(longer, allow_changed=jumps)
    said = capsys.readouterr().err
    assert "total_steps was 4, is 10: the learning rate of step 5 is" in said
    records = read_metrics(out)
    assert [record["step"] for record in records] == list(range(1, 11))
    rates = [record["learning_rate/projector"] for record in records]
    if schedule["lr_scheduler_type"].startswith("constant"):
        # 2 of 4 steps of warm-up; 5 of 10 would warm up again.
        assert rates[4:] == [0.01] * 6
    finished = checkpoints.read_finished(out)
    assert finished
    assert finished["steps"] == 10


def test_a_longer_run_with_a_lowest_rate_says_the_rate_it_will_have(start: Path, tmp_path: Path) -> None:
    lowest = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.005}}
    config = _stage(start, tmp_path / "out", **lowest)
    run_stage_here(config)
    with pytest.raises(UserError, match=r"the learning rate of step 5 is 0\.00827, by the plan so far 0\.005\."):
        run_stage_here(_changed(config, "training.max_steps", 10))


def test_a_longer_run_with_another_rate_says_the_rate_it_will_have(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _stage(start, tmp_path / "out", lr_scheduler_type="linear")
    run_stage_here(config)
    longer = _changed(_changed(config, "training.max_steps", 8), "training.learning_rate", 0.002)
    out = run_stage_here(longer, allow_changed=True)
    assert "the learning rate of step 5 is 0.001, by the plan so far 0" in capsys.readouterr().err
    assert read_metrics(out)[3]["learning_rate/projector"] == 0  # after step 4 of 4
    assert read_metrics(out)[4]["learning_rate/projector"] == pytest.approx(0.002 * 3 / 8)  # after step 5 of 8


def test_more_epochs_extend_a_run(start: Path, tmp_path: Path) -> None:
    config = _stage(start, tmp_path / "out", num_train_epochs=0.5)
    del config["training"]["max_steps"]
    run_stage_here(config)
    out = run_stage_here(_changed(config, "training.num_train_epochs", 1.5))
    assert [record["step"] for record in read_metrics(out)] == list(range(1, 10))  # 24 rows, 4 at a time


def test_warmup_stable_decay_is_extended_before_its_decay(start: Path, tmp_path: Path) -> None:
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}
    config = _stage(start, tmp_path / "out", save_steps=1, warmup_steps=1, **schedule)
    out = run_stage_here(config)
    decayed = [record["learning_rate/projector"] for record in read_metrics(out)]
    assert decayed[-1] < 0.01
    run_stage_here(_changed(config, "training.max_steps", 7))
    rates = [record["learning_rate/projector"] for record in read_metrics(out)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    options = {"num_decay_steps": 2}
    expected = get_scheduler("warmup_stable_decay", optimizer, 1, 7, scheduler_specific_kwargs=options)
    optimizer.step()
    for rate in rates:
        expected.step()
        assert rate == pytest.approx(expected.get_last_lr()[0]), rates


def test_an_extended_run_equals_one_that_was_long_from_the_start(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant rate and no competitions nothing depends on the length. What is refused changes nothing."""

    def refuse(*_: Any) -> None:
        raise UserError("no room")

    short = _stage(start, tmp_path / "short", max_steps=4)
    run_stage_here(short)
    with pytest.raises(UserError, match="checkpoint-4: has trained 4 steps, found 3 as the run's whole length"):
        run_stage_here(_changed(short, "training.max_steps", 3))
    monkeypatch.setattr(run, "check_space", refuse)
    with pytest.raises(UserError, match="no room"):
        run_stage_here(_changed(short, "training.max_steps", 7))
    monkeypatch.undo()
    assert checkpoints.read_finished(tmp_path / "short") is not None
    extended = run_stage_here(_changed(short, "training.max_steps", 7))
    straight = run_stage_here(_stage(start, tmp_path / "long", max_steps=7))
    for one, other in zip(read_metrics(straight), read_metrics(extended), strict=True):
        assert (one["step"], one["loss"]) == (other["step"], other["loss"])
    weights = [(folder / "model.safetensors").read_bytes() for folder in (straight, extended)]
    assert weights[0] == weights[1]


def test_an_extension_without_a_checkpoint_is_refused(start: Path, tmp_path: Path) -> None:
    config = _stage(start, tmp_path / "out", save_strategy="no")
    run_stage_here(config)
    with pytest.raises(UserError, match="has finished, and no checkpoint is left to go on from"):
        run_stage_here(_changed(config, "training.max_steps", 10))


def test_planned_competitions_stay_and_an_extension_has_no_warmup() -> None:
    names = ["a", "b", "c"]
    planned = CompetitionSchedule.build(0, 40, names, 0.3, 0.5, 2)
    extended = CompetitionSchedule.extended(0, (40, 100), names, 0.3, 0.5, 2)
    assert extended.competing[:40] == planned.competing
    assert len(extended.competing) == 100
    counts = np.array([len(layers) for layers in extended.competing[40:]])
    assert counts[:20].sum() > 0
    assert counts.max() <= 2
    assert counts.mean() == pytest.approx(0.9, abs=0.25)
    assert Plan(40, 5, (40,)).extended(100) == Plan(100, 5, (40, 100))
    assert Plan(40, 5, (40,)).extended(30) == Plan(30, 5, (40,))
    assert Plan(30, 5, (40,)).extended(50) == Plan(50, 5, (40, 50))


def test_an_extended_run_competes_by_its_plan(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = tiny_moe(competition_warmup_ratio=0.5)
    data = start.parent / "data" / "data.json"
    training = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    config = stage_config("sft", data, tmp_path / "out", moe=moe, training=training, deepspeed=None)
    monkeypatch.setattr(run, "_save_final", fail)  # as killed
    with pytest.raises(KeyboardInterrupt):
        run_stage_here(config)
    monkeypatch.undo()
    before = [record["competition_layers"] for record in read_metrics(tmp_path / "out")]
    assert before[:2] == [[], []]
    out = run_stage_here(_changed(config, "training.max_steps", 12))
    competing = [record["competition_layers"] for record in read_metrics(out)]
    assert competing[:4] == before
    names = [
        f"{part}.{layer}"
        for part, layers in (("vision", 2), ("projector", 1), ("language", 2))
        for layer in range(layers)
    ]
    plan = CompetitionSchedule.extended(0, (4, 12), names, 0.5, 0.5, 3)
    assert competing == [sorted(plan.layers_at(step)) for step in range(12)]
    assert any(competing[4:7])  # half of 12 would be a second warm-up


def test_a_finished_stage_needs_its_parent_no_more(start: Path, tmp_path: Path) -> None:
    parent = shutil.copytree(start, tmp_path / "parent")
    config = _changed(_stage(start, tmp_path / "out", max_steps=1), "model.checkpoint", str(parent))
    out = run_stage_here(config)
    shutil.rmtree(parent)
    assert run_stage_here(config) == out
