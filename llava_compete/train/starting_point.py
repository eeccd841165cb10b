"""What a stage starts from: a fresh model or the checkpoint of an earlier stage, checked to be of a fitting kind."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from llava_compete.config import parse_config
from llava_compete.data.config import DataSection
from llava_compete.data.records import message_texts
from llava_compete.data.tables import load_source
from llava_compete.data.text.config import TextSection
from llava_compete.data.text.sources import read_source
from llava_compete.errors import UserError
from llava_compete.language.sources import missing_control_tokens
from llava_compete.language.tokenizer import train_byte_level_bpe
from llava_compete.model.build import build_model, build_unread, refuse_other_architecture
from llava_compete.model.checkpoint import read_config
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.terms import still_used
from llava_compete.train.config import TrainConfig

if TYPE_CHECKING:  # `plan` reads recipes with this module where DeepSpeed is not installed
    from llava_compete.train.distributed import Rank

_TOKENIZER_DOCUMENTS = 200_000


# Below the output directory: what rank 0 hands over to the others (`model.handover`); gone once they have read it.
HANDOVER = Path("run") / "start"


def start_model(config: TrainConfig, rank: Rank, *, unread: bool = False) -> tuple[Any, Any, MoeConfig | None]:
    """Model (its config's stage and parents set), processor, and the MoE settings in force.

    Rank 0 must get here before the others: it trains the tokenizer, where the config asks for one, and they read it.

    unread: leave weights in files (`model.unread`), those of a new model in HANDOVER.
    """
    stored = None
    if config.model.checkpoint is None:
        _refuse_untrained_tokens(config)
        moe, tokenizer = config.moe or None, _tokenizer(config, rank)
    else:
        stored, tokenizer = read_config(config.model.checkpoint, config.model.trust_remote_code), None
        moe = moe_in_force(config, stored.moe)
    if unread:
        place = config.output_dir / HANDOVER
        model, processor = build_unread(config.model, moe, config.seed, tokenizer, place, makes=rank.is_main)
    else:
        model, processor = build_model(config.model, moe, config.seed, tokenizer)
    if stored is not None:
        model.config.parents = [*(stored.parents or []), stored.stage]
    model.config.stage = config.stage
    if moe is not None and rank.is_main:
        moe.warn_of_untaught_routers()
        moe.warn_of_moved_starts()
    return model, processor, moe


def _refuse_untrained_tokens(config: TrainConfig) -> None:
    """New control tokens have random embeddings, which neither a frozen language model nor adapters would train."""
    section, language = config.model, config.model.language_model
    training = config.trainable.get("language")
    mode = "frozen" if training is None else training.mode
    if language is None or language.name is None or section.chat_template is None or mode == "full":
        return
    new = missing_control_tokens(language, section.tokenizer, section.chat_template, section.trust_remote_code)
    if new:
        raise UserError(
            f"model.chat_template: {section.chat_template!r} needs {', '.join(new)}, which {language.name} does not "
            f"know, and trainable.language is {mode}: their embeddings would stay random; choose a template without "
            "new tokens (such as plain or vicuna_v1), or train the language model in full"
        )


def moe_settings(config: TrainConfig) -> MoeConfig | None:
    """The MoE settings in force, without the model."""
    if config.model.checkpoint is None:
        return config.moe or None
    return moe_in_force(config, read_config(config.model.checkpoint, config.model.trust_remote_code).moe)


def _tokenizer(config: TrainConfig, rank: Rank) -> Any:
    section = config.model.tokenizer
    if section is None or section.train_on is None:
        return None
    folder = config.output_dir / "run" / "tokenizer"
    if rank.is_main:
        train_byte_level_bpe(_texts(config.data), section.vocab_size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _texts(section: DataSection | TextSection) -> Iterator[str]:
    """Every text of the stage's data, for the tokenizer; of endless text the beginning."""
    if isinstance(section, TextSection):
        yield from itertools.islice(read_source(section.train), _TOKENIZER_DOCUMENTS)
        return
    for source in section.sources:
        for row in load_source(source, section.cache_dir).rows:
            yield from message_texts(json.loads(row["messages"]))


def moe_in_force(config: TrainConfig, stored: dict[str, Any] | None) -> MoeConfig | None:
    """The checkpoint's settings with the config's laid over; refuses a checkpoint of the wrong kind."""
    checkpoint = config.model.checkpoint
    if stored is None:
        if config.moe:
            raise UserError(f"{checkpoint}: has no MoE blocks, but the config has a moe section; run upcycle first")
        if config.stage == "sft" and config.moe is None:
            raise UserError(
                f"{checkpoint}: a dense checkpoint, but sft trains a MoE; run upcycle first, "
                "or set moe=false to train the dense baseline"
            )
        return None
    if config.moe is False:
        raise UserError(f"{checkpoint}: has MoE blocks, but the config says moe: false")
    if config.stage in ("pretrain_align", "pft"):
        raise UserError(f"{checkpoint}: has MoE blocks, but {config.stage} trains a dense model (upcycle comes after)")
    changes = config.moe.model_dump(exclude_unset=True, mode="json") if config.moe else {}
    for part, values in changes.items():
        if isinstance(values, dict) and isinstance(stored.get(part), dict):
            stored = {**stored, part: still_used(stored[part], values)}
    refuse_other_architecture(stored, changes)  # before validation, which would blame settings kept from the checkpoint
    return parse_config(MoeConfig, _overlaid(stored, changes), source=f"{checkpoint} with the config's moe")


def _overlaid(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        merged[key] = _overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
