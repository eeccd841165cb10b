"""One training stage from config to a finished, self-contained model directory.

Reads as the stage happens: process group, lock, model, data, trainer, train, save, mark as finished; on
every rank of the launcher. Everything a rank refuses is refused by all ranks together.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from llava_compete.console import setup_console
from llava_compete.data.config import DataSection
from llava_compete.errors import UserError
from llava_compete.language.sources import context_of
from llava_compete.manifest import write_manifest
from llava_compete.model.card import stage_card
from llava_compete.model.checkpoint import read_config
from llava_compete.moe.allocator import keep_freed_memory
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.implementations import check_kernel
from llava_compete.train import checkpoints, expert_parallel, trainable
from llava_compete.train import resharding as universal
from llava_compete.train.adapters import with_adapters
from llava_compete.train.arguments import build_arguments, check_reports
from llava_compete.train.callbacks.competition import CompetitionCallback
from llava_compete.train.callbacks.coupling_noise import CouplingNoiseCallback
from llava_compete.train.callbacks.freed_memory import FreedMemoryCallback
from llava_compete.train.callbacks.progress import AnswersCallback, WatchCallback
from llava_compete.train.callbacks.router_loads import RouterLoadsCallback
from llava_compete.train.callbacks.tensorboard import ResumedTensorBoardCallback
from llava_compete.train.callbacks.throughput import ThroughputCallback
from llava_compete.train.compiled_layers import compile_layers, refuse_zero_3
from llava_compete.train.config import DEEPSPEED_DIR, TrainConfig
from llava_compete.train.disk_space import check_space, written
from llava_compete.train.distributed import Rank, all_or_none, main_first, of_main, process_group, this_rank
from llava_compete.train.expert_resharding import merge_experts
from llava_compete.train.finished import has_finished, record, refuse_to_begin_again
from llava_compete.train.identity import identity_of
from llava_compete.train.inputs import Feed, build_feed, check_sources
from llava_compete.train.mfu import Utilisation, count_flops, device_peak
from llava_compete.train.preflight import (
    check_alike,
    check_links,
    check_same,
    comparable_settings,
    log_devices,
)
from llava_compete.train.resume import choose, total_steps
from llava_compete.train.sharding import (
    sharding_of,
    whole,
    zero_stage,
)
from llava_compete.train.starting_point import HANDOVER, moe_settings, start_model
from llava_compete.train.stopping import StopOnSignal
from llava_compete.train.trainer import StageTrainer
from llava_compete.train.waiting import wait_for_all
from llava_compete.train.word_pages import start_on_pages
from llava_compete.train.word_start import start_projector

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
        disable_progress_bar()
        check_links(rank, store)
        check_same(rank, comparable_settings(config))
        log_devices(rank)
        finished = False
        with all_or_none(rank, "output directory"):
            _open_output(config.output_dir, rank)
            if rank.is_main:
                stack.enter_context(checkpoints.output_lock(config.output_dir))
                finished = has_finished(config, allow_changed=allow_changed)
        if of_main(finished):
            logger.info("%s: stage %s has finished already", config.output_dir, config.stage)
            return True
        check_alike(rank, config.output_dir)
        return _run(config, rank, allow_changed)


def _open_output(output_dir: Path, rank: Rank) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        setup_console(output_dir / "run" / "console.log", rank.number)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (output_dir, *output_dir.parents) if path.is_file())
        raise UserError(f"output_dir: {output_dir}: {file} is a file, expected a directory") from error
    except OSError as error:
        raise UserError(f"output_dir: {output_dir}: cannot write there: {error.strerror}") from error


def _run(config: TrainConfig, rank: Rank, allow_changed: bool) -> bool:
    with all_or_none(rank, "training arguments"):
        arguments = build_arguments(
            config.training,
            output_dir=config.output_dir,
            seed=config.seed,
            deepspeed=DEEPSPEED_DIR / f"{config.deepspeed}.json" if config.deepspeed else None,
            on_gpu=rank.on_gpu,
        )
        if config.training.torch_compile == "layers":
            refuse_zero_3(zero_stage(arguments))
        if rank.is_main:
            check_reports(arguments)
    with all_or_none(rank, "data"), main_first(rank):
        check_sources(config.data)
    set_seed(config.seed)
    model, processor, moe = _prepare_model(config, rank, arguments)
    with all_or_none(rank, "data"), main_first(rank):
        data = build_feed(config, rank, arguments, processor)
        if data.validation is None and (config.sample_steps or arguments.eval_strategy != "no"):
            key = "sample_steps" if config.sample_steps else "training.eval_strategy"
            raise UserError(f"{key}: needs held-out rows; set data.validation_fraction")
    check_same(rank, {"data (digest)": data.digest})
    trainer = _build_trainer(config, arguments, model, processor, data)
    trainer.expert_ranks = expert_parallel.size_of(moe)
    competition = CompetitionCallback(trainer, moe)
    with whole(sharding_of(arguments)):
        utilisation = _utilisation(trainer, data)
    steps = ThroughputCallback(trainer, competition, utilisation)
    watch = WatchCallback(trainer, config.output_dir / "run" / "metrics.jsonl")
    answers = AnswersCallback(trainer, config.output_dir / "run" / "answers.jsonl")
    for callback in (
        competition,
        RouterLoadsCallback(trainer),
        CouplingNoiseCallback(trainer, moe),
        steps,
        watch,
        answers,
    ):
        trainer.add_callback(callback)
    if not rank.on_gpu:
        trainer.add_callback(FreedMemoryCallback())
    checkpoint = _begin(config, rank, trainer, data, moe, allow_changed)
    if config.word_start is not None and checkpoint is None:
        with all_or_none(rank, "word_start"):
            if len(data.train.with_words()):
                bf16 = config.training.bf16
                start_on_pages(trainer.core_model, data.train, config.word_start, config.seed, bf16=bf16)
            else:
                start_projector(trainer.core_model, data.train, config.word_start, config.seed)
    if config.training.torch_compile == "layers":
        how = config.training
        compile_layers(model, how.torch_compile_backend, how.torch_compile_mode)
    started = time.perf_counter()
    with StopOnSignal(trainer):
        with closing(watch):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            goes_on = "the same command goes on from here"
            if config.training.save_only_model:
                goes_on = "its checkpoint holds the model alone (training.save_only_model), and nothing goes on from it"
            logger.info("stopped at step %d; %s", trainer.state.global_step, goes_on)
            return False
        # Told to stop from here on, it finishes all the same: without checkpoints all would be lost.
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
            checkpoints.write_finished(config.output_dir, {**summary, **record(config, moe, trainer.mark["identity"])})
            if (overhead := summary["competition_overhead"]) is not None:
                logger.info("competitions added %.1f%% to the step time", 100 * overhead)
            logger.info("%s: wrote the %s model to %s", config.stage, config.stage, config.output_dir)
    return True


def _prepare_model(config: TrainConfig, rank: Rank, arguments: Any) -> tuple[Any, Any, MoeConfig | None]:
    """Model with adapters and with what does not train frozen, processor, and the MoE settings in force."""
    adapted = any(part.mode == "lora" for part in config.trainable.values())
    unread = zero_stage(arguments) == 3 and config.word_start is None  # which trains on the weights before DeepSpeed
    with all_or_none(rank, "model"), main_first(rank):
        settings = moe_settings(config)
        if settings is not None:
            for part in settings.parts().values():
                check_kernel(part.experts_implementation)
        expert_parallel.check(settings, rank.world_size, zero_stage(arguments), adapted=adapted)
        with whole(sharding_of(arguments)):
            model, processor, moe = start_model(config, rank, unread=unread)
        config.data.check_context(context_of(model.config.text_config))
        if isinstance(config.data, DataSection):
            config.data.check_tiles(model.config.tiling)
        model = with_adapters(model, config.trainable)
        trainable.apply(model, config.trainable)
        expert_parallel.mark(model, expert_parallel.size_of(moe))
    return model, processor, moe


def _begin(
    config: TrainConfig, rank: Rank, trainer: StageTrainer, data: Feed, moe: MoeConfig | None, allow_changed: bool
) -> Path | None:
    """Choose the checkpoint to go on from, tell all ranks and the user, and leave a record of the run."""
    arguments, start = trainer.args, None
    with all_or_none(rank, "checkpoint"):
        if rank.is_main:
            identity = identity_of(config, moe, data, rank.world_size, zero_stage(arguments))
            total = total_steps(arguments, len(data.batch_sampler))
            start = choose(config.output_dir, identity, trainer.schedule(), total, allow_changed=allow_changed)
            if start.checkpoint is None:
                refuse_to_begin_again(config)
            else:
                logger.info("%s: going on from %s", config.stage, start.checkpoint.name)
            check_space(config.output_dir, written(trainer.model, arguments), arguments, total)
            if start.checkpoint is not None and start.resharded and identity["zero_stage"]:
                if max(start.expert_parallel, trainer.expert_ranks) > 1:
                    names = expert_parallel.expert_names(trainer.model)
                    merge_experts(start.checkpoint, names, start.expert_parallel)
                else:
                    universal.convert(start.checkpoint)
            checkpoints.clear_finished(config.output_dir)
            trainer.mark = {"identity": identity, "plan": start.plan._asdict(), "changes": start.changes}
            _describe(config, trainer, data, moe)
    start = of_main(start)
    assert start is not None
    trainer.plan, arguments.warmup_steps = start.plan, start.plan.warmup_steps
    if start.resharded and (sharding := sharding_of(arguments)) is not None:
        universal.load_universal(sharding)
    return start.checkpoint


def _build_trainer(config: TrainConfig, arguments: Any, model: Any, processor: Any, data: Feed) -> StageTrainer:
    trainer = StageTrainer(
        config=config,
        batch_sampler=data.batch_sampler,
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


def _describe(config: TrainConfig, trainer: StageTrainer, data: Feed, moe: MoeConfig | None) -> None:
    arguments, rows = trainer.args, _trainable_rows(config, trainer)
    identity = trainer.mark["identity"]
    logger.info(
        "%s: %d rows, global batch %d = %d x %d x %d (ranks x micro-batch x accumulation), %s",
        *(config.stage, len(data.train), trainer.batch_sampler.global_batch_size, identity["world_size"]),
        *(arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps),
        f"DeepSpeed {config.deepspeed}" if config.deepspeed else "no DeepSpeed",
    )
    for row in rows:
        logger.info("%s", trainable.describe(row))
    if config.stage == "sft" and moe is not None:
        moe.name_the_other_judge()
    write_manifest(
        config.output_dir,
        config,
        seeds={"seed": config.seed, **({"competition": moe.seed} if moe else {})},
        data_digest=data.digest,
        extra={**trainer.mark, "trainable": [row._asdict() for row in rows], "data": data.stats},
    )


def _trainable_rows(config: TrainConfig, trainer: StageTrainer) -> list[trainable.PartRow]:
    arguments = trainer.args
    return trainable.table(
        trainer.model, config.trainable, learning_rate=arguments.learning_rate, weight_decay=arguments.weight_decay
    )


def _save_final(config: TrainConfig, trainer: StageTrainer, rank: Rank) -> None:
    staged = config.output_dir / checkpoints.STAGING / "final"
    unquantized = config.model_copy(update={"model": config.model.model_copy(update={"quantization": None})})

    def base() -> Any:
        with whole(sharding_of(trainer.args)):
            return start_model(unquantized, rank, unread=True)[0]

    trainer.save_merged(staged, base=base)
    wait_for_all()
    if rank.is_main:
        shutil.rmtree(config.output_dir / HANDOVER, ignore_errors=True)
        stage_card(staged, config.output_dir, read_config(staged, config.model.trust_remote_code))
        checkpoints.install_model(staged, config.output_dir)
    wait_for_all()
