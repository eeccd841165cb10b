"""`llava-compete eval` as a user runs it: lmms-eval's command line in a subprocess, without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from evaluation_kit import NUM_DOCUMENTS, SAME_IMAGE, read_samples, save_tiny, write_tasks

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation.compare.evaluation_dirs import read_method
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.lmms import benchmark_run as runner
from llava_compete.evaluation.lmms import output_files
from llava_compete.evaluation.lmms.launcher import command
from llava_compete.evaluation.lmms.output_files import read_run
from llava_compete.evaluation.lmms.suites import check_local_data, find_local_tasks
from llava_compete.evaluation.unit_scores import read_units

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


def test_a_stopped_suite_goes_on_with_the_tasks_that_are_missing(config, finished, monkeypatch, tmp_path, caplog):
    """Finished tasks are not run again; another checkpoint, limit, data table or scorer makes them stale."""
    directory = tmp_path / "eval"
    shutil.copytree(config.directory, directory)
    asked = []

    def not_now(config, tasks, *rest):
        asked.append(tasks)
        raise UserError("asked to run")

    monkeypatch.setattr(runner, "run_lmms_eval", not_now)
    again = config.model_copy(update={"output_dir": str(directory), "batch_size": 8})
    for task, code in (("local_generate", "now"), ("local_choice", None), ("local_rounds", "then")):
        path = directory / "tasks" / f"{task}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"code": code}))
    monkeypatch.setattr(output_files, "last_change", lambda *rooms: "now")
    assert runner.evaluate(again)["tasks"] == finished["tasks"]
    assert "before the last change of our own code, and kept: local_rounds; to have one anew" in caplog.text

    (directory / "tasks" / "local_choice.json").unlink()
    assert runner.evaluate(again)["failures"] == {"local_choice": "asked to run"}
    assert asked == [["local_choice"]]
    assert list(json.loads((directory / "summary.json").read_text())["tasks"]) == ["local_generate", "local_rounds"]

    other_data, other_scorer, other_weights = tmp_path / "tasks", tmp_path / "scorer", tmp_path / "weights"
    for copy in (other_data, other_scorer):
        shutil.copytree(config.include_path, copy)
    os.truncate(other_data / "documents.parquet", 100)
    with (other_scorer / "functions.py").open("a") as file:
        file.write("\n# another way to score\n")
    shutil.copytree(config.checkpoint, other_weights)
    (other_weights / "generation_config.json").write_text("{}")
    for changes in (
        {"limit": 2},
        {"competition_at_inference": True},
        {"include_path": str(other_data)},
        {"include_path": str(other_scorer)},
        {"checkpoint": str(other_weights)},
    ):
        asked.clear()
        (directory / "routing.json").touch()
        with pytest.raises(runner.EvaluationError, match="asked to run"):
            runner.evaluate(again.model_copy(update=changes))
        assert asked == [TASKS, *([task] for task in TASKS)]  # together, then each alone to see which of them fails
        for name in ("summary.json", "routing.json"):  # they would speak of other results than those beside them
            assert not (directory / name).exists()


def test_samples_say_which_questions_are_about_one_image(config, finished):
    """In the file that `compare` reads: lmms-eval drops the document, so the model writes the group down."""
    for task, per_document in (("local_generate", 1), ("local_choice", 1), ("local_rounds", 1)):
        lines = (config.directory / "samples" / f"{task}.jsonl").read_text().split("\n")[:-1]
        groups = [unit["group"] for unit in map(json.loads, lines)]
        assert len(groups) == per_document * NUM_DOCUMENTS
        assert groups[SAME_IMAGE[0]] == groups[SAME_IMAGE[1]] is not None
        others = [group for index, group in enumerate(groups) if index != SAME_IMAGE[1] and index % 3]
        assert len(set(others)) == len(others)
        assert all(group is None for index, group in enumerate(groups) if index % 3 == 0)  # no image: on its own
    assert "until" not in finished["tasks"]["local_rounds"]["generation"]
    choices = read_units(config.directory, "local_choice")
    assert {unit.answer for unit in choices} <= {"0", "1", "2"}
    assert all(unit.score == float(unit.answer == unit.target) for unit in choices)


def test_a_benchmark_that_fails_does_not_stop_the_others(config, finished, monkeypatch, tmp_path):
    """The run of the three together fails, then one of them alone; the others are kept and can be compared."""
    stored = {task: read_run(config.directory / "lmms_eval" / "+".join(TASKS), TASKS)[task] for task in TASKS}
    monkeypatch.setattr(runner, "read_run", lambda raw, tasks: {task: stored[task] for task in tasks})

    def run(config, tasks, *rest):
        if "local_choice" in tasks:
            raise UserError("no such picture")

    monkeypatch.setattr(runner, "run_lmms_eval", run)
    summary = runner.evaluate(config.model_copy(update={"output_dir": str(tmp_path / "eval")}))
    assert summary["failures"] == {"local_choice": "no such picture"}
    assert summary["tasks"] == {task: finished["tasks"][task] for task in ("local_generate", "local_rounds")}
    assert list(read_method(str(tmp_path / "eval")).runs[0].units) == ["local_generate", "local_rounds"]

    monkeypatch.setattr(runner, "run_lmms_eval", lambda *_: None)  # mended: only what failed is run again
    assert runner.evaluate(config.model_copy(update={"output_dir": str(tmp_path / "eval")}))["failures"] == {}


@pytest.mark.slow
def test_terminating_the_command_ends_lmms_eval(config, tmp_path):
    """Also the workers of torchrun, which are in sessions of their own."""
    settings = tmp_path / "eval.yaml"
    settings.write_text(
        f"checkpoint: {config.checkpoint}\ntasks: [local_rounds]\ninclude_path: {config.include_path}\n"
        f"output_dir: {tmp_path}/eval\ndevice: cpu\nprocesses: 2\n"
    )
    words = [sys.executable, "-m", "llava_compete.cli", "eval", "--config", str(settings)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(children := psutil.Process(process.pid).children(recursive=True)) < 3:  # torchrun and two workers
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not (tmp_path / "eval" / "summary.json").exists()


@pytest.mark.slow
def test_a_failing_document_fails_the_command(checkpoint, tasks_folder, tmp_path, capsys):
    """lmms-eval alone would end with status 0."""
    settings = tmp_path / "eval.yaml"
    settings.write_text(
        f"checkpoint: {checkpoint}\ntasks: [local_broken]\ninclude_path: {tasks_folder}\noutput_dir: {tmp_path}/eval\n"
        "batch_size: 4\ndevice: cpu\n"
    )
    assert main(["eval", "--config", str(settings)]) == 1
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
    with pytest.raises(runner.EvaluationError, match="document 3: OSError"):
        runner.evaluate(config.model_copy(update=broken))


def test_an_answer_that_got_lost_is_noticed(tmp_path):
    """lmms-eval's mean would be over the others."""
    raw = tmp_path / "model"
    raw.mkdir()
    results = {"results": {"pope": {"acc,none": 1.0}}, "configs": {}, "versions": {}, "group_subtasks": {}}
    results["n-samples"] = {"pope": {"original": 9, "effective": 3}}
    (raw / "now_results.json").write_text(json.dumps(results))
    # A line ends at "\n" alone: U+2028 and its like stand inside answers.
    answer = "one\u2028two\u0085three"
    lines = [
        json.dumps({"doc_id": number, "acc": 1.0, "filtered_resps": answer}, ensure_ascii=False) + "\n"
        for number in (2, 0, 1, 2)
    ]
    (raw / "now_samples_pope.jsonl").write_text("".join(lines))
    questions = [{"task": "pope", "doc_id": number, "images": None, "question": "q"} for number in range(3)]
    (tmp_path / "documents.0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    found = read_run(tmp_path, ["pope"])["pope"]
    assert [sample["doc_id"] for sample in found["samples"]] == [0, 1, 2]  # a second filter's lines do not count
    assert found["samples"][0]["filtered_resps"] == answer
    (tmp_path / "documents.0.jsonl").write_text("")
    with pytest.raises(UserError, match="document 0: an answer, but no record of its question"):
        read_run(tmp_path, ["pope"])
    (raw / "now_samples_pope.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(UserError, match="answers to 2 documents, expected 3"):
        read_run(tmp_path, ["pope"])
    with pytest.raises(UserError, match="no result or no samples of 'mme'"):
        read_run(tmp_path, ["mme"])


def test_an_adapter_is_part_of_what_was_evaluated(checkpoint, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    facts = []
    for content in (b"one", b"two"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        facts.append(runner.checkpoint_facts(checkpoint, tmp_path))
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert facts[0]["adapter_sha256"] != facts[1]["adapter_sha256"]


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
        (["JUDGED", "--suite", "demo", "competition_at_inference=true"], "has moe.language.competition_judge 'loss'"),
        (["a,b", "--suite", "demo"], "cannot hold a path with ','"),
        (["CKPT", "--tasks", "hallusion_bench_image"], "OPENAI_API_KEY is not set"),
        (["CKPT", "--suite", "demo", "adapter=nowhere"], "nowhere: no adapter here"),
        (["CKPT", "--suite", "demo", "dtyp=float32"], "did you mean 'dtype'"),
        (["CKPT", "--suite", "demo", "--processes", "0"], "processes: found 0, expected a number of at least 1"),
        (["dtype=float32", "--suite", "demo"], "expected a checkpoint directory"),
        (["prepare", "--suite", "demo", "--limit", "3"], "expected: llava-compete eval prepare"),
        ([], "expected a checkpoint directory"),
        (["--config", "configs/demo/eval.yaml", "suit=demo"], "did you mean 'suite'"),
        (["--config", "configs/demo/eval.yaml", "--limit", "3"], "give settings as key=value"),
        (["--config", "configs/demo/eval.yaml", "tasks=[pope]"], "either suite or tasks"),
    ],
)
def test_bad_input_is_one_line(arguments, message, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava"}')
    judged = tmp_path / "judged"
    judged.mkdir()
    layer = {"vision": {"router": "softmax"}, "language": {"competition_judge": "loss"}}
    (judged / "config.json").write_text(json.dumps({"model_type": "llava_compete", "moe": layer}))
    names = {"CKPT": str(checkpoint), "OTHER": str(other), "JUDGED": str(judged)}
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
