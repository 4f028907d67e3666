"""The contract of a page manager: the library's class, and any reader's, is put through the same calls.

While a trace of calls runs, a `_Trial` keeps a simple model beside the manager. Its memory stands for the K/V tensors:
a slot holds the tokens up to and including its own, which is all that the K/V of a position depends on. A trace that
breaks a rule is cut down to the smallest one that still breaks the same rule, as property-based testing does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from minillm.context import BatchArrays, Chunk
from minillm.errors import ContractError, OutOfPagesError
from minillm.lab.contract_failure import ContractFailure
from minillm.lab.contract_traces import Call, Trace, random_traces, simpler, written_traces
from minillm.page_protocol import PageManagerProtocol, check_batch_arrays

Factory = Callable[[int, int, bool], PageManagerProtocol]


@dataclass(frozen=True)
class _State:
    """What the protocol shows of a manager."""

    tables: dict[str, list[int]]
    num_used: int
    num_available: int

    def text(self, num_pages: int) -> str:
        marks = ["."] * num_pages
        for request_id, pages in self.tables.items():
            for page in pages:
                if 0 <= page < num_pages:
                    marks[page] = request_id[0].upper() if marks[page] == "." else "*"
        lines = [f"pages {''.join(marks)}  num_used {self.num_used}, num_available {self.num_available}"]
        return "\n".join(["    " + line for line in [*lines, *(f"{r}: {pages}" for r, pages in self.tables.items())]])


def check_page_manager(factory: Factory, prefix_caching: bool = True) -> None:
    """Raise `ContractFailure` unless `factory(num_pages, page_size, prefix_caching)` makes a correct page manager.

    Uses only the methods of `PageManagerProtocol`. The same traces every time; about a second. With
    `prefix_caching=False`, `allocate` must always return 0.
    """
    for trace in (*written_traces(prefix_caching), *random_traces()):
        failure = _failure_of(factory, trace, prefix_caching)
        if failure is not None:
            raise _smallest(factory, trace, prefix_caching, failure) from None


def _failure_of(factory: Factory, trace: Trace, prefix_caching: bool) -> ContractFailure | None:
    try:
        _Trial.start(factory, trace, prefix_caching).run(trace.calls)
    except ContractFailure as failure:
        return failure
    return None


def _smallest(factory: Factory, trace: Trace, prefix_caching: bool, failure: ContractFailure) -> ContractFailure:
    """Take away whatever can go while the same rule is still broken."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in simpler(trace):
            again = _failure_of(factory, candidate, prefix_caching)
            if again is not None and again.rule == failure.rule:
                trace, failure, smaller = candidate, again, True
                break
    return failure


