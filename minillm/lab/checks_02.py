"""The checkers of chapter 02, "Pages"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minillm.errors import OutOfPagesError
from minillm.lab.checking import Comparison, exercise, holds, raises, same


@exercise("Read the arrays back")
def ex02_read_back(
    attempt: Callable[[np.ndarray, np.ndarray, np.ndarray, int], Sequence[Sequence[int]]],
) -> Iterator[Comparison]:
    """`attempt(kv_indptr, kv_indices, kv_last_page_len, page_size)` -> for each request its slots, in order of token.

    A slot is counted through the whole pool: `page_id * page_size + offset`.
    """
    cases = {
        "one request, one full page": (4, {"a": [3]}, [4]),
        "a last page with one token": (4, {"a": [5, 0]}, [5]),
        "three requests": (4, {"a": [0, 6, 2], "b": [1], "c": [7, 3]}, [11, 3, 8]),
        "pages of one token": (1, {"a": [2, 0, 1], "b": [4]}, [3, 1]),
    }
    for name, (page_size, tables, lengths) in cases.items():
        pages = list(tables.values())
        kv_indptr = np.cumsum([0, *map(len, pages)]).astype(np.int32)
        kv_indices = np.concatenate(pages).astype(np.int32)
        last = [length - (len(table) - 1) * page_size for table, length in zip(pages, lengths, strict=True)]
        expected = [
            [table[p // page_size] * page_size + p % page_size for p in range(length)]
            for table, length in zip(pages, lengths, strict=True)
        ]
        got = attempt(kv_indptr, kv_indices, np.array(last, dtype=np.int32), page_size)
        yield same(f"{name}: the number of requests", len(got), len(expected))
        for request, (slots, right) in enumerate(zip(got, expected, strict=True)):
            yield same(f"{name}, request {request}", np.asarray(slots).tolist(), right, index_name="token")


@exercise("Behind the window")
def ex02_window(attempt: Callable[[int, int, int], int]) -> Iterator[Comparison]:
    """`attempt(num_tokens, window_left, page_size)` -> how many leading pages the next token cannot see."""
    for num_tokens, window_left, page_size in (
        (4, 8, 4),
        (12, 4, 4),
        (13, 4, 4),
        (8, 4, 4),
        (9, 1, 4),
        (100, 0, 16),
        (64, 16, 16),
        (63, 0, 1),
    ):
        first_seen = max(num_tokens - window_left, 0)  # the next token is at position num_tokens
        expected = sum((page + 1) * page_size <= first_seen for page in range(-(-num_tokens // page_size)))
        what = f"{num_tokens} tokens, window_left={window_left}, pages of {page_size}"
        yield same(what, attempt(num_tokens, window_left, page_size), expected)


@exercise("Shared pages")
def ex02_allocator(attempt: Callable[[int], Any]) -> Iterator[Comparison]:
    """`attempt(num_pages)` -> an allocator with `take() -> page_id`, `share(page_id)`, `give(page_id)`, `num_free`."""
    pool = attempt(3)
    yield same("num_free of a new allocator of 3 pages", pool.num_free, 3)
    pages = [pool.take() for _ in range(3)]
    yield same("the three pages that it hands out, sorted", sorted(pages), [0, 1, 2])
    yield same("num_free then", pool.num_free, 0)
    yield raises("take() when no page is left", OutOfPagesError, pool.take)
    pool.share(pages[1])
    pool.give(pages[1])
    yield same("num_free after a shared page was given back by one of its two users", pool.num_free, 0)
    pool.give(pages[1])
    yield same("num_free after the second gave it back", pool.num_free, 1)
    yield raises("give() of a page that is free", ValueError, pool.give, pages[1])
    yield same("num_free after that", pool.num_free, 1)
    yield raises("share() of a page that is free", ValueError, pool.share, pages[1])
    again = pool.take()
    yield same("the page that is handed out next", again, pages[1])
    pool.give(again)
    yield same("num_free after its new user gave it back: the old users' shares are forgotten", pool.num_free, 1)
    for page in (pages[0], pages[2]):
        pool.give(page)
    yield same("num_free in the end", pool.num_free, 3)
    other = attempt(2)
    yield holds("two allocators", other.num_free == 2, "the second one begins with what the first one left")
