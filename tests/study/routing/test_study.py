"""The command from runs to table: what is kept, what goes on, and which softmax a rule is compared with."""

import dataclasses
import json
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool

import pytest

from llava_compete import cli
from llava_compete.errors import UserError
from llava_compete.evaluation.compare.statistics import paired_t
from llava_compete.files import write_json
from llava_compete.study.routing import first_study, grid, plans, report, results, tasks, teacher
from llava_compete.study.routing.rules import EXPLORED

TASK = "teacher_competition_1000"
RULES = ("softmax", "judge_all", "random")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, TASK, dataclasses.replace(tasks.TASKS[TASK], steps=6))


def test_the_command_writes_its_files_and_goes_on_where_it_was(tmp_path, monkeypatch, short, capsys):
    monkeypatch.setattr(plans, "default_plan", lambda seeds: plans.Plan((((TASK,), RULES, (1.0,)),), seeds))
    command = ["study", "routing", "--out", str(tmp_path), "--workers", "1", "--seeds"]
    assert cli.main([*command, "2"]) == 0
    kept = tmp_path / "runs" / TASK / "judge_all-x1.json"
    before = json.loads(kept.read_text())
    assert before["seeds"] == [0, 1]
    # Ten of twelve experts answer, a forward each, beside two forth and back: softmax has 10 / 6 more steps.
    assert (tmp_path / "runs" / TASK / "softmax-x1-steps+167%.json").is_file()
    assert cli.main([*command, "3"]) == 0
    after = json.loads(kept.read_text())
    assert after["seeds"] == [0, 1, 2]
    assert after["scores"][:2] == before["scores"]
    content = json.loads((tmp_path / "routing.json").read_text())
    assert sum(len(file["scores"]) for file in content["runs"]) == 3 * 4
    assert (tmp_path / "routing.png").stat().st_size > 5000
    assert "| judged by the loss, baseline output, all asked | 3 |" in (tmp_path / "README.md").read_text()
    assert "(stopped" not in capsys.readouterr().out


def test_a_study_out_of_time_reports_what_it_has(tmp_path, short):
    plan = plans.Plan((((TASK,), RULES, (1.0,)),), 2)
    assert grid.run(plan, tmp_path, "cpu", minutes=0.0) is False
    assert not (tmp_path / "runs").exists()
    assert grid.estimated_hours(plan, tmp_path, "cpu") > 0
    for rule in RULES:
        keep(tmp_path, rule, [0.3, 0.4], task=TASK)
    assert grid.estimated_hours(plan, tmp_path, "cpu") == 0


def test_the_hours_said_beforehand_charge_what_a_run_has_once_once(tmp_path, short, monkeypatch):
    # A build of 3 s, steps of 0.1 s for all runs of a program, a score of 2 s: of 6 steps 5.6 s a program of 30 runs.
    clock = [0.0]
    monkeypatch.setattr(grid.time, "perf_counter", lambda: clock[0])

    def train(task, rule, seeds, rates, steps, device):
        clock[0] += 3 + 0.1 * steps + 2

    monkeypatch.setattr(grid, "train", train)
    monkeypatch.setitem(tasks.TASKS, TASK, dataclasses.replace(tasks.TASKS[TASK], steps=6))
    plan = plans.Plan((((TASK,), RULES, (1.0, 2.0)),), 30)
    # Three rules at two rates; softmax of equal arithmetic is taken for half as much again, at the first rate only.
    expected = (3 * 1.5 + 3) * 5.6 / 3600
    assert grid.estimated_hours(plan, tmp_path, "cpu") == pytest.approx(expected)
    assert grid.estimated_hours(plan, tmp_path, "cpu", workers=2) == pytest.approx(expected / 2)


def test_several_processes_find_what_one_finds(tmp_path, short):
    plan = plans.Plan((((TASK,), ("softmax", "judge_all"), (1.0,)),), 2)
    for workers in (1, 2):
        assert grid.run(plan, tmp_path / str(workers), "cpu", workers=workers)
    for path in (tmp_path / "1").rglob("*.json"):
        one, two = (json.loads((tmp_path / n / path.relative_to(tmp_path / "1")).read_text()) for n in "12")
        assert one["seeds"] == two["seeds"]
        assert one["scores"] == pytest.approx(two["scores"], rel=1e-4)
    assert sum(1 for _ in (tmp_path / "2").rglob("*.json")) == 3  # with softmax of equal arithmetic


def test_a_worker_that_dies_is_one_line(tmp_path, short, monkeypatch):
    class Broken(Executor):
        def submit(self, *work):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(grid, "_executor", lambda workers: Broken())
    with pytest.raises(UserError, match=r"a process that trained .* on teacher_competition_1000 died"):
        grid.run(plans.Plan((((TASK,), RULES, (1.0,)),), 2), tmp_path, "cpu", workers=2)


