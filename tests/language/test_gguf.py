"""Which folders are read as GGUF, and what is said where they cannot be."""

import importlib.util

import pytest

from llava_compete.errors import UserError
from llava_compete.language.gguf import gguf_options


def test_a_folder_with_one_gguf_file_and_no_config_is_read_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert gguf_options("org/model") == gguf_options(None) == gguf_options(str(tmp_path)) == {}
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"GGUF")
    assert gguf_options(str(tmp_path)) == {"gguf_file": "model.Q4_1.gguf"}
    (tmp_path / "model.Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(model\.Q4_1\.gguf, \.\.\.\), expected one"):
        gguf_options(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")  # a plain checkpoint, whatever lies beside it
    assert gguf_options(str(tmp_path)) == {}


def test_the_package_that_reads_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'llava_compete\[fetch\]'"):
        gguf_options(str(tmp_path))
