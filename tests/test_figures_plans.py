"""The figure of attention's plans shows the pieces that it is given."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import Rectangle

from minillm.lab import figures

PLANS = {"before": [[(0, 0, 9)], [(1, 0, 2)], []], "after": [[(0, 0, 4)], [(0, 4, 8)], [(1, 0, 2), (0, 8, 9)]]}


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_a_box_for_each_piece_as_wide_as_it_has_pages() -> None:
    figure = figures.work_plans(PLANS, "AB")
    for axes, workers in zip(figure.axes, PLANS.values(), strict=True):
        widths = [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)]
        assert widths == [end - start for worker in workers for _, start, end in worker]


def test_numbers_and_description() -> None:
    figure = figures.work_plans(PLANS, "AB")
    assert figure.numbers["loads"] == [[9, 2, 0], [4, 4, 3]]
    assert figure.numbers["longest"] == [9, 4] and figure.numbers["pieces"] == [2, 4]
    assert figure.numbers["fair_share"] == pytest.approx(11 / 3)
    assert "before: 2 pieces" in figure.alt and "the longest 4" in figure.alt
    labels = [text.get_text() for text in figure.axes[1].texts]
    assert labels.count("A") == 3 and labels.count("B") == 1 and labels.count("4") == 2
