"""A stage killed at any point of its last save, or with damaged files, finishes equal to one that never stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_kit import fail, run_stage_here, stop_at_step
from safetensors.torch import load_file
from stage_kit import read_metrics, stage_config, tiny_moe, write_data

from llava_compete.errors import UserError
from llava_compete.train import checkpoints, run
from llava_compete.train.step_lines import append, cut_after

LORA = {"projector": "full", "language": {"mode": "lora", "lora_rank": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "dense"
    return run_stage_here(stage_config("pretrain_align", data, out, training={"max_steps": 1}, deepspeed=None))


def _stage(data: Path, start: Path, out: Path, lora: bool) -> dict[str, Any]:
    training = {"max_steps": 3, "save_steps": 2}
    if lora:
        model = {"checkpoint": str(start)}
        return stage_config("pft", data, out, model=model, trainable=LORA, training=training, deepspeed=None)
    return stage_config("sft", data, out, moe=tiny_moe(), training=training, deepspeed=None)


@pytest.fixture(scope="module")
def straight(request: pytest.FixtureRequest, data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / ("lora" if request.param else "full")
    return run_stage_here(_stage(data, start, out, request.param))


def _before_publishing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checkpoints.publish

    def publish(output_dir: Path, name: str, record: Any) -> None:
        if name == "checkpoint-3":
            fail()
        plain(output_dir, name, record)

    monkeypatch.setattr(checkpoints, "publish", publish)


def _before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_save_final", fail)


def _before_installing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "install_model", fail)


def _while_installing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, moved = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        if path.parent.name == "final":
            moved.append(path)
            if path.name == "config.json":  # the last one
                assert len(moved) > 3
                fail()
        return plain(path, target)

    monkeypatch.setattr(Path, "replace", replace)


def _before_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "write_finished", fail)


KILLS = {
    _before_publishing: 2,
    _before_the_model: 3,
    _before_installing: 3,
    _while_installing: 3,
    _before_the_mark: 3,
}
# Of a stage with adapters, whose result has more files, by default where some of them are in place and some are not.
CASES = [pytest.param(False, kill, id=f"full-{kill.__name__}") for kill in KILLS] + [
    pytest.param(True, kill, id=f"lora-{kill.__name__}", marks=[] if kill is _while_installing else pytest.mark.slow)
    for kill in KILLS
]


@pytest.mark.parametrize(("straight", "kill"), CASES, indirect=["straight"])
def test_killed_in_the_last_save(
    data: Path, start: Path, straight: Path, tmp_path: Path, kill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    config = _stage(data, start, tmp_path / "out", straight.name == "lora")
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run_stage_here(config)
    assert checkpoints.list_complete(tmp_path / "out")[-1].name == f"checkpoint-{KILLS[kill]}"
    assert checkpoints.read_finished(tmp_path / "out") is None
    out = run_stage_here(config)
    _assert_equal(straight, out)


def test_a_stage_that_is_told_to_stop_in_its_last_save_finishes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run._save_final

    def told(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        plain(*arguments)

    monkeypatch.setattr(run, "_save_final", told)
    before = signal.signal(signal.SIGTERM, fail)
    training = {"max_steps": 1, "save_strategy": "no"}
    try:
        out = run_stage_here(stage_config("pretrain_align", data, tmp_path, training=training, deepspeed=None))
        assert signal.getsignal(signal.SIGTERM) is fail
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoints.read_finished(out) is not None


def _assert_equal(straight: Path, out: Path) -> None:
    names = {str(path.relative_to(straight)) for path in straight.rglob("*") if "run" not in path.parts}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if "run" not in path.parts} == names
    for path in straight.rglob("model.safetensors"):
        assert path.read_bytes() == (out / path.relative_to(straight)).read_bytes()
    if straight.name == "lora":
        adapter = "adapter/adapter_model.safetensors"
        assert load_file(straight / adapter).keys() == load_file(out / adapter).keys()
    records = [[(line["step"], line["loss"]) for line in read_metrics(folder)] for folder in (straight, out)]
    assert records[0] == records[1]
    finished = [checkpoints.read_finished(folder) for folder in (straight, out)]
    assert [content["steps"] for content in finished if content] == [3, 3]


def test_a_damaged_file_of_the_right_size_falls_back_to_the_checkpoint_before(
    data: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _stage(data, start, tmp_path / "out", lora=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _before_the_model(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run_stage_here(config)
    optimizer = tmp_path / "out" / "checkpoint-3" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1  # torch.load would not notice
    optimizer.write_bytes(content)
    out = run_stage_here(config)
    assert "checkpoint-3: damaged checkpoint skipped (optimizer.pt is not as it was written)" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3]
    assert [path.name for path in checkpoints.list_complete(out)] == ["checkpoint-2", "checkpoint-3"]
    assert next(checkpoints.sound(out)) == out / "checkpoint-3"


def test_every_step_once_in_all_logs_after_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    training = {"max_steps": 5, "save_steps": 2, "report_to": "tensorboard"}
    out = tmp_path / "out"
    config = stage_config(
        "sft", data, out, moe=tiny_moe(), training=training, deepspeed=None, sample_steps=1, model=None
    )
    config["data"]["validation_fraction"] = 0.3
    stop_at_step(monkeypatch, 4)  # before its checkpoint: steps 3 and 4 are trained again
    with pytest.raises(KeyboardInterrupt):
        run_stage_here(config)
    with (out / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "expert": {"a": 1}')  # a kill in the middle of a line
    run_stage_here(config)
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5]
    answers = [json.loads(line) for line in (out / "run" / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [answer["step"] for answer in answers] == [step for step in range(1, 6) for _ in range(3)]
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_lines_are_cut_as_a_whole_and_keep_strange_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append(path, [{"step": 1, "text": "a\u2028b", "loss": float("nan")}, {"step": 2}])
    append(path, [{"event": "end"}])
    cut_after(path, 1)
    assert [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] == [
        {"step": 1, "text": "a\u2028b", "loss": None}
    ]
    assert [item.name for item in tmp_path.iterdir()] == ["lines.jsonl"]


def test_a_file_system_without_locks_is_not_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level("WARNING"), checkpoints.output_lock(tmp_path):
        pass
    assert "no file locks here (Function not implemented): nothing keeps a second run out" in caplog.text


@pytest.mark.parametrize(
    ("checkpoint", "output_dir", "said"),
    [
        ("start", "start", r"output_dir: model\.checkpoint is .*start itself, which"),
        ("link", "start", r"output_dir: model\.checkpoint is .*start itself, which"),
        ("start/checkpoint-1", "start", r"output_dir: model\.checkpoint is .*start's checkpoint-1, which"),
        ("start", "start/next/sft", r"output_dir: .*start/next/sft lies inside model\.checkpoint, .*start; choose"),
        ("link", "start/next", r"output_dir: .*start/next lies inside model\.checkpoint, .*start; choose"),
    ],
)
def test_a_stage_does_not_write_into_its_own_start(
    data: Path, tmp_path: Path, checkpoint: str, output_dir: str, said: str
) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "start")
    model = {"checkpoint": str(tmp_path / checkpoint)}
    with pytest.raises(UserError, match=said):
        run_stage_here(stage_config("pft", data, tmp_path / output_dir, model=model, deepspeed=None))
