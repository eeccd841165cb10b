"""Tiny data, models and commands for the training tests: the user's own scripts, in subprocesses, on CPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image

from llava_compete.config import dump_yaml

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def write_data(folder: Path, rows: int = 24, text_every: int = 4) -> Path:
    """LLaVA JSON with plain coloured images; every `text_every`-th row is text only (0: none). Returns its path.

    The sampler sorts a global batch of 8 by modality, so that of two ranks one may get all of its text and no image.
    """
    generator = random.Random(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(rows):
        colour = generator.choice(list(COLOURS))
        record: dict[str, Any] = {"id": f"row{number}"}
        if text_every and number % text_every == 0:
            words = " ".join(generator.choices(list(COLOURS), k=generator.randint(2, 9)))
            record["conversations"] = [{"from": "human", "value": f"Say {words}."}, {"from": "gpt", "value": words}]
        else:
            record["image"] = f"images/{number}.png"
            Image.new("RGB", (20, 16), COLOURS[colour]).save(folder / record["image"])
            record["conversations"] = [
                {"from": "human", "value": "<image>\nWhich colour?"},
                {"from": "gpt", "value": f"It is {colour}" + "." * generator.randint(1, 12)},
            ]
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def tiny_moe(**changes: Any) -> dict[str, Any]:
    """Competition in every part, often enough for a run of a few steps."""
    layer = {"num_experts": 4, "num_experts_per_tok": 2, "router": "competition"}
    return {
        "competition_rate": 0.5,
        "competition_warmup_ratio": 0.0,
        "max_competing_layers": 3,
        "vision": layer,
        "projector": layer,
        "language": layer,
        **changes,
    }


def fresh_model() -> dict[str, Any]:
    """The `model:` section of a new model with a few ten thousand parameters."""
    return {
        "vision_tower": {
            "config": {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16},
                "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
            },
        },
        "projector": {"type": "mlp2x_gelu"},
        "language_model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
            },
        },
        "tokenizer": {"train_on": "data", "vocab_size": 400},
        "chat_template": "chatml",
    }


def stage_config(
    stage: str, data: Path, output_dir: Path, *, model: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A stage of 6 steps with a global batch of 8."""
    training = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
        **changes.pop("training", {}),
    }
    return {
        "stage": stage,
        "output_dir": str(output_dir),
        "model": model or fresh_model(),
        "data": {"sources": [{"name": "tiny", "path": str(data)}], "max_length": 128},
        "trainable": {"vision": "full", "projector": "full", "language": "full"},
        "training": training,
        "deepspeed": "zero2",
        **changes,
    }


def run_stage(
    config: dict[str, Any], path: Path, *overrides: str, processes: int = 2, timeout: int = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Write `config` to `path` and run it through the stage's script, as a user does."""
    dump_yaml(config, path)
    return run_script(config["stage"], path, *overrides, processes=processes, timeout=timeout, **environment)


def run_script(
    script: str, *arguments: Any, processes: int = 2, timeout: int = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`bash scripts/<script>.sh ARGUMENTS` on CPU ranks with one thread each."""
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / f"{script}.sh"), *map(str, arguments)],
        env={**os.environ, **stage_environment(processes), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def stage_environment(processes: int) -> dict[str, str]:
    """CPU ranks with one thread each; results do not depend on the machine's cores then."""
    return {"NUM_GPUS": "0", "NUM_PROCESSES": str(processes), "OMP_NUM_THREADS": "1"}


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The training lines of `run/metrics.jsonl`."""
    lines = (output_dir / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # A run that is still writing may have left half a line.
    return [record for record in map(json.loads, (line for line in lines if line.endswith("}"))) if "loss" in record]
