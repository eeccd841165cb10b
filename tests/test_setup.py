"""scripts/setup.sh started twice at once, as by machines that share a folder: one installs, the other waits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

# An interpreter whose `-m venv` makes another of its kind, which notes what pip is asked to do.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *"pip"*" install "*) echo install >>"$NOTES"; sleep 1; echo "Installing collected" ;;
  *version*) echo "Python 3.11" ;;
esac
"""


def test_two_at_once_install_once(tmp_path: Path) -> None:
    python = tmp_path / "python3.11"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    notes, venv = tmp_path / "notes", tmp_path / "venv"
    environment = {**os.environ, "PYTHON": str(python), "VENV": str(venv), "NOTES": str(notes)}
    command = ["bash", str(ROOT / "scripts" / "setup.sh")]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert notes.read_text(encoding="utf-8") == "install\n"
    assert sum("Installing into" in text for text in said) == 1
