"""Stage pretrain_lm by its commands: train, resume bit-equal, perplexity beside bigrams, lm-eval on a local task."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_compete import cli
from llava_compete.config import dump_yaml, read_yaml
from llava_compete.data.text.rows import HeldOutRows, token_byte_lengths
from llava_compete.model.checkpoint import load_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "lm" / "tiny.yaml"


class _Killed(BaseException):
    """Stands for a kill: nothing in the command catches it."""


WORDS = ["the", "expert", "that", "wins", "competition", "learns", "from", "token", "and", "router", "who"]
STEPS = 12
LANGUAGE_MODEL = (
    "{model_type: arcee, hidden_size: 32, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A corpus, and a tiny model trained on it."""
    folder = tmp_path_factory.mktemp("lm")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 120), ("validation", 20)):
        texts = [
            " ".join(WORDS[int(n)] for n in torch.randint(len(WORDS), (40,), generator=generator)) for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert train(folder, folder / "run") == 0
    return folder


def train(folder, out, *overrides, max_steps=STEPS):
    return cli.main(
        [
            *("train", str(CONFIG), "--stage", "pretrain_lm", f"output_dir={out}"),
            *(f"data.train.path={folder / 'train.jsonl'}", f"data.validation.path={folder / 'validation.jsonl'}"),
            *("data.context=32", "data.shards=4", "model.tokenizer.vocab_size=320"),
            f"model.language_model.config={LANGUAGE_MODEL}",
            *(f"training.max_steps={max_steps}", "training.logging_steps=2", "training.save_steps=6"),
            *("training.eval_steps=6", "training.report_to=none", "moe.competition_rate=0.5", *overrides),
        ]
    )


def metrics(out):
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_stage_trains_and_competes_and_holds_out(workplace):
    records = metrics(workplace / "run")
    losses = [record["lm_loss"] for record in records if "lm_loss" in record]
    assert losses[-1] < losses[0] - 0.5
    assert any("eval_loss" in record for record in records)
    assert any(record.get("competition_layers") for record in records)
    model, processor = load_checkpoint(workplace / "run")
    assert model.config.stage == "pretrain_lm"
    assert model.vision_tower is None
    assert processor.image_processor is None


def test_resume_is_as_if_nothing_had_happened(workplace, monkeypatch):
    from llava_compete.train.trainer import StageTrainer

    out = workplace / "resumed"
    original = StageTrainer.training_step

    def stop(self, *arguments, **keywords):
        if self.state.global_step == 8:
            raise _Killed
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(StageTrainer, "training_step", stop)
    with pytest.raises(_Killed):
        train(workplace, out)
    monkeypatch.undo()
    assert train(workplace, out) == 0
    for name, tensor in load_file(workplace / "run" / "model.safetensors").items():
        torch.testing.assert_close(load_file(out / "model.safetensors")[name], tensor, rtol=0, atol=0)
    straight, resumed = (
        [
            (record["step"], record["lm_loss"], record["sample_checksum"])
            for record in metrics(path)
            if "lm_loss" in record
        ]
        for path in (workplace / "run", out)
    )
    assert straight == resumed


def test_a_finished_stage_with_another_text_is_not_finished_already(workplace, tmp_path, capsys):
    texts = [shutil.copy(workplace / f"{split}.jsonl", tmp_path) for split in ("train", "validation")]
    assert train(tmp_path, workplace / "run") == 0
    text = Path(texts[0]).read_text()
    Path(texts[0]).write_text(text.replace("wins", "lost", 1))
    assert train(tmp_path, workplace / "run") == 2
    assert "has finished with other settings or data: data.train.rows was" in capsys.readouterr().err
    Path(texts[0]).unlink()
    assert train(tmp_path, workplace / "run") == 0
    assert "not compared with the data that it was trained on" in capsys.readouterr().err


def test_perplexity_is_printed_beside_the_bigrams(workplace, capsys):
    assert cli.main(["perplexity", str(workplace / "run")]) == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    summary = json.loads((workplace / "run" / "eval_perplexity" / "summary.json").read_text())
    found = summary["perplexity"]
    assert 0 < found["token_bigram_bits_per_byte"] < found["byte_bigram_bits_per_byte"]
    # The slow way: one row at a time.
    from llava_compete.config import parse_config, read_yaml
    from llava_compete.data.text.config import TextSection

    section = parse_config(TextSection, read_yaml(workplace / "run" / "run" / "config.yaml")["data"], source="run")
    model, processor = load_checkpoint(workplace / "run")
    rows = HeldOutRows(section, processor.tokenizer)
    nats = sum(float(model(input_ids=r[None], labels=r[None]).loss.detach()) * (len(r) - 1) for r in rows.tokens_RN)
    size = int(token_byte_lengths(processor.tokenizer)[rows.tokens_RN[:, 1:]].sum())
    assert found["bits_per_byte"] == pytest.approx(nats / size / 0.6931472, rel=1e-4)
    assert summary["tasks"]["text_compression"]["accuracy"] == pytest.approx(1 - found["bits_per_byte"] / 8, rel=1e-6)


def test_compare_reads_the_runs(workplace, tmp_path, capsys):
    assert cli.main(["perplexity", str(workplace / "run"), "--out", str(tmp_path / "a")]) == 0
    other = shutil.copytree(workplace / "run", tmp_path / "other")  # the same weights, but not the same files
    (other / "generation_config.json").write_text("{}")
    assert cli.main(["perplexity", str(other), "--out", str(tmp_path / "b")]) == 0
    runs = [f"{name}={tmp_path / name}" for name in ("a", "b")]
    assert cli.main(["compare", *runs, "--resamples", "1000", "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").iterdir())

    # Another text of as many documents: a difference would say nothing of the models.
    (tmp_path / "text.jsonl").write_text("".join((workplace / "train.jsonl").open().readlines()[:20]))
    content = read_yaml(workplace / "run" / "run" / "config.yaml")
    content["data"]["validation"]["path"] = str(tmp_path / "text.jsonl")
    dump_yaml(content, tmp_path / "text.yaml")
    words = ["perplexity", str(other), "--out", str(tmp_path / "c"), "--config", str(tmp_path / "text.yaml")]
    assert cli.main(words) == 0
    assert cli.main(["compare", runs[0], f"c={tmp_path / 'c'}"]) == 2
    assert "evaluate both alike" in (error := capsys.readouterr().err) or "the data differ" in error


def test_lm_eval_runs_a_local_task_offline(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    questions = [{"start": "the expert that wins", "endings": [" the competition", " qqq zzz 999"], "right": 0}] * 6
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "local_endings.yaml").write_text(
        "task: local_endings\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{start}}'\ndoc_to_choice: '{{endings}}'\ndoc_to_target: '{{right}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    command = ["eval-text", str(workplace / "run"), "--tasks", "local_endings", "--include", str(tmp_path)]
    assert cli.main([*command, "--out", str(tmp_path / "eval")]) == 0
    assert "local_endings: acc" in capsys.readouterr().out
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["tasks"]["local_endings"]["n"] == 6
    units = [
        json.loads(line) for line in (tmp_path / "eval" / "samples" / "local_endings.jsonl").read_text().splitlines()
    ]
    accuracy = sum(unit["score"] for unit in units) / 6
    assert accuracy == pytest.approx(summary["tasks"]["local_endings"]["metrics"]["acc"])
    # The choice with the higher likelihood by our own forward is the one that counts as chosen.
    model, processor = load_checkpoint(workplace / "run")
    tokenizer, start = processor.tokenizer, questions[0]["start"]
    sums = []
    for ending in questions[0]["endings"]:
        ids = torch.tensor([tokenizer(start + ending)["input_ids"]])
        first = len(tokenizer(start)["input_ids"])
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, first - 1 : -1]
        sums.append(float(log_probs.gather(1, ids[0, first:, None]).sum()))
    assert accuracy == float(sums[0] > sums[1])


def test_unknown_tasks_and_suites_are_named(workplace, capsys):
    assert cli.main(["eval-text", str(workplace / "run"), "--tasks", "no_such_task"]) == 2
    assert "no_such_task" in capsys.readouterr().err
    assert cli.main(["eval-text", str(workplace / "run"), "--suite", "nope"]) == 2
    assert "expected one of paper" in capsys.readouterr().err


@pytest.mark.slow
def test_the_suites_tasks_exist_in_the_installed_harness():
    from lm_eval.tasks import TaskManager

    from llava_compete.evaluation.text.harness import suite_tasks

    manager = TaskManager()
    assert all(manager.match_tasks([task]) for task in suite_tasks("paper"))
