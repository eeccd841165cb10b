"""Reading and writing checkpoint directories: self-contained, safetensors, strict, typed by config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from llava_compete.errors import UserError
from llava_compete.files import mode_by_umask, read_json
from llava_compete.language.loading_report import damage_named, refuse_wrong_keys
from llava_compete.language.remote_code import copy_remote_code, register_remote_code
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.parameter_names import OLD_NAMES, are_old, current_name
from llava_compete.model.processor import LlavaCompeteProcessor

# Beside a model in a `checkpoint-*`: what a run goes on from, and by what it knows that all is there.
_OF_A_RUN = (
    "*.pt", "*.pth", "*.bin", "complete.json", "trainer_state.json", "answer_means.safetensors", "zero_to_*.py",
    "latest", "latest_universal", ".*",
)  # fmt: skip
CHUNK_BYTES = 16 * 1024**2  # of a file that is mapped at once
MODEL = "model"  # how names of files with a model's weights begin
# safetensors' names of what torch can hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def index_name(stem: str) -> str:
    """The file that says which shard holds which tensor, where there are several."""
    return f"{stem}.safetensors.index.json"


def own_files(directory: Path) -> list[Path]:
    """The files of a checkpoint itself: nothing of its run, and no folder, which are runs, evaluations and reports."""
    files = (path for path in sorted(directory.iterdir()) if path.is_file())
    return [path for path in files if not any(path.match(pattern) for pattern in _OF_A_RUN)]


class TensorFacts(NamedTuple):
    """Where a stored tensor lies and what it is, from the file's header; older files have another name for it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_name: str

    def whole(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        flat = torch.empty(torch.Size(self.shape).numel(), dtype=self.dtype)
        self.copy_flat(flat)
        return flat.view(self.shape)

    def copy_flat(self, into: torch.Tensor, start: int = 0) -> None:
        """Fill `into` [n] with the elements from `start` on of the tensor laid out flat.

        Of the file only the rows around them are touched, a few at a time, and nothing of it stays mapped.
        """
        rows_at_once = max(1, CHUNK_BYTES // max(1, self.dtype.itemsize * self._width))
        stop = start + len(into)
        while start < stop:
            row = start // self._width
            end = min(stop, (row + rows_at_once) * self._width)
            into[len(into) - (stop - start) :][: end - start].copy_(self._mapped(row, start, end))
            start = end

    @property
    def _width(self) -> int:
        return torch.Size(self.shape[1:]).numel()

    def _mapped(self, row: int, start: int, end: int) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as shard:
            if not self.shape:
                return shard.get_tensor(self.stored_name).flatten()
            rows = shard.get_slice(self.stored_name)[row : -(-end // self._width)]
            return rows.flatten()[start - row * self._width : end - row * self._width]


def read_config(directory: str | Path, trust_remote_code: bool = False) -> LlavaCompeteConfig:
    """config.json of a checkpoint of ours; anything else is a `UserError` that says what was found."""
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory")
    if not path.is_file():
        raise UserError(f"{directory}: not a checkpoint directory (it has no config.json)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{path}: not a valid JSON object: {error}") from error
    if model_type != LlavaCompeteConfig.model_type:
        raise UserError(
            f"{directory}: a checkpoint of model type {model_type!r}, expected {LlavaCompeteConfig.model_type!r}; "
            "other packages' models enter as `language_model.name` or `vision_tower.name`"
        )
    register_remote_code(directory, content.get("text_config") or {}, trust_remote_code)
    return LlavaCompeteConfig.from_pretrained(directory)


def read_text_config(name: str) -> LlavaCompeteConfig | None:
    """The config of a text-only checkpoint of ours that is named as a language model, such as an imported Mixtral; None
    for any other."""
    path = Path(name) / "config.json"
    if not path.is_file() or read_json(path).get("model_type") != LlavaCompeteConfig.model_type:
        return None
    own = read_config(name)
    if own.tower is not None:
        raise UserError(f"language_model.name: {name}: has a vision tower; give it as model.checkpoint")
    return own


def read_weight_headers(directory: str | Path, stem: str = MODEL) -> dict[str, TensorFacts]:
    """Every stored tensor's place, shape and dtype by its parameter's name; reads headers only.

    stem: how the files' names begin.

    Raises:
        UserError: a truncated or missing shard.
    """
    directory = Path(directory)
    files = _weight_files(directory, stem)
    facts: dict[str, TensorFacts] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, though {index_name(stem)} lists it")
        try:
            with safe_open(file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    tensor = shard.get_slice(key)
                    dtype = DTYPES.get(tensor.get_dtype())
                    if dtype is None:
                        raise UserError(f"{file}: {key} has dtype {tensor.get_dtype()}, expected one that torch has")
                    facts[current_name(key)] = TensorFacts(file, tuple(tensor.get_shape()), dtype, key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or damaged weights ({error})") from error
    return facts


def _weight_files(directory: Path, stem: str) -> list[Path]:
    weights, index = directory / f"{stem}.safetensors", directory / index_name(stem)
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: not a valid index of shards ({error})") from error
        return [directory / name for name in sorted(names)]
    if not weights.is_file():
        raise UserError(f"{directory}: no weights (neither {weights.name} nor {index.name})")
    return [weights]


def model_on_meta(
    source: str | Path, config: LlavaCompeteConfig, headers: dict[str, TensorFacts]
) -> LlavaCompeteForConditionalGeneration:
    """The model that the weights of `headers` make, without memory for them; `source` is where they are from.

    transformers' own loader puts tensors of those names and shapes in their places: files may hold a language model's
    tensors in its original form, such as experts one by one.

    Raises:
        UserError: weights that a load would refuse.
    """
    if getattr(config, "quantization_config", None) is not None:  # stored packed, under more names
        with torch.device("meta"):
            return LlavaCompeteForConditionalGeneration(config)
    stored = {
        facts.stored_name: torch.empty(facts.shape, dtype=facts.dtype, device="meta") for facts in headers.values()
    }
    # Not our own `from_pretrained`, which says where the weights are from by the name that is not given here.
    load = super(LlavaCompeteForConditionalGeneration, LlavaCompeteForConditionalGeneration).from_pretrained
    with damage_named(str(source)):
        model, info = load(
            None,
            config=config,
            state_dict=stored,
            key_mapping=OLD_NAMES if are_old(stored) else None,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the other wrong keys
        )
    refuse_wrong_keys(str(source), info)
    return model


def load_checkpoint(
    directory: str | Path,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor]:
    """Model in eval mode and processor of a checkpoint directory.

    dtype: default that of the stored weights. `options` go to transformers' `from_pretrained`, such as
    `device_map`, `attn_implementation`, `quantization_config`; `trust_remote_code` runs the Python files that a
    language model unknown to transformers brought into the directory.
    """
    trusted = bool(options.pop("trust_remote_code", False))
    read_config(directory, trusted)
    read_weight_headers(directory)
    model = LlavaCompeteForConditionalGeneration.from_pretrained(directory, dtype=dtype or "auto", **options)
    processor = LlavaCompeteProcessor.from_pretrained(directory, trust_remote_code=trusted)
    return model.eval(), processor


def save_checkpoint(
    model: LlavaCompeteForConditionalGeneration,
    processor: LlavaCompeteProcessor,
    directory: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights (`state_dict` where ZeRO gathered one), config, tokenizer with chat template, preprocessing."""
    copy_remote_code(model.language_head.causal, directory)
    if state_dict is not None:  # gathered tensors no longer share memory, by which transformers would see the ties
        state_dict = {key: tensor for key, tensor in state_dict.items() if key not in model.all_tied_weights_keys}
    model.save_pretrained(directory, state_dict=state_dict, max_shard_size=max_shard_size)
    mode_by_umask(directory)
    processor.save_pretrained(directory)
