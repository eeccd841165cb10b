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
import torch
from PIL import Image
from tiny import tiny_model

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.talk.limits import Limits, picture_within
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
    # On a busy machine the pauses between two requests can be longer than the 5 s after which it closes a connection.
    config = uvicorn.Config(server.build_app(talker, "tiny", limits, KEY), log_level="warning", timeout_keep_alive=60)
    running = uvicorn.Server(config)
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
    "tool calls": (
        {"messages": [*TURNS["text"], {"role": "assistant", "tool_calls": [{"type": "function"}]}]},
        "messages: tool_calls: this server does not have it",
    ),
    "log probabilities": ({"messages": TURNS["text"], "logprobs": True}, "logprobs: this server does not have it"),
    "infinitely long": (
        {"messages": TURNS["text"], "extra_body": {"max_tokens": 10**400}},
        "max_tokens: found 1000.*, expected a whole number",
    ),
    "half a seed": ({"messages": TURNS["text"], "seed": 1.5}, "seed: found 1.5, expected a whole number"),
    "stop": ({"messages": TURNS["text"], "stop": ["a", ""]}, "stop: found .*, none of them empty"),
    "bias": ({"messages": TURNS["text"], "logit_bias": {"9999": 1}}, "logit_bias: found .*, expected numbers by token"),
    "unknown field": ({"messages": TURNS["text"], "extra_body": {"top_k": 5}}, "Unexpected fields .*top_k"),
    "template": (
        {"messages": TURNS["text"], "extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}},
        "chat_template_kwargs: found .*, expected enable_thinking and nothing else",
    ),
    "another model": ({"messages": TURNS["text"], "model": "gpt2"}, "pinned to 'tiny'"),
}


@pytest.mark.parametrize(("body", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_and_the_server_lives_on(client: Any, body: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        client.chat.completions.create(**{"model": "tiny", **body})
    assert client.chat.completions.create(model="tiny", messages=TURNS["text"], max_tokens=1).choices


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"[1]", "body: expected a JSON object"),
        (b"{", "body: expected a JSON object"),
        (b'{"messages": "\xff"}', "parsing the body"),
        (b'{"messages": [{"role": "user", "content": "a \\ud800"}]}', "half of a surrogate pair"),
    ],
)
def test_a_body_that_is_no_request_is_a_line(address: str, body: bytes, expected: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert expected in answer.json()["error"]["message"]


def test_fields_that_ask_for_nothing_change_nothing(client: Any) -> None:
    """Clients send them by default, or hand back a message as they got it."""
    empty: dict[str, Any] = {"tool_calls": None, "function_call": None, "refusal": None, "annotations": []}
    heard = [*TURNS["text"], {"role": "assistant", "content": "two ."}, *TURNS["text"]]
    whole = [{**message, **empty} if message["role"] == "assistant" else message for message in heard]
    fields = {"n": 1, "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "tools": [],
              "stop": [], "logit_bias": {}, "extra_body": {"chat_template_kwargs": {}}}  # fmt: skip
    plain, full = (
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, **more)
        for messages, more in ((heard, {}), (whole, fields))
    )
    assert plain.choices == full.choices
    assert plain.usage == full.usage


