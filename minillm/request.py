"""Requests: what a caller asks for, what the engine remembers while it runs, and what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from minillm.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to one request, in seconds; `arrival_time` is a `time.perf_counter` reading.

    `queue_time` runs from arrival to the first step that computes a token of the request, `ttft` (time to first
    token) to its first token, and `latency` to its end. `inter_token_latency` is the mean time between tokens. None:
    did not happen.
    """

    arrival_time: float
    queue_time: float | None
    ttft: float | None
    latency: float
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache on first admission
    num_output_tokens: int
    num_preemptions: int

    @property
    def inter_token_latency(self) -> float | None:
        """Seconds per token after the first."""
        if self.ttft is None or self.num_output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.num_output_tokens - 1)


@dataclass(frozen=True)
class RequestOutput:
    """What became of one request (of one of its `n` samples).

    `finish_reason` is `stop` (an end token or a stop string), `length`, `abort` or `error`; with `error`, the
    attribute of that name says what went wrong. `token_ids` holds the id that stopped the request; `text` does not
    hold the stop string. `logprobs` has for each output token a dict of token id to log-probability, the drawn token
    first.
    """

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    metrics: RequestMetrics
    error: str | None = None
    logprobs: list[dict[int, float]] | None = None
    sample_index: int = 0


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"  # for pages and a place in the batch: new, or preempted
    RUNNING = "running"  # has a page table
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One sequence while it is being served. The scheduler moves it, the engine appends tokens to it.

    Always `0 <= num_computed <= num_tokens`: the first `num_computed` tokens have their K/V in pages. A request whose
    `num_tokens - num_computed` is 1 decodes; with more to compute, it prefills.
    """

    request_id: str
    token_ids: list[int]  # prompt and output
    params: SamplingParams
    max_num_tokens: int  # prompt and output together may not grow beyond this
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # the model's end tokens included, unless ignored
    on_token: Callable[[int, str], None] | None = None
    parent_id: str = ""  # the id the caller knows
    sample_index: int = 0
    num_prompt: int = field(init=False)
    num_computed: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    num_cached: int | None = None  # tokens found in the prefix cache on first admission
    num_preemptions: int = 0
    arrival_time: float = field(default_factory=time.perf_counter)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)
        self.parent_id = self.parent_id or self.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    def stop_reason(self) -> FinishReason | None:
        """Why the request ends with its last token, stop strings aside; None if it goes on."""
        num_output = self.num_output
        if num_output >= self.params.min_tokens and self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        if num_output >= self.params.max_tokens or self.num_tokens >= self.max_num_tokens:
            return "length"
        return None

    def metrics(self) -> RequestMetrics:
        """What the clock says, up to now."""

        def since_arrival(moment: float | None) -> float | None:
            return None if moment is None else moment - self.arrival_time

        return RequestMetrics(
            arrival_time=self.arrival_time,
            queue_time=since_arrival(self.first_scheduled_time),
            ttft=since_arrival(self.first_token_time),
            latency=time.perf_counter() - self.arrival_time,
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached or 0,
            num_output_tokens=self.num_output,
            num_preemptions=self.num_preemptions,
        )

    def output(self, text: str) -> RequestOutput:
        """The result, once the request has ended."""
        return RequestOutput(
            request_id=self.parent_id,
            text=text,
            token_ids=self.output_token_ids,
            finish_reason=self.finish_reason or "abort",
            prompt_token_ids=self.token_ids[: self.num_prompt],
            metrics=self.metrics(),
            error=self.error,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            sample_index=self.sample_index,
        )
