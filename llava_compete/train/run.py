"""One training stage from config to a finished, self-contained model directory.

Reads as the stage happens: process group, lock, model, data, trainer, train, save, mark as finished. Called by
`llava-compete train` on every rank of the launcher. Everything a rank refuses is refused by all ranks together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from deepspeed.utils import set_z3_leaf_modules, z3_leaf_module
from transformers import set_seed
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from llava_compete.console import setup_console
from llava_compete.errors import UserError
from llava_compete.language.sources import context_of
from llava_compete.manifest import write_manifest
from llava_compete.model.checkpoint import read_config
from llava_compete.moe.allocator import keep_freed_memory
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.train import checkpoints, trainable
from llava_compete.train import resharding as universal
from llava_compete.train.adapters import with_adapters
from llava_compete.train.arguments import build_arguments
from llava_compete.train.callbacks.between_steps import CompetitionCallback, StepCallback
from llava_compete.train.callbacks.progress import AnswersCallback, WatchCallback
from llava_compete.train.callbacks.tensorboard import ResumedTensorBoardCallback
from llava_compete.train.config import DEEPSPEED_DIR, TrainConfig
from llava_compete.train.distributed import Rank, all_or_none, main_first, of_main, process_group, this_rank
from llava_compete.train.inputs import Feed, build_feed
from llava_compete.train.mfu import Utilisation, count_flops, device_peak
from llava_compete.train.preflight import (
    check_alike,
    check_links,
    check_same,
    check_space,
    comparable_settings,
    log_devices,
)
from llava_compete.train.starting_point import start_model
from llava_compete.train.stopping import StopOnSignal
from llava_compete.train.trainer import StageTrainer
from llava_compete.train.waiting import wait_for_all

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, allow_changed: bool = False) -> bool:
    """Run the stage, or go on with it; a stage that has finished is left as it is.

    Returns:
        whether the stage has finished; false where it was told to stop before its end.

    Raises:
        UserError: anything a user can mend, on all ranks alike.
    """
    rank = this_rank()
    with ExitStack() as stack:
        store = stack.enter_context(process_group(rank))
        if not rank.on_gpu:
            keep_freed_memory()
        config.output_dir.mkdir(parents=True, exist_ok=True)
        setup_console(config.output_dir / "run" / "console.log", rank.number)
        disable_progress_bar()
        check_links(rank, store)
        check_same(rank, comparable_settings(config))
        log_devices(rank)
        finished = False
        with all_or_none(rank, "output directory"):
            if rank.is_main:
                stack.enter_context(checkpoints.output_lock(config.output_dir))
                finished = _already_finished(config)
        if of_main(finished):
            logger.info("%s: stage %s has finished already", config.output_dir, config.stage)
            return True
        check_alike(rank, config.output_dir)
        return _run(config, rank, allow_changed)


def _already_finished(config: TrainConfig) -> bool:
    """Whether nothing is left to do; a directory with the model of another stage is not written over."""
    if (config.output_dir / "config.json").is_file():
        stage = read_config(config.output_dir).stage
        if stage != config.stage:
            raise UserError(
                f"{config.output_dir}: holds the model of stage {stage!r}, found stage {config.stage!r}; "
                "choose another output_dir"
            )
    return checkpoints.read_finished(config.output_dir) is not None


def _run(config: TrainConfig, rank: Rank, allow_changed: bool) -> bool:
    with all_or_none(rank, "training arguments"):
        arguments = build_arguments(
            config.training,
            output_dir=config.output_dir,
            seed=config.seed,
            deepspeed=DEEPSPEED_DIR / f"{config.deepspeed}.json" if config.deepspeed else None,
            on_gpu=rank.on_gpu,
        )
    set_seed(config.seed)
    with all_or_none(rank, "model"), main_first(rank):
        sharding = getattr(arguments, "hf_deepspeed_config", None)
        with _whole(sharding):
            model, processor, moe = start_model(config, rank)
        config.data.check_context(context_of(model.config.text_config))
        if sharding is not None and sharding.is_zero3():
            _gather_whole(model)
        model = with_adapters(model, config.trainable)
        trainable.apply(model, config.trainable)
    with all_or_none(rank, "data"), main_first(rank):
        data = build_feed(config, rank, arguments, processor)
        if data.validation is None and (config.sample_steps or arguments.eval_strategy != "no"):
            key = "sample_steps" if config.sample_steps else "training.eval_strategy"
            raise UserError(f"{key}: needs held-out rows; set data.validation_fraction")
    check_same(rank, {"data (digest)": data.digest})
    trainer = _build_trainer(config, rank, arguments, model, processor, data)
    competition = CompetitionCallback(trainer, moe)
    with _whole(sharding):
        utilisation = _utilisation(trainer, data)
    steps = StepCallback(trainer, competition, utilisation)
    watch = WatchCallback(trainer, config.output_dir / "run" / "metrics.jsonl")
    answers = AnswersCallback(trainer, config.output_dir / "run" / "answers.jsonl")
    for callback in (competition, steps, watch, answers):
        trainer.add_callback(callback)
    checkpoint, resharded = None, False
    with all_or_none(rank, "checkpoint"):
        if rank.is_main:
            checkpoint, resharded = _checkpoint_to_resume(config, trainer.identity, allow_changed)
            rows = _trainable_rows(config, trainer)
            check_space(config.output_dir, sum(r.parameters for r in rows), sum(r.trainable_parameters for r in rows))
    checkpoint, resharded = of_main((checkpoint, resharded))
    if resharded and sharding is not None:
        universal.load_universal(sharding)
    if rank.is_main:
        _describe(config, trainer, data, moe)
    started = time.perf_counter()
    with StopOnSignal(trainer), closing(watch):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        logger.info("stopped at step %d; the same command goes on from here", trainer.state.global_step)
        return False
    _save_final(config, trainer, rank)
    if rank.is_main:
        summary = {
            "stage": config.stage,
            "train_seconds": time.perf_counter() - started,
            "steps": trainer.state.global_step,
            "tokens": steps.tokens,
            "samples": steps.samples,
            "competition_steps": competition.count(trainer.state.max_steps),
            "competition_overhead": steps.competition_overhead(),
        }
        watch.write_end(summary)
        checkpoints.write_finished(config.output_dir, summary)
        if (overhead := summary["competition_overhead"]) is not None:
            logger.info("competitions added %.1f%% to the step time", 100 * overhead)
        logger.info("%s: wrote the %s model to %s", config.stage, config.stage, config.output_dir)
    return True


@contextmanager
def _whole(sharding: Any) -> Iterator[None]:
    """Models are built whole inside, never under zero.Init: DeepSpeed shards afterwards (design rule 6)."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            set_hf_deepspeed_config(sharding)


