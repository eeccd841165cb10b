"""One JSON and one table of what the sections of scripts/gpu_check.sh found.

python -m llava_compete.report.gpu_check RESULTS OUT

RESULTS holds sections.tsv (name, exit status, seconds) and each section's own file: pytest's XML, a benchmark's JSON,
or a stage's metrics.jsonl. A section that failed keeps what it wrote before it did.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from llava_compete.files import read_json, read_json_lines, write_json, write_text
from llava_compete.manifest import git_state, package_versions

TESTS = {"parity": "parity", "waiting": "waiting", "nccl": "collectives"}
BENCHMARKS = ("moe", "train", "generate", "routing")
TIMED_OUT = (124, 137)


def collect(results: Path) -> dict[str, Any]:
    """Everything found so far: the machine, and by section its status, seconds and result (None if it wrote none)."""
    sections: dict[str, Any] = {}
    for line in (results / "sections.tsv").read_text(encoding="utf-8").splitlines():
        name, status, seconds = line.split("\t")
        result = _result(name, results)
        verdict = _verdict(int(status))
        if name == "demo" and (bad := [run for run in result or {} if not _finite(result[run])]):
            verdict = f"failed: loss not finite in {', '.join(bad)}"
        sections[name] = {"status": verdict, "seconds": float(seconds), "result": result}
    return {"machine": _machine(results / "machine.json"), "sections": sections}


def _verdict(status: int) -> str:
    if status == 0:
        return "passed"
    return "timed out" if status in TIMED_OUT else f"failed (status {status})"


def _machine(kept: Path) -> dict[str, Any]:
    """What it ran on; looked up once, for importing torch takes seconds."""
    if not kept.exists():
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        write_json(kept, {"device": name, "versions": package_versions(), "git": git_state()})
    return read_json(kept)


def _result(name: str, results: Path) -> Any:
    if name in TESTS:
        path = results / f"{TESTS[name]}.xml"
        return list(_tests(path)) if path.exists() else None
    if name in BENCHMARKS:
        path = results / f"{name}.json"
        return read_json(path) if path.exists() else None
    return {path.stem: _steps(path) for path in sorted((results / name).glob("*.jsonl"))} or None


def _tests(path: Path) -> Iterator[dict[str, Any]]:
    """pytest's cases, with the numbers that they recorded and the message of those that failed."""
    for case in ElementTree.parse(path).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        recorded = {item.attrib["name"]: float(item.attrib["value"]) for item in case.iter("property")}
        found: dict[str, Any] = {"case": case.attrib["name"], "passed": problem is None, **recorded}
        if problem is not None:
            found["message"] = problem.attrib.get("message", "")
        yield found


def _steps(path: Path) -> dict[str, Any]:
    """First and last loss of a stage's few steps, and their seconds and memory."""
    lines = list(read_json_lines(path))
    steps = [line for line in lines if "loss" in line]
    end: dict[str, Any] = next((line for line in lines if line.get("event") == "end"), {})
    memory = steps[-1].get("memory_gib") if steps else None
    return {"losses": [line["loss"] for line in steps], "memory_gib": memory, "end": end}


def _finite(stage: dict[str, Any]) -> bool:
    """Whether it has losses, and all are numbers: one that is not finite is null in a log."""
    return bool(stage["losses"]) and all(loss is not None and math.isfinite(loss) for loss in stage["losses"])


