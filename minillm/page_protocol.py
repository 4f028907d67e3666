"""What the engine asks of a page manager, and the rules it checks while a swapped-in one is running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from minillm.context import BatchArrays, Chunk
from minillm.errors import ContractError


class PageManagerProtocol(Protocol):
    """What the engine asks of a page manager: implement these and pass the class as `LLM(..., page_manager=...)`.

    It is made as `PageManager(num_pages, page_size, prefix_caching)`. A manager without a prefix cache returns 0 from
    `allocate` and `evict`, and does nothing in `commit`. `lab.contracts.check_page_manager` checks all of it.
    """

    num_pages: int
    page_size: int

    @property
    def num_used(self) -> int:
        """Pages that some live page table names. The others are available: `num_used + num_available == num_pages`."""
        ...

    @property
    def num_available(self) -> int:
        """Pages that `extend` can still hand out, by evicting cached ones if it must."""
        ...

    def allocate(self, request_id: str, token_ids: Sequence[int]) -> int:
        """Open a page table; return how many leading tokens are already in shared pages (fewer than all of them)."""
        ...

    def extend(self, request_id: str, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in total, or raise `OutOfPagesError` and change nothing."""
        ...

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed: int) -> None:
        """Take note that the K/V of `token_ids[:num_computed]` have been written."""
        ...

    def free(self, request_id: str) -> None:
        """Close the page table; pages that no other request shares become available. `KeyError` if it is not live."""
        ...

    def evict(self, num_pages: int | None = None) -> int:
        """Forget up to `num_pages` (None: all) cached pages that nobody uses; return how many."""
        ...

    def page_table(self, request_id: str) -> Sequence[int] | np.ndarray:
        """The page ids of a live request, in order of position."""
        ...

    def batch_arrays(self, chunks: Sequence[Chunk]) -> BatchArrays:
        """The CSR arrays of a batch in which the tokens `[start, end)` of each chunk's request are computed."""
        ...


def check_num_cached(num_cached_tokens: int, num_tokens: int, page_size: int, request_id: str | None = None) -> None:
    """Check what `allocate` returned for a request of `num_tokens` tokens; `ContractError` if it breaks a rule."""
    is_integer = isinstance(num_cached_tokens, (int, np.integer))
    _require(is_integer, "allocate returns how many tokens are cached, an integer", request_id)
    _require(num_cached_tokens % page_size == 0, "allocate returns a multiple of the page size", request_id)
    _require(num_cached_tokens >= 0, "allocate returns how many tokens are cached, 0 or more", request_id)
    _require(num_cached_tokens < num_tokens, "a prefix hit leaves at least the last token to compute", request_id)


def check_batch_arrays(arrays: BatchArrays, chunks: Sequence[Chunk], num_pages: int, page_size: int) -> None:
    """Check the arrays that a page manager built for `chunks`; `ContractError` if kernels could not trust them.

    Catches what would read or write outside the pool, or in another request's page: about 150 us for 256 requests.
    """
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "positions", "batch_indices"):
        array = getattr(arrays, name, None)
        is_int32 = isinstance(array, np.ndarray) and array.dtype == np.int32 and array.ndim == 1
        _require(is_int32, f"{name} is a one-dimensional int32 numpy array")
    _require(arrays.page_size == page_size, "batch_arrays names the page size of the pool")
    starts = np.fromiter([chunk.start for chunk in chunks], np.int64, len(chunks))
    ends = np.fromiter([chunk.end for chunk in chunks], np.int64, len(chunks))
    pages_needed = -(-ends // page_size)
    lengths = ends - starts
    _require_equal("qo_indptr", arrays.qo_indptr, np.append(0, np.cumsum(lengths)), "adds up the tokens of the chunks")
    _require_equal(
        "kv_indptr",
        arrays.kv_indptr,
        np.append(0, np.cumsum(pages_needed)),
        "adds up the pages of the first `end` tokens",
    )
    last_page_len = ends - (pages_needed - 1) * page_size
    _require_equal(
        "kv_last_page_len", arrays.kv_last_page_len, last_page_len, "counts the tokens in the last page, 1 to page_size"
    )
    batch_indices = np.repeat(np.arange(len(chunks)), lengths)
    _require_equal("batch_indices", arrays.batch_indices, batch_indices, "says which chunk each row belongs to")
    positions = np.arange(lengths.sum()) + (starts - arrays.qo_indptr[:-1])[batch_indices]
    _require_equal("positions", arrays.positions, positions, "counts from `start` to `end - 1` in each chunk")
    kv_indices = arrays.kv_indices
    _require(len(kv_indices) == arrays.kv_indptr[-1], "kv_indices has kv_indptr[-1] entries")
    inside = bool(((kv_indices >= 0) & (kv_indices < num_pages)).all())
    _require(inside, "kv_indices names pages of the pool, 0 to num_pages - 1")
    written = kv_indices[arrays.kv_indptr[batch_indices] + positions // page_size]
    readers = np.bincount(kv_indices, minlength=num_pages)
    _require(bool((readers[written] == 1).all()), "a page that is written in this step is in one page table only")


def _require(holds: bool, rule: str, request_id: str | None = None) -> None:
    if not holds:
        raise ContractError("PageManager", rule, request_id)


def _require_equal(name: str, got: np.ndarray, expected: np.ndarray, what: str) -> None:
    if not np.array_equal(got, expected):
        _require(False, f"{name} {what}: expected {expected.tolist()}, got {got.tolist()}")
