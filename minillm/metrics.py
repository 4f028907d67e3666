"""Metrics: what the engine reports of each step and each request, and who listens.

One record is made per step. Counters, traces and figures are all views of the same records. With nobody listening,
none is made.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from minillm.context import Chunk
from minillm.protocols import StepPlan
from minillm.request import RequestOutput


@dataclass(frozen=True)
class StepRecord:
    """One step of the engine: what it computed, where its time went, and what was left afterwards. Times are in
    seconds."""

    index: int  # counts the steps of the engine, from 0
    start_time: float  # a `time.perf_counter` reading
    schedule_time: float  # deciding what to compute
    prepare_time: float  # CSR arrays, plan, context
    forward_time: float  # the model
    sample_time: float  # drawing tokens, and on a GPU waiting for them
    finish_time: float  # appending tokens, detokenising, ending requests
    chunks: Sequence[Chunk]  # decodes first
    num_decode_tokens: int
    num_prefill_tokens: int
    num_running: int  # after the step
    num_waiting: int
    num_pages_used: int
    num_pages_available: int
    preempted: Sequence[str]
    num_prefix_hit_tokens: int
    finished: Sequence[str]
    error: str | None = None  # the step failed: nothing was computed

    @property
    def total_time(self) -> float:
        return self.schedule_time + self.prepare_time + self.forward_time + self.sample_time + self.finish_time


class Observer(Protocol):
    """Whoever wants to see what the engine does: `LLM(..., observers=[...])`. Methods that are missing are not called.

    An observer that raises is dropped with a warning: watching must not break what is watched.
    """

    def on_step(self, record: StepRecord) -> None:
        """A step has ended."""
        ...

    def on_request_added(self, request_id: str, num_prompt_tokens: int) -> None:
        """A request was accepted."""
        ...

    def on_request_finished(self, output: RequestOutput) -> None:
        """A request has ended, for whatever reason."""
        ...


class Observers:
    """Tells all observers of an event; one that raises is dropped with a warning."""

    def __init__(self, observers: Iterable[Any]):
        self.observers = list(observers)

    def __bool__(self) -> bool:
        return bool(self.observers)

    def tell(self, event: str, *details: Any) -> None:
        """Call the method named `event` of each observer that has one."""
        for observer in tuple(self.observers):
            try:
                method = getattr(observer, event, None)
                if method is not None:
                    method(*details)
            except Exception as error:
                self.observers.remove(observer)
                warnings.warn(f"dropped an observer whose {event} raised {type(error).__name__}: {error}", stacklevel=2)

    def tell_step(
        self,
        index: int,
        plan: StepPlan,
        result: Any,
        moments: tuple[float, float, float],
        scheduler: Any,
        page_manager: Any,
        finished: Sequence[str],
        error: str | None,
    ) -> None:
        """Tell of a step that has just ended.

        `result` is the runner's `StepResult`, or None if the step failed; `moments` is when it started, was scheduled
        and had run; `scheduler` and `page_manager` are None if the engine has died of it.
        """
        started, scheduled, ran = moments
        record = StepRecord(
            index=index,
            start_time=started,
            schedule_time=scheduled - started,
            prepare_time=result.prepare_time if result else 0.0,
            forward_time=result.forward_time if result else ran - scheduled,
            sample_time=result.sample_time if result else 0.0,
            finish_time=time.perf_counter() - ran,
            chunks=tuple(plan.chunks),
            num_decode_tokens=plan.num_decodes,
            num_prefill_tokens=plan.num_tokens - plan.num_decodes,
            num_running=scheduler.num_running if scheduler is not None else 0,
            num_waiting=scheduler.num_waiting if scheduler is not None else 0,
            num_pages_used=page_manager.num_used if page_manager is not None else 0,
            num_pages_available=page_manager.num_available if page_manager is not None else 0,
            preempted=tuple(plan.preempted),
            num_prefix_hit_tokens=plan.num_prefix_hit_tokens,
            finished=tuple(finished),
            error=error,
        )
        self.tell("on_step", record)


class Recorder:
    """Keeps the records: for tests, notebooks and figures.

    Args:
        max_steps: forget the oldest steps beyond so many; None keeps all.
    """

    def __init__(self, max_steps: int | None = None):
        self.steps: deque[StepRecord] = deque(maxlen=max_steps)
        self.outputs: deque[RequestOutput] = deque(maxlen=max_steps)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_request_finished(self, output: RequestOutput) -> None:
        self.outputs.append(output)


class Metrics:
    """Counters and latencies, from records alone; `str()` is a short report, `prometheus()` the exposition format.

    Latencies are kept of the last `window` requests.
    """

    def __init__(self, window: int = 1024):
        self.counters = {
            "steps": 0,
            "prefill_tokens": 0,
            "decode_tokens": 0,
            "prefix_hit_tokens": 0,
            "preemptions": 0,
            "step_errors": 0,
        }
        self.seconds = {"schedule": 0.0, "prepare": 0.0, "forward": 0.0, "sample": 0.0, "finish": 0.0}
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.gauges = {"running": 0, "waiting": 0, "pages_used": 0, "pages_available": 0}
        self.queue_times: deque[float] = deque(maxlen=window)
        self.ttfts: deque[float] = deque(maxlen=window)
        self.inter_token_latencies: deque[float] = deque(maxlen=window)

    def on_step(self, record: StepRecord) -> None:
        self.counters["steps"] += 1
        self.counters["prefill_tokens"] += record.num_prefill_tokens
        self.counters["decode_tokens"] += record.num_decode_tokens
        self.counters["prefix_hit_tokens"] += record.num_prefix_hit_tokens
        self.counters["preemptions"] += len(record.preempted)
        self.counters["step_errors"] += record.error is not None
        for phase in self.seconds:
            self.seconds[phase] += getattr(record, f"{phase}_time")
        self.gauges = {
            "running": record.num_running,
            "waiting": record.num_waiting,
            "pages_used": record.num_pages_used,
            "pages_available": record.num_pages_available,
        }

    def on_request_finished(self, output: RequestOutput) -> None:
        self.finished[output.finish_reason] += 1
        for values, value in (
            (self.queue_times, output.metrics.queue_time),
            (self.ttfts, output.metrics.ttft),
            (self.inter_token_latencies, output.metrics.inter_token_latency),
        ):
            if value is not None:
                values.append(value)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Median and 99th percentile in seconds of queue time, TTFT and inter-token latency."""
        kinds = {
            "queue_time": self.queue_times,
            "ttft": self.ttfts,
            "inter_token_latency": self.inter_token_latencies,
        }
        return {
            name: {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}
            for name, values in kinds.items()
            if values
        }

    def prometheus(self) -> str:
        """The text that a Prometheus server scrapes (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
        lines = []
        for name, value in self.counters.items():
            lines += [f"# TYPE minillm_{name}_total counter", f"minillm_{name}_total {value}"]
        lines.append("# TYPE minillm_phase_seconds_total counter")
        lines += [f'minillm_phase_seconds_total{{phase="{p}"}} {s:.6f}' for p, s in self.seconds.items()]
        lines.append("# TYPE minillm_requests_finished_total counter")
        lines += [f'minillm_requests_finished_total{{reason="{r}"}} {n}' for r, n in self.finished.items()]
        for name, value in self.gauges.items():
            lines += [f"# TYPE minillm_{name} gauge", f"minillm_{name} {value}"]
        for name, percentiles in self.latencies().items():
            lines.append(f"# TYPE minillm_{name}_seconds summary")
            lines += [
                f'minillm_{name}_seconds{{quantile="{float(p[1:]) / 100:g}"}} {seconds:.6f}'
                for p, seconds in percentiles.items()
            ]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        lines = [
            f"{self.counters['steps']} steps, {self.counters['prefill_tokens']} prefill and "
            f"{self.counters['decode_tokens']} decode tokens in {total:.2f} s",
            "  ".join(f"{phase} {100 * s / (total or 1):.0f} %" for phase, s in self.seconds.items()),
        ]
        for name, p in self.latencies().items():
            lines.append(f"{name}: p50 {1e3 * p['p50']:.1f} ms, p99 {1e3 * p['p99']:.1f} ms")
        return "\n".join(lines)


def chrome_trace(steps: Iterable[StepRecord]) -> str:
    """The steps as JSON for https://ui.perfetto.dev or chrome://tracing: a slice per phase, counters for pages and
    queues."""
    events: list[dict[str, Any]] = []
    for record in steps:
        moment = record.start_time
        for phase in ("schedule", "prepare", "forward", "sample", "finish"):
            seconds = getattr(record, f"{phase}_time")
            events.append(
                {
                    "name": phase,
                    "ph": "X",
                    "pid": 0,
                    "tid": 0,
                    "ts": 1e6 * moment,
                    "dur": 1e6 * seconds,
                    "args": {"step": record.index},
                }
            )
            moment += seconds
        for name, values in (
            ("tokens", {"prefill": record.num_prefill_tokens, "decode": record.num_decode_tokens}),
            ("pages", {"used": record.num_pages_used, "available": record.num_pages_available}),
            ("requests", {"running": record.num_running, "waiting": record.num_waiting}),
        ):
            events.append({"name": name, "ph": "C", "pid": 0, "ts": 1e6 * record.start_time, "args": values})
    return json.dumps({"traceEvents": events})
