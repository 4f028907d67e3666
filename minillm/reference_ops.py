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
    k, v = unpack_paged_cache(paged_kv_cache, kv_layout)
    page_size = k.shape[1 if kv_layout == "NHD" else 2]
    page_numbers = torch.div(positions, page_size, rounding_mode="floor")
    page_ids = kv_indices.index_select(0, page_numbers + kv_indptr.index_select(0, batch_indices))
    slots = positions.sub(page_numbers, alpha=page_size)
    if kv_layout == "NHD" and isinstance(paged_kv_cache, torch.Tensor) and paged_kv_cache.is_contiguous():
        # All slots of all pages as one list of rows: page by page, first those of K, then those of V.
        rows = paged_kv_cache.detach().view(-1, *k.shape[-2:])
        index = slots.add_(page_ids, alpha=2 * page_size).long()
        rows.index_copy_(0, index, append_key.detach())
        rows.index_copy_(0, index.add_(page_size), append_value.detach())
        return
    if kv_layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    k.index_put_((page_ids, slots), append_key.detach())
    v.index_put_((page_ids, slots), append_value.detach())


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
    result = _normalised(input, weight, eps)
    return result if out is None else out.copy_(result)


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
        residual.add_(input)
        scale = residual.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(residual, scale, out=input).mul_(weight)
        return
    total = residual.float().add_(input)
    residual.copy_(total)
    input.copy_(_normalised(total, weight.float(), eps))


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype == torch.float32 and weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


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
    cos, sin = _angles(q, pos_ids, rotary_dim, rope_scale, rope_theta)
    return _rotated(q, cos, sin, interleave), _rotated(k, cos, sin, interleave)


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
    _rotate_in_place(q, cos, sin, interleave)
    _rotate_in_place(k, cos, sin, interleave)


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
    cos, sin = _looked_up(positions, cos_sin_cache)
    q = _rotated(query.view(query.shape[0], -1, head_size), cos, sin, not is_neox)
    k = _rotated(key.view(key.shape[0], -1, head_size), cos, sin, not is_neox)
    return q.view(query.shape), k.view(key.shape)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """`apply_rope_with_cos_sin_cache`, writing into `query` and `key`."""
    cos, sin = _looked_up(positions, cos_sin_cache)
    _rotate_in_place(query.view(query.shape[0], -1, head_size), cos, sin, not is_neox)
    _rotate_in_place(key.view(key.shape[0], -1, head_size), cos, sin, not is_neox)


def _angles(
    q: torch.Tensor, pos_ids: torch.Tensor, rotary_dim: int | None, rope_scale: float, rope_theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) `[nnz, 1, rotary_dim / 2]` float32 of positions."""
    dim = q.size(-1) if rotary_dim is None else rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=q.device) / -dim
    angles = pos_ids[:, None, None] * (rope_theta**exponents / rope_scale)
    return angles.cos(), angles.sin()


def _looked_up(positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) `[nnz, 1, rotary_dim / 2]` float32 of positions, from a table."""
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError("cos_sin_cache should be float32")
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    return cos, sin


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """The rotated part of `x` `[nnz, heads, dim]`, float32 `[nnz, heads, rotary_dim]`."""
    half = cos.shape[-1]
    if x.shape[-1] != 2 * half:
        x = x[..., : 2 * half]
    if x.dtype != torch.float32:
        x = x.float()
    nnz, heads, dim = x.shape
    pair = 3 if interleave else 2
    pairs = x.view(nnz, heads, half, 2) if interleave else x.view(nnz, heads, 2, half)
    turned = pairs * cos.unsqueeze(pair)
    a, b = pairs.unbind(pair)
    turned_a, turned_b = turned.unbind(pair)
    turned_a.addcmul_(b, sin, value=-1)
    turned_b.addcmul_(a, sin)
    return turned.view(nnz, heads, dim)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    turned = _turned(x, cos, sin, interleave)
    if x.dtype != torch.float32:
        turned = turned.to(x.dtype)
    rotary_dim = turned.shape[-1]
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def _rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> None:
    if x.dtype == torch.float32 and not interleave and x.shape[-1] == 2 * cos.shape[-1]:
        halves = x.view(*x.shape[:2], 2, -1)
        swapped = halves.flip(2)
        halves.mul_(cos.unsqueeze(2))
        swapped.mul_(sin.unsqueeze(2))
        halves[:, :, 0].sub_(swapped[:, :, 0])
        halves[:, :, 1].add_(swapped[:, :, 1])
        return
    turned = _turned(x, cos, sin, interleave)
    (x if x.shape == turned.shape else x[..., : turned.shape[-1]]).copy_(turned)
