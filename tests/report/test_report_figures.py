"""Figures stay readable at the sizes that people have: their pixels, and ink on its background."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from llava_compete.evaluation.picture_choices import ShownPicture
from llava_compete.report.choice_maps import patch_figure, token_table
from llava_compete.report.colors import expert_colors, ink_on
from llava_compete.report.forest import ForestRow, plot_forest
from llava_compete.report.heat_maps import load_maps, render, square_maps, step_maps


def pixels(figure: plt.Figure) -> tuple[int, int]:
    size = Image.open(io.BytesIO(render(figure, "png"))).size
    plt.close(figure)
    return size


def test_a_load_map_of_32_layers_and_64_experts_fits_a_screen() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(64), size=32)
    layers = {f"language.{layer}": row.tolist() for layer, row in enumerate(shares)}
    figure = load_maps({"picture": layers, "question": layers, "answer": layers})
    for axis in figure.axes[:3]:
        assert len(axis.get_xticks()) <= 16
        image = axis.images[0]
        assert (image.norm.vmin, image.norm.vmax) == (0, 2)  # even use is the colour in the middle
    width, height = pixels(figure)
    assert width < 2000
    assert height < 1800


def test_cells_are_multiples_of_even_use() -> None:
    figure = load_maps({"answer": {"language.0": [0.5, 0.25, 0.25, 0.0]}})
    assert figure.axes[0].images[0].get_array().tolist() == [[2.0, 1.0, 1.0, 0.0]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["2.00", "1.00", "1.00", "0.00"]
    plt.close(figure)


def test_steps_of_32_layers_are_means_of_spans() -> None:
    """600 steps in 60 columns; a layer that is logged now and then is blank between."""
    steps = list(range(1, 601))
    series = {f"language.{layer}": (steps, [float(layer)] * 599 + [layer + 10.0]) for layer in range(32)}
    figure = step_maps({"vision.0": ([1, 3], [1.0, 2.0]), **series}, "nats")
    above, below = (figure.axes[place].images[0].get_array() for place in (0, 1))
    assert above.shape == (1, 60)
    assert above[0, 0] == 1.5
    assert np.ma.getmaskarray(above)[0, 1:].all() or np.isnan(above[0, 1:]).all()
    assert below[5, :59].tolist() == [5.0] * 59
    assert below[5, 59] == pytest.approx(6.0)
    assert len({axis.images[0].norm.vmax for axis in figure.axes[:2]}) == 1
    width, height = pixels(figure)
    assert width < 1200
    assert height < 1500


def test_layers_without_a_pair_stay_blank() -> None:
    figure = square_maps({"a": [[1.0, None], [2.0, 1.0]]}, "ratio", 1.0, 1.0)
    cells = figure.axes[0].images[0].get_array()
    assert np.ma.getmaskarray(cells).tolist() == [[True, True], [False, True]] or np.isnan(cells[0, 1])
    plt.close(figure)


def test_a_forest_of_16_benchmarks_and_6_methods(tmp_path: Path) -> None:
    names = [f"benchmark{number}" for number in range(15)]
    rows = [
        ForestRow(name, f"m{n}", n - 2.5, (n - 4, n - 1), (n - 3, n - 2)) for name in [*names, "mean"] for n in range(6)
    ]
    plot_forest(rows, "softmax", tmp_path / "forest.png", 1.0, first="mean", apart=["m5"])
    width, height = Image.open(tmp_path / "forest.png").size
    assert width < 1200
    assert height < 2500


@pytest.mark.parametrize("count", [4, 8, 64])
def test_every_expert_has_a_colour_of_its_own_and_readable_ink(count: int) -> None:
    colors = expert_colors(count)
    assert len(set(colors)) == count
    for color in colors:
        assert contrast(color, ink_on(color)) > 4.5  # WCAG's least for text


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    linear = []
    for start in (1, 3, 5):
        value = int(color[start : start + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_patches_stand_where_they_are() -> None:
    """The panel's cell at row r and column c is the colour of that expert, its number in the middle of its place on
    the picture; layers may have other cells, and what is not of the picture has neither."""
    shown = ShownPicture(Image.new("RGB", (30, 20)), (0.0, -10.0, 30.0, 30.0))
    experts = {"vision.0": [[-1, -1], [0, 2], [1, 0], [-1, -1]], "projector.0": [[3]]}
    figure = patch_figure(shown, experts, 4)
    _, first, second = figure.axes[:3]
    cells = first.images[1].get_array()
    assert cells.filled(-1).tolist() == experts["vision.0"]
    assert first.images[1].get_extent() == [0, 30, 30, -10]
    assert first.images[0].get_extent() == [0, 30, 20, 0]
    assert {(text.get_position(), text.get_text()) for text in first.texts} == {
        ((7.5, 5.0), "0"), ((22.5, 5.0), "2"), ((7.5, 15.0), "1"), ((22.5, 15.0), "0")
    }  # fmt: skip
    assert second.images[1].get_array().tolist() == [[3]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"expert {n}" for n in range(4)]
    plt.close(figure)


def test_tokens_are_escaped() -> None:
    html = token_table(["<script>", "a"], {"language.0": [[1, 0], [0, 2]]}, 4)
    assert "<script>" not in html
    assert html.count("<td ") == 2
    assert ">1,0</td>" in html
