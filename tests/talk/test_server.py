"""The server by the `openai` client: answers, and what a client may do wrong."""

from __future__ import annotations

import base64
import importlib
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from tiny import tiny_model

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.talk.limits import Limits
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Talker, load_talker

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
server = importlib.import_module("llava_compete.talk.server")
listening_at = importlib.import_module("llava_compete.talk.listening")
MOE = {"vision": {}, "language": {"num_experts": 4, "num_experts_per_tok": 2}}
KEY = "secret"


@pytest.fixture(scope="module")
def talker() -> Talker:
    return Talker(*tiny_model(moe=MOE))


@pytest.fixture(scope="module")
def address(talker: Talker) -> Iterator[str]:
    listening = listening_at.listen("127.0.0.1", 0)
    limits = Limits(max_new_tokens=180, images=2, image_mib=0.1, megapixels=0.02)
    running = uvicorn.Server(uvicorn.Config(server.build_app(talker, "tiny", limits, KEY), log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    host, port = listening.getsockname()
    yield f"http://{host}:{port}"
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def data_url(size: tuple[int, int] = (30, 20), kind: str = "png") -> str:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, kind)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


TURNS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "how many ?"}],
    "picture": [user(picture(data_url()), "what colour ?")],
    "turns": [
        {"role": "system", "content": "be brief"},
        user(picture(data_url()), "what ?"),
        {"role": "assistant", "content": "a circle ."},
        user("and ", picture(data_url((10, 40))), " ?"),
    ],
}


@pytest.mark.parametrize("messages", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answers_are_the_models(client: Any, talker: Talker, messages: list[dict[str, Any]], stream: bool) -> None:
    given = {"model": "tiny", "messages": messages, "max_tokens": 8}
    if stream:
        chunks = list(client.chat.completions.create(**given, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
        assert len(chunks) > 3
    else:
        answer = client.chat.completions.create(**given)
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens <= 8
    expected = talker.ask(_ours(messages), Sampling(max_new_tokens=8))
    # A stream keeps back the bytes of a character that the limit cut in two.
    assert text.rstrip("\ufffd") == expected.text.rstrip("\ufffd")
    assert finish == expected.finish


def _ours(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def part(given: dict[str, Any]) -> dict[str, Any]:
        return given if given["type"] == "text" else {"type": "image", "image": given["image_url"]["url"]}

    return [
        {**item, "content": [part(p) for p in item["content"]]} if isinstance(item["content"], list) else item
        for item in messages
    ]


def test_models_and_health_need_no_hub(client: Any, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_ends_its_answer(client: Any, talker: Talker) -> None:
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.01)

    handle = talker.model.lm_head.register_forward_hook(count)
    try:
        stream = client.chat.completions.create(model="tiny", messages=TURNS["text"], max_tokens=180, stream=True)
        next(iter(stream))
        stream.close()
        before = -1
        while steps != before:
            before = steps
            time.sleep(0.5)
    finally:
        handle.remove()
    assert 0 < steps < 150
    assert client.chat.completions.create(model="tiny", messages=TURNS["text"], max_tokens=2).choices


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "broken picture": ({"messages": [user(picture("data:image/png;base64,AAAA"), "?")]}, "not an image"),
    "no base64": ({"messages": [user(picture("data:image/png;base64,@@"), "?")]}, "not valid base64"),
    "address": ({"messages": [user(picture("http://127.0.0.1/a.png"), "?")]}, "expected a data URL"),
    "path": ({"messages": [user(picture("/etc/passwd"), "?")]}, "expected a data URL"),
    "large picture": ({"messages": [user(picture(data_url((200, 200))), "?")]}, "200x200 pixels, at most 0.02"),
    "large file": ({"messages": [user(picture("data:image/png;base64," + "A" * 160_000), "?")]}, "at most 0.1 MiB"),
    "many pictures": ({"messages": [user(*[picture(data_url())] * 3, "?")]}, "3 pictures, at most 2"),
    "too long": ({"messages": [user("word " * 300)]}, "the model's context is 256"),
    "too long, streamed": ({"messages": [user("word " * 300)], "stream": True}, "the model's context is 256"),
    "no messages": ({"messages": []}, "expected a list of messages"),
    "role": ({"messages": [{"role": "cat", "content": "x"}]}, "role 'cat', expected one of"),
    "audio": ({"messages": [user({"type": "input_audio", "input_audio": {}})]}, "a part of type 'input_audio'"),
    "temperature": ({"messages": TURNS["text"], "temperature": -1}, "temperature: found -1"),
    "tools": ({"messages": TURNS["text"], "tools": [{"type": "function"}]}, "tools: this server does not have it"),
    "another model": ({"messages": TURNS["text"], "model": "gpt2"}, "pinned to 'tiny'"),
}


@pytest.mark.parametrize(("body", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_and_the_server_lives_on(client: Any, body: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        client.chat.completions.create(**{"model": "tiny", **body})
    assert client.chat.completions.create(model="tiny", messages=TURNS["text"], max_tokens=1).choices


def test_without_the_key_or_by_another_route_nothing_is_to_be_had(address: str, client: Any) -> None:
    assert httpx.get(f"{address}/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/responses", "/v1/systemone"):
        assert httpx.post(f"{address}{path}", json={"model": "gpt2"}, headers=headers).status_code == 404, path
    large = httpx.post(f"{address}/v1/chat/completions", content=b" " * (2 << 20), headers=headers)
    assert large.status_code == 413


def test_temperature_draws(client: Any) -> None:
    def once(**settings: Any) -> str | None:
        answer = client.chat.completions.create(model="tiny", messages=TURNS["text"], max_tokens=12, **settings)
        return answer.choices[0].message.content

    assert once() == once(temperature=0)
    assert once(temperature=1.5, seed=1) != once()


def test_a_port_in_use_is_one_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = tiny_model()
    model.config.save_pretrained(tmp_path)  # the port is tried before weights are read
    with listening_at.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="in use"):
            listening_at.listen("127.0.0.1", port)
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nowhere")]) == 2


def test_dtype_by_a_wrong_name(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="--dtype: found 'float99'"):
        load_talker(str(tmp_path), dtype="float99")
