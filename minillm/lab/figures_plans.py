"""Plans of attention: which worker reads which pages (chapter 04's second figure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.patches import Rectangle

from minillm.lab.style import (
    GREY,
    INK,
    PAPER,
    BookFigure,
    draw_text,
    in_style,
    new_figure,
    request_color,
    request_letter,
    text_color,
)

Workers = Sequence[Sequence[tuple[int, int, int]]]  # for each worker its pieces (request, first page, end page)


@in_style
def work_plans(plans: Mapping[str, Workers], request_ids: Sequence[str]) -> BookFigure:
    """One panel for each plan, on one scale: a bar for each worker, a box for each piece as wide as it has pages.

    The dashed line is the fair share. `figure.numbers`: for each plan `loads` (pages of each worker), `longest` (the
    most that a worker has) and `pieces`; `fair_share`.
    """
    order = list(request_ids)
    loads = [[sum(end - start for _, start, end in worker) for worker in workers] for workers in plans.values()]
    num_workers = max(len(workers) for workers in plans.values())
    fair_share = sum(loads[0]) / len(loads[0])
    width = max(max(load) for load in loads)
    figure, all_axes = new_figure(
        8.6, 0.9 + 0.3 * num_workers, ncols=len(plans), sharex=True, sharey=True, squeeze=False
    )
    for axes, (title, workers), load in zip(all_axes[0], plans.items(), loads, strict=True):
        for row, pieces in enumerate(workers):
            left = 0
            for request, start, end in pieces:
                color = request_color(order[request], order)
                box = Rectangle((left, row - 0.36), end - start, 0.72, facecolor=color, edgecolor=PAPER, linewidth=1.2)
                axes.add_patch(box)
                letter, size = request_letter(order[request], order), 8 if end - start > width * 0.06 else 6.5
                style = {"color": text_color(color), "weight": "bold", "fontsize": size}
                draw_text(axes, left + (end - start) / 2, row, letter, **style)
                left += end - start
            # A number that would lie on the dashed line goes to its right.
            reaches = fair_share - width * 0.08 < left < fair_share + width * 0.02
            beside = max(left, fair_share) if reaches else left
            draw_text(axes, beside + width * 0.015, row, str(load[row]), ha="left")
        axes.axvline(fair_share, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, zorder=3)
        axes.set_title(title)
        axes.set_xlabel("pages to read")
        axes.grid(visible=False)
    all_axes[0][0].set_xlim(0, width * 1.1)
    all_axes[0][0].set_ylim(num_workers - 0.5, -0.5)
    all_axes[0][0].set_yticks(range(num_workers))
    all_axes[0][0].set_ylabel("processor")
    beside = max(fair_share, loads[0][-1]) + width * 0.03
    draw_text(all_axes[0][0], beside, num_workers - 1, f"a fair share: {fair_share:.1f}", ha="left", color=GREY)
    counts = [sum(len(worker) for worker in workers) for workers in plans.values()]
    parts = [
        f"{title}: {count} pieces, loads of {load} pages, the longest {max(load)}"
        for title, count, load in zip(plans, counts, loads, strict=True)
    ]
    return figure.described(
        f"Attention of {len(order)} requests on {num_workers} workers, with a fair share of {fair_share:.1f} pages. "
        f"{'; '.join(parts)}.",
        loads=loads,
        longest=[max(load) for load in loads],
        pieces=counts,
        fair_share=fair_share,
    )
