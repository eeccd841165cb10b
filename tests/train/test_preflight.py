"""The rank that cannot take part is named before anything is loaded: real process groups of two forked ranks."""

from __future__ import annotations

import re
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ranks_kit import errors_of_ranks, start_ranks
from torch.distributed import TCPStore

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError
from llava_compete.train import distributed, preflight
from llava_compete.train.distributed import Rank
from llava_compete.train.identity import flat

HOST = socket.gethostname()


def test_ranks_that_fit_pass(tmp_path: Path) -> None:
    def check(rank: Rank, store: Any) -> None:
        preflight.check_links(rank, store)
        preflight.check_same(rank, {"seed": 1})
        preflight.log_devices(rank)
        preflight.check_alike(rank, tmp_path)

    assert errors_of_ranks(check) == ["", ""]
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, f"rank 1 on {HOST} has torch 1.0, rank 0 has torch 2"),
        ({"peft": None}, f"rank 1 on {HOST} has no peft, rank 0 has peft "),
        ({"extra": "3"}, f"rank 1 on {HOST} has extra 3, rank 0 has no extra"),
    ],
)
def test_other_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    def check(rank: Rank, store: Any) -> None:
        if rank.number == 1:
            versions = {**preflight.package_versions(), **change}
            monkeypatch.setattr(preflight, "package_versions", lambda: {k: v for k, v in versions.items() if v})
        preflight.check_alike(rank, tmp_path)

    for error in errors_of_ranks(check):
        assert error.startswith(message)


def test_an_output_directory_that_is_not_shared_is_named(tmp_path: Path) -> None:
    errors = errors_of_ranks(lambda rank, _: preflight.check_alike(rank, tmp_path / f"node{rank.number}"))
    assert errors[0] == f"rank 1 on {HOST} does not see {tmp_path}/node0, where rank 0 writes; share it"


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "JOIN_LIMIT", timedelta(seconds=2))
    (error,) = errors_of_ranks(lambda rank, store: None, ranks=[0])
    assert error.startswith("rank 1 of 2 did not come to the start within 2 s")


def test_ranks_that_torchrun_starts_anew_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its agent's store, which stays (--max-restarts), and has the port of the rank 0 that is gone."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(distributed, "JOIN_LIMIT", timedelta(seconds=5))
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        second = start_ranks(lambda rank, store: None, ranks=[1], port=agent.port)
        time.sleep(0.3 * restart)  # the other has looked into the store by then
        first = start_ranks(lambda rank, store: None, ranks=[0], port=agent.port)
        assert first() + second() == ["", ""]


def test_a_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LIMIT", timedelta(seconds=2))

    def check(rank: Rank, store: Any) -> None:
        if rank.number == 1:
            time.sleep(4)
        preflight.check_links(rank, store)

    assert errors_of_ranks(check)[0].startswith("rank 1 of 2 did not come to the preflight within 2 s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed=2, rank 0 with seed=1"),
        ({"training": {"save_steps": 5}}, "training.save_steps=5, rank 0 with training.save_steps=4"),
        ({"training": {"save_steps": 4, "lr": 0.5}}, "training.lr=0.5, rank 0 with no training.lr"),
        ({"training": {}}, "no training.save_steps, rank 0 with training.save_steps=4"),
        ({"sources": [{"name": "a", "weight": 2.0}]}, "sources.a.weight=2.0, rank 0 with sources.a.weight=1.0"),
    ],
)
def test_other_settings_are_named(change: dict[str, Any], message: str) -> None:
    settings = {"seed": 1, "training": {"save_steps": 4}, "sources": [{"name": "a", "weight": 1.0}]}

    def check(rank: Rank, store: Any) -> None:
        mine = settings if rank.number == 0 else {**settings, **change}
        preflight.check_same(rank, dict(flat(mine, "")))

    expected = f"rank 1 on {HOST} was started with {message}; give all the same command"
    assert errors_of_ranks(check) == [expected, expected]


class _Settings(StrictConfig):
    output_dir: Path
    training: dict[str, Any]
    sources: list[dict[str, Any]]


def test_what_a_machine_may_have_for_itself_is_not_compared() -> None:
    settings = _Settings(
        output_dir=Path("/here"),
        training={"logging_dir": "/x", "dataloader_num_workers": 4, "report_to": "none", "logging_steps": 5},
        sources=[{"name": "a", "path": Path("/data"), "weight": 1.0}],
    )
    assert preflight.comparable_settings(settings) == {
        "training.logging_steps": 5,  # stays: the ranks add up their metrics then
        "sources.a.name": "a",
        "sources.a.weight": 1.0,
    }


def test_ranks_without_the_gpu_that_was_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM_GPUS", "2")
    errors = errors_of_ranks(lambda rank, store: None)
    assert errors[0] == errors[1]
    assert re.fullmatch(
        rf"rank 0 on {HOST}: NUM_GPUS is 2, found no usable GPU \(.+\); NUM_GPUS=0 trains on the CPU", errors[0]
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "x", "RANK=x: expected a whole number"),
        ("MASTER_PORT", "abc", "MASTER_PORT=abc: expected a whole number"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000: expected at most 65535"),
    ],
)
def test_a_wrong_number_of_a_launcher_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), distributed.process_group(distributed.this_rank()):
        pass
