"""The twin's planner: from CSR arrays to a few groups of requests of one shape, once a step.

A group is what PyTorch can compute in one call: requests with the same number of query rows, their K/V padded to the
longest. Decode rows of similar length share a group, so that little is padded; a prefill chunk of another length gets
its own, so that 63 decode rows and a chunk of 512 tokens never become 64 x 512 rows.
Source: https://docs.flashinfer.ai/tutorials/kv_layout.html (the page table in CSR form).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

# Starting a group costs about as much as gathering this many bytes of padding (measured on two CPU cores).
GROUP_COST_BYTES = 400_000


@dataclass(frozen=True)
class Problem:
    """What plan() was told that is the same for every request and layer; units as in FlashInfer's arguments."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    o_dtype: torch.dtype
    causal: bool = False
    sm_scale: float | None = None
    window_left: int = -1
    logits_soft_cap: float = 0.0
    rope: tuple[float, float] | None = None  # (scale, theta) when K and Q are rotated inside attention


class Gather(NamedTuple):
    """How a group's K/V are copied from a cache of one shape: the same for every layer, so worked out by the first."""

    rows_shape: tuple[int, int]  # of the cache, seen as rows of one token and one head
    table: torch.Tensor  # int64, the rows to copy
    target: torch.Tensor  # where to
    parts: tuple[torch.Tensor, ...]  # K and V (or one of them) there


@dataclass(frozen=True)
class Group:
    """Requests with `qo_len` query rows each, and K/V padded to `kv_len` tokens.

    `rows`: the group's rows of q, request after request. `page_ids`, `slots` `[num_requests, kv_len]` int64: where each
    token lies (padding repeats the request's last token: real, hence finite, values). `bias`: 0 or -inf, to be added
    to the scores, `[num_requests, 1, qo_len, kv_len]` in q's dtype (a decode row's padding: `[num_requests,
    num_kv_heads, 1, kv_len]`); None where every row sees every token, or where `is_square_causal` says that the mask is
    the plain lower triangle. `blind`: rows that see nothing, `[rows]` bool.
    `rotary`: (cos, sin) of the queries, (cos, sin) of the keys. `gathers`: filled by `minillm.reference_kernel`.
    """

    rows: slice | torch.Tensor
    num_requests: int
    qo_len: int
    kv_len: int
    page_ids: torch.Tensor
    slots: torch.Tensor
    bias: torch.Tensor | None
    is_square_causal: bool
    blind: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    gathers: dict[tuple[Any, ...], Gather] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Plan:
    """One step's index work: `num_rows` query rows, of which `empty_rows` (int64) belong to requests without K/V."""

    problem: Problem
    num_rows: int
    groups: tuple[Group, ...]
    empty_rows: torch.Tensor | None


@dataclass(frozen=True)
class CustomMask:
    """A mask given by the caller: `bits` (bool, flat), in which request i starts at `offsets[i]`, row by row."""

    bits: torch.Tensor
    offsets: np.ndarray


def kv_lengths(kv_indptr: np.ndarray, kv_last_page_len: np.ndarray, page_size: int) -> np.ndarray:
    """Tokens of each request: all its pages full but the last; 0 without pages, when the last page holds 0."""
    return np.maximum(kv_indptr[1:] - kv_indptr[:-1] - 1, 0) * page_size + kv_last_page_len


def make_plan(
    problem: Problem,
    qo_indptr: np.ndarray,
    kv_indptr: np.ndarray,
    kv_lens: np.ndarray,
    kv_indices: torch.Tensor | None,
    device: torch.device,
    custom_mask: CustomMask | None = None,
) -> Plan:
    """Group the requests of a batch and locate each of their tokens.

    `qo_indptr`, `kv_indptr` `[batch + 1]` and `kv_lens` `[batch]` are host arrays; `kv_indices` (int32) is on `device`,
    or None when token j of request i simply is row `kv_indptr[i] + j` (ragged K/V).
    """
    qo_lens = qo_indptr[1:] - qo_indptr[:-1]
    # Tokens to the left of every query's window are never gathered.
    first = np.zeros_like(kv_lens)
    if problem.window_left >= 0:
        first = np.maximum(kv_lens - qo_lens - problem.window_left, 0)
    seen = kv_lens - first
    groups = []
    for members in _grouped(problem, qo_lens, seen):
        qo_len, kv_len = int(qo_lens[members[0]]), int(seen[members].max())
        positions = first[members, None] + np.minimum(np.arange(kv_len), seen[members, None] - 1)
        if kv_indices is None:
            page_ids = torch.from_numpy(kv_indptr[members, None] + positions).to(device)
            slots = torch.zeros_like(page_ids)
        else:
            page_numbers, slot_array = np.divmod(positions, problem.page_size)
            page_numbers += kv_indptr[members, None]
            page_ids = kv_indices.take(torch.from_numpy(page_numbers).to(device)).to(torch.int64)
            slots = torch.from_numpy(slot_array).to(device)
        lens = kv_lens[members]
        bias, blind, is_square_causal = _visibility(
            problem, qo_len, lens, first[members], kv_len, device, custom_mask, members
        )
        groups.append(
            Group(
                rows=_rows_of(members, qo_indptr, qo_len, device),
                num_requests=len(members),
                qo_len=qo_len,
                kv_len=kv_len,
                page_ids=page_ids,
                slots=slots,
                bias=bias,
                is_square_causal=is_square_causal,
                blind=blind,
                rotary=_rotary(problem, qo_len, lens, positions, device),
            )
        )
    empty = np.flatnonzero((kv_lens == 0) & (qo_lens > 0))
    empty_rows = None
    if len(empty):
        empty_rows = torch.from_numpy(np.concatenate([np.arange(qo_indptr[i], qo_indptr[i + 1]) for i in empty]))
        empty_rows = empty_rows.to(device, torch.int64)
    return Plan(problem, int(qo_indptr[-1]), tuple(groups), empty_rows)


