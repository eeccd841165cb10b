"""The page without a browser: one conversation of several models, what its events do, and the command's refusals."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_model

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.model.build import save_checkpoint
from llava_compete.talk.conversation import Conversation
from llava_compete.talk.examples import data_examples, scene_examples
from llava_compete.talk.limits import Limits
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Talker

pytest.importorskip("gradio")
page_module = importlib.import_module("llava_compete.talk.page")
MOE = {part: {"num_experts": 4, "num_experts_per_tok": 2} for part in ("vision", "projector", "language")}
LIMITS = Limits(max_new_tokens=150, images=2, image_mib=0.1, megapixels=0.02)
GREEDY = (0, 1, 0, 6, None)
LONG = (0, 1, 0, 60, None)


@pytest.fixture(scope="module")
def talkers() -> dict[str, Talker]:
    """One of experts, a dense one that sees nothing."""
    return {"moe": Talker(*tiny_model(moe=MOE)), "text": Talker(*tiny_model(seed=1, tower=None))}


@pytest.fixture
def page(talkers: dict[str, Talker]) -> Any:
    return page_module.Page(talkers, LIMITS)


@pytest.fixture
def slow(talkers: dict[str, Talker]) -> Iterator[None]:
    """A token takes so long that an answer still grows when it is stopped, on a machine that does other work too."""
    hooks = [talker.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.05)) for talker in talkers.values()]
    yield
    for hook in hooks:
        hook.remove()


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


NOTHING = Conversation()


def said(page: Any, text: str, before: Conversation = NOTHING, files: tuple[str, ...] = (), **more: Any) -> Any:
    """All conversations that a question shows."""
    return list(page.answer({"text": text, "files": list(files)}, before, "", more.get("settings", GREEDY), "me"))


def test_each_model_answers_as_it_does_alone(page: Any, talkers: dict[str, Talker]) -> None:
    first = said(page, "what colour is the circle ?", settings=LONG)
    second = said(page, "how many ?", first[-1])[-1]
    assert {reply.note for reply in first[-1].turns[0].replies} <= {"", "60 tokens: the limit"}
    for number, talker in enumerate(talkers.values()):
        heard: list[dict[str, Any]] = []
        for turn in second.turns:
            heard.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
            length = len(turn.replies[number].answer.token_ids)
            expected = talker.ask(heard, Sampling(max_new_tokens=length))
            assert turn.replies[number].text == expected.text
            assert turn.replies[number].answer.token_ids == expected.token_ids
            heard.append({"role": "assistant", "content": expected.text})
    texts = [grown.turns[-1].replies[0].text for grown in first]
    assert texts == sorted(texts, key=len)  # it grows
    assert len(set(texts)) > 2
    assert [message["role"] for message in page_module.shown(second, 0)] == ["user", "assistant"] * 2


def test_a_model_that_cannot_answer_says_so_and_has_not_heard_the_question(page: Any, picture: str) -> None:
    first = said(page, "what ?", files=(picture,))[-1]
    seeing, blind = first.turns[0].replies
    assert seeing.answer is not None
    assert "no vision tower" in blind.note
    second = said(page, "how many ?", first)[-1]
    assert second.turns[1].replies[1].answer is not None
    assert [message["role"] for message in second.messages(1, "be brief")] == ["system", "user"]
    assert len(second.messages(0, "")) == 3
    assert page_module.shown(first, 1)[-1]["content"].startswith("[not answered: images given")
    assert second.last_answer(0)[1] == [first.turns[0].pictures[0]]
    assert second.last_answer(1)[1] == []


def test_a_failure_is_a_line_and_the_page_goes_on(page: Any, talkers: dict[str, Talker], monkeypatch: Any) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory.\nmore lines")

    with monkeypatch.context() as patch:
        patch.setattr(talkers["moe"].model, "generate", breaks)
        found = said(page, "what ?")[-1]
    assert found.turns[0].replies[0].note == "failed: RuntimeError: CUDA out of memory."
    assert found.turns[0].replies[1].answer is not None
    assert said(page, "what ?", found)[-1].turns[1].replies[0].answer is not None


def test_too_long_a_conversation_is_named(page: Any) -> None:
    assert "the model's context is 256" in said(page, "word " * 300)[-1].turns[0].replies[0].note


@pytest.mark.usefixtures("slow")
def test_stop_ends_the_answer_and_leaves_the_next_model_unasked(page: Any) -> None:
    growing = page.answer({"text": "what ?"}, Conversation(), "", LONG, "me")
    for grown in growing:
        if grown.turns[0].replies[0].text:
            page.stop("somebody else")
            page.stop("me")
            break
    last = list(growing)[-1]
    assert last.turns[0].replies[0].note == "stopped"
    assert len(last.turns[0].replies[0].answer.token_ids) < 60
    assert last.turns[0].replies[1].note == "not asked: stopped before"
    page.stop("me")  # nothing to stop


@pytest.mark.usefixtures("slow")
def test_a_new_conversation_waits_for_the_end_of_the_old_answer(page: Any) -> None:
    seen: list[Conversation] = []
    begun = threading.Event()

    def ask() -> None:
        for grown in page.answer({"text": "what ?"}, Conversation(), "", LONG, "me"):
            seen.append(grown)
            begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait(20)
    page.drop("me")
    thread.join(20)
    assert not thread.is_alive()
    assert seen[-1].turns[0].replies[1].answer is None


@pytest.mark.parametrize(
    ("asked", "settings", "expected"),
    [
        ({"text": "  ", "files": []}, GREEDY, "Write a question"),
        ({"text": "?", "files": ["large.png"]}, GREEDY, r"large\.png: a picture of 200x200 pixels, at most 0\.02"),
        ({"text": "?", "files": ["heavy.png"]}, GREEDY, r"heavy\.png: a picture of 200,000 bytes, at most 0\.1 MiB"),
        ({"text": "?", "files": ["broken.png"]}, GREEDY, r"broken\.png: "),
        ({"text": "?", "files": ["forgotten.png"]}, GREEDY, r"forgotten\.png: cannot be read: No such file"),
        ({"text": "?", "files": ["small.png"] * 3}, GREEDY, "3 pictures with one question, at most 2"),
        ({"text": "?"}, (-1, 1, 0, 6, None), "temperature: found -1"),
        ({"text": "?"}, ("hot", 1, 0, 6, None), "settings: could not convert"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    page: Any, tmp_path: Path, asked: dict[str, Any], settings: Any, expected: str
) -> None:
    Image.new("RGB", (200, 200)).save(tmp_path / "large.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    (tmp_path / "heavy.png").write_bytes(bytes(200_000))
    (tmp_path / "broken.png").write_bytes((tmp_path / "small.png").read_bytes()[:50])
    asked = {**asked, "files": [str(tmp_path / file) for file in asked.get("files", [])]}
    with pytest.raises(UserError, match=expected):
        list(page.answer(asked, Conversation(), "", settings, "me"))
    assert said(page, "what ?")[-1].turns[0].replies[0].answer is not None


def test_settings_stay_within_the_limits() -> None:
    found = page_module.sampling_of((0.5, 0.9, 3, 5000, 7), LIMITS)
    assert found == Sampling(max_new_tokens=150, temperature=0.5, top_p=0.9, top_k=3, seed=7)


def test_maps_of_an_answer(page: Any, picture: str) -> None:
    """The picture of an earlier turn is drawn too; the table has the recorded experts of the answer's tokens."""
    first = said(page, "what ?", files=(picture,))[-1]
    second = said(page, "and now ?", first)[-1]
    html, of_text = page.experts(second)
    assert html.count('<img class="map"') == 1
    assert html.count('<img class="use"') == 3
    answer = second.turns[1].replies[0].answer
    chosen = answer.routed["language.0"].answer_TK
    assert len(chosen) == len(answer.token_ids) - 1
    for row in chosen.tolist():
        assert f">{row[0]},{row[1]}</td>" in html
    assert 'src="http' not in html
    assert "is dense" in of_text
    assert "No answer yet" in page.experts(first)[1]  # the blind one has not answered
    assert "No answer yet" in page.experts(Conversation())[0]


