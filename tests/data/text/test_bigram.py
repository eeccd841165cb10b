"""The bigram yardstick is a probability distribution and learns; the corpus builder keeps words and drops code."""

import itertools
import json

import numpy as np

from llava_compete import cli
from llava_compete.data.text.bigram import Bigram
from llava_compete.data.text.config import TextSection, TextSource
from llava_compete.demo.stdlib_text import build_stdlib_text, extract_prose
from llava_compete.study import perplexity


def test_probabilities_sum_to_one_for_seen_and_unseen_contexts():
    rng = np.random.default_rng(0)
    bigram = Bigram([rng.integers(9, size=50).tolist() for _ in range(3)], 12)
    symbols = np.arange(12)
    for before in range(12):
        probs = np.exp(bigram.log_probs(np.full(12, before), symbols))
        np.testing.assert_allclose(probs.sum(), 1.0)
        assert (probs > 0).all()


def test_it_approaches_the_entropy_of_a_known_chain():
    rng = np.random.default_rng(0)
    chain = np.array([[0.9, 0.1], [0.2, 0.8]])
    ids = [0]
    for draw in rng.random(20_000):
        ids.append(int(draw > chain[ids[-1], 0]))
    bigram = Bigram([ids[:15_000]], 2)
    test = np.array(ids[15_000:])
    nats = -bigram.log_probs(test[:-1], test[1:]).mean()
    entropy = -(2 / 3 * (0.9 * np.log(0.9) + 0.1 * np.log(0.1)) + 1 / 3 * (0.2 * np.log(0.2) + 0.8 * np.log(0.8)))
    assert abs(nats - entropy) < 0.02


def test_of_endless_text_the_bigrams_count_the_beginning(monkeypatch):
    monkeypatch.setattr(perplexity, "read_source", lambda source: itertools.repeat("some words"))
    monkeypatch.setattr(perplexity, "_BIGRAM_SYMBOLS", 5000)
    bits = perplexity._byte_bigram(["some words"], TextSection(train=TextSource(hub="endless/text")))
    assert 0.1 < bits < 0.5  # only "o" (m, r) and "s" (o, end) leave a choice, a bit each


SOURCE = '''"""Module words."""
# first line
# second line
x = 1  # beside code

class A:
    """Class words."""

    def f(self):
        """Method words."""
        return "not prose"
'''


def test_prose_is_docstrings_and_comments_in_order():
    assert extract_prose(SOURCE) == (
        "Module words.\n\nfirst line\nsecond line\nbeside code\n\nClass words.\n\nMethod words."
    )
    assert extract_prose("def broken(:") == ""


def test_the_corpus_is_split_by_module_and_deterministic(tmp_path):
    library = tmp_path / "lib"
    for number in range(60):
        path = library / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE * 3 + "# " + "padding " * 30)
    (library / "test").mkdir()
    (library / "test" / "left_out.py").write_text(SOURCE * 10)
    summaries = [build_stdlib_text(tmp_path / name, library) for name in ("a", "b")]
    assert summaries[0] == summaries[1]
    assert summaries[0].train_documents + summaries[0].validation_documents == 60
    assert 0 < summaries[0].validation_documents < 20
    train, held_out = (
        {json.loads(line)["id"] for line in (tmp_path / "a" / f"{split}.jsonl").read_text().splitlines()}
        for split in ("train", "validation")
    )
    assert not train & held_out


def test_the_tokenizer_command_trains_and_saves(tmp_path):
    (tmp_path / "a.txt").write_text("some words and more words\n" * 50)
    command = [
        "data",
        "tokenizer",
        str(tmp_path / "a.txt"),
        "--vocab-size",
        "300",
        "--out",
        str(tmp_path / "tokenizer"),
    ]
    assert cli.main(command) == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert cli.main([*command[:3], "--vocab-size", "20", "--out", str(tmp_path)]) == 2
