"""What the twin's batch wrappers share: graph mode, custom masks, outputs and their log-sum-exp.

Source: https://docs.flashinfer.ai/api/attention.html.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from minillm.reference_checks import (
    check_backend,
    check_kv_layout,
    check_pos_encoding_mode,
    check_tensor,
    check_workspace,
    refreshed,
    refuse,
)
from minillm.reference_kernel import GatherBuffer, run_plan
from minillm.reference_plan import CustomMask, Plan

Scale = float | torch.Tensor


def rope_parameters(
    pos_encoding_mode: str, rope_scale: float | None, rope_theta: float | None
) -> tuple[float, float] | None:
    """(scale, theta) of the rotation inside attention, or None where there is none."""
    check_pos_encoding_mode(pos_encoding_mode)
    if pos_encoding_mode == "NONE":
        return None
    return (1.0 if rope_scale is None else rope_scale, 1e4 if rope_theta is None else rope_theta)


def pack_mask(bits: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each request's bits, least significant first, into whole bytes; also the byte offsets `[batch + 1]`."""
    indptr = np.concatenate(([0], np.cumsum((lengths + 7) // 8)))
    starts = np.cumsum(lengths) - lengths
    target = np.arange(int(lengths.sum())) + np.repeat(indptr[:-1] * 8 - starts, lengths)
    spread = torch.zeros(int(indptr[-1]) * 8, dtype=torch.uint8, device=bits.device)
    spread[torch.from_numpy(target).to(bits.device)] = bits.to(torch.uint8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (spread.view(-1, 8) * weights).sum(-1, dtype=torch.uint8), torch.from_numpy(indptr.astype(np.int32))


def unpack_mask(packed: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` bits of a packed mask, as bool."""
    return ((packed[:, None] >> torch.arange(8, device=packed.device)) & 1).reshape(-1)[:length].bool()


def finish(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    v_scale: Scale | None,
    lse_base: str = "log2",
    lse_layout: str = "NH",
    lse_out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Apply what comes after attention: the scale of V, and the wanted base and layout of the log-sum-exp."""
    if v_scale is not None:
        out *= v_scale
    if lse is None:
        return out
    if lse_base == "ln":
        lse *= math.log(2.0)
    if lse_layout == "NH":
        return out, lse
    return out, lse.t().contiguous() if lse_out is None else lse_out.copy_(lse.t())


class BatchPrefill:
    """What paged and ragged prefill share: the buffers of graph mode, the mask, the outputs."""

    def __init__(
        self, name: str, workspace: torch.Tensor, kv_layout: str, use_cuda_graph: bool, backend: str, **unserved: Any
    ) -> None:
        check_workspace(workspace, "float_workspace_buffer")
        check_kv_layout(kv_layout)
        check_backend(name, backend)
        refuse(name, **unserved)
        self.device = workspace.device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._float_workspace_buffer = workspace
        self._fixed_batch_size = 0
        self._max_total_num_rows: int | None = None
        self._custom_mask_buf: torch.Tensor | None = None
        self._mask_indptr_buf: torch.Tensor | None = None
        self._gather_buffer = GatherBuffer()
        self._plan: Plan | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() writes to the buffers that were given at construction."""
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Take other workspaces; the twin does not use them, and only checks their 16-byte alignment (ValueError)."""
        check_workspace(float_workspace_buffer, "float_workspace_buffer")
        check_workspace(int_workspace_buffer, "int_workspace_buffer")
        self._float_workspace_buffer = float_workspace_buffer

    def _planned(self) -> Plan:
        if self._plan is None:
            raise RuntimeError(f"{type(self).__name__}: plan() must be called before run()")
        return self._plan

    def _check_graph_sizes(self, total_num_rows: int, batch_size: int, graph_name: str) -> None:
        if self._max_total_num_rows is None:
            self._max_total_num_rows = total_num_rows
        elif total_num_rows > self._max_total_num_rows:
            raise ValueError(
                f"The total number of rows in qo_indptr {total_num_rows} in cuda graph mode cannot "
                f"exceed the number of rows set during initialization {self._max_total_num_rows}."
            )
        if batch_size != self._fixed_batch_size:
            raise ValueError(
                f"The batch size should be fixed {graph_name}, the runtime batch size {batch_size} mismatches the "
                f"batch size {self._fixed_batch_size}  set during initialization."
            )

    def _custom_mask(
        self,
        custom_mask: torch.Tensor | None,
        packed_custom_mask: torch.Tensor | None,
        qo_lens: np.ndarray,
        kv_lens: np.ndarray,
    ) -> CustomMask | None:
        """The caller's mask as bits on the device; in graph mode it goes through the caller's buffers."""
        if custom_mask is None and packed_custom_mask is None:
            return None
        lengths = qo_lens.astype(np.int64) * kv_lens
        if packed_custom_mask is not None:
            if len(lengths) > 1:
                # FlashInfer takes the bit offsets of requests for byte offsets here: it reads elsewhere.
                raise NotImplementedError(
                    "the reference kernels do not serve the argument packed_custom_mask for more than one request: "
                    "pass custom_mask"
                )
            bits = unpack_mask(packed_custom_mask.to(self.device), int(lengths.sum()))
        elif custom_mask is not None:
            bits = custom_mask.reshape(-1).to(self.device, torch.bool)
        if bits.numel() != lengths.sum():
            raise ValueError(f"the custom mask has {bits.numel()} elements, but the batch has {lengths.sum()} scores")
        if self._use_cuda_graph:
            packed, indptr = pack_mask(bits, lengths)
            for name, buffer, values in (
                ("custom_mask_buf", self._custom_mask_buf, packed),
                ("mask_indptr_buf", self._mask_indptr_buf, indptr),
            ):
                if not isinstance(buffer, torch.Tensor):
                    raise ValueError(
                        f"{name} must be initialized with a torch.Tensor in cuda graph mode if we use custom mask "
                        "in attention computation."
                    )
                refreshed(buffer, values, self.device, non_blocking=False, exact=name == "mask_indptr_buf")
        return CustomMask(bits, np.cumsum(lengths) - lengths)

    def _attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_layout: str,
        scale: float,
        v_scale: Scale | None,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
        lse_base: str,
        lse_layout: str,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        plan = self._planned()
        heads, head_dim = plan.problem.num_qo_heads, plan.problem.head_dim_vo
        if out is not None:
            check_tensor(out, (*q.shape[:-1], head_dim), plan.problem.o_dtype, q.device, "out")
        kernel_lse = lse_out = None
        if return_lse:
            if lse is not None:
                shape = (q.size(0), heads) if lse_layout == "NH" else (heads, q.size(0))
                check_tensor(lse, shape, torch.float32, q.device, "lse")
            if lse_layout == "HN":
                if lse is not None and not lse.is_contiguous():
                    raise ValueError('lse for lse_layout="HN" must be contiguous')
                lse, lse_out = None, lse
            kernel_lse = q.new_empty((q.size(0), heads), dtype=torch.float32) if lse is None else lse
        out = run_plan(plan, q, kv, kv_layout, self._gather_buffer, scale, out, kernel_lse)
        return finish(out, kernel_lse, v_scale, lse_base, lse_layout, lse_out)
