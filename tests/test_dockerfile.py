"""What the Dockerfile names is there: files, commands, ports, and the lock's own CUDA. The image is built elsewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from llava_compete.cli import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = [
    line
    for line in re.sub(
        r"\\\n\s*", " ", "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    ).split("\n")
    if line
]


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def test_every_file_that_is_copied_is_in_the_repository() -> None:
    kept = {line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source not in kept
    # What the installation reads is copied before it runs.
    before = TEXT[: TEXT.index("RUN bash scripts/setup.sh")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in ("pyproject.toml", "constraints.txt", "setup.py", project["readme"], *project["license-files"]):
        assert needed in before, needed


def test_scripts_commands_and_recipes_that_it_names_are_there() -> None:
    for script in re.findall(r"bash (scripts/\S+\.sh)", TEXT):
        assert (ROOT / script).is_file(), script
    for recipe in re.findall(r"configs/\S+\.yaml", TEXT):
        assert (ROOT / recipe).is_file(), recipe
    words = re.findall(r"llava-compete (\w[\w-]*)", TEXT)
    assert words
    for word in words:
        assert any(names[0] == word for names in COMMANDS), word
    assert "/opt/llava_compete" in instructions("WORKDIR")


def test_ports_are_the_commands_own() -> None:
    ports = {int(port) for port in instructions("EXPOSE")[0].split()}
    assert ports == {build_parser([name]).parse_args([name, "c"]).port for name in ("serve", "web")}


def test_cuda_and_python_are_those_of_the_lock() -> None:
    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    major_minor = ".".join(instructions("ARG")[0].removeprefix("CUDA=").split(".")[:2])
    assert locked["cuda-toolkit"].startswith(f"{major_minor}.")
    (base,) = instructions("FROM")
    assert base.endswith("-devel-ubuntu24.04")  # whose python3 is 3.12
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"


def test_the_installation_takes_all_extras() -> None:
    """scripts/setup.sh installs `all`, which names every extra that the package has."""
    assert "-e '.[all]'" in (ROOT / "scripts" / "setup.sh").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(re.findall(r"[\w-]+", everything.split("[")[1])) == set(extras) - {"all"}
