"""What moves the coupling loss's proxies: drawn by (seed, step, layer), for the layers that have the loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny import tiny_model

from llava_compete.model.build import apply_moe_settings
from llava_compete.moe.config import MoeConfig
from llava_compete.train.callbacks.coupling_noise import CouplingNoiseCallback


def drawn(callback: Any, model: Any, step: int) -> dict[str, torch.Tensor]:
    callback.on_step_begin(SimpleNamespace(device="cpu"), SimpleNamespace(global_step=step), None)
    return dict(model.routing.noise)


def test_each_step_and_layer_has_its_own_and_a_resumed_run_the_same() -> None:
    layer = {"num_experts": 4, "router": "softmax"}
    model, _ = tiny_model({"language": layer, "projector": layer})
    moe = MoeConfig.model_validate({"language": {**layer, "coupling_coef": 1.0}, "projector": layer})
    apply_moe_settings(model, moe)
    trainer = SimpleNamespace(core_model=model)
    callback = CouplingNoiseCallback(trainer, moe)  # type: ignore[arg-type]
    first, second = drawn(callback, model, 0), drawn(callback, model, 1)
    assert set(first) == {"language.0", "language.1"}
    hidden = model.config.text_config.hidden_size
    for name, noise in first.items():
        assert noise.shape == (4, hidden)
        assert -1 <= float(noise.min()) < -0.9 < 0.9 < float(noise.max()) <= 1
        assert not torch.equal(noise, second[name])
    assert not torch.equal(*first.values())
    again = drawn(CouplingNoiseCallback(trainer, moe), model, 1)  # type: ignore[arg-type]
    assert all(torch.equal(again[name], second[name]) for name in second)
    other = drawn(CouplingNoiseCallback(trainer, moe.model_copy(update={"seed": 1})), model, 1)  # type: ignore[arg-type]
    assert not torch.equal(other["language.0"], second["language.0"])
