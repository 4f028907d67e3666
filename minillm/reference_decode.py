"""The twin of FlashInfer's decode attention over a paged K/V cache.

Source: https://docs.flashinfer.ai/api/attention.html.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import torch

from minillm.reference_batch import finish, rope_parameters
from minillm.reference_checks import (
    PagedKVCache,
    canonical_dtypes,
    check_backend,
    check_heads,
    check_kv_layout,
    check_planned_dtypes,
    check_tensor,
    check_workspace,
    graph_buffer,
    refreshed,
    refuse,
    softmax_scale,
    whole_or_pair,
)
from minillm.reference_kernel import GatherBuffer, run_plan
from minillm.reference_plan import Plan, Problem, kv_lengths, make_plan

# plan()'s options in the order in which releases before 0.7 took them positionally.
LEGACY_PLAN_ORDER = (
    "pos_encoding_mode",
    "window_left",
    "logits_soft_cap",
    "q_data_type",
    "kv_data_type",
    "o_data_type",
    "data_type",
    "sm_scale",
    "rope_scale",
    "rope_theta",
    "non_blocking",
    "block_tables",
    "seq_lens",
    "fixed_split_size",
    "disable_split_kv",
    "q_len_per_req",
)


class BatchDecodeWithPagedKVCacheWrapper:
    """Decode attention of a batch over a paged K/V cache: one query row a request (or `q_len_per_req`).

    `plan()` once a step, then `run()` once a layer. With `use_cuda_graph` the three `*_buffer` tensors (int32: batch
    + 1, the most pages, batch) fix the batch size, and plan() refreshes them in place.
    Raises KeyError (layout), ValueError (workspace, buffers), NotImplementedError (an argument the twin cannot serve).
    Source: https://docs.flashinfer.ai/api/attention.html.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        check_backend("BatchDecodeWithPagedKVCacheWrapper", backend)
        check_workspace(float_workspace_buffer, "float_workspace_buffer")
        check_kv_layout(kv_layout)
        refuse("BatchDecodeWithPagedKVCacheWrapper", jit_args=jit_args)
        self._fixed_batch_size = 0
        self._paged_kv_indptr_buf: torch.Tensor | None = None
        self._paged_kv_indices_buf: torch.Tensor | None = None
        self._paged_kv_last_page_len_buf: torch.Tensor | None = None
        if use_cuda_graph:
            mode = "cudagraph mode"
            indptr = graph_buffer(paged_kv_indptr_buffer, "paged_kv_indptr_buffer", mode)
            indices = graph_buffer(paged_kv_indices_buffer, "paged_kv_indices_buffer", mode)
            last_page_len = graph_buffer(paged_kv_last_page_len_buffer, "paged_kv_last_page_len_buffer", mode)
            self._fixed_batch_size = len(last_page_len)
            if len(indptr) != self._fixed_batch_size + 1:
                raise ValueError("The size of paged_kv_indptr_buffer should be batch_size + 1")
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr, indices
            self._paged_kv_last_page_len_buf = last_page_len
        self.device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._use_tensor_cores = use_tensor_cores
        self._float_workspace_buffer = float_workspace_buffer
        self._gather_buffer = GatherBuffer()
        self._plan: Plan | None = None
        self._batch_size = 0
        self._q_len_per_req = 1

    @property
    def use_tensor_cores(self) -> bool:
        """Whether several query rows a request are served; the twin has no tensor cores to use."""
        return self._use_tensor_cores

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() writes to the buffers that were given at construction."""
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Take other workspaces; the twin does not use them, and only checks their 16-byte alignment (ValueError)."""
        check_workspace(float_workspace_buffer, "float_workspace_buffer")
        check_workspace(int_workspace_buffer, "int_workspace_buffer")
        self._float_workspace_buffer = float_workspace_buffer

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated_positional_args: Any,
        **kwargs: Any,
    ) -> None:
        """Do the index work of one step; the options after `page_size` are the keywords of `_plan_impl`.

        `indptr` `[batch + 1]`, `indices` `[indptr[-1]]`, `last_page_len` `[batch]`, int32, on any device. Options given
        positionally emit a DeprecationWarning, as in FlashInfer 0.7. The default dtype is float16; `data_type` sets
        that of K/V alone: pass `q_data_type` and `kv_data_type`.
        Raises TypeError (unknown or doubled options), ValueError (graph mode's fixed sizes, q_len_per_req),
        RuntimeError (an empty batch, ungroupable heads), NotImplementedError (an option the twin cannot serve).
        """
        if deprecated_positional_args:
            api = "BatchDecodeWithPagedKVCacheWrapper"
            if len(deprecated_positional_args) > len(LEGACY_PLAN_ORDER):
                raise TypeError(
                    f"{api}.plan() accepts at most {len(LEGACY_PLAN_ORDER)} deprecated optional positional arguments "
                    f"after page_size; got {len(deprecated_positional_args)}"
                )
            for name, value in zip(LEGACY_PLAN_ORDER, deprecated_positional_args, strict=False):
                if name in kwargs:
                    raise TypeError(f"{api}.plan() got multiple values for argument {name!r}")
                kwargs[name] = value
            warnings.warn(
                f"Passing optional arguments to {api}.plan() positionally is deprecated; pass them as keyword "
                "arguments instead. Scheduled for removal in a future release.",
                DeprecationWarning,
                stacklevel=2,
            )
        self._plan_impl(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **kwargs)

    begin_forward = plan

    def _plan_impl(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        is_causal: bool | None = None,
    ) -> None:
        api = "BatchDecodeWithPagedKVCacheWrapper.plan"
        refuse(api, block_tables=block_tables)
        batch_size = len(last_page_len)
        if data_type is not None:
            q_data_type = data_type if q_data_type is None else q_data_type
            kv_data_type = data_type if kv_data_type is None else kv_data_type
        q_dtype, kv_dtype, o_dtype = canonical_dtypes(q_data_type or "float16", kv_data_type, o_data_type)
        if window_right != 0:
            raise NotImplementedError(
                "BatchDecodeWithPagedKVCacheWrapper only supports window_right != 0 with backend='cute-dsl'"
            )
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req must be >= 1, got {q_len_per_req}")
        if is_causal is not None and is_causal != (q_len_per_req > 1):
            raise NotImplementedError(
                "the decode mask is derived from q_len_per_req; an explicit is_causal override is not supported"
            )
        if q_len_per_req > 1 and not self._use_tensor_cores:
            raise ValueError(
                "q_len_per_req > 1 requires tensor-core decode "
                "(use_tensor_cores=True or the trtllm-gen/cute-dsl/cudnn backend)."
            )
        rope = rope_parameters(pos_encoding_mode, rope_scale, rope_theta)
        check_heads(num_qo_heads, num_kv_heads)
        if self._use_cuda_graph:
            if self._plan is not None and self._q_len_per_req != q_len_per_req:
                raise ValueError(
                    "q_len_per_req is part of the frozen cudagraph shape: this wrapper was planned with "
                    f"{self._q_len_per_req}, got {q_len_per_req}. Use a separate wrapper per q_len_per_req."
                )
            if batch_size != self._fixed_batch_size:
                raise ValueError(
                    f"The batch size should be fixed in cudagraph mode, the runtime batch size {batch_size}  "
                    f"mismatches the batch size set during initialization {self._fixed_batch_size}"
                )
            if self._paged_kv_indices_buf is not None and len(indices) > len(self._paged_kv_indices_buf):
                raise ValueError("The size of indices should be less than or equal to the allocated buffer")
        if batch_size < 1:
            raise RuntimeError("plan() needs at least one request: last_page_len is empty")
        if fixed_split_size is not None and not self._use_tensor_cores:
            raise ValueError("fixed_split_size is only supported by tensor core decode for now.")
        kv_indptr = indptr.cpu().numpy()
        if seq_lens is None:
            kv_lens = kv_lengths(kv_indptr, last_page_len.cpu().numpy(), page_size)
        else:
            kv_lens = seq_lens.cpu().numpy()
        if q_len_per_req > 1 and kv_lens.min() < q_len_per_req:
            raise ValueError(
                f"q_len_per_req={q_len_per_req} requires kv_len >= q_len_per_req for every request (the verified "
                "tokens must already be appended to the KV cache), but got a request with "
                f"kv_len={kv_lens.min()}: its earlier rows would attend to an empty KV range."
            )
        if self._use_cuda_graph:
            refreshed(self._paged_kv_indptr_buf, indptr, self.device, non_blocking)
            refreshed(self._paged_kv_last_page_len_buf, last_page_len, self.device, non_blocking)
        indices = refreshed(self._paged_kv_indices_buf, indices, self.device, non_blocking, exact=False)
        problem = Problem(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            head_dim_vo=head_dim,
            page_size=page_size,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            causal=q_len_per_req > 1,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap or 0.0,
            rope=rope,
        )
        qo_indptr = np.arange(batch_size + 1) * q_len_per_req
        self._plan = make_plan(problem, qo_indptr, kv_indptr, kv_lens, indices, self.device)
        self._batch_size = batch_size
        self._q_len_per_req = q_len_per_req

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: PagedKVCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend for one layer; return the output, or (output, log-sum-exp) with `return_lse`.

        `q` `[batch * q_len_per_req, num_qo_heads, head_dim]`, and the output alike; log-sum-exp float32 base 2
        `[rows, num_qo_heads]`. Raises RuntimeError before plan(), ValueError (dtypes, rows, buffers), AssertionError
        (a window other than plan's), KeyError (type of the cache), NotImplementedError (an argument not served).
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("BatchDecodeWithPagedKVCacheWrapper: plan() must be called before run()")
        refuse(
            "BatchDecodeWithPagedKVCacheWrapper.run",
            args=args or None,
            sinks=sinks,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=kv_cache_sf,
        )
        kv = whole_or_pair(paged_kv_cache, self._kv_layout)
        problem = plan.problem
        check_planned_dtypes(q, kv, problem.q_dtype, problem.kv_dtype)
        self._check_rows(q, q_len_per_req)
        if window_left is not None and window_left != problem.window_left:
            raise AssertionError("window_left must be what plan() was told")
        if out is not None:
            check_tensor(out, q.shape, problem.o_dtype, q.device, "out")
        if not return_lse:
            lse = None
        elif lse is None:
            lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        else:
            check_tensor(lse, q.shape[:2], torch.float32, q.device, "lse")
        scale = softmax_scale(problem.sm_scale, q.size(-1), q_scale, k_scale)
        out = run_plan(plan, q, kv, self._kv_layout, self._gather_buffer, scale, out, lse)
        return finish(out, lse, v_scale)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def _check_rows(self, q: torch.Tensor, q_len_per_req: int | None) -> None:
        """ValueError unless q has the planned rows; stricter than FlashInfer, which lets a stray row pass."""
        if q_len_per_req is not None:
            warnings.warn(
                "Passing `q_len_per_req` to BatchDecodeWithPagedKVCacheWrapper.run() is deprecated; pass it to plan() "
                "instead. Scheduled for removal in a future release.",
                DeprecationWarning,
                stacklevel=3,
            )
        elif q.size(0) == self._batch_size * self._q_len_per_req:
            return
        else:
            q_len_per_req = q.size(0) // self._batch_size
        if q.size(0) != self._batch_size * q_len_per_req:
            raise ValueError(
                f"q.shape[0] ({q.size(0)}) does not match batch_size * q_len_per_req "
                f"({self._batch_size} * {q_len_per_req} = {self._batch_size * q_len_per_req}). For batch decode, q "
                "must have shape [batch_size * q_len_per_req, num_heads, head_dim]."
            )
        if not self._use_tensor_cores and q_len_per_req > 1:
            raise ValueError(
                f"q implies q_len_per_req={q_len_per_req}, but the non-tensor-core decode kernel only supports "
                "q_len_per_req=1."
            )
        if q_len_per_req != self._q_len_per_req:
            raise ValueError(
                f"q implies q_len_per_req={q_len_per_req} but plan() used {self._q_len_per_req}; re-plan with the "
                "matching q_len_per_req."
            )
