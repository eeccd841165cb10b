"""The data benchmark: both loops do the same work on the same rows, and a large table stays on disk."""

import pytest
import torch

from llava_compete.bench import data as bench
from llava_compete.bench.data_scale import run_scale
from llava_compete.data.collator import Collator
from llava_compete.data.config import DataSection, SourceSection
from llava_compete.data.dataset import build_datasets
from llava_compete.parts import IGNORE_INDEX
from llava_compete.vision.tower import normalise
from llava_compete.vision.tower_config import PreprocessConfig


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(bench, "NUM_IMAGES", 2)


def test_the_plain_loop_reads_the_same_rows(tmp_path, few_images):
    processor = bench.processor_for(bench.make_rows(tmp_path, 4))
    source = SourceSection(name="bench", path=tmp_path / "rows.json")
    ours = build_datasets(DataSection(sources=[source], cache_dir=tmp_path / "cache"), processor, seed=0).train
    plain = bench.PlainDataset(tmp_path / "rows.json", processor)
    assert len(plain) == len(ours) == 4
    for one, other in zip((ours[index] for index in range(4)), (plain[index] for index in range(4)), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["pixel_values"].shape == other["pixel_values"].shape == (1, 3, 224, 224)
        # Padded before or after resizing, the picture is the same but for rounding.
        normalised = normalise(one["pixel_values"], PreprocessConfig(size=224))
        assert (normalised - other["pixel_values"]).abs().mean() < 0.02
        answers = one["labels"] != IGNORE_INDEX
        assert torch.equal(one["labels"][answers], other["labels"][answers])
    times = bench.steps(ours, processor, Collator(processor), count=4)
    assert set(times) == {"read", "decode", "resize", "tokenise", "collate", "hand over"}
    assert times["decode"] > 0


def test_the_table_says_what_decoding_is_of_a_sample():
    times = {"1": {"decode": 2.0, "resize": 5.0, "collate": 1.0}, "3": {"decode": 2.0, "resize": 1.5, "collate": 0.5}}
    *_, first, last = bench.table({f"224 pixels, version {number}": steps for number, steps in times.items()})
    assert first == "| 224 pixels, version 1 | 2.00 | 5.00 | 1.00 | 8.00 | 25% | 1.00 | 2.67 |"
    assert last == "| 224 pixels, version 3 | 2.00 | 1.50 | 0.50 | 4.00 | 50% | 2.00 | 3.20 |"


def test_a_gpu_takes_the_images_that_plan_counts() -> None:
    # 6 operations a parameter and token: 3.8B and 0.43B, and what attention does.
    least = 6 * (3.7e9 * 2048 + 0.41e9 * 729)
    assert 0.45 * 989e12 / least / 1.35 < bench.images_of_a_gpu() < 0.45 * 989e12 / least


@pytest.mark.parametrize(
    "num_rows", [2_000, pytest.param(665_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="665K")]
)
def test_a_large_table_stays_on_disk(num_rows, tmp_path, few_images):
    processor = bench.processor_for(bench.make_rows(tmp_path, 50))
    result = run_scale(tmp_path, processor, num_rows, rows_read=min(num_rows, 20_000))
    assert result["rows"] == num_rows
    assert 0 < result["worker_growth_mib"] < 150
    assert result["start_up_seconds"] < 30
