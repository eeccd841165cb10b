"""The GPU check's report from files such as pytest, the benchmarks and a stage write; what the script refuses."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llava_compete.report.gpu_check import collect, main, table
from llava_compete.train.step_lines import append

ROOT = Path(__file__).parents[2]
XML = """<testsuites><testsuite name="pytest">
<testcase classname="tests.gpu.test_parity" name="test_a[softmax]" time="0.1">
  <properties><property name="error" value="5e-3"/><property name="bound" value="2e-2"/></properties></testcase>
<testcase classname="tests.gpu.test_parity" name="test_a[xmoe]" time="0.1">
  <failure message="assert 0.5 &lt; 0.02">traceback</failure></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    (folder / "demo").mkdir(parents=True)
    machine = {"device": "NVIDIA H100", "versions": {"python": "3.12.3", "torch": "2.11.0"}, "git": {}}
    (folder / "machine.json").write_text(json.dumps(machine))
    (folder / "sections.tsv").write_text("parity\t1\t9.5\nmoe\t124\t60.0\ndemo\t0\t80.2\n")
    (folder / "parity.xml").write_text(XML)
    _write_steps(folder, [5.5, 4.25])
    return folder


def _write_steps(folder: Path, losses: list[float]) -> None:
    lines: list[dict[str, Any]] = [{"step": n + 1, "loss": loss, "memory_gib": 1.5} for n, loss in enumerate(losses)]
    lines.append({"event": "end", "train_seconds": 3.0})
    (folder / "demo" / "sft-zero3.jsonl").unlink(missing_ok=True)
    append(folder / "demo" / "sft-zero3.jsonl", lines)


def test_each_section_has_its_status_and_what_it_found(results: Path, tmp_path: Path) -> None:
    main(results, tmp_path)
    found = json.loads((tmp_path / "gpu_check.json").read_text())["sections"]
    assert {name: section["status"] for name, section in found.items()} == {
        "parity": "failed (status 1)",
        "moe": "timed out",
        "demo": "passed",
    }
    good, bad = found["parity"]["result"]
    assert good == {"case": "test_a[softmax]", "passed": True, "error": 5e-3, "bound": 2e-2}
    assert not bad["passed"]
    assert "0.5 < 0.02" in bad["message"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert text.startswith("# GPU check: NVIDIA H100\n\ntorch 2.11.0")
    assert "| parity | failed (status 1) | 10 | 1 of 2 passed, largest error 25% of its bound |" in text
    assert "| moe | timed out | 60 | nothing |" in text
    assert "| demo | passed | 80 | sft-zero3 loss 5.50 to 4.25 |" in text


def test_a_loss_that_is_not_finite_fails_the_demo(results: Path) -> None:
    for losses, shown in (([5.5, math.nan], "5.50 to -"), ([], "- to -")):
        _write_steps(results, losses)
        found = collect(results)
        assert found["sections"]["demo"]["status"] == "failed: loss not finite in sft-zero3"
        assert f"| sft-zero3 loss {shown} |" in table(found)


def test_the_script_refuses_an_unknown_section(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--out", str(tmp_path / "out")]
    unknown = subprocess.run([*script, "speed"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "error: scripts/gpu_check.sh: found 'speed', expected --cpu, --out FOLDER or some of: "
        "parity waiting nccl moe train demo generate routing\n",
    )
    assert not (tmp_path / "out").exists()
