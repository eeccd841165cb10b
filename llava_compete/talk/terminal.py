"""A conversation in a terminal: lines that begin with a slash are commands, all others are questions."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from llava_compete.errors import UserError
from llava_compete.files import write_json
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Answer, Talker, say_pieces
from llava_compete.vision.image_decoder import full_size

HELP = """\
/image FILE     show a picture with the next question (a path or an address; several times for several)
/system TEXT    a system prompt; begins anew
/set KEY=VALUE  max_new_tokens, temperature (0: greedy), top_p, top_k, seed; without more, shows them
/experts        which experts the tokens of the last answer went to
/save FILE      the conversation as JSON
/reset          begin anew
/quit           leave (also Ctrl-D); Ctrl-C ends an answer
"""


class Terminal:
    """One conversation.

    Args:
        talker: who answers.
        sampling: how, to begin with.
        system: a system prompt, or None.
        out: where answers go.
    """

    def __init__(self, talker: Talker, sampling: Sampling, system: str | None, out: TextIO) -> None:
        self.talker, self.sampling, self.system, self.out = talker, sampling, system, out
        self.pictures: list[tuple[str, Any]] = []
        self.answer: Answer | None = None
        self._begin()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/system": self._system,
            "/set": self._set,
            "/experts": self._experts,
            "/save": self._save,
            "/reset": lambda _: self._begin(),
            "/help": lambda _: self._say(HELP),
        }

    def run(self, read: Callable[[str], str]) -> None:
        """Answer the lines that `read` returns for a prompt, until it raises EOFError, or `/quit`."""
        while True:
            try:
                line = read("> ").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                self.take(line)
            except UserError as error:
                self._say(f"error: {error}\n")

    def take(self, line: str) -> None:
        """One line; raises `UserError` for one at fault, after which the conversation is what it was."""
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif line.startswith("/"):
            raise UserError(f"unknown command {word}; there are {', '.join(self._commands)}, /quit")
        elif line:
            self._ask(line)

    def _ask(self, text: str) -> None:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for _, picture in self.pictures]
        question = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        stop = threading.Event()
        self.answer = self._print(self.talker.stream([*self.messages, question], self.sampling, stop), stop)
        self._names += [name for name, _ in self.pictures]
        self.pictures = []
        self.messages += [question, {"role": "assistant", "content": self.answer.text}]

    def _print(self, pieces: Generator[str, None, Answer], stop: threading.Event) -> Answer:
        """Write pieces as they come; Ctrl-C ends the answer, also before its first word, and the talk goes on."""
        with _on_ctrl_c(stop.set):
            answer = say_pieces(pieces, self._say)
        ends = {"stop": "", "length": f"[{len(answer.token_ids)} tokens: the limit]\n", "stopped": "[stopped]\n"}
        self._say("\n" + ends[answer.finish])
        return answer

    def _image(self, name: str) -> None:
        if not name:
            raise UserError("/image: expected a file")
        if self.talker.processor.image_processor is None:
            raise UserError("/image: this model has no vision tower")
        picture = self.talker.processor.image_processor.fetch_images(os.path.expanduser(name))
        height, width = full_size(picture)
        self.pictures.append((name, picture))
        self._say(f"[{name}: {width}x{height}, shown with the next question]\n")

    def _system(self, text: str) -> None:
        self.system = text or None
        self._begin()

    def _begin(self) -> None:
        self.messages: list[dict[str, Any]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self._names: list[str] = []
        self.pictures, self.answer = [], None

    def _set(self, setting: str) -> None:
        if setting:
            self.sampling = self.sampling.changed(setting)
        self._say("  ".join(f"{key}={value}" for key, value in asdict(self.sampling).items()) + "\n")

    def _experts(self, _: str) -> None:
        if self.answer is None:
            raise UserError("/experts: nothing is answered yet")
        print_experts(self.answer, self.out)

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: expected a file")
        try:
            write_json(os.path.expanduser(name), {"messages": list(self._saved()), "sampling": asdict(self.sampling)})
        except OSError as error:
            raise UserError(f"/save: {name}: {error.strerror}") from error
        self._say(f"[saved to {name}]\n")

    def _saved(self) -> Iterator[dict[str, Any]]:
        """The messages, with the pictures' names in their places."""
        names = iter(self._names)
        for message in self.messages:
            if isinstance(message["content"], str):
                yield message
                continue
            parts = [{**part, "image": next(names)} if "image" in part else part for part in message["content"]]
            yield {**message, "content": parts}

    def _say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


@contextmanager
def _on_ctrl_c(action: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C does `action` in place of raising KeyboardInterrupt, which would break off a piece."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = signal.getsignal(signal.SIGINT)

    def once(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        action()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_experts(answer: Answer, out: TextIO) -> None:
    """A table of the share of choices of each expert, by layer and kind of token; a dense model has none."""
    use = answer.expert_use()
    if not use:
        out.write("this model is dense: it has no experts\n")
        return
    count = max(len(shares) for kinds in use.values() for shares in kinds.values())
    table = Table("layer", "tokens", *(str(number) for number in range(count)), title="share of choices by expert, %")
    for layer, kinds in use.items():
        for kind, shares in kinds.items():
            table.add_row(layer, kind, *(f"{100 * share:.0f}" for share in shares))
    Console(file=out, width=max(80, 26 + 6 * count)).print(table)


def once(talker: Talker, sampling: Sampling, system: str | None, images: list[str], prompt: str) -> dict[str, Any]:
    """One question and its answer as values of JSON."""
    pictures: list[dict[str, Any]] = [{"type": "image", "image": name} for name in images]
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]})
    answer = talker.ask(messages, sampling)
    return {
        "prompt": prompt,
        "images": images,
        "answer": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "sampling": asdict(sampling),
        "experts": answer.expert_use(),
    }


def dumps(result: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(result, ensure_ascii=False) + "\n"
