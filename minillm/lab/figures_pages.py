"""Figures of pages: the pool and its page tables, step by step; and the CSR arrays over the pages that they name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minillm.context import BatchArrays
from minillm.lab.style import (
    GREY,
    INK,
    PALE,
    PAPER,
    BookFigure,
    draw_page,
    draw_text,
    in_style,
    lighter,
    new_canvas,
    page_legend,
    request_color,
    request_letter,
    text_color,
)
from minillm.page_view import PageSnapshot

Frame = tuple[str, PageSnapshot]
INCHES_PER_UNIT = 0.3


def arrival_order(snapshots: Iterable[PageSnapshot]) -> list[str]:
    """Every request that the snapshots name, in order of arrival: what decides its colour."""
    return list(dict.fromkeys(request_id for snapshot in snapshots for request_id, _ in snapshot.tables))


def count_pages(snapshot: PageSnapshot) -> dict[str, int]:
    """How many pages are free, cached, used by one request, and shared by several."""
    counts = Counter(
        "shared" if len(owners) > 1 else state for state, owners in zip(snapshot.states, snapshot.owners, strict=True)
    )
    return {state: counts[state] for state in ("free", "cached", "used", "shared")}


def draw_pool(
    axes: Axes,
    snapshot: PageSnapshot,
    order: Sequence[str],
    x: float = 0.0,
    y: float = 0.0,
    columns: int = 16,
    before: PageSnapshot | None = None,
) -> int:
    """The pool in rows of `columns` pages, each page with its id; returns the number of rows.

    A page whose owners or state are not those of `before` is framed heavily.
    """
    for page, (state, owners) in enumerate(zip(snapshot.states, snapshot.owners, strict=True)):
        changed = before is not None and (state, owners) != (before.states[page], before.owners[page])
        column, row = page % columns, page // columns
        letters = "+".join(request_letter(owner, order) for owner in owners)
        draw_page(
            axes,
            x + column,
            y + row,
            str(page),
            state=state,
            owners=owners,
            order=order,
            changed=changed,
            corner=letters,
        )
    return -(-len(snapshot.states) // columns)


def draw_page_tables(axes: Axes, snapshot: PageSnapshot, order: Sequence[str], x: float = 0.0, y: float = 0.0) -> int:
    """Each request's page table as a row of page ids in order of position; returns the number of rows."""
    for row, (request_id, pages) in enumerate(snapshot.tables):
        color = request_color(request_id, order)
        draw_text(axes, x, y + row, request_id, ha="right", weight="bold", fontsize=9)
        draw_text(axes, x + 0.5, y + row, "→", color=GREY)
        for position, page in enumerate(pages):
            left = x + 1 + position
            shared = len(snapshot.owners[page]) > 1
            corner, line = (left, y + row - 0.38), 2.2 if shared else 1.0
            axes.add_patch(Rectangle(corner, 0.96, 0.76, facecolor=lighter(color), edgecolor=color, linewidth=line))
            draw_text(axes, left + 0.48, y + row, str(page))
        if not pages:
            draw_text(axes, x + 1, y + row, "(no page yet)", ha="left", color=GREY)
    return len(snapshot.tables)


