"""The argument checks that every part of the twin shares, with FlashInfer's exception types and messages.

Source: https://docs.flashinfer.ai/tutorials/kv_layout.html (layouts of a paged cache).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

KV_LAYOUTS = frozenset({"NHD", "HND"})
POS_ENCODING_MODES = frozenset({"NONE", "ROPE_LLAMA", "ALIBI"})
SERVED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
SERVED_BACKENDS = frozenset({"auto", "fa2", "fa3"})
LSE_BASES = ("log2", "ln")
LSE_LAYOUTS = ("NH", "HN")

PagedKVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def refuse(caller: str, **arguments: Any) -> None:
    """Raise NotImplementedError that names the first of `arguments` that is neither None nor False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{caller}: the reference kernels do not serve the argument {name!r}")


def check_backend(caller: str, backend: str) -> None:
    """Raise NotImplementedError for a backend whose behaviour the twin does not copy."""
    if backend not in SERVED_BACKENDS:
        raise NotImplementedError(f"{caller}: the reference kernels do not serve the argument backend={backend!r}")


def check_kv_layout(kv_layout: str) -> None:
    """Raise KeyError unless `kv_layout` is NHD or HND."""
    if kv_layout not in KV_LAYOUTS:
        raise KeyError(f"Invalid kv_layout {kv_layout}")


def check_pos_encoding_mode(pos_encoding_mode: str) -> None:
    """Raise KeyError for an unknown mode, NotImplementedError for ALIBI."""
    if pos_encoding_mode not in POS_ENCODING_MODES:
        raise KeyError(f"Invalid pos_encoding_mode {pos_encoding_mode}")
    if pos_encoding_mode == "ALIBI":
        raise NotImplementedError("the reference kernels do not serve the argument pos_encoding_mode='ALIBI'")


def check_workspace(buffer: torch.Tensor, name: str) -> None:
    """Raise ValueError unless a workspace is 16-byte aligned, as FlashInfer's vector loads need."""
    if buffer.numel() and buffer.data_ptr() % 16:
        raise ValueError(
            f"{name} must be 16-byte aligned, got data_ptr % 16 = {buffer.data_ptr() % 16}",
        )


def graph_buffer(buffer: torch.Tensor | None, name: str, mode: str) -> torch.Tensor:
    """Return a buffer that graph mode cannot do without; ValueError if it was not given."""
    if not isinstance(buffer, torch.Tensor):
        raise ValueError(f"{name} should be a torch.Tensor in {mode}")
    return buffer


def refreshed(
    buffer: torch.Tensor | None, values: torch.Tensor, device: torch.device, non_blocking: bool, exact: bool = True
) -> torch.Tensor:
    """Bring plan()'s index values to the device: into graph mode's fixed buffer, or as they are without one.

    A captured graph holds the buffer's address, so its contents must change and the buffer stay. `exact`: the sizes
    must agree; otherwise the values fill the front of the buffer.
    """
    if buffer is None:
        return values.to(device, non_blocking=non_blocking)
    target = buffer if exact else buffer[: len(values)]
    target.copy_(values, non_blocking=non_blocking and (exact or values.device == device))
    return buffer


def check_tensor(
    x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | None, name: str
) -> None:
    """Raise ValueError unless a caller's buffer has the expected shape, dtype and device."""
    if x.shape != torch.Size(shape):
        raise ValueError(f"Invalid shape of {name}: expected {tuple(shape)}, got {x.shape}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"Invalid dtype of {name}: expected {dtype}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"Invalid device of {name}: expected {device}, got {x.device}")


