"""Sparse upcycling (arXiv 2212.05055): a dense checkpoint directory becomes a MoE checkpoint directory.

Every expert starts as a copy of the dense MLP and routers at N(0, 0.02) from a fixed seed; weights of the chosen
experts sum to 1, so the result answers exactly as its parent, but for routers that say otherwise
(`keeps_dense_answers`). Where a router factorises the first projection (`moe/autonomy.py`), each expert's is the dense
one as another product of two: at full rank the answers are equal to rounding, below it they are not. No model is built
with weights: tensors are read one by one from the parent's shards, and written in shards, so that memory stays near one
shard.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from functools import partial as partial_call
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError, and_more
from llava_compete.files import PARTIAL
from llava_compete.model.card import CARD
from llava_compete.model.checkpoint import (
    MODEL,
    TensorFacts,
    index_name,
    model_on_meta,
    own_files,
    read_config,
    read_weight_headers,
)
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.section import ModelSection
from llava_compete.model.shards import SHARD_BYTES, PlannedTensor, write_shards
from llava_compete.moe.autonomy import Factors, factorise
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.factorised import FactorisedExperts
from llava_compete.moe.router_table import ROUTER_CLASSES

logger = logging.getLogger(__name__)

# Names of the dense layers whose weights a packed parameter is made of, in order of its rows.
DENSE_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("gate_up_proj",)),
    "gate_proj": (("gate_proj",), ("gate_up_proj",)),  # of experts that have the two apart: half of a fused one
    "up_proj": (("c_fc",), ("fc1",), ("up_proj",), ("dense_h_to_4h",), ("gate_up_proj",)),
    "down_proj": (("down_proj",), ("c_proj",), ("fc2",), ("dense_4h_to_h",)),
}


class UpcycleConfig(StrictConfig):
    """The YAML of `llava-compete upcycle`: which dense checkpoint, where to, which layers become which MoE."""

    stage: Literal["upcycle"] = Field(default="upcycle", description="always upcycle")
    model: ModelSection = Field(description="the dense checkpoint")
    output_dir: Path = Field(description="the MoE checkpoint goes here")
    moe: MoeConfig = Field(description="which layers become which mixtures")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the routers' weights")


class UpcycledLayer(NamedTuple):
    """One replaced MLP: parameters of the dense MLP, of all experts and the router, and of those that a token uses."""

    name: str
    experts: str
    router: str
    dense: int
    total: int
    active: int


class UpcycleReport(NamedTuple):
    """What was replaced, and the whole model's parameters."""

    layers: list[UpcycledLayer]
    parameters_before: int
    parameters_after: int
    parameters_active: int


