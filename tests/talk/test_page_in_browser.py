"""The page in a headless Chromium: what a visitor sees and does. Needs a Chromium and Playwright's Python package."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_kit import chromium, chromium_path, served
from PIL import Image
from tiny import tiny_model

from llava_compete.moe.block import moe_blocks
from llava_compete.talk.examples import scene_examples
from llava_compete.talk.limits import Limits
from llava_compete.talk.talker import Talker

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {"vision": EXPERTS, "projector": EXPERTS, "language": EXPERTS}
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium_path()
    if path is None:
        pytest.skip("needs a Chromium on PATH (Debian: apt-get install chromium)")
    pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with chromium(path) as running:
        yield running


@pytest.fixture(scope="module")
def talkers() -> dict[str, Talker]:
    found = {}
    for seed, name in enumerate(("left", "right")):
        model, processor = tiny_model(MOE, seed=seed, language={"max_position_embeddings": 2048})
        for block in moe_blocks(model).values():
            block.router.weight.data.normal_()
        found[name] = Talker(model, processor)
    return found


@pytest.fixture(scope="module")
def address(browser: Any, talkers: dict[str, Talker], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of both models."""
    pytest.importorskip("gradio")
    limits = Limits(max_new_tokens=200, images=2, image_mib=0.1, megapixels=0.1)
    with served(talkers, limits, scene_examples(tmp_path_factory.mktemp("scenes"))) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A visitor's page; it fetches nothing from elsewhere."""
    tab = browser.new_page(viewport={"width": 1200, "height": 1000})
    tab.set_default_timeout(WAIT_MS)
    fetched: list[str] = []
    tab.on("request", lambda request: fetched.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("#question textarea")
    yield tab
    tab.close()
    elsewhere = [url for url in fetched if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rng = np.random.default_rng(0)
    good = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(good).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    Image.new("RGB", (800, 800), "red").save(tmp_path / "wide.png")
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(tmp_path / "heavy.png")
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def upload(page: Any, file: str) -> None:
    page.set_input_files("#question input[type=file]", file)


def limit_answers(page: Any, length: int) -> None:
    """Set the most new tokens. A slider that has just been opened puts its first value back once it has been drawn."""
    settings = page.get_by_label("number input for Most new tokens")
    if not settings.is_visible():
        page.get_by_text("How to answer").click()
    ends = time.monotonic() + WAIT_MS / 1000
    while settings.input_value() != str(length):
        assert time.monotonic() < ends, f"the slider shows {settings.input_value()}"
        settings.fill(str(length))
        settings.press("Tab")
        page.wait_for_timeout(250)


def ask(page: Any, text: str, length: int = 8) -> None:
    """Type a question; it is asked by Enter."""
    limit_answers(page, length)
    asked, ends = page.locator("#chat0 .user.message"), time.monotonic() + WAIT_MS / 1000
    before = asked.count()
    # While the event of the answer before ends, Gradio drops another, or empties the box late.
    page.fill("#question textarea", text)
    while asked.count() == before and not page.locator(".toast-body").count():
        assert time.monotonic() < ends, f"not taken: {text}"
        if page.input_value("#question textarea") != text:
            page.wait_for_timeout(2000)  # the question may be on its way into the chat
            if asked.count() > before:
                return
            page.fill("#question textarea", text)
        page.press("#question textarea", "Enter")
        page.wait_for_timeout(400)


def answered(page: Any, count: int = 1) -> list[str]:
    """Both models' last answers, once all are whole."""
    texts = []
    for chat in ("#chat0", "#chat1"):
        answers = page.locator(f"{chat} .bot.message")
        ends = time.monotonic() + WAIT_MS / 1000
        while answers.count() < count or not re.search(r"tokens: the limit\]|stopped\]", answers.last.inner_text()):
            assert time.monotonic() < ends, f"{chat}: {answers.all_inner_texts()}; the page: {page.inner_text('body')}"
            page.wait_for_timeout(50)
        texts.append(answers.last.inner_text())
    return texts


def test_a_picture_and_a_question_are_answered_by_both(page: Any, talkers: dict[str, Talker], files: Any) -> None:
    upload(page, files["good"])
    page.wait_for_selector("#question .thumbnail-item")
    ask(page, "what colour is the circle ?")
    both = answered(page)
    assert len(set(both)) == 2
    assert page.locator("#chat0 .user img").count() == 1
    assert page.input_value("#question textarea") == ""
    ask(page, "how many ?")
    answered(page, 2)


def test_an_answer_grows_and_can_be_stopped(page: Any, talkers: dict[str, Talker]) -> None:
    slow = [t.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.05)) for t in talkers.values()]
    try:
        ask(page, "how many ?", length=200)
        page.wait_for_selector("#chat0 .bot.message")
        early = page.locator("#chat0 .bot.message").last.inner_text()
        page.wait_for_function(
            "length => document.querySelector('#chat0 .bot.message').innerText.length > length", arg=len(early)
        )
        page.click("#stop")
        page.wait_for_selector("#chat0 .bot.message:has-text('[stopped]')")
        page.wait_for_selector("#chat1 .bot.message:has-text('[not asked: stopped before]')")
    finally:
        for handle in slow:
            handle.remove()
    page.click("#anew")
    page.wait_for_selector("#chat0 .bot.message", state="detached")
    ask(page, "how many ?")
    answered(page)


