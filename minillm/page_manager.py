"""Pages of the KV cache: `PageManager` decides on the host who owns which page, `KVPool` holds the K/V tensors.

The K/V cache is cut into pages of `page_size` tokens, as an operating system cuts memory. A request's page table lists
its pages in order of position: the token at position `p` lives in slot `p % page_size` of page `page_table[p //
page_size]`. Any free page serves any request, so no memory is lost between requests, and requests that begin alike can
share pages. Paged attention: Kwon et al., 2023, https://arxiv.org/abs/2309.06180.

The life of a request: `allocate` (share a cached prefix), then in each step `extend` (make room), `batch_arrays`
(describe the batch to the kernels) and `commit` (offer full pages to the prefix cache), and in the end, or to preempt
it, `free`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch

from minillm.context import BatchArrays, Chunk, InferenceContext
from minillm.errors import ContractError, OutOfPagesError
from minillm.page_view import PageSnapshot, html_map, text_map
from minillm.validation import integer

NO_PAGE = -1  # fills the unused entries of the page tables
MAX_PAGE_SIZE = 1024
MAX_SLOTS = 2**31 - 1  # positions and page ids are int32


class _PageTable:
    """What the manager remembers of one live request; the page ids themselves are a row of `_page_tables`."""

    __slots__ = ("capacity", "digest", "next_commit", "num_committed", "num_pages", "row")

    def __init__(self, row: int):
        self.row = row
        self.num_pages = 0
        self.capacity = 0  # tokens
        self.num_committed = 0  # pages whose content is known
        self.next_commit = 0  # tokens after which the next page is full
        self.digest = b""  # of all committed pages


class _LivePageTables(dict[str, _PageTable]):
    def __missing__(self, request_id: str) -> _PageTable:
        raise KeyError(f"no live request {request_id!r}: it was never allocated, or it has been freed")


class PageManager:
    """Allocates, shares, frees and evicts the pages of one KV pool; builds the CSR arrays of a batch. Host-only.

    A page is in exactly one of three states: free; used (named by `reference_count(page_id)` page tables); or cached (a
    full block of tokens that nobody uses now, kept in case a prompt begins with it, evicted least recently used first).
    Blocks are found by the digest of their tokens chained to the digest of the block before, so that one digest stands
    for the whole prefix (https://docs.vllm.ai/en/latest/design/prefix_caching/).

    Raises:
        ConfigError: `num_pages` or `page_size` is not an integer within bounds.
    """

    def __init__(self, num_pages: int, page_size: int = 16, prefix_caching: bool = True):
        integer("page_size", page_size, 1, MAX_PAGE_SIZE)
        integer("num_pages", num_pages, 1, MAX_SLOTS // page_size)
        self.num_pages, self.page_size, self.prefix_caching = int(num_pages), int(page_size), bool(prefix_caching)
        self._free_pages = list(range(self.num_pages - 1, -1, -1))  # a stack: page 0 is handed out first
        self._reference_counts = [0] * self.num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # cached pages, least recently used first
        self._page_of_block: dict[bytes, int] = {}  # the prefix cache: digest of a block -> its page, used or cached
        self._block_of_page: dict[int, bytes] = {}  # and back
        self._live: dict[str, _PageTable] = _LivePageTables()
        self._page_tables = np.full((8, min(16, self.num_pages)), NO_PAGE, dtype=np.int32)  # grows by doubling
        self._capacities = np.zeros(8, dtype=np.int64)  # of each row, in tokens
        self._free_rows = list(range(7, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free_pages)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free_pages) - len(self._cached)

    @property
    def num_available(self) -> int:
        return len(self._free_pages) + len(self._cached)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The live requests, in order of arrival."""
        return tuple(self._live)

    def reference_count(self, page_id: int) -> int:
        """How many live page tables name the page."""
        return self._reference_counts[page_id]

    def page_table(self, request_id: str) -> np.ndarray:
        """A copy of the page ids of one live request, int32; they have room for `len * page_size` tokens."""
        table = self._live[request_id]
        return self._page_tables[table.row, : table.num_pages].copy()

    def allocate(self, request_id: str, token_ids: Sequence[int]) -> int:
        """Open a page table for `request_id` and share the longest cached prefix of `token_ids`; takes no new page.

        Returns the number of tokens found, a multiple of `page_size` and at most `len(token_ids) - 1`: the last token
        must be computed to have logits. Raises `ValueError` if the request is live already or there are no tokens.
        """
        if request_id in self._live:
            raise ValueError(f"request {request_id!r} has a page table already")
        if len(token_ids) == 0:
            raise ValueError(f"request {request_id!r} has no tokens")
        pages, digest = self._cached_prefix(token_ids)
        if not self._free_rows:
            self._add_rows()
        table = _PageTable(self._free_rows.pop())
        for page in pages:
            self._reference_counts[page] += 1
            self._cached.pop(page, None)
        self._append_pages(table, pages)
        table.digest, table.num_committed = digest, len(pages)
        table.next_commit = table.capacity + self.page_size if self.prefix_caching else MAX_SLOTS + 1
        self._live[request_id] = table
        return table.capacity

    def extend(self, request_id: str, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in total: all of it, or `OutOfPagesError` and nothing has changed.

        Cached pages are evicted, least recently used first, when no free page is left.
        """
        table = self._live[request_id]
        if num_tokens <= table.capacity:
            return
        num_new = -(-num_tokens // self.page_size) - table.num_pages
        if num_new > self.num_available:
            raise OutOfPagesError(
                f"request {request_id!r} needs {num_new} more pages for {num_tokens} tokens; {self.num_available} of "
                f"{self.num_pages} are available"
            )
        self.evict(max(num_new - len(self._free_pages), 0))
        pages = [self._free_pages.pop() for _ in range(num_new)]
        for page in pages:
            self._reference_counts[page] = 1
        self._append_pages(table, pages)

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed: int) -> None:
        """The K/V of `token_ids[:num_computed]` are in the pages: those that are full enter the prefix cache.

        A block that is cached already keeps the page it has, and this request's page of it stays private: no page table
        changes under a running step. Raises `ValueError` if there is no room for, or no ids of, that many tokens.
        """
        table = self._live[request_id]
        if num_computed < table.next_commit:
            return
        if num_computed > min(table.capacity, len(token_ids)):
            raise ValueError(
                f"request {request_id!r} cannot have computed {num_computed} tokens: "
                f"it has {len(token_ids)}, and room for {table.capacity}"
            )
        for index in range(table.num_committed, num_computed // self.page_size):
            table.digest = self._block_digest(table.digest, token_ids, index)
            if table.digest not in self._page_of_block:
                page = int(self._page_tables[table.row, index])
                self._page_of_block[table.digest] = page
                self._block_of_page[page] = table.digest
        table.num_committed = num_computed // self.page_size
        table.next_commit = (table.num_committed + 1) * self.page_size

    def free(self, request_id: str) -> None:
        """Close the page table. Pages that nobody else uses become free, or cached if the prefix cache knows them.

        Pages are given up from the last to the first: the end of a prefix is evicted before its beginning, without
        which it could not be found.
        """
        table = self._live[request_id]
        pages = self._page_tables[table.row, : table.num_pages]
        for page in reversed(pages.tolist()):
            self._reference_counts[page] -= 1
            if self._reference_counts[page] == 0:
                if page in self._block_of_page:
                    self._cached[page] = None
                else:
                    self._free_pages.append(page)
        pages.fill(NO_PAGE)
        self._capacities[table.row] = 0
        self._free_rows.append(table.row)
        del self._live[request_id]

    def evict(self, num_pages: int | None = None) -> int:
        """Forget up to `num_pages` (None: all) cached pages, least recently used first; returns how many."""
        num_evicted = self.num_cached if num_pages is None else min(max(num_pages, 0), self.num_cached)
        for _ in range(num_evicted):
            page, _ = self._cached.popitem(last=False)
            del self._page_of_block[self._block_of_page.pop(page)]
            self._free_pages.append(page)
        return num_evicted

    def batch_arrays(self, chunks: Sequence[Chunk]) -> BatchArrays:
        """The CSR arrays of a batch in which the tokens `[start, end)` of each chunk's request are computed.

        Each request's pages are those of its first `end` tokens. Raises `ValueError` for an empty chunk, or one beyond
        the room that `extend` made.
        """
        request_ids, start_list, end_list = zip(*chunks, strict=True) if chunks else ((), (), ())
        starts = np.fromiter(start_list, np.int64, len(chunks))
        ends = np.fromiter(end_list, np.int64, len(chunks))
        rows = np.fromiter([self._live[request_id].row for request_id in request_ids], np.int64, len(chunks))
        capacities = self._capacities[rows]
        wrong = (starts < 0) | (starts >= ends) | (ends > capacities)
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(f"{chunks[index]} is empty or beyond the room of its request, {capacities[index]} tokens")
        num_tokens, num_pages = ends - starts, -(-ends // self.page_size)
        kv_indptr = _indptr(num_pages)
        entries = _ragged_arange(rows * self._page_tables.shape[1], num_pages, kv_indptr)
        qo_indptr, positions = np.arange(len(chunks) + 1, dtype=np.int32), starts  # right for one token each: decodes
        batch_indices = qo_indptr[:-1]
        if (num_tokens > 1).any():
            qo_indptr, batch_indices = _indptr(num_tokens), np.repeat(batch_indices, num_tokens)
            positions = _ragged_arange(starts, num_tokens, qo_indptr)
        return BatchArrays(
            qo_indptr=qo_indptr,
            kv_indptr=kv_indptr,
            kv_indices=self._page_tables.reshape(-1)[entries],
            kv_last_page_len=(ends - (num_pages - 1) * self.page_size).astype(np.int32),
            positions=positions.astype(np.int32),
            batch_indices=batch_indices,
            page_size=self.page_size,
        )

    def snapshot(self) -> PageSnapshot:
        """Who owns which page now, in plain tuples."""
        owners: list[list[str]] = [[] for _ in range(self.num_pages)]
        tables = tuple((request_id, tuple(self.page_table(request_id).tolist())) for request_id in self._live)
        for request_id, pages in tables:
            for page in pages:
                owners[page].append(request_id)
        states = tuple(
            "used" if owners[page] else "cached" if page in self._cached else "free" for page in range(self.num_pages)
        )
        return PageSnapshot(self.page_size, states, tuple(map(tuple, owners)), tables)

    def check_invariants(self) -> None:
        """Raise `ContractError` unless each page is free, cached or used, exactly one of them, and counts add up."""

        def require(holds: bool, rule: str, request_id: str | None = None) -> None:
            if not holds:
                raise ContractError("PageManager", rule, request_id)

        references = [0] * self.num_pages
        for request_id, table in self._live.items():
            row = self._page_tables[table.row].tolist()
            pages = row[: table.num_pages]
            inside = all(0 <= page < self.num_pages for page in pages)
            require(
                inside and len(set(pages)) == len(pages), "a page table names pages of the pool, each once", request_id
            )
            require(set(row[table.num_pages :]) <= {NO_PAGE}, "a page table ends after its last page", request_id)
            room = table.num_pages * self.page_size
            require(table.capacity == room == self._capacities[table.row], "room is that of the pages", request_id)
            require(table.num_committed <= table.num_pages, "only pages that a request has are committed", request_id)
            for page in pages:
                references[page] += 1
        require(references == self._reference_counts, "reference counts equal the page tables that name the page")
        used = {page for page, count in enumerate(references) if count}
        states = [*self._free_pages, *self._cached, *used]
        exactly_one = sorted(states) == list(range(self.num_pages))
        require(exactly_one, "every page is free, cached or used, exactly one of them")
        blocks = {page: block for block, page in self._page_of_block.items()}
        require(blocks == self._block_of_page, "the prefix cache maps blocks to pages one to one")
        require(
            set(self._cached) == blocks.keys() - used, "cached pages are those of the prefix cache that nobody uses"
        )
        shared = {page for page, count in enumerate(references) if count > 1}
        require(shared <= blocks.keys(), "a page is shared only through the prefix cache")
        rows = sorted([*self._free_rows, *(table.row for table in self._live.values())])
        require(rows == list(range(len(self._page_tables))), "every row is free or one request's")

    def __repr__(self) -> str:
        return text_map(self.snapshot())

    def _repr_html_(self) -> str:
        return html_map(self.snapshot())

    def _block_digest(self, parent: bytes, token_ids: Sequence[int], index: int) -> bytes:
        block = np.asarray(token_ids[index * self.page_size : (index + 1) * self.page_size], dtype=np.int64)
        return blake2b(parent + block.tobytes(), digest_size=16).digest()

    def _cached_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], bytes]:
        """The pages of the longest cached prefix that leaves at least one token to compute, and its digest."""
        pages: list[int] = []
        digest = b""
        for index in range((len(token_ids) - 1) // self.page_size if self.prefix_caching else 0):
            longer = self._block_digest(digest, token_ids, index)
            page = self._page_of_block.get(longer)
            if page is None:
                break
            pages.append(page)
            digest = longer
        return pages, digest

    def _append_pages(self, table: _PageTable, pages: list[int]) -> None:
        num_pages = table.num_pages + len(pages)
        num_rows, width = self._page_tables.shape
        if num_pages > width:
            wider = np.full((num_rows, max(num_pages, 2 * width)), NO_PAGE, dtype=np.int32)
            wider[:, :width] = self._page_tables
            self._page_tables = wider
        self._page_tables[table.row, table.num_pages : num_pages] = pages
        table.num_pages = num_pages
        table.capacity = self._capacities[table.row] = num_pages * self.page_size

    def _add_rows(self) -> None:
        num_rows = len(self._page_tables)
        self._page_tables = np.concatenate([self._page_tables, np.full_like(self._page_tables, NO_PAGE)])
        self._capacities = np.concatenate([self._capacities, np.zeros_like(self._capacities)])
        self._free_rows = list(range(2 * num_rows - 1, num_rows - 1, -1))


def _indptr(lengths: np.ndarray) -> np.ndarray:
    """`[0, lengths[0], lengths[0] + lengths[1], ...]`, int32."""
    indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=indptr[1:])
    return indptr


def _ragged_arange(starts: np.ndarray, lengths: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """`starts[i], ..., starts[i] + lengths[i] - 1` for each i in turn; `indptr` is that of the lengths."""
    return np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], lengths)


class KVPool:
    """The K/V cache of all layers in one tensor, `[num_layers, num_pages + 1, 2, page_size, num_kv_heads, head_dim]`.

    FlashInfer's NHD layout; index 0 of the third dimension is K, 1 is V. The last page is scratch: padding rows are
    written there, and no page manager hands it out. It begins as zeros, since kernels may multiply what lies beyond a
    request's last token by a probability of zero, and zero times a leftover NaN is NaN.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        integer("page_size", page_size, 1, MAX_PAGE_SIZE)
        integer("num_pages", num_pages, 1, MAX_SLOTS // page_size)
        shape = (num_layers, num_pages + 1, 2, page_size, num_kv_heads, head_dim)
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.num_pages, self.page_size = num_pages, page_size

    @staticmethod
    def bytes_per_page(num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page's K and V over all layers."""
        return num_layers * 2 * page_size * num_kv_heads * head_dim * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, the scratch page included."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def scratch_page(self) -> int:
        """The id of the page for padding rows."""
        return self.num_pages

    def layer(self, layer_index: int) -> torch.Tensor:
        """One layer's pages, `[num_pages + 1, 2, page_size, num_kv_heads, head_dim]`; a view."""
        return self.tensor[layer_index]

    def append(self, layer_index: int, k: torch.Tensor, v: torch.Tensor, context: InferenceContext) -> None:
        """Write the step's `k` and `v` `[num_tokens, num_kv_heads, head_dim]` to the slots that the context names.

        Raises `ValueError` when their dtype is not the pool's: the kernel copies raw bytes and would not notice.
        """
        if k.dtype != self.tensor.dtype or v.dtype != self.tensor.dtype:
            raise ValueError(f"k and v are {k.dtype} and {v.dtype}, the KV pool is {self.tensor.dtype}")
        context.kernels.append_paged_kv_cache(
            k,
            v,
            context.batch_indices,
            context.positions,
            self.layer(layer_index),
            context.kv_indices,
            context.kv_indptr,
            context.kv_last_page_len,
        )
