"""Talking in a terminal: the lines of a conversation, and the command itself through a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_model
from tokenizers_for_tests import make_tokenizer

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.model.build import save_checkpoint
from llava_compete.moe.block import moe_blocks
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Pieces, Talker
from llava_compete.talk.terminal import Terminal, once

MOE = {"vision": {}, "language": {"num_experts": 4, "num_experts_per_tok": 2}}


@pytest.fixture(scope="module")
def talker() -> Talker:
    return Talker(*tiny_model(moe=MOE))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return str(path)


def messages(picture: str, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def inputs_of(talker: Talker, asked: list[dict[str, Any]]) -> Any:
    return talker.processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_pieces_are_what_generate_writes(talker: Talker, picture: str) -> None:
    asked = messages(picture, "what colour ?")
    pieces = []
    stream = talker.stream(asked, Sampling(max_new_tokens=12))
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            answer = end.value
            break
    inputs = inputs_of(talker, asked)
    expected = talker.model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert answer.token_ids == expected.tolist()
    assert (
        "".join(pieces) == answer.text == talker.processor.decode(expected, skip_special_tokens=True).removeprefix(" ")
    )
    assert answer.finish in ("stop", "length")


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "legacy_llama"])
def test_lines_of_an_answer_keep_their_spaces(kind: str) -> None:
    """SentencePiece leaves out the first space of a text, which the first of a line is not."""
    tokenizer = make_tokenizer(kind, "chatml")
    ids = tokenizer.encode("def f():\n    return 'é😀'\n  x\n\n y 色 \n", add_special_tokens=False)
    pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for token in (0, *ids):
        pieces.put(torch.tensor([token]))
    pieces.end()
    given = list(pieces)
    assert "".join(given) == tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(map(bool, given)) > 4  # as they come


def test_experts_are_those_of_one_forward_over_the_whole(talker: Talker, picture: str) -> None:
    answer = talker.ask(messages(picture, "how many ?"), Sampling(max_new_tokens=6))
    inputs = talker.processor.apply_chat_template(
        messages(picture, "how many ?"),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = torch.tensor([answer.token_ids[:-1]])  # the last one is not read by the model
    ids = torch.cat([inputs["input_ids"], written], dim=1)
    seen = {}
    handles = [
        block.router.register_forward_hook(lambda _m, _i, routing, name=name: seen.update({name: routing}))
        for name, block in moe_blocks(talker.model).items()
    ]
    with torch.inference_mode():
        talker.model(input_ids=ids, pixel_values=inputs["pixel_values"])
    for handle in handles:
        handle.remove()
    for name, tokens in answer.routed.items():
        whole_TK = seen[name].selected_experts_TK
        parts_TK = torch.cat([tokens.prompt_TK, tokens.answer_TK])
        assert torch.equal(parts_TK, whole_TK), name
    use = answer.expert_use()
    assert set(use["language.0"]) == {"image", "question", "answer"}
    assert all(sum(shares) == pytest.approx(1) for kinds in use.values() for shares in kinds.values())


def test_seed_and_temperature(talker: Talker, picture: str) -> None:
    warm = Sampling(max_new_tokens=12, temperature=1.5, seed=3)
    first, second = (talker.ask(messages(picture, "?"), warm).token_ids for _ in range(2))
    assert first == second
    assert first != talker.ask(messages(picture, "?"), Sampling(max_new_tokens=12)).token_ids


def test_longer_than_the_context_is_refused_and_an_answer_fits(talker: Talker, picture: str) -> None:
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, pictures included, .* context is 256"):
        talker.ask(messages(picture, "many words " * 200), Sampling())
    answer = talker.ask(messages(picture, "word " * 40), Sampling(max_new_tokens=4096))
    assert answer.prompt_tokens + len(answer.token_ids) <= 256


def converse(talker: Talker, *lines: str) -> tuple[Terminal, str]:
    out = io.StringIO()
    terminal = Terminal(talker, Sampling(max_new_tokens=5), None, out)
    waiting = iter(lines)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration as end:
            raise EOFError from end

    terminal.run(read)
    return terminal, out.getvalue()


@pytest.mark.usefixtures("picture")
def test_turns_pictures_and_settings_make_one_conversation(
    talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # `~`, which no shell has read here
    saved = tmp_path / "talk.json"
    lines = ["/system be brief", "/image ~/red.png", "what ?", "/set temperature=0.5", "and now ?", "/save ~/talk.json"]
    terminal, said = converse(talker, *lines, "/experts", "/quit", "never asked")
    content = json.loads(saved.read_text())
    roles = [message["role"] for message in content["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert content["messages"][1]["content"][0] == {"type": "image", "image": "~/red.png"}
    assert content["sampling"]["temperature"] == 0.5
    assert "30x20" in said
    assert re.search(r"language\.1 +│ answer", said)
    assert terminal.messages[0]["content"] == "be brief"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/image nowhere.png", r"error: nowhere\.png: no such image file"),
        ("/set temperature=hot", r"error: temperature: found 'hot', expected a number"),
        ("/set temprature=1", r"error: unknown setting .*temperature"),
        ("/set top_p=0", r"error: top_p: found 0\.0, expected more than 0"),
        (f"/set seed={10**30}", r"error: seed: found 10*, expected a number of 64 bits"),
        ("/experts", r"error: /experts: nothing is answered yet"),
        ("/nosuch", r"error: unknown command /nosuch; there are /image"),
        ("word " * 300, r"error: the conversation has"),
        ("a \udcff b", r"error: '.*a \\udcff b': bytes that are not UTF-8"),
    ],
)
def test_a_line_at_fault_leaves_the_conversation_usable(talker: Talker, line: str, expected: str) -> None:
    terminal, said = converse(talker, line, "how many ?")
    assert re.search(expected, said)
    assert [message["role"] for message in terminal.messages] == ["user", "assistant"]


def test_ctrl_c_while_pictures_are_read_ends_the_answer(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a word is written; the conversation goes on."""
    read = talker._inputs
    monkeypatch.setattr(talker, "_inputs", lambda asked: (os.kill(os.getpid(), signal.SIGINT), read(asked))[1])
    terminal, said = converse(talker, "what ?", "and now ?")
    assert said.count("[stopped]") == 2
    assert len(terminal.messages) == 4


