"""A task of ours that asks or scores otherwise gets a new version: scores of two versions are not comparable."""

import hashlib
import json
from pathlib import Path

import pytest

from llava_compete.evaluation.config import EVAL_ROOT
from llava_compete.evaluation.lmms.suites import read_task_yaml

TASKS = EVAL_ROOT / "tasks"
RECORD = Path(__file__).with_name("own_task_versions.json")
NOT_ASKED = ("task", "dataset_kwargs", "metadata")  # names, places and the version itself


def _texts(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else [value]


def fingerprint(path):
    """Of a task's YAML with its includes, and of the files here whose functions it names."""
    content = {key: value for key, value in read_task_yaml(path).items() if key not in NOT_ASKED}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    named = {TASKS / f"{text.partition('.')[0]}.py" for text in _texts(content) if isinstance(text, str) and text}
    for file in sorted(file for file in named if file.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_task_that_asks_or_scores_otherwise_has_a_new_version(path):
    found = [read_task_yaml(path)["metadata"]["version"], fingerprint(path)]
    assert found == json.loads(RECORD.read_text()).get(path.stem), (
        f"{path.stem}: prompt, settings or scoring are not those recorded: where an answer may score otherwise raise "
        f"metadata.version, and write {found} into {RECORD.name}"
    )
