"""A checkpoint's card, and its upload to a stand-in for a hub that speaks the same protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
from tiny import tiny_model
from transformers import GenerationConfig

from llava_compete.cli import main
from llava_compete.config import dump_yaml
from llava_compete.evaluation.checkpoint_facts import checkpoint_facts
from llava_compete.files import write_json
from llava_compete.model.build import save_checkpoint
from llava_compete.model.card import CARD, MARK, stage_card
from llava_compete.model.checkpoint import read_config

MOE = {"vision": {"router": "softmax"}, "language": {"num_experts": 4, "num_experts_per_tok": 2}}


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: takes what `huggingface_hub` sends to create one and to commit files."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer right":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            return self._answer(200, {"url": f"http://{self.headers['Host']}/me/tiny", "name": "me/tiny"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self._answer(200, {"files": modes})
        if "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del self.files[entry["value"]["path"]]
            address = f"http://{self.headers['Host']}/me/tiny/commit/abc"
            return self._answer(200, {"commitUrl": address, "commitOid": "abc", "commitMessage": "x", "success": True})
        return self._answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            return self._answer(200, [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in self.files])
        facts = {"id": "me/tiny", "sha": "abc", "siblings": [], "tags": [], "downloads": 0, "private": True}
        return self._answer(200, facts)

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quietly."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class OneHub(Hub):
        files: dict[str, bytes] = {}  # noqa: RUF012
        created: list[dict[str, Any]] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), OneHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield OneHub
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    save_checkpoint(*tiny_model(moe=MOE), directory)
    return directory


def test_a_saved_model_has_a_card_and_its_generation_settings(checkpoint: Path) -> None:
    card = (checkpoint / CARD).read_text()
    assert "Stages: initial." in card
    assert "- vision: router `softmax`" in card
    assert 'AutoModelForImageTextToText.from_pretrained("tiny")' in card
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id
    (checkpoint / CARD).write_text("mine")
    tiny_model(moe=MOE)[0].config.save_pretrained(checkpoint)
    assert (checkpoint / CARD).read_text() == "mine"


def test_a_stages_card_has_the_name_and_the_data_of_its_place(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "sft"
    (out / "run").mkdir(parents=True)
    dump_yaml({"data": {"sources": [{"name": "captions"}]}}, out / "run" / "config.yaml")
    stage_card(checkpoint, out, read_config(checkpoint))
    card = (checkpoint / CARD).read_text()
    assert 'from_pretrained("sft")' in card
    assert "- captions (weight 1)" in card
    (out / CARD).write_bytes(b"m\xeene")  # in an encoding of its writer's
    stage_card(checkpoint, out, read_config(checkpoint))
    assert not (checkpoint / CARD).exists()  # which would take its place


def test_push_uploads_the_checkpoint_with_data_and_scores(
    checkpoint: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "run").mkdir()
    sources = [{"name": "captions", "path": "/somewhere/here.json", "weight": 0.25}]
    dump_yaml({"data": {"sources": sources}}, checkpoint / "run" / "config.yaml")
    (checkpoint / "checkpoint-4").mkdir()
    (checkpoint / "checkpoint-4" / "optimizer.pt").write_text("state")
    own = {path.name for path in checkpoint.iterdir() if path.is_file()}
    for name in ("optimizer.pt", "trainer_state.json", "complete.json"):  # as a training checkpoint has them
        (checkpoint / name).write_text("state")
    facts = checkpoint_facts(checkpoint)
    tasks = {"digits": {"accuracy": 0.94, "chance": 0.1, "n": 400}}
    write_json(checkpoint / "eval" / "summary.json", {"checkpoint": facts, "tasks": tasks})

    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} | {"model.safetensors.index.json"}
    hub.files.update(dict.fromkeys({*shards, "notes.md"}, b"of an earlier upload"))

    assert main(["push", str(checkpoint), "me/tiny"]) == 0
    assert "/me/tiny/commit/abc" in capsys.readouterr().out
    assert hub.created[0]["name"] == "tiny"
    assert set(hub.files) == {*own, "notes.md"}
    assert hub.files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    card = hub.files[CARD].decode()
    assert MARK in card
    assert "- captions (weight 0.25)" in card
    assert "| digits | 0.940 | 0.100 | 400 |" in card
    assert 'from_pretrained("me/tiny")' in card
    assert "somewhere" not in card

    for key, said in (("sha256", "with other files (sha256)"), ("adapter_sha256", "with an adapter")):
        write_json(checkpoint / "eval" / "summary.json", {"checkpoint": facts | {key: "0" * 64}, "tasks": tasks})
        assert main(["push", str(checkpoint), "me/tiny"]) == 2
        assert said in capsys.readouterr().err


def test_a_hub_that_refuses_is_one_line(
    checkpoint: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert main(["push", str(checkpoint), "me/tiny"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "me/tiny: not uploaded" in error
    assert "401" in error
    assert not hub.files
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert main(["push", str(checkpoint), "me/tiny"]) == 2
    assert capsys.readouterr().err.startswith("error: me/tiny: not uploaded: ")
