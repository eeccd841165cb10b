"""Stages whose experts are spread over ranks: weights of one process, saved, resumed, resumed on other ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launch_kit import below, launch_config, ranks_of, running, started, wait_for_step
from PIL import Image
from safetensors.torch import load_file
from stage_kit import read_metrics, run_stage, stage_config, tiny_moe, write_data
from zero_grid import Grid

from llava_compete.evaluation.answerer import Answerer, Prompt
from llava_compete.evaluation.generation_settings import GenerationSettings
from llava_compete.model.build import load_checkpoint

JUDGED = {"num_experts": 4, "num_experts_per_tok": 2, "competition_judge": "loss", "competition_answers": "both"}
TOLERANCE = 1e-5
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Stages:
    """Runs stages in one launch a list; what they need and leave is below one folder."""

    def __init__(self, folder: Path) -> None:
        self.grid = Grid(folder)
        self.data = write_data(folder / "data", rows=48)

    def config(self, name: str, spread: int = 1, micro: int = 8, zero: str | None = None, **changes: Any) -> Any:
        # Adam would make a whole step of a gradient that is 0 but for rounding, such as that of a key's bias.
        training = {"per_device_train_batch_size": micro, "adam_epsilon": 1e-3, **changes.pop("training", {})}
        moe = {**changes.pop("moe", tiny_moe()), "expert_parallel": spread}
        return stage_config(
            "sft", self.data, self.grid.folder / name, training=training, moe=moe, deepspeed=zero, **changes
        )

    def run(self, ranks: int, *configs: dict[str, Any]) -> list[Path]:
        path = self.grid.folder / "todo.json"
        path.write_text(json.dumps(configs), encoding="utf-8")
        said = self.grid._launch(ranks, ["--starts", str(path)])
        outs = [Path(config["output_dir"]) for config in configs]
        for out in outs:
            assert (out / "model.safetensors").is_file(), said
        return outs


def same(left: Path, right: Path) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (left, right))
    assert ours.keys() == theirs.keys()
    errors = {
        name: float((ours[name].float() - right.float()).norm() / right.float().norm().clamp(min=1e-3))
        for name, right in theirs.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])


def answers(directory: Path, data: Path) -> tuple[list[str], list[float]]:
    """On this one process, of rows with a picture: what the model writes, and how unlikely it finds right answers."""
    rows = [row for row in json.loads(data.read_text(encoding="utf-8")) if "image" in row][:8]
    asked, right = zip(*([turn["value"] for turn in row["conversations"]] for row in rows), strict=True)
    prompts = [
        Prompt(text, lambda path=data.parent / row["image"]: [Image.open(path)])
        for text, row in zip(asked, rows, strict=True)
    ]
    answerer = Answerer(*load_checkpoint(directory), batch_size=4)
    written = answerer.generate(prompts, [GenerationSettings.from_task({"max_new_tokens": 12})] * len(prompts))
    return written, [result.negative_log_likelihood for result in answerer.log_likelihoods(prompts, right)]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("spread"))


@pytest.fixture(scope="module")
def alone(stages: Stages) -> dict[str, Path]:
    """One process without DeepSpeed."""
    judged = tiny_moe(vision=JUDGED, projector=JUDGED, language=JUDGED)
    one, two = stages.run(1, stages.config("alone"), stages.config("alone judged", moe=judged))
    return {"": one, " judged": two}


def test_stages_are_those_of_one_process(stages: Stages, alone: dict[str, Path]) -> None:
    judged = tiny_moe(vision=JUDGED, projector=JUDGED, language=JUDGED)
    accumulated = {"gradient_accumulation_steps": 2, "activation_checkpointing": True}
    configs = [
        stages.config("zero1", 2, 4, "zero1"),
        stages.config("zero2", 2, 2, "zero2", training=accumulated),
        stages.config("judged", 2, 4, "zero2", moe=judged),
        stages.config("zero3", 1, 4, "zero3"),  # whose directory is streamed too
    ]
    outs = stages.run(2, *configs)
    for out, reference in zip(outs, ("", "", " judged", ""), strict=True):
        same(out, alone[reference])
        assert json.loads((out / "config.json").read_text()) == json.loads(
            (alone[reference] / "config.json").read_text()
        )
        for ours, theirs in zip(read_metrics(out), read_metrics(alone[reference]), strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    written, costs = answers(outs[1], stages.data)
    expected, expected_costs = answers(alone[""], stages.data)
    assert written == expected
    assert costs == pytest.approx(expected_costs, rel=1e-4)


def test_a_stage_goes_on_with_experts_elsewhere(stages: Stages, alone: dict[str, Path]) -> None:
    """Saved by 2 ranks with 2 experts each at step 3; resumed alike, with all experts on each, and by one rank; and the
    other way."""
    half = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole, unspread = stages.run(
        2, stages.config("whole", 2, 4, "zero2", training=half), stages.config("unspread", 1, 4, "zero2", training=half)
    )
    configs = {}
    # The one without groups first: DeepSpeed keeps groups until its process ends.
    for name, source in (("gathered", whole), ("again", whole), ("alone again", whole), ("spread", unspread)):
        target = stages.grid.folder / name
        shutil.copytree(source / "checkpoint-3", target / "checkpoint-3")
        size, micro = (2 if name in ("again", "spread") else 1), 8 if name == "alone again" else 4
        configs[name] = stages.config(name, size, micro, "zero2", training=half)
    one = configs.pop("alone again")
    outs = stages.run(2, *configs.values())
    outs += stages.run(1, one)
    for out in outs:
        assert [record["step"] for record in read_metrics(out)] == [4, 5, 6]
        same(out, alone[""])


def test_a_rank_lost_in_mid_step_ends_all_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    moe = tiny_moe(expert_parallel=2)
    changes: dict[str, Any] = {"deepspeed": "zero2", "training": {"max_steps": 24, "save_steps": 4}}

    def config(name: str) -> dict[str, Any]:
        return {**launch_config(data, tmp_path / name, 4, 1, **changes), "moe": moe}

    said = tmp_path / "stderr"
    with said.open("wb") as file, started(config("out"), tmp_path / "c.yaml", stderr=file) as process:
        wait_for_step(process, tmp_path / "out", 5)
        everything, ranks = below(process.pid), ranks_of(process)
        ranks[1].kill()
        assert process.wait(timeout=300) != 0
        assert not running(everything)
    (error,) = [line for line in said.read_text(encoding="utf-8").splitlines() if line.startswith("error:")]
    assert "rank 1 of 2 was lost; the same command goes on from the last checkpoint" in error
    for name in ("out", "straight"):
        result = run_stage(config(name), tmp_path / f"{name}.yaml", timeout=900)
        assert result.returncode == 0, result.stderr
    assert read_metrics(tmp_path / "out")[0]["step"] == 1
    same(tmp_path / "out", tmp_path / "straight")
