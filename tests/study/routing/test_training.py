"""The optimizer is torch's, runs do not disturb each other, and tasks and rules are what they say."""

import math

import pytest
import torch
import torch.nn.functional as F

from llava_compete.study.routing import facts, sources, teacher
from llava_compete.study.routing.draws import generator_of
from llava_compete.study.routing.layer import MoeLayer, Widths
from llava_compete.study.routing.optimizer import RunsAdamW
from llava_compete.study.routing.rules import RULES
from llava_compete.study.routing.tasks import TASKS
from llava_compete.study.routing.training import train


def test_each_run_is_torchs_adamw_with_its_own_rate_and_clipping():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, generator=generator)]
    targets = [
        torch.randn(tensor.shape, generator=generator) * scale for tensor, scale in zip(start, (9, 1), strict=True)
    ]
    rates, steps = torch.tensor([0.1, 0.02]), 6
    ours = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = RunsAdamW(ours, rates, steps, warmup=1 / 3, floor=0.05)
    for _ in range(steps):
        sum(((a - b) ** 2).sum() for a, b in zip(ours, targets, strict=True)).backward()
        optimizer.step()
    for run, rate in enumerate(rates.tolist()):
        theirs = [torch.nn.Parameter(tensor[run].clone()) for tensor in start]
        reference = torch.optim.AdamW(theirs, rate, betas=(0.9, 0.98), weight_decay=0.01)

        def share(step):
            progress = (step - 2) / 4
            return (step + 1) / 2 if step < 2 else 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(reference, share)
        for _ in range(steps):
            reference.zero_grad()
            sum(((a - b[run]) ** 2).sum() for a, b in zip(theirs, targets, strict=True)).backward()
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            reference.step()
            schedule.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a[run], b)


@pytest.mark.parametrize("name", ["published", "judge_mean", "sparsemixer", "random"])
def test_a_run_is_the_same_alone(name):
    task, rule = TASKS["teacher_competition_1000"], RULES[name]
    together = train(task, rule, [3, 4], [0.01, 0.02], 6, "cpu")
    alone = train(task, rule, [4], [0.02], 6, "cpu")
    assert together.scores[1] == pytest.approx(alone.scores[0], rel=1e-4)
    assert together.prices[1] == pytest.approx(alone.prices[0])


def test_runs_of_a_seed_share_data_order_and_start():
    made = [facts.Facts(RULES[name], [5], 3, "cpu", 2) for name in ("softmax", "published", "judge_all")]
    for other in made[1:]:
        assert torch.equal(made[0].answers, other.answers)
        assert torch.equal(made[0].drawn, other.drawn)
        assert all(torch.equal(a, b) for a, b in zip(made[0].parameters, other.parameters, strict=True))


def test_a_dense_layer_can_start_as_experts_do():
    made = [MoeLayer(RULES[name], Widths(6, 2, 8, 4), [0], 0, "cpu") for name in ("dense_all", "dense_all_start")]
    assert torch.equal(made[0].up, made[1].up)
    torch.testing.assert_close(made[0].down * 6**0.5, made[1].down)
    assert made[1].down.detach().abs().max().item() == pytest.approx(1 / 4**0.5, rel=0.1)


@pytest.mark.parametrize("gate", ["softmax", "competition", "clusters"])
def test_what_the_teachers_say_is_what_their_gate_chooses(gate):
    """By a loop over points and true experts, from the same draws."""
    inputs, noisy, test_inputs, test_targets = teacher._data(0, gate, 4000)
    rng = generator_of(0, "teacher", gate)
    up, down, gates, centres = (
        torch.randn(shape, generator=rng) * scale
        for shape, scale in (
            ((8, 12, 6), 1.5 / 12**0.5),
            ((8, 6, 12), 2 / 6**0.5),
            ((8, 12), 2.5 / 12**0.5),
            ((8, 12), 1.2),
        )
    )
    drawn = torch.randn(6000, 12, generator=rng)
    cluster = torch.randint(8, (6000,), generator=rng).tolist()
    x = torch.cat([test_inputs, inputs])
    said = []
    for point in (*range(30), *range(2000, 2030)):
        answers = [F.gelu(x[point] @ up[e]) @ down[e] for e in range(8)]
        if gate == "clusters":
            torch.testing.assert_close(x[point], centres[cluster[point]] + 0.6 * drawn[point])
            said.append(answers[cluster[point]])
            continue
        torch.testing.assert_close(x[point], drawn[point])
        by_gate = (gates @ x[point]).exp()
        scores = [float(by_gate[e] if gate == "softmax" else F.softplus(answers[e]).mean()) for e in range(8)]
        best = sorted(range(8), key=lambda e: -scores[e])[:2]
        said.append(sum(scores[e] * answers[e] for e in best) / sum(scores[e] for e in best))
    said = torch.stack(said)
    scale = (said[:30].norm() / test_targets[:30].norm()).item()
    torch.testing.assert_close(said[:30], scale * test_targets[:30], rtol=1e-4, atol=1e-4)
    assert (noisy[:30] - said[30:] / scale).std().item() == pytest.approx(0.1, rel=0.15)
    assert test_targets.std() == pytest.approx(1, abs=0.1)


def test_prices_are_those_of_the_experts_that_answer():
    layer = MoeLayer(RULES["judge_all"], Widths(6, 2, 8, 4), [0], 0, "cpu")
    x = torch.randn(1, 10, 8)
    layer(x, competing_R=torch.ones(1, dtype=torch.bool)).sum().backward()
    assert layer.price_R.item() == pytest.approx(4 / 3 / 2)  # four forwards beside two experts forth and back
    layer = MoeLayer(RULES["published"], Widths(6, 2, 8, 4), [0, 1], 0, "cpu")
    layer(x.expand(2, -1, -1), competing_R=torch.tensor([True, False]))
    assert layer.price_R.tolist() == [2.0, 0.0]


