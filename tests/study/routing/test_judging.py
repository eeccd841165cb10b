"""Every explored form of the judge against sums over tokens and experts written out, and when and where it judges."""

import pytest
import torch
import torch.nn.functional as F

from llava_compete.study.routing.layer import MoeLayer, Widths
from llava_compete.study.routing.rules import EXPLORED, RULES
from llava_compete.study.routing.tasks import TASKS
from llava_compete.study.routing.training import _schedule, train

WIDTHS = Widths(num_experts=4, num_chosen=2, hidden=6, intermediate=3)
TOKENS = 9
JUDGED = torch.ones(1, dtype=torch.bool)
FORMS = [name for name in EXPLORED if RULES[name].judge]


def layer_of(rule, key=0):
    layer = MoeLayer(rule, WIDTHS, [0], key, "cpu")
    with torch.no_grad():
        layer.router.weights["weight"] *= 30
    return layer


def seen(layer, x):
    """Of each token: its probabilities, its choice from the most probable on, and what every expert would answer."""
    probs = (x @ layer.router.weights["weight"][0].t()).softmax(-1)
    answers = torch.einsum("tei,eio->teo", F.gelu(torch.einsum("td,eid->tei", x, layer.up[0])), layer.down[0])
    return probs, probs.topk(2).indices.tolist(), answers.detach()


def estimate_of(judge, before, expert, token, first):
    """What stands for an expert's answer to a token, from the steps before; None if it was never seen."""
    if judge.estimate == "linear":
        rows, targets = [], []
        for age, (x, (_, choices, answers)) in enumerate(reversed(before)):
            for t in range(TOKENS):
                if expert in choices[t]:
                    rows.append(judge.decay ** (age / 2) * torch.cat([x[t], torch.ones(1)]))
                    targets.append(judge.decay ** (age / 2) * answers[t, expert])
        if not rows:
            return None
        rows, targets = torch.stack(rows).double(), torch.stack(targets).double()
        ridge = 1e-3 * rows.square().sum(0).mean()
        rows = torch.cat([rows, ridge.sqrt() * torch.eye(7)])
        found = torch.linalg.lstsq(rows, torch.cat([targets, torch.zeros(7, 6)])).solution
        return torch.cat([token, torch.ones(1)]) @ found.float()
    mean = None
    for x, (_, choices, answers) in before:
        now = []
        for t in range(TOKENS):
            if expert not in choices[t] or (judge.estimate == "last" and choices[t][-1] != expert):
                continue
            if judge.estimate == "pair" and first not in choices[t]:
                continue
            now.append(answers[t, expert] / (x[t].norm() if judge.estimate == "norm" else 1))
        if now:
            fresh = torch.stack(now).mean(0)
            mean = fresh if mean is None else judge.decay * mean + (1 - judge.decay) * fresh
    return mean if mean is None or judge.estimate != "norm" else mean * token.norm()


def margin_of(judge, key, progress):
    if judge.deep_margin is not None and key:
        return judge.deep_margin
    return judge.margin if judge.last_margin is None else judge.margin + progress * (judge.last_margin - judge.margin)


@pytest.mark.parametrize("key", [0, 1])
@pytest.mark.parametrize("name", FORMS)
def test_the_term_is_the_sum_written_out(name, key):
    judge, layer = RULES[name].judge, layer_of(RULES[name], key)
    generator = torch.Generator().manual_seed(1)
    before = []
    for _ in range(2):
        x = torch.randn(1, TOKENS, 6, generator=generator)
        layer(x)
        before.append((x[0], seen(layer, x[0])))
    layer.judging.progress = 0.25
    x, pull = (torch.randn(1, TOKENS, 6, generator=generator) for _ in range(2))
    kept = {key: value.clone() for key, value in vars(layer.judging).items() if isinstance(value, torch.Tensor)}
    router = layer.router.weights["weight"]
    plain = layer(x)
    (without,) = torch.autograd.grad((plain * pull).sum(), router)
    vars(layer.judging).update(kept)
    (found,) = torch.autograd.grad((layer(x, competing_R=JUDGED) * pull).sum(), router)

    probs, choices, answers = seen(layer, x[0])
    margin = kept["margin_R11"].item() if judge.contested else margin_of(judge, key, 0.25)
    total = 0.0 * router.sum()
    for t in range(TOKENS):
        first, last = choices[t]
        outputs = {"output": plain[0, t].detach(), "last": answers[t, last]}
        if judge.baseline == "estimate":
            told = [estimate_of(judge, before, expert, x[0, t], first) for expert in (first, last)]
            both = probs[t, [first, last]].detach()
            outputs["estimate"] = sum(w * m for w, m in zip(both / both.sum(), told, strict=True) if m is not None)
        share = (probs[t, first] + probs[t, last]).detach() if judge.relative else 1.0
        for expert in set(range(4)) - {first, last}:
            near = bool(probs[t, expert] >= margin * probs[t, last])
            answer = answers[t, expert] if near and judge.answers != "mean" else None
            if judge.answers == ("mean" if near else "both"):
                answer = estimate_of(judge, before, expert, x[0, t], first)
            if answer is not None:
                total = total + probs[t, expert] / share * (pull[0, t] @ (answer - outputs[judge.baseline]))
    (expected,) = torch.autograd.grad(total, router)
    torch.testing.assert_close(found - without, expected, rtol=1e-3, atol=2e-5)


def test_a_margin_can_hold_the_share_of_contested_experts():
    layer = layer_of(RULES["share_25"])
    x = torch.randn(1, 400, 6, generator=torch.Generator().manual_seed(0))
    shares = []
    for _ in range(120):
        layer(x, competing_R=JUDGED)
        shares.append(layer.judging.near_R.item())
    assert sum(shares[-20:]) / 20 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("name", "judging"), [("first_half", [1, 1, 0, 0]), ("all_second_half", [0, 0, 1, 1]), ("judge_all", [1, 1, 1, 1])]
)
def test_a_judge_may_judge_in_a_part_of_the_steps(name, judging):
    marks = _schedule(RULES[name], [0, 1], 4, 2)
    assert marks.int().tolist() == [[[mark] * 2] * 2 for mark in judging]


def test_a_margin_moves_with_the_training(monkeypatch):
    margins = []
    plain = type(layer_of(RULES["margin_falls"]).judging)._margin
    monkeypatch.setattr(
        "llava_compete.study.routing.judging.Judging._margin",
        lambda self: margins.append(plain(self)) or margins[-1],
    )
    train(TASKS["teacher_competition_1000"], RULES["margin_falls"], [0], [0.01], 4, "cpu")
    assert margins == [1.0, 0.875, 0.75, 0.625]


def test_a_map_of_the_token_is_paid_for():
    layer = layer_of(RULES["mean_linear"])
    x = torch.randn(1, 50, 6)
    layer(x)
    layer(x, competing_R=JUDGED)
    # In one of two steps two experts, each a map of 6 x 6 beside 6 x 3 and 3 x 6, a forward, beside two forth and back.
    assert layer.price_R.item() == pytest.approx(2 * (36 / 36) / 3 / 2 / 2)
