"""Kills stages at random moments and compares what they come to with runs that were left alone (scripts/soak.sh).

Goes on where it was stopped: kills are drawn anew from the seed, and those whose rows are written down are left out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from llava_compete.files import write_json_lines, write_text

STEPS, SAVE_STEPS = 12, 4
# A run of these few steps that takes longer hangs; on a busy machine imports alone take minutes.
LIMIT_SECONDS = 1800
ROWS = "rows.jsonl"
VICTIMS = {
    "all": "kill -9 of script, launcher, ranks and workers",
    "a rank": "kill -9 of one rank",
    "the launcher": "kill -9 of the launcher",
    "told": "TERM to the script",
}


COLUMNS = (
    *("DeepSpeed", "launcher", "workers", "killed", "moment", "status", "processes left"),
    *("went on from step", "steps lost", "equal curve", "equal weights"),
)


class Setting(NamedTuple):
    """One cell of the grid."""

    deepspeed: str
    launcher: str
    workers: int


GRID = [
    Setting(*cell)
    for cell in itertools.product(("none", "zero2", "zero3", "zero2_offload"), ("deepspeed", "torchrun"), (0, 2))
]


class Kill(NamedTuple):
    """Who is killed, and when."""

    victim: str
    moment: str
    reached: Callable[[Path], bool]
    delay: float


def draw_kill(random_number: random.Random) -> Kill:
    """A step, a checkpoint being written, or the last save, and a moment after it has begun."""
    victim = random_number.choice(list(VICTIMS))
    kind = random_number.choices(("step", "save", "last save"), (4, 3, 3))[0]
    if kind == "step":
        step = random_number.randint(1, STEPS - 1)
        return Kill(victim, f"after step {step}", lambda out: last_step(out) >= step, random_number.uniform(0, 0.3))
    if kind == "save":
        step = random_number.randrange(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
        staged = Path(".saving") / f"checkpoint-{step}"
        return Kill(
            victim, f"saving checkpoint-{step}", lambda out: (out / staged).is_dir(), random_number.uniform(0, 0.2)
        )
    return Kill(
        victim, "the last save", lambda out: (out / ".saving" / "final").is_dir(), random_number.uniform(0, 0.5)
    )


def records(out: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl; a run that is still writing may have left half a line."""
    path = out / "run" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [record for record in map(json.loads, (line for line in lines if line.endswith("}"))) if "loss" in record]


def last_step(out: Path) -> int:
    """The last step that was logged, 0 before the first."""
    found = records(out)
    return int(found[-1]["step"]) if found else 0


def last_checkpoint(out: Path) -> int:
    """The step of the last complete checkpoint, 0 where there is none."""
    return max((int(path.parent.name.split("-")[1]) for path in out.glob("checkpoint-*/complete.json")), default=0)


def curve(out: Path) -> list[list[Any]]:
    """What is compared of each step; a step that stands in the file twice makes it another curve."""
    return [[record[key] for key in ("step", "loss", "grad_norm", "sample_checksum")] for record in records(out)]


def weights(out: Path) -> str:
    """Digest of the final model's weights."""
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


class Soak:
    """Runs of one stage below `root`, with the words of its command."""

    def __init__(self, root: Path, words: list[str], goes_on: bool) -> None:
        self.root, self.words, self.goes_on = root, words, goes_on
        self.references: dict[str, Path] = {}

    def start(self, setting: Setting, out: Path) -> subprocess.Popen[bytes]:
        """The stage's script in the background, its messages appended to OUT.log."""
        environment = dict(os.environ)
        if setting.launcher == "torchrun":
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = str(probe.getsockname()[1])
            environment |= {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        options = [f"deepspeed={setting.deepspeed}", f"training.dataloader_num_workers={setting.workers}"]
        command = ["bash", "scripts/sft.sh", *self.words, f"output_dir={out}", *options]
        with out.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def run(self, setting: Setting, out: Path) -> int:
        """To its end; returns the status."""
        process = self.start(setting, out)
        try:
            return process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            end(below(process))
            return -1

    def reference(self, setting: Setting) -> Path:
        """The same stage left alone; launcher and workers do not change a number."""
        out = self.root / f"straight-{setting.deepspeed}"
        if self.goes_on and (out / "run" / "finished.json").is_file():
            self.references[setting.deepspeed] = out
        if out not in self.references.values():
            shutil.rmtree(out, ignore_errors=True)
            out.with_suffix(".log").unlink(missing_ok=True)
            if status := self.run(Setting(setting.deepspeed, "torchrun", 0), out):
                sys.exit(f"error: the run that was to be left alone ended with {status}: {out.with_suffix('.log')}")
            self.references[setting.deepspeed] = out
        return out

    def kill_one(self, number: int, setting: Setting, kill: Kill) -> dict[str, Any]:
        """Start, kill, go on, compare: one row of the table."""
        reference, out = self.reference(setting), self.root / f"kill-{number}"
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".log").unlink(missing_ok=True)
        process = self.start(setting, out)
        while process.poll() is None and not kill.reached(out):
            time.sleep(0.01)
        time.sleep(kill.delay)
        was_running = process.poll() is None
        everything = below(process)
        strike(process, everything, kill.victim)
        try:
            status = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = -1
        # Orphaned loader workers look for their rank every 5 seconds.
        left = [one for one in psutil.wait_procs(everything, timeout=10)[1] if is_alive(one)]
        end(left)
        lost, going_on = last_step(out) - last_checkpoint(out), last_checkpoint(out)
        again = self.run(setting, out)
        equal = again == 0
        return {
            "setting": setting,
            "victim": kill.victim,
            "moment": kill.moment if was_running else f"{kill.moment} (had ended)",
            "status": status,
            "left": len(left),
            "going_on": going_on,
            "lost": max(lost, 0),
            "again": again,
            "curve": equal and curve(out) == curve(reference),
            "weights": equal and weights(out) == weights(reference),
        }


