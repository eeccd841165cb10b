"""Language models on lm-evaluation-harness's own tasks, through its own `hf` model class.

The adapter is thin: the checkpoint is loaded by us and handed to `HFLM` as a causal model, which batches, truncates
and scores. Results are written as `compare` reads them. Caller: `llava-compete eval-text`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from llava_compete.config import StrictConfig, load_config
from llava_compete.errors import UserError
from llava_compete.evaluation.unit_scores import Unit

logger = logging.getLogger(__name__)

SUITES = Path(__file__).parents[3] / "eval" / "lm_suites"
# Per-sample metrics that say how right an answer was, the best suited to compare first.
_SCORES = ("acc_norm", "acc", "exact_match", "f1")


class LmSuite(StrictConfig):
    """A list of the harness's task or group names."""

    tasks: list[str]


def suite_tasks(name: str) -> list[str]:
    """Tasks of a suite of eval/lm_suites, or a `UserError` that lists the suites."""
    path = SUITES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise UserError(f"--suite: found {name!r}, expected one of {known}")
    return load_config(LmSuite, path).tasks


def evaluate_text(
    checkpoint: Path, tasks: list[str], out: Path, *, include: Path | None, batch_size: int, limit: int | None
) -> dict[str, Any]:
    """Run the tasks; writes results.json (the harness's own), summary.json and samples/TASK.jsonl into `out`."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llava_compete.model.checkpoint import load_checkpoint

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"task {unknown[0]!r}: not known to lm-evaluation-harness {lm_eval.__version__} (lm-eval ls tasks)"
        )
    model, processor = load_checkpoint(checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # the harness leaves a loaded model where it is
    language_model = HFLM(
        pretrained=model,
        tokenizer=processor.tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=model.config.text_config.max_position_embeddings,
    )
    results = lm_eval.simple_evaluate(
        model=language_model, tasks=tasks, task_manager=manager, limit=limit, log_samples=True
    )
    if results is None:  # another rank writes
        return {}
    return _write(results, out)


def _write(results: dict[str, Any], out: Path) -> dict[str, Any]:
    (out / "samples").mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"tasks": {}}
    for task, samples in results.pop("samples").items():
        units = [_unit(sample) for sample in samples]
        metrics = {key.removesuffix(",none"): value for key, value in results["results"][task].items() if "," in key}
        summary["tasks"][task] = {"n": len(units), "metrics": metrics}
        lines = [json.dumps(unit._asdict(), ensure_ascii=False) + "\n" for unit in units]
        (out / "samples" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    summary["groups"] = results.get("groups", {})
    (out / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8")
    return summary


def _unit(sample: dict[str, Any]) -> Unit:
    score = next((float(sample[key]) for key in _SCORES if key in sample), 0.0)
    answer = str(sample["filtered_resps"][0]) if sample["filtered_resps"] else ""
    return Unit(str(sample["doc_id"]), score, 1.0, None, answer, str(sample["target"]))
