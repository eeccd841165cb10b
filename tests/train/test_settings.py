"""What a stage refuses before anything is loaded: by key, with what was found and what was expected."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_kit import run_stage_here
from stage_kit import ROOT, stage_config, stage_environment, tiny_moe, write_data
from transformers import Trainer, TrainingArguments

from llava_compete.config import dump_yaml, load_config, parse_config
from llava_compete.errors import UserError
from llava_compete.moe.config import MoeConfig
from llava_compete.train import run
from llava_compete.train.arguments import build_arguments
from llava_compete.train.config import TrainConfig
from llava_compete.train.starting_point import moe_in_force
from llava_compete.train.training_section import ELSEWHERE, TrainingSection


def _parse(training: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    content = stage_config("sft", Path("d.json"), Path("out"), moe=tiny_moe())
    content["training"].update(training or {})
    return parse_config(TrainConfig, content | changes, source="x.yaml")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", -1e-4, "found -0.0001: Input should be greater than 0"),
        ("learning_rate", 0, "found 0: Input should be greater than 0"),
        ("learning_rate", "1e-4", "found '1e-4': Input should be a valid number"),
        ("learning_rate", float("nan"), "found nan: Input should be a finite number"),
        ("weight_decay", -0.1, "found -0.1: Input should be greater than or equal to 0"),
        ("adam_beta2", 1.0, "found 1.0: Input should be less than 1"),
        ("max_grad_norm", float("inf"), "found inf: Input should be a finite number"),
        ("per_device_train_batch_size", 0, "found 0: Input should be greater than 0"),
        ("per_device_train_batch_size", 2.5, "found 2.5: Input should be a valid integer"),
        ("per_device_train_batch_size", True, "found True: Input should be a valid integer"),
        ("gradient_accumulation_steps", -1, "found -1: Input should be greater than 0"),
        ("max_steps", -1, "found -1: Input should be greater than 0"),
        ("num_train_epochs", 0, "found 0: Input should be greater than 0"),
        ("warmup_steps", 1.5, "found 1.5, expected whole steps or a share below 1"),
        ("save_total_limit", -1, "found -1: Input should be greater than 0"),
        ("save_steps", 0, "found 0: Input should be greater than 0"),
        ("logging_steps", -5, "found -5: Input should be greater than 0"),
        ("eval_strategy", "always", "found 'always': Input should be 'no', 'steps' or 'epoch'"),
        ("bf16", "yes", "found 'yes': Input should be a valid boolean"),
        ("bf16", "false", "found 'false': Input should be a valid boolean"),
        ("gradient_checkpointing", "no", "found 'no': Input should be a valid boolean"),
        ("optim", "adamw_torhc", "found 'adamw_torhc', expected one of .*; did you mean 'adamw_torch'"),
        ("optim", "galore_adamw", "found 'galore_adamw', expected one of"),
        ("lr_scheduler_type", "cosin", "found 'cosin', expected one of .*; did you mean 'cosine'"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "found .*, expected one of"),
        ("report_to", ["tensorboard", "wandbb"], "found 'wandbb', expected none or some of .*; did you mean 'wandb'"),
        ("dataloader_num_workers", -1, "found -1: Input should be greater than or equal to 0"),
        ("dataloader_prefetch_factor", 2, "needs training.dataloader_num_workers above 0"),
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError, match=rf"^x\.yaml: training\.{key}: {expected}"):
        _parse({key: value})


@pytest.mark.parametrize("key", sorted({*ELSEWHERE, "hub_token"}))
def test_a_key_without_effect_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"^x\.yaml: training\.{key} is not set here: "):
        _parse({key: 1})


def test_the_section_has_arguments_of_the_trainer_and_every_argument_is_known() -> None:
    """A new version of transformers brings new arguments: each is taken in, or refused with a reason."""
    arguments = {name for name, field in TrainingArguments.__dataclass_fields__.items() if field.init}
    assert set(TrainingSection.model_fields) <= arguments
    without_effect = {
        # evaluation is our own (held_out.py), and so are hub, console and memory reports
        "bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "eval_accumulation_steps", "batch_eval_metrics",
        "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", "do_train", "do_eval", "do_predict",
        "use_cache", "debug", "skip_memory_metrics", "log_level", "log_level_replica", "log_on_each_node",
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        "gradient_checkpointing", "gradient_checkpointing_kwargs",  # the older names
    }  # fmt: skip
    hub = {name for name in arguments if name.startswith("hub_")}
    assert arguments - set(TrainingSection.model_fields) - set(ELSEWHERE) - hub == without_effect


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe": {**tiny_moe(), "competition_rate": 2}}, "moe.competition_rate: found 2: Input should be less"),
        ({"moe": {"language": {"router": "softmx"}}}, "moe.language.router: found 'softmx', expected one of softmax,"),
        ({"moe": 5}, "moe: found 5: expected a section with keys or Input should be False"),
        ({"moe": {"language": {"layers": [1, -1]}}}, "moe.language.layers: expected distinct layer numbers"),
        ({"seed": -1}, "seed: found -1: Input should be greater than or equal to 0"),
        ({"seed": 2**32}, "seed: found 4294967296: Input should be less than 4294967296"),
        ({"output_dir": ""}, "output_dir: found '', expected a path"),
        ({"model": {"checkpoint": ""}}, "model.checkpoint: found '', expected a path"),
        ({"output_dir": "${NOWHERE}/out"}, "output_dir: found '${NOWHERE}/out', but $NOWHERE is not set"),
        ({"data": {"sources": [{"name": "a"}]}}, "missing key 'data.sources.0.path'"),
    ],
)
def test_a_wrong_key_has_the_name_it_has_in_the_file(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        _parse(**changes)
    assert str(caught.value).startswith(f"x.yaml: {expected}")
    assert str(caught.value).count("Input should") <= 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"router": "softmax"}, "moe.language.router: found 'softmax', the checkpoint has 'competition'"),
        (
            {"num_experts": 4, "num_experts_per_tok": 1},
            "moe.language.num_experts_per_tok: found 1, the checkpoint has 2",
        ),
    ],
    ids=["router", "chosen"],
)
def test_moe_settings_that_do_not_fit_the_checkpoint_are_named(changes: dict[str, Any], expected: str) -> None:
    # The affinity kept from the checkpoint belongs to its router: validation alone would blame the affinity.
    stored = MoeConfig.model_validate({"language": {"affinity": "relu"}}).model_dump(mode="json")
    with pytest.raises(UserError, match=re.escape(expected)):
        moe_in_force(_parse(moe={"language": {**changes}}), stored)


def test_moe_settings_kept_from_the_checkpoint_must_fit_the_config_s() -> None:
    stored = MoeConfig.model_validate({"language": {"competition_chunk_tokens": 8}}).model_dump(mode="json")
    config = _parse(moe={"language": {"competition_keeps": "everything"}})
    with pytest.raises(UserError, match=r"with the config's moe: language: competition_keeps: found 'everything'"):
        moe_in_force(config, stored)


def test_home_and_variables_in_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("RUNS", "/runs")
    sources = [{"name": "a", "path": "~/data/a.json", "image_folder": "${RUNS}/images"}]
    content = stage_config("sft", Path("x"), Path("y"), model={"checkpoint": "${RUNS}/parent"}) | {"moe": tiny_moe()}
    dump_yaml(content | {"data": {"sources": sources}}, tmp_path / "c.yaml")
    config = load_config(TrainConfig, tmp_path / "c.yaml", ["output_dir=${RUNS}/out", "training.run_name=a~/b"])
    assert str(config.output_dir) == "/runs/out"
    assert str(config.model.checkpoint) == "/runs/parent"
    (source,) = config.data.sources  # type: ignore[union-attr]
    assert (str(source.path), str(source.image_folder)) == ("/home/ada/data/a.json", "/runs/images")
    assert config.training.run_name == "a~/b"


def test_the_saved_config_is_read_again_as_it_was(tmp_path: Path) -> None:
    config = _parse({"gradient_checkpointing": True, "warmup_steps": 0.03})
    dump_yaml(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"fp16": True}, "training.fp16: needs a GPU"),
        ({"optim": "schedule_free_adamw"}, "training.optim: schedule_free_adamw: .*install"),
        ({"optim_args": "nonsense=1", "optim": "adamw_torch_4bit"}, "training.optim: adamw_torch_4bit: "),
        ({"torch_compile_backend": "inductorr"}, "training.torch_compile_backend: found 'inductorr', expected one of"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "training.lr_scheduler_kwargs: warmup_stable_decay: "),
        ({"lr_scheduler_kwargs": {"cycles": 3}}, "training.lr_scheduler_kwargs: linear: .*cycles"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3}, "learning_rate": 1e-4},
            r"training.lr_scheduler_kwargs: polynomial: lr_end \(0.001\) must be smaller than initial lr \(0.0001\)",
        ),
    ],
)
def test_what_the_machine_lacks_is_said_before_anything_is_loaded(
    tmp_path: Path, training: dict[str, Any], expected: str
) -> None:
    section = TrainingSection.model_validate(training)
    with pytest.raises(UserError, match=expected):
        build_arguments(section, output_dir=tmp_path, seed=0, deepspeed=None, on_gpu=False)


def test_an_optimizer_with_weights_of_its_own_for_evaluation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of `schedulefree`, which is not installed here."""

    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None: ...

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (ScheduleFree, {"lr": 1.0}))
    with pytest.raises(UserError, match=r"training.optim: adamw_torch has other weights for evaluation"):
        build_arguments(TrainingSection(), output_dir=tmp_path, seed=0, deepspeed=None, on_gpu=False)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stage that may read its data, but must not get as far as a model."""

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "start_model", too_late)
    data = write_data(tmp_path / "data", rows=4)
    return stage_config("sft", data, tmp_path / "out", moe=tiny_moe(), deepspeed=None)


@pytest.mark.parametrize("name", ["dvclive", "wandb"])
def test_a_logger_that_cannot_log_is_refused(
    stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    stage["training"]["report_to"] = name
    expected = {"dvclive": "dvclive: .*install", "wandb": "wandb has no login here; run `wandb login`"}
    with pytest.raises(UserError, match=f"training.report_to: {expected[name]}"):
        run_stage_here(stage)


def test_an_output_dir_that_cannot_be_written_is_one_line(stage: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, expected in ((tmp_path / "file", "is a file, expected a directory"), ("/proc/x", "cannot write there")):
        with pytest.raises(UserError, match=f"output_dir: {place}: .*{expected}"):
            run_stage_here(stage | {"output_dir": str(place)})
    with pytest.raises(UserError, match=r"output_dir: .*file is a file, expected a directory"):
        run_stage_here(stage | {"output_dir": str(tmp_path / "file" / "below")})


@pytest.mark.parametrize("skip", [False, True])
def test_a_wrong_image_folder_is_found_at_the_start(
    stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    stage["data"]["on_bad_image"] = "skip" if skip else "error"
    stage["data"]["sources"][0]["image_folder"] = str(tmp_path)
    expected = rf"data source 'tiny': 3 of 3 sampled images are not there, the first: .*1\.png.*now {tmp_path}$"
    with pytest.raises(UserError, match=expected):
        run_stage_here(stage)
    del stage["data"]["sources"][0]["image_folder"]
    os.unlink(tmp_path / "data" / "images" / "2.png")
    if skip:  # one that is missing is what `skip` is for
        monkeypatch.undo()
        run_stage_here(stage | {"training": stage["training"] | {"max_steps": 1}})
        return
    with pytest.raises(UserError, match="1 of 3 sampled images are not there"):
        run_stage_here(stage)


@pytest.mark.parametrize("name", ["mine.yaml", "sub/mine.yaml"])
def test_a_relative_config_is_looked_for_where_the_user_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    names = f"{name} configs/demo/sft.yaml {tmp_path / name} nowhere.yaml"
    script = f'source {ROOT}/scripts/lib/common.sh; for path in {names}; do from_caller "$path"; done'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    own = str(tmp_path / name)
    assert done.stdout.split() == [own, "configs/demo/sft.yaml", own, "nowhere.yaml"]


@pytest.mark.slow
def test_a_stage_script_reads_a_relative_config_from_any_folder(tmp_path: Path) -> None:
    dump_yaml({**stage_config("sft", Path("d.json"), tmp_path / "out"), "wrong_key": 1}, tmp_path / "mine.yaml")
    command = ["bash", str(ROOT / "scripts" / "sft.sh"), "mine.yaml"]
    environment = {**os.environ, **stage_environment(1)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: {tmp_path}/mine.yaml: unknown key 'wrong_key'" in done.stderr
