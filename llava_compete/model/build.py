"""Put a model together from a YAML's `model:` section: load a checkpoint, or join tower, projector and language model.

Everything random is drawn after `seed` is set.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import stop_token_ids
from llava_compete.language.sources import load_language_model, load_tokenizer, text_config_of
from llava_compete.language.templates import set_chat_template
from llava_compete.language.tokenizer import add_image_token
from llava_compete.model.checkpoint import (
    load_checkpoint,
    read_text_config,
    read_weight_headers,
    save_checkpoint,
)
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.dtypes import cast
from llava_compete.model.handover import language_headers, read_embeddings, read_handover, write_handover
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.place_experts import make_projector, make_tower
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.model.section import ModelSection
from llava_compete.model.unread import load_unread, stored_otherwise
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor
from llava_compete.vision.naflex_tower import NaFlexTower
from llava_compete.vision.projector import check_pool
from llava_compete.vision.sources import load_pretrained, resolve_tower
from llava_compete.vision.tower import VisionTower

__all__ = ["build_config", "build_model", "load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)


def build_model(
    section: ModelSection, moe: MoeConfig | None, seed: int, tokenizer: Any = None
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor]:
    """Model (float parameters in `section.dtype`, on the CPU, training mode) and processor.

    moe: for a checkpoint, settings to lay over its own; for a new model, experts with random weights from the start.
    tokenizer: the one trained on the run's data where the section says so.
    """
    _begin(section, seed)
    model, processor = _load(section, moe) if section.checkpoint is not None else _make(section, moe, tokenizer)
    return _finished(model, section), processor


def build_unread(
    section: ModelSection, moe: MoeConfig | None, seed: int, tokenizer: Any, directory: Path, *, makes: bool
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor]:
    """The same with weights that are still in files (`unread.py`); quantised ones are there.

    directory: where a model is handed over (`handover.py`) whose weights do not lie anywhere as they are in the model.
    makes: whether this process writes there first; the others come after it.
    """
    _begin(section, seed)
    if section.quantization is not None:
        return build_model(section, moe, seed)
    found = None
    if section.checkpoint is not None and (found := load_unread(section.checkpoint, **_options(section))) is not None:
        _lay_over(*found, section, moe)
    if found is None:
        if makes:
            new = section.checkpoint is None
            write_handover(*(_make(section, moe, tokenizer, unread=True) if new else _load(section, moe)), directory)
        elif not directory.is_dir():
            raise UserError(
                f"{directory}: rank 0 wrote the new model there, and this process does not see it; with ZeRO-3 "
                "output_dir must lie on a disk that all nodes share"
            )
        found = read_handover(directory, section)
    return _finished(found[0], section), found[1]


def _begin(section: ModelSection, seed: int) -> None:
    torch.manual_seed(seed)
    _check_attention(section)


def _finished(
    model: LlavaCompeteForConditionalGeneration, section: ModelSection
) -> LlavaCompeteForConditionalGeneration:
    if model.vision_tower is not None and section.tile_batch is not None:
        _set_tile_batch(model.vision_tower, section.tile_batch)
    return model.train()


def _set_tile_batch(tower: VisionTower, tile_batch: int) -> None:
    if moe_blocks(tower):
        raise UserError(
            f"model.tile_batch: found {tile_batch}, but the tower has experts (moe.vision), whose routing losses are "
            "of a whole micro-batch; lower training.per_device_train_batch_size in its place"
        )
    if isinstance(tower, NaFlexTower):
        raise UserError(
            f"model.tile_batch: found {tile_batch}, but a NaFlex tower takes all pictures of a micro-batch at once; "
            "lower model.vision_tower.naflex.max_patches in its place"
        )
    tower.tile_batch = tile_batch


def _options(section: ModelSection) -> dict[str, Any]:
    """How a checkpoint is loaded."""
    attention = {} if section.attention is None else {"attn_implementation": section.attention}
    dtype = getattr(torch, section.dtype)
    return {**attention, "dtype": dtype, "trust_remote_code": section.trust_remote_code}


def _load(
    section: ModelSection, moe: MoeConfig | None
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor]:
    """The checkpoint that `section` names, with what `section` and `moe` lay over it."""
    assert section.checkpoint is not None
    model, processor = load_checkpoint(section.checkpoint, **_options(section), **_quantized(section))
    _lay_over(model, processor, section, moe)
    return model, processor


def _lay_over(
    model: LlavaCompeteForConditionalGeneration,
    processor: LlavaCompeteProcessor,
    section: ModelSection,
    moe: MoeConfig | None,
) -> None:
    """The section's chat template where it names one, and the MoE settings."""
    if section.chat_template is not None:
        _refuse_growth(set_chat_template(processor.tokenizer, section.chat_template), section)
        processor.chat_template = processor.tokenizer.chat_template
        model.generation_config = default_generation_config(processor.tokenizer, model.config)
    if moe is not None:
        apply_moe_settings(model, moe)