def test_the_experts_of_shared_routers_are_by_weight() -> None:
    """The shared expert weighs half, and comes first, as in the report's maps."""
    talker = Talker(
        *tiny_model(moe={"language": {"num_experts": 4, "num_experts_per_tok": 3, "router": "shared_softmax"}})
    )
    answer = talker.ask([{"role": "user", "content": "what ?"}], Sampling(max_new_tokens=4))
    for tokens in answer.routed.values():
        assert (tokens.prompt_TK[:, 0] == 3).all()
        assert (tokens.answer_TK[:, 0] == 3).all()


def test_examples_are_questions_with_files(tmp_path: Path) -> None:
    for example in scene_examples(tmp_path):
        assert example["text"].endswith("?")
        assert all(Image.open(file).size == (48, 48) for file in example["files"])
    datasets = pytest.importorskip("datasets")
    row = {"image": Image.new("RGB", (9, 7)), "question": "what ?", "answer": "red", "id": "0"}
    features = datasets.Features(
        {"image": datasets.Image(), **dict.fromkeys(("question", "answer", "id"), datasets.Value("string"))}
    )
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "rows.parquet")
    (example,) = data_examples(tmp_path / "rows.parquet", tmp_path)
    assert example["text"] == "what ?"
    assert Image.open(example["files"][0]).size == (9, 7)


def test_names_tell_two_checkpoints_apart() -> None:
    names = page_module.names_of
    assert names([Path("/runs/a/sft")]) == ["sft"]
    assert names([Path("/runs/a/sft"), Path("/runs/b/sft")]) == ["a/sft", "b/sft"]
    assert names([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    with pytest.raises(UserError, match="given twice"):
        names([Path("/runs/a"), Path("/runs/a")])


def test_uploads_of_too_many_bytes_are_refused(talkers: dict[str, Talker]) -> None:
    """Whoever sends them: the page's own check is in the browser."""
    from fastapi.testclient import TestClient

    client = TestClient(page_module.mount(page_module.build_page(talkers, LIMITS, []), LIMITS))
    statuses = [
        client.post("/gradio_api/upload", files={"files": ("a.png", bytes(size))}).status_code
        for size in (LIMITS.image_bytes, LIMITS.image_bytes + 1)
    ]
    assert statuses == [200, 413]
    assert client.get("/docs").status_code == 404


def test_bad_commands_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava_compete.talk.listening import listen

    torch.manual_seed(0)
    save_checkpoint(*tiny_model(), tmp_path / "model")
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            (str(tmp_path / "nowhere"),): "no such checkpoint directory",
            (str(tmp_path / "model"), str(tmp_path / "nowhere")): "no such checkpoint directory",
            (str(tmp_path / "model"), str(tmp_path / "model")): "given twice",
            (str(tmp_path / "model"), "--port", port): f"--port {port}: cannot listen there",
            (str(tmp_path / "model"), "--port", "0", "--examples", "nowhere.json"): "nowhere.json: no such data",
        }
        for arguments, expected in cases.items():
            assert main(["web", *arguments]) == 2
            error = capsys.readouterr().err
            assert expected in error
            assert error.count("error:") == 1
