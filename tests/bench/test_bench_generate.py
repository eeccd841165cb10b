"""The generation benchmark compares models of the same size on the same batch (its numbers are not asserted here)."""

from __future__ import annotations

import pytest

from llava_compete.bench.generate import Size, bench_generate
from llava_compete.errors import UserError


def test_dense_has_llavas_size_and_all_are_measured():
    size = Size(hidden=64, intermediate=96, layers=2, heads=4, vision_hidden=64, vision_layers=2, vocabulary=512)
    result = bench_generate(size, batch_size=2, prompt_tokens=80, new_tokens=3, rounds=1, device="cpu", dtype="float32")
    assert set(result["speeds"]) == {"transformers Llava", "dense", "moe"}
    assert all(speed.tokens_per_second > 0 for speed in result["speeds"].values())
    reference, dense = result["speeds"]["transformers Llava"], result["speeds"]["dense"]
    # Theirs keeps the tower's last block, whose output nobody reads.
    assert dense.parameters == pytest.approx(reference.parameters, rel=0.25)
    assert result["speeds"]["moe"].parameters > dense.parameters


def test_a_prompt_must_have_room_for_its_image():
    with pytest.raises(UserError, match="--prompt-tokens: found 64, expected more than the 64"):
        bench_generate(Size(), batch_size=1, prompt_tokens=64, new_tokens=1, rounds=1, device="cpu", dtype="float32")
