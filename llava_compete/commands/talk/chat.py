"""Talk to a checkpoint in the terminal: answers as they are written, several turns, pictures, and its experts.

llava-compete chat outputs/quickstart/sft
llava-compete chat outputs/quickstart/sft --image cat.jpg --prompt "What is this?" [--json]
In a conversation /help lists the commands.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("--prompt", help="one question: print the answer and end")
    parser.add_argument("--image", action="append", default=[], help="a picture for --prompt; may be repeated")
    parser.add_argument("--json", action="store_true", help="with --prompt: answer, counts and experts as JSON")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of one answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest of this mass")
    parser.add_argument("--top-k", type=int, default=0, help="draw among so many; 0: all (default)")
    parser.add_argument("--seed", type=int, help="of the draws")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU, if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: as stored)")


def run(arguments: argparse.Namespace) -> int:
    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.model.checkpoint import read_config
    from llava_compete.talk.sampling import Sampling
    from llava_compete.talk.talker import load_talker
    from llava_compete.talk.terminal import Terminal, dumps, once

    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed
    )
    if arguments.prompt is None and (arguments.image or arguments.json):
        raise UserError("--image and --json go with --prompt; in a conversation /image FILE shows a picture")
    setup_console()
    read_config(arguments.checkpoint)
    talker = load_talker(str(arguments.checkpoint), arguments.device, arguments.dtype)
    if arguments.prompt is not None:
        result = once(talker, sampling, arguments.system, arguments.image, arguments.prompt)
        sys.stdout.write(dumps(result) if arguments.json else result["answer"] + "\n")
        return 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for `Terminal` to refuse the line and go on
    if sys.stdin.isatty():
        import readline  # noqa: F401 - editing and history of what is typed

        sys.stdout.write("/help lists the commands, Ctrl-D ends\n")
    Terminal(talker, sampling, arguments.system, sys.stdout).run(input)
    return 0