def table(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    machine = found["machine"]
    versions = machine["versions"]
    lines = [
        f"# GPU check: {machine['device']}",
        "",
        f"torch {versions.get('torch')}, transformers {versions.get('transformers')}, "
        f"deepspeed {versions.get('deepspeed')}, Python {versions['python']}",
        "",
        "| section | status | seconds | found |",
        "| --- | --- | --- | --- |",
    ]
    details: list[str] = []
    for name, section in found["sections"].items():
        result = section["result"]
        summary = "nothing" if result is None else _SUMMARIES[name](result)
        lines.append(f"| {name} | {section['status']} | {section['seconds']:.0f} | {summary} |")
        if result is not None and name in _DETAILS:
            details += ["", f"## {name}", "", *_DETAILS[name](result)]
    return "\n".join([*lines, *details]) + "\n"


def _tests_summary(cases: list[dict[str, Any]]) -> str:
    passed = sum(case["passed"] for case in cases)
    worst = max((case["error"] / case["bound"] for case in cases if "error" in case), default=None)
    share = "" if worst is None else f", largest error {worst:.0%} of its bound"
    return f"{passed} of {len(cases)} passed{share}"


def _moe_summary(rows: list[dict[str, Any]]) -> str:
    shapes = {json.dumps(row["shape"]) for row in rows}
    return f"{len(shapes)} shapes"


def _train_summary(result: dict[str, Any]) -> str:
    shape = result["shape"]
    return (
        f"{shape['layers']} layers of {shape['hidden']}; competition over softmax "
        f"{result['competition_over_softmax']:+.1%}, softmax over dense {result['softmax_over_dense']:+.1%}"
    )


def _generate_summary(result: dict[str, Any]) -> str:
    return "MoE over " + "; ".join(f"{name} {ratio:.2f}" for name, ratio in result["moe_over"].items())


def _demo_summary(result: dict[str, Any]) -> str:
    ends = {run: (item["losses"] or [None])[:: max(len(item["losses"]) - 1, 1)] for run, item in result.items()}
    shown = {run: ["-" if loss is None else f"{loss:.2f}" for loss in losses] for run, losses in ends.items()}
    return "; ".join(f"{run} loss {losses[0]} to {losses[-1]}" for run, losses in shown.items())


def _routing_summary(result: dict[str, Any]) -> str:
    trained = [(len(unit["seeds"]), unit["seconds"]) for unit in result["runs"]]
    return f"{sum(runs for runs, _ in trained)} runs of {len(trained)} kinds in {sum(s for _, s in trained):.0f} s"


def _test_lines(cases: list[dict[str, Any]]) -> Iterator[str]:
    for case in cases:
        error = f" error {case['error']:.1e} (at most {case['bound']:.0e})" if "error" in case else ""
        message = "" if case["passed"] else f": {' '.join(case['message'].split())[:300]}"
        yield f"- {'passed' if case['passed'] else 'FAILED'} {case['case']}{error}{message}"


def _moe_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| D, I, E, K | case | ms | ratio | kernels, ms | launches | peak MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        sizes = ", ".join(str(row["shape"][letter]) for letter in "DIEK")
        kernels = "-" if row.get("kernel_ms") is None else f"{row['kernel_ms']:.2f}"
        launches = "-" if row.get("launches") is None else str(row["launches"])
        numbers = f"{row['ms']:.2f} | {row['ratio']:.2f} | {kernels} | {launches} | {row['peak_mb']:.0f}"
        yield f"| {sizes} | {row['case']} | {numbers} |"


def _train_lines(result: dict[str, Any]) -> Iterator[str]:
    yield "| case | tokens/s | peak MB | MFU |"
    yield "| --- | --- | --- | --- |"
    for case, speed in result["tokens_per_second"].items():
        mfu = f"{result['mfu'][case]:.1%}" if "mfu" in result else "-"
        yield f"| {case} | {speed:,.0f} | {result['peak_mb'][case]:,.0f} | {mfu} |"


def _generate_lines(result: dict[str, Any]) -> Iterator[str]:
    yield "| model | parameters | tokens/s | relative |"
    yield "| --- | --- | --- | --- |"
    for name, speed in result["speeds"].items():
        yield (
            f"| {name} | {speed['parameters']:,} | {speed['tokens_per_second']:,.0f} | {result['relative'][name]:.2f} |"
        )


_SUMMARIES: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(TESTS, _tests_summary),
    "moe": _moe_summary,
    "train": _train_summary,
    "generate": _generate_summary,
    "routing": _routing_summary,
    "demo": _demo_summary,
}
_DETAILS: dict[str, Callable[[Any], Iterator[str]]] = {
    **dict.fromkeys(TESTS, _test_lines),
    "moe": _moe_lines,
    "train": _train_lines,
    "generate": _generate_lines,
}


def main(results: Path, out: Path) -> None:
    """Write OUT/gpu_check.json and OUT/gpu_check.md."""
    found = collect(results)
    write_json(out / "gpu_check.json", found)
    write_text(out / "gpu_check.md", table(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
