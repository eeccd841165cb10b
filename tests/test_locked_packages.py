"""What each optional path imports works together at the locked versions, such as sentencepiece with protobuf."""

from __future__ import annotations

import importlib

import pytest

PATHS = {
    "a tokenizer.model": ["sentencepiece", "sentencepiece.sentencepiece_model_pb2"],
    "report_to wandb": ["wandb"],
    "report_to tensorboard": ["torch.utils.tensorboard"],
    "quantization": ["bitsandbytes"],
    "LoRA": ["peft"],
    "compressed sources": ["zstandard"],
    "tables and parquet": ["datasets", "pyarrow.parquet"],
    "GGUF": ["gguf"],
    "fetch dinov2": ["onnx"],
    "fetch emoji": ["resvg_py"],
    "benchmarks": ["lmms_eval", "Levenshtein"],
    "text benchmarks": ["lm_eval"],
    "comparisons": ["scipy.stats", "matplotlib"],
    "serve": ["fastapi", "uvicorn", "openai"],
    "web": ["gradio"],
    "preference": ["trl"],
}


@pytest.mark.parametrize("path", PATHS)
def test_an_optional_path_imports(path: str) -> None:
    for name in PATHS[path]:
        importlib.import_module(name)
