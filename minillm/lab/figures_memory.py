"""Figures of memory: one memory under several ways to share it out, and what the size of a page costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import patheffects
from matplotlib.patches import Patch, Rectangle

from minillm.lab.style import (
    BLUE,
    GREY,
    INK,
    PAPER,
    VERMILLION,
    BookFigure,
    draw_text,
    in_style,
    lighter,
    new_figure,
    request_color,
    request_letter,
    text_color,
)


@dataclass(frozen=True)
class Piece:
    """Token slots `[start, start + reserved)` that one request holds; the first `used` of them hold a token."""

    request_id: str
    start: int
    reserved: int
    used: int


def largest_hole(num_slots: int, pieces: Sequence[Piece]) -> int:
    """The longest run of slots that nobody holds."""
    longest, end = 0, 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        longest = max(longest, piece.start - end)
        end = max(end, piece.start + piece.reserved)
    return max(longest, num_slots - end)


@in_style
def memory_strips(strips: Mapping[str, Sequence[Piece]], num_slots: int, order: Sequence[str]) -> BookFigure:
    """One memory of `num_slots` token slots as a strip for each way to share it out (a title -> its pieces).

    Slots that hold a token are in the request's colour, those held in reserve pale and hatched, those that nobody holds
    white. `order` is that of arrival. `figure.numbers`: for each title `used`, `reserved` (and empty), `free`,
    `largest_hole` and `requests`.
    """
    figure, axes = new_figure(9.0, 0.5 + 0.86 * len(strips))
    axes.set_axis_off()
    numbers: dict[str, dict[str, Any]] = {}
    for row, (title, pieces) in enumerate(strips.items()):
        used, held = sum(piece.used for piece in pieces), sum(piece.reserved for piece in pieces)
        requests = sorted({piece.request_id for piece in pieces}, key=list(order).index)
        hole = largest_hole(num_slots, pieces)
        numbers[title] = {
            "used": used,
            "reserved": held - used,
            "free": num_slots - held,
            "largest_hole": hole,
            "requests": requests,
        }
        draw_text(axes, 0, row - 0.42, title, ha="left", weight="bold", fontsize=9)
        facts = f"{used} used, {held - used} held empty, {num_slots - held} free"
        if hole < num_slots - held:
            facts += f" (largest hole {hole})"
        draw_text(axes, num_slots, row - 0.42, facts, ha="right")
        axes.add_patch(Rectangle((0, row - 0.24), num_slots, 0.48, facecolor=PAPER, edgecolor=GREY, linewidth=1))
        for piece in pieces:
            color = request_color(piece.request_id, order)
            where = (piece.start, row - 0.24)
            pale: dict[str, Any] = {"facecolor": lighter(color, 0.8), "edgecolor": color, "hatch": "////"}
            axes.add_patch(Rectangle(where, piece.reserved, 0.48, linewidth=0, **pale))
            axes.add_patch(Rectangle(where, piece.used, 0.48, facecolor=color, edgecolor="none"))
            axes.add_patch(Rectangle(where, piece.reserved, 0.48, facecolor="none", edgecolor=INK, linewidth=0.7))
            small = piece.reserved < num_slots / 24
            over_hatch = small and piece.used < piece.reserved / 2
            middle = piece.start + (piece.reserved if over_hatch else piece.used) / 2
            ink = INK if over_hatch else text_color(color)
            halo = [patheffects.withStroke(linewidth=2.5, foreground=PAPER)] if over_hatch else []
            letter = request_letter(piece.request_id, order)
            size = 6.5 if small else 9
            draw_text(axes, middle, row, letter, color=ink, fontsize=size, weight="bold", path_effects=halo)
    axes.set_xlim(-0.005 * num_slots, 1.005 * num_slots)
    axes.set_ylim(len(strips) - 0.6, -0.6)
    keys = [
        Patch(facecolor=GREY, label="holds a token"),
        Patch(facecolor=PAPER, hatch="////", edgecolor=GREY, label="held, but empty"),
        Patch(facecolor=PAPER, edgecolor=GREY, label="free"),
    ]
    axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, fontsize=8)
    parts = [
        f"{title}: requests {''.join(request_letter(r, order) for r in n['requests'])}, {n['used']} slots used, "
        f"{n['reserved']} held empty, {n['free']} free, the largest hole {n['largest_hole']}"
        for title, n in numbers.items()
    ]
    return figure.described(
        f"A memory of {num_slots} slots, shared out in {len(strips)} ways. {'; '.join(parts)}.", strips=numbers
    )


@in_style
def page_sizes(sizes: Sequence[int], empty: Sequence[float], entries: Sequence[float], chosen: int = 16) -> BookFigure:
    """What the size of a page costs: the share of held slots that is empty, and the entries of a request's page table.

    A value of `empty` (0 to 1) and `entries` for each of `sizes`; `chosen` is marked. `figure.numbers`: all three.
    """
    figure, axes_pair = new_figure(8.6, 3.2, ncols=2)
    at = list(sizes).index(chosen)
    for axes, values, color, marker, title, label, text in (
        (
            axes_pair[0],
            [100 * share for share in empty],
            VERMILLION,
            "s",
            "Memory",
            "% of held slots empty",
            "{:.1f} %",
        ),
        (axes_pair[1], list(entries), BLUE, "o", "Bookkeeping", "page table entries a request", "{:.0f}"),
    ):
        axes.plot(sizes, values, color=color, marker=marker, markersize=4, clip_on=False)
        axes.plot([chosen], [values[at]], color=INK, marker="o", markersize=11, markerfacecolor="none", linestyle="")
        for i in (0, at, len(sizes) - 1):
            if i == 0:
                offset, align = (6, 7), "left"
            elif values[-1] > values[0]:
                offset, align = (-6, 7), "right"
            else:
                offset, align = (6, 7), "left" if i == at else "center"
            axes.annotate(text.format(values[i]), (sizes[i], values[i]), offset, textcoords="offset points", ha=align)
        axes.set(title=title, xlabel="tokens a page", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.margins(x=0.1, y=0.16)
        axes.set_ylim(bottom=0)
    return figure.described(
        f"Two charts over the page sizes {', '.join(map(str, sizes))}. The share of held slots that is empty: "
        f"{', '.join(f'{100 * share:.1f}' for share in empty)} percent. Page table entries a request: "
        f"{', '.join(f'{count:.0f}' for count in entries)}. The size {chosen} is marked.",
        sizes=tuple(sizes),
        empty=tuple(empty),
        entries=tuple(entries),
    )
