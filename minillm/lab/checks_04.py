"""The checkers of chapter 04, "FlashInfer"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from minillm.lab.checking import Comparison, exercise, holds, same
from minillm.lab.naive import attention


@exercise("Lengths to arrays")
def ex04_page_arrays(
    attempt: Callable[[Sequence[int], int], tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[Comparison]:
    """`attempt(kv_lens, page_size)` -> (kv_indptr `[batch + 1]`, kv_last_page_len `[batch]`), int32."""
    cases = {
        "one request, part of a page": ([3], 4),
        "a full page is a full page": ([4, 8], 4),
        "one token more": ([5, 9], 4),
        "requests without tokens": ([0, 6, 0], 4),
        "pages of one token": ([3, 0, 1], 1),
        "many": ([2000, 420, 260, 150, 75, 40], 16),
    }
    for name, (kv_lens, page_size) in cases.items():
        pages = [-(-length // page_size) for length in kv_lens]
        last = [length - max(count - 1, 0) * page_size for length, count in zip(kv_lens, pages, strict=True)]
        kv_indptr, kv_last_page_len = attempt(list(kv_lens), page_size)
        expected = np.append(0, np.cumsum(pages)).astype(np.int32)
        yield same(f"kv_indptr: {name}", kv_indptr, expected, index_name="entry")
        yield same(f"kv_last_page_len: {name}", kv_last_page_len, np.array(last, np.int32), index_name="request")
        types = [str(getattr(array, "dtype", type(array))) for array in (kv_indptr, kv_last_page_len)]
        is_int32 = all(name.endswith("int32") and "u" not in name for name in types)
        yield holds("the types", is_int32, f"expected int32 arrays, got {' and '.join(types)}")


@exercise("Merge many at once")
def ex04_merge_states(
    attempt: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[Comparison]:
    """`attempt(v, s)`: v `[rows, states, heads, dim]`, s `[rows, states, heads]`, base 2 -> (v, s) without states."""
    cases = {
        "one state": ([5], 1.0),
        "two states": ([5, 3], 1.0),
        "pieces of 1, 7 and 4 tokens": ([1, 7, 4], 1.0),
        "an empty state among others": ([4, 0, 2], 1.0),
        "large scores": ([3, 3], 400.0),
        "rows whose states are all empty": ([0, 0], 1.0),
    }
    for number, (name, (sizes, scale)) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(number)
        q = torch.randn(2, 3, 8, generator=generator) * scale
        k, v = torch.randn(2, sum(sizes), 3, 8, generator=generator)
        outputs, lses = zip(
            *(_state(q, *part) for part in zip(k.split(sizes), v.split(sizes), strict=True)), strict=True
        )
        got_v, got_s = attempt(torch.stack(outputs, dim=1), torch.stack(lses, dim=1))
        is_nan = bool(torch.as_tensor(got_v).isnan().any()) or bool(torch.as_tensor(got_s).isnan().any())
        yield holds(name, not is_nan, "the result has NaN: inf - inf, or 0 / 0")
        expected_s = _state(q, k, v)[1]
        yield same(f"v: {name}", got_v, attention(q, k, v, causal=False), index_name="(row, head, dimension)")
        yield same(f"s: {name}", got_s, expected_s, index_name="(row, head)")


def _state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("rhd,nhd->rhn", q, k) / math.sqrt(q.shape[2])
    return attention(q, k, v, causal=False), torch.logsumexp(scores, dim=-1) / math.log(2)


@exercise("The smallest piece that fits")
def ex04_pages_per_piece(attempt: Callable[[Sequence[int], int], int]) -> Iterator[Comparison]:
    """`attempt(num_pages, max_pieces)` -> pages of a piece, the fewest for which no more pieces than that are needed.

    `max_pieces` is never below the number of requests, each of which has at least one page.
    """
    for num_pages, max_pieces in (
        ([10], 1),
        ([10], 10),
        ([10], 3),
        ([7, 7], 5),
        ([125, 27, 17, 10, 5, 3], 6),
        ([125, 27, 17, 10, 5, 3], 24),
        ([1, 1, 1], 100),
        ([5_000_000, 3], 7),
    ):
        low, high = 1, max(num_pages)
        while low < high:
            middle = (low + high) // 2
            if sum(-(-count // middle) for count in num_pages) <= max_pieces:
                high = middle
            else:
                low = middle + 1
        yield same(f"requests of {num_pages} pages, at most {max_pieces} pieces", attempt(num_pages, max_pieces), low)
