"""Bad MoE settings are refused when the config is read, naming the key."""

from __future__ import annotations

from typing import Any

import pytest

from llava_compete.config import parse_config
from llava_compete.errors import UserError
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.terms import ROUTERS

JUDGED = {"competition_judge": "loss"}
TAUGHT = {"competition_output": "router"}
MEANS = {**JUDGED, "competition_answers": "mean"}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: found 3"),
        ({"num_experts": 0}, "num_experts: found 0"),
        ({"num_experts": 5, "router": "xmoe"}, "num_experts: found 5, expected an even number"),
        ({"num_experts": 5, "router": "perturbed_cosine"}, "num_experts: found 5"),
        ({"num_experts_per_tok": 1, "router": "shared_softmax"}, "num_experts_per_tok: found 1, expected at least 2"),
        ({"router": "softmx"}, "router: found 'softmx'"),
        ({"router": "softmax", "diversity_coef": 0.1}, "diversity_coef: router 'softmax' has no such term"),
        ({"router": "sigmoid", "affinity": "relu"}, "affinity: router 'sigmoid' has no such term"),
        ({"router": "sigmoid", "competition_chunk_tokens": 5}, "competition_chunk_tokens: router 'sigmoid'"),
        ({"router": "softmax", "competition_judge": "loss"}, "competition_judge: router 'softmax' has no such term"),
        ({"competition_margin": 0.5}, "competition_margin: found 0.5, expected none, for competition_judge 'response'"),
        ({**JUDGED, "affinity": "relu"}, "affinity: found 'relu', expected none, for competition_judge 'loss'"),
        ({**JUDGED, "affinity": "softplus"}, "affinity: found 'softplus', expected none, for competition_judge 'loss'"),
        ({**JUDGED, "winner_distillation_coef": 0.1}, "winner_distillation_coef: found 0.1, expected none"),
        ({**JUDGED, "competition_keeps": "input"}, "competition_keeps: found 'input', expected none"),
        ({**JUDGED, "distillation_coef": 0.1}, "distillation_coef: found 0.1, expected none"),
        ({**JUDGED, "diversity_coef": 0.1}, "diversity_coef: found 0.1, expected none"),
        ({**JUDGED, "competition_balance_coef": 0.1}, "competition_balance_coef: found 0.1, expected none"),
        ({**JUDGED, "competition_output": "winners"}, "competition_output: found 'winners', expected none, for compet"),
        ({"router": "xmoe", "competition_output": "router"}, "competition_output: router 'xmoe' has no such term"),
        (
            {**TAUGHT, "diversity_coef": 0.1},
            "diversity_coef: found 0.1, expected none, for competition_output 'router'",
        ),
        ({**TAUGHT, "competition_balance_coef": 0.1}, "competition_balance_coef: found 0.1, expected none"),
        ({**TAUGHT, "competition_keeps": "input"}, "competition_keeps: found 'input', expected none"),
        ({"competition_answers": "mean"}, "competition_answers: found 'mean', expected none, for competition_judge"),
        ({**MEANS, "competition_margin": 0.5}, "competition_margin: found 0.5, expected none, for competition_answers"),
        ({**MEANS, "competition_contenders": 2}, "competition_contenders: found 2, expected none"),
        ({**MEANS, "experts_implementation": "batched_mm"}, "experts_implementation: found 'batched_mm', expected one"),
        ({**JUDGED, "num_experts": 2}, "competition_judge: found 'loss' with num_experts_per_tok = num_experts = 2"),
        ({**JUDGED, "competition_contenders": 3}, "competition_contenders: found 3, expected at most the 2 experts"),
        ({"balance_coef": -1.0}, "balance_coef: expected a finite coefficient"),
        ({"affinity": "tanh"}, "affinity: found 'tanh'"),
        ({"layers": [1, 1]}, "layers"),
        ({"layers": {"every": 0}}, "every"),
        ({"num_expert": 4}, "did you mean 'num_experts'"),
        ({"experts_implementation": "fast"}, "experts_implementation"),
    ],
)
def test_bad_layer(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(MoeConfig, {"language": layer}, source="x.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"competition_warmup_ratio": 1.0, "language": {}}, "competition_warmup_ratio"),
        ({"competition_warmup_ratio": 1.5}, "competition_warmup_ratio"),
        ({"max_competing_layers": 0}, "max_competing_layers"),
        ({"competition_rate": 1.1}, "competition_rate"),
    ],
)
def test_bad_schedule(section: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        parse_config(MoeConfig, section, source="x.yaml")


def test_the_papers_defaults_are_resolved_and_survive_a_round_trip() -> None:
    layer = MoeLayerConfig()
    assert (layer.balance_coef, layer.router_z_coef, layer.distillation_coef) == (0.01, 0.001, 0.01)
    assert (layer.winner_distillation_coef, layer.diversity_coef, layer.competition_balance_coef) == (0.1, 0.01, 0.01)
    for router in ROUTERS:
        config = MoeConfig(language=MoeLayerConfig(router=router))
        assert MoeConfig.model_validate(config.model_dump(mode="json")) == config
    judged = MoeLayerConfig.model_validate(JUDGED)
    assert (judged.competition_baseline, judged.competition_margin) == ("output", 0.8)
    assert (judged.competition_answers, MoeLayerConfig.model_validate(MEANS).competition_margin) == ("full", None)
    assert (judged.competition_contenders, judged.competition_rate) == ("all", 1)
    assert judged.distillation_coef is judged.diversity_coef is judged.competition_balance_coef is None
    for config in (judged, *(MoeLayerConfig.model_validate(values) for values in (MEANS, TAUGHT))):
        assert MoeLayerConfig.model_validate(config.model_dump(mode="json")) == config
    assert list(MoeConfig(language=layer, vision=layer).parts()) == ["vision", "language"]


def test_settings_of_earlier_checkpoints_are_read() -> None:
    """They hold the default affinity for every router."""
    stored = {"router": "softmax", "affinity": "softplus", "balance_coef": 0.01}
    assert MoeLayerConfig.model_validate(stored) == MoeLayerConfig(router="softmax")
    assert MoeLayerConfig.model_validate({"affinity": "softplus"}) == MoeLayerConfig()


def test_layer_selection() -> None:
    assert MoeLayerConfig().select_layers(3) == [0, 1, 2]
    assert MoeLayerConfig(layers={"every": 2, "offset": 1}).select_layers(6) == [1, 3, 5]
    assert MoeLayerConfig(layers=[4, 0]).select_layers(6) == [0, 4]
    with pytest.raises(ValueError, match="layers: found 4"):
        MoeLayerConfig(layers=[4]).select_layers(4)


def test_filled_in_coefficients_do_not_count_as_set() -> None:
    """A stage's `moe:` section is laid over the checkpoint's; only what it says may replace what is stored."""
    layer = MoeLayerConfig(diversity_coef=0.5)
    assert layer.balance_coef == 0.01
    assert layer.model_dump(exclude_unset=True) == {"diversity_coef": 0.5}


def test_a_router_that_the_task_does_not_teach_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """SharedE at K = 2: one routed choice has weight 1 whatever the logits, so their gradient is 0."""
    layer: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
    parts = {"vision": {**layer, "router": "shared_softmax"}, "projector": {**layer, "router": "softmax"}}
    parts["language"] = {**layer, "router": "shared_sigmoid", "num_experts_per_tok": 3}
    with caplog.at_level("WARNING", logger="llava_compete"):
        MoeConfig.model_validate(parts).warn_of_untaught_routers()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "moe.vision: router shared_softmax with num_experts_per_tok 2 routes one expert"
    )


def test_the_published_competition_names_the_other_judge(caplog: pytest.LogCaptureFixture) -> None:
    parts: dict[str, Any] = {"vision": {}, "projector": {}, "language": JUDGED}
    with caplog.at_level("INFO", logger="llava_compete"):
        MoeConfig.model_validate(parts).name_the_other_judge()
        MoeConfig.model_validate({"vision": JUDGED, "language": TAUGHT}).name_the_other_judge()
        MoeConfig.model_validate({"language": {"router": "softmax"}}).name_the_other_judge()
    (record,) = caplog.records
    assert record.getMessage().startswith("moe.vision, moe.projector: the published competition")
    assert "sft_loss.yaml beside this recipe" in record.getMessage()
