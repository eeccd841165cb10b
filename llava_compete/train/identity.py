"""What a run is: every setting and all data that decide its weights, as flat keys that a resume compares.

The resolved config less paths, logging and how data are fetched; digests stand for what paths lead to. A difference is
refused with both values, or obeyed with `--allow-changed`; a few cannot be obeyed, since the optimizer's state or the
weights of the checkpoint are those of the setting it was written with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llava_compete.data.config import DataSection
from llava_compete.data.tables import load_source
from llava_compete.data.text.config import TextSection
from llava_compete.data.text.sources import digest
from llava_compete.moe.config import MoeConfig
from llava_compete.train.config import TrainConfig
from llava_compete.train.image_files import fingerprint
from llava_compete.train.inputs import Feed

# Keys that change no weight, by how they begin. `max_steps` and `num_train_epochs` are compared as `total_steps`.
_WITHOUT_EFFECT = (
    "guards.", "sample_steps", "training.logging_", "training.report_to", "training.run_name", "training.project",
    "training.disable_tqdm", "training.eval_", "training.per_device_eval_", "training.save_", "training.dataloader_",
    "training.torch_empty_cache_steps", "training.max_steps", "training.num_train_epochs", "data.max_bad_images",
    "data.max_rejected_share", "data.max_validation_rows", "deepspeed",
)  # fmt: skip
# Keys of which a checkpoint holds the consequences: parameters, or an optimizer's state of a certain shape.
_FIXED = (
    "stage", "zero_stage", "model.checkpoint", "model.dtype", "model.vision_tower.", "model.projector.",
    "model.language_model.", "model.tokenizer.", "model.quantization", "training.optim", "training.bf16",
    "training.fp16",
)  # fmt: skip
_FIXED_OF_A_PART = ("mode", "lora_rank")
# Of the ranks that a checkpoint was written by; absent where each had all experts.
EXPERT_PARALLEL = "expert_parallel"
# The same global batch may be shared out to ranks and micro-batches anew.
SPLIT = ("world_size", "training.per_device_train_batch_size", "training.gradient_accumulation_steps")


def settings(config: TrainConfig, moe: MoeConfig | None) -> dict[str, Any]:
    """What the config alone says; `moe` are the settings in force, the checkpoint's with the config's laid over."""
    content = config.model_dump(exclude={"moe"})
    content["moe"] = None if moe is None else moe.model_dump(exclude={"expert_parallel"})
    found = {key: value for key, value in flat(content, "") if not key.startswith(_WITHOUT_EFFECT)}
    if config.model.checkpoint is not None:
        found["model.checkpoint"] = checkpoint_digest(Path(config.model.checkpoint))
    return found


def identity_of(
    config: TrainConfig, moe: MoeConfig | None, data: Feed, world_size: int, zero_stage: int
) -> dict[str, Any]:
    """Settings, data, and how the run is shared out; looks at every image file, so on one rank only."""
    return {
        **settings(config, moe),
        **contents(config.data),
        "data": data.digest,
        "world_size": world_size,
        "zero_stage": zero_stage,
        **({} if moe is None or moe.expert_parallel == 1 else {EXPERT_PARALLEL: moe.expert_parallel}),
    }


def contents(section: DataSection | TextSection) -> dict[str, str]:
    """Digests of what each source holds, its rows and its image files; looks at every one, so on one rank only.

    Raises:
        SourceError: a source that is not there.
    """
    if isinstance(section, TextSection):
        return {f"data.train{_ROWS}": digest(section.train)}
    found: dict[str, str] = {}
    for source in section.sources:
        table = load_source(source, section.cache_dir)
        found |= {f"data.{source.name}{_ROWS}": table.digest, f"data.{source.name}{_IMAGES}": fingerprint(table)}
    return found


def contents_in(identity: Mapping[str, Any]) -> dict[str, str]:
    """Of an identity, what `contents` gave."""
    return {key: value for key, value in identity.items() if key.endswith((_ROWS, _IMAGES))}


_ROWS, _IMAGES = ".rows", ".images"


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """By key: "KEY was X, is Y" for every setting that is another one."""
    return {
        key: f"{key} was {_shown(saved, key)}, is {_shown(now, key)}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    }


def cannot_be_obeyed(key: str) -> bool:
    """Whether a run cannot go on from its checkpoint with another value of `key`."""
    return key.startswith(_FIXED) or (key.startswith("trainable.") and key.endswith(_FIXED_OF_A_PART))


def checkpoint_digest(directory: Path) -> str:
    """Of a model directory: all small files, and of the weights names, sizes and blocks spread evenly over each file.

    A name at the hub is its own digest.
    """
    if not directory.is_dir():
        return str(directory)
    total = hashlib.sha256()
    for path in sorted(file for file in directory.iterdir() if file.suffix in _MODEL_FILES):
        size = path.stat().st_size
        total.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // _BLOCKS, _BLOCK)):
                file.seek(start)
                total.update(file.read(_BLOCK))
    return total.hexdigest()[:16]


_MODEL_FILES = (".json", ".jinja", ".safetensors", ".model", ".txt")
_BLOCKS, _BLOCK = 64, 2**16


def flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and plain value; paths are left out, items of a list go by their names."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from flat(item, f"{key}.{item.get('name', number) if isinstance(item, dict) else number}")
    elif isinstance(value, list | tuple):
        if not any(isinstance(item, Path) for item in value):
            yield key, list(value)
    elif not isinstance(value, Path):
        yield key, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"
