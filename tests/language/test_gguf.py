"""Which folders are read as GGUF, and what is said where they cannot be."""

import importlib.util

import numpy as np
import pytest

from llava_compete.errors import UserError
from llava_compete.language.config import LanguageModelSection
from llava_compete.language.gguf import gguf_options
from llava_compete.language.sources import load_language_model


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


def write_gguf(path, architecture="llama", blocks=None):
    """One layer of zeros; the matrices in GGUF blocks of a type, or in float32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    shapes = {"token_embd": (300, 256), "output_norm": (256,), "output": (300, 256)}
    shapes |= {f"blk.0.{key}": (256, 256) for key in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{key}": (256, 256) for key in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{key}": (256,) for key in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        if blocks is None or len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
            continue
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[blocks]]
        packed = np.zeros((shape[0], shape[1] // values * size), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType[blocks])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "rwkv9"}, "GGUF model with architecture rwkv9 is not supported"),
        ({"blocks": "Q8_K"}, "Dequantization for Q8_K is not yet implemented"),
        ({"keep": 100}, "its GGUF file is cut off or none"),
        ({"keep": 0.5}, "cannot reshape array"),
    ],
)
def test_a_file_that_cannot_be_unpacked_is_one_line(tmp_path, change, message):
    """Another architecture, blocks that have no unpacking, a file cut in its header and one cut in its weights."""
    keep = change.get("keep")
    file = tmp_path / "model.gguf"
    write_gguf(file, **{key: value for key, value in change.items() if key != "keep"})
    if keep is not None:
        content = file.read_bytes()
        file.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(UserError, match=f"language_model.name: {tmp_path}: .*{message}"):
        load_language_model(LanguageModelSection(name=str(tmp_path)))
