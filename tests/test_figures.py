"""Figures show the numbers that they say they show, describe themselves, and look the same every time."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.colors import to_hex

from minillm.context import Chunk
from minillm.lab import figures, style
from minillm.page_manager import PageManager


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def manager() -> PageManager:
    """A shares its first two pages with C; B ended, and left one cached page."""
    manager = PageManager(num_pages=12, page_size=4)
    a, b = list(range(9)), list(range(100, 106))
    for request_id, token_ids in (("A", a), ("B", b), ("C", [*a[:8], 7, 7])):
        manager.allocate(request_id, token_ids)
        manager.extend(request_id, len(token_ids))
        manager.commit(request_id, token_ids, len(token_ids))
    manager.free("B")
    return manager


def texts(figure: figures.BookFigure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def all_figures(manager: PageManager) -> list[figures.BookFigure]:
    flops, seconds = {"without": [1e6, 4e6], "with": [1e6, 1e6]}, {"without": [1.0, 2.0], "with": [0.5, 0.5]}
    return [
        figures.stack(),
        figures.cost_per_token([8, 16], flops, seconds),
        figures.pool(manager.snapshot()),
        figures.csr_arrays(manager.batch_arrays([Chunk("A", 8, 9)]), ["A"], 12),
    ]


def test_colours_are_by_arrival_and_distinct() -> None:
    order = [f"request {i}" for i in range(7)]
    colors = [style.request_color(request_id, order) for request_id in order]
    assert len(set(colors)) == 7
    assert style.request_color("request 0", [*order, "another"]) == colors[0]
    assert style.request_letter("request 1", order) == "B" and style.request_letter("x", ["x"]) == "x"


def test_stack_names_every_chapter_once_drawn() -> None:
    figure = figures.stack()
    drawn = [text for text in texts(figure) if len(text) == 2]
    named = [chapter for chapters in figure.numbers["chapters"].values() for chapter in chapters]
    assert sorted(drawn) == sorted(named)
    assert set(named) == {f"{number:02}" for number in range(13)} | {"A1"}


def test_cost_per_token_draws_its_numbers() -> None:
    flops, seconds = {"without": [2e6, 4e6], "with": [1e6, 1e6]}, {"without": [1.0, 2.0], "with": [0.5, 0.25]}
    figure = figures.cost_per_token([8, 16], flops, seconds)
    counted, measured = ([line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes)
    assert counted == [[2, 4], [1, 1]] and measured == [[1.0, 2.0], [0.5, 0.25]]
    assert figure.numbers["flops"] == {"without": (2e6, 4e6), "with": (1e6, 1e6)}
    assert "from 2.0 to 4.0 million" in figure.alt and "0.25" not in figure.alt  # no measured value in a compared text


def test_pool_draws_each_page_as_its_snapshot_says(manager: PageManager) -> None:
    snapshot = manager.snapshot()
    figure = figures.pool(snapshot)
    assert figure.numbers["counts"] == [{"free": 7, "cached": 1, "used": 2, "shared": 2}]
    assert figure.numbers["tables"] == [dict(snapshot.tables)]
    frames = [patch for patch in figure.axes[0].patches if abs(patch.get_width() - 0.9) < 1e-6]
    assert sum(bool(patch.get_hatch()) for patch in frames) == 1
    fills = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    green, blue = (style.request_color(request_id, ["A", "C"]) for request_id in "CA")
    assert fills.count(blue) == 3 and fills.count(green) == 3


def test_film_strip_keeps_colours_and_frames_what_changed(manager: PageManager) -> None:
    before = manager.snapshot()
    manager.free("A")
    figure = figures.film_strip([("before", before), ("A ends", manager.snapshot())])
    heavy = [patch for patch in figure.axes[0].patches if patch.get_linewidth() == 2.2 and patch.get_width() < 0.95]
    assert len(heavy) == 3  # two shared pages are C's alone now, one is free
    assert style.request_color("C", figures.arrival_order([before])) in [
        to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches
    ]
    with pytest.raises(ValueError, match="at least one"):
        figures.film_strip([])


def test_csr_arrays_draws_the_batch(manager: PageManager) -> None:
    arrays = manager.batch_arrays([Chunk("A", 8, 9), Chunk("C", 8, 10)])
    figure = figures.csr_arrays(arrays, ["A", "C"], 12)
    assert figure.numbers["qo_indptr"] == [0, 1, 3] and figure.numbers["kv_indptr"] == [0, 3, 6]
    assert figure.numbers["kv_last_page_len"] == [1, 2]
    lines = [line.get_xdata().tolist() for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    named = [[i, page] for i, page in enumerate(arrays.kv_indices.tolist())]
    assert [line for line in lines if line in named] == named
    a, c = manager.page_table("A").tolist(), manager.page_table("C").tolist()
    assert a[:2] == c[:2]
    assert [figure.numbers["filled"][page] for page in (a[0], a[2], c[2])] == [4, 1, 2]
    assert sum(figure.numbers["filled"]) == 11


def test_who_touches_what_finds_contested_state() -> None:
    shared = [figures.Touch(owner, "set", "writes", "_CONTEXT") for owner in "AB"]
    shared += [figures.Touch("A", "attention", "reads", "_CONTEXT")]
    own = [touch._replace(state=f"context {touch.owner}") for touch in shared]
    figure = figures.who_touches_what({"a global": shared, "an argument": own})
    assert figure.numbers["writers"]["a global"] == {"_CONTEXT": ("A", "B")}
    assert figure.numbers["writers"]["an argument"] == {"context A": ("A",), "context B": ("B",)}
    heavy = [sum(patch.get_linewidth() == 2.4 for patch in axes.patches) for axes in figure.axes]
    assert heavy == [1, 0]
    assert "written by\nA and B" in texts(figure) and "_CONTEXT is written by A and B" in figure.alt


def test_every_figure_describes_itself_and_is_reproducible(manager: PageManager) -> None:
    for figure, again in zip(all_figures(manager), all_figures(manager), strict=True):
        assert len(figure.alt.split()) >= 8 and figure.numbers
        assert figure.get_figwidth() <= 9.0
        for kind in ("png", "svg"):
            one, other = io.BytesIO(), io.BytesIO()
            figure.savefig(one, format=kind)
            again.savefig(other, format=kind)
            assert one.getvalue() == other.getvalue()


def test_notebook_output_carries_the_alt_text() -> None:
    from IPython.core.pylabtools import select_figure_formats

    shell = InteractiveShell.instance()
    select_figure_formats(shell, {"png"})
    figure = figures.stack()
    data, metadata = shell.display_formatter.format(figure)
    assert data["text/plain"] == f"Figure: {figure.alt}"
    assert metadata["image/png"]["alt"] == figure.alt
    assert len(data["image/png"]) > 1000 and "image/svg+xml" not in data
    InteractiveShell.clear_instance()
