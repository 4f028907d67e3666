"""PageManager: each rule alone, then all in any order against a simple model. KVPool: where tokens are written."""

import re
import timeit
import types

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from minillm.context import BatchArrays, Chunk, InferenceContext
from minillm.errors import ConfigError, ContractError, OutOfPagesError
from minillm.page_manager import KVPool, PageManager
from minillm.page_protocol import PageManagerProtocol, check_batch_arrays, check_num_cached


def serve(manager: PageManagerProtocol, request_id: str, token_ids: list[int]) -> int:
    """A request's first step: all of its tokens are computed."""
    num_cached = manager.allocate(request_id, token_ids)
    manager.extend(request_id, len(token_ids))
    manager.commit(request_id, token_ids, len(token_ids))
    return num_cached


def counts(manager: PageManager) -> tuple[int, int, int]:
    manager.check_invariants()
    assert manager.num_available == manager.num_free + manager.num_cached
    assert manager.num_free + manager.num_cached + manager.num_used == manager.num_pages
    return manager.num_used, manager.num_cached, manager.num_free


# Construction


@pytest.mark.parametrize("name", ["num_pages", "page_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "16", None, True, 10**15])
def test_options_are_validated_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        PageManager(**{"num_pages": 8, "page_size": 4, name: value})


def test_numpy_integers_are_integers():
    assert PageManager(np.int64(8), np.int32(4)).num_pages == 8


# Tables and room


def test_allocate_takes_no_page():
    manager = PageManager(4, 4)
    assert manager.allocate("a", [1, 2, 3]) == 0
    assert counts(manager) == (0, 0, 4)
    assert manager.request_ids == ("a",)
    assert len(manager.page_table("a")) == 0


def test_allocate_refuses_a_live_id_and_no_tokens():
    manager = PageManager(4, 4)
    manager.allocate("a", [1])
    with pytest.raises(ValueError, match="'a'"):
        manager.allocate("a", [1])
    with pytest.raises(ValueError, match="no tokens"):
        manager.allocate("b", [])
    assert manager.request_ids == ("a",)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_extend_takes_just_enough_pages(num_tokens, num_pages):
    manager = PageManager(4, 4)
    manager.allocate("a", [0] * num_tokens)
    manager.extend("a", num_tokens)
    assert len(manager.page_table("a")) == num_pages
    manager.extend("a", 1)  # there is room already
    assert len(manager.page_table("a")) == num_pages
    assert counts(manager) == (num_pages, 0, 4 - num_pages)


def test_extend_is_all_or_nothing():
    manager = PageManager(4, 4)
    manager.allocate("a", [0] * 8)
    manager.extend("a", 8)
    manager.allocate("b", [1] * 12)
    with pytest.raises(OutOfPagesError, match="'b' needs 3 more pages for 12 tokens; 2 of 4"):
        manager.extend("b", 12)
    assert len(manager.page_table("b")) == 0
    assert counts(manager) == (2, 0, 2)


def test_a_failed_extend_evicts_nothing():
    manager = PageManager(4, 4)
    serve(manager, "a", [0] * 8)
    manager.free("a")
    manager.allocate("b", [1] * 20)
    with pytest.raises(OutOfPagesError):
        manager.extend("b", 20)
    assert counts(manager) == (0, 2, 2)


def test_page_table_is_a_copy():
    manager = PageManager(4, 4)
    serve(manager, "a", [1] * 8)
    table = manager.page_table("a")
    assert table.dtype == np.int32
    table[:] = 99
    manager.check_invariants()
    assert 99 not in manager.page_table("a")


def test_free_returns_every_page():
    manager = PageManager(4, 4, prefix_caching=False)
    serve(manager, "a", [1] * 16)
    manager.free("a")
    assert counts(manager) == (0, 0, 4)
    assert manager.request_ids == ()


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.extend("x", 1),
        lambda m: m.commit("x", [1], 1),
        lambda m: m.free("x"),
        lambda m: m.page_table("x"),
        lambda m: m.batch_arrays([Chunk("x", 0, 1)]),
    ],
)
def test_an_unknown_request_is_named(call):
    manager = PageManager(4, 4)
    serve(manager, "x", [1])
    manager.free("x")
    with pytest.raises(KeyError, match="no live request 'x'"):
        call(manager)
    manager.check_invariants()


