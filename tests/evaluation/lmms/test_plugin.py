"""The plugin under lmms-eval's own evaluator: every request type, batch sizes, settings, failures that stop the run."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from evaluation_kit import NUM_DOCUMENTS, save_tiny, write_tasks
from PIL import Image
from tiny import tiny_model

from llava_compete.evaluation.answerer import (
    Answerer,
    DocumentError,
    Prompt,
    content_parts,
    reading_order,
)
from llava_compete.evaluation.generation_settings import GenerationSettings, cut_at
from llava_compete.model.build import save_checkpoint

lmms_eval = pytest.importorskip("lmms_eval")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "sft")


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory, checkpoint):
    """Runs lmms-eval's evaluator in this process on local tasks; returns samples by task, in document order."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llava_compete.evaluation.lmms.model import LlavaCompeteLmms

    tasks_folder = str(write_tasks(tmp_path_factory.mktemp("tasks") / "tasks"))
    manager = TaskManager(include_path=tasks_folder, include_defaults=False)

    def run(tasks, batch_size=4, pretrained=checkpoint, **arguments):
        model = LlavaCompeteLmms(str(pretrained), batch_size=batch_size, device="cpu", **arguments)
        found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
        return found["results"], samples

    return run


def answers(samples, task):
    return [sample["filtered_resps"][0] for sample in samples[task]]


@pytest.fixture(scope="module")
def reference(evaluate):
    return evaluate(["local_generate", "local_generate_long", "local_choice", "local_rounds"], batch_size=1)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_results_do_not_depend_on_the_batch_size(evaluate, reference, batch_size):
    tasks = ["local_generate", "local_generate_long", "local_choice", "local_rounds"]
    results, samples = evaluate(tasks, batch_size=batch_size)
    for task in ("local_generate", "local_generate_long", "local_rounds"):
        assert answers(samples, task) == answers(reference[1], task)
    for now, before in zip(samples["local_choice"], reference[1]["local_choice"], strict=True):
        for (value, greedy), expected in zip(now["filtered_resps"], before["filtered_resps"], strict=True):
            assert (value, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])
    assert results["local_choice"]["acc,none"] == reference[0]["local_choice"]["acc,none"]


def test_answers_are_not_trivial(reference):
    """Otherwise the invariance above would say nothing."""
    texts = answers(reference[1], "local_generate")
    assert len(texts) == NUM_DOCUMENTS
    assert len(set(texts)) > NUM_DOCUMENTS // 2
    assert all(texts)


def test_rounds_go_on_until_the_task_ends_them(reference):
    rounds = [sample["rounds"]["score"] for sample in reference[1]["local_rounds"]]
    assert rounds == [1 + index % 3 for index in range(NUM_DOCUMENTS)]