def _make(
    section: ModelSection, moe: MoeConfig | None, trained_tokenizer: Any, *, unread: bool = False
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor]:
    """A new model out of its parts: language model's config and tokenizer, the tower, the whole config, the weights.

    unread: leave the language model on the meta device where its files have its tensors as they are in the model.
    """
    text_config, tokenizer = _language_of(section, trained_tokenizer)
    config = build_config(section, moe, text_config, tokenizer)
    config.dtype = getattr(torch, section.dtype)
    model = cast(_join(section, config, tokenizer, unread), config.dtype)
    model.generation_config = default_generation_config(tokenizer, config)
    return model, processor_of(config, tokenizer)


def processor_of(config: LlavaCompeteConfig, tokenizer: Any) -> LlavaCompeteProcessor:
    """The processor of a model of this config with this tokenizer."""
    image_processor = (
        None if config.tower is None else LlavaCompeteImageProcessor.from_tower(config.tower, config.projector.pool)
    )
    return LlavaCompeteProcessor(image_processor, tokenizer, num_image_tokens=config.num_image_tokens)


def _check_attention(section: ModelSection) -> None:
    """Say in one line that a flash kernel is asked for and not there; nothing else needs one."""
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if section.attention in installed and not installed[section.attention]():
        raise UserError(
            f"model.attention: {section.attention} needs a CUDA GPU and its package, which are not both here; "
            "leave the key out for sdpa"
        )


