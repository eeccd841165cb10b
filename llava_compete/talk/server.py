"""transformers' own server (OpenAI's chat completions) for one checkpoint, narrowed to what may stand open.

It answers `/v1/chat/completions`, `/v1/models` and `/health`; the routes by which a client could load other models,
fetch addresses or empty the memory are taken out. Pictures are data URLs, decoded as in training before anything runs.
A request at fault gets status 400 with a line that says why, and the server lives on.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from llava_compete.errors import UserError
from llava_compete.talk.limits import Limits, picture_within
from llava_compete.talk.one_request import OneRequest
from llava_compete.talk.talker import Talker, fitting
from llava_compete.vision.image_inputs import data_url_bytes

log = logging.getLogger(__name__)
_ROUTES = ("/v1/chat/completions", "/v1/models", "/health")
_SEED = "_seed_of_request"  # where a request's settings carry it
_ROLES = ("system", "developer", "user", "assistant")
# What this server does not have, and the value beside null and nothing that asks for nothing.
_REFUSED: dict[str, Any] = {
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call", "generation_config", "audio"), None),
    "web_search_options": None,
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
# (smallest, largest) value of a request's numbers
_NUMBERS = {
    "max_tokens": (1, 2**31),
    "max_completion_tokens": (1, 2**31),
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
    "seed": (0, 2**63 - 1),
    "frequency_penalty": (-0.99, 2),
}
_WHOLE = ("max_tokens", "max_completion_tokens", "seed")


def build_app(talker: Talker, name: str, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The application; `name` is what clients call the model. With an `api_key`, all but /health ask for it."""
    manager = _OneModel(talker, name)
    state = GenerationState()
    handler = _ChatHandler(manager, state)
    handler.limits, handler.processor = limits, talker.processor
    app: FastAPI = build_server(manager, handler, handler, handler, handler, handler, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]

    @app.middleware("http")
    async def gate(request: Request, call_next: Any) -> Any:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and request.url.path != "/health" and not hmac.compare_digest(given.encode(), api_key.encode()):
            return _error(401, "this server asks for its API key: Authorization: Bearer KEY")
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdigit():
                return _error(411, "a request needs its Content-Length")
            if int(length) > limits.body_bytes:
                return _error(413, f"a request of {int(length):,} bytes, at most {limits.body_bytes:,}")
        return await call_next(request)

    @app.exception_handler(HTTPException)
    async def as_openai_does(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def no_object(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, f"body: expected a JSON object, sent as application/json ({error.errors()[0]['msg']})")

    return app


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


class _OneModel(ModelManager):
    """A manager whose one model is there already and stays."""

    def __init__(self, talker: Talker, name: str) -> None:
        super().__init__(model_timeout=-1)
        self.force_model, self._talker = name, talker
        self._since = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._talker.model, self._talker.processor

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The one model; transformers would list a hub's cache."""
        return [{"id": self.force_model, "object": "model", "created": self._since, "owned_by": "llava_compete"}]

    def shutdown(self) -> None:
        """Nothing: the process ends with its model."""


class _ChatHandler(ChatCompletionHandler):
    limits: Limits
    processor: Any

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            # In a thread: large pictures take seconds, in which other answers go on and /health is answered.
            await asyncio.to_thread(self._check, body)
            return await super().handle_request(body, request_id)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        except HTTPException as error:  # transformers has 422 for a field that it does not know
            raise HTTPException(400 if error.status_code == 422 else error.status_code, error.detail) from error
        except Exception as error:  # one request must not end the connection, whatever it met
            log.exception("a request failed")
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise HTTPException(500, f"{type(error).__name__}: {reason}") from error

    def _check(self, body: dict[str, Any]) -> None:
        """Refuse what cannot be answered, and put decoded pictures in the places of their data URLs."""
        for key, neutral in _REFUSED.items():
            if body.pop(key, None) not in (None, [], {}, neutral):
                raise UserError(f"{key}: this server does not have it")
        for key, (low, high) in _NUMBERS.items():
            value = body.get(key)
            kind = "whole number" if key in _WHOLE else "number"
            if value is not None and not (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and low <= value <= high
                and not (key in _WHOLE and value % 1)
            ):
                raise UserError(f"{key}: found {value!r}, expected a {kind} from {low} to {high}")
        _check_settings(body, len(self.processor.tokenizer))
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
            raise UserError("messages: expected a list of messages")
        parts = [part for message in messages for part in _parts(message)]
        pictures = [part for part in parts if part["type"] == "image_url"]
        if len(pictures) > self.limits.images:
            raise UserError(f"{len(pictures)} pictures, at most {self.limits.images}")
        for part in pictures:
            part["image_url"] = {"url": self._picture(part.get("image_url"))}

    def _picture(self, given: Any) -> Image.Image:
        url = given.get("url") if isinstance(given, dict) else given
        content = data_url_bytes(url) if isinstance(url, str) else None
        if content is None:
            raise UserError("image_url: expected a data URL (data:image/png;base64,...); this server fetches nothing")
        return picture_within(content, self.limits, "image_url", self.processor)

    def _streaming(self, request_id: str, *arguments: Any, gen_manager: Any, **options: Any) -> Any:
        return super()._streaming(request_id, *arguments, gen_manager=self._own(gen_manager, *arguments), **options)

    async def _non_streaming(self, request_id: str, *arguments: Any, gen_manager: Any, **options: Any) -> Any:
        own = self._own(gen_manager, *arguments)
        return await super()._non_streaming(request_id, *arguments, gen_manager=own, **options)

    def _own(self, shared: Any, model: Any, _processor: Any, _name: str, inputs: Any, settings: Any) -> OneRequest:
        """Both ways to answer have the inputs and the settings of `generate` together."""
        asked = min(settings.max_new_tokens, self.limits.max_new_tokens)
        settings.max_new_tokens = fitting(model, inputs["input_ids"].shape[1], asked)
        stops, settings.stop_strings = settings.stop_strings or [], None
        return OneRequest(shared, settings.__dict__.pop(_SEED), [stops] if isinstance(stops, str) else stops)

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a temperature also draws, where a checkpoint's own default is greedy, and among all."""
        settings = super()._build_generation_config({**body, "seed": None}, *args, **kwargs)
        setattr(settings, _SEED, body.get("seed"))
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
            settings.do_sample = True
        if settings.top_k is None:
            settings.top_k = 0  # OpenAI's protocol has none; generate's own would be 50
        return settings

    def _build_chunk_sse(self, *args: Any, finish_reason: str | None = None, **options: Any) -> str:
        """As in transformers; behind the last one the line by which clients of OpenAI's protocol know the end."""
        chunk: str = super()._build_chunk_sse(*args, finish_reason=finish_reason, **options)
        return chunk if finish_reason is None else f"{chunk}data: [DONE]\n\n"


def _check_settings(body: dict[str, Any], num_tokens: int) -> None:
    """Settings that are no numbers."""
    if body.get("stream") not in (None, False, True):
        raise UserError(f"stream: found {body['stream']!r}, expected true or false")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise UserError(f"stop: found {stop!r}, expected a text or a list of texts, none of them empty")
    options = body.pop("chat_template_kwargs", None) or {}
    if not isinstance(options, dict) or options.keys() - {"enable_thinking"}:
        raise UserError(f"chat_template_kwargs: found {options!r}, expected enable_thinking and nothing else")
    body["chat_template_kwargs"] = {key: bool(value) for key, value in options.items()}
    bias = body.pop("logit_bias", None) or {}
    if not isinstance(bias, dict) or not all(
        key.isdecimal() and int(key) < num_tokens and isinstance(value, int | float) for key, value in bias.items()
    ):
        raise UserError(f"logit_bias: found {bias!r}, expected numbers by token id, below {num_tokens}")
    if bias:
        body["logit_bias"] = {key: float(value) for key, value in bias.items()}


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    if message.get("role") not in _ROLES:
        raise UserError(f"messages: role {message.get('role')!r}, expected one of {', '.join(_ROLES)}")
    if message["role"] == "developer":
        message["role"] = "system"
    for key in ("tool_calls", "function_call", "audio"):
        if message.pop(key, None):
            raise UserError(f"messages: {key}: this server does not have it")
    content = message.get("content")
    if isinstance(content, str):
        return []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError("messages: content is neither a text nor a list of parts")
    for part in content:
        if part.get("type") not in ("text", "image_url"):
            raise UserError(f"messages: a part of type {part.get('type')!r}, expected text or image_url")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise UserError("messages: a text part without text")
    return content
