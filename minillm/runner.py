"""ModelRunner: runs one step. It builds the context, calls the model, and has the sampler draw; all else belongs to others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from minillm.context import BatchArrays, Group, InferenceContext, KVPoolLike, SoloGroup
from minillm.model import CausalLM
from minillm.page_protocol import PageManagerProtocol, check_batch_arrays
from minillm.request import Request
from minillm.sampler import SampledTokens, SamplerProtocol
from minillm.scheduler import StepPlan
from minillm.wrappers import WrapperManager


@dataclass(frozen=True)
class StepResult:
    """What a step gave: the requests that have a new token, their tokens, and the seconds each phase took."""

    requests: list[Request]
    sampled: SampledTokens
    prepare_time: float
    forward_time: float
    sample_time: float


class ModelRunner:
    """Composed of a model, its wrappers and its pool; one on each rank.

    Args:
        model: this rank's part of the model.
        wrappers: plans the attention of each step.
        kernels: the module that the layers compute with.
        kv_pool: this rank's K/V tensors.
        group: the ranks that share the model.
    """

    def __init__(
        self,
        model: CausalLM,
        wrappers: WrapperManager,
        kernels: Any,
        kv_pool: KVPoolLike,
        group: Group | None = None,
    ):
        self.model, self.wrappers, self.kernels, self.kv_pool = model, wrappers, kernels, kv_pool
        self.group = group or SoloGroup()

    @torch.inference_mode()
    def step(self, plan: StepPlan, page_manager: PageManagerProtocol, sampler: SamplerProtocol) -> StepResult:
        """Compute the plan's tokens, and draw a token for each request that has all of its own computed. On rank 0."""
        started = time.perf_counter()
        arrays = page_manager.batch_arrays(plan.chunks)
        check_batch_arrays(arrays, plan.chunks, page_manager.num_pages, page_manager.page_size)
        token_ids = np.fromiter(
            chain.from_iterable(
                request.token_ids[chunk.start : chunk.end]
                for request, chunk in zip(plan.requests, plan.chunks, strict=True)
            ),
            np.int32,
            plan.num_tokens,
        )
        reaches_end = [chunk.end == len(r.token_ids) for r, chunk in zip(plan.requests, plan.chunks, strict=True)]
        logits_rows = arrays.qo_indptr[1:][reaches_end] - 1
        try:
            context, on_device = self.context(arrays, token_ids, logits_rows, page_manager)
            prepared = time.perf_counter()
            logits = self.model(on_device, context)
            forwarded = time.perf_counter()
            requests = [request for request, ends in zip(plan.requests, reaches_end, strict=True) if ends]
            sampled = sampler.sample(logits, requests) if requests else SampledTokens([], [], [])
        finally:
            self.wrappers.release()
        return StepResult(
            requests, sampled, prepared - started, forwarded - prepared, time.perf_counter() - forwarded
        )

    def context(
        self,
        arrays: BatchArrays,
        token_ids: np.ndarray,
        logits_rows: np.ndarray,
        page_manager: PageManagerProtocol | None = None,
    ) -> tuple[InferenceContext, torch.Tensor]:
        """The context of a step, and its token ids on the device. Ranks other than 0 have no page manager."""
        inputs = self.wrappers.plan(arrays, token_ids, logits_rows)
        context = InferenceContext(
            kernels=self.kernels,
            positions=inputs.positions,
            qo_indptr=inputs.qo_indptr,
            kv_indptr=inputs.kv_indptr,
            kv_indices=inputs.kv_indices,
            kv_last_page_len=inputs.kv_last_page_len,
            batch_indices=inputs.batch_indices,
            attention=inputs.attention,
            kv_pool=self.kv_pool,
            page_manager=page_manager,
            group=self.group,
            logits_rows=inputs.logits_rows,
        )
        return context, inputs.token_ids

    @torch.inference_mode()
    def forward(self, arrays: BatchArrays, token_ids: np.ndarray, logits_rows: np.ndarray) -> torch.Tensor:
        """Only the forward pass: what a rank other than 0 does in a step, and what a warm-up runs."""
        try:
            context, on_device = self.context(arrays, token_ids, logits_rows)
            return self.model(on_device, context)
        finally:
            self.wrappers.release()
