"""Scheduler: which requests get how many tokens in the next step.

Continuous batching (Orca, https://www.usenix.org/conference/osdi22/presentation/yu): the batch is put together anew
for every step, so that a request joins as soon as there is room and leaves as soon as it ends. Prompts are cut into
chunks that share steps with the running decodes (Sarathi-Serve, https://arxiv.org/abs/2403.02310), so that a long
prompt stalls nobody.

The scheduler is pure bookkeeping: it moves requests between a queue and a batch, and asks the page manager for room.
It runs without a model.
"""

from __future__ import annotations

from collections import deque

from minillm.context import Chunk
from minillm.errors import ContractError, OutOfPagesError
from minillm.page_protocol import PageManagerProtocol, check_num_cached
from minillm.protocols import StepPlan
from minillm.request import Request, Status
from minillm.sampling_params import check_fits


class Scheduler:
    """First come, first served, with a budget of tokens per step.

    Each running request gets its next tokens, oldest first; what is left of the budget goes to requests from the
    queue. When pages run out, the youngest running request is preempted: its pages are freed, and it goes back to the
    head of the queue, to be computed again (its prefix may still be cached by then).

    Args:
        page_manager: where room for tokens comes from.
        max_running: at most so many requests in a step.
        max_batch_tokens: at most so many tokens in a step.
    """

    def __init__(self, page_manager: PageManagerProtocol, max_running: int, max_batch_tokens: int):
        self.page_manager = page_manager
        self.max_running, self.max_batch_tokens = max_running, max_batch_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            InvalidRequestError: it could never fit the pool, not even alone.
        """
        pages = self.page_manager
        check_fits(request.num_prompt, request.params, request.max_num_tokens, pages.num_pages, pages.page_size)
        self.waiting.append(request)

    def schedule(self, max_tokens: int | None = None) -> StepPlan:
        """Plan the next step.

        Args:
            max_tokens: a budget below the usual `max_batch_tokens`, to try a step again that was too large.
        """
        budget = self.max_batch_tokens if max_tokens is None else max_tokens
        decodes: list[Request] = []
        prefills: list[tuple[Request, int]] = []  # with how many tokens
        preempted: list[str] = []
        extend = self.page_manager.extend
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_tokens = len(request.token_ids) - request.num_computed
            if num_tokens > budget:
                num_tokens = budget
            try:
                extend(request.request_id, request.num_computed + num_tokens)
            except OutOfPagesError:
                if len(self.running) == 1:
                    raise ContractError(
                        "PageManager", "a request that passed admission fits the pool alone", request.request_id
                    ) from None
                preempted.append(self._preempt_youngest().request_id)
                continue  # the same request again, unless it was the youngest itself
            if num_tokens == 1 and request.num_computed >= request.num_prompt:
                decodes.append(request)
            else:
                prefills.append((request, num_tokens))
            budget -= num_tokens
            index += 1
        num_hit_tokens = 0
        while self.waiting and budget > 0 and len(self.running) < self.max_running and not preempted:
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            num_tokens, num_cached = admitted
            prefills.append((self.running[-1], num_tokens))
            budget -= num_tokens
            num_hit_tokens += num_cached
        return _plan(decodes, prefills, preempted, num_hit_tokens)

    def complete(self, plan: StepPlan) -> None:
        """The plan's tokens have been computed: their K/V are in the pages, where later requests may find them."""
        commit = self.page_manager.commit
        for request, chunk in zip(plan.requests, plan.chunks, strict=True):
            request.num_computed = chunk.end
            commit(chunk.request_id, request.token_ids, chunk.end)

    def finish(self, request: Request) -> None:
        """Forget a request, wherever it stands, and give up its pages. Does nothing for one that is unknown."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.page_manager.free(request.request_id)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def check_invariants(self) -> None:
        """Raise `ContractError` unless the books are in order."""
        for request in self.running:
            if not 0 <= request.num_computed <= request.num_tokens or request.status is not Status.RUNNING:
                raise ContractError("Scheduler", "0 <= num_computed <= num_tokens while running", request.request_id)
            if (
                len(self.page_manager.page_table(request.request_id)) * self.page_manager.page_size
                < request.num_computed
            ):
                raise ContractError("Scheduler", "a running request has pages for what is computed", request.request_id)
        for request in self.waiting:
            if request.num_computed or request.status is not Status.WAITING:
                raise ContractError("Scheduler", "a waiting request has nothing computed", request.request_id)
        if len(self.running) > self.max_running:
            raise ContractError("Scheduler", f"at most {self.max_running} requests run")

    def _admit(self, request: Request, budget: int) -> tuple[int, int] | None:
        """Start a waiting request; returns how many tokens it gets now and found cached; None: no room."""
        num_cached = self.page_manager.allocate(request.request_id, request.token_ids)
        check_num_cached(num_cached, request.num_tokens, self.page_manager.page_size, request.request_id)
        num_tokens = min(request.num_tokens - num_cached, budget)
        try:
            self.page_manager.extend(request.request_id, num_cached + num_tokens)
        except OutOfPagesError:
            self.page_manager.free(request.request_id)
            if not self.running:
                raise ContractError(
                    "PageManager", "with no request running, a request that passed admission fits", request.request_id
                ) from None
            return None
        if request.num_cached is None:
            request.num_cached = num_cached
        request.num_computed = num_cached
        request.status = Status.RUNNING
        self.waiting.popleft()
        self.running.append(request)
        return num_tokens, num_cached

    def _preempt_youngest(self) -> Request:
        request = self.running.pop()
        self.page_manager.free(request.request_id)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        return request


def _plan(
    decodes: list[Request], prefills: list[tuple[Request, int]], preempted: list[str], num_prefix_hit_tokens: int
) -> StepPlan:
    chunks = [Chunk(request.request_id, request.num_computed, request.num_computed + 1) for request in decodes]
    chunks += [Chunk(request.request_id, request.num_computed, request.num_computed + n) for request, n in prefills]
    num_tokens = len(decodes) + sum(n for _, n in prefills)
    requests = decodes + [request for request, _ in prefills]
    return StepPlan(requests, chunks, num_tokens, len(decodes), tuple(preempted), num_prefix_hit_tokens)
