"""List the recipes that come with the package, or copy one to change it.

llava-compete recipes
llava-compete recipes phi35_siglip --out my_recipe
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llava_compete import shipped
from llava_compete.errors import UserError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a recipe; default: list all")
    parser.add_argument("--out", type=Path, help="folder to copy it to (default: the recipe's name)")


def run(arguments: argparse.Namespace) -> None:
    root = shipped.folder("configs")
    recipes = {path.name: path for path in sorted(root.iterdir()) if any(path.glob("*.yaml"))}
    if arguments.name is None:
        if arguments.out is not None:
            raise UserError(f"--out {arguments.out}: needs the name of a recipe; one of {', '.join(recipes)}")
        table = Table("recipe", "files")
        for name, path in recipes.items():
            table.add_row(name, ", ".join(file.stem for file in sorted(path.glob("*.yaml"))))
        Console().print(table)
        return
    if arguments.name not in recipes:
        hint = did_you_mean(arguments.name, recipes) or f"; there are {', '.join(recipes)}"
        raise UserError(f"recipe {arguments.name!r}: found no folder of this name in {root}{hint}")
    out = arguments.out or Path(arguments.name)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose another --out")
    shutil.copytree(recipes[arguments.name], out, dirs_exist_ok=True)
    Console().print(f"copied {', '.join(file.name for file in sorted(out.glob('*.yaml')))} to {out}")
