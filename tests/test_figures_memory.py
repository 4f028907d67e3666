"""Figures of memory hold their numbers, describe themselves, and look the same every time."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex

from minillm.lab import figures, style
from minillm.lab.figures_memory import largest_hole

ORDER = ["A", "B", "C"]
STRIPS = {
    "runs": [figures.Piece("A", 0, 40, 30), figures.Piece("C", 50, 20, 20)],
    "pages": [figures.Piece("B", 16, 16, 16), figures.Piece("B", 80, 16, 3)],
}


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_largest_hole() -> None:
    assert largest_hole(100, []) == 100
    assert largest_hole(100, STRIPS["runs"]) == 30
    assert largest_hole(100, list(reversed(STRIPS["runs"]))) == 30  # whatever the order of the pieces
    assert largest_hole(96, STRIPS["pages"]) == 48
    assert largest_hole(40, [figures.Piece("A", 0, 40, 1)]) == 0


def test_memory_strips_draw_each_piece_as_long_as_it_is() -> None:
    figure = figures.memory_strips(STRIPS, 100, ORDER)
    assert figure.numbers["strips"] == {
        "runs": {"used": 50, "reserved": 10, "free": 40, "largest_hole": 30, "requests": ["A", "C"]},
        "pages": {"used": 19, "reserved": 13, "free": 68, "largest_hole": 48, "requests": ["B"]},
    }
    patches = figure.axes[0].patches
    filled = {
        (to_hex(patch.get_facecolor()), patch.get_x(), patch.get_width())
        for patch in patches
        if patch.get_edgecolor()[3] == 0
    }
    colors = [style.request_color(request_id, ORDER) for request_id in ORDER]
    assert filled == {(colors[0], 0, 30), (colors[2], 50, 20), (colors[1], 16, 16), (colors[1], 80, 3)}
    hatched = sorted((patch.get_x(), patch.get_width()) for patch in patches if patch.get_hatch())
    assert hatched == [(0, 40), (16, 16), (50, 20), (80, 16)]
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert "50 used, 10 held empty, 40 free (largest hole 30)" in shown and [*"ACBB"] == [
        x for x in shown if len(x) == 1
    ]
    assert "pages: requests B, 19 slots used, 13 held empty, 68 free" in figure.alt


def test_page_sizes_draws_its_numbers() -> None:
    figure = figures.page_sizes([1, 16, 64], [0.0, 0.02, 0.08], [100.0, 6.0, 2.0])
    (shares, chosen), (entries, _) = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes)
    assert shares == [[1, 0], [16, 2], [64, 8]] and entries == [[1, 100], [16, 6], [64, 2]]
    assert chosen == [[16, 2]]
    assert figure.numbers["empty"] == (0.0, 0.02, 0.08) and "0.0, 2.0, 8.0 percent" in figure.alt
    with pytest.raises(ValueError, match="16"):
        figures.page_sizes([1, 2], [0.0, 0.1], [2.0, 1.0])


def test_they_are_reproducible_and_fit_a_page() -> None:
    def draw() -> list[figures.BookFigure]:
        return [
            figures.memory_strips(STRIPS, 100, ORDER),
            figures.page_sizes([1, 16, 64], [0.0, 0.02, 0.08], [100.0, 6.0, 2.0]),
        ]

    for figure, again in zip(draw(), draw(), strict=True):
        assert len(figure.alt.split()) >= 8 and figure.get_figwidth() <= 9.0
        for kind in ("png", "svg"):
            one, other = io.BytesIO(), io.BytesIO()
            figure.savefig(one, format=kind)
            again.savefig(other, format=kind)
            assert one.getvalue() == other.getvalue()
