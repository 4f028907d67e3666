"""InferenceContext: one step's state, handed through every layer. There is no other way for state to reach a layer.

Engines that keep the current batch in a module-level global (`set_context()` before the forward pass, `get_context()`
inside attention) hide what a layer depends on, and two engines in two threads overwrite each other. Here the state of
a step is one frozen value: it is built by the runner, passed down as an argument, and dropped.

This module is the bottom of the import graph: it imports nothing of minillm. What it holds but does not define (the
pool, the page manager, the kernels) is described by a Protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

NOT_GIVEN: Any = None  # a context made by hand leaves out what the layers at hand do not use


class Chunk(NamedTuple):
    """Tokens `[start, end)` of one request, computed together in one step: a prefill chunk, or one decode token."""

    request_id: str
    start: int
    end: int


@dataclass(frozen=True)
class BatchArrays:
    """What one step's batch looks like in memory, as FlashInfer's CSR arrays; all int32, on the host.

    Request `b` of the batch owns the query rows `qo_indptr[b]:qo_indptr[b + 1]` and reads the pages
    `kv_indices[kv_indptr[b]:kv_indptr[b + 1]]`, the last of which holds `kv_last_page_len[b]` tokens *after* this
    step's tokens have been appended. See https://docs.flashinfer.ai/tutorials/kv_layout.html.
    """

    qo_indptr: np.ndarray  # [num_requests + 1]
    kv_indptr: np.ndarray  # [num_requests + 1]
    kv_indices: np.ndarray  # [kv_indptr[-1]] page ids
    kv_last_page_len: np.ndarray  # [num_requests]
    positions: np.ndarray  # [num_tokens] position of each query row in its request
    batch_indices: np.ndarray  # [num_tokens] which request of the batch each query row belongs to
    page_size: int

    @property
    def num_requests(self) -> int:
        return len(self.qo_indptr) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def kv_lens(self) -> np.ndarray:
        """Tokens in each request's pages after this step, `[num_requests]`."""
        num_pages = self.kv_indptr[1:] - self.kv_indptr[:-1]
        return np.maximum(num_pages - 1, 0) * self.page_size + self.kv_last_page_len


class AttentionPlan(Protocol):
    """How this step attends; planned once, run once per layer. Which wrappers are behind it is nobody's business."""

    def run(self, q: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        """Attend `q` `[num_tokens, num_qo_heads, head_dim]` to one layer's pages; returns the shape of `q`."""
        ...


class KVPoolLike(Protocol):
    """The K/V tensors of all layers, seen by a layer."""

    def layer(self, layer_index: int) -> torch.Tensor:
        """One layer's pages, `[num_pages + 1, 2, page_size, num_kv_heads, head_dim]`."""
        ...

    def append(self, layer_index: int, k: torch.Tensor, v: torch.Tensor, context: InferenceContext) -> None:
        """Write this step's `k` and `v` `[num_tokens, num_kv_heads, head_dim]` to where the context says."""
        ...


class PageManagerLike(Protocol):
    """The page manager as whoever holds a context may see it: to look at and to draw, not to change."""

    page_size: int
    num_pages: int

    def page_table(self, request_id: str) -> Sequence[int] | np.ndarray:
        """The page ids of one live request, in order of position."""
        ...


class Group(Protocol):
    """The ranks that share each layer's weights (tensor parallelism)."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the ranks (in place where that is possible)."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, joined along the last dimension."""
        ...


class SoloGroup:
    """The group of one rank: nothing to communicate. With a larger `size`, it only serves to see rank 0's shapes."""

    def __init__(self, size: int = 1):
        self.rank, self.size = 0, size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass(frozen=True)
class InferenceContext:
    """Everything a layer needs to know of the current step.

    Frozen means that no field is rebound. The tensors are on the model's device; all index arrays are int32. Only
    `kernels` has no default, so that a single layer can be tried by hand:

        context = InferenceContext(kernels=minillm.reference)
        norm(x, context)  # any RMSNorm

    `num_tokens` below is the number of query rows of the step, over all its requests.
    """

    kernels: Any  # the module whose functions compute: `flashinfer`, or its twin `minillm.reference`
    positions: torch.Tensor = NOT_GIVEN  # [num_tokens]
    qo_indptr: torch.Tensor = NOT_GIVEN  # [num_requests + 1]
    kv_indptr: torch.Tensor = NOT_GIVEN  # [num_requests + 1]
    kv_indices: torch.Tensor = NOT_GIVEN  # [kv_indptr[-1]] page ids
    kv_last_page_len: torch.Tensor = NOT_GIVEN  # [num_requests]
    batch_indices: torch.Tensor = NOT_GIVEN  # [num_tokens]
    attention: AttentionPlan = NOT_GIVEN
    kv_pool: KVPoolLike = NOT_GIVEN
    page_manager: PageManagerLike | None = None  # on rank 0 only
    group: Group = field(default_factory=SoloGroup)
    logits_rows: torch.Tensor | None = None  # [num_logits]: the rows to turn into logits; None means all

    @property
    def num_tokens(self) -> int:
        return 0 if self.positions is None else len(self.positions)
