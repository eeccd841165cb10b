"""One question to several models: a conversation that grows with each piece of an answer, whoever shows it.

A conversation is a value: nothing of it changes, and each piece makes a new one. A model that fails at a question says
so in its answer's place, and has not heard the question; the others go on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from llava_compete.errors import UserError
from llava_compete.talk.limits import Limits, picture_within
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Answer, Message, Talker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """text: so far; note: how it ended, where it was not by the model's own stop; answer: once it has ended well."""

    text: str = ""
    note: str = ""
    answer: Answer | None = None


@dataclass(frozen=True)
class Turn:
    """A question with its pictures, their files, and a reply of each model."""

    question: str
    files: tuple[str, ...]
    pictures: tuple[Image.Image, ...] = field(repr=False)
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Conversation:
    """The turns so far."""

    turns: tuple[Turn, ...] = ()

    def messages(self, model: int, system: str) -> list[Message]:
        """What model number `model` has heard and said; the last turn's question waits for its answer."""
        messages: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
        for number, turn in enumerate(self.turns):
            is_last = number == len(self.turns) - 1
            if turn.replies[model].answer is None and not is_last:
                continue
            pictures: list[Message] = [{"type": "image", "image": picture} for picture in turn.pictures]
            messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
            if not is_last:
                messages.append({"role": "assistant", "content": turn.replies[model].text})
        return messages

    def last_answer(self, model: int) -> tuple[Answer, list[Image.Image]] | None:
        """A model's answer to the last question, and the pictures that it had seen; None if there is none."""
        if not self.turns or (answer := self.turns[-1].replies[model].answer) is None:
            return None
        heard = [turn for turn in self.turns if turn.replies[model].answer is not None]
        return answer, [picture for turn in heard for picture in turn.pictures]

    def with_reply(self, model: int, reply: Reply) -> Conversation:
        """The last turn's reply of one model in its place."""
        turn = self.turns[-1]
        replies = (*turn.replies[:model], reply, *turn.replies[model + 1 :])
        return Conversation((*self.turns[:-1], replace(turn, replies=replies)))


def load_pictures(files: Sequence[str], limits: Limits) -> tuple[Image.Image, ...]:
    """Uploaded files as pictures.

    Raises:
        UserError: more or larger ones than are allowed, or one that cannot be opened; it names the file.
    """
    if len(files) > limits.images:
        raise UserError(f"{len(files)} pictures with one question, at most {limits.images}")
    return tuple(picture_within(_content(Path(file)), limits, Path(file).name) for file in files)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read: {error.strerror}; give it once more") from error


def ask(
    talkers: Sequence[Talker],
    conversation: Conversation,
    turn: Turn,
    system: str,
    sampling: Sampling,
    stop: threading.Event,
) -> Iterator[Conversation]:
    """The conversation with this turn behind it, anew with each piece of each model's reply, one model after another.

    Setting `stop`, or closing the iterator, ends the reply where it is; models that were not asked yet are not asked.
    """
    conversation = Conversation((*conversation.turns, turn))
    yield conversation
    for model, talker in enumerate(talkers):
        for reply in _replies(talker, conversation.messages(model, system), sampling, stop):
            conversation = conversation.with_reply(model, reply)
            yield conversation


def _replies(talker: Talker, messages: list[Message], sampling: Sampling, stop: threading.Event) -> Iterator[Reply]:
    """A model's reply, growing."""
    if stop.is_set():
        yield Reply(note="not asked: stopped before")
        return
    reply = Reply()
    try:
        pieces = talker.stream(messages, sampling, stop)
        while True:
            try:
                reply = replace(reply, text=reply.text + next(pieces))
            except StopIteration as end:
                answer: Answer = end.value
                notes = {"stop": "", "length": f"{len(answer.token_ids)} tokens: the limit", "stopped": "stopped"}
                yield replace(reply, note=notes[answer.finish], answer=answer)
                return
            yield reply
    except UserError as error:
        yield replace(reply, note=f"not answered: {error}")
    except Exception as error:  # one question must not end the page, whatever it met; the log has the traceback
        log.exception("an answer failed")
        reason = next(iter(str(error).splitlines()), "")[:200]
        yield replace(reply, note=f"failed: {type(error).__name__}: {reason}")