def test_many_requests_and_long_ones_grow_the_tables():
    manager = PageManager(2000, 1)
    for index in range(40):
        serve(manager, f"r{index}", [index] * (index + 1))
    serve(manager, "long", list(range(1000, 2000)))
    assert len(manager.page_table("long")) == 1000
    assert [len(manager.page_table(f"r{index}")) for index in range(40)] == list(range(1, 41))
    counts(manager)
    for request_id in manager.request_ids:
        manager.free(request_id)
    assert manager.num_used == 0
    counts(manager)


# The prefix cache


def test_a_finished_request_leaves_its_full_pages_cached():
    manager = PageManager(8, 4)
    assert serve(manager, "a", list(range(10))) == 0
    table = manager.page_table("a").tolist()
    manager.free("a")
    assert counts(manager) == (0, 2, 6)
    assert manager.allocate("b", list(range(10))) == 8
    assert manager.page_table("b").tolist() == table[:2]
    assert counts(manager) == (2, 0, 6)


def test_live_requests_share_pages_and_reference_counts_add_up():
    manager = PageManager(8, 4)
    serve(manager, "a", list(range(9)))
    assert serve(manager, "b", [*range(8), 77, 78]) == 8
    assert manager.page_table("a")[:2].tolist() == manager.page_table("b")[:2].tolist()
    assert [manager.reference_count(page) for page in manager.page_table("b")] == [2, 2, 1]
    assert counts(manager) == (4, 0, 4)
    manager.free("a")
    assert [manager.reference_count(page) for page in manager.page_table("b")] == [1, 1, 1]
    assert counts(manager) == (3, 0, 5)


@pytest.mark.parametrize(
    ("num_tokens", "hit"), [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12), (20, 12)]
)
def test_a_hit_leaves_the_last_token_to_compute(num_tokens, hit):
    manager = PageManager(16, 4)
    serve(manager, "a", list(range(12)))
    assert manager.allocate("b", list(range(num_tokens))) == hit