def test_running_means_answer_for_experts_that_are_not_asked():
    """Against the sum over tokens and experts written out."""
    layer = MoeLayer(RULES["judge_mean"], Widths(4, 2, 6, 3), [0], 0, "cpu")
    x, judged = torch.randn(1, 7, 6), torch.ones(1, dtype=torch.bool)
    kept = layer.judging
    kept.seen_RFE[:], kept.means_RFEO = True, torch.randn(kept.means_RFEO.shape)
    means = kept.means_RFEO[:, 0].clone()
    plain = layer(x)
    pull = torch.randn(plain.shape)
    router = layer.router.weights["weight"]
    (without,) = torch.autograd.grad((plain * pull).sum(), router)
    (found,) = torch.autograd.grad((layer(x, competing_R=judged) * pull).sum(), router)
    probs = (x[0] @ router[0].t()).softmax(-1)
    total = 0.0
    for t in range(7):
        for e in set(range(4)) - set(probs[t].topk(2).indices.tolist()):
            # After one plain forward the means have moved; the second forward used those.
            answer = _moved(layer, x, means, e)
            total = total + probs[t, e] * (pull[0, t] @ (answer - plain[0, t].detach()))
    (expected,) = torch.autograd.grad(total, router)
    torch.testing.assert_close(found - without, expected, rtol=1e-3, atol=1e-5)


def _moved(layer, x, means, expert):
    """An expert's mean after one forward: 0.9 of what it was, 0.1 of its mean answer to the tokens that chose it."""
    chose = (x[0] @ layer.router.weights["weight"][0].t()).topk(2).indices.eq(expert).any(1)
    if not chose.any():
        return means[0, expert]
    hidden = F.gelu(x[0, chose] @ layer.up[0, expert].t())
    return (0.9 * means[0, expert] + 0.1 * (hidden @ layer.down[0, expert]).mean(0)).detach()


def test_remoe_pulls_harder_while_too_many_experts_are_on():
    layer = MoeLayer(RULES["remoe"], Widths(8, 2, 6, 3), [0], 0, "cpu")
    x = torch.randn(1, 64, 6)
    layer(x)
    assert layer.sparsity_R.item() == pytest.approx(1.2e-8)  # about half of eight are on, two are wanted
    layer.aux_R.sum().backward()
    logits = (x[0] @ layer.router.weights["weight"][0].t()).relu()
    used = (logits > 0).float().mean(0) * 8 / 2
    assert layer.aux_R.item() == pytest.approx(1e-8 * (used * logits).sum(1).mean().item(), rel=1e-4)
    assert layer.price_R.item() == pytest.approx(((logits > 0).sum(1).float().mean().item() - 2) / 2, rel=1e-4)
    with torch.no_grad():
        layer.router.weights["weight"][:, 1:] = -layer.router.weights["weight"][:, :1]
        layer.router.weights["weight"][:, 2:] = 0.0
    layer(x)
    assert layer.sparsity_R.item() == pytest.approx(1e-8)  # one is on


def test_sparse_mixer_draws_near_the_best_only_and_is_greedy_at_inference():
    layer = MoeLayer(RULES["sparsemixer"], Widths(6, 2, 5, 3), [0], 0, "cpu")
    x = torch.randn(1, 50, 5)
    with torch.no_grad():
        layer.router.weights["weight"] *= 100
    logits = x[0] @ layer.router.weights["weight"][0].t()
    greedy = layer.router(x, training=False)
    best = torch.zeros_like(logits).scatter_(1, logits.topk(2).indices, 1.0).bool()
    assert torch.equal(greedy.chosen_RTE[0], best)
    drawn = layer.router(x, training=True).chosen_RTE[0]
    assert (drawn.sum(-1) == 2).all()
    assert (drawn == best).float().mean() > 0.9


def test_six_sources_have_bytes_of_their_own():
    found = sources.read_sources(20_000, 4_000)
    assert [source.name for source in found] == ["Python", "C++", "English", "JSON", "Perl", "tests"]
    assert len({source.train[:200] for source in found}) == 6
    assert all(source.origin and source.train[:1000] not in source.held_out for source in found)


def test_a_wide_start_widens_the_routers_alone():
    made = [TASKS[name].build(RULES["softmax"], [5], 3, "cpu") for name in ("facts_8", "wide_facts_8")]
    for narrow, wide in zip(*(network.layers for network in made), strict=True):
        torch.testing.assert_close(wide.router.weights["weight"], narrow.router.weights["weight"] / 0.02 * 0.02**0.5)
        assert torch.equal(wide.up, narrow.up)
        assert torch.equal(wide.down, narrow.down)
    assert torch.equal(made[0].drawn, made[1].drawn)


@pytest.mark.parametrize("tasks", [8, 24])
def test_a_fixed_choice_can_be_even(tasks):
    by_hash, even = (facts.Facts(RULES[name], [5], 3, "cpu", tasks).fixed for name in ("fixed", "fixed_evenly"))
    for unequal, equal in zip(by_hash, even, strict=True):
        assert equal.sum(1).tolist() == unequal.sum(1).tolist() == [2] * tasks
        assert equal.sum(0).tolist() == [tasks // 4] * 8
        assert len(set(unequal.sum(0).tolist())) > 1
