"""Host memory of ZeRO-3's starts and saves, whole models against streamed: `python tests/train/scale_memory.py OUT`.

Ranks are forked from one process that has imported everything, over gloo on a CPU. What is reported is what all ranks
together have beyond what they had just before: the peak of the sum of their proportional set sizes, in which a page
that several map counts once (/proc/PID/smaps_rollup), read every few milliseconds; and that of resident set sizes, in
which it counts for each. "whole" is how stages did it before, and still do where a checkpoint is stored otherwise.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import LANGUAGE, TOWER, tiny_model
from transformers import AutoModelForCausalLM

from llava_compete.manifest import git_state
from llava_compete.model.build import build_model, build_unread, load_checkpoint, save_checkpoint
from llava_compete.model.section import ModelSection
from llava_compete.parts import Part
from llava_compete.train import trainable
from llava_compete.train.adapters import ADAPTER_DIR, save_merged, with_adapters
from llava_compete.train.config import PartTraining
from llava_compete.train.sharded_start import partition
from llava_compete.train.streaming import stream_checkpoint, stream_trained

MIB = 2**20
SHARD_BYTES = 256 * MIB  # small beside the model, as 2 GiB are beside one of 90
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
# An upcycled language model of 242M parameters, and a tower of 86M that trains in full in the stage with adapters.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "layers": {"every": 2}}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 32000}
WIDE = {"width": 768, "head_width": 64, "layers": 13, "mlp_ratio": 4.0, "patch_size": 14, "image_size": 224}
NEW_SIZE = "bytes of a new model"  # a file that says it
LORA: dict[Part, PartTraining] = {"vision": PartTraining(mode="full"), "language": PartTraining(mode="lora")}


class Memory(NamedTuple):
    """Of all ranks together, in bytes."""

    pss: int
    rss: int

    @classmethod
    def of(cls, pids: list[int]) -> Memory:
        pss = rss = 0
        for pid in pids:
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines()[1:]}
            pss, rss = pss + found["Pss"], rss + found["Rss"]
        return cls(pss, rss)


# ---- what ranks do: each of these gives what is measured, after what comes before it ----


def start(section: dict[str, Any], place: Path, *, streams: bool, adapted: bool = False) -> tuple[Any, Any]:
    """Up to an engine without an optimizer."""
    model, processor = build(section, place, streams)
    if adapted:
        model = with_adapters(model, LORA)
        trainable.apply(model, LORA)
    if streams:
        partition(model, CONFIG)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    return engine, processor


def build(section: dict[str, Any], place: Path, streams: bool) -> tuple[Any, Any]:
    """As a stage does: with `streams` rank 0 first makes what no files have, in `place`; else every rank reads all."""
    model = ModelSection.model_validate(section)
    if not streams:
        return build_model(model, None, seed=0)
    makes = dist.get_rank() == 0
    if makes:
        built = build_unread(model, None, 0, None, place, makes=True)
    dist.barrier()
    return built if makes else build_unread(model, None, 0, None, place, makes=False)


def checkpoint(folder: Path) -> dict[str, Any]:
    return {"checkpoint": str(folder)}


def joined(folder: Path) -> dict[str, Any]:
    """A tower and a projector with random weights, and the language model that `make_models` has saved there."""
    vision = TOWER["vision_cfg"] if folder.name == "tiny" else WIDE
    tower = {"config": {**TOWER, "vision_cfg": vision}}
    return {"vision_tower": tower, "language_model": {"name": str(folder / "language")}, "chat_template": "chatml"}


def measured_start(
    section: Callable[[Path], dict[str, Any]], folder: Path, streams: bool, out: Path
) -> Callable[[], Any]:
    tiny = folder.with_name("tiny")
    for first in (False, True):  # libraries import much of themselves, and set memory aside, when they are first used
        start(section(tiny), tiny / "start", streams=first)
    return partial(start, section(folder), folder / "start", streams=streams)


def measured_save(folder: Path, streams: bool, out: Path) -> Callable[[], None]:
    engine, processor = start(checkpoint(folder), out, streams=True)

    def save() -> None:
        if streams:
            stream_checkpoint(engine.module, processor, out, SHARD_BYTES)
            return
        state = engine._zero3_consolidated_16bit_state_dict()
        if dist.get_rank() == 0:
            save_checkpoint(engine.module, processor, out, state)

    return save


def measured_save_of_adapters(folder: Path, streams: bool, out: Path) -> Callable[[], None]:
    engine, processor = start(checkpoint(folder), out, streams=True, adapted=True)
    model = engine.module
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def save() -> None:
        if streams:
            stream_trained(model, trained, out / ADAPTER_DIR, SHARD_BYTES)
            if dist.get_rank() == 0:
                base, _ = build_unread(ModelSection(checkpoint=folder), None, 0, None, out, makes=True)
                save_merged(base, LORA, processor, out, SHARD_BYTES)
            return
        state = engine._zero3_consolidated_16bit_state_dict()
        if dist.get_rank() == 0:
            wrapped = with_adapters(load_checkpoint(folder)[0], LORA)
            wrapped.load_state_dict({name: state[name] for name in trained}, strict=False)
            wrapped.save_pretrained(out / ADAPTER_DIR)
            save_checkpoint(wrapped.merge_and_unload(), processor, out)

    return save


NEW = "start of a new model, without the optimizer"
CASES: dict[str, Callable[[Path, bool, Path], Callable[[], Any]]] = {
    "start, without the optimizer": partial(measured_start, checkpoint),
    NEW: partial(measured_start, joined),
    "model directory": measured_save,
    "adapters, a part that trained in full, and the merged directory": measured_save_of_adapters,
}


# ---- measuring ----


def _rank(number: int, ranks: int, place: Path, prepare: Callable[[], Callable[[], Any]]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(place / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=number, world_size=ranks)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as stages do: it would be compiled first
    deepspeed.init_distributed("gloo")
    measured = prepare()
    dist.barrier()
    (place / f"ready{number}").touch()
    while not (place / "go").exists():
        time.sleep(0.01)
    kept = measured()
    (place / f"done{number}").touch()
    dist.barrier()
    while not (place / "end").exists():
        time.sleep(0.01)
    del kept
    os._exit(0)


def measure(ranks: int, prepare: Callable[[], Callable[[], Any]]) -> Memory:
    """The peak of what ranks have beyond what they had when they were prepared."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        processes = [context.Process(target=_rank, args=(number, ranks, place, prepare)) for number in range(ranks)]
        for process in processes:
            process.start()
        pids = [process.pid or 0 for process in processes]

        def wait(mark: str) -> Memory:
            peak = Memory(0, 0)
            while not all((place / f"{mark}{number}").exists() for number in range(ranks)):
                peak = Memory(*map(max, peak, Memory.of(pids)))
                if any(process.exitcode for process in processes):
                    raise RuntimeError(f"a rank has failed before it was {mark}")
                time.sleep(0.005)
            return peak

        try:
            wait("ready")
            before = Memory.of(pids)
            (place / "go").touch()
            peak = wait("done")
            (place / "end").touch()
        finally:
            for process in processes:
                process.join(10 if (place / "end").exists() else 0)
                process.kill()
    return Memory(peak.pss - before.pss, peak.rss - before.rss)