class _Source(NamedTuple):
    """How a tensor of the new checkpoint is made: dense tensors joined by rows, then `copies` times; or a router.

    half: the first or second of the rows alone. factor: of each expert's factors of it, "low_EHD" or "high_EIH".
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    copies: int | None = None
    router: SparseMoeBlock | None = None
    half: int | None = None
    factor: str | None = None


def upcycle(
    parent: str | Path, output_dir: str | Path, moe: MoeConfig, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> UpcycleReport:
    """Write the upcycled checkpoint; refuses a parent that is a MoE, or whose weights do not fit its config."""
    parent, output_dir = Path(parent), Path(output_dir)
    config = read_config(parent)
    if config.moe is not None:
        raise UserError(f"{parent}: already a mixture of experts; upcycle its dense parent instead")
    if not moe.parts():
        raise UserError("moe: no part given; expected at least one of vision, projector, language")
    headers = read_weight_headers(parent)
    tied = model_on_meta(parent, config, headers).all_tied_weights_keys
    new_config = _new_config(config, moe)
    with torch.device("meta"):
        model = LlavaCompeteForConditionalGeneration(new_config)
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, SparseMoeBlock)}
    _warn_of_other_answers(moe, blocks)
    # A tied tensor is one with its source, also where a checkpoint stores it a second time.
    kept = {key: facts for key, facts in headers.items() if tied.get(key) not in headers}
    sources = _plan(blocks, kept, parent)
    partial = output_dir.with_name(output_dir.name + PARTIAL)
    _prepare(parent, output_dir, partial)
    _copy_other_files(parent, partial)
    new_config.save_pretrained(partial)
    dtype_of = {key: _dtype(source, headers) for key, source in sources.items()}
    make = partial_call(_make, seed=seed, factoriser=_Factoriser(seed))
    tensors = {
        key: PlannedTensor(source.shape, dtype_of[key], partial_call(make, key, source, headers, dtype_of[key]))
        for key, source in sources.items()
    }
    write_shards(partial, tensors, shard_bytes, title="upcycle")
    if output_dir.exists():
        shutil.rmtree(output_dir)
    partial.rename(output_dir)
    return _report(blocks, sources, headers, model)


def _warn_of_other_answers(moe: MoeConfig, blocks: dict[str, SparseMoeBlock]) -> None:
    for part, layer in moe.parts().items():
        if not ROUTER_CLASSES[layer.router].keeps_dense_answers:
            logger.warning("moe.%s: with router %s the result does not answer as its parent", part, layer.router)
        full = {(_full_rank(block), block.router.rank) for block in blocks.values() if block.part == part}
        for most, rank in full if ROUTER_CLASSES[layer.router].factorises else ():
            if rank < most:
                logger.warning(
                    "moe.%s: at autonomy_rank %d of %d the result does not answer as its parent", part, rank, most
                )


def _full_rank(block: SparseMoeBlock) -> int:
    return min(block.hidden_size, block.experts.down_proj.shape[2])


def _new_config(config: LlavaCompeteConfig, moe: MoeConfig) -> LlavaCompeteConfig:
    values = config.to_dict()
    values.update(moe=moe.of_model(), stage="upcycle", parents=[*config.parents, config.stage])
    new_config = LlavaCompeteConfig.from_dict(values)
    new_config.architectures = config.architectures
    return new_config


def _plan(blocks: dict[str, SparseMoeBlock], headers: dict[str, TensorFacts], parent: Path) -> dict[str, _Source]:
    """A source for each tensor of the new checkpoint: all as they are stored, but for the MLPs that become experts."""
    sources: dict[str, _Source] = {}
    for path, block in blocks.items():
        for key, tensor in block.state_dict().items():
            child, _, name = key.partition(".")
            if isinstance(block.experts, FactorisedExperts):
                sources[f"{path}.{key}"] = _factorised(path, key, tuple(tensor.shape), block, headers, parent)
            elif child == "router":
                sources[f"{path}.{key}"] = _Source((), tuple(tensor.shape), None, block)
            else:
                dense = _dense_keys(path, name, headers, parent)
                sources[f"{path}.{key}"] = _Source(dense, tuple(tensor.shape), block.config.num_experts)
    dense_tensors = {key for source in sources.values() for key in source.keys}
    copies = {key: _Source((key,), facts.shape) for key, facts in headers.items() if key not in dense_tensors}
    unexpected = sorted(key for key in copies if key.startswith(tuple(f"{path}." for path in blocks)))
    if unexpected:
        raise UserError(f"{parent}: tensors of an MLP that experts have no place for: {and_more(unexpected)}")
    return copies | sources


def _factorised(
    path: str,
    key: str,
    shape: tuple[int, ...],
    block: SparseMoeBlock,
    headers: dict[str, TensorFacts],
    parent: Path,
) -> _Source:
    """The source of one tensor of a block whose experts' first projection is factorised."""
    assert isinstance(block.experts, FactorisedExperts)
    name = key.removeprefix("experts.")
    factor = {"router.low_proj": "low_EHD", block.experts.high_name: "high_EIH"}.get(name)
    name = block.experts.high_name if name == "router.low_proj" else name
    keys = _dense_keys(path, name, headers, parent)
    fused = ".gate_up_proj." in keys[0]
    half = (0 if name.startswith("gate_proj") else 1) if fused else None
    return _Source(keys, shape, None if factor else block.config.num_experts, block if factor else None, half, factor)


def _dense_keys(path: str, name: str, headers: dict[str, TensorFacts], parent: Path) -> tuple[str, ...]:
    """The parent's tensors behind packed parameter `name` ("gate_up_proj", "down_proj_bias", ...) of block `path`."""
    kind = "bias" if name.endswith("_bias") else "weight"
    for layers in DENSE_NAMES[name.removesuffix("_bias")]:
        keys = tuple(f"{path}.{layer}.{kind}" for layer in layers)
        if all(key in headers for key in keys):
            return keys
    raise UserError(f"{parent}: no dense {kind} for {path}.experts.{name}")


