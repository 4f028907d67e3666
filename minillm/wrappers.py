"""WrapperManager: FlashInfer's wrappers, planned once per step.

FlashInfer splits attention in two: `plan()` looks at the lengths of the batch on the host and decides how to spread
the work over the device; `run()` then does it, once for each layer (https://arxiv.org/abs/2501.01005). Which wrapper
serves a step is decided here and hidden behind the `AttentionPlan` of the step's context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minillm.context import AttentionPlan, BatchArrays

WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer's documentation recommends
CUDA_CORE_GROUPS = frozenset({1, 2, 3, 4, 6, 8, 16})  # query heads per KV head that its plain decode kernel serves


@dataclass(frozen=True)
class PlannedAttention:
    """An `AttentionPlan` of one wrapper that serves every row of the step."""

    wrapper: Any

    def run(self, q: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        """Attend `q` `[num_tokens, num_qo_heads, head_dim]` to one layer's pages; returns the shape of `q`."""
        return self.wrapper.run(q, kv_layer)


@dataclass(frozen=True)
class StepInputs:
    """What a step needs on the device: the batch's arrays, the tokens, and the attention planned for them; int32."""

    token_ids: torch.Tensor  # [num_tokens]
    logits_rows: torch.Tensor  # [num_logits]
    positions: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor
    batch_indices: torch.Tensor
    attention: AttentionPlan


class StepBuffers:
    """Static memory for one step in flight: pinned staging on the host, its image on the device, and planned wrappers.

    A step's arrays are packed one after the other, so that one asynchronous copy takes them all across. On a CPU
    there is nothing to cross, and the arrays are used where they lie.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.in_use = False
        self.staging = self.image = torch.empty(0, dtype=torch.int32)

    def upload(self, arrays: Sequence[np.ndarray]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each array (int32) as a tensor on the host and as one on the device; valid until the next upload."""
        if self.device.type == "cpu":
            tensors = [torch.from_numpy(array) for array in arrays]
            return tensors, tensors
        sizes = [len(array) for array in arrays]
        padded = [(size + 3) // 4 * 4 for size in sizes]  # 16 bytes: kernels load aligned
        total = sum(padded)
        if total > len(self.staging):
            self.staging = torch.empty(2 * total, dtype=torch.int32, pin_memory=True)
            self.image = torch.empty(2 * total, dtype=torch.int32, device=self.device)
        staged = self.staging.numpy()
        offset, spans = 0, []
        for array, size, step in zip(arrays, sizes, padded, strict=True):
            staged[offset : offset + size] = array
            spans.append(slice(offset, offset + size))
            offset += step
        self.image[:total].copy_(self.staging[:total], non_blocking=True)
        return [self.staging[span] for span in spans], [self.image[span] for span in spans]


class WrapperManager:
    """Plans the attention of each step.

    A step in which each request computes one token is served by the decode wrapper, any other by the prefill wrapper,
    to which a decode is a prefill of one row.

    Args:
        kernels: `flashinfer` or its twin.
        num_qo_heads, num_kv_heads: of this rank.
        head_dim, page_size, dtype, device: of the model and the pool.
    """

    def __init__(
        self,
        kernels: Any,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_qo_heads, self.num_kv_heads = num_qo_heads, num_kv_heads
        self.head_dim, self.page_size, self.dtype = head_dim, page_size, dtype
        workspace_bytes = WORKSPACE_BYTES if device.type == "cuda" else 16
        workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=device)
        # The tensor-core kernel serves any ratio of heads, and is the faster one where several share a KV head.
        group = num_qo_heads // num_kv_heads
        tensor_cores = group >= 4 or group not in CUDA_CORE_GROUPS
        self.prefill = kernels.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self.decode = kernels.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
        self.buffers = StepBuffers(device)

    def plan(self, arrays: BatchArrays, token_ids: np.ndarray, logits_rows: np.ndarray) -> StepInputs:
        """Bring a step's arrays to the device and plan its attention.

        Args:
            arrays: the batch.
            token_ids: `[num_tokens]` int32, what to compute.
            logits_rows: `[num_logits]` int32, the rows to turn into logits.

        Raises:
            RuntimeError: the step before has not been released: its buffers are still being read.
        """
        if self.buffers.in_use:
            raise RuntimeError("these step buffers are in use: release() them when the step has ended")
        self.buffers.in_use = True
        on_host, on_device = self.buffers.upload(
            (
                arrays.qo_indptr,
                arrays.kv_indptr,
                arrays.kv_last_page_len,
                arrays.kv_indices,
                arrays.positions,
                arrays.batch_indices,
                token_ids,
                logits_rows,
            )
        )
        # plan() reads lengths on the host; handing it device tensors would make it wait for the device.
        qo_indptr, kv_indptr, kv_last_page_len = on_host[:3]
        kv_indices = on_device[3]
        heads = (self.num_qo_heads, self.num_kv_heads, self.head_dim, self.page_size)
        dtypes = {"q_data_type": self.dtype, "kv_data_type": self.dtype}
        if arrays.num_tokens == arrays.num_requests:
            wrapper = self.decode
            wrapper.plan(kv_indptr, kv_indices, kv_last_page_len, *heads, **dtypes)
        else:
            wrapper = self.prefill
            wrapper.plan(qo_indptr, kv_indptr, kv_indices, kv_last_page_len, *heads, causal=True, **dtypes)
        qo_indptr, kv_indptr, kv_last_page_len, kv_indices, positions, batch_indices, tokens, rows = on_device
        return StepInputs(
            token_ids=tokens,
            logits_rows=rows,
            positions=positions,
            qo_indptr=qo_indptr,
            kv_indptr=kv_indptr,
            kv_indices=kv_indices,
            kv_last_page_len=kv_last_page_len,
            batch_indices=batch_indices,
            attention=PlannedAttention(wrapper),
        )

    def release(self) -> None:
        """The step has ended, or failed: its buffers may be planned again."""
        self.buffers.in_use = False
