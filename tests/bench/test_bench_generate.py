"""The generation benchmark compares models of the same size on the same batch (its numbers are not asserted here)."""

from __future__ import annotations

import pytest

from llava_compete.bench.generate import DENSE, LLAVA, MOE, SAME_ACTIVE, SAME_BYTES, Size, bench_generate
from llava_compete.errors import UserError


def test_the_mixture_is_measured_beside_dense_models_of_its_size_its_active_width_and_its_bytes():
    size = Size(hidden=64, intermediate=96, layers=2, heads=4, vision_hidden=64, vision_layers=2, vocabulary=512)
    options = {"batch_size": 2, "prompt_tokens": 80, "new_tokens": 3, "rounds": 1, "device": "cpu", "dtype": "float32"}
    result = bench_generate(size, **options, static_cache=True)
    static = [f"{name}, static cache" for name in (LLAVA, DENSE, MOE)]
    assert list(result["speeds"]) == [LLAVA, DENSE, SAME_ACTIVE, SAME_BYTES, MOE, *static]
    assert all(speed.tokens_per_second > 0 for speed in result["speeds"].values())
    parameters = {name: speed.parameters for name, speed in result["speeds"].items()}
    # Theirs keeps the tower's last block, whose output nobody reads.
    assert parameters[DENSE] == pytest.approx(parameters[LLAVA], rel=0.25)
    experts, routers = 2 * 3 * 64 * 96, 2 * 4 * 64  # one more expert in each layer; all routers
    assert parameters[SAME_ACTIVE] == parameters[DENSE] + experts
    assert parameters[SAME_BYTES] == parameters[DENSE] + 3 * experts
    assert parameters[MOE] == parameters[SAME_BYTES] + routers
    speeds = {name: speed.tokens_per_second for name, speed in result["speeds"].items()}
    dense = (LLAVA, DENSE, SAME_ACTIVE, SAME_BYTES)
    assert result["moe_over"] == {name: pytest.approx(speeds[MOE] / speeds[name], abs=1e-3) for name in dense}


def test_a_prompt_must_have_room_for_its_image():
    with pytest.raises(UserError, match="--prompt-tokens: found 64, expected more than the 64"):
        bench_generate(Size(), batch_size=1, prompt_tokens=64, new_tokens=1, rounds=1, device="cpu", dtype="float32")
