"""Packed rows: full, the same on any number of ranks and after any resume, with documents kept apart if asked."""

import copy
import json

import pytest
import torch
from tokenizers_for_tests import TOKENIZER_KINDS, make_tokenizer
from torch.utils.data import DataLoader

from llava_compete.data.text.batches import TextBatchSampler, TextCollator
from llava_compete.data.text.config import TextSection, TextSource
from llava_compete.data.text.rows import HeldOutRows, TextRows, encoder, token_byte_lengths
from llava_compete.language.tokenizer import train_byte_level_bpe

TEXTS = [f"number {number} is " + "followed by more words " * (number % 7 + 1) for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_bpe(TEXTS, 320)


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": f"held out {text}"}) + "\n" for text in TEXTS[:20]))
    sources = {"train": TextSource(path=path), "validation": TextSource(path=held_out)}
    return TextSection(**sources, context=32, shuffle_block=50, shards=8)


def rows_of(section, tokenizer, folder, owned=range(8)):
    return TextRows(section, tokenizer, seed=1, owned=owned, num_rows=10_000, marks=folder / "marks")


def tensors(item):
    return {key: item[key] for key in ("input_ids", "labels", "sequence_ids")}


def test_the_streams_hold_every_document_once_an_epoch(section, tokenizer, tmp_path):
    encode = encoder(tokenizer)
    dataset = rows_of(section, tokenizer, tmp_path)
    total = sum(len(encode(text)) for text in TEXTS)
    streams = [[] for _ in range(8)]
    for row in range(8 * (total // 32 // 8 + 8)):
        streams[row % 8] += dataset[row]["input_ids"].tolist()
    found = []
    for stream in streams:
        text = tokenizer.decode(stream).split(tokenizer.eos_token)
        found += text[:-1]
    assert set(found) == set(TEXTS)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_special_token_strings_in_the_text_stay_text(kind):
    tokenizer, text = make_tokenizer(kind, "plain"), "a <eos> and a <image> here</s> <s> or <unk> <pad>"
    ids = encoder(tokenizer)(text)
    assert [token for token in ids if token in tokenizer.all_special_ids] == [tokenizer.eos_token_id]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == text


@pytest.mark.parametrize(("world", "micro", "shards"), [(1, 4, 8), (2, 4, 8), (4, 2, 8), (2, 2, 3), (8, 1, 1)])
def test_global_batches_do_not_depend_on_ranks_and_micro_batches(section, tokenizer, tmp_path, world, micro, shards):
    section = section.model_copy(update={"shards": shards})
    reference = rows_of(section, tokenizer, tmp_path, range(shards))
    expected = {row: reference[row]["input_ids"] for row in range(24)}
    seen = []
    for rank in range(world):
        sampler = TextBatchSampler(3, 8, micro, world, rank)
        dataset = rows_of(section, tokenizer, tmp_path / "ranks", sampler.streams(shards))
        batches = list(sampler)
        assert len(batches) == len(sampler) == 3 * 8 // micro // world
        for number, batch in enumerate(batches):
            assert len(batch) == micro
            assert {row // 8 for row in batch} == {number // sampler.accumulation_steps}
            for row in batch:
                torch.testing.assert_close(dataset[row]["input_ids"], expected[row])
                seen.append(row)
    assert sorted(seen) == list(range(24))


def test_ranks_share_the_tokenising(section):
    owned = [TextBatchSampler(1, 8, 1, 4, rank).streams(8) for rank in range(4)]
    assert sorted(stream for part in owned for stream in part) == list(range(8))


def test_state_dict_carries_on_exactly(section, tokenizer, tmp_path):
    first = rows_of(section, tokenizer, tmp_path)
    for row in range(83):
        first[row]
    state = json.loads(json.dumps(first._streams.state_dict()))
    second = rows_of(section, tokenizer, tmp_path / "other")
    second[0]
    second._streams.load_state_dict(state)
    for row in range(83, 400):
        torch.testing.assert_close(tensors(first[row]), tensors(second[row]))


def test_resume_reads_on_from_the_marks_and_not_from_the_start(section, tokenizer, tmp_path, monkeypatch):
    straight = rows_of(section, tokenizer, tmp_path / "straight")
    expected = [straight[row] for row in range(1400)]
    killed = rows_of(section, tokenizer, tmp_path)
    for row in range(1300):
        killed[row]
    del killed
    # A killed run may leave half a line.
    (mark,) = (tmp_path / "marks").glob("*.jsonl")
    mark.write_text(mark.read_text() + '{"stream": 3, "row"')
    resumed = rows_of(section, tokenizer, tmp_path)
    encoded = []
    monkeypatch.setattr(
        "llava_compete.data.text.rows.encoder", lambda t: lambda text: encoded.append(text) or encoder(t)(text)
    )
    for row in range(1300, 1400):
        torch.testing.assert_close(tensors(resumed[row]), tensors(expected[row]))
    assert len(encoded) < 1400 * 32 / 20 / 3  # far fewer than the documents of 1,400 rows
    # On another number of ranks, from the same marks.
    for rank in range(2):
        part = rows_of(section, tokenizer, tmp_path, range(rank, 8, 2))
        torch.testing.assert_close(tensors(part[1302 + rank]), tensors(expected[1302 + rank]))


def test_workers_of_a_loader_give_the_same_rows(section, tokenizer, tmp_path):
    sampler = TextBatchSampler(6, 8, 4, 1, 0)
    batches = []
    for workers in (0, 2):
        dataset = rows_of(section, tokenizer, tmp_path / str(workers))
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=TextCollator(separate_documents=False)
        )
        batches.append([batch["input_ids"] for batch in loader])
    torch.testing.assert_close(batches[0], batches[1])


def test_separate_documents_are_numbered_through_the_batch(section, tokenizer, tmp_path):
    dataset = rows_of(section, tokenizer, tmp_path)
    batch = TextCollator(separate_documents=True)([dataset[row] for row in range(4)])
    ids, tokens = batch["sequence_ids"], batch["input_ids"]
    flat = ids.flatten()
    assert flat[0] == 0
    assert ((flat[1:] - flat[:-1] == 0) | (flat[1:] - flat[:-1] == 1)).all()
    ends = tokens[:, :-1] == tokenizer.eos_token_id
    torch.testing.assert_close(ends, ids[:, 1:] != ids[:, :-1])
    assert (batch["labels"][:, 1:][ends] == -100).all()
    assert (batch["labels"][:, 1:][~ends] != -100).all()


@pytest.mark.parametrize(("kind", "written_before"), [("byte_bpe", ""), ("unigram_no_bos", " "), ("legacy_llama", " ")])
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(kind, written_before):
    tokenizer = copy.deepcopy(make_tokenizer(kind, "plain"))
    tokenizer.add_tokens(["dö"])
    text = "bytes of äöü, 漢字, 🙂\n, ndö"
    lengths = token_byte_lengths(tokenizer)
    assert int(lengths[encoder(tokenizer)(text)].sum()) == len((written_before + text).encode())


def test_held_out_rows_are_full_and_limited(section, tokenizer):
    rows = HeldOutRows(section.model_copy(update={"max_validation_rows": 5}), tokenizer)
    assert len(rows) == 5
    assert rows[4]["input_ids"].shape == (32,)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("held out number 0")
