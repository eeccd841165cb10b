"""Router agreement and expert use, against a count by hand on the blocks themselves."""

from __future__ import annotations

import datasets
import pytest
import torch
from evaluation_kit import save_tiny
from PIL import Image

from llava_compete.errors import UserError
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.routing import _batches, measure_routing
from llava_compete.model.build import load_checkpoint
from llava_compete.moe.block import moe_blocks


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = [
        {
            "image": Image.new("RGB", (28, 28), (20 * i, 200 - 10 * i, 90)),
            "question": "what colour is the circle " * (1 + i % 3),
            "answer": "red",
            "id": str(i),
        }
        for i in range(7)
    ]
    path = tmp_path_factory.mktemp("data") / "test.parquet"
    features = datasets.Features(
        {"image": datasets.Image(), **dict.fromkeys(("question", "answer", "id"), datasets.Value("string"))}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def config_for(checkpoint, table, **changes) -> EvalConfig:
    return EvalConfig(checkpoint=str(checkpoint), suite="demo", routing_data=[str(table)], device="cpu", **changes)


def test_agreement_is_what_the_blocks_say(table, tmp_path):
    """Winners by running every expert on the block's input, choices by the router's probabilities."""
    checkpoint = save_tiny(tmp_path / "moe")
    config = config_for(checkpoint, table, batch_size=3)
    found = measure_routing(config)

    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    model.config.competition_at_inference = True
    shares: dict[str, list[float]] = {}

    def count(block):
        def hook(module, inputs, output):
            x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
            chosen = block.router(x_TD).probs_TR.topk(2).indices
            winners = block.experts(x_TD).winners_TK
            for row in mask.reshape(-1).nonzero().flatten().tolist():
                same = set(chosen[row].tolist()) & set(winners[row].tolist())
                shares.setdefault(block.name, []).append(len(same) / 2)

        return hook

    for block in moe_blocks(model).values():
        block.register_forward_hook(count(block))
    with torch.inference_mode():
        for batch in _batches(config, processor):
            mask = batch["attention_mask"]
            model(**{key: value for key, value in batch.items() if key != "sample_ids"})
    for name, values in shares.items():
        assert found["router_agreement_by_layer"][name] == pytest.approx(sum(values) / len(values), abs=1e-4)
        assert found["tokens"][name] == len(values)
    mean = sum(found["router_agreement_by_layer"].values()) / len(shares)
    assert found["router_agreement"] == pytest.approx(mean, abs=1e-3)


def test_expert_use_sums_to_one_and_padding_does_not_count(table, tmp_path):
    checkpoint = save_tiny(tmp_path / "moe")
    whole, alone = (measure_routing(config_for(checkpoint, table, batch_size=size)) for size in (7, 1))
    for name, shares in whole["expert_use"].items():
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert shares == pytest.approx(alone["expert_use"][name], abs=1e-3)
    assert whole["tokens"] == alone["tokens"]


def test_a_dense_checkpoint_has_no_routing(table, tmp_path):
    found = measure_routing(config_for(save_tiny(tmp_path / "dense", dense=True), table))
    assert found["router_agreement"] is None
    assert found["expert_use"] == {}


def test_a_table_that_does_not_fit(table, tmp_path):
    checkpoint = save_tiny(tmp_path / "moe")
    with pytest.raises(UserError, match="is missing; build it with"):
        measure_routing(config_for(checkpoint, tmp_path / "no.parquet"))
    datasets.Dataset.from_dict({"question": ["a"]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="columns question; expected also image, answer"):
        measure_routing(config_for(checkpoint, tmp_path / "bad.parquet"))
