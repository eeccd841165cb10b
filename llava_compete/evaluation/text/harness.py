"""Language models on lm-evaluation-harness's own tasks, through its own `hf` model class.

The adapter is thin: the checkpoint is loaded by us and handed to `HFLM` as a causal model, which batches, truncates
and scores. Results are written as `compare` reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from llava_compete import shipped
from llava_compete.config import StrictConfig, load_config
from llava_compete.errors import UserError
from llava_compete.evaluation.checkpoint_facts import checkpoint_facts
from llava_compete.evaluation.unit_scores import Sample, Unit, weighted_mean, write_units
from llava_compete.files import write_json
from llava_compete.manifest import package_versions

logger = logging.getLogger(__name__)

SUITES = shipped.folder("eval") / "lm_suites"
# Per-sample metrics that say how right an answer was, the best suited to compare first; then a task's own order.
_FIRST = ("acc_norm", "acc", "exact_match", "f1")


class LmSuite(StrictConfig):
    """A list of the harness's task or group names."""

    tasks: list[str] = Field(description="task or group names of lm-evaluation-harness")


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

    from llava_compete.model.checkpoint import load_checkpoint

    if include is not None and not include.is_dir():
        raise UserError(f"--include: {include}: no such folder")
    facts = checkpoint_facts(checkpoint)
    manager = _task_manager(tasks, include)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"task {unknown[0]!r}: not known to lm-evaluation-harness {lm_eval.__version__} (lm-eval ls tasks)"
        )
    _load_tasks(manager, tasks)
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
    return _write(results, out, facts)


def _task_manager(tasks: list[str], include: Path | None) -> Any:
    """The harness's index of tasks. Its own take 9 s to index, and are left out where `include` defines all of `tasks`.

    A group or a tag of `include` may name the harness's own tasks, so that these need the whole index.
    """
    from lm_eval.tasks import TaskManager

    if include is not None:
        local = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(local.all_subtasks):
            return local
    return TaskManager(include_path=str(include) if include else None)


def _load_tasks(manager: Any, tasks: list[str]) -> None:
    """Build the tasks before the model is loaded: data that are not there are a `UserError`, not a late traceback."""
    try:
        loaded = manager.load(tasks)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data of {', '.join(tasks)}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    manager.load = lambda _: loaded  # the harness asks once more for what takes minutes


def _write(results: dict[str, Any], out: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {"tasks": {}}
    for task, samples in results.pop("samples").items():
        # A task with several filters has a line for each: the first is the one that its scores are named by.
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        metrics = {key.removesuffix(",none"): value for key, value in results["results"][task].items() if "," in key}
        metric = score_metric(samples, results["results"][task], results["higher_is_better"].get(task, {}))
        if metric is None:
            logger.warning("task %s: no score of single samples; compare leaves it out", task)
        units = [_unit(sample, metric) for sample in samples] if metric else []
        write_units(out, task, units)
        summary["tasks"][task] = {
            "accuracy": weighted_mean(units) if units else None,
            "metric": metric,
            "n": len(samples),
            "metrics": metrics,
            "generation": results["configs"][task].get("generation_kwargs"),
            "task_version": results["versions"].get(task),
            "asked": _asked(samples),
        }
    summary |= {"groups": results.get("groups", {}), "checkpoint": checkpoint, "versions": package_versions()}
    # Through text, since the harness leaves functions and tensors among its settings.
    for name, content in (("results", results), ("summary", summary)):
        write_json(out / f"{name}.json", json.loads(json.dumps(content, default=str)))
    return summary


def score_metric(samples: list[Sample], metrics: dict[str, Any], higher_is_better: dict[str, bool]) -> str | None:
    """The metric by which single samples are compared: from 0 to 1, higher is better, its mean the task's own score.

    Perplexities and scores of a whole corpus (BLEU) have none: None.
    """
    named = samples[0]["metrics"]
    for name in sorted(named, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        values = [sample.get(name) for sample in samples]
        if not higher_is_better.get(name) or not all(isinstance(value, int | float) for value in values):
            continue
        numbers = [float(value) for value in values if value is not None]
        whole = metrics.get(f"{name},{samples[0]['filter']}")
        within = all(0 <= number <= 1 for number in numbers)
        if within and isinstance(whole, float | int) and math.isclose(fmean(numbers), whole, abs_tol=1e-6):
            return name
    return None


def _unit(sample: Sample, metric: str) -> Unit:
    return Unit(str(sample["doc_id"]), float(sample[metric]), 1.0, None, _answer(sample, metric), str(sample["target"]))


def _answer(sample: Sample, metric: str) -> str:
    """What the model said; of a multiple choice the option that `metric` takes for chosen."""
    responses = sample["filtered_resps"]
    if not responses or not isinstance(responses[0], list | tuple):
        return str(responses[0]) if responses else ""
    pairs = [(str(context), str(ending)) for context, ending, *_ in sample["arguments"]]
    count = len(pairs) // 2 if "acc_mutual_info" in sample["metrics"] else len(pairs)  # the rest is without a question
    values = [float(likelihood) for likelihood, *_ in responses[:count]]
    endings = [ending.strip() for _, ending in pairs[:count]]
    if metric == "acc_norm":
        values = [value / max(len(ending), 1) for value, ending in zip(values, endings, strict=True)]
    chosen = max(range(count), key=values.__getitem__)
    # WinoGrande and its kin put the option into the context.
    return endings[chosen] if len(set(endings)) > 1 or count == 1 else pairs[chosen][0]


def _asked(samples: list[Sample]) -> str:
    """Digest of all that was asked, and of what was expected."""
    asked = [[str(sample["doc_id"]), str(sample["arguments"]), str(sample["target"])] for sample in samples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
