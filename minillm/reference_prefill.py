"""The twin of FlashInfer's prefill attention over a paged K/V cache.

Source: https://docs.flashinfer.ai/api/attention.html.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from minillm.reference_batch import BatchPrefill, Scale, rope_parameters
from minillm.reference_checks import (
    PagedKVCache,
    canonical_dtypes,
    check_heads,
    check_lse_options,
    check_planned_dtypes,
    graph_buffer,
    refreshed,
    refuse,
    softmax_scale,
    whole_or_pair,
)
from minillm.reference_plan import Problem, kv_lengths, make_plan


class BatchPrefillWithPagedKVCacheWrapper(BatchPrefill):
    """Prefill or append attention of a batch over a paged K/V cache.

    `plan()` once a step, then `run()` once a layer. With `use_cuda_graph` the four `*_buf` tensors (int32: batch + 1,
    batch + 1, the most pages, batch) fix the batch size, and plan() refreshes them in place.
    Raises KeyError (layout), ValueError (workspace, buffers), NotImplementedError (an argument the twin cannot serve).
    Source: https://docs.flashinfer.ai/api/attention.html.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        super().__init__(
            "BatchPrefillWithPagedKVCacheWrapper",
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            backend,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
            variant_owns_mask=variant_owns_mask,
        )
        self._qo_indptr_buf: torch.Tensor | None = None
        self._paged_kv_indptr_buf: torch.Tensor | None = None
        self._paged_kv_indices_buf: torch.Tensor | None = None
        self._paged_kv_last_page_len_buf: torch.Tensor | None = None
        if use_cuda_graph:
            mode = "CUDA graph mode"
            qo_indptr_buf = graph_buffer(qo_indptr_buf, "qo_indptr_buf", mode)
            paged_kv_indptr_buf = graph_buffer(paged_kv_indptr_buf, "paged_kv_indptr_buf", mode)
            paged_kv_indices_buf = graph_buffer(paged_kv_indices_buf, "paged_kv_indices_buf", mode)
            paged_kv_last_page_len_buf = graph_buffer(paged_kv_last_page_len_buf, "paged_kv_last_page_len_buf", mode)
            self._fixed_batch_size = len(qo_indptr_buf) - 1
            if len(paged_kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError("The length of paged_kv_indptr_buf should be batch_size + 1.")
            if len(paged_kv_last_page_len_buf) != self._fixed_batch_size:
                raise ValueError("The length of paged_kv_last_page_len_buf should be batch_size.")
            # Held for good; without graph mode the buffers are FlashInfer's to ignore.
            self._qo_indptr_buf = qo_indptr_buf
            self._paged_kv_indptr_buf = paged_kv_indptr_buf
            self._paged_kv_indices_buf = paged_kv_indices_buf
            self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buf
        self._custom_mask_buf = custom_mask_buf
        self._mask_indptr_buf = mask_indptr_buf

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
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
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        """Do the index work of one step, for every layer that has these heads, dtypes and window.

        `qo_indptr`, `paged_kv_indptr` `[batch + 1]`, `paged_kv_indices` `[pages]`, `paged_kv_last_page_len` `[batch]`,
        int32, on any device; `custom_mask` flat bool, request after request. The default dtype is float16.
        Raises ValueError (graph mode's fixed sizes), RuntimeError (an empty batch, ungroupable heads),
        NotImplementedError (an argument the twin cannot serve).
        """
        refuse(
            "BatchPrefillWithPagedKVCacheWrapper.plan",
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len or None,
            max_item_len_ptr=max_item_len_ptr,
            seq_lens_q=seq_lens_q,
            block_tables=block_tables,
        )
        q_dtype, kv_dtype, o_dtype = canonical_dtypes(q_data_type, kv_data_type, o_data_type)
        rope = rope_parameters(pos_encoding_mode, rope_scale, rope_theta)
        check_heads(num_qo_heads, num_kv_heads)
        batch_size = len(qo_indptr) - 1
        if custom_mask is not None or packed_custom_mask is not None:
            if len(qo_indptr) != len(paged_kv_indptr):
                raise ValueError("The length of qo_indptr and paged_kv_indptr should be the same.")
        if batch_size < 1:
            raise RuntimeError("plan() needs at least one request: qo_indptr has no entry but its first")
        qo_host, kv_host = qo_indptr.cpu().numpy(), paged_kv_indptr.cpu().numpy()
        if seq_lens is None:
            kv_lens = kv_lengths(kv_host, paged_kv_last_page_len.cpu().numpy(), page_size)
        else:
            kv_lens = seq_lens.cpu().flatten().numpy()
        if self._use_cuda_graph:
            self._check_graph_sizes(
                int(qo_host[-1]), batch_size, "during the lifecycle of the wrapper in cuda graph mode"
            )
            if self._paged_kv_indices_buf is not None and len(paged_kv_indices) > len(self._paged_kv_indices_buf):
                raise ValueError("The length of paged_kv_indices exceeds the allocated buffer size.")
            refreshed(self._qo_indptr_buf, qo_indptr, self.device, non_blocking)
            refreshed(self._paged_kv_indptr_buf, paged_kv_indptr, self.device, non_blocking)
            refreshed(self._paged_kv_last_page_len_buf, paged_kv_last_page_len, self.device, non_blocking)
        indices = refreshed(self._paged_kv_indices_buf, paged_kv_indices, self.device, non_blocking, exact=False)
        mask = self._custom_mask(custom_mask, packed_custom_mask, qo_host[1:] - qo_host[:-1], kv_lens)
        problem = Problem(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_qk if head_dim_vo is None else head_dim_vo,
            page_size=page_size,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            causal=causal,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap or 0.0,
            rope=rope,
        )
        self._plan = make_plan(problem, qo_host, kv_host, kv_lens, indices, self.device, mask)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        *args: Any,
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: PagedKVCache | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend for one layer; return the output, or (output, log-sum-exp) with `return_lse`.

        `q` `[qo_indptr[-1], num_qo_heads, head_dim_qk]` in the planned dtype; the cache as in the layouts' tutorial;
        output `[.., num_qo_heads, head_dim_vo]`; log-sum-exp float32 `[tokens, heads]` (or "HN"), base 2 (or "ln").
        Raises RuntimeError before plan(), ValueError (dtypes, rows, buffers), AssertionError (a window other than
        plan's), KeyError (type of the cache), NotImplementedError (an argument the twin cannot serve).
        """
        plan = self._planned()
        refuse(
            "BatchPrefillWithPagedKVCacheWrapper.run",
            args=args or None,
            sinks=sinks,
            kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )
        kv = whole_or_pair(paged_kv_cache, self._kv_layout)
        check_lse_options(lse_base, lse_layout)
        problem = plan.problem
        check_planned_dtypes(q, kv, problem.q_dtype, problem.kv_dtype)
        if q.size(0) != plan.num_rows:
            raise ValueError(
                f"q.shape[0] ({q.size(0)}) does not match qo_indptr[-1] ({plan.num_rows}). For paged prefill, q must "
                "have shape [total_tokens, num_heads, head_dim] where total_tokens = qo_indptr[-1]."
            )
        if out is not None and out.dtype != problem.o_dtype:
            raise ValueError(
                f"The dtype of out {out.dtype} does not match the o_data_type {problem.o_dtype} "
                "specified in plan function."
            )
        if window_left is not None and window_left != problem.window_left:
            raise AssertionError("window_left must be what plan() was told")
        scale = softmax_scale(problem.sm_scale, q.size(-1), q_scale, k_scale)
        return self._attend(q, kv, self._kv_layout, scale, v_scale, out, lse, return_lse, lse_base, lse_layout)

    run_return_lse = functools.partialmethod(run, return_lse=True)
