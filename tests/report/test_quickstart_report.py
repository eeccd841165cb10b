"""The quickstart report: figures, metrics.json and clear errors, from files as the stages write them."""

import json
import math
from pathlib import Path

import pytest

from llava_compete.errors import UserError
from llava_compete.files import write_json
from llava_compete.report.quickstart import STAGES, write_report
from llava_compete.train.step_lines import append


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    (tmp_path / "stages").mkdir()
    for stage in STAGES:
        (tmp_path / "stages" / stage).write_text("fingerprint 12.5\n")
    for stage in ("pretrain_align", "sft"):
        (tmp_path / stage / "run").mkdir(parents=True)
        lines = [
            {"step": 1, "loss": 2.0, "lm_loss": 1.9, "language/balance_loss": 1.0, "memory_gib": 0.5},
            {"event": "end", "tokens": 100, "train_seconds": 2.0, "competition_steps": 3},
        ]
        (tmp_path / stage / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "eval").mkdir()
    scores = {"demo": {"accuracy": 0.9, "chance": 0.1, "blind": 0.2, "n": 4}}
    write_json(tmp_path / "eval" / "summary.json", {"tasks": scores})
    routing = {
        "agreement": {"router": 0.8, "best_constant": 0.7, "linear_probe": 0.9},
        "controls": {"router": {"loss": 0.5, "exact": 0.75}, "random": {"loss": 0.625, "exact": 0.5}},
        "expert_use": {"language.0": [0.5, 0.5]},
    }
    write_json(tmp_path / "eval" / "routing.json", routing)
    return tmp_path


def test_report_writes_all_files(finished: Path) -> None:
    write_report(finished)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["tasks"]["demo"]["accuracy"] == 0.9
    assert metrics["competition_steps"] == 3
    assert metrics["winners_found"]["router"] == 0.8
    report = (finished / "report.md").read_text()
    assert "| winners of a competition found (held out): best constant | 0.700 |" in report
    assert "| random | 0.625 | 0.500 |" in report
    assert set(metrics["seconds"]) == set(STAGES)
    assert "| demo | 0.900 | 0.100 | 0.200 | 4 |" in (finished / "report.md").read_text()
    for figure in ("loss_terms.png", "expert_use.png"):
        assert (finished / figure).read_bytes().startswith(b"\x89PNG")


def test_report_refuses_what_is_missing_or_not_finite(finished: Path) -> None:
    log = finished / "sft" / "run" / "metrics.jsonl"
    log.unlink()
    append(log, [{"step": 7, "loss": math.nan, "lm_loss": 1.0, "router_agreement": math.nan}, {"event": "end"}])
    with pytest.raises(UserError, match=r"step 7 has non-finite loss$"):
        write_report(finished)
    log.write_text("")
    with pytest.raises(UserError, match="0 logged steps"):
        write_report(finished)
    (finished / "stages" / "eval").unlink()
    with pytest.raises(UserError, match="stage 'eval' has not finished"):
        write_report(finished)
