"""The command table: every row has a module with help, errors are one line with a non-zero status."""

import importlib
import runpy
import sys

import pytest

from llava_compete.cli import COMMANDS, GROUPS, build_parser, main, parse


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"llava_compete.commands.{COMMANDS[words][0]}")
    assert module.__doc__
    with pytest.raises(SystemExit, match="0"):
        build_parser([*words, "--help"]).parse_args([*words, "--help"])
    assert words[-1] in capsys.readouterr().out


def test_groups_are_described() -> None:
    assert {words[0] for words in COMMANDS if len(words) == 2} == set(GROUPS)


def test_user_error_is_one_line_and_status_2(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", [["recipes", "demo", "--out"], ["config", "--markdown"]], ids=" ".join)
def test_path_that_cannot_be_written_is_one_line(command, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    inside = tmp_path / "file" / "below"
    assert main([*command, str(inside)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["recipes", "nosuch"], "demo, demo_hard"),
        (["config", "zzz"], "eval"),
        (["perplexity", "nowhere"], "nowhere: no checkpoint here"),
    ],
    ids=["recipes", "config", "perplexity"],
)
def test_unknown_names_say_what_there_is(command, expected, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:'llava_compete.cli' found in sys.modules:RuntimeWarning")
def test_module_runs_as_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["llava-compete", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("llava_compete.cli", run_name="__main__", alter_sys=True)
    assert "upcycle" in capsys.readouterr().out


def test_overrides_may_stand_anywhere() -> None:
    arguments = parse(["train", "a.yaml", "seed=1", "--stage", "sft", "training.max_steps=2"])
    assert arguments.overrides == ["seed=1", "training.max_steps=2"]
    with pytest.raises(SystemExit, match="2"):
        parse(["train", "a.yaml", "--stage", "sft", "stray"])
    with pytest.raises(SystemExit, match="2"):
        parse(["train", "a.yaml", "--unknown", "x=1"])
