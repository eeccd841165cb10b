"""Sources to batches: formats, mixtures, held-out rows, failing rows, packing."""

import json
import pickle

import pytest
import torch
from rows_kit import MESSAGES, png, processor_with, row, section
from tiny import tiny_model
from tokenizers_for_tests import make_tokenizer

from llava_compete.config import parse_config
from llava_compete.data.collator import Collator
from llava_compete.data.config import DataSection
from llava_compete.data.dataset import build_datasets
from llava_compete.data.records import parse_row
from llava_compete.data.source_files import source_files
from llava_compete.errors import UserError
from llava_compete.parts import IGNORE_INDEX


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.png").write_bytes(png())

    def write(rows, name="rows"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows))
        return {"name": name, "path": path}

    return write


def test_all_spellings_of_a_row_agree():
    parts = parse_row({"id": 7, "images": ["a", "b"], "messages": MESSAGES}, "0")
    llava = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "First<image><image>"},
        {"from": "gpt", "value": "Two, an <image> each."},
    ]
    assert parse_row({"id": "7", "image": ["a", "b"], "conversations": llava}, "0") == parts
    inline = json.loads(json.dumps(MESSAGES))
    for part, image in zip(inline[1]["content"][1:], ("a", "b"), strict=True):
        part["image"] = image
    assert parse_row({"id": 7, "messages": inline}, "0") == parts
    assert parts.messages[2]["content"] == [{"type": "text", "text": "Two, an <image> each."}]


def test_the_white_space_around_a_placeholder_is_the_files_own():
    turns = [{"from": "human", "value": "Look at\n<image> and <image>\n\nnow."}, {"from": "gpt", "value": "red"}]
    found = parse_row({"id": "1", "image": ["a", "b"], "conversations": turns}, "0").messages[0]["content"]
    image, texts = {"type": "image"}, [part.get("text") for part in found]
    assert texts == ["Look at\n", None, " and ", None, "\n\nnow."]
    assert found[1] == found[3] == image
    # An image without a place stands before the first question, on a line of its own, as LLaVA puts it.
    turns[0] = {"from": "human", "value": "What is it?"}
    found = parse_row({"id": "1", "image": "a", "conversations": turns}, "0").messages[0]["content"]
    assert found == [image, {"type": "text", "text": "\nWhat is it?"}]


def test_items_and_batches(tmp_path, source, processor):
    bundle = build_datasets(section(tmp_path, source([row("0"), row("1", None), row("2")])), processor, 0)
    items = [bundle.train[index] for index in range(3)]
    assert [item["modality"] for item in items] == [1, 0, 1] == bundle.train.modalities.tolist()
    batch = Collator(processor)(items)
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["attention_mask"].sum(1).tolist() == [item["length"] for item in items]
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_id).sum(1).tolist() == [6, 0, 6]
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == [(item["labels"] >= 0).sum() for item in items]
    assert "pixel_values" not in Collator(processor)(items[1:2])


def test_a_rank_without_rows_gets_a_filler(processor):
    batch = Collator(processor)([])
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert (batch["sequence_ids"] == -1).all()
    assert batch["sample_ids"] == []


def test_mixture_weights_caps_and_names(tmp_path, source, processor):
    rows = [row(str(index), None) for index in range(40)]
    mixture = tmp_path / "mixture.yaml"
    first, second = source(rows, "first"), source(rows, "second")
    mixture.write_text(
        f"sources:\n  - {{name: first, path: {first['path']}, weight: 1.5}}\n"
        f"  - {{name: second, path: {second['path']}, max_rows: 7}}\n"
    )
    data = DataSection(sources=str(mixture), cache_dir=tmp_path / "cache")
    bundle = build_datasets(data, processor, 0)
    assert bundle.stats["rows"] == {"first": 60, "second": 7}
    shown = [bundle.train[index]["sample_id"] for index in bundle.mixture.epoch(0)]
    assert sum(name.startswith("second/") for name in shown) == len({*shown[60:]}) == 7
    again, other = build_datasets(data, processor, 0), build_datasets(data, processor, 1)
    assert bundle.digest == again.digest != other.digest
    with pytest.raises(UserError, match=r"source 'first': weight 0\.01 of 40 rows is less than half a row"):
        build_datasets(section(tmp_path, {**first, "weight": 0.01}, second), processor, 0)
    with pytest.raises(UserError, match="two sources are called 'first'"):
        parse_config(DataSection, {"sources": [first, first]}, "config.yaml")
    with pytest.raises(UserError, match=r"sources\.0\.name: found 'a/b'"):
        parse_config(DataSection, {"sources": [{**first, "name": "a/b"}]}, "config.yaml")
    with pytest.raises(UserError, match="did you mean 'weight'"):
        parse_config(DataSection, {"sources": [{**first, "wheight": 2}]}, "config.yaml")


