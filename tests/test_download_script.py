"""The download script against a server on this machine: layout, nothing fetched twice, damaged files refused."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOME = "datasets/liuhaotian/LLaVA-Pretrain/resolve/main"


class Quiet(http.server.SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012 - shared on purpose: the test reads it

    def do_GET(self):
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def place(tmp_path):
    """A copy of the script that expects 2 rows and 2 images, and a server in place of the hub."""
    (tmp_path / "scripts/lib").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/lib/common.sh", tmp_path / "scripts/lib")
    text = (ROOT / "scripts/download_data.sh").read_text()
    (tmp_path / "scripts/download_data.sh").write_text(text.replace("558128", "2"))
    served = tmp_path / "served" / HOME
    served.mkdir(parents=True)
    rows = [{"id": str(index), "image": f"0/{index}.jpg", "conversations": []} for index in range(2)]
    (served / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
    with zipfile.ZipFile(served / "images.zip", "w") as archive:
        for index in range(2):
            archive.writestr(f"0/{index}.jpg", b"picture")
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    Quiet.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download(place, *arguments):
    folder, address = place
    environment = {**os.environ, "HF_ENDPOINT": address, "VENV": "unused", "no_proxy": "127.0.0.1"}
    command = ["bash", "scripts/download_data.sh", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("unzip"), reason="needs curl and unzip")
def test_layout_stamps_and_second_run(place):
    assert "2 part(s) missing" in download(place, "--dry-run", "pretrain").stdout
    first = download(place, "pretrain")
    assert first.returncode == 0, first.stderr
    data = place[0] / "playground/data/LLaVA-Pretrain"
    assert sorted(path.name for path in (data / "images/0").iterdir()) == ["0.jpg", "1.jpg"]
    assert len(json.loads((data / "blip_laion_cc_sbu_558k.json").read_text())) == 2
    assert not list(place[0].rglob("*.part")) + list(place[0].rglob("*.partial"))
    Quiet.requests.clear()
    assert download(place, "pretrain").returncode == 0
    assert Quiet.requests == []


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("unzip"), reason="needs curl and unzip")
def test_a_damaged_archive_and_a_short_file_are_refused(place):
    served = place[0] / "served" / HOME
    whole = (served / "images.zip").read_bytes()
    (served / "images.zip").write_bytes(whole[: len(whole) // 2])
    damaged = download(place, "pretrain")
    assert damaged.returncode == 2
    assert "is damaged and was removed: run again" in damaged.stderr
    (served / "images.zip").write_bytes(whole)
    assert download(place, "pretrain").returncode == 0
    shutil.rmtree(place[0] / "playground")
    (served / "blip_laion_cc_sbu_558k.json").write_text("[]")
    short = download(place, "pretrain")
    assert short.returncode == 2
    assert "has 0 rows, expected at least 2" in short.stderr


def test_unknown_part_is_one_clear_line(place):
    result = download(place, "coco")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "unknown argument 'coco'" in result.stderr
