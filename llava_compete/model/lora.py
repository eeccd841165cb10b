"""LoRA with peft on any part: attention, dense MLPs and packed experts; and merging it into a plain checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from llava_compete.errors import UserError
from llava_compete.files import new_directory
from llava_compete.model.checkpoint import load_checkpoint, read_weight_headers, save_checkpoint
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.parameter_names import OLD_NAMES, are_old, current_name
from llava_compete.moe.experts import PackedExperts
from llava_compete.optional_packages import not_installed
from llava_compete.parts import PREFIXES, Part

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
TRAINED = "trained"  # how names of files begin with all that a stage trained: peft's own have adapters alone


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of one part: rank, alpha (the update is scaled by alpha / rank) and dropout on the adapters' input."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0


def add_adapters(model: LlavaCompeteForConditionalGeneration, parts: Mapping[Part, LoraSettings]) -> Any:
    """Wrap `model` so that the linear layers and packed experts of `parts` have adapters; returns peft's model.

    Everything else is frozen by peft; routers and output heads get no adapter. All parts share one dropout, since
    peft has one a configuration.
    """
    from peft import LoraConfig, get_peft_model

    modules: dict[str, LoraSettings] = {}
    parameters: dict[str, LoraSettings] = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        part = next((part for part in parts if f"{name}.".startswith(PREFIXES[part])), None)
        if part is None:
            continue
        if isinstance(module, PackedExperts):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    parameters[f"{name}.{key}"] = parts[part]
        elif isinstance(module, nn.Linear | nn.MultiheadAttention) and module is not head:
            modules[name] = parts[part]
    # An attention module of torch is adapted as a whole: its output projection is not called on its own.
    modules = {name: setting for name, setting in modules.items() if name.rpartition(".")[0] not in modules}
    adapted = (*modules, *parameters)
    for part in parts:
        if not any(name.startswith(PREFIXES[part]) for name in adapted):
            raise UserError(f"lora: the model has no linear layers in {part}; let it train in full, or be frozen")
    dropouts = {setting.dropout for setting in parts.values()}
    if len(dropouts) > 1:
        raise UserError(f"lora_dropout: found {sorted(dropouts)}, expected the same for all parts")
    dropout = dropouts.pop()
    if dropout and parameters:
        raise UserError(f"lora_dropout: found {dropout}, expected 0, since adapters of packed experts cannot have any")
    targets = {**modules, **parameters}
    config = LoraConfig(
        target_modules=list(modules),
        target_parameters=list(parameters) or None,
        rank_pattern={name: setting.rank for name, setting in targets.items()},
        alpha_pattern={name: setting.alpha for name, setting in targets.items()},
        r=next(iter(targets.values())).rank,
        lora_alpha=int(next(iter(targets.values())).alpha),
        lora_dropout=dropout,
    )
    with _bitsandbytes_for(model):
        from llava_compete.model.lora_attention import use_for_attention

        return get_peft_model(model, use_for_attention(config))


def load_adapter(model: LlavaCompeteForConditionalGeneration, adapter: str | Path) -> Any:
    """Wrap `model` with the adapters of a directory, and with the parts that trained in full beside them.

    Returns:
        peft's model.

    Raises:
        UserError: no adapter there, one of another model, or one that lacks some of its tensors.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    adapter = Path(adapter)
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise UserError(f"{adapter}: not an adapter directory (it has no {ADAPTER_CONFIG})")
    try:
        config = PeftConfig.from_pretrained(adapter)
        mapping = OLD_NAMES if _rename(config) else {}
        with _bitsandbytes_for(model):
            from llava_compete.model.lora_attention import use_for_attention

            use_for_attention(config)
            adapted = PeftModel.from_pretrained(model, adapter, config=config, key_mapping=mapping)
        stored = load_peft_weights(str(adapter), device="cpu", key_mapping=mapping)
        unknown = _load_trained(adapted, adapter)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(f"{adapter}: does not fit {model.name_or_path}: {str(error).splitlines()[0]}") from error
    # peft only warns of tensors that are not there, and they would change nothing.
    missing = sorted(get_peft_model_state_dict(adapted).keys() - stored.keys())
    if missing or unknown:
        of_trained = f"{TRAINED}.safetensors has {len(unknown)} unknown"
        what = f"lacks {len(missing)} of its tensors" if missing else of_trained
        raise UserError(f"{adapter}: {what}, such as {(missing or unknown)[0]}")
    return adapted


def _load_trained(adapted: Any, adapter: Path) -> list[str]:
    """Put what trained beside the adapters in its place, if any did; returns names that the model does not have."""
    if not any(adapter.glob(f"{TRAINED}.safetensors*")):
        return []
    return load_trained(adapted, adapter)[1]


def load_trained(adapted: Any, directory: Path) -> tuple[set[str], list[str]]:
    """Put all that a stage trained in its place in peft's model; returns the tensors' names, and the unknown ones."""
    stored = read_weight_headers(directory, TRAINED)
    result = adapted.load_state_dict({name: facts.whole() for name, facts in stored.items()}, strict=False)
    return set(stored), list(result.unexpected_keys)


def _rename(config: Any) -> bool:
    """Give the modules that an adapter names their names of today; whether any had another."""
    old = False
    for key in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        names = getattr(config, key) or ()
        if not isinstance(names, str) and are_old(f"{name}." for name in names):
            old = True
            new = [current_name(f"{name}.").removesuffix(".") for name in names]
            setattr(config, key, dict(zip(new, names.values(), strict=True)) if isinstance(names, dict) else new)
    return old


@contextmanager
def _bitsandbytes_for(model: LlavaCompeteForConditionalGeneration) -> Iterator[None]:
    """Let peft see bitsandbytes only for a quantised `model`, which has imported it: any other would import it in vain.

    peft remembers what it finds, so a quantised model later in this process must make it look again.
    """
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    if getattr(model, "is_quantized", False):
        yield
        return
    try:
        with not_installed("bitsandbytes"):
            yield
    finally:
        is_bnb_available.cache_clear()
        is_bnb_4bit_available.cache_clear()


def merge_adapters(adapter: str | Path, output_dir: str | Path, checkpoint: str | Path | None = None) -> None:
    """Write the plain checkpoint that answers as `checkpoint` with `adapter` does.

    checkpoint: default the one that the adapter names as its base.
    """
    adapter, output_dir = Path(adapter), Path(output_dir)
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{adapter}: not an adapter directory (it has no {ADAPTER_CONFIG})")
    base = checkpoint or json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}: names no base checkpoint; give one with --checkpoint")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir}: not empty; choose another --out")
    model, processor = load_checkpoint(base)
    merged = load_adapter(model, adapter).merge_and_unload()
    merged.config.parents = [*model.config.parents, model.config.stage]
    merged.config.stage = "merge"
    with new_directory(output_dir) as partial:
        save_checkpoint(merged, processor, partial)
