"""Pages as a square and in tiles: scores by question type, and tokens, seconds and memory a picture, by method.

Scores are read from seedN/eval, differences from the comparison, training from seedN/*/run/metrics.jsonl. What a
picture costs is measured on one page and its question, without gradients, by the model of seed 0.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llava_compete.bench.memory import LiveBytes
from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import load_for_inference
from llava_compete.evaluation.unit_scores import Unit, read_units, weighted_mean
from llava_compete.files import read_json, write_json, write_text
from llava_compete.report.quickstart import read_log
from llava_compete.vision.image_decoder import open_image

STAGES = ("pretrain_align", "sft")
_QUESTION, _TIMES = "What is the total?", 3


def write_report(folders: dict[str, Path], page: Path, comparison: Path, out: Path) -> str:
    """Write README.md and metrics.json into `out`; returns the former's text.

    folders: method -> folder of its seeds, the first the baseline.

    Raises:
        UserError: a run that has not finished.
    """
    compared = comparison / "comparison.json"
    if not compared.is_file():
        raise UserError(f"{compared}: missing; run llava-compete compare first")
    differences = read_json(compared)
    metrics = {
        name: {**collect(folder), **picture_cost(folder / "seed0" / "sft", page)} for name, folder in folders.items()
    }
    text = to_markdown(metrics, differences)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", {"methods": metrics, "comparison": differences})
    write_text(out / "README.md", text)
    return text


def collect(folder: Path) -> dict[str, Any]:
    """Means over the seeds of one method: accuracy of all and by type, with the best blind answer, seconds, peak."""
    seeds = sorted(folder.glob("seed*"))
    if not seeds:
        raise UserError(f"{folder}: no seed0; the run has not finished")
    units, seconds, evaluation, memory = [], [], [], []
    for seed in seeds:
        summary = seed / "eval" / "summary.json"
        if not summary.is_file():
            raise UserError(f"{summary}: missing; the run has not finished")
        facts = read_json(summary)
        evaluation.append(facts["seconds"])
        units.append([unit for task in facts["tasks"] for unit in read_units(seed / "eval", task)])
        logs = [read_log(seed / stage) for stage in STAGES]
        seconds.append(sum(log.end["train_seconds"] for log in logs))
        memory.append(max(step["memory_gib"] for log in logs for step in log.steps))
    return {
        "seeds": len(seeds),
        "questions": len(units[0]),
        "rows": sum(log.end["samples"] for log in logs),
        "steps": [log.end["steps"] for log in logs],
        "accuracy": sum(map(weighted_mean, units)) / len(units),
        "by_type": _by_type(units),
        "train_seconds": sum(seconds) / len(seconds),
        "eval_seconds": sum(evaluation) / len(evaluation),
        "peak_memory_gib": max(memory),
    }


def _by_type(units_of_seeds: list[list[Unit]]) -> dict[str, dict[str, float]]:
    found = {}
    for kind in sorted({unit.type or "" for unit in units_of_seeds[0]}):
        chosen = [unit for units in units_of_seeds for unit in units if (unit.type or "") == kind]
        targets = Counter(unit.target for unit in units_of_seeds[0] if (unit.type or "") == kind)
        found[kind] = {
            "n": targets.total(),
            "accuracy": weighted_mean(chosen),
            "blind": max(targets.values()) / targets.total(),
        }
    return found


def picture_cost(checkpoint: Path, page: Path) -> dict[str, float]:
    """Tokens and tiles of a page; seconds (least of three) and peak MiB of tensors to an answer's first word."""
    model, processor = load_for_inference(str(checkpoint), torch.device("cpu"), torch.bfloat16)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": open_image(page)}, {"type": "text", "text": _QUESTION}]}
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    seconds = []
    with torch.no_grad():
        for _ in range(_TIMES):
            start = time.perf_counter()
            model(**inputs, logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
        with LiveBytes() as counted:
            model(**inputs, logits_to_keep=1)
    return {
        "tokens": sum(model.image_lengths(inputs["pixel_values"], inputs.get("image_sizes"))[1]),
        "tiles": len(inputs["pixel_values"]),
        "seconds_a_picture": min(seconds),
        "peak_mib_a_picture": counted.peak / 2**20,
    }


def to_markdown(metrics: dict[str, dict[str, Any]], differences: dict[str, Any]) -> str:
    """The table of costs, the scores by type, and the paired differences."""
    first = next(iter(metrics.values()))
    lines = ["# A page of small print as a square and in tiles", "", "    bash scripts/compare_documents.sh", ""]
    lines += [
        f"{first['seeds']} seed(s), {first['rows']:,} rows in {first['steps'][0]} and {first['steps'][1]} steps, "
        f"{first['questions']} questions. A picture's seconds and memory are those of one page and a question, forward "
        "in bfloat16, tensors alone; training seconds are of the last start of each stage, peak its process's.",
        "",
        *_table(
            ["shown as", "tokens", "tiles", "s a picture", "MiB a picture", "training, s", "evaluation, s", "peak GiB"],
            [
                [
                    name, str(found["tokens"]), str(found["tiles"]), f"{found['seconds_a_picture']:.3f}",
                    f"{found['peak_mib_a_picture']:.0f}", f"{found['train_seconds']:.0f}",
                    f"{found['eval_seconds']:.0f}", f"{found['peak_memory_gib']:.2f}",
                ]
                for name, found in metrics.items()
            ],
        ),
        "",
        "## Accuracy (percent)",
        "",
        *_table(
            ["type", "n", "best blind answer", *metrics],
            [
                [kind, str(facts["n"]), f"{100 * facts['blind']:.1f}"]
                + [f"{100 * found['by_type'][kind]['accuracy']:.1f}" for found in metrics.values()]
                for kind, facts in first["by_type"].items()
            ]
            + [["all", str(first["questions"]), ""] + [f"{100 * found['accuracy']:.1f}" for found in metrics.values()]],
        ),
        "",
        f"## Differences to {differences['baseline']} (points)",
        "",
        *_differences(differences),
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def _differences(comparison: dict[str, Any]) -> list[str]:
    """Of the judged row: intervals over questions, paired and grouped by page, and over seeds where several."""
    row = comparison["benchmarks"][comparison["primary"]]
    cells = []
    for name, found in row["differences"].items():
        over_seeds = found["over_seeds"]
        cells.append(
            [
                name,
                f"{found['mean']:+.1f}",
                _interval(found["over_questions"]),
                "" if over_seeds is None else _interval(over_seeds),
                f"{comparison['p_holm'][name]:.4f}",
            ]
        )
    return _table(["shown as", "difference", "95% over questions", "95% over seeds", "p (Holm)"], cells)


def _interval(interval: list[float]) -> str:
    return f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
