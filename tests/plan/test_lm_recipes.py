"""Every recipe of configs/lm parses, has the published size, and its dense baseline the same active parameters."""

from pathlib import Path

import pytest

from llava_compete.config import load_config
from llava_compete.errors import UserError
from llava_compete.moe.terms import ROUTERS
from llava_compete.plan.cluster import Cluster
from llava_compete.plan.plan import plan
from llava_compete.train.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "lm"


@pytest.mark.parametrize(("name", "total"), [("154m", 154e6), ("660m", 660e6)])
def test_plan_confirms_the_published_sizes(name, total):
    result = plan(CONFIGS / f"{name}.yaml", [], Cluster(1, 1), 80.0)
    # 660M is published without embeddings and routers (9.4M here).
    assert result.total.total == pytest.approx(total, rel=0.016)
    assert result.recipe.length == 1024


@pytest.mark.parametrize("name", ["tiny", "154m", "660m"])
def test_the_dense_baseline_has_the_same_active_parameters(name):
    experts, dense = (plan(CONFIGS / f"{stem}.yaml", [], Cluster(1, 1), 80.0) for stem in (name, f"{name}_dense"))
    assert dense.total.total == dense.total.active
    assert dense.total.active == pytest.approx(experts.total.active, rel=0.02)  # but for the routers


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_with_every_router(path):
    config = load_config(TrainConfig, path)
    assert config.stage == "pretrain_lm"
    if not config.moe:
        return
    assert config.moe.competition_rate == 0.07
    assert config.moe.max_competing_layers == 3
    language = config.moe.language
    assert (language.distillation_coef, language.diversity_coef) == (0.001, 0.005)
    assert language.winner_distillation_coef == 0
    for router in ROUTERS:
        overrides = [f"moe.language.router={router}"]
        terms = ("distillation", "winner_distillation", "diversity") if router != "competition" else ()
        overrides += [f"moe.language.{term}_coef=null" for term in terms]
        found = load_config(TrainConfig, path, overrides).moe.language
        assert (found.router, found.num_experts) == (router, config.moe.language.num_experts)


def test_text_and_conversations_do_not_mix():
    with pytest.raises(UserError, match="stage sft trains on conversations"):
        load_config(TrainConfig, CONFIGS / "tiny.yaml", ["stage=sft"])
    with pytest.raises(UserError, match=r"unknown key 'data\.contxt'; did you mean 'context'"):
        load_config(TrainConfig, CONFIGS / "tiny.yaml", ["data.contxt=3"])
