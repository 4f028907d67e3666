"""The book's one visual language: colours, page styles, and figures that know their numbers and describe themselves.

A figure of the book is a `BookFigure`. Shown by `plt.show()` in a notebook, its output holds the picture (PNG), and the
alt text twice: as the picture's `alt` metadata, and as the plain text that stands in for it where pictures cannot be
shown (nbval compares that text, so alt texts name exact counts but never a measured time). The caption is the Markdown
cell that follows; it begins with `*Figure 01.1.*`.

Figures are opaque: they look the same in JupyterLab's light and dark themes. What a colour says, a letter, a hatch or a
position says, too, so that nothing is lost in grey print.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from minillm.page_view import COLORS, DARK_COLORS, LETTERS  # Okabe and Ito: the same as in a page manager's own display

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, YELLOW = COLORS
INK, GREY, PALE, PAPER = "#222222", "#767676", "#e8e8e8", "#ffffff"
SHARED = "shared"
# (face, hatch) of pages that no request uses.
PAGE_STYLES = MappingProxyType({"free": (PAPER, ""), "cached": ("#d9d9d9", "////"), "scratch": (PAPER, "xxxx")})

RC = MappingProxyType(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9.0,
        "text.color": INK,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.titlesize": 10.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": PALE,
        "xtick.color": INK,
        "ytick.color": INK,
        "lines.linewidth": 2.0,
        "legend.frameon": False,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "hatch.linewidth": 0.6,
    }
)
DPI = 110


class BookFigure(Figure):
    """A figure with an alt text, and with the numbers that it shows, by name, so that they can be asserted."""

    alt: str = ""
    numbers: Mapping[str, Any] = MappingProxyType({})

    def described(self, alt: str, **numbers: Any) -> BookFigure:
        """Set the alt text (a sentence or two that say what the picture says) and the numbers; returns itself."""
        self.alt = " ".join(alt.split())
        self.numbers = MappingProxyType(numbers)
        return self

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        """As in matplotlib, but the same bytes every time, SVG included."""
        with plt.rc_context({"svg.hashsalt": "minillm"}):
            if "svg" in (kwargs.get("format"), str(args[0] if args else "")[-3:]):
                kwargs.setdefault("metadata", {"Date": None})
            super().savefig(*args, **kwargs)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"text/plain": f"Figure: {self.alt}"}, {"image/png": {"alt": self.alt}}


def in_style(draw: Callable[..., BookFigure]) -> Callable[..., BookFigure]:
    """Decorates a function that draws: matplotlib reads some of the style (titles) when it is called, not before."""

    @functools.wraps(draw)
    def drawing(*args: Any, **kwargs: Any) -> BookFigure:
        with plt.rc_context(dict(RC)):
            return draw(*args, **kwargs)

    return drawing


def new_figure(width: float = 8.0, height: float = 3.2, **subplots: Any) -> tuple[BookFigure, Any]:
    """A figure and its axes, as `plt.subplots` returns them; sizes in inches, at most 9 wide. Call it `@in_style`."""
    return plt.subplots(figsize=(width, height), dpi=DPI, layout="constrained", FigureClass=BookFigure, **subplots)


def new_canvas(width: float, height: float) -> tuple[BookFigure, Axes]:
    """A figure to draw boxes in: one axes without frame, y downwards, one unit (a page's width) on both axes."""
    figure, axes = new_figure(width, height)
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.invert_yaxis()
    return figure, axes


def request_color(request_id: str, order: Sequence[str]) -> str:
    """A request's colour in the whole book: that of its place in `order`, the request ids in order of arrival."""
    return COLORS[order.index(request_id) % len(COLORS)]


def request_letter(request_id: str, order: Sequence[str]) -> str:
    """What stands for a request where one character has room: its id if that is one, else a letter by arrival."""
    return request_id if len(request_id) == 1 else LETTERS[order.index(request_id) % len(LETTERS)]


def text_color(face: str) -> str:
    """White or ink, whichever is legible on `face`."""
    return PAPER if face in DARK_COLORS or face in (INK, GREY) else INK


def lighter(color: str, share: float = 0.75) -> str:
    """`color` mixed with `share` of white."""
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * share):02x}" for channel in channels)


def draw_text(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    options: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": INK} | style
    axes.text(x, y, text, **options)


def draw_page(
    axes: Axes,
    x: float,
    y: float,
    label: str = "",
    *,
    state: str = "free",
    owners: Sequence[str] = (),
    order: Sequence[str] = (),
    filled: float = 1.0,
    changed: bool = False,
    corner: str = "",
    size: float = 0.9,
) -> None:
    """One page as a square centred at (x, y).

    A used page has the colour of its owner, a shared one a stripe of each; `filled` is the share of its slots that hold
    a token (the rest is drawn pale); `changed` frames it heavily. `label` is in the middle, `corner` small below it.
    """
    left, top = x - size / 2, y - size / 2
    if owners:
        width = size / len(owners)
        for i, owner in enumerate(owners):
            color = request_color(owner, order)
            axes.add_patch(Rectangle((left + i * width, top), width, size, facecolor=lighter(color), edgecolor="none"))
            axes.add_patch(Rectangle((left + i * width, top), width * filled, size, facecolor=color, edgecolor="none"))
        face, hatch = "none", ""
        ink = text_color(request_color(owners[0], order)) if len(owners) == 1 and filled > 0.6 else INK
    else:
        (face, hatch), ink = PAGE_STYLES[state], INK
    edge, line = (INK, 2.2) if changed else (GREY, 0.8)
    axes.add_patch(Rectangle((left, top), size, size, facecolor=face, hatch=hatch, edgecolor=edge, linewidth=line))
    if label:
        plain = len(owners) == 1 or (not owners and state == "free")
        halo = [] if plain else [patheffects.withStroke(linewidth=2.0, foreground=PAPER, alpha=0.8)]
        draw_text(axes, x, y - (0.1 if corner else 0.0), label, color=ink, path_effects=halo)
        if corner:
            draw_text(axes, x, y + 0.29, corner, color=ink, fontsize=5.5, path_effects=halo)


def draw_box(
    axes: Axes, x: float, y: float, width: float, height: float, face: str = PAPER, edge: str = INK, **style: Any
) -> None:
    """A box with rounded corners whose top left corner is at (x, y)."""
    options = {"linewidth": 1.0} | style
    rounding = f"round,pad=0,rounding_size={min(width, height, 8) * 0.12}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=rounding, facecolor=face, edgecolor=edge, **options))


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2} | style)


def page_legend(axes: Axes, order: Sequence[str], states: Iterable[str] = ("cached", "free"), **style: Any) -> None:
    """The key to a figure with pages: one entry for each request, then the states."""
    handles = []
    for request_id in order:
        letter = request_letter(request_id, order)
        label = request_id if letter == request_id else f"{letter} = {request_id}"
        handles.append(Patch(facecolor=request_color(request_id, order), label=label))
    for state in states:
        face, hatch = PAGE_STYLES[state]
        handles.append(Patch(facecolor=face, hatch=hatch, edgecolor=GREY, label=state))
    options = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, 0.0),
        "ncols": len(handles),
        "fontsize": 8,
        "frameon": False,
    }
    axes.legend(handles=handles, **(options | style))
