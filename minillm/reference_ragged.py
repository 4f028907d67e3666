"""The twin of FlashInfer's attention over K/V without pages: a ragged batch, one prompt, one decode row.

Source: https://docs.flashinfer.ai/api/attention.html.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from minillm.reference_batch import BatchPrefill, finish, rope_parameters, unpack_mask
from minillm.reference_checks import (
    PagedKVCache,
    canonical_dtypes,
    check_backend,
    check_heads,
    check_kv_layout,
    check_lse_options,
    check_planned_dtypes,
    graph_buffer,
    refreshed,
    refuse,
    softmax_scale,
)
from minillm.reference_kernel import GatherBuffer, run_plan
from minillm.reference_plan import CustomMask, Problem, make_plan


def _as_pages(x: torch.Tensor, kv_layout: str) -> torch.Tensor:
    """View K or V without pages as pages of one token: `[tokens, 1, heads, dim]`, always NHD."""
    return (x if kv_layout == "NHD" else x.transpose(0, 1)).unsqueeze(1)


class BatchPrefillWithRaggedKVCacheWrapper(BatchPrefill):
    """Prefill attention of a batch whose K/V are packed one request after another, without pages.

    With `use_cuda_graph` the two indptr buffers (int32 `[batch + 1]`) fix the batch size; plan() refreshes them.
    Raises KeyError (layout), ValueError (buffers), NotImplementedError (an argument the twin cannot serve).
    Source: https://docs.flashinfer.ai/tutorials/kv_layout.html (ragged tensors).
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        super().__init__(
            "BatchPrefillWithRaggedKVCacheWrapper",
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            backend,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
            variant_owns_mask=variant_owns_mask,
        )
        if use_cuda_graph:
            qo_indptr_buf = graph_buffer(qo_indptr_buf, "qo_indptr_buf", "cuda graph mode")
            kv_indptr_buf = graph_buffer(kv_indptr_buf, "kv_indptr_buf", "cuda graph mode")
            self._fixed_batch_size = len(qo_indptr_buf) - 1
            if len(kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError(
                    f"The length of kv_indptr_buf ({len(kv_indptr_buf)}) should be the same as qo_indptr_buf "
                    f"({self._fixed_batch_size})."
                )
        self._qo_indptr_buf = qo_indptr_buf
        self._kv_indptr_buf = kv_indptr_buf
        self._custom_mask_buf = custom_mask_buf
        self._mask_indptr_buf = mask_indptr_buf

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
        uniform_q_len: int | None = None,
    ) -> None:
        """Do the index work of one step: `qo_indptr`, `kv_indptr` int32 `[batch + 1]`, on any device.

        The order of the last attention arguments differs from the paged wrapper's. Raises ValueError (lengths, graph
        mode's fixed sizes), RuntimeError (an empty batch, ungroupable heads), NotImplementedError (an argument the
        twin cannot serve).
        """
        refuse(
            "BatchPrefillWithRaggedKVCacheWrapper.plan",
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len or None,
            max_item_len_ptr=max_item_len_ptr,
            seq_lens=seq_lens,
            seq_lens_q=seq_lens_q,
            v_indptr=v_indptr,
            o_indptr=o_indptr,
        )
        q_dtype, kv_dtype, o_dtype = canonical_dtypes(q_data_type, kv_data_type, o_data_type)
        rope = rope_parameters(pos_encoding_mode, rope_scale, rope_theta)
        check_heads(num_qo_heads, num_kv_heads)
        batch_size = len(qo_indptr) - 1
        if len(kv_indptr) != batch_size + 1:
            raise ValueError("The kv_indptr length should be equal to mask_indptr length.")
        if batch_size < 1:
            raise RuntimeError("plan() needs at least one request: qo_indptr has no entry but its first")
        qo_host, kv_host = qo_indptr.cpu().numpy(), kv_indptr.cpu().numpy()
        if self._use_cuda_graph:
            self._check_graph_sizes(int(qo_host[-1]), batch_size, "in cudagraph mode")
            refreshed(self._qo_indptr_buf, qo_indptr, self.device, non_blocking)
            refreshed(self._kv_indptr_buf, kv_indptr, self.device, non_blocking)
        kv_lens = np.diff(kv_host)
        mask = self._custom_mask(custom_mask, packed_custom_mask, np.diff(qo_host), kv_lens)
        problem = Problem(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_qk if head_dim_vo is None else head_dim_vo,
            page_size=1,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            causal=causal,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap or 0.0,
            rope=rope,
        )
        self._plan = make_plan(problem, qo_host, kv_host, kv_lens, None, self.device, mask)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: PagedKVCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend for one layer; return the output, or (output, log-sum-exp) with `return_lse`.

        `q` `[qo_indptr[-1], num_qo_heads, head_dim_qk]`, `k`, `v` `[kv_indptr[-1], num_kv_heads, head_dim]` (HND: heads
        first). FlashInfer scales only fp8 values here, so the twin refuses scales instead of dropping them too.
        Raises RuntimeError before plan(), ValueError (dtypes, rows, buffers), NotImplementedError (fp8's arguments).
        """
        plan = self._planned()
        refuse(
            "BatchPrefillWithRaggedKVCacheWrapper.run",
            args=args or None,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            o_scale=o_scale,
            kv_cache_sf=kv_cache_sf,
        )
        check_lse_options(lse_base, lse_layout)
        problem = plan.problem
        check_planned_dtypes(q, k, problem.q_dtype, problem.kv_dtype)
        if q.size(0) != plan.num_rows:
            raise ValueError(
                f"q.shape[0] ({q.size(0)}) does not match qo_indptr[-1] ({plan.num_rows}). For ragged prefill, q must "
                "have shape [total_tokens, num_heads, head_dim] where total_tokens = qo_indptr[-1]."
            )
        scale = softmax_scale(problem.sm_scale, q.size(-1))
        pages = (_as_pages(k, self._kv_layout), _as_pages(v, self._kv_layout))
        return self._attend(q, pages, "NHD", scale, None, out, lse, return_lse, lse_base, lse_layout)

    run_return_lse = functools.partialmethod(run, return_lse=True)


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: tuple[torch.Tensor, torch.Tensor] | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request's `q` `[qo_len, num_qo_heads, dim]` over its `k`, `v` `[kv_len, num_kv_heads, dim]`.

    HND: `k`, `v` with the heads first. Returns `[qo_len, num_qo_heads, dim]`, or (output, log-sum-exp float32 base 2
    `[qo_len, num_qo_heads]`). Raises KeyError (layout, encoding), RuntimeError (causal with kv_len < qo_len),
    NotImplementedError (an argument the twin cannot serve). Source: https://docs.flashinfer.ai/api/attention.html.
    """
    refuse("single_prefill_with_kv_cache", scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, kv_cache_sf=kv_cache_sf)
    check_backend("single_prefill_with_kv_cache", backend)
    rope = rope_parameters(pos_encoding_mode, rope_scale, rope_theta)
    check_kv_layout(kv_layout)
    q_dtype, kv_dtype, out_dtype = canonical_dtypes(q.dtype, k.dtype, o_dtype)
    k, v = _as_pages(k, kv_layout), _as_pages(v, kv_layout)
    qo_len, kv_len = q.shape[0], k.shape[0]
    check_heads(q.shape[1], k.shape[2])
    mask = None
    if packed_custom_mask is not None:
        mask = CustomMask(unpack_mask(packed_custom_mask, qo_len * kv_len), np.zeros(1, np.int64))
    elif custom_mask is not None:
        mask = CustomMask(custom_mask.reshape(-1).bool(), np.zeros(1, np.int64))
    elif causal and kv_len < qo_len:
        raise RuntimeError(
            "When mask_mode is set to MaskMode::kCausal, kv_len must be greater than or equal to qo_len, "
            f"got kv_len{kv_len} and qo_len {qo_len}"
        )
    problem = Problem(
        num_qo_heads=q.shape[1],
        num_kv_heads=k.shape[2],
        head_dim_qk=q.shape[2],
        head_dim_vo=v.shape[3],
        page_size=1,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=out_dtype,
        causal=causal,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap or 0.0,
        rope=rope,
    )
    plan = make_plan(problem, np.array([0, qo_len]), np.array([0, kv_len]), np.array([kv_len]), None, q.device, mask)
    lse = q.new_empty((qo_len, q.shape[1]), dtype=torch.float32) if return_lse else None
    scale = softmax_scale(sm_scale, q.shape[2], k_scale)
    out = run_plan(plan, q, (k, v), "NHD", GatherBuffer(), scale, None, lse)
    return finish(out, lse, v_scale)


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query row `q` `[num_qo_heads, head_dim]` over `k`, `v` `[kv_len, num_kv_heads, head_dim]`.

    HND: `k`, `v` with the heads first. Returns `[num_qo_heads, head_dim]`, or (output, log-sum-exp float32 base 2
    `[num_qo_heads]`; 0-d for one head with `use_tensor_cores`, as FlashInfer does).
    Raises KeyError (layout, encoding), RuntimeError (no K/V: FlashInfer cannot launch that either).
    Source: https://docs.flashinfer.ai/api/attention.html.
    """
    check_kv_layout(kv_layout)
    kv_len = k.shape[0 if kv_layout == "NHD" else 1]
    if kv_len == 0:
        raise RuntimeError("single_decode_with_kv_cache needs at least one token of K/V")
    result = single_prefill_with_kv_cache(
        q.unsqueeze(0),
        k,
        v,
        kv_layout=kv_layout,
        pos_encoding_mode=pos_encoding_mode,
        sm_scale=softmax_scale(sm_scale, q.shape[-1], q_scale),
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        return_lse=return_lse,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if isinstance(result, torch.Tensor):
        return result.squeeze(0)
    out, lse = result[0].squeeze(0), result[1].squeeze(0)
    return out, lse.squeeze(0) if use_tensor_cores else lse
