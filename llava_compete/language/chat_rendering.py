"""A conversation as the text of the tokenizer's chat template, and where in it the model writes.

Any template will do, with or without `{% generation %}` marks: contents are marked while it renders, and what the model
writes of a turn is found from the marks. It begins where the template's generation prompt ends, so that a training row
begins with exactly what the model is given at inference; it ends with the control token behind the answer.

A template that asks for today's date always gets the same one: rows, prompts and scores would otherwise change
overnight, in the middle of a run too, and no prompt would be what training had.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from llava_compete.errors import UserError
from llava_compete.language.piece_ids import ANSWER_END, ANSWER_START, MARKS, USER_END, PieceEncoder
from llava_compete.parts import IMAGE_TOKEN

Message = dict[str, Any]

# The one that Llama's own templates write where nothing tells them a date; at midnight.
DAY = "26 July 2024"
_DAY_BY_CODE = {
    "%d": "26", "%-d": "26", "%B": "July", "%b": "Jul", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday",
    "%a": "Fri", "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
# A line of the template, in place of transformers' function of this name: so it holds for whatever renders it.
_ON_THAT_DAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('{code}', '{text}')" for code, text in _DAY_BY_CODE.items())
    + " }}{% endmacro %}\n"
)


class EncodingError(UserError):
    """A conversation that the tokenizer's chat template cannot express."""


class AnswerSpan(NamedTuple):
    """Characters of an answer: what the model writes from `start`, its own words to `answer_end`, and its `end`."""

    start: int
    answer_end: int
    end: int


class RenderedChat(NamedTuple):
    """The template's text (strings hidden as in `PieceEncoder.hide`), and the span of each answer."""

    text: str
    answers: list[AnswerSpan]


def with_fixed_day(template: str) -> str:
    """A template that writes `DAY` for today's date; any other as it is."""
    if "strftime_now" not in template or template.startswith(_ON_THAT_DAY):
        return template
    return _ON_THAT_DAY + template


def content_parts(message: Message) -> Sequence[dict[str, Any]]:
    """The content of a message as parts; one that is neither a text nor an image is an `EncodingError`."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise EncodingError(f"a content part of type {part['type']!r}: this model takes texts and images")
    return parts


def render_chat(
    tokenizer: Any, encoder: PieceEncoder, messages: Sequence[Message], *, add_generation_prompt: bool, thinking: bool
) -> RenderedChat:
    """Render `messages`; see the module's docstring. `thinking`: the model may reason before it answers.

    Raises `EncodingError` if the template refuses them, leaves out an answer, or does not end one.
    """
    template = _template(tokenizer)
    plain = [_plain_message(message, encoder, template) for message in messages]
    if not any(message.get("reasoning_content") for message in plain):
        template = template._replace(thinking=thinking)
    marked = template.render([_mark(message) for message in plain], add_generation_prompt)
    text = MARKS.sub("", marked)
    if any(message["content"] != message["content"].strip() for message in plain):
        # A template that strips contents does not see white space beside a mark.
        stripped = template.render(plain, add_generation_prompt)
        marked = marked if stripped == text else _move_marks(marked, stripped)
        text = stripped
    spans = _answer_spans(marked, encoder.control, template.answer_prompt())
    expected = sum(message["role"] == "assistant" for message in plain)
    if len(spans) != expected:
        raise EncodingError(f"the chat template writes {len(spans)} of {expected} answers")
    return RenderedChat(text, spans)


def writes_system(tokenizer: Any) -> bool:
    """Whether the template writes the text of a system turn; some leave it out without a word."""
    return _writes_system(_template(tokenizer))


def _template(tokenizer: Any) -> _Template:
    text = with_fixed_day(str(tokenizer.chat_template))
    return _Template(text, tuple(sorted(_special_tokens(tokenizer).items())), True)


def _plain_message(message: Message, encoder: PieceEncoder, template: _Template) -> Message:
    """Contents as one string, an image as its token, nothing else in it that reads as a control token."""
    answer = message["role"] == "assistant"
    texts = [
        IMAGE_TOKEN if part["type"] == "image" else encoder.hide(part["text"], answer=answer)
        for part in content_parts(message)
    ]
    plain = {"role": message["role"], "content": "".join(texts)}
    reasoning = message.get("reasoning_content")
    if answer and not reasoning and "</think>" in plain["content"] and not template.keeps_thoughts():
        # As the templates of reasoning models split it themselves, which a mark before it would not survive.
        reasoning, _, rest = plain["content"].rpartition("</think>")
        reasoning = reasoning.rpartition("<think>")[2].strip("\n")
        plain["content"] = rest.lstrip("\n")
    if reasoning:
        plain["reasoning_content"] = encoder.hide(reasoning, answer=True)
    return plain


def _mark(message: Message) -> Message:
    if message["role"] == "user":
        return {**message, "content": message["content"] + USER_END}
    if message["role"] == "assistant":
        return {**message, "content": ANSWER_START + message["content"] + ANSWER_END}
    return message


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """A missing bos or eos is an empty string, so that a template can just write it."""
    known = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {"bos_token": "", "eos_token": "", **known}


_PROBE = "qzx"  # which no template writes of its own
_THOUGHTFUL = f"<think>\n{_PROBE}\n</think>\n\nb"


class _Template(NamedTuple):
    """A Jinja text with the variables that do not change from row to row."""

    text: str
    special_tokens: tuple[tuple[str, str], ...]
    thinking: bool

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The template's text."""
        try:
            texts = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=self.thinking,
                **dict(self.special_tokens),
            )
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise EncodingError(f"the chat template cannot render this conversation: {error}") from error
        return (texts[0] if isinstance(texts, tuple) else texts)[0]

    def answer_prompt(self) -> str:
        """What the template writes between a question and the place where the model begins to write."""
        return _answer_prompt(self)

    def keeps_thoughts(self) -> bool:
        """Whether a thought in an answer's text is text like any other, and not for the template to move or drop."""
        return _keeps_thoughts(self)


