"""Controls, agreement and expert use, against counts by hand on the blocks themselves."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from evaluation_kit import EXPERTS, save_tiny
from PIL import Image
from tiny import tiny_model

from llava_compete.demo.build import png_bytes, write_test_table
from llava_compete.errors import UserError
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.routing import _batches, measure_routing
from llava_compete.evaluation.routing_controls import _fixed, _mean_of_all, _shifted, replaced_routing
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


def inputs_and_winners(config, checkpoint):
    """By layer and half of the table, what each block met when all compete: inputs, winners, the router's choices."""
    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    model.config.competition_at_inference = True
    met: dict[str, list[list]] = {}

    def hook(block):
        def run(module, inputs, output):
            x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
            chosen = block.router(x_TD).probs_TR.topk(2).indices
            winners = block.experts(x_TD).contest.winners_TK
            for row in mask.reshape(-1).nonzero().flatten().tolist():
                entry = (x_TD[row].numpy(), set(winners[row].tolist()), set(chosen[row].tolist()))
                met.setdefault(block.name, [[], []])[half].append(entry)

        return run

    for block in moe_blocks(model).values():
        block.register_forward_hook(hook(block))
    with torch.inference_mode():
        for half, batch in _batches(config, processor, torch.device("cpu")):  # noqa: B007 - the hooks read it
            mask = batch["attention_mask"]
            model(**{key: value for key, value in batch.items() if key != "sample_ids"})
    return met


def test_agreement_is_what_the_blocks_say(table, tmp_path):
    """Winners by running every expert on the block's input; the constant by counting, the probe by scikit-learn."""
    ridge = pytest.importorskip("sklearn.linear_model").Ridge
    checkpoint = save_tiny(tmp_path / "moe")
    config = config_for(checkpoint, table, batch_size=3)
    found = measure_routing(config)
    shares = dict.fromkeys(("router", "best_constant", "linear_probe"), 0.0)
    met = inputs_and_winners(config, checkpoint)
    for name, (fitted, held_out) in met.items():
        counts = Counter(expert for _, winners, _ in fitted for expert in winners)
        constant = {expert for expert, _ in counts.most_common(2)}
        inputs = np.array([[*x, 1.0] for x, _, _ in fitted], dtype=np.float64)
        targets = np.array([[float(expert in winners) for expert in range(4)] for _, winners, _ in fitted])
        strength = 1e-4 * np.mean(np.sum(inputs**2, axis=0))
        probe = ridge(alpha=strength, fit_intercept=False).fit(inputs, targets)
        expected = dict.fromkeys(shares, 0.0)
        for x, winners, chosen in held_out:
            ranked = np.argsort(-probe.predict(np.array([[*x, 1.0]], dtype=np.float64))[0], kind="stable")
            predictions = {"router": chosen, "best_constant": constant, "linear_probe": set(ranked[:2].tolist())}
            for kind, experts in predictions.items():
                expected[kind] += len(winners & experts) / 2 / len(held_out)
        assert found["agreement_by_layer"][name] == pytest.approx(expected, abs=1e-3)
        assert found["tokens"][name] == len(fitted) + len(held_out)
        shares = {kind: shares[kind] + value / len(met) for kind, value in expected.items()}
    assert found["agreement"] == pytest.approx(shares, abs=1e-3)
    assert len(set(shares.values())) == 3


def test_controls_are_what_a_slow_mixture_says(table, tmp_path):
    """Each block replaced by a loop over tokens and experts, with the control's own choices and weights."""
    checkpoint = save_tiny(tmp_path / "moe")
    config = config_for(checkpoint, table, batch_size=3)
    found = measure_routing(config)["controls"]
    assert list(found) == ["router", "random", "shifted", "fixed", "mean_of_all", "competition"]
    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    use = measure_routing(config)["expert_use"]

    def weights(kind, block, x):
        p = block.router(x[None]).probs_TR[0]
        first, second = p.topk(2).indices.tolist()
        share = float(p[first] / (p[first] + p[second]))
        match kind:
            case "router":
                return {first: share, second: 1 - share}
            case "shifted":
                return {(first + 1) % 4: share, (second + 1) % 4: 1 - share}
            case "fixed":
                best = sorted(range(4), key=lambda expert: -use[block.name][expert])[:2]
                return dict.fromkeys(best, 0.5)
        return dict.fromkeys(range(4), 0.25)

    for kind in ("router", "shifted", "fixed", "mean_of_all"):
        handles = [
            block.register_forward_hook(lambda block, inputs, output, kind=kind: slow(block, inputs[0], weights, kind))
            for block in moe_blocks(model).values()
        ]
        nats, tokens, exact = 0.0, 0, []
        with torch.inference_mode():
            for _, batch in _batches(config_for(checkpoint, table, batch_size=1), processor, torch.device("cpu")):
                labels = batch["labels"][0, 1:]
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
                logits = model(**inputs).logits[0, :-1]
                kept = labels != -100
                nats += float(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
                tokens += int(kept.sum())
                exact.append(bool((logits.argmax(-1) == labels)[kept].all()))
        for handle in handles:
            handle.remove()
        assert found[kind]["loss"] == pytest.approx(nats / tokens, abs=1e-3), kind
        assert found[kind]["exact"] == pytest.approx(sum(exact) / len(exact), abs=1e-4)
    losses = [scores["loss"] for scores in found.values()]
    assert len(set(losses)) == len(losses)


def slow(block, hidden, weights, kind):
    x_TD = hidden.reshape(-1, hidden.shape[-1])
    rows = []
    for x in x_TD:
        outputs = [
            block.experts(x[None], torch.tensor([[expert]]), torch.ones(1, 1))[0] * weight
            for expert, weight in weights(kind, block, x).items()
        ]
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows).view(hidden.shape)


