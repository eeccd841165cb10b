"""Two ranks under ZeRO, killed (SIGKILL) in their last save; the same command then ends as a run that was not.

Slow (minutes): `bash scripts/test.sh -m slow tests/train`. The same points in one process: test_last_save.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_kit import launch_config, run_worker, train_launched
from stage_kit import read_metrics

from llava_compete.config import dump_yaml
from llava_compete.train import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("deepspeed", "point", "complete"),
    [
        ("zero2", "publishing", []),  # of the first checkpoint
        ("zero2", "model", ["checkpoint-1", "checkpoint-2"]),
        ("zero3", "installing", ["checkpoint-1", "checkpoint-2"]),
        ("zero3", "mark", ["checkpoint-1", "checkpoint-2"]),
    ],
)
def test_killed_in_the_last_save(data: Path, tmp_path: Path, deepspeed: str, point: str, complete: list[str]) -> None:
    changes = {"training": {"max_steps": 2, "save_steps": 1}, "deepspeed": deepspeed}
    straight = train_launched(data, tmp_path, "straight", 4, 1, **changes)
    dump_yaml(launch_config(data, tmp_path / "killed", 4, 1, **changes), tmp_path / "killed.yaml")
    assert run_worker("kill_worker.py", tmp_path / "killed.yaml", point).returncode != 0
    killed = tmp_path / "killed"
    assert [path.name for path in checkpoints.list_complete(killed)] == complete
    assert checkpoints.read_finished(killed) is None
    train_launched(data, tmp_path, "killed", 4, 1, **changes)
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    losses = [[(line["step"], line["loss"]) for line in read_metrics(folder)] for folder in (straight, killed)]
    assert losses[0] == losses[1]
