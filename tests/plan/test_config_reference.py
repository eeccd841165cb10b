"""Every key of every YAML file has its meaning at the field, and docs/config.md shows what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_compete.cli import main
from llava_compete.plan.config_reference import FILES, find, sections, to_markdown

DOCS = Path(__file__).parents[2] / "docs" / "config.md"


@pytest.mark.parametrize("kind", FILES)
def test_every_field_has_a_meaning(kind: str) -> None:
    lacking = [f"{s.paths[0]}.{row.key}" for s in sections(FILES[kind]) for row in s.rows if not row.meaning.strip()]
    assert not lacking


def test_the_file_is_what_the_command_writes() -> None:
    assert DOCS.read_text(encoding="utf-8") == to_markdown(), "run: llava-compete config --markdown docs/config.md"


def test_sections_are_found_by_their_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row.key for row in find("moe.language")[0].rows][:2] == ["num_experts", "num_experts_per_tok"]
    assert {"lora_rank", "lora_alpha"} <= {row.key for section in find("trainable") for row in section.rows}
    assert {path for section in find("data") for path in section.paths} >= {"data", "data.sources[]", "data.train"}
    assert main(["config", "guards"]) == 0
    assert "max_bad_steps" in capsys.readouterr().out
    assert main(["config", "trainin"]) == 2
    assert "did you mean 'training'?" in capsys.readouterr().err