def test_only_a_whole_prefix_is_a_hit():
    manager = PageManager(16, 4)
    serve(manager, "a", [1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert manager.allocate("same second block, other first block", [9, 9, 9, 9, 2, 2, 2, 2, 3]) == 0
    assert manager.allocate("second block first", [2, 2, 2, 2, 3]) == 0
    assert manager.allocate("first block", [1, 1, 1, 1, 7, 7, 7, 7]) == 4


def test_only_committed_tokens_are_found():
    manager = PageManager(16, 4)
    tokens = list(range(12))
    manager.allocate("a", tokens)
    manager.extend("a", 12)
    assert manager.allocate("b", tokens) == 0
    manager.commit("a", tokens, 7)
    assert manager.allocate("c", tokens) == 4
    manager.commit("a", tokens, 12)
    assert manager.allocate("d", tokens) == 8
    assert manager.allocate("e", [*tokens, 12]) == 12


def test_the_chain_goes_on_behind_a_hit():
    manager = PageManager(16, 4)
    serve(manager, "a", list(range(5)))
    assert serve(manager, "b", list(range(12))) == 4
    assert manager.allocate("c", list(range(13))) == 12
    assert manager.allocate("d", [*range(4, 12), 12]) == 0  # what follows the prefix is not a prefix


def test_generated_tokens_are_cached_too():
    manager = PageManager(16, 4)
    tokens = [1, 2, 3]
    serve(manager, "a", tokens)
    for token in range(4, 9):
        tokens.append(token)
        manager.extend("a", len(tokens))
        manager.commit("a", tokens, len(tokens))
    manager.free("a")
    assert manager.allocate("next turn", [*range(1, 9), 50]) == 8


def test_a_preempted_request_finds_its_own_pages():
    manager = PageManager(16, 4)
    serve(manager, "a", list(range(10)))
    manager.free("a")
    assert serve(manager, "a", list(range(10))) == 8
    assert counts(manager) == (3, 0, 13)


def test_a_block_that_is_cached_already_keeps_its_page():
    manager = PageManager(16, 4)
    tokens = list(range(9))
    for request_id in "ab":  # both are computed in the same step: neither can find the other
        assert manager.allocate(request_id, tokens) == 0
        manager.extend(request_id, 9)
    for request_id in "ab":
        manager.commit(request_id, tokens, 9)
    first, second = manager.page_table("a"), manager.page_table("b")
    assert not set(first) & set(second)
    assert manager.allocate("c", tokens) == 8
    assert manager.page_table("c").tolist() == first[:2].tolist()
    manager.free("b")
    assert counts(manager) == (3, 0, 13)  # private pages are free again, not cached
    manager.free("a")
    manager.free("c")
    assert counts(manager) == (0, 2, 14)


def test_blocks_behind_a_private_page_are_found():
    manager = PageManager(16, 2)
    for request_id, tokens in (("a", [1, 2]), ("b", [1, 2, 3, 4])):
        manager.allocate(request_id, tokens)
        manager.extend(request_id, len(tokens))
    manager.commit("a", [1, 2], 2)
    manager.commit("b", [1, 2, 3, 4], 4)
    assert manager.allocate("c", [1, 2, 3, 4, 5]) == 4
    assert manager.page_table("c").tolist() == [manager.page_table("a")[0], manager.page_table("b")[1]]


def test_without_prefix_caching_nothing_is_shared():
    manager = PageManager(8, 4, prefix_caching=False)
    assert serve(manager, "a", list(range(9))) == 0
    assert serve(manager, "b", list(range(9))) == 0
    manager.free("a")
    assert counts(manager) == (3, 0, 5)
    assert manager.evict() == 0


def test_token_ids_may_be_lists_tuples_or_arrays():
    manager = PageManager(32, 4)
    serve(manager, "list", list(range(9)))
    for name, tokens in (
        ("tuple", tuple(range(9))),
        ("int32", np.arange(9, dtype=np.int32)),
        ("int64", np.arange(9)),
    ):
        assert serve(manager, name, tokens) == 8


def test_commit_refuses_what_cannot_have_been_computed():
    manager = PageManager(8, 4)
    manager.allocate("a", list(range(12)))
    manager.extend("a", 8)
    with pytest.raises(ValueError, match="'a' cannot have computed 9 tokens: it has 12, and room for 8"):
        manager.commit("a", list(range(12)), 9)
    with pytest.raises(ValueError, match="it has 5"):
        manager.commit("a", list(range(5)), 8)
    manager.commit("a", list(range(12)), 8)
    counts(manager)


# Eviction


def test_eviction_is_least_recently_used_first():
    manager = PageManager(16, 4)
    for start in (0, 100, 200):
        serve(manager, "r", list(range(start, start + 4)))
        manager.free("r")
    serve(manager, "r", list(range(5)))  # uses the oldest block again
    manager.free("r")
    assert manager.evict(1) == 1
    assert manager.allocate("b", list(range(100, 105))) == 0
    assert manager.allocate("c", list(range(200, 205))) == 4
    assert manager.allocate("a", list(range(5))) == 4


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    manager = PageManager(16, 4)
    serve(manager, "a", list(range(16)))
    manager.free("a")
    for expected in (12, 8, 4, 0):
        assert manager.evict(1) == 1
        assert manager.allocate("probe", list(range(17))) == expected
        manager.free("probe")
    assert manager.evict(1) == 0


def test_extend_evicts_only_what_it_needs():
    manager = PageManager(4, 4)
    serve(manager, "a", list(range(12)))
    manager.free("a")
    assert counts(manager) == (0, 3, 1)
    manager.allocate("b", [50] * 8)
    manager.extend("b", 8)
    assert counts(manager) == (2, 2, 0)
    assert manager.allocate("c", list(range(12))) == 8


def test_pages_in_use_are_never_evicted():
    manager = PageManager(8, 4)
    serve(manager, "a", list(range(8)))
    serve(manager, "b", list(range(9)))
    manager.free("a")
    assert manager.evict() == 0
    assert manager.page_table("b").tolist()[:2] == [0, 1]
    counts(manager)


def test_evict_counts():
    manager = PageManager(8, 4)
    serve(manager, "a", list(range(20)))
    manager.free("a")
    assert manager.evict(0) == 0
    assert manager.evict(-3) == 0
    assert manager.evict(2) == 2
    assert counts(manager) == (0, 3, 5)
    assert manager.evict() == 3
    assert manager.evict() == 0
    assert counts(manager) == (0, 0, 8)


# CSR arrays


def naive_arrays(manager: PageManagerProtocol, chunks: list[Chunk]) -> BatchArrays:
    qo_indptr, kv_indptr, kv_indices, last, positions, batch_indices = [0], [0], [], [], [], []
    for index, (request_id, start, end) in enumerate(chunks):
        pages = manager.page_table(request_id)[: (end + manager.page_size - 1) // manager.page_size]
        kv_indices += [int(page) for page in pages]
        kv_indptr.append(len(kv_indices))
        last.append((end - 1) % manager.page_size + 1)
        positions += range(start, end)
        batch_indices += [index] * (end - start)
        qo_indptr.append(len(positions))
    arrays = (
        np.array(values, dtype=np.int32)
        for values in (qo_indptr, kv_indptr, kv_indices, last, positions, batch_indices)
    )
    return BatchArrays(*arrays, page_size=manager.page_size)


def assert_same_arrays(got: BatchArrays, expected: BatchArrays) -> None:
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "positions", "batch_indices"):
        assert getattr(got, name).dtype == np.int32, name
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    assert got.page_size == expected.page_size


def test_batch_arrays_by_hand():
    manager = PageManager(8, 4)
    manager.allocate("a", [1] * 6)
    manager.allocate("b", [2] * 4)
    manager.extend("a", 4)
    manager.extend("b", 4)
    manager.extend("a", 8)
    arrays = manager.batch_arrays([Chunk("a", 5, 6), Chunk("b", 1, 4)])
    assert arrays.qo_indptr.tolist() == [0, 1, 4]
    assert arrays.kv_indptr.tolist() == [0, 2, 3]
    assert arrays.kv_indices.tolist() == [0, 2, 1]
    assert arrays.kv_last_page_len.tolist() == [2, 4]
    assert arrays.positions.tolist() == [5, 1, 2, 3]
    assert arrays.batch_indices.tolist() == [0, 1, 1, 1]
    assert arrays.kv_lens.tolist() == [6, 4]


def test_pages_beyond_the_chunk_are_left_out():
    manager = PageManager(8, 4)
    manager.allocate("a", [1] * 20)
    manager.extend("a", 20)
    assert manager.batch_arrays([Chunk("a", 0, 8)]).kv_indices.tolist() == [0, 1]


def test_an_empty_batch_has_empty_arrays():
    arrays = PageManager(8, 4).batch_arrays([])
    assert arrays.num_requests == arrays.num_tokens == 0
    assert_same_arrays(arrays, naive_arrays(PageManager(8, 4), []))


@pytest.mark.parametrize("chunk", [(0, 9), (3, 3), (4, 2), (-1, 2)])
def test_batch_arrays_refuses_impossible_chunks(chunk):
    manager = PageManager(8, 4)
    manager.allocate("a", [1] * 8)
    manager.extend("a", 8)
    with pytest.raises(ValueError, match="request_id='a'"):
        manager.batch_arrays([Chunk("a", 0, 8), Chunk("a", *chunk)])


def test_fast_paths_are_fast():
    """Budgets are several times what one quiet core needs: the tests share theirs."""
    manager = PageManager(20_000, 16)
    tokens = list(range(816))
    for index in range(256):
        tokens[0] = index
        serve(manager, f"r{index}", tokens)
    chunks = [Chunk(f"r{index}", 780 + index % 36, 781 + index % 36) for index in range(256)]
    assert_same_arrays(manager.batch_arrays(chunks), naive_arrays(manager, chunks))

    def microseconds(call, number):
        return min(timeit.repeat(call, number=number, repeat=10)) / number * 1e6

    assert microseconds(lambda: manager.batch_arrays(chunks), 20) < 1000
    assert microseconds(lambda: manager.extend("r5", 810), 1000) < 3
    assert microseconds(lambda: manager.commit("r5", tokens, 816), 1000) < 3


# Rules checked on any manager while it runs


def test_runtime_rules_accept_the_library():
    manager = PageManager(64, 4)
    serve(manager, "a", list(range(30)))
    check_num_cached(serve(manager, "b", list(range(20))), 20, 4)
    chunks = [Chunk("a", 28, 30), Chunk("b", 16, 20)]
    check_batch_arrays(manager.batch_arrays(chunks), chunks, 64, 4)
    check_batch_arrays(manager.batch_arrays([]), [], 64, 4)


@pytest.mark.parametrize("wrong", [-4, 3, 8, 12, None])
def test_runtime_rules_of_allocate(wrong):
    with pytest.raises(ContractError):
        check_num_cached(wrong, 8, 4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qo_indptr", lambda a: a + 1),
        ("kv_indptr", lambda a: a - 1),
        ("kv_indices", lambda a: a.astype(np.int64)),
        ("kv_indices", lambda a: a[:-1]),
        ("kv_indices", lambda a: a * 0 + 64),
        ("kv_indices", lambda a: a * 0 - 1),
        ("kv_last_page_len", lambda a: a % 4),
        ("positions", lambda a: a + 1),
        ("batch_indices", lambda a: a * 0),
        ("positions", list),
    ],
)
def test_runtime_rules_of_batch_arrays(name, change):
    manager = PageManager(64, 4)
    serve(manager, "a", list(range(32)))
    serve(manager, "b", list(range(20, 40)))
    chunks = [Chunk("a", 28, 32), Chunk("b", 17, 20)]
    arrays = vars(manager.batch_arrays(chunks))
    with pytest.raises(ContractError, match=name):
        check_batch_arrays(BatchArrays(**{**arrays, name: change(arrays[name])}), chunks, 64, 4)


def test_runtime_rules_find_a_page_written_and_shared():
    manager = PageManager(64, 4, prefix_caching=False)
    serve(manager, "a", list(range(8)))
    serve(manager, "b", list(range(8)))
    chunks = [Chunk("a", 7, 8), Chunk("b", 7, 8)]
    arrays = vars(manager.batch_arrays(chunks))
    shared = np.array([0, 1, 0, 1], dtype=np.int32)
    with pytest.raises(ContractError, match="one page table only"):
        check_batch_arrays(BatchArrays(**{**arrays, "kv_indices": shared}), chunks, 64, 4)
    first_shared = np.array([0, 1, 0, 2], dtype=np.int32)
    check_batch_arrays(BatchArrays(**{**arrays, "kv_indices": first_shared}), chunks, 64, 4)


# Pictures


def test_the_text_map():
    manager = PageManager(40, 4)
    serve(manager, "a", list(range(9)))
    serve(manager, "b", list(range(8)))
    serve(manager, "z", list(range(50, 58)))
    manager.free("z")
    lines = repr(manager).splitlines()
    assert lines[0] == "PageManager: 40 pages of 4 tokens, 4 used, 2 cached, 34 free"
    assert lines[1] == " 0  *AAB" + "cc" + "." * 26
    assert lines[2] == "32  " + "." * 8
    assert lines[3] == "A = 'a', B = 'b', * = shared, c = cached, . = free"


def test_maps_of_large_pools_stay_small():
    manager = PageManager(100_000, 16)
    for index in range(100):
        serve(manager, f"request-{index}", [index] * 33)
    assert len(repr(manager)) < 5000
    assert "and 84 more requests" in repr(manager)
    assert "and 97952 more pages" in repr(manager)
    assert len(manager._repr_html_()) < 30_000


def test_html_escapes_request_ids_and_colours_both_ways():
    manager = PageManager(300, 4)
    serve(manager, "<script>alert('x')</script>&", list(range(9)))
    html = manager._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert all("color:" in style for style in re.findall(r'style="(background:#[^"]*)"', html))
    assert len(html) < 4000


def test_snapshot():
    manager = PageManager(5, 4)
    serve(manager, "a", list(range(9)))
    serve(manager, "z", list(range(50, 54)))
    manager.free("z")
    serve(manager, "b", list(range(5)))
    snapshot = manager.snapshot()
    assert snapshot.states == ("used", "used", "used", "cached", "used")
    assert snapshot.owners == (("a", "b"), ("a",), ("a",), (), ("b",))
    assert snapshot.tables == (("a", (0, 1, 2)), ("b", (0, 4)))
    assert hash(snapshot) == hash(manager.snapshot())


def test_check_invariants_finds_faults():
    faults = (
        lambda m: m._free_pages.pop(),
        lambda m: m._free_pages.append(0),
        lambda m: m._reference_counts.__setitem__(0, 2),
        lambda m: m._page_tables.__setitem__((m._live["b"].row, 0), 0),
        lambda m: m._page_tables.__setitem__((m._live["b"].row, 1), m._page_tables[m._live["b"].row, 0]),
        lambda m: m._cached.clear(),
        lambda m: m._page_of_block.popitem(),
        lambda m: m._free_rows.append(0),
        lambda m: setattr(m._live["a"], "capacity", 4),
    )
    for fault in faults:
        manager = PageManager(16, 4)
        serve(manager, "z", list(range(50, 54)))
        manager.free("z")
        serve(manager, "a", list(range(9)))
        serve(manager, "b", list(range(20, 29)))
        manager.check_invariants()
        fault(manager)
        with pytest.raises(ContractError):
            manager.check_invariants()


# All rules in any order


class PageManagerMachine(RuleBasedStateMachine):
    """A pool of a few pages and prompts over two token ids: sharing, eviction and exhaustion happen all the time.

    `memory` stands for the K/V tensors: each slot holds the tokens up to and including its own, which is all that the
    K/V of a position depends on. Whatever happens, each request must find its own tokens where its page table points.
    """

    requests = Bundle("requests")

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 4), prefix_caching=st.booleans())
    def start(self, num_pages, page_size, prefix_caching):
        self.manager = PageManager(num_pages, page_size, prefix_caching)
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.num_computed: dict[str, int] = {}
        self.blocks: dict[tuple[int, ...], int] = {}  # the prefix cache: a prefix -> the page of its last block
        self.idle: list[tuple[int, ...]] = []  # those whose page nobody uses, least recently used first
        self.num_requests = 0

    def open(self, request_id: str, tokens: list[int]) -> None:
        size, hit = self.manager.page_size, 0
        while hit + size < len(tokens) and tuple(tokens[: hit + size]) in self.blocks:
            hit += size
        num_free = self.manager.num_free
        assert self.manager.allocate(request_id, tokens) == hit
        assert self.manager.num_free == num_free
        self.idle = [prefix for prefix in self.idle if prefix != tuple(tokens[:hit][: len(prefix)])]
        self.tokens[request_id], self.num_computed[request_id] = list(tokens), hit

    def close(self, request_id: str) -> None:
        pages = self.manager.page_table(request_id).tolist()
        self.manager.free(request_id)
        del self.num_computed[request_id], self.tokens[request_id]
        used = {page for other in self.tokens for page in self.manager.page_table(other).tolist()}
        prefix_of_page = {page: prefix for prefix, page in self.blocks.items()}
        self.idle += [prefix_of_page[page] for page in reversed(pages) if page not in used and page in prefix_of_page]

    def forget(self, count: int) -> None:
        for prefix in self.idle[:count]:
            del self.blocks[prefix]
        self.idle = self.idle[count:]

    @rule(target=requests, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def allocate(self, tokens):
        self.num_requests += 1
        self.open(f"r{self.num_requests}", tokens)
        return f"r{self.num_requests}"

    @rule(target=requests, other=requests, keep=st.integers(1, 14), tokens=st.lists(st.integers(0, 1), max_size=4))
    def allocate_with_common_prefix(self, other, keep, tokens):
        return self.allocate(self.tokens[other][:keep] + tokens)

    @rule(target=requests, other=requests, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def serve_a_longer_prompt(self, other, tokens):
        request_id = self.allocate(self.tokens[other] + tokens)
        self.compute(request_id, len(self.tokens[request_id]), True)
        return request_id

    @rule(request_id=requests, count=st.integers(1, 14), commit=st.booleans())
    def compute(self, request_id, count, commit):
        manager, tokens = self.manager, self.tokens[request_id]
        end = min(self.num_computed[request_id] + count, len(tokens))
        missing = max(-(-end // manager.page_size) - len(manager.page_table(request_id)), 0)
        num_free, num_available = manager.num_free, manager.num_available
        before = manager.snapshot()
        try:
            manager.extend(request_id, end)
        except OutOfPagesError:
            assert missing > num_available
            assert manager.snapshot() == before
            return
        assert missing <= num_available
        self.forget(max(missing - num_free, 0))
        table = manager.page_table(request_id)
        for position in range(self.num_computed[request_id], end):
            slot = (int(table[position // manager.page_size]), position % manager.page_size)
            self.memory[slot] = tuple(tokens[: position + 1])
        self.num_computed[request_id] = end
        if commit:
            self.commit(request_id)

    @rule(request_id=requests)
    def commit(self, request_id):
        end, tokens = self.num_computed[request_id], self.tokens[request_id]
        self.manager.commit(request_id, tokens, end)
        table, size = self.manager.page_table(request_id).tolist(), self.manager.page_size
        for index in range(end // size if self.manager.prefix_caching else 0):
            self.blocks.setdefault(tuple(tokens[: (index + 1) * size]), table[index])

    @rule(request_id=requests, token=st.integers(0, 1))
    def generate(self, request_id, token):
        if self.num_computed[request_id] == len(self.tokens[request_id]):
            self.tokens[request_id].append(token)

    @rule(request_id=consumes(requests))
    def free_or_abort(self, request_id):
        self.close(request_id)

    @rule(request_id=requests)
    def preempt_and_resume(self, request_id):
        tokens = self.tokens[request_id]
        self.close(request_id)
        self.open(request_id, tokens)

    @rule(count=st.none() | st.integers(0, 4))
    def evict(self, count):
        expected = len(self.idle) if count is None else min(count, len(self.idle))
        assert self.manager.evict(count) == expected
        self.forget(expected)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def build_batch(self, data):
        chunks = []
        for request_id in data.draw(st.permutations(sorted(self.tokens))):
            room = len(self.manager.page_table(request_id)) * self.manager.page_size
            if room:
                end = data.draw(st.integers(1, room))
                chunks.append(Chunk(request_id, data.draw(st.integers(0, end - 1)), end))
        assert_same_arrays(self.manager.batch_arrays(chunks), naive_arrays(self.manager, chunks))

    @invariant()
    def manager_is_consistent(self):
        if not hasattr(self, "manager"):
            return
        self.manager.check_invariants()
        assert self.manager.num_cached == len(self.idle)
        assert self.manager.request_ids == tuple(self.tokens)
        used = {page for request_id in self.tokens for page in self.manager.page_table(request_id).tolist()}
        assert self.manager.num_used == len(used)

    @invariant()
    def every_request_finds_its_own_tokens(self):
        if not hasattr(self, "manager"):
            return
        for request_id, tokens in self.tokens.items():
            table = self.manager.page_table(request_id).tolist()
            for position in range(self.num_computed[request_id]):
                slot = (table[position // self.manager.page_size], position % self.manager.page_size)
                assert self.memory[slot] == tuple(tokens[: position + 1])

    def teardown(self):
        if hasattr(self, "manager"):
            for request_id in list(self.tokens):
                self.close(request_id)
            assert self.manager.num_used == 0
            assert (
                self.manager.evict() == self.manager.num_pages - self.manager.num_free or self.manager.num_cached == 0
            )
            assert self.manager.num_free == self.manager.num_pages
            self.manager.check_invariants()


TestPageManagerMachine = PageManagerMachine.TestCase
TestPageManagerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# KVPool


def test_bytes():
    pool = KVPool(3, 10, 16, 2, 64, torch.float32, "cpu")
    per_page = KVPool.bytes_per_page(3, 16, 2, 64, torch.float32)
    assert per_page == 3 * 2 * 16 * 2 * 64 * 4
    assert KVPool.bytes_per_page(3, 16, 2, 64, torch.bfloat16) == per_page // 2
    assert pool.num_bytes == 11 * per_page  # the last page is scratch
    assert pool.tensor.shape == (3, 11, 2, 16, 2, 64)
    assert pool.scratch_page == 10
    assert not pool.tensor.any()


def test_layer_is_a_view():
    pool = KVPool(3, 4, 2, 1, 8, torch.float32, "cpu")
    pool.layer(1).fill_(1)
    assert pool.tensor[1].all() and not pool.tensor[0].any() and not pool.tensor[2].any()


@pytest.mark.parametrize("option", [{"num_pages": 0}, {"page_size": 0}])
def test_pool_options_are_validated(option):
    sizes = {"num_layers": 1, "num_pages": 4, "page_size": 2, "num_kv_heads": 1, "head_dim": 8, **option}
    with pytest.raises(ConfigError, match=next(iter(option))):
        KVPool(**sizes, dtype=torch.float32, device="cpu")


def context_of(manager: PageManager, chunks: list[Chunk], kernels) -> InferenceContext:
    arrays = manager.batch_arrays(chunks)
    names = ("positions", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "batch_indices")
    return InferenceContext(kernels=kernels, **{name: torch.from_numpy(getattr(arrays, name)) for name in names})


def test_append_hands_the_context_to_the_kernels():
    calls = []
    kernels = types.SimpleNamespace(append_paged_kv_cache=lambda *arguments: calls.append(arguments))
    manager, pool = PageManager(4, 2), KVPool(2, 4, 2, 1, 8, torch.float32, "cpu")
    serve(manager, "a", [1, 2, 3])
    context = context_of(manager, [Chunk("a", 0, 3)], kernels)
    k, v = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    pool.append(1, k, v, context)
    (call,) = calls
    assert call[0] is k and call[1] is v
    assert call[2] is context.batch_indices and call[3] is context.positions
    assert call[4].data_ptr() == pool.tensor[1].data_ptr() and call[4].shape == pool.tensor[1].shape
    assert call[5] is context.kv_indices and call[6] is context.kv_indptr and call[7] is context.kv_last_page_len


def test_append_refuses_another_dtype():
    pool = KVPool(1, 4, 2, 1, 8, torch.bfloat16, "cpu")
    k = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="bfloat16"):
        pool.append(0, k, k, InferenceContext(kernels=None))


def test_append_writes_each_token_to_its_slot():
    reference = pytest.importorskip("minillm.reference")
    manager, pool = PageManager(8, 4), KVPool(2, 8, 4, 2, 8, torch.float32, "cpu")
    for length in (3, 6):  # in turns, so that pages are scattered
        for request_id in "ab":
            if length == 3:
                manager.allocate(request_id, [0])
            manager.extend(request_id, length)
    chunks = [Chunk("a", 2, 6), Chunk("b", 0, 5)]
    k, v = torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    pool.append(1, k, v, context_of(manager, chunks, reference))
    row, written = 0, set()
    for request_id, start, end in chunks:
        for position in range(start, end):
            page, slot = int(manager.page_table(request_id)[position // 4]), position % 4
            assert torch.equal(pool.tensor[1, page, 0, slot], k[row])
            assert torch.equal(pool.tensor[1, page, 1, slot], v[row])
            written.add((page, slot))
            row += 1
    assert len(written) == 9
    assert pool.tensor.count_nonzero() == 2 * 9 * 2 * 8  # nothing else was touched