def make_models(folder: Path) -> None:
    """Checkpoints of a random model, and of a tiny one beside it."""
    tiny = folder.with_name("tiny")
    save_checkpoint(*tiny_model(moe={"language": EXPERTS}), tiny)
    for place, sizes in ((tiny, {}), (folder, LARGE)):
        model, processor = tiny_model(language={**LANGUAGE, **sizes}, tower=None)
        causal = AutoModelForCausalLM.from_config(model.config.text_config)
        causal.save_pretrained(place / "language")
        processor.tokenizer.save_pretrained(place / "language")
    tower = {**TOWER, "vision_cfg": WIDE}
    model, processor = tiny_model(moe={"language": EXPERTS}, language={**LANGUAGE, **LARGE}, tower=tower)
    save_checkpoint(model, processor, folder)
    new, _ = build_model(ModelSection.model_validate(joined(folder)), None, seed=0)
    (folder / NEW_SIZE).write_text(str(sum(p.nbytes for p in new.parameters())), encoding="ascii")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        builder = multiprocessing.get_context("fork").Process(target=make_models, args=(folder,))
        builder.start()  # by itself, so that nothing of it is in the ranks' memory
        builder.join()
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        new_size = int((folder / NEW_SIZE).read_text(encoding="ascii"))
        results = []
        for case, make in CASES.items():
            for ranks in (2, 4):
                for streams in (False, True):
                    saved = Path(name) / "saved"
                    peak = measure(ranks, partial(make, folder, streams, saved))
                    shutil.rmtree(saved, ignore_errors=True)
                    weights = new_size if case == NEW else size
                    facts = {"case": case, "ranks": ranks, "streams": streams, "checkpoint_bytes": weights}
                    results.append({**facts, **peak._asdict()})
                    print(json.dumps(results[-1]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"date": str(date.today()), "commit": git_state().get("commit", "?")[:10], "checkpoint_bytes": size}
    (out / "memory.json").write_text(json.dumps({**facts, "results": results}, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(report(facts, results), encoding="utf-8")


def report(facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    size = facts["checkpoint_bytes"]
    new = next(result["checkpoint_bytes"] for result in results if result["case"] == NEW)
    lines = [
        "# Host memory of ZeRO-3's starts and saves",
        "",
        f"`python tests/train/scale_memory.py eval/results/scale_memory`, {facts['date']}, {facts['commit']}: ranks on",
        f"a CPU (gloo), a random model of {size / 4e6:.0f}M parameters in float32 ({size / MIB:,.0f} MiB), shards of",
        f"{SHARD_BYTES // MIB} MiB; the new model, which joins a language model's directory and a tower with random",
        f"weights, has {new / 4e6:.0f}M ({new / MIB:,.0f} MiB).",
        "Peaks of all ranks together beyond what they had before, in MiB: PSS, in which a page that",
        "several map counts once (beside it in checkpoints), and RSS.",
        "",
        "| | processes | whole: PSS | RSS | streamed: PSS | RSS |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for whole, streamed in zip(results[::2], results[1::2], strict=True):
        cells = [
            f"{one['pss'] / MIB:,.0f} ({one['pss'] / one['checkpoint_bytes']:.2f}) | {one['rss'] / MIB:,.0f}"
            for one in (whole, streamed)
        ]
        lines.append(f"| {whole['case']} | {whole['ranks']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