def _quantized(section: ModelSection) -> dict[str, Any]:
    """`from_pretrained` options for the frozen language model of QLoRA (arXiv 2305.14314)."""
    if section.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization: found {section.quantization}, which needs `pip install bitsandbytes`")
    quantization = BitsAndBytesConfig(
        load_in_4bit=section.quantization == "4bit",
        load_in_8bit=section.quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=section.dtype,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


def build_processor(section: ModelSection, tokenizer: Any = None) -> LlavaCompeteProcessor:
    """The processor of a new model, without the model: for checks of the data before training."""
    text_config, tokenizer = _language_of(section, tokenizer)
    return processor_of(build_config(section, None, text_config, tokenizer), tokenizer)


def _language_of(section: ModelSection, trained: Any) -> tuple[PreTrainedConfig, Any]:
    """Config and tokenizer of the language model that `section` names."""
    assert section.language_model is not None
    text_config = text_config_of(section.language_model, trust_remote_code=section.trust_remote_code)
    tokenizer = load_tokenizer(
        section.language_model,
        section.tokenizer,
        text_config,
        trained=trained,
        chat_template=section.chat_template,
        trust_remote_code=section.trust_remote_code,
    )
    return text_config, tokenizer


def build_config(
    section: ModelSection, moe: MoeConfig | None, text_config: PreTrainedConfig, tokenizer: Any = None
) -> LlavaCompeteConfig:
    """config.json of a new model; without a tokenizer (`plan`) the vocabulary is what the section says."""
    tower = None if section.vision_tower is None else resolve_tower(section.vision_tower)
    if tower is not None:
        check_pool(section.projector, tower)
    language = section.language_model
    if language is not None and language.name is None and "vocab_size" not in (language.config or {}):
        if tokenizer is not None:
            text_config.vocab_size = len(tokenizer)
        elif section.tokenizer is not None and section.tokenizer.train_on is not None:
            text_config.vocab_size = section.tokenizer.vocab_size
    if tokenizer is not None:
        text_config.pad_token_id = tokenizer.pad_token_id
        text_config.eos_token_id = tokenizer.eos_token_id
        text_config.bos_token_id = tokenizer.bos_token_id
    config = LlavaCompeteConfig(
        vision_config=None if tower is None else tower.model_dump(mode="json"),
        projector_config=None if tower is None else section.projector.model_dump(mode="json"),
        text_config=text_config,
        moe=None if moe is None else moe.of_model(),
        image_token_id=None if tokenizer is None else add_image_token(tokenizer),
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    if section.attention is not None:
        config._attn_implementation = section.attention
    return config


def _join(
    section: ModelSection, config: LlavaCompeteConfig, tokenizer: Any, unread: bool
) -> LlavaCompeteForConditionalGeneration:
    """The model with every part's weights: pretrained where named, else random."""
    language = section.language_model
    assert language is not None
    new_parts = []
    if language.name is None:
        model = LlavaCompeteForConditionalGeneration(config)
        new_parts.append("language_model (no name given)")
    elif (own := read_text_config(language.name)) is not None:
        model = _join_own(section, config, own, config.moe, unread)
    else:
        if config.moe is not None:
            raise UserError(
                "moe: experts of a pretrained model come from `llava-compete upcycle`, not from random weights"
            )
        language_model = _language_model(section, unread)
        tied = language_model.config.tie_word_embeddings
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        with torch.device("meta"):
            model = LlavaCompeteForConditionalGeneration(config)
        model.set_language_model(language_model)
        _add_new_eyes(model)
    if model.vision_tower is not None and section.vision_tower is not None:
        new_parts.append("projector")
        if not load_pretrained(model.vision_tower, section.vision_tower):
            new_parts.append("vision_tower (no pretrained weights named)")
    _fit_vocabulary(model, tokenizer, language.name)
    logger.info("new parts with random weights: %s", ", ".join(new_parts) or "none")
    return model


def _language_model(section: ModelSection, unread: bool) -> Any:
    language = section.language_model
    assert language is not None
    options: dict[str, Any] = {"attention": section.attention, "trust_remote_code": section.trust_remote_code}
    if unread and (headers := language_headers(str(language.name))):
        model = load_language_model(language, **options, on_meta=True)
        if (name := stored_otherwise(model, headers)) is None:
            return model
        logger.info("%s: %s is stored in another form, so that one process reads the model whole", language.name, name)
    return load_language_model(language, **options)


def _add_new_eyes(model: LlavaCompeteForConditionalGeneration) -> None:
    """Tower and projector with random weights, where the model has them on the meta device."""
    config = model.config
    if config.tower is not None:
        model.model.vision_tower = make_tower(config.tower)
        model.model.multi_modal_projector = make_projector(config, None, model.routing)


def _join_own(
    section: ModelSection, config: LlavaCompeteConfig, own: LlavaCompeteConfig, moe: dict[str, Any] | None, unread: bool
) -> LlavaCompeteForConditionalGeneration:
    """A model whose language part, experts included, is that of a text-only checkpoint of ours."""
    assert section.language_model is not None
    name, options = section.language_model.name or "", {**_options(section), "trust_remote_code": False}
    loaded = None
    if unread:
        loaded, _ = load_checkpoint(name, device_map={"": "meta"}, **options)
        if stored_otherwise(loaded, read_weight_headers(name)) is not None:
            loaded = None
    if loaded is None:
        loaded, _ = load_checkpoint(name, **options)
    config.moe = own.moe
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = own.tie_word_embeddings
    with torch.device("meta"):
        model = LlavaCompeteForConditionalGeneration(config)
    model.adopt_language_model(loaded)
    _add_new_eyes(model)
    if moe is not None:
        apply_moe_settings(model, MoeConfig.model_validate(moe))
    return model


def _fit_vocabulary(model: LlavaCompeteForConditionalGeneration, tokenizer: Any, name: str | None) -> None:
    """Grow the embeddings where the tokenizer has more tokens than the language model `name`."""
    size = _vocabulary(model)
    if len(tokenizer) > size:
        logger.info("vocabulary grows from %d to %d for the tokenizer's new tokens", size, len(tokenizer))
        if name is not None:
            read_embeddings(model, name)
        model.resize_token_embeddings(len(tokenizer))
        model.config.text_config.vocab_size = _vocabulary(model)


def _vocabulary(model: LlavaCompeteForConditionalGeneration) -> int:
    return int(model.get_input_embeddings().get_parameter("weight").shape[0])


def default_generation_config(tokenizer: Any, config: LlavaCompeteConfig) -> GenerationConfig:
    """Greedy; ends where the template's turns end; never writes an image placeholder."""
    return GenerationConfig(
        eos_token_id=stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=[config.image_token_id],
    )


def apply_moe_settings(model: LlavaCompeteForConditionalGeneration, moe: MoeConfig) -> None:
    """Lay `moe` over a loaded checkpoint: schedule, coefficients and kernels may change, the architecture may not."""
    check_moe_settings(model.config, moe)
    model.config.moe = moe.of_model()
    for block in moe_blocks(model).values():
        block.configure(moe.parts()[block.part])


def check_moe_settings(config: LlavaCompeteConfig, moe: MoeConfig) -> None:
    """Raise a `UserError` that names the key by which `moe` would change the architecture of a checkpoint."""
    if config.moe is None:
        raise UserError("moe: the checkpoint is dense; make experts with `llava-compete upcycle` first")
    stored = MoeConfig.model_validate(config.moe)
    if set(stored.parts()) != set(moe.parts()):
        raise UserError(f"moe: found parts {sorted(moe.parts())}, the checkpoint has {sorted(stored.parts())}")
    refuse_other_architecture(config.moe, moe.of_model())


def refuse_other_architecture(stored: dict[str, Any], changes: dict[str, Any]) -> None:
    """Raise a `UserError` for the first key of `changes`, plain MoE settings, by which the weights would not fit."""
    for part, layer in changes.items():
        if not (isinstance(layer, dict) and isinstance(stored.get(part), dict)):
            continue
        for key in ("num_experts", "num_experts_per_tok", "router", "layers", "autonomy_rank"):
            found, expected = layer.get(key), stored[part].get(key)
            if None not in (found, expected) and found != expected:
                raise UserError(f"moe.{part}.{key}: found {found!r}, the checkpoint has {expected!r}")


def _refuse_growth(num_added: int, section: ModelSection) -> None:
    if num_added:
        raise UserError(
            f"model.chat_template: {section.chat_template!r} needs {num_added} tokens that the checkpoint does not have"
        )
