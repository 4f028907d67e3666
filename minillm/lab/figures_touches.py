"""Who touches what: functions on the left, state on the right, an arrow for each access (chapter 03's figure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from minillm.lab.style import (
    GREY,
    INK,
    PAPER,
    VERMILLION,
    BookFigure,
    draw_arrow,
    draw_box,
    draw_text,
    in_style,
    lighter,
    new_figure,
    request_color,
    text_color,
)


class Touch(NamedTuple):
    """One access: which engine (or thread) did it, in which function, to which state; `kind` is "reads" or "writes"."""

    owner: str
    function: str
    kind: str
    state: str


def writers(touches: Sequence[Touch]) -> dict[str, tuple[str, ...]]:
    """For each state the owners that write it, in order of their first write."""
    found: dict[str, list[str]] = {touch.state: [] for touch in touches}
    for touch in touches:
        if touch.kind == "writes" and touch.owner not in found[touch.state]:
            found[touch.state].append(touch.owner)
    return {state: tuple(owners) for state, owners in found.items()}


def _draw_touches(axes: Axes, touches: Sequence[Touch], owners: Sequence[str], num_rows: float) -> None:
    actors = list(dict.fromkeys((touch.owner, touch.function) for touch in touches))
    actors.sort(key=lambda actor: owners.index(actor[0]))
    states = list(dict.fromkeys(touch.state for touch in touches))
    rows = {actor: row + 0.6 * owners.index(actor[0]) for row, actor in enumerate(actors)}
    places = {}
    for state in states:
        touching = [rows[touch.owner, touch.function] for touch in touches if touch.state == state]
        places[state] = (min(touching) + max(touching)) / 2
    for (owner, function), row in rows.items():
        color = request_color(owner, owners)
        draw_box(axes, 0, row - 0.36, 4.4, 0.72, face=color, edge=color)
        draw_text(axes, 2.2, row, f"{owner}: {function}", color=text_color(color))
    by_state = writers(touches)
    for state, row in places.items():
        contested = len(by_state[state]) > 1
        face = lighter(VERMILLION, 0.6) if contested else PAPER
        draw_box(axes, 7.6, row - 0.75, 3.4, 1.5, face=face, edge=INK, linewidth=2.4 if contested else 1.0)
        draw_text(axes, 9.3, row - 0.32, state, weight="bold")
        names = " and ".join(by_state[state]) or "nobody"
        draw_text(axes, 9.3, row + 0.26, f"written by\n{names}", fontsize=7)
    for touch in dict.fromkeys(touches):
        near, far = (4.5, rows[touch.owner, touch.function]), (7.5, places[touch.state])
        if touch.kind == "writes":
            draw_arrow(axes, near, far, color=INK, linewidth=2.0)
        else:
            draw_arrow(axes, far, near, color=GREY, linestyle="--")
    axes.set_xlim(-0.3, 11.3)
    axes.set_ylim(num_rows, -0.7)


@in_style
def who_touches_what(panels: Mapping[str, Sequence[Touch]]) -> BookFigure:
    """One panel for each design (such as "a global" and "an argument"), from recorded accesses.

    A write is a solid arrow to the state, a read a dashed one from it. State that more than one owner writes has a
    heavy frame. `figure.numbers["writers"]`: for each panel, `writers(touches)`.
    """
    owners = list(dict.fromkeys(touch.owner for touches in panels.values() for touch in touches))
    most = max(len({(touch.owner, touch.function) for touch in touches}) for touches in panels.values())
    figure, all_axes = new_figure(9.0, 0.42 * most + 1.0, ncols=len(panels), squeeze=False)
    for axes, (title, touches) in zip(all_axes[0], panels.items(), strict=True):
        axes.set_axis_off()
        axes.set_title(title)
        _draw_touches(axes, touches, owners, most + 0.6 * len(owners) - 0.9)
    found = {title: writers(touches) for title, touches in panels.items()}
    sentences = [
        f"with {title}, {state} is written by {' and '.join(names) or 'nobody'}"
        for title, states in found.items()
        for state, names in states.items()
    ]
    return figure.described(f"Functions and the state that they read and write: {'; '.join(sentences)}.", writers=found)
