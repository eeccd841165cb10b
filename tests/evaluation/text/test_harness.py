"""lm-evaluation-harness on local tasks: which score is compared, what counts as the answer, data that are not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation.compare.comparison import compare_methods
from llava_compete.evaluation.compare.evaluation_dirs import read_method
from llava_compete.evaluation.text.harness import _task_manager, evaluate_text
from llava_compete.model.build import load_checkpoint, save_checkpoint

pytest.importorskip("lm_eval")
CHOICES = ["red .", "two shapes .", "the circle is red and the shapes are two"]
QUESTIONS = [f"what colour is the circle {'is ' * n}?" for n in range(5)]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "local_norm": """
include: local_choice.yaml
metric_list: [{metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "local_perplexity": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "local_custom": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
process_results: !function scores.length
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - {metric: characters, aggregation: mean, higher_is_better: true}
  - {metric: short, aggregation: mean, higher_is_better: true}
""",
}
SCORES = """
def length(doc, results):
    return {"characters": len(results[0]), "short": float(len(results[0]) < len(doc["question"]) - 30)}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "run"
    save_checkpoint(*tiny_model(tower=None), path)
    return path


def write_tasks(folder: Path, label: int = 0) -> Path:
    folder.mkdir()
    rows = [{"question": question, "choices": CHOICES, "label": label} for question in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.py").write_text(SCORES)
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")
    return folder


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    folder = write_tasks(root / "tasks")
    summary = evaluate_text(checkpoint, list(TASKS), root / "eval", include=folder, batch_size=2, limit=None)
    return root / "eval", summary


def units(directory: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (directory / "samples" / f"{task}.jsonl").read_text().split("\n")[:-1]]


def test_the_answer_of_a_choice_is_the_option_that_was_chosen(evaluated, checkpoint):
    """By our own forward: the largest summed likelihood for acc, the largest a character for acc_norm."""
    model, processor = load_checkpoint(checkpoint)
    tokenizer = processor.tokenizer
    for row, question in enumerate(QUESTIONS):
        sums = []
        for choice in CHOICES:
            start, whole = tokenizer(question).input_ids, tokenizer(f"{question} {choice}").input_ids
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(log_probs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        by_character = [value / len(choice) for value, choice in zip(sums, CHOICES, strict=True)]
        for task, values in (("local_choice", sums), ("local_norm", by_character)):
            unit = units(evaluated[0], task)[row]
            assert unit["answer"] == CHOICES[values.index(max(values))]
            assert unit["score"] == float(unit["answer"] == CHOICES[0])
    answers = {task: {unit["answer"] for unit in units(evaluated[0], task)} for task in ("local_choice", "local_norm")}
    assert answers["local_choice"] != answers["local_norm"]  # otherwise the difference would not be tested


def test_a_task_without_a_score_of_samples_has_none(evaluated):
    """Not 0.0, which `compare` would call a tie; and a score of its own is found, beside a number that is none."""
    entry = evaluated[1]["tasks"]["local_perplexity"]
    assert (entry["accuracy"], entry["metric"], entry["n"]) == (None, None, 5)
    assert entry["metrics"]["perplexity"] > 1
    assert units(evaluated[0], "local_perplexity") == []
    custom = evaluated[1]["tasks"]["local_custom"]
    assert custom["metric"] == "short"
    assert custom["accuracy"] == pytest.approx(custom["metrics"]["short"])
    assert 0 < custom["accuracy"] < 1
    assert set(read_method(str(evaluated[0])).runs[0].units) == set(TASKS)


def test_runs_on_other_data_cannot_be_joined(evaluated, checkpoint, tmp_path):
    other = write_tasks(tmp_path / "tasks")
    rows = (other / "rows.jsonl").read_text().replace("what colour", "which colour")
    (other / "rows.jsonl").write_text(rows)
    copy = shutil.copytree(checkpoint, tmp_path / "run")
    (copy / "generation_config.json").write_text("{}")
    evaluate_text(copy, ["local_choice"], tmp_path / "eval", include=other, batch_size=2, limit=None)
    methods = [read_method(f"a={evaluated[0]}"), read_method(f"b={tmp_path / 'eval'}")]
    with pytest.raises(UserError, match=r"task 'local_choice': asked is .*; evaluate both alike"):
        compare_methods(methods, {}, resamples=200)


def test_the_harnesses_own_tasks_are_indexed_only_where_they_may_be_asked_for(tmp_path, monkeypatch):
    folder = write_tasks(tmp_path / "tasks")
    assert set(_task_manager(["local_norm"], folder).all_tasks) == set(TASKS)
    (folder / "both.yaml").write_text("group: both\ntask: [local_choice, arc_easy]\n")
    asked = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", lambda self, **settings: asked.append(settings))
    monkeypatch.setattr("lm_eval.tasks.TaskManager.all_subtasks", list(TASKS))
    _task_manager(["both"], folder)
    assert [settings.get("include_defaults", True) for settings in asked] == [False, True]


def test_data_that_are_not_there_are_one_line(checkpoint, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "rows.jsonl").unlink()
    for include, message in (
        (folder, "data of local_choice: FileNotFoundError: "),
        (tmp_path / "no", "no such folder"),
    ):
        words = ["eval-text", str(checkpoint), "--tasks", "local_choice", "--include", str(include)]
        assert main([*words, "--out", str(tmp_path / "eval")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    assert main(["eval-text", str(tmp_path / "nothing"), "--tasks", "local_choice"]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
