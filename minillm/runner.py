"""ModelRunner runs one step: it builds the context, calls the model, and has the sampler draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from minillm.config import EngineConfig
from minillm.context import BatchArrays, Chunk, Group, InferenceContext
from minillm.devices import load_kernels
from minillm.loader import ModelLoader
from minillm.memory import MemoryReport, warm_up
from minillm.model import CausalLM
from minillm.page_manager import KVPool, PageManager
from minillm.page_protocol import PageManagerProtocol, check_batch_arrays
from minillm.protocols import SampledTokens, SamplerProtocol, StepPlan
from minillm.request import Request
from minillm.wrappers import WrapperManager


@dataclass(frozen=True)
class StepResult:
    """What a step gave: the requests that have a new token, their tokens, and the seconds that each phase took."""

    plan: StepPlan
    requests: list[Request]
    sampled: SampledTokens
    started: float  # a `time.perf_counter` reading
    prepare_time: float
    forward_time: float
    sample_time: float


class ModelRunner:
    """Composed of a model, its wrappers and its pool; there is one on each rank.

    Args:
        loader, config: what to run, and how; `config` is resolved.
        group: the ranks that share the model.
        announce: tells the other ranks what this one is about to do: `announce("pool", num_pages)` or
            `announce("step", arrays, token_ids, logits_rows)`.
        random_weights: fill the weights from `config.seed` instead of a checkpoint.
    """

    def __init__(
        self,
        loader: ModelLoader,
        config: EngineConfig,
        group: Group,
        announce: Callable[..., None],
        random_weights: bool = False,
    ):
        self.config, self.group, self.announce = config, group, announce
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.kernels = load_kernels(config.kernels, self.device)
        num_positions = config.max_model_len or loader.config.max_position_embeddings
        self.model = CausalLM(loader.config, self.device, self.dtype, group, num_positions)
        loader.load_weights(self.model.weight_slots(), config.seed if random_weights else None)
        self.num_kv_heads = loader.config.num_kv_heads // group.size
        self.wrappers = WrapperManager(
            self.kernels,
            num_qo_heads=loader.config.num_qo_heads // group.size,
            num_kv_heads=self.num_kv_heads,
            head_dim=loader.config.head_dim,
            page_size=config.page_size,
            dtype=self.dtype,
            device=self.device,
        )

    @property
    def bytes_per_page(self) -> int:
        """Bytes of this rank's K and V of one page, over all layers."""
        shape = self.model.config
        return KVPool.bytes_per_page(
            shape.num_layers, self.config.page_size, self.num_kv_heads, shape.head_dim, self.dtype
        )

    def make_pool(self, num_pages: int) -> None:
        """Make the K/V tensors, on every rank; the ones before are dropped first."""
        self.announce("pool", num_pages)
        shape = self.model.config
        self.kv_pool: Any = None  # gives the memory back before it is taken anew
        self.kv_pool = KVPool(
            shape.num_layers,
            num_pages,
            self.config.page_size,
            self.num_kv_heads,
            shape.head_dim,
            self.dtype,
            self.device,
        )

    def warm_up(self) -> MemoryReport:
        """Run the largest step on a small pool of its own: what loads on first use has loaded, memory is measured."""
        max_len = self.config.max_model_len or self.model.config.max_position_embeddings
        page_size, most = self.config.page_size, min(self.config.max_batch_tokens, self.config.max_running * max_len)
        # As many requests as it takes to fill the step, none longer than a request may be.
        lengths = [min(max_len, most - start) for start in range(0, most, max_len)]
        self.make_pool(sum(-(-length // page_size) for length in lengths))

        def run_step(num_tokens: int) -> None:
            pages = PageManager(self.kv_pool.num_pages, page_size, prefix_caching=False)
            chunks: list[Chunk] = []
            for index, length in enumerate(lengths):
                length = min(length, num_tokens - sum(chunk.end for chunk in chunks))
                if length > 0:
                    pages.allocate(str(index), range(length))
                    pages.extend(str(index), length)
                    chunks.append(Chunk(str(index), 0, length))
            num_rows = min(self.config.max_running, num_tokens)
            rows = np.arange(num_tokens - num_rows, num_tokens, dtype=np.int32)
            self.forward(pages.batch_arrays(chunks), np.zeros(num_tokens, np.int32), rows)

        slots = self.model.weight_slots().values()
        weights_bytes = sum(slot.target.numel() * slot.target.element_size() for slot in slots)
        return warm_up(run_step, most, self.device, weights_bytes)

    @torch.inference_mode()
    def step(self, plan: StepPlan, page_manager: PageManagerProtocol, sampler: SamplerProtocol) -> StepResult:
        """Compute the plan's tokens, and draw a token for each request that has all of its own computed. On rank 0."""
        started = time.perf_counter()
        arrays = page_manager.batch_arrays(plan.chunks)
        if type(page_manager) is not PageManager:  # the library's own is held to the contract by its tests
            check_batch_arrays(arrays, plan.chunks, page_manager.num_pages, page_manager.page_size)
        pairs = list(zip(plan.requests, plan.chunks, strict=True))
        tokens = chain.from_iterable(request.token_ids[chunk.start : chunk.end] for request, chunk in pairs)
        token_ids = np.fromiter(tokens, np.int32, plan.num_tokens)
        reaches_end = [chunk.end == len(request.token_ids) for request, chunk in pairs]
        logits_rows = arrays.qo_indptr[1:][reaches_end] - 1
        requests = [request for request, ends in zip(plan.requests, reaches_end, strict=True) if ends]
        try:
            context, on_device = self.context(arrays, token_ids, logits_rows, page_manager)
            prepared = time.perf_counter()
            logits = self.model(on_device, context)
            forwarded = time.perf_counter()
            sampled = sampler.sample(logits, requests) if requests else SampledTokens([], [], [])
        finally:
            self.wrappers.release()
        ended = time.perf_counter()
        return StepResult(plan, requests, sampled, started, prepared - started, forwarded - prepared, ended - forwarded)

    @torch.inference_mode()
    def forward(self, arrays: BatchArrays, token_ids: np.ndarray, logits_rows: np.ndarray) -> torch.Tensor:
        """The forward pass alone: what ranks other than 0 do in a step."""
        try:
            context, on_device = self.context(arrays, token_ids, logits_rows)
            return self.model(on_device, context)
        finally:
            self.wrappers.release()

    def context(
        self,
        arrays: BatchArrays,
        token_ids: np.ndarray,
        logits_rows: np.ndarray,
        page_manager: PageManagerProtocol | None = None,
    ) -> tuple[InferenceContext, torch.Tensor]:
        """The context of a step, and its token ids on the device; the wrappers' buffers are taken until `release`."""
        self.announce("step", arrays, token_ids, logits_rows)
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
