"""Scheduler, without a model: who gets how many tokens in which step, and that everybody is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minillm import SamplingParams
from minillm.context import Chunk
from minillm.errors import ContractError, InvalidRequestError
from minillm.page_manager import PageManager
from minillm.protocols import StepPlan
from minillm.request import Request, Status
from minillm.scheduler import Scheduler

NEW_TOKEN = 7


def request(name: str, num_prompt: int, max_tokens: int = 8, token_ids: Sequence[int] | None = None) -> Request:
    ids = (
        list(token_ids) if token_ids is not None else [crc32(f"{name} {i}".encode()) % 1000 for i in range(num_prompt)]
    )
    return Request(name, ids, SamplingParams(max_tokens=max_tokens), max_num_tokens=10_000)


def scheduler(
    num_pages: int = 64, page_size: int = 4, max_running: int = 8, max_batch_tokens: int = 16, caching: bool = False
) -> Scheduler:
    return Scheduler(PageManager(num_pages, page_size, caching), max_running, max_batch_tokens)


def compute(books: Scheduler, plan: StepPlan) -> list[Request]:
    """What the engine does with a plan, but for the model: every request that has all computed gets a token."""
    books.complete(plan)
    ended = []
    for planned, chunk in zip(plan.requests, plan.chunks, strict=True):
        if chunk.end == planned.num_tokens:
            planned.token_ids.append(NEW_TOKEN)
            if planned.stop_reason() is not None:
                books.finish(planned)
                ended.append(planned)
    return ended


def check_plan(books: Scheduler, plan: StepPlan, budget: int) -> None:
    """What holds for every plan."""
    assert plan.num_tokens == sum(chunk.end - chunk.start for chunk in plan.chunks) <= budget
    assert 0 < len(plan.chunks) == len(plan.requests) <= books.max_running
    assert len({planned.request_id for planned in plan.requests}) == len(plan.requests)
    for index, (planned, chunk) in enumerate(zip(plan.requests, plan.chunks, strict=True)):
        assert chunk.request_id == planned.request_id and planned.status is Status.RUNNING
        assert planned.num_computed == chunk.start < chunk.end <= planned.num_tokens
        if index < plan.num_decodes:
            assert chunk.start >= planned.num_prompt and chunk.end - chunk.start == 1
        else:  # one that comes back from a preemption counts as prefill, also if all but its last token is cached
            assert chunk.start < planned.num_prompt or planned.num_preemptions
    assert not {planned.request_id for planned in plan.requests} & set(plan.preempted)
    books.check_invariants()
    books.page_manager.check_invariants()


def step(books: Scheduler) -> tuple[StepPlan, list[Request]]:
    plan = books.schedule()
    check_plan(books, plan, books.max_batch_tokens)
    return plan, compute(books, plan)


def chunks(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [tuple(chunk) for chunk in plan.chunks]


def test_an_idle_scheduler_plans_nothing() -> None:
    plan = scheduler().schedule()
    assert not plan and plan.num_tokens == plan.num_decodes == 0 and plan.preempted == ()


def test_first_come_first_served_within_the_budget() -> None:
    books = scheduler(max_batch_tokens=16)
    for name, num_prompt in (("a", 5), ("b", 9), ("c", 6), ("d", 1)):
        books.add(request(name, num_prompt))
    assert books.num_waiting == 4 and books.num_running == 0
    # A prompt is cut where the budget ends, and nobody overtakes.
    assert chunks(step(books)[0]) == [("a", 0, 5), ("b", 0, 9), ("c", 0, 2)]
    assert books.num_waiting == 1 and books.num_running == 3
    # Decodes come first, and the rest of the prompt shares their step; then there is room for the next one.
    plan, _ = step(books)
    assert chunks(plan) == [("a", 5, 6), ("b", 9, 10), ("c", 2, 6), ("d", 0, 1)] and plan.num_decodes == 2
    plan, _ = step(books)
    assert plan.num_decodes == 4 and plan.num_tokens == 4


def test_a_long_prompt_stalls_nobody() -> None:
    books = scheduler(max_batch_tokens=8)
    books.add(request("short", 3, max_tokens=20))
    books.add(request("long", 60))
    plans = [step(books)[0] for _ in range(10)]
    assert all("short" in {planned.request_id for planned in plan.requests} for plan in plans)
    assert [plan.num_tokens for plan in plans[:9]] == [8] * 8 + [1 + 60 - 5 - 7 * 7]
    ends = [chunk.end for plan in plans for chunk in plan.chunks if chunk.request_id == "long"]
    assert ends == [5, 12, 19, 26, 33, 40, 47, 54, 60, 61]


def test_at_most_max_running_requests_share_a_step() -> None:
    books = scheduler(max_running=2)
    for name in "abc":
        books.add(request(name, 2, max_tokens=2))
    assert [chunk[0] for chunk in chunks(step(books)[0])] == ["a", "b"]
    _, ended = step(books)
    assert [r.request_id for r in ended] == ["a", "b"]
    assert chunks(step(books)[0]) == [("c", 0, 2)]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    books = scheduler(num_pages=4, page_size=4, max_running=8)
    old, young = request("old", 8, max_tokens=8), request("young", 8, max_tokens=8)
    books.add(old), books.add(young)
    step(books)  # both fill their two pages
    books.add(request("later", 1, max_tokens=1))
    plan, _ = step(books)  # old needs a third page
    assert plan.preempted == ("young",) and chunks(plan) == [("old", 8, 9)]
    assert young.status is Status.WAITING and young.num_computed == 0 and young.num_preemptions == 1
    assert [waiting.request_id for waiting in books.waiting] == ["young", "later"]
    assert young.token_ids[-1] == NEW_TOKEN  # what it has drawn it keeps; only K/V are computed again
    order = []
    while books.num_running or books.num_waiting:
        order += [ended.request_id for ended in step(books)[1]]
    assert order == ["old", "later", "young"]  # later, of one token, came into the same step as young
    assert young.num_output == 8 and old.num_preemptions == 0
    assert books.page_manager.num_used == 0


def test_nobody_is_admitted_into_the_pages_that_a_preemption_freed() -> None:
    books = scheduler(num_pages=4, page_size=4)
    books.add(request("old", 8)), books.add(request("young", 8))
    step(books)
    books.add(request("tiny", 1, max_tokens=1))  # would fit where young was, and make old run out again
    plan, _ = step(books)
    assert plan.preempted and [chunk.request_id for chunk in plan.chunks] == ["old"]


def test_the_only_request_preempts_nobody() -> None:
    books = scheduler(num_pages=4, page_size=4)
    books.add(request("a", 9, max_tokens=8))  # 17 tokens, of which 16 are ever computed
    preempted = []
    while books.num_running or books.num_waiting:
        preempted += step(books)[0].preempted
    assert not preempted


def test_what_could_never_fit_is_refused() -> None:
    books = scheduler(num_pages=4, page_size=4)
    books.add(request("fits", 9, max_tokens=8))
    for num_prompt, max_tokens in ((9, 9), (17, 1), (18, 1), (1, 17)):
        if num_prompt + max_tokens - 1 > 16:
            with pytest.raises(InvalidRequestError, match=f"{num_prompt + max_tokens} tokens.*hold 16"):
                books.add(request("large", num_prompt, max_tokens))
    limited = request("limited", 9, max_tokens=1000)
    limited.max_num_tokens = 17  # judged by the smaller of what it may and what it wants
    books.add(limited)
    assert books.num_waiting == 2


def test_a_smaller_budget_for_one_step() -> None:
    """What the engine asks for after a step that was too large: the same work again, in smaller pieces."""
    books = scheduler(max_batch_tokens=16)
    books.add(request("a", 10)), books.add(request("b", 6))
    assert books.schedule().num_tokens == 16
    for budget in (8, 4, 1):
        plan = books.schedule(budget)
        check_plan(books, plan, budget)
        assert plan.num_tokens == budget
    assert chunks(plan) == [("a", 0, 1)]
    compute(books, plan)
    assert chunks(step(books)[0]) == [("a", 1, 10), ("b", 0, 6)]


def test_a_prefix_hit_is_not_computed_again() -> None:
    books = scheduler(page_size=4, max_batch_tokens=64, caching=True)
    tokens = list(range(100, 116))
    first, second = request("a", 0, 1, tokens), request("b", 0, 1, tokens)
    books.add(first)
    plan, _ = step(books)
    assert plan.num_prefix_hit_tokens == 0 and first.num_cached == 0
    books.add(second)
    plan, _ = step(books)
    assert chunks(plan) == [("b", 12, 16)]  # the last token must be computed, so its page is not shared
    assert plan.num_prefix_hit_tokens == second.num_cached == 12


def test_a_preempted_request_finds_its_own_prefix_but_reports_its_first_admission() -> None:
    books = scheduler(num_pages=6, page_size=4, max_batch_tokens=64, caching=True)
    old, young = request("old", 8, max_tokens=6), request("young", 12, max_tokens=6)
    books.add(old), books.add(young)
    hits = []
    while books.num_running or books.num_waiting:
        hits.append(step(books)[0].num_prefix_hit_tokens)
    assert young.num_preemptions > 0 and young.num_cached == 0
    assert sum(hits) > 0


def test_finish_wherever_a_request_stands() -> None:
    books = scheduler(max_running=1)
    running, waiting, unknown = request("a", 4), request("b", 4), request("c", 4)
    books.add(running), books.add(waiting)
    step(books)
    assert books.page_manager.num_used > 0
    for ended in (running, waiting, unknown, running):
        books.finish(ended)
        assert ended.status is Status.FINISHED
        books.check_invariants()
    assert books.num_running == books.num_waiting == books.page_manager.num_used == 0


class CountingPages(PageManager):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self.calls = 0

    def allocate(self, request_id: str, token_ids: Sequence[int]) -> int:
        self.calls += 1
        return super().allocate(request_id, token_ids)

    def extend(self, request_id: str, num_tokens: int) -> None:
        self.calls += 1
        super().extend(request_id, num_tokens)


@pytest.mark.parametrize("full", ["pages", "places", "budget"])
def test_the_length_of_the_queue_costs_nothing(full: str) -> None:
    """A step looks at one waiting request that has no room, not at all of them."""
    calls = []
    for num_waiting in (1, 2000):
        pages = CountingPages(4 if full == "pages" else 8, 4, False)
        books = Scheduler(pages, 2 if full == "places" else 100, 9 if full == "budget" else 100)
        for i in range(2 + num_waiting):
            books.add(request(str(i), 7, max_tokens=2))
        step(books)
        pages.calls = 0
        step(books)
        assert books.num_waiting >= num_waiting - 2
        calls.append(pages.calls)
    assert calls[0] <= calls[1] <= 6


def test_broken_pages_are_named() -> None:
    class NoRoom(PageManager):
        def extend(self, request_id: str, num_tokens: int) -> None:
            super().extend(request_id, num_tokens + 1000)

    books = Scheduler(NoRoom(4, 4, False), 8, 16)
    books.add(request("a", 4))
    with pytest.raises(ContractError, match="PageManager") as caught:
        books.schedule()
    assert caught.value.request_id == "a"

    class TooMuch(PageManager):
        def allocate(self, request_id: str, token_ids: Sequence[int]) -> int:
            super().allocate(request_id, token_ids)
            return len(token_ids)

    books = Scheduler(TooMuch(4, 4, False), 8, 16)
    books.add(request("a", 4))
    with pytest.raises(ContractError, match="at least the last token"):
        books.schedule()


def test_check_invariants_notices() -> None:
    def broken(**changes: Any) -> Scheduler:
        books = scheduler(max_running=2)
        for name in "abc":
            books.add(request(name, 4))
        step(books)
        for path, value in changes.items():
            which, _, attribute = path.partition("__")
            setattr(getattr(books, which)[0], attribute, value)
        return books

    broken().check_invariants()
    for changes in (
        {"running__num_computed": 6},
        {"running__num_computed": -1},
        {"running__status": Status.WAITING},
        {"waiting__num_computed": 1},
        {"waiting__status": Status.RUNNING},
    ):
        with pytest.raises(ContractError, match="Scheduler"):
            broken(**changes).check_invariants()
    books = broken()
    books.max_running = 1
    with pytest.raises(ContractError, match="at most 1"):
        books.check_invariants()
    books = broken()
    books.running[0].token_ids += [1] * 10
    books.running[0].num_computed = 12  # more than its pages hold
    with pytest.raises(ContractError, match="pages for what is computed"):
        books.check_invariants()


class Serving(RuleBasedStateMachine):
    """Requests arrive, are aborted, steps run: the rules hold after each, and in the end everybody has been served."""

    @initialize(
        num_pages=st.integers(4, 24),
        page_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 6),
        budget=st.integers(0, 12),
        caching=st.booleans(),
    )
    def begin(self, num_pages: int, page_size: int, max_running: int, budget: int, caching: bool) -> None:
        self.books = scheduler(num_pages, page_size, max_running, max_running + budget, caching)
        self.most = num_pages * page_size + 1
        self.arrived: list[Request] = []
        self.ended: list[Request] = []
        self.admitted: list[str] = []

    @rule(num_prompt=st.integers(1, 20), max_tokens=st.integers(1, 12), alike=st.booleans())
    def add(self, num_prompt: int, max_tokens: int, alike: bool) -> None:
        name = f"r{len(self.arrived)}"
        new = request(name, num_prompt, max_tokens, range(num_prompt) if alike else None)
        if num_prompt + max_tokens > self.most:
            with pytest.raises(InvalidRequestError):
                self.books.add(new)
        else:
            self.books.add(new)
            self.arrived.append(new)

    @rule(index=st.integers(0, 100))
    def abort(self, index: int) -> None:
        alive = [r for r in self.arrived if r.status is not Status.FINISHED]
        if alive:
            self.books.finish(alive[index % len(alive)])

    @rule(share=st.sampled_from([None, None, None, 1, 2]))
    def step(self, share: int | None) -> None:
        if not self.books.num_running and not self.books.num_waiting:
            assert not self.books.schedule()
            return
        alive = [r for r in self.arrived if r.status is not Status.FINISHED]
        oldest = min(self.books.running or alive, key=self.arrived.index)
        budget = self.books.max_batch_tokens
        if share is not None:  # a step that failed and is tried again, smaller
            budget = max(1, self.books.schedule().num_tokens // (2 * share))
        plan = self.books.schedule(budget)
        check_plan(self.books, plan, budget)
        # No starvation: the first of those that run makes progress in every step.
        assert oldest in plan.requests
        for planned in plan.requests:
            if planned.request_id not in self.admitted:
                self.admitted.append(planned.request_id)
        self.ended += compute(self.books, plan)

    @precondition(lambda self: self.books.num_running or self.books.num_waiting)
    @rule()
    def several_steps(self) -> None:
        for _ in range(5):
            self.step(None)

    @invariant()
    def books_are_in_order(self) -> None:
        if not hasattr(self, "books"):
            return
        self.books.check_invariants()
        self.books.page_manager.check_invariants()
        alive = [r for r in self.arrived if r.status is not Status.FINISHED]
        assert len(alive) == self.books.num_running + self.books.num_waiting
        # First come, first served: whoever came earlier was admitted earlier.
        order = [int(name[1:]) for name in self.admitted]
        assert order == sorted(order)
        if not self.books.num_running:
            assert self.books.page_manager.num_used == 0

    def teardown(self) -> None:
        if not hasattr(self, "books"):
            return
        alive = [r for r in self.arrived if r.status is not Status.FINISHED]
        # Even if each had to be computed again for every token, this many steps would do.
        bound = sum((r.num_tokens + r.params.max_tokens) * (1 + r.params.max_tokens) for r in alive) + 1
        for _ in range(bound):
            if not self.books.num_running and not self.books.num_waiting:
                break
            self.step(None)
        assert all(r.status is Status.FINISHED for r in self.arrived)
        assert all(r.num_output == r.params.max_tokens for r in self.ended)
        assert self.books.page_manager.num_used == 0
        self.books.page_manager.check_invariants()


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(0, 20),
)
def test_every_token_is_computed_once_without_preemption(
    sizes: list[tuple[int, int]], max_running: int, extra: int
) -> None:
    books = scheduler(num_pages=400, page_size=4, max_running=max_running, max_batch_tokens=max_running + extra)
    for i, (num_prompt, max_tokens) in enumerate(sizes):
        books.add(request(f"r{i}", num_prompt, max_tokens))
    computed: list[Chunk] = []
    while books.num_running or books.num_waiting:
        plan = books.schedule()
        check_plan(books, plan, books.max_batch_tokens)
        assert not plan.preempted
        # The budget is used up, unless nobody waits or nobody may join.
        assert plan.num_tokens == books.max_batch_tokens or not books.num_waiting or books.num_running == max_running
        compute(books, plan)
        computed += plan.chunks
    for i, (num_prompt, max_tokens) in enumerate(sizes):
        covered = [position for c in computed if c.request_id == f"r{i}" for position in range(c.start, c.end)]
        assert covered == list(range(num_prompt + max_tokens - 1))