def test_maps_of_the_last_answer(page: Any, files: Any) -> None:
    upload(page, files["good"])
    page.wait_for_selector("#question .thumbnail-item")
    ask(page, "what ?")
    answered(page)
    page.get_by_role("tab", name="Experts").click()
    for side in ("#maps0", "#maps1"):
        page.wait_for_selector(f"{side} img.map")
        assert page.locator(f"{side} img.use").count() == 3
        cells = page.locator(f"{side} table.tokens tr").nth(1).locator("td").all_inner_texts()
        assert len(cells) == 7  # 8 tokens, of which the last goes through no layer
        assert all(re.fullmatch(r"[0-3],[0-3]", cell) for cell in cells)
    shown = page.locator("#maps0 img.map").evaluate("image => [image.complete, image.naturalWidth]")
    assert shown[0]
    assert shown[1] > 300


@pytest.mark.parametrize(
    ("file", "says"),
    [("broken", "broken.png"), ("wide", "800x800 pixels"), ("heavy", "exceed the maximum allowed size")],
)
def test_a_picture_at_fault_is_named_and_the_page_goes_on(page: Any, files: Any, file: str, says: str) -> None:
    upload(page, files[file])
    if file != "heavy":  # which is refused while it is sent
        page.wait_for_selector("#question .thumbnail-item")
        ask(page, "what ?")
    page.wait_for_selector(f".toast-body:has-text('{says}')")
    page.reload()
    page.wait_for_selector("#question textarea")
    ask(page, "how many ?")
    answered(page)


def test_an_example_fills_the_box(page: Any) -> None:
    page.get_by_text("How many objects are there?").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value.endsWith('?')")
    page.wait_for_selector("#question .thumbnail-item")


def test_a_phone_scrolls_downwards_alone(page: Any, files: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    upload(page, files["good"])
    page.wait_for_selector("#question .thumbnail-item")
    ask(page, "what ?")
    answered(page)
    for tab in ("Chat", "Experts"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_selector("#question" if tab == "Chat" else "#maps1 img.map")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    left, right = (page.locator(f"#maps{n}").bounding_box() for n in (0, 1))
    assert right["y"] > left["y"] + left["height"] - 1  # one below the other
    assert left["width"] > 300


def test_what_a_model_writes_is_no_markup(page: Any, talkers: dict[str, Talker], monkeypatch: Any) -> None:
    """Nor what a visitor writes: a script of it would run in the page."""
    text = "<img src=x onerror=\"document.title='run'\"> **bold** & <b>more</b> ?"
    for talker in talkers.values():
        real = talker.processor.tokenizer.decode
        monkeypatch.setattr(
            talker.processor.tokenizer, "decode", lambda ids, real=real, **more: text + real(ids, **more)
        )
    ask(page, text)
    for said in answered(page):
        assert said.startswith(text)
    assert text in page.locator("#chat0 .user.message").last.inner_text()
    assert page.locator("#chat0 .message img").count() == 0
    assert page.title() != "run"


def test_two_visitors_are_answered_one_after_the_other(
    page: Any, browser: Any, address: str, talkers: dict[str, Talker]
) -> None:
    """Each has a conversation of their own."""
    slow = [t.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.03)) for t in talkers.values()]
    second = browser.new_page()
    try:
        second.goto(address)
        second.wait_for_selector("#question textarea")
        ask(page, "how many ?", length=80)
        page.wait_for_selector("#chat0 .bot.message")
        ask(second, "what ?", length=4)
        second.wait_for_selector("#chat0 .bot.message", timeout=WAIT_MS)
        assert "80 tokens: the limit]" in page.locator("#chat1 .bot.message").last.inner_text()
        answered(second)
        assert second.locator("#chat0 .user.message").all_inner_texts() == ["what ?"]
    finally:
        for handle in slow:
            handle.remove()
        second.close()
