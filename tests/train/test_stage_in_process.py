"""Whole stages in this process: one rank, no DeepSpeed, tiny models (launched: test_stage_launch, _resume, _faults)."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_kit import LAUNCHER, assert_same_curve, at_step, fail, run_stage_here
from nan_worker import breaking_backward
from safetensors.torch import load_file
from stage_kit import fresh_model, read_metrics, stage_config, tiny_moe, write_data
from transformers.models.llama.modeling_llama import LlamaAttention

from llava_compete.config import parse_config
from llava_compete.errors import UserError
from llava_compete.model.build import load_checkpoint
from llava_compete.model.language_head import LanguageHead
from llava_compete.model.upcycle import upcycle
from llava_compete.train import checkpoints, run, saving, trainer
from llava_compete.train.callbacks import progress as watch
from llava_compete.train.config import TrainConfig

FRESH = {"moe": tiny_moe(), "deepspeed": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _forget_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")


def test_stages_one_after_the_other(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[torch.Size] = []
    plain = LanguageHead.__call__

    def head(self: LanguageHead, hidden: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        heads.append(hidden.shape)
        return plain(self, hidden, module)

    monkeypatch.setattr(LanguageHead, "__call__", head)
    training = {"max_steps": 3, "logging_steps": 1}
    dense = run_stage_here(stage_config("pretrain_align", data, tmp_path / "dense", training=training, deepspeed=None))
    card = (dense / "README.md").read_text()
    assert 'from_pretrained("dense")' in card
    assert "## Data\n\n- " in card
    moe = parse_config(TrainConfig, stage_config("sft", data, tmp_path, moe=tiny_moe()), "x").moe
    assert moe
    upcycle(dense, tmp_path / "moe", moe, 0)
    parent = {"checkpoint": str(tmp_path / "moe")}
    tuned = run_stage_here(stage_config("sft", data, tmp_path / "sft", model=parent, training=training, deepspeed=None))

    # Logits of labelled positions side by side, never of 4 rows of a micro-batch.
    assert len(heads) >= 6
    assert all(shape[0] == 1 for shape in heads)
    model, _ = load_checkpoint(tuned)
    assert model.config.stage == "sft"
    assert model.config.parents[-1] == "upcycle"
    record = read_metrics(tuned)[-1]
    assert record["step"] == 3
    for key in ("loss", "lm_loss", "language/aux_loss", "learning_rate", "grad_norm", "tokens_per_second"):
        assert isinstance(record[key], float)
    assert len(record["expert_load/language.0"]) == 4
    assert sum(record["expert_load/language.0"]) == pytest.approx(1.0)
    assert record["dropped/language.0"] == 0
    for key in ("supervised_tokens_per_second", "memory_gib", "learning_rate/projector", "competition_share"):
        assert record[key] >= 0
    for name in ("router_entropy/language.0", "router_margin/language.0"):
        assert record[name] > 0
    for source in ("task", "distillation", "balance", "z"):
        assert any(line.get(f"router_gradient_{source}/language.0", 0) > 0 for line in read_metrics(tuned)), source
    log = [line for line in read_metrics(tuned) if "router_agreement/language.0" in line]
    assert all(0 < line["response_entropy/language.0"] <= math.log(4) + 1e-6 for line in log)
    assert all(0 <= line["router_agreement/language.0"] <= 1 for line in log)
    end = json.loads((tuned / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["steps"]) == ("end", 3)
    assert end["competition_steps"] >= 1
    manifest = json.loads((tuned / "run" / "manifest.json").read_text())
    assert manifest["identity"]["stage"] == "sft"
    assert [row["part"] for row in manifest["trainable"]] == ["vision", "projector", "language"]

    # A finished stage is left as it is.
    before = (tuned / "model.safetensors").stat().st_mtime_ns
    run_stage_here(stage_config("sft", data, tmp_path / "sft", model=parent, training=training, deepspeed=None))
    assert (tuned / "model.safetensors").stat().st_mtime_ns == before

    with pytest.raises(UserError, match=r"dense: a dense checkpoint, but sft trains a MoE; run upcycle first"):
        run_stage_here(stage_config("sft", data, tmp_path / "no", model={"checkpoint": str(dense)}, deepspeed=None))
    with pytest.raises(UserError, match=r"moe: has MoE blocks, but pft trains a dense model"):
        run_stage_here(stage_config("pft", data, tmp_path / "no2", model=parent, deepspeed=None))
    with pytest.raises(UserError, match=r"holds the model of stage 'sft', found stage 'pft'"):
        run_stage_here(stage_config("pft", data, tuned, model={"checkpoint": str(dense)}, deepspeed=None))
    with pytest.raises(UserError, match=r"holds the model of stage 'upcycle', found stage 'sft'"):
        run_stage_here(
            stage_config("sft", data, Path(parent["checkpoint"]), model={"checkpoint": str(tuned)}, deepspeed=None)
        )


def test_a_kernel_that_is_not_there_is_named_before_a_model_is_built(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "start_model", fail)
    moe = tiny_moe(language={"num_experts": 4, "experts_implementation": "sonicmoe"})
    with pytest.raises(UserError, match="experts_implementation: 'sonicmoe' cannot run here"):
        run_stage_here(stage_config("sft", data, tmp_path / "out", moe=moe, deepspeed=None))


def test_loss_does_not_depend_on_micro_batches_or_checkpointing(data: Path, tmp_path: Path) -> None:
    straight = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    one = run_stage_here(stage_config("sft", data, tmp_path / "8x1", training=straight, **FRESH))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert_same_curve(one, run_stage_here(stage_config("sft", data, tmp_path / "1x8", training=split, **FRESH)))
    recomputed = {**straight, "activation_checkpointing": True}
    assert_same_curve(
        one, run_stage_here(stage_config("sft", data, tmp_path / "recomputed", training=recomputed, **FRESH))
    )


def test_resume_equals_straight(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 steps an epoch: step 4 is inside the second.
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 4}
    straight = run_stage_here(stage_config("sft", data, tmp_path / "straight", training=training, **FRESH))
    broken = stage_config("sft", data, tmp_path / "broken", training=training, **FRESH)
    at_step(monkeypatch, 5, fail)
    with pytest.raises(KeyboardInterrupt):
        run_stage_here(broken)
    assert [path.name for path in checkpoints.list_complete(tmp_path / "broken")] == ["checkpoint-4"]
    (tmp_path / "broken" / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match=r"the run has changed: seed was 0, is 1"):
        run_stage_here({**broken, "seed": 1})
    with pytest.raises(UserError, match=r"per_device_train_batch_size was 4, is 2"):
        run_stage_here({**broken, "training": {**broken["training"], "per_device_train_batch_size": 2}})
    assert_same_curve(straight, run_stage_here(broken), tolerance=1e-6)
    assert load_file(straight / "model.safetensors").keys() == load_file(tmp_path / "broken/model.safetensors").keys()


def test_sigterm_saves_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_stage_here(stage_config("sft", data, tmp_path / "straight", **FRESH))
    config = stage_config("sft", data, tmp_path / "stopped", **FRESH)
    at_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    stopped = run_stage_here(config)
    assert checkpoints.read_finished(stopped) is None
    assert [path.name for path in checkpoints.list_complete(stopped)] == ["checkpoint-3"]
    assert_same_curve(straight, run_stage_here(config), tolerance=1e-6)


def test_a_run_that_is_told_to_stop_does_not_evaluate_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor at the end of an epoch that it breaks off, where it would save once more."""
    saved: list[int] = []
    plain = checkpoints.publish
    monkeypatch.setattr(checkpoints, "publish", lambda *rest: (saved.append(1), plain(*rest)))
    training = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    config = stage_config("sft", data, tmp_path / "out", training=training, sample_steps=3, **FRESH)
    config["data"]["validation_fraction"] = 0.1
    at_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    out = run_stage_here(config)
    assert [path.name for path in checkpoints.list_complete(out)] == ["checkpoint-3"]
    assert len(saved) == 1
    assert "eval_loss" not in (out / "run" / "metrics.jsonl").read_text()
    assert not (out / "run" / "answers.jsonl").exists()
    assert "stopped at step 3; the same command goes on from here" in capsys.readouterr().err