def test_likelihood_is_a_summed_negative_log(checkpoint, reference):
    """Against a plain forward of the whole text, one document and choice at a time; the smallest is the prediction."""
    from llava_compete.language.chat_encoding import encode_conversation
    from llava_compete.model.build import load_checkpoint

    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    prompt = Prompt("how many shapes are there ?", lambda: [Image.new("RGB", (28, 28), (200, 10, 10))])
    choices = ["red", "two shapes ."]
    found = Answerer(model, processor, 2).log_likelihoods([prompt, prompt], choices)
    for choice, result in zip(choices, found, strict=True):
        user = {"role": "user", "content": content_parts(prompt.text, 1)}
        encoded = encode_conversation(
            processor.tokenizer,
            [user, {"role": "assistant", "content": choice}],
            tokens_per_image=processor.num_image_tokens,
        )
        pixels = processor.image_processor.preprocess(prompt.images(), return_tensors="pt")["pixel_values"]
        ids = torch.tensor([encoded.input_ids])
        log_probs = model(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
        learnt = [i for i, label in enumerate(encoded.labels) if label != -100]
        text = [
            i for i in learnt if encoded.input_ids[i] in processor.tokenizer.encode(choice, add_special_tokens=False)
        ]
        expected = -sum(log_probs[i - 1, encoded.input_ids[i]].item() for i in text)
        assert result.negative_log_likelihood == pytest.approx(expected, abs=1e-4)
    for sample in reference[1]["local_choice"]:
        values = [value for value, _ in sample["filtered_resps"]]
        assert sample["acc"] == float(values.index(min(values)) == sample["doc"]["label"])


def test_a_failing_document_stops_the_run_and_is_named(evaluate):
    with pytest.raises(DocumentError, match=r"task local_broken, split test, document 3: OSError: image file is trunc"):
        evaluate(["local_broken"])


def test_an_image_for_a_checkpoint_without_a_tower_is_one_clear_line(evaluate, tmp_path):
    save_checkpoint(*tiny_model(tower=None), tmp_path / "text")
    expected = (
        r"^task local_generate, split test, document \d+: UserError: shows \d image\(s\), but the checkpoint has no"
    )
    with pytest.raises(DocumentError, match=expected) as caught:
        evaluate(["local_generate"], pretrained=tmp_path / "text")
    assert "\n" not in str(caught.value)


def test_a_batch_that_fails_is_taken_apart_to_name_the_document(checkpoint):
    from llava_compete.model.build import load_checkpoint

    answerer = Answerer(*load_checkpoint(checkpoint, dtype=torch.float32), 4)
    preprocess = answerer.processor.image_processor.preprocess

    def fails_on_wide(images, **options):
        if any(image.width == 31 for image in images):
            raise ValueError("too wide")
        return preprocess(images, **options)

    answerer.processor.image_processor.preprocess = fails_on_wide
    prompts = [Prompt("red", partial(_white, width), f"width {width}") for width in (28, 31, 29)]
    settings = [GenerationSettings.from_task({"max_new_tokens": 4})] * 3
    with pytest.raises(DocumentError, match=r"^width 31: ValueError: too wide$"):
        answerer.generate(prompts, settings)


def _white(width):
    return [Image.new("RGB", (width, 28))]


def test_a_prompt_near_the_end_of_the_context_does_not_shorten_its_neighbours(checkpoint):
    """Room for an answer is a matter of one's own prompt, not of the longest in the batch."""
    from llava_compete.model.build import load_checkpoint

    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    context = model.config.text_config.max_position_embeddings
    answerer = Answerer(model, processor, 1)
    words = next(n for n in range(10, context) if len(answerer._load(Prompt("red " * n)).input_ids) > context - 12)
    prompts = [Prompt("how many shapes ?"), Prompt("red " * words), Prompt("what colour is the circle ?")]
    settings = [GenerationSettings.from_task({"max_new_tokens": 40})] * 3
    alone = answerer.generate(prompts, settings)
    assert len(alone[0]) > 2 * len(alone[1])
    assert Answerer(model, processor, 3).generate(prompts, settings) == alone


def test_a_prompt_longer_than_the_context_names_the_document(checkpoint):
    from llava_compete.model.build import load_checkpoint

    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    prompts = [Prompt("red", name="first"), Prompt("circle " * 300, name="second"), Prompt("two", name="third")]
    settings = [GenerationSettings.from_task({"max_new_tokens": 4})] * 3
    with pytest.raises(DocumentError, match=r"^second: UserError: .* longer than the language model's context of 256"):
        Answerer(model, processor, 3).generate(prompts, settings)


def test_stop_strings_end_and_cut_the_answer(checkpoint, reference):
    from llava_compete.model.build import load_checkpoint

    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    answerer = Answerer(model, processor, 2)
    prompts = [Prompt("what colour is the circle ?"), Prompt("how many shapes ?")]
    whole = answerer.generate(prompts, [GenerationSettings.from_task({"max_new_tokens": 12})] * 2)
    stop = whole[0][3:5]
    steps = []
    answerer.model.register_forward_hook(lambda *_: steps.append(1))
    settings = GenerationSettings.from_task({"max_new_tokens": 12, "until": [stop]})
    assert answerer.generate(prompts[:1], [settings]) == [whole[0][: whole[0].index(stop)]]
    assert len(steps) < 12
    assert answerer.generate(prompts, [settings] * 2)[1] == cut_at(whole[1], (stop,))


def test_clean_leaves_the_object_usable(checkpoint):
    from llava_compete.evaluation.lmms.model import LlavaCompeteLmms

    model = LlavaCompeteLmms(str(checkpoint), device="cpu")
    model.clean()
    assert model.answerer.generate([Prompt("red")], [GenerationSettings.from_task({"max_new_tokens": 2})])


def test_competition_at_inference_changes_the_routing(evaluate, reference):
    """For study: the model then computes all experts and lets them compete."""
    _, samples = evaluate(["local_generate"], batch_size=8, competition_at_inference=True)
    assert answers(samples, "local_generate") != answers(reference[1], "local_generate")


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "do_sample": True, "top_p": 1.0}, {"do_sample": False}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"num_beams": 3, "top_p": None}, {"do_sample": False, "num_beams": 3}),
    ],
)
def test_settings_as_tasks_give_them(given, options):
    assert dict(GenerationSettings.from_task(given).options) == options


def test_settings_of_other_models_are_named_once_and_ignored(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            settings = GenerationSettings.from_task({"image_aspect_ratio_": "pad", "until": "\n"})
    assert settings.until == ("\n",)
    assert caplog.text.count("image_aspect_ratio_") == 1
    with pytest.raises(ValueError, match="until"):
        GenerationSettings.from_task({"until": [3]})
    with pytest.raises(ValueError, match="max_new_tokens"):
        GenerationSettings.from_task({"max_new_tokens": 0})


def test_images_stand_where_the_text_names_them():
    image = {"type": "image"}
    assert content_parts("what?", 1) == [image, {"type": "text", "text": "\nwhat?"}]
    assert content_parts("<image 1> or <image 2>?", 2) == [
        image,
        {"type": "text", "text": " or "},
        image,
        {"type": "text", "text": "?"},
    ]
    # A literal placeholder that stands for no image is text, and images that it does not count go in front.
    assert content_parts("an <image> tag", 0) == [{"type": "text", "text": "an <image> tag"}]
    assert content_parts("<image 1> again <image 1>", 1)[0] == image


def test_numbered_images_stand_at_their_number(checkpoint):
    """Benchmarks hand them over by number, whatever the order of mention."""
    assert reading_order("<image 2> or <image 1>, as in <image 4>?", 3) == [1, 0, 2]
    assert reading_order("<image 1> again <image 1>", 2) == [0, 1]
    assert reading_order("what?", 2) == [0, 1]
    from llava_compete.model.build import load_checkpoint

    answerer = Answerer(*load_checkpoint(checkpoint, dtype=torch.float32), 1)
    images = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    loaded = answerer._load(Prompt("is <image 2> like <image 1>?", lambda: images))
    assert [image.getpixel((0, 0)) for image in loaded.images] == [(0, 0, 255), (255, 0, 0)]