@dataclass
class _Trial:
    """One manager, the calls made to it, and the model of what they must have done."""

    manager: PageManagerProtocol
    num_pages: int
    page_size: int
    prefix_caching: bool
    lines: list[str]
    before: _State = field(default_factory=lambda: _State({}, 0, 0))
    after: _State = field(default_factory=lambda: _State({}, 0, 0))
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_computed: dict[str, int] = field(default_factory=dict)
    memory: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    known: dict[tuple[int, ...], int | None] = field(default_factory=dict)  # prefixes that must be found -> last page
    maybe: set[tuple[int, ...]] = field(default_factory=set)  # prefixes that may have been evicted

    @classmethod
    def start(cls, factory: Factory, trace: Trace, prefix_caching: bool) -> _Trial:
        sizes = (trace.num_pages, trace.page_size, prefix_caching)
        line = f"manager = PageManager(num_pages={sizes[0]}, page_size={sizes[1]}, prefix_caching={sizes[2]})"
        trial = cls(factory(*sizes), *sizes, lines=[line])
        trial.before = trial.after = trial.state()
        trial.require(trial.after.num_available == trial.num_pages, "at first every page is available")
        trial.check_counts()
        return trial

    def run(self, calls: Iterable[Call]) -> None:
        for call in calls:
            getattr(self, call.method)(call)
        for request_id in list(self.tokens):
            self.free(Call("free", request_id))

    # The calls of a trace

    def allocate(self, call: Call) -> None:
        request_id, token_ids, size = call.request_id, call.token_ids, self.page_size
        if request_id in self.tokens:
            return
        self.tokens[request_id], self.num_computed[request_id] = token_ids, 0
        hit = self.call("allocate", request_id, list(token_ids))
        table = self.after.tables[request_id]
        self.require(
            isinstance(hit, int) and hit >= 0, "allocate returns how many tokens are cached", f"it returned {hit!r}"
        )
        self.require(
            hit < len(token_ids), "a prefix hit leaves at least the last token to compute", f"{hit} of {len(token_ids)}"
        )
        self.require(
            self.prefix_caching or hit == 0, "without prefix caching nothing is cached", f"allocate returned {hit}"
        )
        self.require(hit % size == 0, "a prefix hit is of full pages", f"{hit} tokens in pages of {size}")
        self.require(
            len(table) == hit // size, "allocate takes no page but those it shares", f"{hit} tokens in pages {table}"
        )
        for position in range(hit):
            held = self.memory.get((table[position // size], position % size))
            page = table[position // size]
            detail = f"{list(token_ids[: position + 1])} ends in page {page}, which holds {held and list(held)}"
            self.require(
                held == token_ids[: position + 1], "a prefix hit shares pages that hold these very tokens", detail
            )
        expected = 0
        while expected + size < len(token_ids) and token_ids[: expected + size] in self.known:
            expected += size
        self.require(
            hit >= expected,
            "a committed prefix is found again while nothing had to be evicted",
            f"{expected} tokens are cached, {hit} were found",
        )
        for index, found in enumerate(table):
            kept = self.known.get(token_ids[: (index + 1) * size])
            detail = f"it was in page {kept}, and is found in {found}"
            self.require(kept in (None, found), "a block that is cached already keeps its page", detail)
        if call.expect is not None:
            self.require(hit == call.expect, call.rule, f"{call.expect} tokens should be found, {hit} were")
        self.num_computed[request_id] = hit
        self.check_counts()

    def extend(self, call: Call) -> None:
        request_id, num_tokens = call.request_id, call.number or 1
        if request_id not in self.tokens:
            return
        num_needed = -(-num_tokens // self.page_size)
        state = self.state()
        old = state.tables[request_id]
        num_new = max(num_needed - len(old), 0)
        self.expect_eviction(num_new)
        enough = num_new <= state.num_available
        too_few = "extend raises OutOfPagesError when there are too few pages"
        try:
            self.call("extend", request_id, num_tokens, rule="" if enough else too_few)
        except OutOfPagesError:
            self.after = self.state()
            self.require(
                not enough,
                "extend succeeds while enough pages are available",
                f"{num_new} were needed, {state.num_available} available",
            )
            self.require(self.after == self.before, "extend that runs out of pages changes nothing")
            self.lines[-1] += "  # OutOfPagesError"
            return
        self.require(
            enough,
            too_few,
            f"{num_new} were needed, {state.num_available} available",
        )
        table = self.after.tables[request_id]
        self.require(table[: len(old)] == old, "extend keeps the pages that a request has", f"{old} became {table}")
        self.require(
            len(table) * self.page_size >= num_tokens,
            "extend makes room for all tokens",
            f"{len(table)} pages of {self.page_size} for {num_tokens} tokens",
        )
        self.require(
            len(table) == max(num_needed, len(old)),
            "extend takes no page more than it needs",
            f"{len(table)} pages of {self.page_size} for {num_tokens} tokens",
        )
        for page in table[len(old) :]:
            owners = [other for other, pages in self.before.tables.items() if page in pages]
            self.require(not owners, "extend hands out pages that nobody uses", f"page {page} is used by {owners}")
        self.check_counts()

    def step(self, call: Call) -> None:
        """Compute all tokens that have room: build the batch, and write the K/V where it says."""
        size, chunks = self.page_size, []
        for request_id, pages in self.state().tables.items():
            start, end = self.num_computed[request_id], min(len(pages) * size, len(self.tokens[request_id]))
            if start < end:
                chunks.append(Chunk(request_id, start, end))
        if not chunks:
            return
        arrays = self.call("batch_arrays", chunks)
        self.require(isinstance(arrays, BatchArrays), "batch_arrays returns BatchArrays", f"it returned {arrays!r}")
        try:
            check_batch_arrays(arrays, chunks, self.num_pages, size)
        except ContractError as error:
            rule, _, detail = error.rule.partition(": ")
            self.require(False, rule, detail)
        for index, (request_id, start, end) in enumerate(chunks):
            pages = arrays.kv_indices[arrays.kv_indptr[index] : arrays.kv_indptr[index + 1]].tolist()
            expected = self.after.tables[request_id][: len(pages)]
            self.require(
                pages == expected,
                "kv_indices lists each request's pages in order of position",
                f"for {request_id!r} {pages} instead of {expected}",
            )
            for position in range(start, end):
                self.memory[(pages[position // size], position % size)] = self.tokens[request_id][: position + 1]
            self.num_computed[request_id] = end
        self.check_counts()

    def commit(self, call: Call) -> None:
        request_id = call.request_id
        if request_id not in self.tokens or self.num_computed[request_id] == 0:
            return
        token_ids, end = self.tokens[request_id], self.num_computed[request_id]
        self.call("commit", request_id, list(token_ids), end)
        self.require(self.after == self.before, "commit changes no page table and no count")
        table = self.after.tables[request_id]
        for stop in range(self.page_size, end + 1, self.page_size) if self.prefix_caching else ():
            prefix = token_ids[:stop]
            self.known.setdefault(prefix, None if prefix in self.maybe else table[stop // self.page_size - 1])

    def free(self, call: Call) -> None:
        request_id = call.request_id
        if request_id not in self.tokens:
            return
        del self.tokens[request_id], self.num_computed[request_id]
        self.call("free", request_id)
        used = {page for pages in self.after.tables.values() for page in pages}
        self.require(
            self.after.num_used == len(used),
            "free gives back every page that no other request uses",
            f"{len(used)} pages are in use, num_used is {self.after.num_used}",
        )
        self.check_counts()

    def refill(self, call: Call) -> None:
        """End every request; one alone must then be able to have all pages."""
        for request_id in list(self.tokens):
            self.free(Call("free", request_id))
        self.allocate(Call("allocate", "z", (9,) * self.num_pages * self.page_size))
        self.extend(Call("extend", "z", number=self.num_pages * self.page_size))

    def free_again(self, call: Call) -> None:
        self.before, raised = self.after, None
        self.lines.append(f"manager.free({call.request_id!r})")
        try:
            self.manager.free(call.request_id)
        except Exception as error:
            raised = error
        rule = "free raises KeyError for a request that is not live, and changes nothing"
        self.require(isinstance(raised, KeyError), rule, f"it raised {raised!r}" if raised else "it raised nothing")
        self.after = self.state()
        self.require(self.after == self.before, rule)

    def evict(self, call: Call) -> None:
        used = {page for pages in self.state().tables.values() for page in pages}
        for prefix in [prefix for prefix, page in self.known.items() if page not in used]:
            self.maybe.add(prefix)
            del self.known[prefix]
        num_evicted = self.call("evict", call.number)
        limit = self.num_pages if call.number is None else call.number
        whole = isinstance(num_evicted, int) and 0 <= num_evicted <= limit
        self.require(whole, "evict returns how many pages it has forgotten", f"it returned {num_evicted!r}")
        self.require(
            self.after.num_used == self.before.num_used,
            "evict never takes a page that a request uses",
            f"num_used was {self.before.num_used} and is {self.after.num_used}",
        )
        self.check_counts()

    # What holds after each call

    def state(self) -> _State:
        try:
            tables = {
                request_id: [int(page) for page in self.manager.page_table(request_id)] for request_id in self.tokens
            }
            return _State(tables, int(self.manager.num_used), int(self.manager.num_available))
        except NotImplementedError:
            raise
        except Exception as error:
            self.fail("page_table, num_used and num_available answer at any time", f"{type(error).__name__}: {error}")

    def call(self, method: str, *arguments: Any, rule: str = "") -> Any:
        """Make one call; check what must hold after any call."""
        self.before = self.after
        self.lines.append(f"manager.{method}({', '.join(map(_shown, arguments))})")
        try:
            result = getattr(self.manager, method)(*arguments)
        except (NotImplementedError, OutOfPagesError):
            raise
        except Exception as error:
            self.fail(rule or f"{method} serves every sensible call", f"it raised {type(error).__name__}: {error}")
        self.after = self.state()
        if result is not None and not isinstance(result, BatchArrays):
            self.lines[-1] += f"  # {result}"
        for request_id, pages in self.after.tables.items():
            inside = all(0 <= page < self.num_pages for page in pages) and len(set(pages)) == len(pages)
            self.require(inside, "a page table names pages of the pool, each once", f"{request_id!r} has {pages}")
            if arguments[0] != request_id:
                old = self.before.tables[request_id]
                self.require(
                    pages == old,
                    "a call leaves the page tables of other requests alone",
                    f"that of {request_id!r} was {old} and is {pages}",
                )
        return result

    def check_counts(self) -> None:
        state = self.after
        used = {page for pages in state.tables.values() for page in pages}
        self.require(
            state.num_used == len(used),
            "num_used counts the pages that page tables name",
            f"{len(used)} are named, num_used is {state.num_used}",
        )
        self.require(
            state.num_used + state.num_available == self.num_pages,
            "every page is either used or available",
            f"{state.num_used} + {state.num_available} is not {self.num_pages}",
        )
        for request_id, pages in state.tables.items():
            for position in range(self.num_computed[request_id]):
                held = self.memory.get((pages[position // self.page_size], position % self.page_size))
                self.require(
                    held == self.tokens[request_id][: position + 1],
                    "what a request has written stays until it is freed",
                    f"position {position} of {request_id!r} is lost",
                )

    def expect_eviction(self, num_new: int) -> None:
        """If so many new pages may cost cached ones, nobody knows any more which prefixes will be found."""
        used = {page for pages in self.state().tables.values() for page in pages}
        held = used | {page for page in self.known.values() if page is not None}
        unsure = len(self.maybe) + sum(page is None for page in self.known.values())
        if len(held) + unsure + num_new > self.num_pages:
            for prefix in [prefix for prefix, page in self.known.items() if page not in used]:
                self.maybe.add(prefix)
                del self.known[prefix]

    def require(self, holds: bool, rule: str, detail: str = "") -> None:
        if not holds:
            self.fail(rule, detail)

    def fail(self, rule: str, detail: str) -> NoReturn:
        before, after = self.before.text(self.num_pages), self.after.text(self.num_pages)
        raise ContractFailure(rule, detail, self.lines, before, after)


def _shown(argument: Any) -> str:
    if isinstance(argument, list) and argument and isinstance(argument[0], Chunk):
        return "[" + ", ".join(f"Chunk({c.request_id!r}, {c.start}, {c.end})" for c in argument) + "]"
    if isinstance(argument, list) and len(argument) > 8 and len(set(argument)) == 1:
        return f"[{argument[0]}] * {len(argument)}"
    return repr(argument)
