"""The checkers of chapter 00, "Start here"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from minillm.lab.checking import Comparison, exercise, same


@exercise("Pages for a request")
def ex00_num_pages(attempt: Callable[[int, int], int]) -> Iterator[Comparison]:
    """`attempt(num_tokens, page_size)` -> how many pages hold the tokens."""
    for num_tokens, page_size in ((16, 16), (1, 16), (17, 16), (48, 16), (100, 1), (0, 16), (63, 64)):
        what = f"{num_tokens} tokens in pages of {page_size}"
        yield same(what, attempt(num_tokens, page_size), math.ceil(num_tokens / page_size))


@exercise("The best token that is allowed")
def ex00_best_allowed(attempt: Callable[[torch.Tensor, torch.Tensor], list[int]]) -> Iterator[Comparison]:
    """`attempt(logits, banned)`: `[num_rows, vocab_size]` floats, `[vocab_size]` bools -> a token id for each row."""
    cases = {
        "nothing banned": ([[0.1, 0.7, 0.2]], [False, False, False], [1]),
        "the best one banned": ([[0.1, 0.7, 0.2]], [False, True, False], [2]),
        "two rows": ([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]], [True, False, False], [1, 2]),
        "all logits negative": ([[-1.0, -2.0, -3.0]], [True, False, False], [1]),
    }
    for what, (rows, mask, expected) in cases.items():
        logits, banned = torch.tensor(rows), torch.tensor(mask)
        got = attempt(logits, banned)
        yield same(what, [int(token_id) for token_id in got], expected, index_name="row")
        yield same(f"{what}: the logits are left as they were", logits, torch.tensor(rows), index_name="(row, token)")