@lru_cache(maxsize=64)
def _answer_prompt(template: _Template) -> str:
    rendered = template.render([_mark({"role": "user", "content": "a"})], add_generation_prompt=True)
    return rendered.rpartition(USER_END)[2] if USER_END in rendered else ""


@lru_cache(maxsize=64)
def _writes_system(template: _Template) -> bool:
    texts = {"system": _PROBE, "user": "a", "assistant": "b"}
    try:
        return _PROBE in template.render([{"role": role, "content": text} for role, text in texts.items()], False)
    except EncodingError:  # refused, with or without a word of its own
        return True


@lru_cache(maxsize=64)
def _keeps_thoughts(template: _Template) -> bool:
    question, answer = _mark({"role": "user", "content": "a"}), _mark({"role": "assistant", "content": _THOUGHTFUL})
    if answer["content"] not in template.render([question, answer], False):
        return False
    apart = {**_mark({"role": "assistant", "content": "b"}), "reasoning_content": _PROBE}
    return _PROBE not in template.render([question, apart], False)  # such a template joins the two itself


def _answer_spans(marked: str, control: re.Pattern[str], answer_prompt: str) -> list[AnswerSpan]:
    """Spans in the text without marks, from where the marks are in the text with them."""
    spans: list[AnswerSpan] = []
    text = MARKS.sub("", marked)
    question_end = start = None
    for count, mark in enumerate(MARKS.finditer(marked)):
        position = mark.start() - count
        if mark[0] == USER_END:
            question_end, start = position, None
        elif mark[0] == ANSWER_START:
            start = position
        else:
            start = position if start is None else start
            if question_end is not None and text.startswith(answer_prompt, question_end):
                start = min(start, question_end + len(answer_prompt))
            spans.append(AnswerSpan(start, position, _end_of_turn(text, position, control)))
            question_end = start = None
    return spans


def _end_of_turn(text: str, position: int, control: re.Pattern[str]) -> int:
    """The end of the control token behind an answer, where white space at most is between."""
    found = control.search(text, position)
    if found is not None and not text[position : found.start()].strip():
        return found.end()
    white_space = len(text) - len(text[position:].lstrip()) - position
    if white_space == 0:
        raise EncodingError("the chat template writes nothing behind an answer that would end it")
    return position + white_space


def _move_marks(marked: str, stripped: str) -> str:
    """The marks in the text of a template that strips contents: it lacks white space beside some of them."""
    pattern = ""
    for piece in re.split(f"({MARKS.pattern})", marked):
        if MARKS.fullmatch(piece):
            pattern += "()"
            continue
        core = piece.strip()
        before, after = len(piece) - len(piece.lstrip()), len(piece) - len(piece.rstrip())
        # Greedy: white space that may be the content's or the template's is the content's.
        pattern += rf"\s{{0,{before}}}{re.escape(core)}\s{{0,{after}}}" if core else rf"\s{{0,{len(piece)}}}"
    found = re.fullmatch(pattern, stripped)
    if found is None:
        raise EncodingError("the chat template changes the contents of this conversation beyond white space")
    marks = MARKS.findall(marked)
    pieces, last = [], 0
    for number, mark in enumerate(marks, start=1):
        pieces += [stripped[last : found.start(number)], mark]
        last = found.start(number)
    return "".join([*pieces, stripped[last:]])
