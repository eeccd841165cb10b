"""The page of `llava-compete web` in a headless Chromium, for its tests and for pictures of it."""

from __future__ import annotations

import importlib
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llava_compete.talk.limits import Limits
from llava_compete.talk.talker import Talker

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def chromium_path() -> str | None:
    """The system's own browser."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextmanager
def chromium(path: str) -> Iterator[Any]:
    """A browser that Playwright drives."""
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as running:
        # A container's root has no sandbox.
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(talkers: Mapping[str, Talker], limits: Limits, examples: Sequence[Any]) -> Iterator[str]:
    """The page's address, served as the command serves it."""
    uvicorn = importlib.import_module("uvicorn")
    page = importlib.import_module("llava_compete.talk.page")
    listening_at = importlib.import_module("llava_compete.talk.listening")
    app = page.mount(page.build_page(talkers, limits, examples), limits)
    listening = listening_at.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield "http://{}:{}".format(*listening.getsockname())
    finally:
        server.should_exit = True
        thread.join(20)