def test_held_out_rows_are_chosen_by_id(tmp_path, source, processor):
    rows = [row(f"row-{index}", None) for index in range(400)]
    options = {"validation_fraction": 0.1}
    few = build_datasets(section(tmp_path, source(rows[:200], "few"), **options), processor, 0)
    many = build_datasets(section(tmp_path, source(rows, "many"), **options), processor, 1)

    def ids(dataset):
        return {dataset[index]["sample_id"].split("/")[1] for index in range(len(dataset))}

    assert ids(few.validation) < ids(many.validation)
    assert not ids(many.train) & ids(many.validation)
    assert 20 < len(many.validation) < 60
    assert len(many.train) + len(many.validation) == 400


def test_a_bad_image_stops_the_run_or_is_counted_and_replaced(tmp_path, source, processor):
    rows = [row("0"), row("1", "gone.png"), row("2")]
    bundle = build_datasets(section(tmp_path, source(rows)), processor, 0)
    with pytest.raises(UserError, match=r"row rows/1: .*gone.png: no such image file"):
        bundle.train[1]
    skipping = build_datasets(section(tmp_path, source(rows), on_bad_image="skip", max_bad_images=1), processor, 0)
    assert skipping.train[1]["sample_id"] == "rows/2"
    assert skipping.train.counters == {"data/rejected": 0, "data/bad_images": 1}
    with pytest.raises(UserError, match=r"more than data\.max_bad_images=1"):
        skipping.train[1]


def test_a_replacement_never_comes_from_the_held_out_rows(tmp_path, source, processor):
    rows = [row(f"row-{index}", None if index % 2 else "gone.png") for index in range(60)]
    options = {"on_bad_image": "skip", "validation_fraction": 0.3}
    bundle = build_datasets(section(tmp_path, source(rows), source(rows[:1], "lone"), **options), processor, 0)
    last = len(bundle.train) - 1  # the lone row, if it was not held out, has no replacement in its source
    used = {bundle.train[index]["sample_id"] for index in range(last)}
    held_out = {bundle.validation[index]["sample_id"] for index in range(len(bundle.validation) - 1)}
    assert used
    assert not used & held_out


def test_only_answers_that_the_row_wants_learnt_have_labels(tmp_path, source, processor):
    """`loss: false`, system, reasoning and image order of a row reach the ids and labels of its item."""
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "gpt", "value": "Three.", "loss": False},
        {"from": "human", "value": "Sure? <image>"},
        {"from": "gpt", "value": "Two."},
    ]
    rows = [{"id": "0", "image": "a.png", "system": "Be a pirate.", "conversations": turns}]
    texts = []
    for first in (False, True):
        data = section(tmp_path, {**source(rows), "images_first": first})
        item = build_datasets(data, processor, 0).train[0]
        decode = processor.tokenizer.decode
        learnt = decode(item["labels"][item["labels"] != IGNORE_INDEX])
        assert "Two." in learnt
        assert "Three." not in learnt
        texts.append(decode(item["input_ids"]).replace("<image>" * 6, "<image>"))
    assert "Be a pirate." in texts[0]
    assert "Three." in texts[0]
    assert ["Sure? <image>" in text for text in texts] == [True, False]
    assert "<image>\nSure?" in texts[1]
    # Cut down to the answer that is context only, nothing is left to learn.
    data = section(tmp_path, source(rows), max_length=len(processor.tokenizer(texts[0])["input_ids"]) - 20)
    with pytest.raises(UserError, match="no row can be used"):
        build_datasets(data, processor, 0).train[0]


def test_rows_beyond_the_limit_are_counted_and_stop_the_run(tmp_path, source, processor):
    rows = [row("0", None), row("1", None, answer="long " * 100), row("2", None)]
    bundle = build_datasets(section(tmp_path, source(rows), max_length=60), processor, 0)
    assert bundle.train[1]["sample_id"] == "rows/2"
    assert bundle.train.counters["data/rejected"] == 1
    with pytest.raises(UserError, match=r"2 rows keep no answer within data\.max_length=60"):
        bundle.train[1]


