"""Serve a checkpoint by OpenAI's chat completions: transformers' own server, for this machine unless told otherwise.

llava-compete serve outputs/quickstart/sft [--port 8000] [--api-key KEY]
Pictures are data URLs. docs/serving.md has clients, limits, and other servers (vLLM, SGLang).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("LLAVA_COMPETE_API_KEY") or None,
        help="default: $LLAVA_COMPETE_API_KEY, or none",
    )
    parser.add_argument("--name", help="what clients call the model (default: the directory's name)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU, if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: as stored)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of one answer (default: %(default)s)")
    parser.add_argument("--max-images", type=int, default=8, help="of one request (default: %(default)s)")
    parser.add_argument("--max-image-mib", type=float, default=20, help="file of one picture (default: %(default)s)")
    parser.add_argument("--max-megapixels", type=float, default=50, help="of one picture (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.model.checkpoint import read_config
    from llava_compete.optional_packages import require

    require("fastapi", "uvicorn", "openai", extra="serve", purpose="llava-compete serve")
    from llava_compete.talk.limits import Limits
    from llava_compete.talk.listening import address_of, listen, reached_by_others, serve
    from llava_compete.talk.server import build_app
    from llava_compete.talk.talker import load_talker

    setup_console()
    if arguments.api_key is not None and not arguments.api_key.strip():
        raise UserError("--api-key: found nothing, expected a key; without the option anybody is answered")
    limits = Limits(arguments.max_new_tokens, arguments.max_images, arguments.max_image_mib, arguments.max_megapixels)
    read_config(arguments.checkpoint)
    with listen(arguments.host, arguments.port) as listening:
        talker = load_talker(str(arguments.checkpoint), arguments.device, arguments.dtype)
        name = arguments.name or arguments.checkpoint.resolve().name
        app = build_app(talker, name, limits, arguments.api_key)
        if reached_by_others(listening) and not arguments.api_key:
            sys.stderr.write("warning: others reach this server, and it asks for no API key (--api-key)\n")
        sys.stdout.write(f"serving {name} at {address_of(listening)}/v1 (Ctrl-C ends it)\n")
        sys.stdout.flush()
        serve(app, listening)
    return 0
