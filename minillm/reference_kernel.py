"""The twin's kernel: gather a group's K/V from its pages, and attend.

Source: FlashInfer's conventions (https://docs.flashinfer.ai/tutorials/recursive_attention.html for the log-sum-exp).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from minillm.reference_plan import Gather, Group, Plan, Problem

LOG2_E = 1.0 / math.log(2.0)


class GatherBuffer:
    """Memory that gathered K/V is written to, kept between runs: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def take(
        self, shape: tuple[int, int, int, int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Uninitialised memory for `[requests, heads, parts, tokens, dim]`; the next taker may be given the same.

        Returns it as rows `[.., dim]`, and each part as `[requests, heads, tokens, dim]`.
        """
        buffer, numel = self._buffer, math.prod(shape)
        # A tensor born in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < numel or buffer.dtype != like.dtype or buffer.device != like.device:
                buffer = self._buffer = torch.empty(numel, dtype=like.dtype, device=like.device)
            whole = buffer[:numel].view(shape)
            return whole.view(-1, shape[-1]), whole.unbind(2)


def run_plan(
    plan: Plan,
    q: torch.Tensor,
    kv: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_layout: str,
    buffer: GatherBuffer,
    scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with every group of a plan; return `out` (allocated if None), and fill `lse` unless it is None.

    `q` `[num_rows, num_qo_heads, head_dim_qk]`; `kv`: one 5-D tensor or a pair of 4-D ones; `lse` float32, base 2.
    """
    problem = plan.problem
    q = q.detach() if q.requires_grad else q
    for group in plan.groups:
        k, v = gather(group, kv, kv_layout, problem, buffer)
        whole = type(group.rows) is slice and group.num_requests * group.qo_len == plan.num_rows
        if isinstance(group.rows, slice):
            rows = q if whole else q[group.rows]
        else:
            rows = q.index_select(0, group.rows)
        rows = rows.reshape(group.num_requests, group.qo_len, problem.num_qo_heads, problem.head_dim_qk)
        if group.rotary is not None:
            rows, k = rotate(rows, *group.rotary[:2]), rotate(k, *group.rotary[2:])
        o, group_lse = attend(
            rows, k, v, group.bias, group.is_square_causal, scale, problem.logits_soft_cap, lse is not None
        )
        o = o.reshape(-1, problem.num_qo_heads, problem.head_dim_vo)
        if group.blind is not None:
            o.masked_fill_(group.blind[:, None, None], 0.0)
        if whole and out is None:
            if lse is not None and group_lse is not None:
                lse.copy_(group_lse.reshape(lse.shape))
            return o if o.dtype == problem.o_dtype else o.to(problem.o_dtype)
        if out is None:
            out = q.new_empty((plan.num_rows, problem.num_qo_heads, problem.head_dim_vo), dtype=problem.o_dtype)
        store(out, group.rows, o)
        if lse is not None and group_lse is not None:
            store(lse, group.rows, group_lse.reshape(-1, problem.num_qo_heads))
    if out is None:
        out = q.new_empty((plan.num_rows, problem.num_qo_heads, problem.head_dim_vo), dtype=problem.o_dtype)
    if plan.empty_rows is not None:
        out.index_fill_(0, plan.empty_rows, 0.0)
        if lse is not None:
            lse.index_fill_(0, plan.empty_rows, float("-inf"))
    return out


def store(destination: torch.Tensor, rows: slice | torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` to those rows of `destination`, converting to its dtype."""
    if isinstance(rows, slice):
        destination[rows] = values
    else:
        destination.index_copy_(0, rows, values.to(destination.dtype))


def gather(
    group: Group,
    kv: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_layout: str,
    problem: Problem,
    buffer: GatherBuffer,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the K and V of a group into `[num_requests, num_kv_heads, kv_len, head_dim]` each.

    The cache is read as rows of one token and one head, since those are what the attention needs side by side: the
    copy then is also the transposition. IndexError if a page id lies outside the cache.
    """
    if isinstance(kv, torch.Tensor):
        k, v = _select("kv", group, kv, kv_layout, problem, buffer)
        return k, v
    (k,) = _select("k", group, kv[0], kv_layout, problem, GatherBuffer())
    (v,) = _select("v", group, kv[1], kv_layout, problem, GatherBuffer())
    return k, v


def _select(
    what: str, group: Group, cache: torch.Tensor, kv_layout: str, problem: Problem, buffer: GatherBuffer
) -> tuple[torch.Tensor, ...]:
    """Gather rows of `cache`: `[pages, 2, ...]` ("kv") or `[pages, ...]` ("k" or "v")."""
    if cache.requires_grad:
        cache = cache.detach()
    strides = cache.stride()
    key = (what, cache.shape, strides, cache.dtype)
    known = group.gathers.get(key)
    if known is None:  # the first layer; the others of a pool have the same shape
        head_dim = problem.head_dim_vo if what == "v" else problem.head_dim_qk
        steps = zip(cache.shape[:-1], strides[:-1], strict=True)
        if strides[-1] != 1 or any(size > 1 and step % head_dim for size, step in steps):
            # Rows that do not start at a multiple of their length cannot be numbered.
            return _select(what, group, cache.contiguous(), kv_layout, problem, buffer)
        table, num_rows = _row_table(group, cache, kv_layout, problem, head_dim)
        shape = (group.num_requests, problem.num_kv_heads, cache.ndim - 3, group.kv_len, head_dim)
        known = group.gathers[key] = Gather((num_rows, head_dim), table, *buffer.take(shape, cache))
    rows = cache.as_strided(known.rows_shape, (known.rows_shape[1], 1))
    torch.index_select(rows, 0, known.table, out=known.target)
    return known.parts


def _row_table(
    group: Group, cache: torch.Tensor, kv_layout: str, problem: Problem, head_dim: int
) -> tuple[torch.Tensor, int]:
    """Number the rows of a cache that a group reads, and count all; every layer of a pool has the same strides.

    K and V of a request's head come one after the other: threads share out the copying, and then the attention, by
    requests and heads, and a core is slow to read what another one has just written.
    """
    heads_axis, slot_axis = (-2, -3) if kv_layout == "NHD" else (-3, -2)
    found = (cache.shape[heads_axis], cache.shape[slot_axis], cache.shape[-1])
    planned = (problem.num_kv_heads, problem.page_size, head_dim)
    if found != planned:
        raise ValueError(f"the cache has (num_kv_heads, page_size, head_dim) {found}, but plan() was told {planned}")
    steps = [step // head_dim for step in cache.stride()[:-1]]
    num_rows = 1 + sum((size - 1) * step for size, step in zip(cache.shape[:-1], steps, strict=True))
    page_step, slot_step, head_step = steps[0], steps[slot_axis + 1], steps[heads_axis + 1]
    parts = (0, steps[1]) if cache.ndim == 5 else (0,)  # K, then V
    starts = [[head * head_step + part for part in parts] for head in range(problem.num_kv_heads)]
    offsets = torch.tensor(starts, device=cache.device)[:, :, None]
    token = torch.add(group.page_ids * page_step, group.slots, alpha=slot_step)
    return (token[:, None, None, :] + offsets).view(-1), num_rows


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of the last dimension (RoPE, arXiv:2104.09864, in Llama's order), in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    is_square_causal: bool,
    scale: float,
    soft_cap: float,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `q` `[requests, qo_len, num_qo_heads, dim]` over `k`, `v` `[requests, num_kv_heads, kv_len, dim]`.

    `bias` `[requests, 1, qo_len, kv_len]` is added to the scores. Returns o, shaped as q, and (if wanted) the base-2
    log-sum-exp `[requests, qo_len, num_qo_heads]` float32. Scores and softmax are float32 whatever the dtype.
    """
    if want_lse or soft_cap > 0 or v.shape[-1] != q.shape[-1]:
        return _attend_by_hand(q, k, v, bias, is_square_causal, scale, soft_cap)
    requests, qo_len, num_qo_heads, dim = q.shape
    if qo_len == 1:
        # The query heads that share a K/V head become rows of one matrix, so K and V are read once a group.
        num_kv_heads, kv_len = k.shape[1:3]
        if q.dtype != torch.float32:
            grouped = q.reshape(requests, num_kv_heads, num_qo_heads // num_kv_heads, dim)
            return F.scaled_dot_product_attention(grouped, k, v, bias, scale=scale), None
        # Three steps in sight are faster than one fused kernel that is made for many rows; and nothing rounds between.
        rows = (q * scale).view(requests * num_kv_heads, -1, dim)
        keys, values = k.reshape(-1, kv_len, dim).transpose(1, 2), v.reshape(-1, kv_len, dim)
        if bias is None:
            scores = torch.bmm(rows, keys)
        else:
            scores = torch.baddbmm(bias.expand(-1, num_kv_heads, -1, -1).reshape(-1, 1, kv_len), rows, keys)
        return torch.bmm(scores.softmax(-1), values), None
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k,
        v,
        bias,
        is_causal=is_square_causal,
        scale=scale,
        enable_gqa=num_qo_heads != k.shape[1],
    )
    return o.transpose(1, 2), None


def _attend_by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    is_square_causal: bool,
    scale: float,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`, with every step in sight: for the log-sum-exp, and for scores that are capped."""
    requests, qo_len, num_qo_heads, dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    group = num_qo_heads // num_kv_heads
    rows = (q.float() * scale).view(requests, qo_len, num_kv_heads, group, dim)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(requests, num_kv_heads, group * qo_len, dim)
    scores = rows @ k.float().transpose(2, 3)
    if soft_cap > 0:
        scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if is_square_causal:
        bias = scores.new_full((qo_len, kv_len), float("-inf")).triu_(1)
    if bias is not None:
        scores.view(requests, num_kv_heads, group, qo_len, kv_len).add_(bias if bias.ndim == 2 else bias[:, :, None])
    # A row that sees nothing has -inf as its maximum, and -inf - -inf is NaN: any finite number serves instead.
    top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    o = (weights @ v.float()).div_(total.clamp_min(torch.finfo(torch.float32).tiny))
    lse = (top + total.log()).mul_(LOG2_E)
    o = o.view(requests, num_kv_heads, group, qo_len, -1).permute(0, 3, 1, 2, 4)
    lse = lse.view(requests, num_kv_heads, group, qo_len).permute(0, 3, 1, 2)
    return (
        o.reshape(requests, qo_len, num_qo_heads, -1).to(q.dtype),
        lse.reshape(requests, qo_len, num_qo_heads),
    )
