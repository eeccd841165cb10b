"""The report's numbers against a loop over rows and tokens on the blocks themselves; the page that is made of them."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation.checkpoint_routing import CheckpointRouting, MeasureOptions, measure_checkpoint
from llava_compete.evaluation.routing_data import Rows, encode_row
from llava_compete.evaluation.token_choices import choices_of, overlap
from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.moe.block import moe_blocks
from llava_compete.report.over_steps import checkpoints_section
from llava_compete.report.page import Page
from llava_compete.report.routing_facts import routing_facts

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Experts in all three parts, apart from each other."""
    torch.manual_seed(0)
    model, processor = tiny_model({"vision": EXPERTS, "projector": EXPERTS, "language": EXPERTS})
    for block in moe_blocks(model).values():
        block.router.weight.data.normal_()
    save_checkpoint(model, processor, tmp_path_factory.mktemp("model") / "moe")
    return tmp_path_factory.getbasetemp() / "model0" / "moe"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[Path]:
    """A test table of pictures, and LLaVA's JSON with two pictures, several turns, and text alone."""
    folder = tmp_path_factory.mktemp("rows")
    picture = [Image.effect_noise((28, 28), 60 + 20 * number).convert("RGB") for number in range(3)]
    rows = [
        {"image": picture[n], "question": "what colour is the circle " * (n + 1), "answer": "red", "id": str(n)}
        for n in range(3)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), **dict.fromkeys(("question", "answer", "id"), datasets.Value("string"))}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "table.parquet")
    picture[0].save(folder / "a.png")
    picture[1].save(folder / "b.png")
    turns = [("how many shapes <image> <image>", "two shapes ."), ("what colour ?", "the circle is red .")]
    conversation = [{"from": f, "value": v} for q, a in turns for f, v in (("human", q), ("gpt", a))]
    text = [{"from": "human", "value": "are there shapes ?"}, {"from": "gpt", "value": "two"}]
    llava = [
        {"id": "x", "image": ["a.png", "b.png"], "conversations": conversation},
        {"id": "y", "conversations": text},
    ]
    (folder / "talk.json").write_text(json.dumps(llava))
    return [folder / "table.parquet", folder / "talk.json"]


def by_hand(checkpoint: Path, data: list[Path]) -> tuple[dict, dict]:
    """Row by row and token by token: (layer, kind) and (layer, source) -> lists of (experts, entropy, margin)."""
    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    model.eval()
    kinds: dict = defaultdict(list)
    sources: dict = defaultdict(list)
    met: dict = {}

    def hook(block):
        def run(_module, inputs, _output):
            x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
            met[block.name] = (x_TD @ block.router.weight.T).softmax(-1)

        return run

    for block in moe_blocks(model).values():
        block.register_forward_hook(hook(block))
    rows = Rows(data)
    for number in range(len(rows)):
        row = rows[number]
        item = encode_row(row, processor)
        with torch.inference_mode():
            model(item["input_ids"][None], pixel_values=item["pixel_values"])
        image_id = model.config.image_token_id
        for name, probs_TR in met.items():
            if not row.images and not name.startswith("language"):
                continue  # of an earlier row
            for token, probs_R in enumerate(probs_TR):
                kind = "picture"
                if name.startswith("language") and item["input_ids"][token] != image_id:
                    kind = "question" if item["labels"][token] == -100 else "answer"
                order = sorted(range(4), key=lambda expert: -probs_R[expert])
                entropy = -sum(float(p) * math.log(float(p)) for p in probs_R)
                entry = (order[:2], entropy, float(probs_R[order[1]] - probs_R[order[2]]))
                kinds[name, kind].append(entry)
                sources[name, row.source].append(entry)
    return kinds, sources


def measured(checkpoint: Path, data: list[Path], **options) -> CheckpointRouting:
    return measure_checkpoint(
        checkpoint, Rows(data), MeasureOptions(compared_rows=5, examples=0, device="cpu", **options)
    )


def test_statistics_are_those_of_a_loop_over_tokens(checkpoint, data):
    rows = Rows(data)
    found = measure_checkpoint(
        checkpoint, rows, MeasureOptions(batch_size=3, compared_rows=4, examples=1, device="cpu")
    )
    facts = routing_facts(found)
    kinds, sources = by_hand(checkpoint, data)
    assert {name.split(".")[0] for name in facts["layers"]} == {"vision", "projector", "language"}
    for expected, key in ((kinds, "by_kind"), (sources, "by_source")):
        assert {(n, k) for n, layer in facts["layers"].items() for k in layer[key]} == set(expected)
        for (name, group), entries in expected.items():
            mine = facts["layers"][name][key][group]
            counts = Counter(expert for experts, _, _ in entries for expert in experts)
            assert mine["tokens"] == len(entries)
            assert mine["load"] == pytest.approx([counts[e] / 2 / len(entries) for e in range(4)], abs=1e-4)
            assert mine["entropy"] == pytest.approx(sum(e for _, e, _ in entries) / len(entries), abs=1e-3)
            assert mine["margin"] == pytest.approx(sum(m for _, _, m in entries) / len(entries), abs=1e-3)
    for name, layer in facts["layers"].items():
        entries = [entry for (layer_name, _), found_ in kinds.items() if layer_name == name for entry in found_]
        together = sum(set(experts) == {0, 1} for experts, _, _ in entries) / len(entries)
        rate = [sum(e in experts for experts, _, _ in entries) / len(entries) for e in range(4)]
        independent = rate[0] * rate[1] * 2 / (4 - sum(a * a for a in rate))  # K (K - 1) / (K² - sum of squares)
        assert layer["pairs"][0][1] == pytest.approx(together / independent, abs=2e-3)


