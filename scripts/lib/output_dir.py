"""Prints the output_dir that a YAML and overrides name, as `llava-compete` reads them: folded, quoted, with variables.

output_dir.py CONFIG [KEY=VALUE | --option ...]
"""

import sys

from pydantic import ConfigDict

from llava_compete.config import StrictConfig, load_config
from llava_compete.errors import UserError


class _Stage(StrictConfig):
    model_config = ConfigDict(extra="ignore")
    output_dir: str


try:
    stage = load_config(_Stage, sys.argv[1], [word for word in sys.argv[2:] if not word.startswith("-")])
    sys.stdout.write(f"{stage.output_dir}\n")
except UserError as error:
    sys.exit(f"error: {error}")
