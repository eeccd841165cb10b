"""`llava-compete eval` as a user runs it: lmms-eval's command line in a subprocess, without a network."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from kit import NUM_DOCUMENTS, read_samples, save_tiny, write_tasks

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation import runner
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.launch import command
from llava_compete.evaluation.suites import check_local_data, find_local_tasks

TASKS = ["local_generate", "local_choice", "local_rounds"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("stage") / "sft")


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def config(checkpoint, tasks_folder, tmp_path_factory):
    return EvalConfig(
        checkpoint=str(checkpoint),
        tasks=TASKS,
        include_path=str(tasks_folder),
        output_dir=str(tmp_path_factory.mktemp("out") / "eval"),
        batch_size=3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def finished(config):
    """The one full run that most tests look at."""
    return runner.evaluate(config)


def test_summary_says_what_was_scored_and_from_what(config, finished):
    summary = json.loads((config.directory / "summary.json").read_text())
    assert summary == finished
    task = summary["tasks"]["local_generate"]
    assert task["n"] == NUM_DOCUMENTS
    assert set(task["by_type"]) == {"none", "one", "two"}
    assert task["accuracy"] == task["metrics"]["accuracy"]
    assert summary["tasks"]["local_choice"]["accuracy"] == summary["tasks"]["local_choice"]["metrics"]["acc"]
    assert (
        summary["checkpoint"]["sha256"]
        == runner.checkpoint_facts(config.directory.__class__(config.checkpoint))["sha256"]
    )
    assert summary["checkpoint"]["moe"] is True
    assert summary["versions"]["lmms-eval"]
    assert summary["seconds"] > 0
    assert len(read_samples(config.directory, "local_generate")) == NUM_DOCUMENTS
    assert (config.directory / "run" / "manifest.json").is_file()
    assert (config.directory / "eval.log").read_text().startswith("$ ")
    assert not list((config.directory / "lmms_eval").glob("datasets-*"))


def test_a_stopped_suite_goes_on_with_the_tasks_that_are_missing(config, finished, monkeypatch, tmp_path):
    """Finished tasks are not run again; another checkpoint, limit or data table makes them stale."""
    directory = tmp_path / "eval"
    shutil.copytree(config.directory, directory)
    asked = []

    def not_now(config, tasks, *rest):
        asked.append(tasks)
        raise UserError("asked to run")

    monkeypatch.setattr(runner, "run_lmms_eval", not_now)
    again = config.model_copy(update={"output_dir": str(directory), "batch_size": 8})
    assert runner.evaluate(again)["tasks"] == finished["tasks"]

    (directory / "tasks" / "local_choice.json").unlink()
    with pytest.raises(UserError, match="asked to run"):
        runner.evaluate(again)
    assert asked == [["local_choice"]]

    other_data = tmp_path / "tasks"
    shutil.copytree(config.include_path, other_data)
    for name in ("documents.parquet",):
        os.truncate(other_data / name, 100)
    for changes in ({"limit": 2}, {"competition_at_inference": True}, {"include_path": str(other_data)}):
        with pytest.raises(UserError, match="asked to run"):
            runner.evaluate(config.model_copy(update=changes))
        assert asked[-1] == TASKS


@pytest.mark.slow
def test_a_failing_document_fails_the_command(checkpoint, tasks_folder, tmp_path, capsys):
    """lmms-eval alone would end with status 0."""
    settings = tmp_path / "eval.yaml"
    settings.write_text(
        f"checkpoint: {checkpoint}\ntasks: [local_broken]\ninclude_path: {tasks_folder}\noutput_dir: {tmp_path}/eval\n"
        "batch_size: 4\ndevice: cpu\n"
    )
    assert main(["eval", "--config", str(settings)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "task local_broken, split test, document 3: OSError: image file is truncated" in error
    assert not (tmp_path / "eval" / "summary.json").exists()
    assert not (tmp_path / "eval" / "tasks").exists()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(config, finished, tmp_path):
    """11 documents on 2 ranks: one rank gets a padding request."""
    two = runner.evaluate(config.model_copy(update={"processes": 2, "output_dir": str(tmp_path / "eval")}))
    assert "torch.distributed.run" in (tmp_path / "eval" / "eval.log").read_text().splitlines()[0]
    for task in ("local_generate", "local_rounds"):
        assert read_samples(tmp_path / "eval", task) == read_samples(config.directory, task)
    assert two["tasks"]["local_choice"]["accuracy"] == finished["tasks"]["local_choice"]["accuracy"]


@pytest.mark.slow
def test_a_failure_on_one_of_two_ranks_ends_the_run(config, tmp_path):
    broken = {"processes": 2, "output_dir": str(tmp_path / "eval"), "tasks": ["local_broken"]}
    with pytest.raises(UserError, match="document 3: OSError"):
        runner.evaluate(config.model_copy(update=broken))


def test_command_line_of_lmms_eval(config, tmp_path):
    words = command(config.model_copy(update={"limit": 5, "adapter": "lora"}), ["a", "b"], tmp_path)
    text = " ".join(words)
    assert "-m lmms_eval --model llava_compete" in text
    assert "--tasks a,b" in text
    assert "adapter=lora" in text
    assert "--limit 5" in text
    assert "--log_samples" in text
    assert "torch.distributed.run" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CKPT"], "expected --suite NAME or --tasks"),
        (["CKPT", "--suite", "papr"], "did you mean 'paper'"),
        (["nowhere", "--suite", "demo"], "no checkpoint here"),
        (["OTHER", "--suite", "demo"], "model_type is 'llava'"),
        (["a,b", "--suite", "demo"], "cannot hold a path with ','"),
        ([], "expected a checkpoint directory"),
        (["--config", "configs/demo/eval.yaml", "suit=demo"], "did you mean 'suite'"),
        (["--config", "configs/demo/eval.yaml", "--limit", "3"], "give settings as key=value"),
        (["--config", "configs/demo/eval.yaml", "tasks=[pope]"], "either suite or tasks"),
    ],
)
def test_bad_input_is_one_line(arguments, message, checkpoint, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava"}')
    names = {"CKPT": str(checkpoint), "OTHER": str(other)}
    assert main(["eval", *[names.get(word, word) for word in arguments]]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_local_data_are_checked_before_the_run(tasks_folder, tmp_path):
    folder = tmp_path / "tasks"
    shutil.copytree(tasks_folder, folder)
    task = find_local_tasks(folder)["local_generate"]
    check_local_data(task)
    (folder / "meta.json").write_text(json.dumps({"tasks": {"local_generate": {"sha256": "0" * 64, "chance": 0.1}}}))
    with pytest.raises(UserError, match="SHA-256 differs"):
        check_local_data(find_local_tasks(folder)["local_generate"])
    (folder / "documents.parquet").unlink()
    with pytest.raises(UserError, match=r"documents\.parquet: data of task local_generate is missing"):
        check_local_data(find_local_tasks(folder)["local_generate"])