def _grouped(problem: Problem, qo_lens: np.ndarray, kv_lens: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the request numbers of each group, ascending; requests with nothing to compute are in none."""
    if len(qo_lens) == 1:
        if qo_lens[0] and kv_lens[0]:
            yield np.zeros(1, dtype=np.int64)
        return
    order = np.lexsort((-kv_lens, qo_lens))
    order = order[(qo_lens[order] > 0) & (kv_lens[order] > 0)]
    token_bytes = problem.num_kv_heads * (problem.head_dim_qk + problem.head_dim_vo) * problem.kv_dtype.itemsize
    group: list[int] = []
    group_qo_len = longest = waste = 0
    for i, qo_len, kv_len in zip(order.tolist(), qo_lens[order].tolist(), kv_lens[order].tolist(), strict=True):
        if group:
            # Padding is paid for in copying, and again in scores for every row of the request.
            waste += (longest - kv_len) * token_bytes * (1 + qo_len // 4)
            if qo_len != group_qo_len or waste > GROUP_COST_BYTES:
                yield np.array(sorted(group))
                group = []
        if not group:
            group_qo_len, longest, waste = qo_len, kv_len, 0
        group.append(i)
    if group:
        yield np.array(sorted(group))


def _rows_of(members: np.ndarray, qo_indptr: np.ndarray, qo_len: int, device: torch.device) -> slice | torch.Tensor:
    """The rows of q that belong to `members`: a slice where they are adjacent (a view), else int64 row numbers."""
    starts = qo_indptr[members].astype(np.int64)
    if int(starts[-1] - starts[0]) == (len(members) - 1) * qo_len:
        return slice(int(starts[0]), int(starts[-1]) + qo_len)
    return torch.from_numpy((starts[:, None] + np.arange(qo_len)).reshape(-1)).to(device)


def _visibility(
    problem: Problem,
    qo_len: int,
    kv_lens: np.ndarray,
    first: np.ndarray,
    width: int,
    device: torch.device,
    custom_mask: CustomMask | None,
    members: np.ndarray,
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """(bias, blind rows, is_square_causal) of one group; see `Group`."""
    causal = problem.causal and custom_mask is None
    padded = bool((kv_lens - first != width).any())
    windowed = problem.window_left >= 0 and qo_len > 1
    if custom_mask is None and not windowed and not padded:
        if not causal or qo_len == 1:
            return None, None, False
        if qo_len == width:
            return None, None, True
    if qo_len == 1 and custom_mask is None:
        # Decode rows see all their K/V: only the padding is hidden.
        padding = np.arange(width) >= (kv_lens - first)[:, None]
        hidden = torch.from_numpy(np.where(padding, np.float32(-np.inf), np.float32(0.0)))
        bias = hidden.to(device, problem.q_dtype)[:, None, None]
        return bias.expand(-1, problem.num_kv_heads, -1, -1).contiguous(), None, False
    lens = torch.from_numpy(kv_lens.astype(np.int64)).to(device)[:, None, None]
    start = torch.from_numpy(first.astype(np.int64)).to(device)[:, None, None]
    j = start + torch.arange(width, device=device)  # [requests, 1, width]
    # Row i of a request sees the token at its own position last: the mask is aligned bottom-right.
    own = torch.arange(qo_len, device=device)[:, None] + (lens - qo_len)  # [requests, qo_len, 1]
    visible = (j < lens).expand(-1, qo_len, -1)
    if causal:
        visible = visible & (j <= own)
    if windowed:
        visible = visible & (j >= own - problem.window_left)
    if custom_mask is not None:
        offsets = torch.from_numpy(custom_mask.offsets[members].astype(np.int64)).to(device)[:, None, None]
        where = offsets + torch.arange(qo_len, device=device)[:, None] * lens + torch.minimum(j, lens - 1)
        visible = visible & custom_mask.bits[where]
    bias = torch.zeros(visible.shape, dtype=problem.q_dtype, device=device).masked_fill_(~visible, float("-inf"))
    blind = None
    if custom_mask is not None or (causal and int(kv_lens.min()) < qo_len):
        blind = ~visible.any(-1).reshape(-1)
    return bias[:, None], blind, False


def _rotary(
    problem: Problem, qo_len: int, kv_lens: np.ndarray, key_positions: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(cos, sin, cos, sin) for ROPE_LLAMA: of the queries, then of the keys, as `rotate` takes them."""
    if problem.rope is None:
        return None
    scale, theta = problem.rope
    dim = problem.head_dim_qk
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) / scale
    query_positions = torch.from_numpy((kv_lens - qo_len)[:, None] + np.arange(qo_len))
    query = (query_positions[:, :, None, None] * frequencies).to(device, torch.float32)
    key = (torch.from_numpy(key_positions)[:, None, :, None] * frequencies).to(device, torch.float32)
    return query.cos(), query.sin(), key.cos(), key.sin()
