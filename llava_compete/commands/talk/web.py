"""Talk to a checkpoint, or to two side by side, on a page in the browser, and see which experts answered.

llava-compete web outputs/quickstart/sft
llava-compete web outputs/a/sft outputs/b/sft [--port 7860] [--examples playground/data/demo/eval/digits_test.parquet]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("other", type=Path, nargs="?", help="a second one, asked the same questions")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port; 0: any that is free (default: %(default)s)")
    parser.add_argument("--examples", type=Path, help="data whose questions are offered (default: rendered scenes)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU, if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: as stored)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of one answer (default: %(default)s)")
    parser.add_argument("--max-images", type=int, default=8, help="of one question (default: %(default)s)")
    parser.add_argument("--max-image-mib", type=float, default=20, help="file of one picture (default: %(default)s)")
    parser.add_argument("--max-megapixels", type=float, default=50, help="of one picture (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    from llava_compete.console import setup_console
    from llava_compete.model.checkpoint import read_config
    from llava_compete.optional_packages import require

    require("gradio", "matplotlib", extra="web", purpose="llava-compete web")
    if arguments.examples is not None:
        require("datasets", "pyarrow", extra="eval", purpose="--examples")
    from llava_compete.talk.examples import data_examples, scene_examples
    from llava_compete.talk.limits import Limits
    from llava_compete.talk.listening import address_of, listen, reached_by_others, serve
    from llava_compete.talk.page import build_page, mount, names_of
    from llava_compete.talk.talker import load_talker

    setup_console()
    limits = Limits(arguments.max_new_tokens, arguments.max_images, arguments.max_image_mib, arguments.max_megapixels)
    paths = [path for path in (arguments.checkpoint, arguments.other) if path is not None]
    configs = [read_config(path) for path in paths]
    names = names_of(paths)
    with listen(arguments.host, arguments.port) as listening, TemporaryDirectory(prefix="llava-compete-web-") as folder:
        if arguments.examples is not None:
            examples = data_examples(arguments.examples, Path(folder))
        else:
            sees = any(config.tower is not None for config in configs)
            examples = scene_examples(Path(folder)) if sees else []
        talkers = {
            name: load_talker(str(path), arguments.device, arguments.dtype)
            for name, path in zip(names, paths, strict=True)
        }
        app = mount(build_page(talkers, limits, examples), limits)
        if reached_by_others(listening):
            sys.stderr.write("warning: others reach this page, and it asks for no password\n")
        sys.stdout.write(f"{' and '.join(names)} at {address_of(listening)} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        serve(app, listening)
    return 0