def _prepare(parent: Path, output_dir: Path, partial: Path) -> None:
    """Refuse to overwrite anything but an earlier upcycling; drop what a killed one left."""
    if output_dir.resolve() == parent.resolve():
        raise UserError(f"{output_dir}: the output directory is the parent itself")
    if output_dir.exists() and any(output_dir.iterdir()):
        earlier = (output_dir / "config.json").is_file() and read_config(output_dir).stage == "upcycle"
        if not earlier:
            raise UserError(f"{output_dir}: not empty, and not an earlier result of upcycling; choose another --out")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _copy_other_files(parent: Path, partial: Path) -> None:
    """Tokenizer, processor and code; scores and reports would be taken for those of the new model."""
    made_anew = (index_name(MODEL), "config.json", CARD)
    for file in own_files(parent):
        if file.suffix != ".safetensors" and file.name not in made_anew:
            shutil.copy2(file, partial / file.name)


def _make(
    key: str,
    source: _Source,
    headers: dict[str, TensorFacts],
    dtype: torch.dtype,
    *,
    seed: int,
    factoriser: _Factoriser,
) -> Tensor:
    if source.router is not None and source.factor is None:
        tensor = _router_tensor(key, source.router, seed)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor  # a buffer of counts stays whole
    parts = [headers[dense_key].whole() for dense_key in source.keys]
    dense = parts[0] if len(parts) == 1 else torch.cat(parts)
    dense = dense if source.half is None else dense.chunk(2)[source.half]
    if source.router is not None:
        return factoriser(dense, source)
    return dense if source.copies is None else dense.unsqueeze(0).repeat(source.copies, *[1] * dense.ndim)


def _generator(block: SparseMoeBlock, seed: int) -> torch.Generator:
    """Of (seed, layer) alone, so that no other layer's choice moves it."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{block.name}".encode()))


class _Factoriser:
    """Factors of dense projections; keeps the last, for two tensors are made of each."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._last: tuple[str, Factors] | None = None

    def __call__(self, dense_ID: Tensor, source: _Source) -> Tensor:
        block = source.router
        assert block is not None
        if self._last is None or self._last[0] != block.name:
            generator = _generator(block, self.seed)
            factors = factorise(dense_ID.float(), block.router.rank, block.config.num_experts, generator)
            if factors.cut:
                error = f"relative error {factors.cut:.3g}"
                logger.warning("%s: the first projection at rank %d: %s", block.name, block.router.rank, error)
            self._last = block.name, factors
        return getattr(self._last[1], str(source.factor)).to(dense_ID.dtype)


def _router_tensor(key: str, block: SparseMoeBlock, seed: int) -> Tensor:
    """A router's parameter or buffer as it starts."""
    config = block.config
    output_size, hidden_size = block.experts.down_proj.shape[1], block.hidden_size
    router = type(block.router)(config.num_experts, config.num_experts_per_tok, hidden_size, output_size)
    router.reset_parameters(_generator(block, seed))
    return router.state_dict()[key.rpartition(".router.")[2]]


def _dtype(source: _Source, headers: dict[str, TensorFacts]) -> torch.dtype:
    """Stored precision; routers are kept in float32, in which they are computed, unless the parent is all narrower."""
    if source.router is not None and source.factor is None:
        stored = {facts.dtype for facts in headers.values() if facts.dtype.is_floating_point}
        return torch.float32 if torch.float32 in stored or len(stored) != 1 else stored.pop()
    return headers[source.keys[0]].dtype


def _report(
    blocks: dict[str, SparseMoeBlock],
    sources: dict[str, _Source],
    headers: dict[str, TensorFacts],
    model: LlavaCompeteForConditionalGeneration,
) -> UpcycleReport:
    layers = []
    for path, block in blocks.items():
        experts = sum(parameter.numel() for parameter in block.experts.parameters())
        router = sum(parameter.numel() for parameter in block.router.parameters())
        chosen, count = block.config.num_experts_per_tok, block.config.num_experts
        layers.append(
            UpcycledLayer(
                name=block.name,
                experts=f"{chosen} of {count}",
                router=block.config.router,
                dense=_dense_numel(f"{path}.", sources, headers),
                total=experts + router,
                active=experts // count * chosen + router,
            )
        )
    before = _dense_numel("", sources, headers)
    after = sum(parameter.numel() for parameter in model.parameters())
    return UpcycleReport(layers, before, after, after - sum(layer.total - layer.active for layer in layers))


def _dense_numel(prefix: str, sources: dict[str, _Source], headers: dict[str, TensorFacts]) -> int:
    """Numbers of the parent behind the tensors below `prefix`."""
    keys = {key for name, source in sources.items() if name.startswith(prefix) for key in source.keys}
    return sum(int(torch.Size(headers[key].shape).numel()) for key in keys)
