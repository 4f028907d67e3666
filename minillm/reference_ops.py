"""The twin of FlashInfer's page, norm, activation and rotary functions.

Source: https://docs.flashinfer.ai/ (API reference: page, norm, activation, rope).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minillm.reference_checks import PagedKVCache, check_kv_layout, check_tensor, unpack_paged_cache


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Turn `kv_indptr` `[batch + 1]` and `kv_last_page_len` `[batch]` into lengths in tokens, `[batch]`.

    A request without pages must carry a last page length of 0. Source: https://docs.flashinfer.ai/api/page.html.
    """
    return torch.clamp(kv_indptr[1:] - kv_indptr[:-1] - 1, min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each of `nnz` appended tokens its request and its position there, both int32 `[nnz]`.

    `append_indptr` `[batch + 1]`; `seq_lens` `[batch]` after the append. Entries beyond `append_indptr[-1]` get
    request -1 and position 0 (in a `positions` buffer of the caller: what it held). Raises ValueError if a buffer has
    another shape, dtype or device. Source: https://docs.flashinfer.ai/api/page.html.
    """
    device = append_indptr.device
    if batch_indices is None:
        batch_indices = torch.empty((nnz,), dtype=torch.int32, device=device)
    else:
        check_tensor(batch_indices, (nnz,), torch.int32, device, "batch_indices")
    if positions is None:
        positions = torch.zeros((nnz,), dtype=torch.int32, device=device)
    else:
        check_tensor(positions, (nnz,), torch.int32, device, "positions")
    if append_indptr.numel() < 2:
        batch_indices.fill_(-1)
        return batch_indices, positions
    ends = append_indptr[1:].contiguous()
    entry = torch.arange(nnz, dtype=ends.dtype, device=device)
    request = torch.searchsorted(ends, entry, right=True)
    is_real = request < len(ends)
    owner = request.clamp_max(len(ends) - 1)
    batch_indices.copy_(torch.where(is_real, request, -1))
    positions.copy_(torch.where(is_real, entry + seq_lens[owner] - ends[owner], positions))
    return batch_indices, positions


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write K and V of new tokens into their pages, in place.

    `append_key`, `append_value` `[nnz, num_kv_heads, head_dim]` in the cache's dtype; `batch_indices`, `positions`
    `[nnz]`; the page table describes the state after the append. Point padding rows at a scratch page: there is no
    skipping of request -1. Raises KeyError (layout, cache type), IndexError (a position without a page, which
    FlashInfer does not notice). Source: https://docs.flashinfer.ai/api/page.html.
    """
    check_kv_layout(kv_layout)
    if append_key.requires_grad or append_value.requires_grad:
        append_key, append_value = append_key.detach(), append_value.detach()
    k, v = unpack_paged_cache(paged_kv_cache, kv_layout)
    if not append_key.dtype == append_value.dtype == k.dtype:
        raise RuntimeError(f"keys are {append_key.dtype}, values {append_value.dtype}, but the cache is {k.dtype}")
    page_size = k.shape[1 if kv_layout == "NHD" else 2]
    if positions.shape[0] == 1 and kv_layout == "NHD" and k.device.type == "cpu":
        # Of one token, a few integers say the place: on a CPU that is less work than any array.
        position, owner = int(positions), int(batch_indices)
        if position < 0 or owner < 0:
            raise IndexError(f"position {position} of request {owner} has no place")
        page_id = int(kv_indices[int(kv_indptr[owner]) + position // page_size])
        slot = position % page_size
        k[page_id, slot], v[page_id, slot] = append_key[0], append_value[0]
        return
    page_numbers = positions.div(page_size, rounding_mode="floor")
    page_ids = kv_indices.index_select(0, page_numbers.add_(kv_indptr.index_select(0, batch_indices))).long()
    slots = positions.remainder(page_size)
    if kv_layout == "NHD" and isinstance(paged_kv_cache, torch.Tensor) and paged_kv_cache.is_contiguous():
        # All slots of all pages as one list of rows, page by page, first those of K, then those of V. What a row pairs
        # with lies page_size rows below it: so K and V are written as one.
        num_pages, _, num_heads, head_dim = k.shape
        size = num_heads * head_dim
        shape = (2 * num_pages * page_size - page_size, 2, num_heads, head_dim)
        pairs = paged_kv_cache.detach().as_strided(shape, (size, page_size * size, head_dim, 1))
        index = slots.add(page_ids, alpha=2 * page_size)
        pairs.index_copy_(0, index, torch.stack((append_key, append_value), dim=1))
        return
    if kv_layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    k.index_put_((page_ids, slots.long()), append_key)
    v.index_put_((page_ids, slots.long()), append_value)


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Divide each row by its root mean square and multiply by `weight`, in float32 with one rounding at the end.

    `input` `[rows, hidden]` or `[rows, heads, head_dim]`; `weight` of the last dimension. Hugging Face's Llama rounds
    before the weight, too: bf16 results differ in the last bit. Source: arXiv:1910.07467,
    https://docs.flashinfer.ai/api/norm.html.
    """
    return _normalised(input, weight, eps, torch.empty_like(input) if out is None else out)


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Add `input` to `residual`, then overwrite `input` with the RMS norm of the sum; both `[rows, hidden]`, in place.

    The norm sees the sum before its rounding to the tensors' dtype. Source: https://docs.flashinfer.ai/api/norm.html.
    """
    if residual.dtype == torch.float32:
        _normalised(residual.add_(input), weight, eps, out=input)
        return
    total = residual.float().add_(input)
    residual.copy_(total)
    _normalised(total, weight, eps, out=input)


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """The norm of `x`, written to `out` (which may be `x`) and returned; in few operations, for that is what counts."""
    if x.dtype != torch.float32 or out.dtype != torch.float32:
        x, weight = x.float(), weight.float()
        return out.copy_(_normalised(x, weight, eps, out=torch.empty_like(x)))
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = torch.rsub(squares, eps, alpha=-1.0 / x.shape[-1]).rsqrt_()  # rsub: eps + squares / size, as one
    return torch.mul(x, scale, out=out).mul_(weight)


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """Gate the second half of each row by the SiLU of the first: `[..., 2 * hidden]` to `[..., hidden]`.

    Raises ValueError (an odd last dimension), AssertionError (an `out` of another shape).
    Source: arXiv:2002.05202 (SwiGLU), https://docs.flashinfer.ai/api/activation.html.
    """
    if input.shape[-1] % 2:
        raise ValueError("The last dimension must be even (2 * hidden_size).")
    if out is not None:
        expected = (*input.shape[:-1], input.shape[-1] // 2)
        if out.shape != expected:
            raise AssertionError(f"{tuple(out.shape)} != {expected}")
    gate, up = input.chunk(2, dim=-1)
    if input.dtype == torch.float32:
        result = F.silu(gate).mul_(up)
    else:
        result = F.silu(gate.float()).mul_(up).to(input.dtype)
    return result if out is None else out.copy_(result)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `q` `[nnz, num_q_heads, head_dim]` and `k` `[nnz, num_k_heads, head_dim]` by their positions `[nnz]`.

    The first `rotary_dim` dimensions turn by `position * theta ** (-2i / rotary_dim) / rope_scale`, as halves
    (`interleave=False`) or as neighbouring pairs. Source: arXiv:2104.09864, https://docs.flashinfer.ai/api/rope.html.
    """
    q, k = q.clone(), k.clone()
    apply_rope_pos_ids_inplace(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)
    return q, k


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids`, writing into `q` and `k` (strided views too)."""
    cos, sin = _angles(q, pos_ids, rotary_dim, rope_scale, rope_theta)
    for x in _joined(q, k):
        _rotate(x, cos, sin, interleave)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `query` `[nnz, num_q_heads * head_size]` and `key` by rows of a table, looked up by `positions` `[nnz]`.

    `cos_sin_cache` `[max_len, rotary_dim]` float32: cosines in the first half, sines in the second. `is_neox`: halves,
    else neighbouring pairs. Raises ValueError for a table of another dtype.
    Source: https://docs.flashinfer.ai/api/rope.html.
    """
    query, key = query.clone(), key.clone()
    apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cos_sin_cache, is_neox)
    return query, key


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """`apply_rope_with_cos_sin_cache`, writing into `query` and `key`."""
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError("cos_sin_cache should be float32")
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    for x in _joined(query, key):
        _rotate(x.view(x.shape[0], -1, head_size), cos, sin, not is_neox)


def _angles(
    q: torch.Tensor, pos_ids: torch.Tensor, rotary_dim: int | None, rope_scale: float, rope_theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) `[nnz, 1, rotary_dim / 2]` float32 of positions."""
    dim = q.size(-1) if rotary_dim is None else rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=q.device) / -dim
    angles = pos_ids[:, None, None] * (rope_theta**exponents / rope_scale)
    return angles.cos(), angles.sin()


def _joined(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`q` and `k` as one tensor where a row of k follows that of q in memory, as they leave a fused projection."""
    size = q.shape[1] * q.stride(1)
    follows = k.storage_offset() - q.storage_offset() == size and k.data_ptr() - q.data_ptr() == size * q.itemsize
    if follows and q.stride() == k.stride() and q.shape[2:] == k.shape[2:]:
        return (q.as_strided((q.shape[0], q.shape[1] + k.shape[1], *q.shape[2:]), q.stride()),)
    return q, k


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> None:
    """Rotate `x` `[nnz, heads, dim]` in place by angles `[nnz, 1, rotary_dim / 2]`; in float32."""
    if x.shape[-1] != 2 * cos.shape[-1]:
        x = x[..., : 2 * cos.shape[-1]]
    y = x if x.dtype == torch.float32 else x.float()
    a, b = (y[..., ::2], y[..., 1::2]) if interleave else y.chunk(2, dim=-1)
    a_sin = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(a_sin)
    if y is not x:
        x.copy_(y)
