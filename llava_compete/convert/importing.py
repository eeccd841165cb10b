"""From a published checkpoint directory to one of ours: the layout found from its files, every tensor accounted for.

Tensors are read one by one and written in shards, so memory stays near one shard.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from llava_compete.convert.layout import Import, ImportOptions, Layout, Source
from llava_compete.convert.llava import LLAVA
from llava_compete.convert.llava_hf import LLAVA_HF
from llava_compete.convert.moe_language import MOE_LANGUAGE
from llava_compete.convert.places import directory_of
from llava_compete.convert.recipes import plan_tensors
from llava_compete.errors import UserError, and_more
from llava_compete.files import new_directory, read_json
from llava_compete.model.build import default_generation_config, processor_of
from llava_compete.model.checkpoint import TensorFacts, model_on_meta
from llava_compete.model.shards import SHARD_BYTES, write_shards

logger = logging.getLogger(__name__)

LAYOUTS: tuple[Layout, ...] = (LLAVA_HF, LLAVA, MOE_LANGUAGE)


class ImportReport(NamedTuple):
    """What came in: the layout, tensors read and left out (with why), parameters, files, and notes for the user."""

    layout: str
    num_read: int
    unused: dict[str, str]
    num_parameters: int
    num_shards: int
    notes: list[str]


def import_checkpoint(
    source: str | Path, output_dir: str | Path, options: ImportOptions | None = None, shard_bytes: int = SHARD_BYTES
) -> ImportReport:
    """Write the checkpoint of ours that answers as `source`, a directory or a model on the hub, does.

    Raises:
        UserError: an unknown layout; a tensor that is missing, left over or misshapen; damaged or pickled code.
    """
    output_dir = Path(output_dir)
    refuse_existing(output_dir)
    layout, opened = _open(directory_of(source))
    logger.info("%s: layout %s", source, layout.name)
    found = layout.read(opened, options or ImportOptions())
    _account(found, opened)
    config = found.config
    try:
        planned = plan_tensors(found.recipes, found.tensors)
    except UserError as error:
        raise UserError(f"{opened.directory}: {error}") from error
    headers = {
        name: TensorFacts(opened.directory, tensor.shape, tensor.dtype, name) for name, tensor in planned.items()
    }
    model = model_on_meta(opened.directory, config, headers)
    floats = {tensor.dtype for tensor in planned.values() if tensor.dtype.is_floating_point}
    config.dtype = floats.pop() if len(floats) == 1 else torch.float32
    config.architectures = [type(model).__name__]
    with new_directory(output_dir) as partial:
        num_shards = write_shards(partial, planned, shard_bytes, title="import")
        config.save_pretrained(partial)
        processor_of(config, found.tokenizer).save_pretrained(partial)
        default_generation_config(found.tokenizer, config).save_pretrained(partial)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    used = {name for recipe in found.recipes.values() for name in recipe.sources}
    return ImportReport(layout.name, len(used), found.unused, parameters, num_shards, found.notes)


def refuse_existing(output_dir: Path) -> None:
    """Raise a `UserError` where something is in the way of a new directory."""
    if output_dir.name in ("", ".."):
        raise UserError(f"--out: found {str(output_dir)!r}, expected a directory by a name of its own")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir}: not empty; choose another --out")


def _open(directory: Path) -> tuple[Layout, Source]:
    path = directory / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    if config.get("model_type") == "llava_compete":
        raise UserError(f"{directory}: a checkpoint of llava_compete already")
    source = Source.open(directory, config)
    for layout in LAYOUTS:
        if layout.fits(source):
            return layout, source
    looked_for = "; ".join(f"{layout.name}: {layout.looks_for}" for layout in LAYOUTS)
    names = and_more(sorted(source.tensors)) or "no tensors"
    raise UserError(
        f"{directory}: unknown layout (model_type {config.get('model_type')!r}, {names}); looked for {looked_for}"
    )


def _account(found: Import, source: Source) -> None:
    """Every stored tensor is either used or known to have no part in the model."""
    used = {name for recipe in found.recipes.values() for name in recipe.sources}
    left = sorted(found.tensors[name].name for name in found.tensors.keys() - used - found.unused.keys())
    if left:
        raise UserError(f"{source.directory}: tensors that the layout has no place for: {and_more(left)}")
