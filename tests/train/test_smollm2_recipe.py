"""The recipe on real pretrained parts: every file parses, and what its variants lay over the upcycled model fits."""

from pathlib import Path

import pytest

from llava_compete.config import load_config, parse_config, read_yaml
from llava_compete.data.text.config import TextSection
from llava_compete.evaluation.config import EvalConfig
from llava_compete.model.upcycle import UpcycleConfig
from llava_compete.train.config import TrainConfig
from llava_compete.train.starting_point import moe_in_force

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2_dinov2"


@pytest.mark.parametrize("path", sorted(RECIPE.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_parses(path):
    if path.stem == "perplexity":
        parse_config(TextSection, read_yaml(path)["data"], source=str(path))
        return
    kind = {"eval": EvalConfig, "upcycle": UpcycleConfig}.get(path.stem, TrainConfig)
    load_config(kind, path)


def test_stages_start_from_each_other_and_variants_fit():
    found = {path.stem: read_yaml(path) for path in RECIPE.glob("*.yaml")}
    for stage, before in (
        ("pft", "pretrain_align"),
        ("upcycle", "pft"),
        *((f"sft{end}", "upcycle") for end in ("", "_lora", "_loss")),
    ):
        assert found[stage]["model"]["checkpoint"] == found[before]["output_dir"]
        assert found[stage]["output_dir"].rpartition("/")[2] == stage
    stored = load_config(UpcycleConfig, RECIPE / "upcycle.yaml").moe.model_dump(mode="json")
    judged = moe_in_force(load_config(TrainConfig, RECIPE / "sft_loss.yaml"), stored)
    assert judged.vision.competition_judge == judged.language.competition_judge == "loss"
    assert load_config(TrainConfig, RECIPE / "sft_lora.yaml").trainable["language"].mode == "lora"