def keep(out, rule, scores, extra=0, times=1.0, price=0.0, seeds=None, task="facts_8"):
    unit = plans.Unit(task, rule, times, extra)
    seeds = list(range(len(scores))) if seeds is None else seeds
    unit.path(out).parent.mkdir(parents=True, exist_ok=True)
    content = {**unit._asdict(), "seeds": seeds, "scores": scores, "prices": [price] * len(scores)}
    write_json(unit.path(out), content)


def test_differences_are_paired_by_seed_at_equal_samples_arithmetic_and_best_rate(tmp_path):
    keep(tmp_path, "softmax", [80.0, 82.0, 90.0])
    keep(tmp_path, "softmax", [83.0, 86.0, 92.0], extra=13)
    keep(tmp_path, "softmax", [95.0, 96.0, 97.0], times=2.0)
    keep(tmp_path, "judge_all", [93.5, 83.0, 84.0], price=0.134, seeds=[2, 0, 1])
    keep(tmp_path, "judge_all", [94.0, 96.0, 96.5], times=2.0, price=0.12)
    row = next(row for row in results.Runs(tmp_path).rows("facts_8") if row.rule == "judge_all")
    assert row.samples == paired_t([3.0, 2.0, 3.5])
    assert row.arithmetic == paired_t([0.0, -2.0, 1.5])
    assert row.best_rate == 2.0
    assert row.best == paired_t([-1.0, 0.0, -0.5])
    text = report.describe(results.Runs(tmp_path), "command", True)
    assert "| +13% | **+2.8 ± 1.9** | -0.2 ± 4.4 |" in text


def test_the_sources_of_bytes_are_said(tmp_path):
    keep(tmp_path, "softmax", [3.4, 3.5], task="bytes")
    keep(tmp_path, "judge_all", [3.4, 3.6], task="bytes")
    runs = results.Runs(tmp_path)
    found = report.to_json(runs, "command")["byte_sources"]
    assert found["C++"] == "PyTorch's headers"
    assert f"Perl ({found['Perl']})" in report.describe(runs, "command", True)


def test_numbers_stand_beside_those_of_the_first_study(tmp_path):
    seeds = range(4)
    keep(tmp_path, "softmax", [80.0, 80.5, 81.0, 80.5])
    keep(tmp_path, "judge_all", [83.7, 84.2, 84.7, 84.1])  # +3.675 beside +3.7 ± 0.6
    keep(tmp_path, "judge_mean", [86.0, 80.5, 88.0, 82.5])  # +3.75 ± 5.4 beside +2.5 ± 0.6
    keep(tmp_path, "published", [80.0, 80.6, 81.0, 80.5])  # 0 ± 0.1 beside -5.9 ± 0.5
    task = "teacher_competition_1000"
    keep(tmp_path, "softmax", [0.3, 0.31, 0.32, 0.33], task=task)
    runs = results.Runs(tmp_path)
    rows = {(row.rule, row.theirs): row for row in first_study.beside(runs, "facts_8")}
    verdicts = {rule: (row.outside, row.apart) for (rule, _), row in rows.items()}
    assert verdicts["judge_all"] == (False, False)
    assert verdicts["judge_mean"] == (True, False)
    assert verdicts["published"] == (True, True)
    own, pooled = first_study.beside(runs, task)
    assert own.ours == pytest.approx(0.315)
    expected = 0.0
    for seed, score in zip(seeds, [0.3, 0.31, 0.32, 0.33], strict=True):
        targets = teacher._data(seed, "competition", 1000)[3]
        squares = [score * ((targets[:, o] - targets[:, o].mean()) ** 2).sum() for o in range(targets.shape[1])]
        expected += float(sum(squares) / ((targets - targets.mean()) ** 2).sum()) / 4
    assert pooled.ours == pytest.approx(expected, rel=1e-4)
    text = report.describe(runs, "command", True)
    assert "judged by the loss, baseline output, all asked | +3.7 ± 0.1 | +3.7 ± 0.6 | agrees |" in text
    assert "| softmax, variance about one mean | 0." in text


def test_explored_rules_are_in_no_other_preset_and_confirmed_on_fresh_seeds():
    explored, fresh = plans.explore_plan(), plans.confirm_plan()
    assert {unit.rule for unit in explored.units()} > set(EXPLORED)
    assert not set(EXPLORED) & {unit.rule for unit in (*plans.default_plan().units(), *plans.full_plan().units())}
    unit = plans.Unit("facts_8", "softmax")
    assert not set(explored.seeds_of(unit)) & set(fresh.seeds_of(unit))
    assert len(fresh.seeds_of(unit)) == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "--seeds: found 1, expected at least 2"),
        (["--workers", "0"], "--workers: found 0, expected 1 or more"),
        (["--device", "cuda"], "--device: found 'cuda'"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    assert cli.main(["study", "routing", "--out", str(tmp_path), *words]) != 0
    assert message in capsys.readouterr().err
