"""Strict configs: overrides, nearest-key errors, YAML 1.2 numbers, duplicate keys."""

from pathlib import Path

import pytest
from pydantic import Field

from llava_compete.config import StrictConfig, apply_overrides, dump_yaml, load_config, parse_config, read_yaml
from llava_compete.errors import UserError


class Inner(StrictConfig):
    learning_rate: float = 1e-4
    steps: int | None = None


class Outer(StrictConfig):
    name: str
    training: Inner = Inner()
    parts: dict[str, Inner] = Field(default_factory=dict)
    maybe: Inner | None = None
    entries: list[Inner] = Field(default_factory=list)
    folder: Path = Path("a")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_numbers_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ntraining:\n  learning_rate: 1e-3\n")
    config = load_config(Outer, path, ["training.steps=3", "maybe.learning_rate=2e-5", "name='x=y'"])
    assert config.training == Inner(learning_rate=1e-3, steps=3)
    assert config.maybe == Inner(learning_rate=2e-5)
    assert config.name == "x=y"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", r"unknown key 'training.learning_rat'; did you mean 'learning_rate'\?"),
        ("maybe.stepps=1", r"unknown key 'maybe.stepps'; did you mean 'steps'\?"),
        ("parts.vision.step=1", r"unknown key 'parts.vision.step'; did you mean 'steps'\?"),
        ("nam=1", r"unknown key 'nam'; did you mean 'name'\?"),
        ("training.steps=few", r"training.steps: found 'few'"),
        ("training", r"expected key.subkey=value"),
        ("=3", r"expected key.subkey=value"),
        ("name.first=3", r"'name' holds 'a', not a section"),
        ("zzz=3", r"unknown key 'zzz'; valid keys: entries, folder, maybe"),
        ("training=5", r"training: found 5: expected a section with keys$"),
        ("folder=", r"folder: found None: expected a path$"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "name: a\n")
    with pytest.raises(UserError, match=message):
        load_config(Outer, path, [override])


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nentries:\n- steps: 1\n- steps: 2\n")
    assert load_config(Outer, path, ["entries.1.steps=5"]).entries == [Inner(steps=1), Inner(steps=5)]
    assert load_config(Outer, path, ["entries.0={steps: 7}"]).entries[0] == Inner(steps=7)
    for name in ("2", "-1", "first"):
        with pytest.raises(UserError, match=rf"found '{name}', expected the number of a list's entry below 2"):
            apply_overrides(read_yaml(path), [f"entries.{name}.steps=5"])


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.yaml: no such config file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"config.yaml: not valid YAML: .*duplicate key"):
        read_yaml(write(tmp_path, "name: a\nname: b\n"))
    with pytest.raises(UserError, match=r"config.yaml: expected a mapping"):
        read_yaml(write(tmp_path, "- 1\n"))
    with pytest.raises(UserError, match=r"here: missing key 'name'"):
        parse_config(Outer, {}, source="here")


def test_overrides_leave_the_input_alone_and_round_trip(tmp_path: Path) -> None:
    content = {"name": "a", "training": {"steps": 1}}
    changed = apply_overrides(content, ["training.steps=2", "maybe.steps=4"])
    assert content == {"name": "a", "training": {"steps": 1}}
    config = parse_config(Outer, changed, source="test")
    dump_yaml(config, tmp_path / "saved.yaml")
    assert load_config(Outer, tmp_path / "saved.yaml") == config