def check_planned_dtypes(q: torch.Tensor, kv: PagedKVCache, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raise ValueError unless run() got the dtypes that plan() was told."""
    k = kv if isinstance(kv, torch.Tensor) else kv[0]
    if q.dtype != q_dtype:
        raise ValueError(
            f"The dtype of q {q.dtype} does not match the q_data_type {q_dtype} specified in plan function."
        )
    if k.dtype != kv_dtype:
        raise ValueError(
            f"The dtype of k {k.dtype} does not match the kv_data_type {kv_dtype} specified in plan function."
        )


def check_lse_options(lse_base: str, lse_layout: str) -> None:
    """Raise ValueError for an unknown base or layout of the log-sum-exp."""
    if lse_base not in LSE_BASES:
        raise ValueError(f"lse_base must be one of {LSE_BASES}, got {lse_base!r}")
    if lse_layout not in LSE_LAYOUTS:
        raise ValueError(f"lse_layout must be one of {LSE_LAYOUTS}, got {lse_layout!r}")


def canonical_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Turn `"float16"` into `torch.float16`; TypeError for anything but a string or a dtype."""
    if isinstance(dtype, str):
        return getattr(torch, dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    raise TypeError(f"dtype must be a string or torch.dtype, got {type(dtype)}")


def canonical_dtypes(
    q_dtype: torch.dtype | str, kv_dtype: torch.dtype | str | None, o_dtype: torch.dtype | str | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Resolve plan()'s three dtypes (K/V and output default to the query's).

    Raises NotImplementedError for one that the twin does not serve (fp8, fp4), or for K/V unlike the query.
    """
    q = canonical_dtype(q_dtype)
    kv = q if kv_dtype is None else canonical_dtype(kv_dtype)
    o = q if o_dtype is None else canonical_dtype(o_dtype)
    for name, dtype in (("q_data_type", q), ("kv_data_type", kv), ("o_data_type", o)):
        if dtype not in SERVED_DTYPES:
            raise NotImplementedError(f"the reference kernels do not serve the argument {name}={dtype}")
    if kv != q:
        raise NotImplementedError(f"the reference kernels do not serve the argument kv_data_type={kv} with q of {q}")
    return q, kv, o


def check_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    """Raise RuntimeError (as FlashInfer's planner does) unless the query heads form whole groups."""
    if num_qo_heads % num_kv_heads:
        raise RuntimeError(f"num_qo_heads {num_qo_heads} should be divisible by num_kv_heads {num_kv_heads}")


def unpack_paged_cache(paged_kv_cache: PagedKVCache, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a paged cache into its K and V pages, both 4-D views in `kv_layout`.

    A tuple of two 4-D tensors, or one 5-D tensor with K and V on dim 1; with page_size 1 the page axis may be
    left out. Raises KeyError for another type (a list, too) and ValueError for another number of dimensions.
    """
    page_axis = -3 if kv_layout == "NHD" else -2
    if isinstance(paged_kv_cache, tuple):
        k, v = paged_kv_cache
        if k.ndim not in (3, 4) or v.ndim not in (3, 4):
            raise ValueError("x must be 3D or 4D")
        return (k if k.ndim == 4 else k.unsqueeze(page_axis)), (v if v.ndim == 4 else v.unsqueeze(page_axis))
    if not isinstance(paged_kv_cache, torch.Tensor):
        raise KeyError(
            f"Unrecognized paged_kv_cache type {type(paged_kv_cache)}, expect a single tensor or a tuple of tensor."
        )
    if paged_kv_cache.ndim not in (4, 5):
        raise ValueError("x must be 4D or 5D")
    cache = paged_kv_cache if paged_kv_cache.ndim == 5 else paged_kv_cache.unsqueeze(page_axis)
    k, v = cache.unbind(1)
    return k, v


def whole_or_pair(paged_kv_cache: PagedKVCache, kv_layout: str) -> PagedKVCache:
    """A paged cache as one 5-D tensor if it is one, else as `unpack_paged_cache` splits it."""
    if isinstance(paged_kv_cache, torch.Tensor) and paged_kv_cache.ndim == 5:
        return paged_kv_cache
    return unpack_paged_cache(paged_kv_cache, kv_layout)


def softmax_scale(sm_scale: float | None, head_dim: int, *factors: float | torch.Tensor | None) -> float:
    """The factor of the scores: `sm_scale` (default 1/sqrt(head_dim)) times the calibration scales that are given."""
    scale = 1.0 / math.sqrt(head_dim) if sm_scale is None else float(sm_scale)
    for factor in factors:
        if factor is not None:
            scale *= float(factor)
    return scale
