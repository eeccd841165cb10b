"""What a picture costs: the benchmark counts what the processor makes, on towers of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path

import naflex_kit
import pytest
from tower_kit import TIMM

from llava_compete.bench import pictures
from llava_compete.cli import main


def test_tiles_cost_more_than_a_square(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, naflex = TIMM["vision_cfg"], naflex_kit.TOWER["vision_cfg"]
    shown = {"square": (vit, {}), "tiles": (vit, {"tiles": {"max": 4}}), "naflex": (naflex, {"naflex": {}})}
    monkeypatch.setattr(pictures, "SHOWN", shown)
    assert main(["bench", "pictures", "--pages", "2", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    square, tiles, patches = (found[name] for name in shown)
    assert (square["tokens"], square["rows_of_pixels"]) == (4, 1)  # a map of 4 x 4, pooled
    assert 1 < tiles["rows_of_pixels"] <= 5
    assert 4 < tiles["tokens"] <= 4 + 4 * 4 + 4
    assert patches["rows_of_pixels"] == 4 * patches["tokens"] <= 256
    assert tiles["peak_mib"] > square["peak_mib"] > 0
    assert capsys.readouterr().out.count("\n") == 2 + len(shown)
