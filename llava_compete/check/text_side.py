"""The tokenizer and image size that a stage will train with, for counting tokens before the stage runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from llava_compete.check.row_checks import TextSide
from llava_compete.config import parse_config
from llava_compete.data.config import DataSection
from llava_compete.data.records import RecordError, message_texts, parse_row
from llava_compete.data.source_files import SourceError, read_rows
from llava_compete.language.sources import context_of, text_config_of
from llava_compete.language.templates import set_chat_template
from llava_compete.language.tokenizer import train_byte_level_bpe
from llava_compete.model.build import build_processor
from llava_compete.model.checkpoint import read_config
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.model.section import ModelSection

log = logging.getLogger(__name__)


def text_side_of(model: dict[str, Any], section: DataSection, source: str) -> TextSide | None:
    """From a config's `model:`; None where its checkpoint is made by a stage that has not run yet.

    Raises:
        UserError: rows may be longer than the model's context.
    """
    config = parse_config(ModelSection, model, source=f"{source}: model")
    if config.checkpoint is not None:
        if not (config.checkpoint / "config.json").is_file():
            log.warning("%s: not there yet", config.checkpoint)
            return None
        text_config = read_config(config.checkpoint, config.trust_remote_code).text_config
        section.check_context(context_of(text_config))
        processor = LlavaCompeteProcessor.from_pretrained(config.checkpoint)
        if config.chat_template is not None:
            set_chat_template(processor.tokenizer, config.chat_template)
    else:
        assert config.language_model is not None
        section.check_context(
            context_of(text_config_of(config.language_model, trust_remote_code=config.trust_remote_code))
        )
        trained = None
        if config.tokenizer is not None and config.tokenizer.train_on is not None:
            trained = train_byte_level_bpe(_texts(section), config.tokenizer.vocab_size)
        processor = build_processor(config, trained)
    tiling = processor.tiling
    section.check_tiles(tiling)
    return TextSide(processor.tokenizer, processor.num_image_tokens, tiling)


def _texts(section: DataSection) -> Iterator[str]:
    """Every text of the rows that can be read."""
    for source in section.sources:
        with contextlib.suppress(SourceError):  # a source that cannot be opened: the check names it
            for raw in read_rows(source.path):
                try:
                    conversation = parse_row(raw, default_id="")
                except RecordError:
                    continue
                yield from message_texts(conversation.messages)
