"""The report of one run or of several side by side: report.html, report.json and figures/.

Each part is left out where a run has nothing for it, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from llava_compete.evaluation.checkpoint_routing import CheckpointRouting, Example
from llava_compete.evaluation.routing_data import TOKEN_CLASSES
from llava_compete.evaluation.spreading import spread
from llava_compete.evaluation.token_choices import Patch
from llava_compete.files import write_json
from llava_compete.parts import PARTS
from llava_compete.report.choice_maps import map_of_layers, token_table
from llava_compete.report.heat_maps import (
    as_data_url,
    layer_lines,
    load_maps,
    png_of,
    square_maps,
)
from llava_compete.report.over_steps import checkpoints_section, training_section
from llava_compete.report.page import Page, table_html
from llava_compete.report.routing_facts import KINDS, routing_facts
from llava_compete.report.run_facts import RunFacts, scores_by_type

NO_VALUE = "–"
MOST_TOKENS = 60  # answer tokens of an example that the map shows
MOST_PAIR_LAYERS = 8
CONTROLS = {
    "router": "the router",
    "random": "experts at random",
    "shifted": "the router's choice, each shifted by one expert",
    "fixed": "the most used experts for every token",
    "mean_of_all": "the mean of all experts",
    "competition": "the competition of all experts",
}


def write_run_report(
    runs: Sequence[RunFacts], routing: Mapping[str, CheckpointRouting], directory: Path, command: str
) -> list[Path]:
    """Write report.html, report.json and figures; returns the first two paths.

    Args:
        routing: by run name what was measured; runs without a mixture have examples only.
    """
    directory.mkdir(parents=True, exist_ok=True)
    page = Page(f"Report: {', '.join(run.name for run in runs)}", directory)
    page.html(f"<pre>{escape(command)}</pre>")
    facts = {name: routing_facts(found) for name, found in routing.items()}
    _overview(page, runs, facts)
    checkpoints_section(page, routing, facts)
    _scores(page, runs)
    for run in runs:
        title = run.name if len(runs) > 1 else "Routing"
        training_section(page, run)
        if facts.get(run.name, {}).get("layers"):
            page.heading(f"Routing of {title}" if len(runs) > 1 else title)
            _routing(page, run.name, facts[run.name], routing[run.name])
        if run.name in routing and routing[run.name].examples:
            page.heading(f"Answers of {run.name}" if len(runs) > 1 else "Answers")
            _examples(page, run.name, routing[run.name])
    content = {
        "command": command,
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "stage": run.stage,
                "scores": _type_scores(run),
                "dense_parent": None
                if run.dense_parent is None
                else {"path": str(run.dense_parent.path), "scores": _type_scores(run.dense_parent)},
                "routing": facts.get(run.name),
            }
            for run in runs
        ],
    }
    write_json(directory / "report.json", content)
    return [page.write(), directory / "report.json"]


def _type_scores(run: RunFacts) -> dict[str, Any]:
    return {task: [score.__dict__ for score in scores_by_type(units)] for task, units in run.units.items()}


def _overview(page: Page, runs: Sequence[RunFacts], facts: Mapping[str, dict[str, Any]]) -> None:
    page.heading("Overview")
    header = ["", *(run.name for run in runs)]
    rows = [
        ["directory", *(str(run.path) for run in runs)],
        ["stage", *(run.stage or NO_VALUE for run in runs)],
        ["dense parent", *(_parent(run) for run in runs)],
        ["experts", *(_experts(facts.get(run.name)) for run in runs)],
        ["steps logged to", *(str(run.steps[-1]["step"]) if run.steps else NO_VALUE for run in runs)],
        ["last loss (nats a token)", *(f"{run.steps[-1]['loss']:.4f}" if run.steps else NO_VALUE for run in runs)],
    ]
    for name, label in CONTROLS.items():
        controls = [(facts.get(run.name) or {}).get("controls", {}).get(name) for run in runs]
        if any(controls):
            cells = (f"{found['loss']:.3f} / {found['exact']:.3f}" if found else NO_VALUE for found in controls)
            rows.append([f"loss / exact answers, routed by {label}", *cells])
    page.table(header, rows)
    compared = dict.fromkeys(str(fact["compared_rows"]) for fact in facts.values() if fact.get("controls"))
    if compared:
        page.note(
            "Routed by something else than the router, in all layers at once, on the expected answers of "
            f"{'/'.join(compared)} rows of the data: where that costs nothing, routing does nothing in this "
            "checkpoint, and no comparison of routers on it means anything."
        )


def _parent(run: RunFacts) -> str:
    if run.dense_parent is None:
        return NO_VALUE
    return str(run.dense_parent.path) + ("" if run.dense_parent.units else " (not evaluated)")


def _experts(facts: dict[str, Any] | None) -> str:
    """Such as "language: 2 of 4, competition, 3 layers"."""
    if not facts or not facts["layers"]:
        return "none"
    words = []
    for part in PARTS:
        layers = [layer for name, layer in facts["layers"].items() if name.startswith(f"{part}.")]
        kinds = dict.fromkeys((layer["chosen"], layer["experts"], layer["router"]) for layer in layers)
        for chosen, experts, router in kinds:
            count = sum((la["chosen"], la["experts"], la["router"]) == (chosen, experts, router) for la in layers)
            words.append(f"{part}: {chosen} of {experts}, {router}, {count} layer{'s' if count > 1 else ''}")
    return "; ".join(words)


def _scores(page: Page, given: Sequence[RunFacts]) -> None:
    """By task and question type, of the runs and of the dense parents that were evaluated."""
    runs: list[RunFacts] = []
    parents = set[Path]()
    for run in given:
        runs.append(run)
        parent = run.dense_parent
        if parent is not None and parent.units and parent.path.resolve() not in parents:
            parents.add(parent.path.resolve())
            runs.append(replace(parent, name=f"dense parent of {run.name}"))
    tasks = list(dict.fromkeys(task for run in runs for task in run.units))
    if not tasks:
        return
    page.heading("Scores")
    for task in tasks:
        page.subheading(task)
        by_run = {run.name: {s.kind: s for s in scores_by_type(run.units[task])} for run in runs if task in run.units}
        kinds = list(dict.fromkeys(kind for scores in by_run.values() for kind in scores))
        rows = []
        for kind in kinds:
            counts = {scores[kind].count for scores in by_run.values() if kind in scores}
            cells = [_score(by_run.get(run.name, {}).get(kind)) for run in runs]
            rows.append([kind, "/".join(map(str, sorted(counts))), *cells])
        page.table(["question type", "n", *(run.name for run in runs)], rows)
        known = next(run.evaluation["tasks"][task] for run in runs if run.evaluation and task in run.units)
        beside = [
            f"{words} {100 * known[key]:.1f}"
            for key, words in (("chance", "best constant answer"), ("blind", "best answer by question type alone"))
            if key in known
        ]
        page.note(
            "Percent ± standard error over questions, those about one picture counted together. "
            + "; ".join(beside).capitalize()
        )


def _score(score: Any) -> str:
    if score is None:
        return NO_VALUE
    return f"{score.score:.1f}" + ("" if score.error is None else f" ± {score.error:.1f}")


def _routing(page: Page, run: str, facts: dict[str, Any], found: CheckpointRouting) -> None:
    where = f"{facts['rows']} rows of {', '.join(facts['sources'])}"
    for part in PARTS:
        layers = {name: layer for name, layer in facts["layers"].items() if name.startswith(f"{part}.")}
        if not layers:
            continue
        page.subheading(part)
        _part_loads(page, run, part, layers, facts, where)
        _part_lines(page, run, part, layers, facts, where)
        shown = _some(list(layers), MOST_PAIR_LAYERS)
        if all(layers[name]["chosen"] > 1 for name in shown):
            page.figure(
                square_maps({name: layers[name]["pairs"] for name in shown}, "observed / expected", 1.0, 1.0),
                f"{run}-{part}-pairs",
                f"How often two experts answer one token together, over what independent choices of these loads would "
                f"give; white is 1. {where}.",
            )
        _words(page, {name: layers[name]["words"] for name in _some(list(layers), 3) if layers[name]["words"]})
    _patches(page, found.patches or {})


def _part_loads(page: Page, run: str, part: str, layers: dict[str, Any], facts: dict[str, Any], where: str) -> None:
    kinds = {
        kind: {name: layer["by_kind"][kind]["load"] for name, layer in layers.items() if kind in layer["by_kind"]}
        for kind in KINDS
    }
    tokens = {kind: next(iter(layers.values()))["by_kind"].get(kind, {}).get("tokens", 0) for kind in KINDS}
    counted = ", ".join(f"{tokens[kind]:,} {kind}" for kind in KINDS if tokens[kind])
    page.figure(
        load_maps(kinds),
        f"{run}-{part}-load",
        f"Share of the choices that each expert gets, in multiples of even use (white), by kind of token. {where}; "
        f"tokens a layer: {counted}. Pictures and questions are the prefill, answers are decoded.",
    )
    if len(facts["sources"]) > 1:
        sources = {
            source: {n: la["by_source"][source]["load"] for n, la in layers.items() if source in la["by_source"]}
            for source in facts["sources"]
        }
        page.figure(load_maps(sources), f"{run}-{part}-sources", f"The same by data source. {where}.")


def _part_lines(page: Page, run: str, part: str, layers: dict[str, Any], facts: dict[str, Any], where: str) -> None:
    kinds = [kind for kind in KINDS if any(kind in layer["by_kind"] for layer in layers.values())]

    def by_kind(key: str) -> dict[str, dict[str, float]]:
        return {k: {n: la["by_kind"][k][key] for n, la in layers.items() if k in la["by_kind"]} for k in kinds}

    page.figure(
        layer_lines({"entropy (nats)": by_kind("entropy"), "margin": by_kind("margin")}),
        f"{run}-{part}-entropy",
        f"Mean entropy of the router's probabilities, and by how much the last chosen expert's is above the best one's "
        f"left out. {where}.",
    )
    header = ["layer"]
    columns: list[list[str]] = []
    if any("worth" in layer for layer in layers.values()):
        header += ["regret of a random choice (nats)", "tokens that it serves better"]
        columns += [[f"{layer['worth']['regret']:+.4f}" for layer in layers.values()]]
        columns += [[f"{layer['worth']['lower']:.1%}" for layer in layers.values()]]
    if any("competition" in layer for layer in layers.values()):
        header += ["winners found (recall@K)", "KL(competition || router)"]
        for key, form in (("recall", ".3f"), ("divergence", ".4f")):
            found = [layer.get("competition") for layer in layers.values()]
            columns.append([format(contest[key], form) if contest else NO_VALUE for contest in found])
    if any("likeness" in layer for layer in layers.values()):
        header += ["cosine of weights", "cosine of outputs"]
        columns += [[f"{layer['likeness'][key]:.3f}" for layer in layers.values()] for key in ("weights", "outputs")]
    if columns:
        page.table(header, zip(layers, *columns, strict=True))
        page.note(
            f"Regret, on {facts['compared_rows']} rows: mean loss of the answers' tokens with this layer alone routed "
            "at random, minus that with the router, and the share of draws that a token was served better by; near 0 "
            "and 50% the choice does not matter here. Cosines between two experts, mean over pairs: near 1 they are "
            "still copies of one another."
        )


def _words(page: Page, words: Mapping[str, Any]) -> None:
    for name, experts in words.items():
        rows = [
            [str(number), ", ".join(f"{_shown(word['word'])} ({word['lift']:.1f})" for word in found)]
            for number, found in enumerate(experts)
        ]
        page.html(f"<details><summary>{escape(name)}: words that each expert answers most</summary>")
        page.html(table_html(["expert", "word (share of its choices over the expert's share of all)"], rows))
        page.html("</details>")


def _shown(word: str) -> str:
    return repr(word) if word != word.strip() or not word else word


def _patches(page: Page, patches: Mapping[str, list[list[Patch]]]) -> None:
    for name, experts in patches.items():
        lines = []
        for number, found in enumerate(experts):
            crops = "".join(
                f'<img alt="patch" title="{patch.probability:.2f}" src="{as_data_url(png_of(patch.picture))}">'
                for patch in found
            )
            lines.append(f'<tr><td>{number}</td><td class="crops text">{crops}</td></tr>')
        page.html(f"<details><summary>{escape(name)}: patches of which each expert's router is surest</summary>")
        page.html(f"<table><tr><th>expert</th><th>patches, one of a picture at most</th></tr>{''.join(lines)}</table>")
        page.html("</details>")


def _examples(page: Page, run: str, found: CheckpointRouting) -> None:
    page.note("Greedy answers. The maps show the experts of the expected answer's tokens, and of every patch.")
    for number, example in enumerate(found.examples):
        _example(page, f"{run}-example{number}", example, found)


def _example(page: Page, name: str, example: Example, found: CheckpointRouting) -> None:
    row, choices = example.row, example.choices
    pictures = "".join(f'<img alt="picture" src="{as_data_url(png_of(picture))}">' for picture in row.images)
    page.html(
        f'<div class="answer">{pictures}<table>'
        f'<tr><th>question</th><td class="text">{escape(row.question.replace("<image>", "").strip())}</td></tr>'
        f'<tr><th>expected</th><td class="text">{escape(row.answer)}</td></tr>'
        f'<tr><th>answer</th><td class="text">{escape(example.answer)}</td></tr>'
        f"<tr><th>from</th><td>{escape(row.source)}/{escape(row.id)}</td></tr></table></div>"
    )
    if not found.settings:
        return
    experts = max(setting["experts"] for setting in found.settings.values())
    for number, picture in enumerate(choices.pictures):
        maps = {layer: of_layer[number] for layer, of_layer in choices.maps.items()}
        figure, caption = map_of_layers(picture, maps, experts)
        page.figure(figure, f"{name}-patches{number}", caption)
    answer = [place for place, kind in enumerate(choices.classes) if TOKEN_CLASSES[kind] == "answer"][:MOST_TOKENS]
    if choices.tokens and answer:
        rows = {layer: chosen.experts[answer] for layer, chosen in choices.tokens.items()}
        page.html(token_table([choices.text[place] for place in answer], rows, experts))


def _some(names: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, from the first to the last."""
    return [names[place] for place in spread(len(names), count)]