def test_non_finite_steps_are_skipped_then_stop_therun_stage_here(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trainer.StageTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        if self.state.global_step >= 2 and "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        return plain(self, model, inputs, *rest, **options)

    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", compute_loss)
    training = {"max_steps": 12, "save_steps": 2, "per_device_train_batch_size": 8}
    terms = (
        r"not finite: layer vision\.0, lm_loss, .*stopped after 2 such steps in a row \(guards\.max_bad_steps is 1\)"
    )
    with pytest.raises(UserError, match=terms):
        run_stage_here(
            stage_config("sft", data, tmp_path / "nan", training=training, guards={"max_bad_steps": 1}, **FRESH)
        )
    good = checkpoints.list_complete(tmp_path / "nan")[0]
    assert all(tensor.isfinite().all() for tensor in load_file(good / "model.safetensors").values())
    assert "NaN" not in (tmp_path / "nan" / "run" / "metrics.jsonl").read_text()


def test_a_step_that_the_loss_scale_skipped_is_one_bad_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 without DeepSpeed, switched on behind the stage's back, which refuses it on a CPU."""
    make, plain = trainer.StageTrainer.create_optimizer, trainer.StageTrainer.compute_loss

    def create_optimizer(self: Any, model: Any = None) -> Any:
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
        return make(self, model)

    def compute_loss(self: Any, *rest: Any, **options: Any) -> Any:
        return plain(self, *rest, **options) * (math.inf if self.state.global_step == 1 else 1)

    monkeypatch.setattr(trainer.StageTrainer, "create_optimizer", create_optimizer)
    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", compute_loss)
    out = run_stage_here(stage_config("sft", data, tmp_path / "out", training={"max_steps": 4}, **FRESH))
    assert [line["step"] for line in read_metrics(out) if line["loss"] is None] == [2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_that_breaks_in_the_backward_alone_names_its_layer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    monkeypatch.setattr(LlamaAttention, "forward", breaking_backward(LlamaAttention.forward))
    training = {"max_steps": 2, "gradient_checkpointing": checkpointing}
    where = (
        r"not finite: the gradient norm, the gradient at the output of layer \S+layers\.1\.self_attn\.o_proj; stopped"
    )
    with pytest.raises(UserError, match=where):
        run_stage_here(
            stage_config("sft", data, tmp_path / "nan", training=training, guards={"max_bad_steps": 0}, **FRESH)
        )


def test_exactly_the_trainable_tensors_change(data: Path, tmp_path: Path) -> None:
    start = run_stage_here(
        stage_config("pretrain_align", data, tmp_path / "start", training={"max_steps": 1}, deepspeed=None)
    )
    tuned = run_stage_here(
        stage_config(
            "pft",
            data,
            tmp_path / "tuned",
            model={"checkpoint": str(start)},
            trainable={"projector": {"mode": "full", "learning_rate": 0.01}},
            training={"max_steps": 1},
            deepspeed=None,
        )
    )
    before, after = load_file(start / "model.safetensors"), load_file(tuned / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.multi_modal_projector.")}


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"save_steps": 2, "save_only_model": True}
    config = stage_config("sft", data, tmp_path / "out", training=training, **FRESH)
    at_step(monkeypatch, 3, fail)
    with pytest.raises(KeyboardInterrupt):
        run_stage_here(config)
    assert not list((tmp_path / "out" / "checkpoint-2").glob("optimizer*"))
    with pytest.raises(UserError, match=r"checkpoint-2: holds the model alone \(training\.save_only_model\)"):
        run_stage_here(config)


def test_held_out_loss_and_answers(data: Path, tmp_path: Path) -> None:
    content = stage_config(
        "sft",
        data,
        tmp_path / "out",
        training={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3},
        sample_steps=2,
        **FRESH,
    )
    with pytest.raises(UserError, match=r"sample_steps: needs held-out rows; set data\.validation_fraction"):
        run_stage_here(content)
    content["data"]["validation_fraction"] = 0.3
    (source,) = content["data"]["sources"]
    content["data"]["sources"] = [source | {"name": "first"}, source | {"name": "again"}]
    out = run_stage_here(content)
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "eval_loss" in line]
    assert len(losses) == 2
    for line in losses:
        assert 0 < line["eval_loss"] < 10
        # The same rows twice under two names.
        assert line["eval_loss/first"] == pytest.approx(line["eval_loss"], rel=1e-6)
        assert line["eval_loss/again"] == pytest.approx(line["eval_loss"], rel=1e-6)
    answers = [json.loads(line) for line in (out / "run" / "answers.jsonl").read_text().splitlines()]
    assert {"step", "id", "prompt", "expected", "generated"} == set(answers[0])


def test_a_full_disk_leaves_the_last_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.StageTrainer._save_rng_state

    def no_room(self: Any, directory: str) -> None:
        if self.state.global_step == 4:
            monkeypatch.setattr(saving, "FULL_DISK_BYTES", 2**62)
            raise OSError(28, "No space left on device")
        real(self, directory)

    monkeypatch.setattr(trainer.StageTrainer, "_save_rng_state", no_room)
    config = stage_config("sft", data, tmp_path / "out", training={"save_steps": 2}, **FRESH)
    with pytest.raises(UserError, match=r"the disk is full .* checkpoint-4 was not written"):
        run_stage_here(config)
    monkeypatch.setattr(trainer.StageTrainer, "_save_rng_state", real)
    assert [path.name for path in checkpoints.list_complete(tmp_path / "out")] == ["checkpoint-2"]
    out = run_stage_here(config)
    assert checkpoints.read_finished(out) is not None
    assert not (out / checkpoints.STAGING).exists()


def test_everything_watched_reaches_tensorboard(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setattr(run, "device_peak", lambda _: 1e12)
    training = {"max_steps": 4, "report_to": "tensorboard"}  # in which every part competes
    out = run_stage_here(stage_config("sft", data, tmp_path / "out", training=training, **FRESH))
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    shown = {tag.removeprefix("train/") for tag in board.Tags()["scalars"]}
    records = read_metrics(out)
    logged = {key for record in records for key, value in record.items() if isinstance(value, int | float)}
    assert logged - shown == {"step"}
    assert {"expert_load_min/vision.0", "time/competition_step", "competition_share", "mfu", "memory_gib"} <= shown
    assert all(0 < record["mfu"] < 1 for record in records)
    terms = ("distillation_loss", "winner_distillation_loss", "diversity_loss", "balance_loss", "aux_loss")
    assert {f"{part}/{term}" for part in ("vision", "projector", "language") for term in terms} <= shown


def test_router_collapse_is_a_warning(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of 2 choices a token, expert 3 of language.1 gets 0.4% (0.8% of tokens), expert 3 of language.0 0.6% (1.2%).
    loads = {"language.0": [0.4, 0.3, 0.294, 0.006], "language.1": [0.4, 0.3, 0.296, 0.004]}
    monkeypatch.setattr(watch, "expert_loads", lambda _: loads.items())
    run_stage_here(stage_config("sft", data, tmp_path / "out", training={"max_steps": 4}, **FRESH))
    (warning,) = re.findall("warning: .*collapse.*", capsys.readouterr().err)
    assert warning == "warning: step 3: router collapse in language.1: expert 3 got 0.80% of tokens for 3 logging steps"


def test_rows_longer_than_the_models_context_are_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    content = stage_config("sft", data, tmp_path / "out", **FRESH)
    content["data"]["max_length"] = 257
    with pytest.raises(UserError, match=r"data\.max_length: found 257, but the language model's context is 256"):
        run_stage_here(content)


@pytest.mark.parametrize("where", ["forward", "optimizer step"])
def test_out_of_memory_says_what_did_not_fit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def no_memory(*_: Any, **options: Any) -> Any:
        torch.empty(2**60)

    if where == "forward":
        monkeypatch.setattr(trainer.StageTrainer, "compute_loss", no_memory)
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", no_memory)
    expected = (
        r"out of memory in step 1: micro-batch of 4 rows, padded to \d+ tokens, \d images.* Halve "
        r"training\.per_device_train_batch_size \(now 4\).*training\.activation_checkpointing=true"
    )
    with pytest.raises(UserError, match=expected):
        run_stage_here(stage_config("sft", data, tmp_path / "out", **FRESH))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", [True, "layers"])
def test_a_compiled_model_trains_alike(how: Any, data: Path, tmp_path: Path) -> None:
    """One layer and one block: each is compiled for either kind of step, and again when lengths change."""
    model = fresh_model()
    model["language_model"]["config"]["num_hidden_layers"] = 1
    model["vision_tower"]["config"]["vision_cfg"]["layers"] = 2
    moe = {key: value for key, value in tiny_moe().items() if key not in ("vision", "projector")}
    options = {"model": model, "moe": moe, "deepspeed": None}
    plain = run_stage_here(stage_config("sft", data, tmp_path / "plain", **options))
    compiled = {"torch_compile": how, "torch_compile_backend": "aot_eager"}
    assert_same_curve(
        plain, run_stage_here(stage_config("sft", data, tmp_path / "compiled", training=compiled, **options))
    )
