"""A wheel takes along the recipes and evaluation files, which a checkout has beside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LEFT_OUT = shutil.ignore_patterns("results", "__pycache__", "*.partial")


class BuildWithRecipes(build_py):
    """As setuptools builds it, plus `llava_compete/shipped/{configs,eval}`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in ("configs", "eval"):
            target = Path(self.build_lib) / "llava_compete" / "shipped" / name
            shutil.copytree(name, target, ignore=LEFT_OUT, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
