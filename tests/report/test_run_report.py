"""What a report finds on disk of a run: evaluations, the dense model that was upcycled, checkpoints, the log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_compete.cli import main
from llava_compete.config import dump_yaml
from llava_compete.errors import UserError
from llava_compete.evaluation.unit_scores import Unit, write_units
from llava_compete.files import write_json
from llava_compete.report.over_steps import training_section
from llava_compete.report.page import Page
from llava_compete.report.run_facts import find_runs, with_checkpoints
from llava_compete.report.run_report import write_run_report
from llava_compete.train.step_lines import append

LAYERS = [f"{part}.{layer}" for part, count in (("vision", 4), ("language", 8)) for layer in range(count)]


def stage(folder: Path, parent: Path | None, moe: Any, loads: dict[str, list[float]] | None = None) -> Path:
    """A stage's directory without weights: its config, the record of its start, and a log."""
    write_json(folder / "config.json", {"model_type": "llava_compete", "stage": folder.name, "moe": moe})
    (folder / "run").mkdir(parents=True)
    dump_yaml({"model": {"checkpoint": None if parent is None else str(parent)}}, folder / "run" / "config.yaml")
    lines = [{"step": n, "loss": 3.0 - n, "lm_loss": 2.5 - n, **(loads or {})} for n in (1, 2)]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def evaluation(folder: Path, of: Path, right: int, task: str = "emoji") -> Path:
    """20 questions, of which so many are right."""
    write_units(folder, task, [Unit(str(n), float(n < right), 1, "kind", "a", "a") for n in range(20)])
    tasks = {task: {"accuracy": right / 20, "chance": 0.1, "blind": 0.3, "n": 20}}
    write_json(folder / "summary.json", {"checkpoint": {"path": str(of)}, "tasks": tasks})
    return folder


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    """pretrain_align -> pft -> upcycle -> sft."""
    dense = stage(tmp_path / "pft", stage(tmp_path / "pretrain_align", None, None), None)
    upcycled = stage(tmp_path / "upcycle", dense, {"language": {}})
    return stage(tmp_path / "sft", upcycled, {"language": {}}, {f"expert_load/{n}": [0.75, 0.25] for n in LAYERS})


def test_the_dense_parents_scores_stand_beside_the_mixtures(sft: Path, tmp_path: Path) -> None:
    evaluation(tmp_path / "eval_sft", sft, 15)
    evaluation(tmp_path / "eval_pft", tmp_path / "pft", 10)
    (run,) = find_runs([sft], [])
    page, found = write_run_report([run], {}, tmp_path / "out", "command")
    content = json.loads(found.read_text())["runs"][0]
    assert content["dense_parent"]["path"] == str(tmp_path / "pft")
    assert content["scores"]["emoji"][0]["score"] == 75
    assert content["dense_parent"]["scores"]["emoji"][0]["score"] == 50
    text = page.read_text()
    assert "<th>sft</th><th>dense parent of sft</th>" in text
    assert "<td>all</td><td>20</td><td>75.0 ± 9.9</td><td>50.0 ± 11.5</td>" in text
    assert "best constant answer 10.0" in text.lower()
    # Given beside the mixture it is a run of its own, and stands there once.
    pair = find_runs([tmp_path / "pft", sft], [])
    assert [run.dense_parent for run in pair] == [None, None]


def test_evaluations_elsewhere_are_given(sft: Path, tmp_path: Path) -> None:
    (run,) = find_runs([sft], [evaluation(tmp_path / "there", tmp_path / "pft", 10)])
    assert run.dense_parent is not None
    assert list(run.dense_parent.units) == ["emoji"]
    assert not run.units
    others = evaluation(tmp_path / "others", tmp_path / "pft", 5, task="digits")
    (run,) = find_runs([sft], [tmp_path / "there", others])
    assert run.dense_parent is not None
    assert list(run.dense_parent.units) == ["emoji", "digits"]
    with pytest.raises(UserError, match=r"again: has task 'emoji' of pft, as .*there has"):
        find_runs([sft], [tmp_path / "there", evaluation(tmp_path / "again", tmp_path / "pft", 5)])
    write_units(tmp_path / "there", "text", [])  # a perplexity: no scores of single samples
    summary = json.loads((tmp_path / "there" / "summary.json").read_text())
    summary["tasks"]["text"] = {"accuracy": None, "n": 3}
    write_json(tmp_path / "there" / "summary.json", summary)
    (run,) = find_runs([sft], [tmp_path / "there"])
    assert run.dense_parent is not None
    assert list(run.dense_parent.units) == ["emoji"]
    write_json(tmp_path / "there" / "summary.json", {"perplexity": 3.0})
    with pytest.raises(UserError, match=r"there/summary\.json: not the summary of an evaluation"):
        find_runs([sft], [tmp_path / "there"])
    other = evaluation(tmp_path / "other", tmp_path / "upcycle", 10)
    with pytest.raises(UserError, match="none of the runs given or their parents"):
        find_runs([sft], [other])


