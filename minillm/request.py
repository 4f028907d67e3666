"""Requests: what a caller asks for, what the engine remembers while it runs, and what comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any, Literal

from minillm.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_N = 1024
MAX_LOGPROBS = 1024


def _integer(name: str, value: Any, low: int, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidRequestError(f"{name} must be an integer, got {short(value)}")
    if not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise InvalidRequestError(f"{name} must be {bounds}, got {short(value)}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidRequestError(f"{name} must be a number, got {short(value)}")
    if not (low < value if above else low <= value) or not value <= high or math.isinf(value):  # NaN fails, too
        bounds = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise InvalidRequestError(f"{name} must be {bounds}, got {short(value)}")
    return float(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens, and when to stop. `InvalidRequestError` names a field with a wrong value.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p; each renormalises what is
    left.

    Args:
        n: how many outputs to draw for the prompt.
        temperature: divides the logits; 0 is greedy (the most probable token, filters and seed play no part).
        top_k: keep the k most probable tokens; 0 or -1 is off.
        top_p: keep the fewest most probable tokens whose probabilities add up to this
            (nucleus sampling, https://arxiv.org/abs/1904.09751).
        min_p: keep tokens at least this many times as probable as the most probable one
            (https://arxiv.org/abs/2407.01082).
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely
            (https://arxiv.org/abs/1909.05858).
        max_tokens: end with `length` after so many tokens.
        min_tokens: hold every kind of stop back until so many tokens.
        stop: strings that end the output; they are not part of its text.
        stop_token_ids: token ids that end the output, besides the model's own end tokens; they stay in `token_ids`.
        ignore_eos: do not stop at the model's end tokens.
        seed: makes the request's random numbers depend on the seed and the position alone.
        logprobs: also return the log-probabilities of this many most probable tokens and of the one drawn.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("n", _integer("n", self.n, 1, MAX_N))
        put("temperature", _number("temperature", self.temperature, 0.0, math.inf))
        put("top_k", max(_integer("top_k", self.top_k, -1), 0))
        put("top_p", _number("top_p", self.top_p, 0.0, 1.0, above=True))
        put("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True))
        put("max_tokens", _integer("max_tokens", self.max_tokens, 1))
        put("min_tokens", _integer("min_tokens", self.min_tokens, 0))
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens {self.min_tokens} must not be above max_tokens {self.max_tokens}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise InvalidRequestError(f"stop must be a string or a list of non-empty strings, got {short(self.stop)}")
        put("stop", tuple(stop))
        if not isinstance(self.stop_token_ids, (tuple, list)):
            raise InvalidRequestError(f"stop_token_ids must be a list of token ids, got {short(self.stop_token_ids)}")
        put("stop_token_ids", tuple(_integer("stop_token_ids", i, 0) for i in self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError(f"ignore_eos must be True or False, got {short(self.ignore_eos)}")
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        if self.logprobs is not None:
            put("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))


def check_fits(num_prompt: int, params: SamplingParams, max_num_tokens: int, num_pages: int, page_size: int) -> None:
    """Raise `InvalidRequestError` for a request that could not be finished even with the whole pool to itself."""
    most = min(num_prompt + params.max_tokens, max_num_tokens)
    if most - 1 > num_pages * page_size:  # the last token is returned, but never computed
        raise InvalidRequestError(
            f"the request may grow to {most} tokens, but all {num_pages} pages together hold {num_pages * page_size}"
        )


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