@pytest.mark.parametrize(
    ("stop", "text", "finish", "tokens"),
    [
        ("si", "i", "stop", 2),
        (["zz", "sis"], "i", "stop", 2),
        ("isisx", "is" * 6, "length", 6),  # what might have been its beginning is not lost
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_ends_before_a_stop_string(
    client: Any, talker: Talker, stop: Any, text: str, finish: str, tokens: int, stream: bool
) -> None:
    """The model is made to write "is" again and again."""
    (token,) = talker.processor.tokenizer.encode("is", add_special_tokens=False)
    found = said(client, stream, max_tokens=6, stop=stop, logit_bias={str(token): 100})
    assert found == (text, finish, tokens)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_end_at_the_last_token_is_an_end(client: Any, talker: Talker, stream: bool) -> None:
    assert said(client, stream, max_tokens=1, logit_bias={str(talker.stop_ids[0]): 100}) == ("", "stop", 1)


def said(client: Any, stream: bool, **settings: Any) -> tuple[str, str, int]:
    """Text, how it ended and tokens of an answer."""
    answer = client.chat.completions.create(model="tiny", messages=TURNS["text"], stream=stream, **settings)
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens
    chunks = list(answer)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, chunks[-1].usage.completion_tokens


def test_a_stream_ends_as_the_protocol_says(address: str) -> None:
    body = {"messages": TURNS["text"], "max_tokens": 2, "stream": True}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.text.endswith("}\n\ndata: [DONE]\n\n")


def test_a_failure_is_named_and_the_server_lives_on(client: Any, talker: Talker, monkeypatch: Any) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError('no "room"\nat all')

    with monkeypatch.context() as patch:
        patch.setattr(talker.model, "generate", breaks)
        with pytest.raises(openai.InternalServerError, match='RuntimeError: no "room"'):
            said(client, stream=False)
        with pytest.raises(openai.APIError) as failed:
            said(client, stream=True)
    assert failed.value.body == 'no "room"\nat all'
    assert said(client, stream=False, max_tokens=1)


def test_health_is_answered_while_a_picture_is_read(client: Any, address: str, monkeypatch: Any) -> None:
    reads, may_go_on = threading.Event(), threading.Event()

    def slowly(*given: Any) -> Any:
        reads.set()
        may_go_on.wait(20)
        return picture_within(*given)

    monkeypatch.setattr(server, "picture_within", slowly)
    given = {"model": "tiny", "messages": TURNS["picture"], "max_tokens": 1}
    thread = threading.Thread(target=client.chat.completions.create, kwargs=given)
    thread.start()
    try:
        assert reads.wait(20)
        assert httpx.get(f"{address}/health", timeout=10).is_success
    finally:
        may_go_on.set()
        thread.join(20)


def test_without_the_key_or_by_another_route_nothing_is_to_be_had(address: str, client: Any) -> None:
    assert httpx.get(f"{address}/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/responses", "/v1/systemone"):
        answer = httpx.post(f"{address}{path}", json={"model": "gpt2"}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404), path
    large = httpx.post(f"{address}/v1/chat/completions", content=b" " * (2 << 20), headers=headers)
    assert large.status_code == 413


def test_temperature_draws(client: Any) -> None:
    def once(**settings: Any) -> str | None:
        answer = client.chat.completions.create(model="tiny", messages=TURNS["text"], max_tokens=12, **settings)
        return answer.choices[0].message.content

    assert once() == once(temperature=0)
    drawn = once(temperature=1.5, seed=1)
    assert drawn != once()
    # A request with a seed that comes while another draws: neither's draws are the other's.
    other = client.chat.completions.create(
        model="tiny", messages=TURNS["text"], max_tokens=40, temperature=1.5, stream=True
    )
    next(iter(other))
    assert once(temperature=1.5, seed=1) == drawn
    other.close()


def test_draws_are_among_all_tokens(client: Any, talker: Talker) -> None:
    """As those of `chat`; `generate` alone would draw among the 50 likeliest, which are the last ones here."""
    last_ids: list[int] = []
    hooks = [
        talker.model.lm_head.register_forward_hook(
            lambda _m, _i, out: torch.arange(len(out[0, 0])).expand_as(out) / 1e3
        ),
        talker.model.get_input_embeddings().register_forward_hook(
            lambda _m, given, _o: last_ids.append(int(given[0][0, -1]))
        ),
    ]
    said(client, stream=False, max_tokens=12, temperature=1, seed=0)
    for hook in hooks:
        hook.remove()
    assert min(last_ids[1:]) < len(talker.processor.tokenizer) - 50


def test_a_port_in_use_is_one_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = tiny_model()
    model.config.save_pretrained(tmp_path)  # the port is tried before weights are read
    with listening_at.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="in use"):
            listening_at.listen("127.0.0.1", port)
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err
    wrong = {
        ("--port", "70000"): "--port 70000: cannot listen there",
        ("--api-key", ""): "--api-key: found nothing, expected a key",
        ("--max-new-tokens", "0"): "--max-new-tokens: found 0, expected a number of at least 1",
        ("--max-image-mib", "nan"): "--max-image-mib: found nan",
    }
    for options, expected in wrong.items():
        assert main(["serve", str(tmp_path), *options]) == 2
        assert expected in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_an_address_is_one_that_a_client_takes(host: str, shown: str) -> None:
    try:
        listening = listening_at.listen(host, 0)
    except UserError:
        pytest.skip(f"this machine has no {host}")
    with listening:
        assert listening_at.address_of(listening) == f"{shown}{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float99"}, "--dtype: found 'float99'"),
        ({"dtype": "int8"}, "--dtype: found 'int8'"),
        ({"device": "cuda:77"}, "--device: found 'cuda:77', expected a device that torch can use here"),
    ],
)
def test_what_weights_cannot_be_read_for_is_said_before(tmp_path: Any, options: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_talker(str(tmp_path / "nowhere"), **options)