def below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The script and all that it started."""
    try:
        script = psutil.Process(process.pid)
        return [script, *script.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_alive(one: psutil.Process) -> bool:
    """Not a zombie, which the process that adopted it has yet to fetch."""
    try:
        return bool(one.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def strike(process: subprocess.Popen[bytes], everything: list[psutil.Process], victim: str) -> None:
    """Kill or tell the victim."""
    ranks, launchers = [], []
    for one in everything[1:]:
        try:
            command = " ".join(one.cmdline())
            if "llava_compete.cli train" in command and "--module" in command:
                launchers.append(one)
            elif "llava_compete.cli train" in command and "RANK" in one.environ():
                ranks.append(one)
        except psutil.NoSuchProcess:
            continue
    if victim == "told":
        process.send_signal(signal.SIGTERM)
    else:
        # The innermost launcher is the one that waits for the ranks; the first ranks are no workers.
        end({"all": everything, "a rank": ranks[:1], "the launcher": launchers[-1:]}[victim])


def end(processes: list[psutil.Process]) -> None:
    """kill -9."""
    for one in processes:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


def table(rows: list[dict[str, Any]], kills: int, seed: int) -> str:
    """The result in Markdown."""
    good = sum(is_good(row) for row in rows)
    lines = [
        "# Kills at random moments",
        "",
        f"`SOAK_SEED={seed} bash scripts/soak.sh {kills}`, {datetime.now(UTC):%Y-%m-%d}; {len(rows)} have run:",
        f"two ranks on CPU, a demo stage of {STEPS} steps with competition, a checkpoint every {SAVE_STEPS}.",
        "",
        f"**{good} of {len(rows)}** came to the same curve (loss, gradient norm and rows of each step) and the same",
        "weights as a run that was left alone, bit for bit.",
        "",
        "Killed: " + "; ".join(f"*{name}*: {what}" for name, what in VICTIMS.items()) + ".",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            *row["setting"],
            row["victim"],
            row["moment"],
            row["status"],
            row["left"],
            row["going_on"],
            row["lost"],
        ]
        cells += ["yes" if row[key] else f"**no** (status {row['again']})" for key in ("curve", "weights")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def is_good(row: dict[str, Any]) -> bool:
    """Nothing lost but steps since the last checkpoint, and none where the stage was told."""
    told_well = row["victim"] != "told" or row["status"] in (0, 143)
    return bool(row["curve"] and row["weights"] and row["left"] == 0 and told_well)


def read_rows(path: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier call of the same plan has come to."""
    lines = list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []
    return lines[1:] if lines[:1] == [plan] else []


def main(root: Path, kills: int, seed: int, words: list[str]) -> int:
    """Writes the table after each kill; returns 1 if one came to something else."""
    chance = random.Random(seed)
    order = [cell for _ in range(-(-kills // len(GRID))) for cell in chance.sample(GRID, len(GRID))][:kills]
    plan = {"kills": kills, "seed": seed, "words": words}
    rows = read_rows(root / ROWS, plan)
    soak = Soak(root, words, goes_on=bool(rows))
    draws = [draw_kill(chance) for _ in order]
    for number, (setting, kill) in list(enumerate(zip(order, draws, strict=True)))[len(rows) :]:
        row = soak.kill_one(number, setting, kill)
        rows.append(row)
        write_json_lines(root / ROWS, (plan, *rows))
        if is_good(row):
            shutil.rmtree(root / f"kill-{number}")
        write_text(root / "README.md", table(rows, kills, seed))
        sys.stderr.write(f"{number + 1}/{kills} {'equal' if is_good(row) else 'NOT EQUAL'}: {row}\n")
    return 0 if all(map(is_good, rows)) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
