"""Perplexity and bits per byte of a language model on held-out text, beside bigram models of the same split.

The text is that of the checkpoint's own pre-training run, or of another config (--config). Writes summary.json and
samples/ into --out, as `llava-compete compare` reads them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("checkpoint", type=Path, help="model directory of stage pretrain_lm")
    parser.add_argument("--config", type=Path, help="config whose data section to use (default: the run's own)")
    parser.add_argument("--out", type=Path, help="default: CHECKPOINT/eval_perplexity")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    import torch

    from llava_compete.config import parse_config, read_yaml
    from llava_compete.data.text.config import TextSection
    from llava_compete.evaluation.checkpoint_facts import checkpoint_facts
    from llava_compete.evaluation.unit_scores import weighted_mean, write_units
    from llava_compete.files import write_json
    from llava_compete.manifest import package_versions
    from llava_compete.model.checkpoint import load_checkpoint
    from llava_compete.study.perplexity import comparison_units, measure

    facts = checkpoint_facts(arguments.checkpoint)
    path = arguments.config or arguments.checkpoint / "run" / "config.yaml"
    section = parse_config(TextSection, read_yaml(path).get("data", {}), source=f"{path}: data")
    model, processor = load_checkpoint(arguments.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found, scores = measure(model, processor.tokenizer, section, arguments.batch_size)
    out = arguments.out or arguments.checkpoint / "eval_perplexity"
    tasks = {}
    for task, units in comparison_units(scores).items():
        write_units(out, task, units)
        tasks[task] = {"accuracy": weighted_mean(units), "n": len(units)}
    summary = {"tasks": tasks, "perplexity": asdict(found), "checkpoint": facts, "versions": package_versions()}
    write_json(out / "summary.json", summary)
    sys.stdout.write(
        f"held-out text, {found.tokens:,} tokens, {found.text_bytes:,} bytes\n"
        f"  model                perplexity {found.perplexity:8.2f}   bits per byte {found.bits_per_byte:.3f}\n"
        f"  bigram of its tokens                       bits per byte {found.token_bigram_bits_per_byte:.3f}\n"
        f"  bigram of bytes                            bits per byte {found.byte_bigram_bits_per_byte:.3f}\n"
    )
