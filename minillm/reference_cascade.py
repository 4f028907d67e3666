"""The twin of FlashInfer's merging of attention states, and of cascade attention which is built on it.

A state is an output and its base-2 log-sum-exp; attention over two parts of the K/V is the merge of their states.
Source: https://docs.flashinfer.ai/tutorials/recursive_attention.html, https://flashinfer.ai/2024/02/02/cascade-inference.html.
"""

from __future__ import annotations

import torch

from minillm.reference_checks import PagedKVCache
from minillm.reference_prefill import BatchPrefillWithPagedKVCacheWrapper


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge `v` `[seq_len, num_states, num_heads, head_dim]` with `s` `[seq_len, num_states, num_heads]`, base 2.

    Returns `[seq_len, num_heads, head_dim]` in v's dtype, and float32 `[seq_len, num_heads]`. Where every state is
    empty (-inf), the result is 0 and -inf. Source: https://docs.flashinfer.ai/api/cascade.html.
    """
    s = s.float()
    # Against an empty row, where -inf - -inf would be NaN.
    top = s.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    weights = torch.exp2(s - top)
    total = weights.sum(dim=1)
    shares = weights / total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    merged = (v.float() * shares.unsqueeze(-1)).sum(dim=1)
    return merged.to(v.dtype), torch.log2(total).add_(top.squeeze(1))


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the states of two parts of the K/V; `v_*` `[seq_len, num_heads, head_dim]`, `s_*` `[seq_len, num_heads]`.

    Source: https://docs.flashinfer.ai/api/cascade.html.
    """
    v, s, _ = _merge_two(v_a, s_a.float(), v_b, s_b.float())
    return v.to(v_a.dtype), s


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """Merge another state into `(v, s)`; rows where `mask` `[seq_len]` is False stay as they are.

    As in FlashInfer, an `s` that is not float32 is not updated. Source: https://docs.flashinfer.ai/api/cascade.html.
    """
    merged_v, merged_s, _ = _merge_two(v, s.float(), v_other, s_other.float())
    if mask is not None:
        rows = mask.to(torch.bool)[:, None]
        merged_v = torch.where(rows[:, :, None], merged_v, v.float())
        merged_s = torch.where(rows, merged_s, s.float())
    v.copy_(merged_v)
    if s.dtype == torch.float32:
        s.copy_(merged_s)


def _merge_two(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(merged output float32, merged log-sum-exp, share of b)."""
    s = torch.logaddexp2(s_a, s_b)
    # Two empty states share nothing, and -inf - -inf is NaN.
    share = torch.exp2(s_b - s).nan_to_num_(0.0)
    weight_a = torch.exp2(s_a - s).nan_to_num_(0.0)
    v = v_a.float() * weight_a.unsqueeze(-1)
    return v.addcmul_(v_b.float(), share.unsqueeze(-1)), s, share


class MultiLevelCascadeAttentionWrapper:
    """Attention over K/V that several requests share in levels: computed once a level, then merged.

    One paged prefill a level, from the most shared to the requests' own; with `use_cuda_graph`, lists of buffers, one
    of each kind a level. Raises what `BatchPrefillWithPagedKVCacheWrapper` raises.
    Source: https://flashinfer.ai/2024/02/02/cascade-inference.html.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[torch.Tensor] | None = None,
    ) -> None:
        self._use_cuda_graph = use_cuda_graph
        if use_cuda_graph:
            arrays: tuple[list[torch.Tensor], ...] = (
                qo_indptr_buf_arr or [],
                paged_kv_indptr_buf_arr or [],
                paged_kv_indices_buf_arr or [],
                paged_kv_last_page_len_buf_arr or [],
            )
            self._levels = [
                BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, True, *buffers)
                for buffers in zip(*arrays, strict=True)
            ]
        else:
            self._levels = [
                BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout) for _ in range(num_levels)
            ]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() writes to the buffers that were given at construction."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: list[torch.Tensor]
    ) -> None:
        """Take other workspaces, one of integers a level; ValueError if there are more or fewer."""
        for level, int_workspace_buffer in zip(self._levels, int_workspace_buffers, strict=True):
            level.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """Plan every level; each list has one array a level, as in `BatchPrefillWithPagedKVCacheWrapper.plan`.

        `causal` applies to the last level alone. `window_left` counts within each level's own K/V, so a window is
        right for one level only. Raises ValueError (lists of other lengths), and what a level's plan() raises.
        """
        arrays = zip(
            self._levels, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, strict=True
        )
        for i, (level, qo_indptr, kv_indptr, kv_indices, last_page_len) in enumerate(arrays):
            level.plan(
                qo_indptr,
                kv_indptr,
                kv_indices,
                last_page_len,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal and i == len(self._levels) - 1,
                pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction,
                sm_scale=sm_scale,
                window_left=window_left,
                logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale,
                rope_theta=rope_theta,
                q_data_type=q_data_type,
                kv_data_type=kv_data_type,
            )

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: PagedKVCache) -> torch.Tensor:
        """Attend on every level and merge; `q` and the result `[rows, num_qo_heads, head_dim]`.

        Between levels the output is kept in q's dtype, as FlashInfer keeps it. Raises what a level's run() raises.
        """
        out, lse = self._levels[-1].run(q, paged_kv_cache, return_lse=True)
        for level in self._levels[:-1]:
            merge_state_in_place(out, lse, *level.run(q, paged_kv_cache, return_lse=True))
        return out

    forward = run
