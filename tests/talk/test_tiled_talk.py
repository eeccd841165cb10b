"""Chat, page and server on models of tiles or patches: pictures of any shape, with the tokens that their sizes make."""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naflex_kit import TOWER
from PIL import Image
from tiny import tiny_model

from llava_compete.errors import UserError
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Talker
from llava_compete.talk.terminal import once
from llava_compete.vision.naflex import NativeSizes

LAYER = {"num_experts": 4, "num_experts_per_tok": 2}
SIZES = [(40, 90), (28, 28), (150, 61)]  # height, width
# Of any size that is not so thin that nothing is left of it.
PICTURES = st.lists(st.tuples(st.integers(20, 400), st.integers(20, 400)), min_size=1, max_size=4)


KINDS: dict[str, dict[str, Any]] = {
    "tiles": {"tiles": {"max": 4}},
    "patches": {"tower": TOWER, "naflex": {"max_patches": 24}},
}


@pytest.fixture(scope="module", params=KINDS)
def talker(request: pytest.FixtureRequest) -> Talker:
    moe = {"projector": LAYER, "language": LAYER}
    return Talker(*tiny_model(moe=moe, **KINDS[request.param], language={"max_position_embeddings": 1024}))


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(*sizes: tuple[int, int], text: str = "what colour ?") -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": picture(*size)} for size in sizes]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@settings(max_examples=30)
@given(PICTURES)
def test_a_server_is_told_the_true_count(talker: Talker, sizes: list[tuple[int, int]]) -> None:
    told = talker.processor._get_num_multimodal_tokens(image_sizes=sizes)
    inputs = talker.processor(images=[picture(*size) for size in sizes], text="<image>" * len(sizes))
    (ids,) = inputs["input_ids"]
    assert sum(told["num_image_tokens"]) == ids.count(talker.processor.image_token_id)
    assert sum(told["num_image_patches"]) == len(inputs["pixel_values"])
    assert inputs["image_sizes"] == [tuple(size) for size in sizes]


def test_an_answer_is_what_generate_writes_and_says_which_experts(talker: Talker) -> None:
    messages = asked(*SIZES)
    answer = talker.ask(messages, Sampling(max_new_tokens=5))
    inputs = talker.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = talker.model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer.token_ids == expected.tolist()
    tokens = sum(talker.processor.tiling.num_tokens(size) for size in SIZES)
    assert int(answer.image_places_T.sum()) == tokens
    use = answer.expert_use()
    assert {"image", "question", "answer"} == set(use["language.0"])
    assert sum(use["projector.0"]["image"]) == pytest.approx(1)


def test_pictures_count_towards_the_context(talker: Talker) -> None:
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, pictures included, .* context is 1024"):
        talker.ask(asked(*[(56, 56)] * 80), Sampling())


def test_one_question_from_a_file(talker: Talker, tmp_path: Any) -> None:
    picture(150, 61).save(tmp_path / "tall.png")
    found = once(talker, Sampling(max_new_tokens=3), None, [str(tmp_path / "tall.png")], "what ?")
    assert found["answer"] == talker.ask(asked((150, 61), text="what ?"), Sampling(max_new_tokens=3)).text
    picture(1, 20000).save(tmp_path / "thin.png")
    if isinstance(talker.processor.tiling, NativeSizes):  # which makes it wider
        assert once(talker, Sampling(max_new_tokens=3), None, [str(tmp_path / "thin.png")], "what ?")["answer"]
        return
    with pytest.raises(UserError, match="image of 20000x1 pixels: so thin"):
        once(talker, Sampling(max_new_tokens=3), None, [str(tmp_path / "thin.png")], "what ?")


@pytest.fixture(scope="module")
def client(talker: Talker) -> Iterator[Any]:
    pytest.importorskip("uvicorn")
    testing = pytest.importorskip("fastapi.testclient")
    server = importlib.import_module("llava_compete.talk.server")
    with testing.TestClient(server.build_app(talker, "tiny", server.Limits())) as client:
        yield client


def data_url(height: int, width: int) -> str:
    stream = io.BytesIO()
    picture(height, width).save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def request(*sizes: tuple[int, int]) -> dict[str, Any]:
    shown = [{"type": "image_url", "image_url": {"url": data_url(*size)}} for size in sizes]
    content = [*shown, {"type": "text", "text": "what colour ?"}]
    return {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": content}]}


def test_the_server_answers_as_the_model(talker: Talker, client: Any) -> None:
    for sizes in (SIZES[:1], SIZES):
        found = client.post("/v1/chat/completions", json=request(*sizes)).json()
        expected = talker.ask(asked(*sizes), Sampling(max_new_tokens=5))
        assert found["choices"][0]["message"]["content"].rstrip("\ufffd") == expected.text.rstrip("\ufffd")
        assert found["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_a_thin_picture_is_the_requests_fault(talker: Talker, client: Any) -> None:
    if isinstance(talker.processor.tiling, NativeSizes):
        pytest.skip("no picture is too thin for patches")
    found = client.post("/v1/chat/completions", json=request((1, 20000)))
    assert found.status_code == 400
    assert "image of 20000x1 pixels: so thin" in found.json()["error"]["message"]
