"""The router study's script with every command replaced by a recorder: same parent, steps and seeds for all methods."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llava_compete.config import load_config
from llava_compete.model.upcycle import UpcycleConfig
from llava_compete.moe.router_table import ROUTER_CLASSES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECORDER = """#!/usr/bin/env bash
echo "$*" >>"$RECORD"
case "$*" in *"$FAIL"*) [ -z "$FAIL" ] || exit 1 ;; esac
for word in "$@"; do
  case "$word" in
    output_dir=*) mkdir -p "${word#*=}" && touch "${word#*=}/config.json" "${word#*=}/summary.json" ;;
  esac
done
"""
STUBS = {
    "scripts/setup.sh": "",
    "scripts/pretrain_align.sh": 'exec llava-compete pretrain_align "$@"\n',
    "scripts/pft.sh": 'exec llava-compete pft "$@"\n',
    "venv/bin/llava-compete": RECORDER,
    "playground/data/demo/eval/meta.json": "{}",
    **{
        f"configs/{recipe}/upcycle.yaml": (SCRIPTS.parent / "configs" / recipe / "upcycle.yaml").read_text()
        for recipe in ("demo", "smollm2_dinov2")
    },
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the script in a copy of the tree; returns status, recorded commands and stderr."""
    for name, content in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    (tmp_path / "scripts" / "lib").mkdir()
    monkeypatch.setenv("VENV", str(tmp_path / "venv"))
    for name in ("compare_routers.sh", "compare_rules_emoji.sh", "lib/common.sh", "lib/study.sh"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    record = tmp_path / "record"
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("JOBS", "3")

    def run(*arguments, fail="", script="compare_routers"):
        monkeypatch.setenv("FAIL", fail)
        record.write_text("")
        words = ["bash", f"scripts/{script}.sh", *arguments]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, record.read_text().splitlines(), done.stderr

    return run


def having(commands, *words):
    return [command for command in commands if all(word in command for word in words)]


def test_all_routers_and_dense_from_one_parent_a_seed(study):
    status, commands, _ = study("--seeds", "2", "training.max_steps=7")
    methods = len(ROUTER_CLASSES) + 2  # and dense, and softmax with the coupling loss
    assert status == 0
    trained = having(commands, "train configs/demo/sft.yaml")
    assert len(trained) == 2 * methods
    assert len(having(commands, "pretrain_align output_dir=outputs/compare_routers/parent/")) == 2
    assert all("training.max_steps=250 " in command and command.endswith("training.max_steps=7") for command in trained)
    for seed in (0, 1):
        parent = f"model.checkpoint=outputs/compare_routers/parent/seed{seed} "
        assert len(having(trained, f" seed={seed} ")) == methods
        assert len(having(trained, "moe=false", parent)) == 1
        # Also the seed of the competitions' schedule.
        assert len(having(commands, "upcycle --config", parent, f" seed={seed} moe.seed={seed}")) == methods - 1
    upcycled = having(commands, "upcycle --config")
    assert len(upcycled) == 2 * methods - 2
    # One of them is the shared expert of shared_*, whose router would learn nothing with two.
    assert len(having(upcycled, "moe.language.num_experts_per_tok=3 ")) == 2 * methods - 2
    for router in ROUTER_CLASSES:
        assert len(having(upcycled, f"moe.language.router={router} ")) == (4 if router == "softmax" else 2)
    assert len(having(upcycled, "moe.language.coupling_coef=1 ")) == 2
    assert len(having(commands, "eval --config", "suite=demo", "limit=null")) == 2 * methods
    compared = having(commands, "compare ")[0].split()
    directory = "outputs/compare_routers"
    assert compared[1] == f"softmax={directory}/softmax/seed0/eval,{directory}/softmax/seed1/eval"
    assert len(compared) == 1 + methods + 2


def test_rules_of_one_router_are_settings_that_upcycling_takes(study):
    status, commands, _ = study("--quick", "--rules")
    assert status == 0
    found = {}
    for command in having(commands, "upcycle --config"):
        words = command.split()[3:]
        moe = load_config(UpcycleConfig, SCRIPTS.parent / "configs" / "demo" / "upcycle.yaml", words).moe.language
        rule = next(word for word in words if word.startswith("output_dir=")).split("/")[-3]
        found[rule] = (moe.router, moe.competition_judge, moe.competition_output, moe.competition_answers)
        assert moe.num_experts_per_tok == 2
    assert found == {
        "softmax": ("softmax", "response", None, None),
        "competition": ("competition", "response", "winners", None),
        "distil_only": ("competition", "response", "router", None),
        "judged": ("competition", "loss", None, "full"),
        "judged_means": ("competition", "loss", None, "mean"),
    }
    assert len(having(commands, "train ")) == 5
    assert len(having(commands, "compare ")[0].split()) == 1 + 5 + 2


def test_on_real_parts_each_seed_has_its_parent(study, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDS", "2")
    status, _, error = study(script="compare_rules_emoji")
    assert status == 2
    assert "playground/data/emoji/instruct.json is missing: run bash scripts/realistic.sh first" in error
    for name in ("emoji/instruct.json", "pretrained/smollm2/config.json", "pretrained/dinov2/config.json"):
        path = tmp_path / "playground" / "data" / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    status, commands, _ = study("outputs/rules", "training.max_steps=7", script="compare_rules_emoji")
    assert status == 0
    for seed in (0, 1):
        parent = f"outputs/rules/parent/seed{seed}"
        assert (
            len(having(commands, f"pretrain_align configs/smollm2_dinov2/pretrain_align.yaml output_dir={parent}/"))
            == 1
        )
        assert (
            len(having(commands, f"pft configs/smollm2_dinov2/pft.yaml output_dir={parent}/pft", f" seed={seed} ")) == 1
        )
        upcycled = having(commands, "upcycle --config configs/smollm2_dinov2/", f"model.checkpoint={parent}/pft ")
        assert len(upcycled) == 5
        assert all("moe.vision.router=" in command and "moe.language.router=" in command for command in upcycled)
    trained = having(commands, "train configs/smollm2_dinov2/sft.yaml")
    assert len(trained) == 10
    assert all(command.endswith("training.max_steps=null training.max_steps=7") for command in trained)
    assert len(having(commands, "eval --config configs/smollm2_dinov2/eval.yaml", "suite=emoji")) == 10


def test_quick_is_one_seed(study):
    status, commands, _ = study("--quick")
    assert status == 0
    assert len(having(commands, "train ")) == len(ROUTER_CLASSES) + 2
    assert len(having(commands, "eval ", "limit=200")) == len(ROUTER_CLASSES) + 2


def test_a_failure_stops_the_study_and_the_next_run_goes_on(study, tmp_path):
    status, commands, error = study("--quick", fail="moe.language.router=xmoe")
    assert status == 2
    assert "failed: xmoe-0 (see outputs/compare_routers_quick/logs/NAME.log)" in error
    assert not having(commands, "compare ")
    log = tmp_path / "outputs/compare_routers_quick/logs/softmax-0.log"
    log.write_text("how it went\n")
    status, commands, _ = study("--quick")
    assert status == 0
    assert not having(commands, "pretrain_align")
    assert not having(commands, "output_dir=outputs/compare_routers_quick/softmax/seed0/sft")
    assert log.read_text() == "how it went\n"
    assert having(commands, "compare ")


def test_runs_of_other_settings_do_not_join_finished_ones(study):
    assert study("--quick")[0] == 0
    status, commands, error = study("--quick", "training.max_steps=7")
    assert status == 2
    assert "outputs/compare_routers_quick: holds runs with other settings" in error
    assert not commands
    assert study("--quick", "--seeds", "2")[0] == 0  # more seeds only add runs


def test_a_parent_of_ones_own_may_depend_on_the_seed(study, monkeypatch):
    for parent, first, second in (("mine", "mine", "mine"), ("mine/{seed}", "mine/0", "mine/1")):
        monkeypatch.setenv("PARENT", parent)
        _, commands, _ = study("--seeds", "2", "--out", f"out{len(parent)}")
        assert not having(commands, "pretrain_align")
        trained = having(commands, "train ", "moe=false")
        assert [having(trained, f"model.checkpoint={name} ") != [] for name in (first, second)] == [True, True]


def test_unknown_argument(study):
    status, _, error = study("--quik")
    assert status == 2
    assert "unknown argument '--quik'" in error
