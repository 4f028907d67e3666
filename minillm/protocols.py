"""What the engine asks of a scheduler and of a sampler, and what they hand over. (Page managers: `page_protocol`.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minillm.context import Chunk
from minillm.request import Request


@dataclass(frozen=True)
class StepPlan:
    """What one step computes: `chunks[i]` is of `requests[i]`; decodes come before prefill chunks.

    Rows of a request whose chunk reaches its last token give logits, of which the next token is drawn.
    """

    requests: Sequence[Request]
    chunks: Sequence[Chunk]
    num_tokens: int
    num_decodes: int  # the first so many chunks are one token of a request past its prompt
    preempted: Sequence[str] = ()  # ids of requests put back to the queue while planning
    num_prefix_hit_tokens: int = 0  # tokens that requests admitted in this step found in the prefix cache

    def __bool__(self) -> bool:
        return bool(self.chunks)


class SchedulerProtocol(Protocol):
    """What the engine asks of a scheduler: implement these and pass the class as `LLM(..., scheduler=...)`.

    It is made as `Scheduler(page_manager, max_running=, max_batch_tokens=)`.
    """

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    def add(self, request: Request) -> None:
        """Take a new request."""
        ...

    def schedule(self, max_tokens: int | None = None) -> StepPlan:
        """Plan the next step, with at most `max_tokens` tokens; an empty plan when there is nothing to do."""
        ...

    def complete(self, plan: StepPlan) -> None:
        """Take note that the plan's tokens have been computed."""
        ...

    def finish(self, request: Request) -> None:
        """Forget a request, wherever it stands, and give up its pages."""
        ...


@dataclass(frozen=True)
class SampledTokens:
    """What was drawn for each row: plain lists, on the host."""

    token_ids: list[int]
    is_valid: list[bool]  # False: the row's logits are not finite numbers, its token means nothing
    logprobs: list[dict[int, float] | None]  # of the rows whose request asks for them


class SamplerProtocol(Protocol):
    """What the engine asks of a sampler: implement this and pass the class as `LLM(..., sampler=...)`.

    It is made as `Sampler(vocab_size)`.
    """

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
        """Draw the next token of each request from its row of `logits` `[len(requests), vocab_size]`."""
        ...
