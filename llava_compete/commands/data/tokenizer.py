"""Train a byte-level BPE tokenizer on text files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt) or a hub data set.

Writes a tokenizer directory that `model.tokenizer.name` of a config takes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("paths", nargs="*", type=Path, help="files, directories or globs")
    parser.add_argument("--hub", help="a hub data set to stream, in place of paths")
    parser.add_argument("--subset", help="its configuration")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")
    parser.add_argument("--field", default="text", help="column that holds a document (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8000, help="tokens (default: %(default)s)")
    parser.add_argument("--max-documents", type=int, default=200_000, help="documents to read (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="directory for the tokenizer")


def run(arguments: argparse.Namespace) -> None:
    """Read, train, save."""
    from tqdm import tqdm

    from llava_compete.config import parse_config
    from llava_compete.data.text.config import TextSource
    from llava_compete.data.text.sources import read_source
    from llava_compete.errors import UserError
    from llava_compete.language.tokenizer import train_byte_level_bpe

    if arguments.vocab_size < 300:
        raise UserError(f"--vocab-size: found {arguments.vocab_size}, expected at least 300 (256 bytes and specials)")
    content = {"hub": arguments.hub, "subset": arguments.subset, "split": arguments.split, "field": arguments.field}
    source = parse_config(TextSource, content | {"path": arguments.paths or None}, source="data tokenizer")
    documents = itertools.islice(read_source(source), arguments.max_documents)
    tokenizer = train_byte_level_bpe(tqdm(documents, desc="documents", unit=""), arguments.vocab_size)
    tokenizer.save_pretrained(arguments.out)
    sys.stdout.write(f"{arguments.out}: {len(tokenizer)} tokens\n")
