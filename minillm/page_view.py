"""Pictures of a page pool: a snapshot of who owns which page, and its map as text and as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijklmnopqrstuvwxyz"  # no "c": it marks cached pages
COLORS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
)  # Okabe and Ito, colour-blind-safe
DARK_COLORS = frozenset({"#0072b2", "#009e73", "#d55e00"})  # those that want white letters
MAX_PAGES_SHOWN = 2048
MAX_REQUESTS_NAMED = 16


@dataclass(frozen=True)
class PageSnapshot:
    """The pool at one moment, in plain tuples: for figures, traces and the messages of contracts.

    Attributes:
        page_size: tokens per page.
        states: for each page `"free"`, `"cached"` (holds a block that no request refers to) or `"used"`.
        owners: for each page the ids of the requests whose page tables name it.
        tables: for each live request, in order of arrival, its id and its page table.
    """

    page_size: int
    states: tuple[str, ...]
    owners: tuple[tuple[str, ...], ...]
    tables: tuple[tuple[str, tuple[int, ...]], ...]


def _letters(snapshot: PageSnapshot) -> dict[str, str]:
    return {
        request_id: LETTERS[index] if index < len(LETTERS) else "#"
        for index, (request_id, _) in enumerate(snapshot.tables)
    }


def _characters(snapshot: PageSnapshot) -> str:
    """One character a page: the letter of its owner, `*` shared, `c` cached, `.` free."""
    letters = _letters(snapshot)
    marks = {"free": ".", "cached": "c", "used": "*"}
    return "".join(
        letters[owners[0]] if len(owners) == 1 else marks[state]
        for state, owners in zip(snapshot.states[:MAX_PAGES_SHOWN], snapshot.owners, strict=False)
    )


def _title(snapshot: PageSnapshot, name: str) -> str:
    count = snapshot.states.count
    return (
        f"{name}: {len(snapshot.states)} pages of {snapshot.page_size} tokens, "
        f"{count('used')} used, {count('cached')} cached, {count('free')} free"
    )


def _row_width(num_pages: int) -> int:
    return 32 if num_pages <= 512 else 64


def text_map(snapshot: PageSnapshot, name: str = "PageManager") -> str:
    """The pool as text: one character a page in rows that begin with their first page id, then a legend."""
    num_pages = len(snapshot.states)
    characters, width = _characters(snapshot), _row_width(num_pages)
    digits = len(str(num_pages))
    lines = [_title(snapshot, name)]
    lines += [f"{start:>{digits}}  {characters[start : start + width]}" for start in range(0, len(characters), width)]
    if num_pages > len(characters):
        lines.append(f"... and {num_pages - len(characters)} more pages")
    letters = _letters(snapshot)
    named = snapshot.tables[:MAX_REQUESTS_NAMED]
    legend = [f"{letters[request_id]} = {request_id!r}" for request_id, _ in named]
    if len(snapshot.tables) > len(named):
        legend.append(f"... and {len(snapshot.tables) - len(named)} more requests")
    lines.append(", ".join([*legend, "* = shared", "c = cached", ". = free"]))
    return "\n".join(lines)


def html_map(snapshot: PageSnapshot, name: str = "PageManager") -> str:
    """The same map as HTML: colours of its own on used pages, the notebook theme's colours for the rest."""
    num_pages = len(snapshot.states)
    characters, width = _characters(snapshot), _row_width(num_pages)
    styles = {".": "opacity:.7", "c": "background:#a6a6a6;color:#000000", "*": "background:#5b5b5b;color:#ffffff"}
    letters = _letters(snapshot)
    for index, letter in enumerate(letters.values()):
        color = COLORS[index % len(COLORS)]
        styles[letter] = f"background:{color};color:{'#ffffff' if color in DARK_COLORS else '#000000'}"
    rows = []
    for start in range(0, len(characters), width):
        runs = ((mark, len(list(run))) for mark, run in groupby(characters[start : start + width]))
        cells = "".join(f'<span style="{styles[mark]}">{mark * length}</span>' for mark, length in runs)
        rows.append(f"{start:>{len(str(num_pages))}}  {cells}")
    if num_pages > len(characters):
        rows.append(f"... and {num_pages - len(characters)} more pages")
    named = list(letters.items())[:MAX_REQUESTS_NAMED]
    legend = [f'<span style="{styles[letter]}">{letter}</span> {escape(request_id)}' for request_id, letter in named]
    if len(letters) > len(named):
        legend.append(f"... and {len(letters) - len(named)} more requests")
    legend += [f'<span style="{styles[mark]}">{mark}</span> {word}' for mark, word in
               (("*", "shared"), ("c", "cached"), (".", "free"))]  # fmt: skip
    return (
        f"<div><div>{escape(_title(snapshot, name))}</div>"
        f'<pre style="line-height:1.3;background:transparent;color:inherit">{chr(10).join(rows)}</pre>'
        f"<div>{'&ensp;'.join(legend)}</div></div>"
    )