def test_probe_and_constant_are_fitted_on_a_half_of_each_source(checkpoint, data, monkeypatch):
    """The order of the files says nothing; fitted on one file they would be measured on another."""
    rows = Rows(data)
    assert rows.halves(range(5)) == ([0, 1, 3], [2, 4])
    assert rows.halves([0, 2, 4]) == ([0, 4], [2])
    met = []
    monkeypatch.setattr(
        "llava_compete.evaluation.checkpoint_routing.measure_prediction", lambda _model, *halves: met.append(halves)
    )
    measured(checkpoint, data, batch_size=1)
    (halves,) = met
    processor = load_checkpoint(checkpoint)[1]
    lengths = [len(encode_row(rows[number], processor)["input_ids"]) for number in range(5)]
    assert len(set(lengths)) == 5, "they tell the rows apart"
    found = [[batch["input_ids"].shape[1] for batch in half] for half in halves]
    assert found == [[lengths[number] for number in half] for half in ([0, 1, 3], [2, 4])]


def test_batches_and_processes_change_nothing(checkpoint, data):
    found = [measured(checkpoint, data, batch_size=size) for size in (1, 5)]
    one, other = (each.sums for each in found)
    for name, choices in found[0].choices.items():
        assert (choices == found[1].choices[name]).all()
    for name, layer in one.layers.items():
        for key in ("load_GE", "tokens_G", "pairs_EE", "found_G"):
            torch.testing.assert_close(getattr(layer, key), getattr(other.layers[name], key), atol=1e-4, rtol=0)
    assert {n: {w: c.tolist() for w, c in words.items()} for n, words in one.words.counts.items()} == {
        n: {w: c.tolist() for w, c in words.items()} for n, words in other.words.counts.items()
    }


@pytest.mark.slow
def test_two_processes_are_one(checkpoint, data):
    one, two = (measured(checkpoint, data, batch_size=2, processes=number).sums for number in (1, 2))
    for name, layer in one.layers.items():
        torch.testing.assert_close(layer.load_GE, two.layers[name].load_GE)


def test_a_patch_keeps_its_place(checkpoint, data):
    """Choices of the second of two pictures, against its patches run alone."""
    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    model.eval()
    row = Rows(data)[3]
    choices = choices_of(model, processor, row)
    alone = choices_of(model, processor, row._replace(images=row.images[1:], messages=[
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "red"},
    ]))  # fmt: skip
    for name, maps in choices.maps.items():
        assert all(experts.shape == (4, 4, 2) for experts in maps)
        if not name.startswith("language"):  # the language model also sees what stands before
            assert maps[1].tolist() == alone.maps[name][0].tolist()
    assert sum(kind == 0 for kind in choices.classes) == 2 * model.config.num_image_tokens


def test_overlap_counts_choices() -> None:
    one, other = np.array([[0, 1], [2, 3]]), np.array([[1, 3], [2, 3]])
    assert overlap(one, other) == 0.75


def test_the_page_is_whole_and_fetches_nothing(checkpoint, data, tmp_path, capsys):
    command = ["report", str(checkpoint), "--data", *map(str, data), "--out", str(tmp_path / "out"), "--examples", "2"]
    assert main([*command, "--device", "cpu"]) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Written:" in capsys.readouterr().out
    assert 'src="http' not in html
    assert "<script" not in html
    assert html.count('class="answer"') == 2
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["runs"][0]["routing"]
    assert set(facts["controls"]) == {"router", "random", "shifted", "fixed", "mean_of_all", "competition"}
    for name in ("vision.0", "projector.0", "language.0"):
        assert facts["layers"][name]["likeness"]["weights"] < 0.2  # from scratch
        assert 0 <= facts["layers"][name]["worth"]["lower"] <= 1
    assert (tmp_path / "out" / "figures" / "moe-language-load.svg").is_file()


def test_checkpoints_of_a_run_stand_beside_one_another(checkpoint, data, tmp_path):
    last = measured(checkpoint, data)
    first = replace(last, choices={name: np.roll(chosen, 1) for name, chosen in last.choices.items()})
    routing = {"checkpoint-2": first, "sft": last}
    page = Page("Report", tmp_path)
    checkpoints_section(page, routing, {name: routing_facts(found) for name, found in routing.items()})
    html = page.write().read_text()
    assert "<tr><th>layer</th><th>checkpoint-2</th></tr>" in html
    for name, chosen in last.choices.items():
        assert f"<td>{name}</td><td>{overlap(first.choices[name], chosen):.3f}</td>" in html
    assert "too, by chance 0.50." in html
    assert (tmp_path / "figures" / "checkpoints.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["{folder}"], "neither a checkpoint"),
        (["{model}", "{model}"], "the same run twice"),
        (["{model}", "--data", "nowhere.json"], "nowhere.json: no such data"),
        (["{model}", "--rows", "0"], "--rows: found 0, expected at least 1"),
        (["{model}", "--eval", "{folder}"], "summary.json: missing"),
    ],
)
def test_bad_arguments_are_one_line(checkpoint, data, tmp_path, capsys, arguments, message):
    filled = [word.format(model=checkpoint, folder=data[0].parent) for word in arguments]
    assert main(["report", *filled, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_picture_names_its_row(data, tmp_path):
    row = {
        "id": "z",
        "image": "gone.png",
        "conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}],
    }
    (tmp_path / "gone.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=r"gone, row 0: .*gone\.png"):
        Rows([tmp_path / "gone.json"])[0]


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"broken\.parquet: not a parquet file"):
        Rows([tmp_path / "broken.parquet"])