@pytest.mark.parametrize("router", ["shared_softmax", "xmoe"])
def test_a_shared_expert_stays_and_what_cannot_compete_does_not(table, tmp_path, router):
    checkpoint = save_tiny(tmp_path / "moe", router=router, num_experts_per_tok=3)
    found = measure_routing(config_for(checkpoint, table))
    assert "competition" not in found["controls"]
    assert found["agreement"] is None
    model, _ = load_checkpoint(checkpoint, dtype=torch.float32)
    block = next(iter(moe_blocks(model).values()))
    loads = torch.tensor([1.0, 3.0, 2.0, 9.0])
    routing = block.router(torch.randn(5, 32))
    for control in (_shifted, _mean_of_all, lambda b, r: _fixed(b, r, loads)):
        changed = control(block, routing)
        assert changed.routing_weights_TK.sum(1).tolist() == pytest.approx([1.0] * 5)
        if router == "shared_softmax":
            assert (changed.selected_experts_TK[:, -1] == 3).all()
            assert (changed.selected_experts_TK[:, :-1] < 3).all()
            assert changed.routing_weights_TK[:, -1].tolist() == pytest.approx([0.5] * 5)


@pytest.mark.parametrize("router", ["softmax", "tc_moe", "moe_plus_plus", "autonomy"])
def test_the_mean_of_all_is_that_of_the_experts(router):
    """Not of slots that run one with a minus, or none."""
    model, _ = tiny_model({"language": {**EXPERTS, "router": router}}, tower=None)
    block, x = next(iter(moe_blocks(model.eval()).values())), torch.randn(5, 32)
    with torch.no_grad(), replaced_routing(model, _mean_of_all):
        found, routing = block(x), block.router(x)
        alone = torch.ones(5, 1)
        answers = [block.experts(x, torch.full((5, 1), e), alone, **routing.begun) for e in range(4)]
    torch.testing.assert_close(found, torch.stack(answers).mean(0))


def test_expert_use_sums_to_one_and_padding_does_not_count(table, tmp_path):
    checkpoint = save_tiny(tmp_path / "moe")
    whole, alone = (measure_routing(config_for(checkpoint, table, batch_size=size)) for size in (7, 1))
    for name, shares in whole["expert_use"].items():
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert shares == pytest.approx(alone["expert_use"][name], abs=1e-3)
    assert whole["tokens"] == alone["tokens"]


def test_a_dense_checkpoint_has_no_routing(table, tmp_path):
    found = measure_routing(config_for(save_tiny(tmp_path / "dense", dense=True), table))
    assert found["agreement"] is None
    assert found["controls"] == found["expert_use"] == {}


def test_a_question_may_show_several_pictures(tmp_path):
    pictures = [png_bytes(Image.new("RGB", (28, 28), (shade, 90, 40))) for shade in (20, 120, 220)]
    rows = [
        {"images": pictures[:count], "question": "same?", "answer": "no", "type": "same", "id": str(count)}
        for count in (1, 3)
    ]
    write_test_table(rows, tmp_path / "test.parquet")
    checkpoint = save_tiny(tmp_path / "moe")
    model, processor = load_checkpoint(checkpoint)
    batches = list(_batches(config_for(checkpoint, tmp_path / "test.parquet"), processor, torch.device("cpu")))
    assert [len(batch["pixel_values"]) for _, batch in batches] == [1, 3]
    assert [(batch["input_ids"] == model.config.image_token_id).sum() for _, batch in batches] == [
        count * processor.num_image_tokens for count in (1, 3)
    ]
    shown = datasets.load_dataset("parquet", data_files=str(tmp_path / "test.parquet"), split="train")[1]["images"]
    assert [image.getpixel((0, 0))[0] for image in shown] == [20, 120, 220]


def test_a_table_that_does_not_fit(table, tmp_path):
    checkpoint = save_tiny(tmp_path / "moe")
    with pytest.raises(UserError, match="is missing; build it with"):
        measure_routing(config_for(checkpoint, tmp_path / "no.parquet"))
    datasets.Dataset.from_dict({"question": ["a"]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="columns question; expected also image, answer"):
        measure_routing(config_for(checkpoint, tmp_path / "bad.parquet"))