def test_one_question_as_json(talker: Talker, picture: str) -> None:
    result = once(talker, Sampling(max_new_tokens=4), "be brief", [picture], "what ?")
    assert json.loads(json.dumps(result)) == result
    assert result["new_tokens"] <= 4
    assert result["experts"]["vision.0"]["image"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", "x"], "no such checkpoint directory"),
        (["--image", "a.png"], "--image and --json go with --prompt"),
        (["--temperature", "-1"], "temperature: found -1.0, expected 0"),
    ],
)
def test_bad_commands_are_one_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(tmp_path / "nowhere"), *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_the_command_goes_on_behind_a_line_that_is_not_utf8(
    talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(talker.model, talker.processor, tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 ?\nhow many ?\n"), encoding="utf-8"))
    assert main(["chat", str(tmp_path), "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert r"caf\udce9 ?': bytes that are not UTF-8" in said
    assert said.count("2 tokens: the limit") == 1


class PseudoTerminal:
    """A process whose standard streams are a terminal."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.seen = ""

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def wait_for(self, holds: Callable[[str], Any], seconds: float = 240) -> str:
        """What has come since the last wait, once it `holds`."""
        deadline = time.monotonic() + seconds
        while not holds(self.seen):
            assert time.monotonic() < deadline, self.seen
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        seen, self.seen = self.seen, ""
        return seen


@pytest.mark.slow
def test_the_command_in_a_pseudo_terminal(picture: str, tmp_path: Path) -> None:
    save_checkpoint(*tiny_model(moe=MOE), tmp_path / "model")
    command = [sys.executable, "-m", "llava_compete.cli", "chat", str(tmp_path / "model"), "--max-new-tokens", "150"]
    terminal = PseudoTerminal(command)
    try:
        terminal.wait_for(lambda text: "> " in text)
        terminal.type(f"/image {picture}")
        assert "30x20" in terminal.wait_for(lambda text: "next question]" in text and "> " in text[-4:])
        terminal.type("what colour ?")
        terminal.wait_for(lambda text: len(text) > 30)  # it is writing
        os.kill(terminal.process.pid, signal.SIGINT)
        assert re.search(r"\[stopped\]|the limit\]|> $", terminal.wait_for(lambda text: "> " in text[-4:]))
        terminal.type("/experts")
        assert "share of choices" in terminal.wait_for(lambda text: "> " in text[-4:])
        terminal.type("/quit")
        assert terminal.process.wait(60) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
        os.close(terminal.master)
