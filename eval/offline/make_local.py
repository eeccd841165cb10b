"""Put a parquet file where lmms-eval's built-in tasks look for a data set of the hub.

    python eval/offline/make_local.py ORG/NAME SPLIT FILE.parquet [--config NAME] [--root DIR]

Writes ORG/NAME/README.md and a copy of the file whose name carries a hash of its content.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path


def make_local(root: Path, name: str, split: str, source: Path, config: str = "default") -> Path:
    """Lay out one split of one config; further splits and configs of the same data set are kept."""
    folder = root / name
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    target = folder / config / f"{split}-{digest}.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{split}-*.parquet"):
        old.unlink()
    shutil.copyfile(source, target)
    lines = ["---", "configs:"]
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines += [f"- config_name: {directory.name}", "  data_files:"]
        for file in sorted(directory.glob("*.parquet")):
            lines += [f"  - split: {file.name.rsplit('-', 1)[0]}", f"    path: {directory.name}/{file.name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="ORG/NAME")
    parser.add_argument("split")
    parser.add_argument("file", type=Path)
    parser.add_argument("--config", default="default")
    parser.add_argument("--root", type=Path, default=Path())
    given = parser.parse_args()
    make_local(given.root, given.name, given.split, given.file, given.config)