def test_the_rejected_share_is_of_the_rows_read(tmp_path, source, processor):
    """Not of one epoch: three epochs of a data set within its limit go through."""
    rows = [row(str(i), None, answer="long " * 100 if i % 50 == 49 else "x") for i in range(200)]
    bundle = build_datasets(section(tmp_path, source(rows), max_length=60, max_rejected_share=0.03), processor, 0)
    for _ in range(3):
        for index in range(200):
            assert bundle.train[index]["length"] <= 60
    assert bundle.train.counters["data/rejected"] == 12
    strict = build_datasets(section(tmp_path, source(rows), max_length=60, max_rejected_share=0.01), processor, 0)
    with pytest.raises(UserError, match="3 rows keep no answer"):
        _ = [strict.train[index] for index in range(200)]


def test_a_row_that_the_template_refuses_is_named(tmp_path, source):
    tokenizer = make_tokenizer("byte_bpe_pad_is_eos", "llava_llama_2")
    original = tokenizer.chat_template
    processor = processor_with(tokenizer)
    bundle = build_datasets(section(tmp_path, source([row("7")])), processor, 0)
    try:
        tokenizer.chat_template = "{{ raise_exception('no images here') }}" + original
        with pytest.raises(UserError, match=r"row rows/7: .*no images here"):
            bundle.train[0]
    finally:
        tokenizer.chat_template = original


def test_counters_see_what_worker_processes_count(tmp_path, source, processor):
    rows = [row(str(index), None if index % 2 else "gone.png") for index in range(8)]
    bundle = build_datasets(section(tmp_path, source(rows), on_bad_image="skip"), processor, 0)
    loader = torch.utils.data.DataLoader(bundle.train, batch_size=4, num_workers=2, collate_fn=Collator(processor))
    assert len(list(loader)) == 2
    assert bundle.train.counters["data/bad_images"] == 4


def test_missing_empty_and_broken_sources_are_one_clear_line(tmp_path, source, processor):
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        build_datasets(section(tmp_path, {"name": "s", "path": tmp_path / "gone.json"}), processor, 0)
    with pytest.raises(UserError, match="holds no rows"):
        build_datasets(section(tmp_path, source([])), processor, 0)
    with pytest.raises(UserError, match=r"1 rows .* the first: row 1 of rows.json: .*empty.*data check"):
        build_datasets(section(tmp_path, source([row("0", None), row("1", None, answer="")])), processor, 0)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"found '\.txt', expected"):
        source_files(tmp_path / "a.txt")


def test_a_table_is_converted_once_and_again_when_the_content_changes(tmp_path, source, processor):
    first = build_datasets(section(tmp_path, source([row("0", None)])), processor, 0)
    tables = sorted((tmp_path / "cache").glob("*.arrow"))
    build_datasets(section(tmp_path, source([row("0", None)])), processor, 0)
    assert sorted((tmp_path / "cache").glob("*.arrow")) == tables
    changed = build_datasets(section(tmp_path, source([row("0", None, answer="Blue.")])), processor, 0)
    assert changed.digest != first.digest
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_rows_survive_letting_pages_go_and_another_process(tmp_path, source, processor, monkeypatch):
    monkeypatch.setattr("llava_compete.data.mapped_table._READS_HELD", 2)
    bundle = build_datasets(section(tmp_path, source([row(str(i), None) for i in range(9)])), processor, 0)
    table = bundle.train.tables[0].rows
    assert [item["id"] for item in table] == [str(i) for i in range(9)]
    copy = pickle.loads(pickle.dumps(table))
    assert [copy.row(i) for i in (8, 0, 3)] == [table.row(i) for i in (8, 0, 3)]


def test_packing_keeps_every_loss(tmp_path, source):
    """A MoE model's loss terms over packed rows are those over padded rows, images included."""
    model, processor = tiny_model(moe={"language": {"num_experts": 3, "num_experts_per_tok": 2}})
    rows = [row(str(i), "a.png" if i % 2 else None, answer="red " * (1 + 3 * i)) for i in range(6)]
    bundle = build_datasets(section(tmp_path, source(rows)), processor, 0)
    items = [bundle.train[index] for index in range(6)]
    padded, packed = Collator(processor)(items), Collator(processor, pack_to=128)(items)
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    assert sorted(packed["sample_ids"]) == sorted(padded["sample_ids"])
    assert packed["input_ids"].shape[1] <= 128
    model.train()
    results = []
    for batch in (padded, packed):
        batch.pop("sample_ids")
        out = model(**batch)
        model.zero_grad()
        out.loss.backward()
        results.append((out, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (one, one_grads), (two, two_grads) = results
    torch.testing.assert_close(one.lm_loss, two.lm_loss)
    for name, value in one.loss_terms.items():
        torch.testing.assert_close(value, two.loss_terms[name], msg=name)
    for left, right in zip(one_grads, two_grads, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-4)
