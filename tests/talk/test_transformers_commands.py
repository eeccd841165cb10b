"""transformers' own ways to run a checkpoint: its `serve`, in a process that knows no llava_compete, and a pipeline."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tiny import tiny_model
from transformers import pipeline

from llava_compete.model.build import save_checkpoint
from llava_compete.talk.listening import listen
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Talker, load_talker

pytestmark = pytest.mark.slow
PICTURE = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "moe"
    save_checkpoint(*tiny_model({"vision": EXPERTS, "language": EXPERTS}), folder)
    return folder


@pytest.fixture(scope="module")
def talker(checkpoint: Path) -> Talker:
    return load_talker(str(checkpoint), device="cpu")


def question(talker: Talker, with_picture: bool) -> Any:
    picture = [{"type": "image", "image": PICTURE}] if with_picture else []
    return talker.ask(
        [{"role": "user", "content": [*picture, {"type": "text", "text": "what colour ?"}]}], Sampling(max_new_tokens=6)
    )


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = Path(sys.executable).with_name("transformers")
    if not command.exists():
        pytest.skip("needs transformers' command beside Python")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("log") / "serve.log").open("w+")
    modules = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    running = subprocess.Popen(
        [str(command), "serve", str(checkpoint), "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)],
        stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **modules},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                assert running.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.send_signal(signal.SIGINT)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
        log.close()


@pytest.mark.parametrize("with_picture", [False, True], ids=["text", "picture"])
def test_its_server_answers_as_we_do(address: str, checkpoint: Path, talker: Talker, with_picture: bool) -> None:
    stream = io.BytesIO()
    PICTURE.save(stream, "png")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}] if with_picture else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "what colour ?"}]}]
    body = {"model": str(checkpoint), "messages": messages, "max_tokens": 6}
    found = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    expected = question(talker, with_picture)
    assert found["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert found["choices"][0]["message"]["content"].strip() == expected.text.strip()


def test_its_pipeline_answers_as_we_do(checkpoint: Path, talker: Talker) -> None:
    pipe = pipeline("any-to-any", model=str(checkpoint), device="cpu")
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what colour ?"}]
    messages = [{"role": "user", "content": content}]
    (found,) = pipe(messages, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})
    assert found["generated_text"].strip() == question(talker, True).text.strip()


def test_a_process_that_knows_no_llava_compete_finds_the_processor(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    code = (
        "import sys; from transformers import AutoProcessor; "
        "print(type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "copy")],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.stdout.split() == ["LlavaCompeteProcessor"], done.stderr[-1000:]