def _zero_stage(arguments: Any) -> int:
    """1 to 3; 0 without DeepSpeed."""
    sharding = getattr(arguments, "hf_deepspeed_config", None)  # set by TrainingArguments only with DeepSpeed
    return sharding.get_value("zero_optimization.stage", 0) if sharding is not None else 0


def _gather_whole(model: Any) -> None:
    """Mark what ZeRO-3 must gather as one: it hangs where parameters are used outside their module."""
    set_z3_leaf_modules(model, model.zero3_leaf_modules)
    bare = [name for name, block in moe_blocks(model).items() if not z3_leaf_module(block)]
    if bare:
        raise RuntimeError(f"ZeRO-3 would gather these MoE blocks piece by piece: {', '.join(bare)}")


def _build_trainer(
    config: TrainConfig, rank: Rank, arguments: Any, model: Any, processor: Any, data: Feed
) -> StageTrainer:
    identity = {
        "stage": config.stage,
        "seed": config.seed,
        "data_digest": data.digest,
        "world_size": rank.world_size,
        "zero_stage": _zero_stage(arguments),
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "max_steps": arguments.max_steps,
        "num_train_epochs": arguments.num_train_epochs,
    }
    trainer = StageTrainer(
        config=config,
        batch_sampler=data.batch_sampler,
        identity=identity,
        model=model,
        args=arguments,
        data_collator=data.collator,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
    )
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(ResumedTensorBoardCallback)
    # The watch callback shows the bar and the line.
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _utilisation(trainer: StageTrainer, data: Feed) -> Utilisation | None:
    """What the log's MFU is a share of, where the device's peak is known."""
    peak = device_peak(trainer.args.device)
    if peak is None:
        return None
    flops = count_flops(trainer.core_model, data.mean_length, trainer.config.trainable)
    return Utilisation(flops, peak, trainer.args.world_size)


def _checkpoint_to_resume(
    config: TrainConfig, identity: dict[str, Any], allow_changed: bool
) -> tuple[Path | None, bool]:
    """The last complete checkpoint, if there is one, and whether another number of ranks wrote it; rank 0 only."""
    checkpoints.clear_staging(config.output_dir)
    checkpoint = checkpoints.last_sound(config.output_dir)
    if checkpoint is None:
        return None, False
    resharded = checkpoints.check_identity(checkpoint, identity, allow_changed=allow_changed)
    if resharded and identity["zero_stage"]:
        universal.convert(checkpoint)
    logger.info("%s: going on from %s", config.stage, checkpoint.name)
    return checkpoint, resharded


def _describe(config: TrainConfig, trainer: StageTrainer, data: Feed, moe: MoeConfig | None) -> None:
    arguments, rows = trainer.args, _trainable_rows(config, trainer)
    identity = trainer.identity
    logger.info(
        "%s: %d rows, global batch %d = %d x %d x %d (ranks x micro-batch x accumulation), %s",
        *(config.stage, len(data.train), trainer.batch_sampler.global_batch_size, identity["world_size"]),
        *(arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps),
        f"DeepSpeed {config.deepspeed}" if config.deepspeed else "no DeepSpeed",
    )
    for row in rows:
        logger.info("%s", trainable.describe(row))
    write_manifest(
        config.output_dir,
        config,
        seeds={"seed": config.seed, **({"competition": moe.seed} if moe else {})},
        data_digest=data.digest,
        extra={"identity": identity, "trainable": [row._asdict() for row in rows], "data": data.stats},
    )


def _trainable_rows(config: TrainConfig, trainer: StageTrainer) -> list[trainable.PartRow]:
    arguments = trainer.args
    return trainable.table(
        trainer.model, config.trainable, learning_rate=arguments.learning_rate, weight_decay=arguments.weight_decay
    )


def _save_final(config: TrainConfig, trainer: StageTrainer, rank: Rank) -> None:
    staged = config.output_dir / checkpoints.STAGING / "final"
    whole = config.model_copy(update={"model": config.model.model_copy(update={"quantization": None})})

    def base() -> Any:
        with _whole(getattr(trainer.args, "hf_deepspeed_config", None)):
            return start_model(whole, rank)[0]

    trainer.save_merged(staged, base=base)
    wait_for_all()
    if rank.is_main:
        checkpoints.install_model(staged, config.output_dir)
    wait_for_all()