def test_the_closing_tables_are_a_finished_quickstarts(
    sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another script's folder of stages has its report and no more; a place that cannot be is said before a model is
    looked for, of which there is none here."""
    for name in ("pft", "sft", "upcycle", "pretrain_align"):
        (tmp_path / name / "run" / "metrics.jsonl").unlink()
        (tmp_path / "stages").mkdir(exist_ok=True)
        (tmp_path / "stages" / name).write_text("fingerprint 1.0")
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report" / "report.json").is_file()
    assert not (tmp_path / "metrics.json").exists()
    (tmp_path / "taken").touch()
    pq.write_table(pa.table({"image": [{"bytes": b""}], "question": ["?"], "answer": ["a"]}), tmp_path / "rows.parquet")
    rows = ["--data", str(tmp_path / "rows.parquet")]
    assert main(["report", str(sft), *rows, "--out", str(tmp_path / "taken")]) == 2
    assert "taken: File exists" in capsys.readouterr().err


def test_without_a_record_no_parent_is_named(sft: Path, tmp_path: Path) -> None:
    (tmp_path / "upcycle" / "run" / "config.yaml").unlink()
    assert find_runs([sft], [])[0].dense_parent is None


def test_a_skipped_step_is_a_gap_and_losses_stand_at_their_steps(sft: Path, tmp_path: Path) -> None:
    """A loss that is not finite is null in the log; lines without the language model's own loss have no difference."""
    log = sft / "run" / "metrics.jsonl"
    log.unlink()
    append(log, [{"step": n, "loss": 3.0 - n, **({"lm_loss": 2.5 - n} if n > 1 else {})} for n in (1, 2, 3)])
    append(log, [{"step": 4, "loss": math.nan, "lm_loss": math.nan}])
    (run,) = find_runs([sft], [])
    assert f"{run.steps[-1]['loss']:.4f}" == "nan"
    page = Kept("", tmp_path)
    training_section(page, run)
    (line,) = page.figures["sft-routing-loss"].axes[0].lines
    assert list(line.get_xdata()) == [2, 3, 4]
    assert list(line.get_ydata())[:2] == [0.5, 0.5]
    plt.close("all")


class Kept(Page):
    """A page that keeps its figures and draws none."""

    def figure(self, figure: plt.Figure, name: str, caption: str) -> None:
        self.figures = {**getattr(self, "figures", {}), name: figure}


def test_checkpoints_come_in_the_order_of_their_steps(sft: Path) -> None:
    with pytest.raises(UserError, match=r"sft: no checkpoint-\* with a whole model"):
        with_checkpoints(sft)
    for step in (10, 9, "best"):  # the last is a copy by hand
        stage(sft / f"checkpoint-{step}", None, {"language": {}})
    (sft / "checkpoint-11").mkdir()  # of adapters alone
    assert with_checkpoints(sft) == [sft / "checkpoint-9", sft / "checkpoint-10", sft]
    assert [run.name for run in find_runs(with_checkpoints(sft), [])] == ["checkpoint-9", "checkpoint-10", "sft"]


def test_more_layers_than_colours_are_a_map(sft: Path, tmp_path: Path) -> None:
    page, _ = write_run_report(find_runs([sft], []), {}, tmp_path / "out", "command")
    text = page.read_text()
    assert "in multiples of even use. A row a layer, over 2 logged steps." in text
    assert "What the routing losses add" in text
    assert (tmp_path / "out" / "figures" / "sft-expert_load.svg").is_file()
