"""What `.ci/run` says of parts that could not run, or not wholly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """import pytest

@pytest.mark.parametrize("package", ["one", "two"])
def test_package(package):
    pytest.skip(f"{package}: needs npm, found none on PATH")

def test_good():
    GOOD
"""


def run_parts(folder: Path, good: str, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(TESTS.replace("GOOD", good), encoding="utf-8")
    pytest_here = f"{sys.executable} -m pytest -q -rs -p no:cacheprovider --rootdir {folder} {folder}/test_it.py"
    lines = ["set -euo pipefail", f"source {ROOT}/scripts/lib/parts.sh", f"part packages {pytest_here}", *more]
    return subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=False)


def test_a_part_of_which_nothing_can_run_is_one_line_with_the_reason(tmp_path: Path) -> None:
    done = run_parts(tmp_path, "pytest.skip('no index')", "part next true")
    assert done.returncode == 0, done.stderr
    first, skipped, last = done.stdout.split("=== seconds by part\n")[1].splitlines()
    assert (first[-12:], last[-8:]) == (" s  packages", " s  next")
    assert skipped == "SKIPPED    packages: no index (and 2 more reasons)"


def test_what_a_part_leaves_out_is_said_and_one_that_fails_ends_the_run(tmp_path: Path) -> None:
    done = run_parts(tmp_path, "pass", "part broken bash -c 'exit 3'", "part next true")
    assert done.returncode == 3
    first, *skipped, last = done.stdout.split("=== seconds by part\n")[1].splitlines()
    assert skipped == [f"SKIPPED    packages: {name}: needs npm, found none on PATH" for name in ("one", "two")]
    assert (first[-12:], last[-22:]) == (" s  packages", " s  broken: FAILED (3)")