@in_style
def film_strip(frames: Sequence[Frame], columns: int = 16, numbered: bool = True) -> BookFigure:
    """What happened to a pool, one frame below the other: the pool on the left, the page tables on the right.

    `frames` are (what just happened, the `PageManager.snapshot()` after it). Pages that changed since the frame before
    are framed heavily. `numbered`: whether a frame's title begins with its number; a single one's never does.
    `figure.numbers`: `counts` and `tables` of each frame.
    """
    if not frames:
        raise ValueError("a film strip needs at least one frame")
    order = arrival_order(snapshot for _, snapshot in frames)
    columns = min(columns, len(frames[0][1].states))
    table_x = columns + max((len(request_id) for request_id in order), default=1) * 0.35 + 0.6
    widest = max((len(pages) for _, snapshot in frames for _, pages in snapshot.tables), default=0)
    pool_rows = -(-len(frames[0][1].states) // columns)
    heights = [max(pool_rows, len(snapshot.tables)) + 1.5 for _, snapshot in frames]
    width, height = table_x + max(widest, 3) + 2.2, sum(heights) + 0.4
    scale = min(INCHES_PER_UNIT * 1.2, 9.0 / width)
    figure, axes = new_canvas(width * scale, height * scale)
    y, before = 0.0, None
    numbered = numbered and len(frames) > 1
    for number, ((title, snapshot), rows) in enumerate(zip(frames, heights, strict=True), start=1):
        draw_text(axes, -0.5, y, f"{number}. {title}" if numbered else title, ha="left", weight="bold", fontsize=9)
        draw_pool(axes, snapshot, order, 0.0, y + 1, columns, before)
        draw_page_tables(axes, snapshot, order, table_x, y + 1)
        y, before = y + rows, snapshot
        if number < len(frames):
            axes.plot([-0.5, width - 1], [y - 0.62] * 2, color=PALE, linewidth=1)
    axes.set_xlim(-0.7, width - 0.7)
    axes.set_ylim(y - 0.6, -0.7)
    page_legend(axes, order, [state for state in ("cached", "free") if any(state in s.states for _, s in frames)])
    counts = [count_pages(snapshot) for _, snapshot in frames]
    steps = "; ".join(
        f"{number}, {title}: {_counted(count)}" if numbered else f"{title}: {_counted(count)}"
        for number, ((title, _), count) in enumerate(zip(frames, counts), start=1)
    )
    return figure.described(
        f"A pool of {len(frames[0][1].states)} pages and its requests' page tables"
        f"{f' in {len(frames)} steps' if len(frames) > 1 else ''}. {steps}.",
        counts=counts,
        tables=[dict(snapshot.tables) for _, snapshot in frames],
    )


def pool(snapshot: PageSnapshot, title: str = "The pool and its page tables", columns: int = 16) -> BookFigure:
    """One moment of a pool: a film strip of one frame."""
    return film_strip([(title, snapshot)], columns)


def _counted(count: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in count.items() if number) + " pages"


def _draw_array(
    axes: Axes,
    y: float,
    name: str,
    labels: Sequence[object],
    owners: Sequence[str],
    order: Sequence[str],
    indptr: Sequence[int],
    indptr_name: str,
) -> None:
    """A CSR array as a row of boxes in their requests' colours, and below it where each request begins and ends."""
    draw_text(axes, -1.0, y, name, ha="right", family="monospace", fontsize=9)
    for i, (label, owner) in enumerate(zip(labels, owners, strict=True)):
        color = request_color(owner, order)
        axes.add_patch(Rectangle((i - 0.48, y - 0.4), 0.96, 0.8, facecolor=color, edgecolor=INK, linewidth=0.6))
        draw_text(axes, i, y, str(label), color=text_color(color))
    draw_text(axes, -1.0, y + 1.0, indptr_name, ha="right", family="monospace", fontsize=9, color=GREY)
    for border in sorted(set(indptr)):
        axes.plot([border - 0.5] * 2, [y - 0.55, y + 0.7], color=INK, linewidth=1.4)
        paper = {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"}
        draw_text(axes, border - 0.5, y + 1.0, str(border), family="monospace", weight="bold", bbox=paper)


@in_style
def csr_arrays(
    arrays: BatchArrays, request_ids: Sequence[str], num_pages: int, order: Sequence[str] = ()
) -> BookFigure:
    """The CSR arrays of a batch, and lines from `kv_indices` to the pages of the pool that they name.

    `request_ids` are those of the batch, in its order; `order` those of the book's story so far (default: the same). A
    page is filled as far as it holds tokens that this batch reads. `figure.numbers`: the arrays as lists, and `filled`,
    the number of tokens read from each page.
    """
    order = order or list(request_ids)
    kv_lens = arrays.kv_lens.tolist()
    starts, ends = arrays.kv_indptr[:-1].tolist(), arrays.kv_indptr[1:].tolist()
    page_owner = [request_ids[b] for b, (start, end) in enumerate(zip(starts, ends)) for _ in range(start, end)]
    row_owner = [request_ids[b] for b in arrays.batch_indices.tolist()]
    owners: list[list[str]] = [[] for _ in range(num_pages)]
    filled = [0] * num_pages
    for b, (start, end) in enumerate(zip(starts, ends)):
        for i, page in enumerate(arrays.kv_indices[start:end].tolist()):
            owners[page].append(request_ids[b])
            filled[page] = max(filled[page], min(arrays.page_size, kv_lens[b] - i * arrays.page_size))

    columns = max(arrays.num_tokens, len(arrays.kv_indices), num_pages)
    scale = min(INCHES_PER_UNIT * 1.3, 9.0 / (columns + 6.5))
    figure, axes = new_canvas((columns + 6.5) * scale, 10.0 * scale)
    indptrs = arrays.qo_indptr.tolist(), arrays.kv_indptr.tolist()
    _draw_array(axes, 0, "positions", arrays.positions.tolist(), row_owner, order, indptrs[0], "qo_indptr")
    _draw_array(axes, 3, "kv_indices", arrays.kv_indices.tolist(), page_owner, order, indptrs[1], "kv_indptr")
    for i, (page, owner) in enumerate(zip(arrays.kv_indices.tolist(), page_owner, strict=True)):
        axes.plot([i, page], [3.42, 6.5], color=request_color(owner, order), linewidth=1.6, zorder=0)
    draw_text(axes, -1.0, 7, "the pool", ha="right", fontsize=9)
    for page in range(num_pages):
        share = filled[page] / arrays.page_size
        letter = "/".join(request_letter(owner, order) for owner in owners[page])
        draw_page(axes, page, 7, letter, owners=owners[page], order=order, filled=share)
        draw_text(axes, page, 7.75, str(page), color=GREY)
    draw_text(axes, -1.0, 7.75, "page id", ha="right", fontsize=9, color=GREY)
    for b in range(arrays.num_requests):
        if ends[b] > starts[b]:
            last = int(arrays.kv_indices[ends[b] - 1])
            draw_text(axes, last, 8.55, str(arrays.kv_last_page_len[b]), weight="bold", family="monospace")
    draw_text(axes, -1.0, 8.55, "kv_last_page_len", ha="right", family="monospace", fontsize=9, color=GREY)
    axes.set_xlim(-6.0, columns + 0.2)
    axes.set_ylim(9.1, -0.9)
    page_legend(axes, list(request_ids), ["free"])
    parts = [
        f"{request_ids[b]} has {np.diff(arrays.qo_indptr)[b]} query rows and reads {kv_lens[b]} tokens from pages "
        f"{arrays.kv_indices[starts[b] : ends[b]].tolist()}"
        for b in range(arrays.num_requests)
    ]
    return figure.described(
        f"The CSR arrays of a batch of {arrays.num_requests} requests, with lines from kv_indices to the pages of a "
        f"pool of {num_pages}: {'; '.join(parts)}.",
        qo_indptr=indptrs[0],
        kv_indptr=indptrs[1],
        kv_indices=arrays.kv_indices.tolist(),
        kv_last_page_len=arrays.kv_last_page_len.tolist(),
        filled=filled,
    )
