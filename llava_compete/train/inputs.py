"""What a stage trains on, in one shape for conversations and for text: rows, micro-batches, collator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from llava_compete.data.collator import Collator
from llava_compete.data.config import DataSection
from llava_compete.data.dataset import build_datasets
from llava_compete.data.sampler import GlobalBatchSampler
from llava_compete.data.tables import load_source
from llava_compete.data.text.batches import TextBatchSampler, TextCollator
from llava_compete.data.text.config import TextSection
from llava_compete.data.text.rows import HeldOutRows, TextRows
from llava_compete.errors import UserError
from llava_compete.train.config import TrainConfig
from llava_compete.train.distributed import Rank
from llava_compete.train.image_files import check_images_are_there


class Feed(NamedTuple):
    """Training and held-out rows, this rank's micro-batches of row numbers, and how rows become a batch.

    mean_length: tokens of an average row, estimated before it is read.
    """

    train: Any
    validation: Dataset | None
    batch_sampler: Any
    collator: Callable[[Any], dict[str, Any]]
    digest: str
    mean_length: int
    stats: dict[str, Any]


def check_sources(section: DataSection | TextSection) -> None:
    """Open conversations' sources and look for a sample of their images, before a model is loaded for them."""
    if isinstance(section, DataSection):
        for source in section.sources:
            table = load_source(source, section.cache_dir)
            check_images_are_there(table, may_skip=section.on_bad_image == "skip")


def build_feed(config: TrainConfig, rank: Rank, arguments: Any, processor: Any) -> Feed:
    """Open the data of `config` for this rank."""
    micro = arguments.per_device_train_batch_size
    global_batch = micro * arguments.gradient_accumulation_steps * rank.world_size
    if isinstance(config.data, TextSection):
        return _text(config, config.data, rank, arguments.max_steps, global_batch, micro, processor.tokenizer)
    data = build_datasets(config.data, processor, config.seed)
    sampler = GlobalBatchSampler(
        data.train.lengths,
        data.train.modalities,
        global_batch,
        micro,
        rank.world_size,
        rank.number,
        config.seed,
        data.mixture,
    )
    collator = Collator(processor, config.data.max_length if config.data.packing else None)
    mean_length = max(1, int(data.train.lengths.clip(max=config.data.max_length).mean()))
    return Feed(data.train, data.validation, sampler, collator, data.digest, mean_length, data.stats)


def _text(
    config: TrainConfig, section: TextSection, rank: Rank, steps: int, global_batch: int, micro: int, tokenizer: Any
) -> Feed:
    if steps <= 0:
        raise UserError("training.max_steps: needed for pretrain_lm, whose text has no end")
    sampler = TextBatchSampler(steps, global_batch, micro, rank.world_size, rank.number)
    train = TextRows(
        section,
        tokenizer,
        config.seed,
        sampler.streams(section.shards),
        num_rows=steps * global_batch,
        marks=config.output_dir / "run" / "text_marks",
    )
    held_out = section.validation is not None or section.validation_fraction > 0
    validation = HeldOutRows(section, tokenizer) if held_out else None
    stats = {"context": section.context, "held_out_rows": len(validation) if validation else 0}
    collator = TextCollator(section.separate_documents)
    return Feed(train, validation, sampler, collator, train.key, section.context, stats)
