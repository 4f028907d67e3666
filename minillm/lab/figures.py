"""Every figure of the book. What all have in common is in `style`; figures of pages are in `figures_pages`, of reads
and writes in `figures_touches`, of attention's plans in `figures_plans`.

Each function takes data (recorded events, results, arrays) and returns a `BookFigure`: `figure.numbers` holds what it
shows, to be asserted in the cell that draws it; `plt.show()` ends the cell.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter

from minillm.lab.figures_memory import Piece, memory_strips, page_sizes
from minillm.lab.figures_pages import arrival_order, count_pages, csr_arrays, film_strip, pool
from minillm.lab.figures_plans import work_plans
from minillm.lab.figures_touches import Touch, who_touches_what
from minillm.lab.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    BookFigure,
    draw_arrow,
    draw_box,
    draw_text,
    in_style,
    lighter,
    new_canvas,
    new_figure,
    request_color,
)

__all__ = [
    "BookFigure",
    "Piece",
    "Touch",
    "arrival_order",
    "cost_per_token",
    "count_pages",
    "csr_arrays",
    "film_strip",
    "memory_strips",
    "new_figure",
    "page_sizes",
    "pool",
    "request_color",
    "stack",
    "who_touches_what",
    "work_plans",
]

# (name, what it does, chapters, x, y, width, height, colour): the boxes of the stack, in a field of 100 by 60.
STACK = (
    ("LLM · LLMEngine", "requests in, tokens out; owns everything below", ("00", "11", "12"), 0, 0, 100, 8, BLUE),
    ("Scheduler", "who gets how many\ntokens this step", ("08",), 0, 11, 24, 18, ORANGE),
    ("ModelRunner", "one step: build context → forward → sample", ("07",), 27, 11, 46, 7, GREEN),
    ("WrapperManager", "plan, run", ("04",), 27, 21, 15.1, 8, GREEN),
    ("ModelLoader", "weights", ("06",), 42.9, 21, 11.9, 8, GREEN),
    ("DistributedManager", "one rank a GPU", ("10",), 55.6, 21, 17.4, 8, GREEN),
    ("PageManager · KVPool", "pages, page tables,\nthe prefix cache", ("02", "09"), 76, 11, 24, 18, PURPLE),
    ("InferenceContext", "one step’s state, handed through every layer", ("03",), 0, 32, 100, 7, YELLOW),
    ("Model layers", "norms, projections, rotary embedding, MLP", ("07",), 0, 42, 58, 8, SKY),
    ("Attention", "softmax(q·kᵀ)·v", ("01",), 61, 42, 39, 8, SKY),
    (
        "FlashInfer on a GPU · its twin on a CPU",
        "the same names, arguments and shapes",
        ("04", "05"),
        0,
        53,
        78,
        7,
        VERMILLION,
    ),
    ("Weights", "trained here", ("A1",), 81, 53, 19, 7, VERMILLION),
)

STACK_ARROWS = (
    *((x, 8.2) for x in (12.0, 50.0, 88.0)),
    *((x, 18.2) for x in (34.5, 48.8, 64.3)),
    (50.0, 29.2),
    (29.0, 39.2),
    (80.0, 39.2),
    (29.0, 50.2),
    (72.0, 50.2),
)


@in_style
def stack() -> BookFigure:
    """The engine's parts on top of each other, each with the chapters that build it (chapter 00's figure).

    `figure.numbers["chapters"]`: for each part, the chapters whose number it carries.
    """
    figure, axes = new_canvas(9.0, 5.5)
    for name, sentence, chapters, x, y, width, height, color in STACK:
        draw_box(axes, x, y, width, height, face=lighter(color, 0.72), edge=color, linewidth=1.4)
        tall, left, right = height > 10, x + 1.6, x + width - 2.6
        draw_text(axes, left, y + (3 if tall else height * 0.32), name, ha="left", weight="bold")
        draw_text(
            axes,
            left,
            y + (5.2 if tall else height * 0.72),
            sentence,
            ha="left",
            va="top" if tall else "center",
            fontsize=7,
        )
        for i, chapter in enumerate(reversed(chapters)):
            place = (right - 4.4 * i, y + height - 3.2 if tall or width < 20 else y + height / 2)
            circle = {"boxstyle": "circle,pad=0.22", "facecolor": INK, "edgecolor": "none"}
            draw_text(axes, *place, chapter, color=PAPER, weight="bold", fontsize=7.5, bbox=circle)
    for start in STACK_ARROWS:
        draw_arrow(axes, start, (start[0], start[1] + 2.6), color=GREY)
    axes.set_xlim(-1, 101)
    axes.set_ylim(61, -1)
    numbers = {name: chapters for name, _, chapters, *_ in STACK}
    described = ", ".join(f"{name} ({' and '.join(chapters)})" for name, chapters in numbers.items())
    return figure.described(
        f"The engine's parts from top to bottom, with the chapters that build them: {described}.", chapters=numbers
    )


@in_style
def cost_per_token(
    lengths: Sequence[int],
    flops: dict[str, Sequence[float]],
    milliseconds: dict[str, Sequence[float]],
    device: str = "this machine",
) -> BookFigure:
    """What one more token costs after `lengths` tokens, counted and measured (chapter 01's figure).

    `flops` and `milliseconds` have the same two keys ("without a cache", "with a cache"), and a value for each length.
    `figure.numbers`: `lengths`, `flops`, `milliseconds` as drawn.
    """
    styles = {name: (color, marker) for name, color, marker in zip(flops, (VERMILLION, BLUE), "so", strict=True)}
    figure, (left, right) = new_figure(8.6, 3.4, ncols=2)
    for axes, series, title, unit in (
        (
            left,
            {name: [value / 1e6 for value in values] for name, values in flops.items()},
            "Counted",
            "million operations",
        ),
        (right, milliseconds, f"Measured on {device}", "milliseconds"),
    ):
        for name, values in series.items():
            color, marker = styles[name]
            axes.plot(lengths, values, color=color, marker=marker, markersize=4, label=name)
            axes.annotate(
                name,
                (lengths[-1], values[-1]),
                (-6, 8),
                textcoords="offset points",
                ha="right",
                color=color,
                weight="bold",
            )
        high, low = (values[-1] for values in series.values())
        axes.annotate("", (lengths[-1], low), (lengths[-1], high), arrowprops={"arrowstyle": "<->", "color": GREY})
        draw_text(axes, lengths[-1] * 0.93, (high * low) ** 0.5, f"× {high / low:.0f}", ha="right", fontsize=10)
        axes.set(title=title, xlabel="tokens so far", ylabel=f"{unit} for one more token", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(y=0.18)
    (slow, slow_flops), (fast, fast_flops) = flops.items()
    return figure.described(
        f"Two charts of the cost of the next token after {lengths[0]} to {lengths[-1]} tokens, on logarithmic scales: "
        f"operations counted, and time measured. {slow.capitalize()} the count grows from {slow_flops[0] / 1e6:.1f} to "
        f"{slow_flops[-1] / 1e6:.1f} million; {fast} from {fast_flops[0] / 1e6:.2f} to "
        f"{fast_flops[-1] / 1e6:.2f} million.",
        lengths=tuple(lengths),
        flops={name: tuple(values) for name, values in flops.items()},
        milliseconds={name: tuple(values) for name, values in milliseconds.items()},
    )
