"""Traces of calls for the contract of a page manager: written by hand to aim at one rule each, or drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

REQUEST_IDS = ("a", "b", "c", "d")
NUM_RANDOM_TRACES = 200
CALLS_PER_TRACE = 25


@dataclass(frozen=True)
class Call:
    """One call of a trace; a call that makes no sense where it stands (to free what is not live) is skipped.

    `number` is the tokens that `extend` should make room for, or the pages to evict (None: all); `expect` the hit that
    `allocate` must return where the rule is about that.
    """

    method: str
    request_id: str = ""
    token_ids: tuple[int, ...] = ()
    number: int | None = None
    expect: int | None = None
    rule: str = ""


@dataclass(frozen=True)
class Trace:
    num_pages: int
    page_size: int
    calls: tuple[Call, ...]


def _serve(request_id: str, token_ids: Sequence[int]) -> tuple[Call, ...]:
    """A request's first step."""
    return (
        Call("allocate", request_id, tuple(token_ids)),
        Call("extend", request_id, number=len(token_ids)),
        Call("step"),
        Call("commit", request_id),
    )


def written_traces(prefix_caching: bool) -> Iterator[Trace]:
    """Traces that aim at one rule each, from the simplest on."""
    for num_tokens in (1, 3, 4, 5, 8):
        yield Trace(4, 4, _serve("a", range(num_tokens)))
    yield Trace(
        4, 2, (*_serve("a", range(3)), *_serve("b", range(5, 8)), Call("free", "a"), *_serve("c", range(9, 13)))
    )
    yield Trace(3, 4, (Call("allocate", "a", (1,) * 20), Call("extend", "a", number=5), Call("extend", "a", number=20)))
    yield Trace(4, 4, (*_serve("a", range(8)), Call("free", "a"), Call("free_again", "a")))
    one_by_one = [Call("extend", r, number=n) for n in range(1, 8) for r in "ab"]
    yield Trace(8, 2, (Call("allocate", "a", (1,) * 7), Call("allocate", "b", (2,) * 7), *one_by_one, Call("step")))
    yield Trace(4, 4, (*_serve("a", range(10)), Call("free", "a"), *_serve("a", range(10))))  # preempted, and back
    yield Trace(4, 4, (*_serve("a", range(10)), *_serve("b", (1, 2)), Call("refill")))
    if not prefix_caching:
        return
    for num_tokens in (7, 8, 9, 13):
        yield Trace(8, 4, (*_serve("a", range(8)), Call("free", "a"), Call("allocate", "b", tuple(range(num_tokens)))))
    yield Trace(8, 2, (*_serve("a", range(5)), *_serve("b", (0, 1, 2, 3, 7)), Call("free", "a"), Call("evict")))
    yield Trace(8, 2, (*_serve("a", (1, 1, 2, 2, 3)), *_serve("b", (9, 9, 2, 2, 3)), *_serve("c", (2, 2, 3))))
    both = [Call(method, r, (0, 1, 2), number=3) for method in ("allocate", "extend") for r in "ab"]
    commits = [Call("commit", r) for r in "ab"]
    yield Trace(8, 2, (*both, Call("step"), *commits, Call("allocate", "c", (0, 1, 2)), Call("free", "b")))
    forget = (Call("free", "a"), Call("evict"), *_serve("b", range(5, 13)), Call("free", "b"))
    yield Trace(4, 2, (*_serve("a", (0, 1, 2)), *forget, Call("allocate", "a", (0, 1, 2))))
    rule = "the least recently used cached page is evicted first"
    three = [
        call for r, token in (("a", 1), ("b", 2), ("c", 3)) for call in (*_serve(r, (token,) * 2), Call("free", r))
    ]
    again = (Call("allocate", "a", (1, 1, 0)), Call("free", "a"), Call("evict", number=1))
    finds = [
        Call("allocate", r, (t, t, 0), expect=hit, rule=rule) for r, t, hit in (("a", 1, 2), ("c", 3, 2), ("b", 2, 0))
    ]
    yield Trace(6, 2, (*three, *again, *finds))
    rule = "the end of a prefix is evicted before its beginning"
    head = Call("allocate", "b", tuple(range(5)), expect=2, rule=rule)
    yield Trace(4, 2, (*_serve("a", range(4)), Call("free", "a"), Call("evict", number=1), head))


def random_traces() -> Iterator[Trace]:
    """Few pages, few requests and prompts over two tokens: sharing, eviction and running out happen all the time."""
    for seed in range(NUM_RANDOM_TRACES):
        rng = random.Random(seed)
        page_size = rng.randint(1, 4)
        prompts = [tuple(rng.randint(0, 1) for _ in range(rng.randint(1, 4 * page_size))) for _ in range(2)]
        calls: list[Call] = []
        while len(calls) < CALLS_PER_TRACE:
            request_id = rng.choice(REQUEST_IDS)
            prompt = rng.choice(prompts)
            prompt = (*prompt[: rng.randint(1, len(prompt))], *(rng.randint(0, 1) for _ in range(rng.randint(0, 2))))
            kind = rng.choice(("serve", "serve", "allocate", "extend", "step", "commit", "free", "free", "evict"))
            if kind == "serve":
                calls += _serve(request_id, prompt)
            else:
                number = rng.choice((None, 1, 2)) if kind == "evict" else rng.randint(1, 4 * page_size)
                calls.append(Call(kind, request_id, prompt, number))
        yield Trace(rng.randint(2, 8), page_size, (*calls, Call("refill")))


def simpler(trace: Trace) -> Iterator[Trace]:
    """Traces with something taken away: calls, in runs of 8 to single ones; then a token, or one of a number."""
    calls = trace.calls
    for length in (8, 4, 2, 1):
        for start in range(0, len(calls) - length + 1, max(length // 2, 1)):
            yield replace(trace, calls=calls[:start] + calls[start + length :])
    for index, call in enumerate(calls):
        if call.expect is not None:
            continue
        if len(call.token_ids) > 1:
            yield replace(
                trace, calls=(*calls[:index], replace(call, token_ids=call.token_ids[:-1]), *calls[index + 1 :])
            )
        if call.number is not None and call.number > 1:
            yield replace(trace, calls=(*calls[:index], replace(call, number=call.number - 1), *calls[index + 1 :]))
