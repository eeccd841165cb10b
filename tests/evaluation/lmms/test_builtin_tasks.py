"""lmms-eval's own benchmarks on local copies with the hub's layout; suites against the installed task names."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import random
from pathlib import Path

import datasets
import pytest
from evaluation_kit import save_tiny
from PIL import Image

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation.config import EVAL_ROOT
from llava_compete.evaluation.lmms.catalogue import check_names, check_on_disk, data_sets
from llava_compete.evaluation.lmms.documents import FOLDER_VARIABLE, add_documents, read_documents
from llava_compete.evaluation.lmms.suites import check_judges, find_local_tasks, load_suite
from llava_compete.evaluation.unit_scores import score_samples, weighted_mean

TASKS = EVAL_ROOT / "tasks"
SUITES = sorted(path.stem for path in (EVAL_ROOT / "suites").glob("*.yaml"))
BENCHMARKS = ["pope", "mme", "ai2d", "mmbench_en_dev", "scienceqa_img"]


def picture(seed: int) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (seed * 37 % 256, seed * 91 % 256, 50)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of() -> dict[str, tuple[str, str, list[str], list[dict]]]:
    """By data set: config, split, image columns and rows, with the columns that the benchmark's code reads.

    Half of the answers are "A" where the score is a plain share.
    """
    pope = [
        {"id": str(i), "question_id": str(i), "question": "Is there a cat?", "answer": ("yes", "no")[i % 2],
         "image_source": "x", "category": "random"} for i in range(6)
    ]  # fmt: skip
    # Two questions an image; always "yes" gets one of them right, except for the images of "code_reasoning".
    mme = [
        {"question_id": f"{category}/{i // 2}", "question": "Is it red? Please answer yes or no.", "category": category,
         "answer": "Yes" if i % 2 or category == "code_reasoning" else "No"}
        for category, size in (("existence", 6), ("color", 2), ("code_reasoning", 4)) for i in range(size)
    ]  # fmt: skip
    ai2d = [{"question": "Which?", "options": ["one", "two", "three"], "answer": str(i % 3)} for i in range(6)]
    # Question 0 has a rotation in which the answer moves to B: "A" is then right only once, so not at all.
    mmbench = [
        {"index": index, "question": "Which?", "hint": "nan", "answer": answer, "A": "one", "B": "two", "C": "three",
         "D": "four", "category": "c", "L2-category": "d", "source": "s", "split": "dev"}
        for index, answer in ((0, "A"), (1_000_000, "B"), (1, "A"), (2, "C"))
    ]  # fmt: skip
    science = [{"question": "Which?", "choices": ["one", "two"], "answer": i % 2, "hint": ""} for i in range(4)]
    chartqa = [{"question": "Which?", "answer": "AB"[i % 2], "type": "human_test"} for i in range(4)]
    textvqa = [
        {"image_id": str(i // 2), "question_id": i, "question": "which?", "answers": ["ab"[i % 2]] * 10}
        for i in range(4)
    ]
    infovqa = [
        {"questionId": str(i), "question": "Which?", "answers": ["AB"[i % 2]], "image_url": str(i // 2)}
        for i in range(4)
    ]
    # Category d has one question and e three: the score is the mean of the categories' shares, 1 and 1/3.
    mmstar = [
        {"index": i, "question": "Which?", "answer": "AABB"[i], "category": "math", "l2_category": "deee"[i]}
        for i in range(4)
    ]
    mmmu = [
        {"id": f"validation_{subject}_{i}", "question": "Is <image 2> like <image 1>?", "options": "['one', 'two']",
         "question_type": "multiple-choice", "answer": "AB"[i % 2]}
        for i, subject in enumerate(("Accounting", "Art", "Art", "Music"))
    ]  # fmt: skip
    ocr = [
        {"dataset": "TextVQA", "question": "Which?", "question_type": "Scene Text-centric VQA", "answer": ["AB"[i % 2]]}
        for i in range(4)
    ]
    seed = [
        {"question": "Which?", **dict.fromkeys(("choice_A", "choice_B", "choice_C", "choice_D"), "x"),
         "answer": "AB"[i % 2], "question_image_type": "chart", "question_id": str(i)} for i in range(4)
    ]  # fmt: skip
    world = [{"question": "Which?", "answer": "AB"[i % 2]} for i in range(4)]
    arc = [
        {"question": "what colour is the circle", "choices": {"text": ["red", "two shapes"], "label": ["A", "B"]},
         "answerKey": "AB"[i % 2]} for i in range(5)
    ]  # fmt: skip
    mathvista = [
        {
            "pid": str(i),
            "question": "Which?",
            "image": f"images/{i}.jpg",
            "choices": ["A", "B"],
            "unit": "",
            "answer": "AB"[i % 2],
            "precision": None,
            "question_type": "multi_choice",
            "answer_type": "text",
            "query": "Which?",
        }
        for i in range(4)
    ]
    hallusion = [
        {"category": "VS", "subcategory": "map", "set_id": str(i // 2), "figure_id": "1", "question_id": str(i % 2),
         "question": "Is it?", "gt_answer": str(i % 2), "filename": "x"} for i in range(4)
    ]  # fmt: skip
    one = ["image"]
    return {
        "AI4Math/MathVista": ("default", "testmini", ["decoded_image"], mathvista),
        "lmms-lab-encoder/HallusionBench": ("default", "image", one, hallusion),
        "lmms-lab-encoder/POPE": ("default", "test", one, pope),
        "lmms-lab-encoder/MME": ("default", "test", one, mme),
        "lmms-lab-encoder/ai2d": ("default", "test", one, ai2d),
        "lmms-lab-encoder/MMBench": ("en", "dev", one, mmbench),
        "lmms-lab-encoder/ScienceQA": ("ScienceQA-IMG", "test", one, science),
        "lmms-lab-encoder/ChartQA": ("default", "test", one, chartqa),
        "lmms-lab-encoder/textvqa": ("default", "validation", one, textvqa),
        "lmms-lab-encoder/DocVQA": ("InfographicVQA", "validation", one, infovqa),
        "Lin-Chen/MMStar": ("default", "val", one, mmstar),
        "lmms-lab-encoder/MMMU": ("default", "validation", ["image_1", "image_2"], mmmu),
        "echo840/OCRBench": ("default", "test", one, ocr),
        "doolayer/SEED-Bench-2-Plus": ("default", "test", one, seed),
        "lmms-lab-encoder/RealWorldQA": ("default", "test", one, world),
        "allenai/ai2_arc": ("ARC-Easy", "test", [], arc),
    }  # fmt: skip


@pytest.fixture(scope="module")
def local_copies(tmp_path_factory):
    """A folder laid out like the hub by eval/offline/make_local.py."""
    spec = importlib.util.spec_from_file_location("make_local", EVAL_ROOT / "offline" / "make_local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("hub")
    for name, (config, split, images, rows) in rows_of().items():
        shown = [int(row.get("image_id", row.get("image_url", i))) for i, row in enumerate(rows)]
        pictures = [{column: picture(2 * i + j) for j, column in enumerate(images)} for i in shown]
        table = datasets.Dataset.from_list([row | shown for row, shown in zip(rows, pictures, strict=True)])
        for column in images:
            table = table.cast_column(column, datasets.Image())
        table.to_parquet(root / "table.parquet")
        module.make_local(root, name, split, root / "table.parquet", config)
    return root


@pytest.fixture(scope="module")
def evaluate(local_copies, tmp_path_factory):
    """lmms-eval's evaluator on the built-in tasks, started in the folder with the local copies."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llava_compete.evaluation.lmms.model import LlavaCompeteLmms

    checkpoint = save_tiny(tmp_path_factory.mktemp("stage") / "sft")
    output = str(tmp_path_factory.mktemp("out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, output)
        model = LlavaCompeteLmms(str(checkpoint), batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(TASKS), model_name="llava_compete")

    def run(tasks, answer=None):
        if answer is not None:

            def generate(prompts, settings):
                for prompt in prompts:
                    prompt.images()
                return [answer(prompt) for prompt in prompts]

            model.answerer.generate = generate
        before = Path.cwd()
        os.chdir(local_copies)
        try:
            found = simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,
                bootstrap_iters=0,
                cli_args=argparse.Namespace(output_path=output, process_with_media=False),
            )
        finally:
            os.chdir(before)
        for task, samples in found["samples"].items():
            add_documents(task, samples, read_documents(Path(output)))
        return found["results"], found["samples"], manager

    return run


def test_benchmarks_run_on_local_copies_and_units_give_their_scores(evaluate):
    """First with the model, then with fixed answers whose scores can be told by hand."""
    # MMBench comes with the fixed answers: an unreadable letter makes it ask its judge, and its spreadsheet takes no
    # control characters, which a random model writes.
    _, samples, manager = evaluate(["pope", "mme", "ai2d", "scienceqa_img"])
    assert {task: len(rows) for task, rows in samples.items()} == {"pope": 6, "mme": 12, "ai2d": 6, "scienceqa_img": 4}
    assert all(name in manager.all_tasks for suite in SUITES for name in _names(suite) if name not in _own())

    results, samples, _ = evaluate(
        [*BENCHMARKS, "mmbench_en_dev_static"], lambda prompt: "Yes" if prompt.text.startswith("Is ") else "A"
    )
    scores = {task: weighted_mean(score_samples(task, rows)) for task, rows in samples.items()}
    assert scores["pope"] == results["pope"]["pope_accuracy,none"] == 0.5
    assert scores["ai2d"] == results["ai2d"]["exact_match,flexible-extract"] == pytest.approx(1 / 3)
    assert scores["scienceqa_img"] == results["scienceqa_img"]["exact_match,none"] == 0.5
    assert scores["mmbench_en_dev"] * 100 == pytest.approx(results["mmbench_en_dev"]["gpt_eval_score,none"])
    assert scores["mmbench_en_dev"] == pytest.approx(1 / 3)
    mme = results["mme"]["mme_perception_score,none"] + results["mme"]["mme_cognition_score,none"]
    assert scores["mme"] == pytest.approx(mme / (200 * 3))
    assert scores["mme"] == pytest.approx((0.25 + 0.25 + 1) / 3)
    assert len(score_samples("mme", samples["mme"])) == 6  # images, not questions


@pytest.mark.parametrize(
    ("task", "metric", "score", "images"),
    [
        ("chartqa", "relaxed_overall,none", 1 / 2, 4),
        ("textvqa_val", "exact_match,none", 1 / 2, 2),
        ("infovqa_val", "anls,none", 1 / 2, 2),
        ("mmstar", "average,none", 2 / 3, 4),
        ("mmmu_val", "mmmu_acc,none", 1 / 2, 4),
        ("ocrbench", "ocrbench_accuracy,none", 1 / 2, 4),
        ("seedbench_2_plus", "seedbench_2_plus_all,none", 1 / 2, 4),
        ("realworldqa", "exact_match,none", 1 / 2, 4),
    ],
)
def test_units_of_the_other_benchmarks_give_their_scores(evaluate, task, metric, score, images):
    """Always "A": what lmms-eval reports is what the units say, and questions about one image share a group."""
    results, samples, _ = evaluate([task], lambda prompt: "A")
    units = score_samples(task, samples[task])
    assert weighted_mean(units) == pytest.approx(score)
    # OCRBench divides by its 1,000 questions, however many there are.
    assert results[task][metric] == pytest.approx(score * (4 / 1000 if task == "ocrbench" else 1), abs=1e-5)
    assert len({unit.group for unit in units} - {None}) == images
    assert len({unit.id for unit in units}) == 4


def test_our_exact_variants_need_no_judge(evaluate, monkeypatch):
    """The whole task, from its YAML on: lmms-eval's own MathVista asks for a judge's key when it is imported."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    results, samples, _ = evaluate(
        ["mathvista_testmini_exact", "hallusion_bench_image_exact"],
        lambda prompt: "Yes" if prompt.text.startswith("Is ") else "A",
    )
    for task, rows in samples.items():
        assert results[task]["accuracy,none"] == weighted_mean(score_samples(task, rows)) == 0.5


def test_an_unreadable_answer_is_guessed_by_question(evaluate):
    """MMMU guesses a letter. What was drawn before, and which thread draws first, must not matter."""

    def answer(draws):
        def unreadable(prompt):
            random.sample(range(100), draws)  # as a rank that has seen fewer or more documents
            return "?"

        return unreadable

    found = [evaluate(["mmmu_val"], answer(draws)) for draws in (0, 1, 2, 3, 4)]
    guesses = [
        {row["doc_id"]: row["mmmu_acc"]["parsed_pred"] for row in samples["mmmu_val"]} for _, samples, _ in found
    ]
    assert all(guess == guesses[0] for guess in guesses)
    assert len({results["mmmu_val"]["mmmu_acc,none"] for results, _, _ in found}) == 1
    assert len({tuple(guess) for guess in guesses[0].values()}) > 1  # not one letter for all


def test_only_what_a_task_asks_for_stops_an_answer(evaluate):
    """lmms-eval's default, an empty line, is for prompts with examples."""
    from lmms_eval.api.task import TaskConfig

    def until(**settings):
        return TaskConfig(task="x", output_type="generate_until", **settings).generation_kwargs.get("until")

    assert until() is None
    assert until(generation_kwargs={"max_new_tokens": 9}) is None
    assert until(generation_kwargs={"until": ["\n\n"]}) == ["\n\n"]
    assert until(generation_kwargs={"max_new_tokens": 9}, num_fewshot=2) == ["\n\n"]


def test_language_benchmarks_rank_choices_without_an_image(evaluate):
    results, samples, _ = evaluate(["arc_easy"])
    units = score_samples("arc_easy", samples["arc_easy"])
    assert len(units) == 5
    assert weighted_mean(units) == pytest.approx(results["arc_easy"]["acc,none"])
    likely = samples["arc_easy"][0]["filtered_resps"]
    assert weighted_mean(units) == (0.6 if likely[0][0] < likely[1][0] else 0.4)  # all ask the same


def _names(suite: str) -> list[str]:
    content = load_suite(suite)
    return [*content.tasks, *content.left_out]


def _own() -> set[str]:
    return {path.stem for path in TASKS.glob("*.yaml")}


@pytest.mark.parametrize("suite", SUITES)
def test_suites_name_tasks_that_exist(suite):
    check_names(_names(suite), TASKS)
    content = load_suite(suite)
    assert not set(content.tasks) & set(content.left_out)
    assert all(data_sets(task, TASKS) or task in find_local_tasks(TASKS) for task in content.tasks)


def test_the_papers_sixteen_benchmarks_are_there():
    assert len(load_suite("paper").tasks) == 16
    assert {"hallusion_bench_image", "mathvista_testmini_format", "mmbench_en_dev"} <= set(load_suite("paper").left_out)


def test_a_judge_without_its_key_is_refused(monkeypatch):
    """lmms-eval would ask for hours, get no answer and count every answer as wrong."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    check_judges(load_suite("paper").tasks)
    with pytest.raises(UserError, match=r"hallusion_bench_image_exact needs none; OPENAI_API_KEY is not set"):
        check_judges(["pope", "hallusion_bench_image"])
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    check_judges(["hallusion_bench_image"])


def test_wrong_names_get_near_ones():
    with pytest.raises(UserError, match="did you mean pope"):
        check_names(["popee"], TASKS)


def test_a_missing_data_set_is_named_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data set lmms-lab-encoder/POPE is not on this machine.*eval prepare --tasks"):
        check_on_disk(["ai2d", "pope"][1:], TASKS)
    (tmp_path / "lmms-lab-encoder" / "POPE").mkdir(parents=True)
    check_on_disk(["pope"], TASKS)
    assert data_sets("mmlu", TASKS)
    assert main(["eval", "prepare"]) == 2
    assert "expected: llava-compete eval prepare --suite" in capsys.readouterr().err


@pytest.mark.slow
def test_prepare_verifies_a_local_copy(local_copies, monkeypatch):
    """Without a network: what is on the disk is found ready, and what is not is reported."""
    from llava_compete.evaluation.lmms.prepare import prepare

    monkeypatch.chdir(local_copies)
    pope, missing = prepare(["pope", "gqa"], TASKS, offline_only=True)
    assert (pope.documents, pope.error) == (6, None)
    assert "lmms-lab-encoder/GQA" in missing.error


def test_exact_variants_score_as_the_benchmarks_do():
    spec = importlib.util.spec_from_file_location("exact_benchmarks", TASKS / "exact_benchmarks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = {"category": "VS", "subcategory": "map", "set_id": 1, "figure_id": 2, "question_id": 3, "gt_answer": "1"}
    for answer, score in (("Yes, it is.", 1.0), ("no", 0.0), ("nothing", 0.0), ("Yesterday", 0.0)):
        assert module.hallusion(document, [answer])["accuracy"]["score"] == score
    pytest.importorskip("Levenshtein", reason="lmms-eval's MathVista needs it and does not require it")
    choice = {"pid": 1, "question_type": "multi_choice", "answer_type": "text", "choices": ["cat", "dog"],
              "precision": None, "answer": "dog"}  # fmt: skip
    number = {**choice, "question_type": "free_form", "answer_type": "integer", "choices": None, "answer": "1200"}
    # As the data set has them: decimals are 1.0 or 2.0, lists are texts.
    decimal = {**number, "answer_type": "float", "precision": 2.0, "answer": "0.25"}
    series = {**number, "answer_type": "list", "answer": "[4, 5]"}
    article = {**choice, "choices": ["no cat", "A cat"], "answer": "A cat"}
    for document, answer, score in (
        (decimal, "0.25", 1.0), (decimal, "It is .249.", 1.0), (decimal, "2.5", 0.0), (article, "A cat", 1.0),
        (series, "[4, 5]", 1.0), (series, "They are [4, 5].", 1.0), (series, "5", 0.0), (article, "A", 0.0),
        (choice, "B", 1.0), (choice, "(B) dog", 1.0), (choice, "A.", 0.0), (choice, "dog", 1.0),
        (number, "1,200", 1.0), (number, "The answer is 1200.", 1.0), (number, "12", 0.0), (number, "none", 0.0),
    ):  # fmt: skip
        assert module.mathvista(document, [answer])["accuracy"]["score"] == score
