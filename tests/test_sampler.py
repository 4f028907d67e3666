"""Sampler: filters against loops in float64, draws against the probabilities they should have, rows apart from rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minillm import SamplingParams
from minillm.errors import InvalidRequestError
from minillm.filters import filtered_probs
from minillm.request import Request
from minillm.sampler import Sampler, counter_uniforms, draw, top_logprobs

MARGIN = 1e-5  # float32 and float64 agree on a threshold that no value comes nearer to


def request(params: SamplingParams, seed: int = 0, token_ids: Sequence[int] = (0,)) -> Request:
    return Request("r", list(token_ids), params, max_num_tokens=1000, seed=seed)


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    sampled = Sampler(logits.shape[-1]).sample(logits, requests)
    assert all(sampled.is_valid) and len(sampled.token_ids) == len(requests)
    return sampled.token_ids


def surely(holds: Any) -> None:
    assert holds, "a filter decides by a hair: choose other logits"


def oracle(
    logits: Sequence[float], params: SamplingParams, seen: Sequence[int] = (), clear: Callable[[Any], Any] = surely
) -> np.ndarray:
    """The probability of each token, in float64, one filter after the other, each on what the one before left.

    Where a filter decides by a hair, rounding may decide otherwise: `clear` is told whether it does not.
    """
    values = np.array(logits, dtype=np.float64)
    for token_id in set(seen):
        value, penalty = values[token_id], params.repetition_penalty
        values[token_id] = value / penalty if value > 0 else value * penalty
    values /= params.temperature
    probs = np.exp(values - values.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = order[: params.top_k] if params.top_k > 0 else order
    if len(kept) < len(order):
        clear(probs[kept[-1]] > probs[order[len(kept)]] * (1 + MARGIN))
    total, running, nucleus = sum(probs[i] for i in kept), 0.0, []
    for i in kept:
        if params.top_p < 1:
            clear(abs(running - params.top_p * total) > MARGIN * total)
            if running >= params.top_p * total:
                break
        nucleus.append(i)
        running += probs[i]
    for low, high in pairwise(reversed(nucleus)):
        clear(params.top_p == 1 or probs[low] * (1 + MARGIN) < probs[high])
    if nucleus != kept and params.top_p < 1:
        clear(probs[nucleus[-1]] > probs[kept[len(nucleus)]] * (1 + MARGIN))
    floor = params.min_p * probs[order[0]]
    clear(all(abs(probs[i] - floor) > MARGIN * floor for i in nucleus[1:]) or params.min_p == 0)
    result = np.zeros(len(probs))
    for i in nucleus:
        if probs[i] >= floor:
            result[i] = probs[i]
    return result / result.sum()


def torch_filtered(logits: Sequence[float], params: SamplingParams) -> np.ndarray:
    probs = torch.softmax(torch.tensor([logits]) / params.temperature, dim=-1)
    kept = filtered_probs(probs, [params.top_k], [params.top_p], [params.min_p])[0].double()
    return (kept / kept.sum()).numpy()


logit_rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=24)
filter_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


@given(logit_rows, filter_params)
def test_filters_keep_exactly_what_the_oracle_keeps(logits: list[float], params: SamplingParams) -> None:
    expected = oracle(logits, params, clear=assume)
    got = torch_filtered(logits, params)
    assert np.flatnonzero(got).tolist() == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_many_rows_at_once_each_with_its_own_filters() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (300, 64)).astype(np.float32)
    params = [
        SamplingParams(top_k=int(k), top_p=float(p), min_p=float(m))
        for k, p, m in zip(rng.integers(0, 64, 300), 1 - rng.random(300), rng.random(300) ** 4, strict=True)
    ]
    got = filtered_probs(
        torch.softmax(torch.from_numpy(logits), dim=-1),
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    )
    num_compared = 0
    for row, kept, of_row in zip(logits, got, params, strict=True):
        is_clear: list[bool] = []
        expected = oracle(row.tolist(), of_row, clear=lambda holds, seen=is_clear: seen.append(bool(holds)))
        if all(is_clear):
            num_compared += 1
            assert kept.nonzero().flatten().tolist() == np.flatnonzero(expected).tolist()
    assert num_compared > 270


@pytest.mark.parametrize(
    ("probs", "params", "kept"),
    [
        # top-p is of what top-k left: 0.4 of 0.7 is enough for half, 0.4 of 1 is not.
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 2, "top_p": 0.5}, {0}),
        ((0.4, 0.3, 0.2, 0.1), {"top_p": 0.5}, {0, 1}),
        # top-p is of all, not of what min-p would leave: 0.5 of 0.8 would be enough for 0.6.
        ((0.5, 0.3, 0.1, 0.1), {"top_p": 0.6, "min_p": 0.5}, {0, 1}),
        # temperature comes before all of them: it makes these nearly equal.
        ((0.9, 0.06, 0.04), {"temperature": 100.0, "top_p": 0.5}, {0, 1}),
        ((0.9, 0.06, 0.04), {"top_p": 0.5}, {0}),
        ((0.9, 0.06, 0.04), {"temperature": 100.0, "min_p": 0.9}, {0, 1, 2}),
        # off
        ((0.4, 0.3, 0.2, 0.1), {}, {0, 1, 2, 3}),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 0}, {0, 1, 2, 3}),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": -1}, {0, 1, 2, 3}),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 4}, {0, 1, 2, 3}),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 10**30}, {0, 1, 2, 3}),
        ((0.4, 0.3, 0.2, 0.1), {"top_p": 1e-50}, {0}),
        ((0.4, 0.3, 0.2, 0.1), {"min_p": 1.0}, {0}),
        # equals live or die together
        ((0.3, 0.3, 0.3, 0.1), {"top_k": 2}, {0, 1, 2}),
        ((0.3, 0.3, 0.3, 0.1), {"top_p": 0.5}, {0, 1, 2}),
        # and count together: top-p is of all that top-k left, of 1 and not of 0.6
        ((0.5, 0.1, 0.1, 0.1, 0.1, 0.1), {"top_k": 2, "top_p": 0.6}, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_order_of_the_filters(probs: tuple[float, ...], params: dict[str, Any], kept: set[int]) -> None:
    logits = torch.tensor([probs]).log()
    drawn = sample(logits.expand(400, -1), [request(SamplingParams(**params), seed) for seed in range(400)])
    assert set(drawn) == kept


def test_penalty_comes_before_the_filters_and_counts_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    for seen, greedy in (([3], 0), ([0], 1), ([0, 1], 0), ([0, 0, 0, 1], 0)):  # once, however often it occurred
        params = SamplingParams(temperature=0, repetition_penalty=1.2)
        assert sample(logits, [request(params, token_ids=seen)]) == [greedy]
    with_output = request(SamplingParams(temperature=0, repetition_penalty=1.2), token_ids=[3])
    with_output.token_ids.append(0)
    assert sample(logits, [with_output]) == [1]
    # A negative logit is multiplied, so that it sinks, too; top-k sees the penalised ones.
    params = SamplingParams(top_k=1, repetition_penalty=3.0)
    assert sample(torch.tensor([[-1.0, -1.1, -9.0]]), [request(params, token_ids=[0])]) == [1]
    # Below 1 it favours.
    assert sample(logits, [request(SamplingParams(top_k=1, repetition_penalty=0.5), token_ids=[1])]) == [1]


CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88}  # p = 0.001


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "repetition_penalty": 1.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
    ids=lambda params: "-".join(params) or "plain",
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_have_the_probabilities_of_the_oracle(params: dict[str, Any], vary: str) -> None:
    """Over seeds at one position, and over positions with one seed."""
    logits = [1.5, 1.2, 0.8, 0.3, 0.0, -0.2, -0.6, -1.5, -2.0, -2.2]
    sampling, num_draws, seen = SamplingParams(**params), 8000, [2, 5]
    if vary == "seed":
        requests = [request(sampling, seed, seen) for seed in range(num_draws)]
    else:
        requests = [request(sampling, 7, seen * (1 + i)) for i in range(num_draws // 8)]
        num_draws = len(requests)
    counts = Counter(sample(torch.tensor([logits]).expand(num_draws, -1), requests))
    expected = oracle(logits, sampling, seen) * num_draws
    support = np.flatnonzero(expected).tolist()
    assert set(counts) <= set(support)
    if vary == "seed":
        assert set(counts) == set(support)
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in support)
    assert chi_square < CHI_SQUARE[len(support) - 1]


def test_temperature_0_takes_the_largest_whatever_the_rest_says() -> None:
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for params in ({}, {"top_k": 5, "top_p": 0.3, "min_p": 0.2}):
        requests = [request(SamplingParams(temperature=0, **params), seed) for seed in range(50)]
        assert sample(logits, requests) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-50, 1e-38, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = 30 * torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    assert sample(logits, [request(SamplingParams(temperature=temperature))] * 40) == logits.argmax(-1).tolist()


def test_a_huge_temperature_is_uniform_over_what_is_possible() -> None:
    logits = torch.tensor([[5.0, -5.0, 0.0, -math.inf]])
    drawn = sample(logits.expand(600, -1), [request(SamplingParams(temperature=1e300), seed) for seed in range(600)])
    assert set(drawn) == {0, 1, 2} and min(Counter(drawn).values()) > 150


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
def test_an_extreme_penalty_still_gives_a_token(penalty: float) -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, 0.0]])
    for temperature in (0.0, 0.1, 1.0):
        params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
        drawn = set(sample(logits.expand(200, -1), [request(params, seed, [0, 2]) for seed in range(200)]))
        if penalty < 1:
            assert drawn == {0}  # 2 is multiplied by it, and does not become more likely than nothing
        else:
            assert drawn == {1} if temperature < 1 else drawn == {0, 1, 3}


# Few distinct values: ties, as in bfloat16, are where rows could influence one another.
coarse_rows = st.lists(st.lists(st.integers(-3, 3), min_size=8, max_size=8), min_size=1, max_size=6)


@given(coarse_rows, st.data())
def test_a_row_does_not_depend_on_its_neighbours(rows: list[list[int]], data: st.DataObject) -> None:
    logits = torch.tensor(rows, dtype=torch.float32) * 0.75
    penalties = st.sampled_from([1.0, 1.3])
    params = [data.draw(filter_params) for _ in rows]
    requests = [
        request(
            SamplingParams(
                temperature=data.draw(st.sampled_from([0.0, p.temperature])),
                top_k=p.top_k,
                top_p=p.top_p,
                min_p=p.min_p,
                repetition_penalty=data.draw(penalties),
            ),
            seed=data.draw(st.integers(0, 2**64 - 1)),
            token_ids=data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=9)),
        )
        for p in params
    ]
    alone = [sample(logits[i : i + 1], [requests[i]])[0] for i in range(len(rows))]
    assert sample(logits, requests) == alone
    order = data.draw(st.permutations(range(len(rows))))
    assert sample(logits[list(order)], [requests[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}, {"temperature": 0.0}])
def test_a_row_that_is_not_finite_is_marked_and_spoils_no_other(bad: float, params: dict[str, Any]) -> None:
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    requests = [request(SamplingParams(logprobs=2, **params), seed) for seed in range(3)]
    good = Sampler(16).sample(logits, requests)
    logits[1, 5] = bad
    sampled = Sampler(16).sample(logits, requests)
    assert sampled.is_valid == [True, False, True]
    assert [sampled.token_ids[i] for i in (0, 2)] == [good.token_ids[i] for i in (0, 2)]
    assert sampled.logprobs[1] is None and sampled.logprobs[2] == good.logprobs[2]
    logits[1] = -math.inf
    assert Sampler(16).sample(logits, requests).is_valid == [True, False, True]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 6), -math.inf)
    logits[:, [1, 4]] = 0.0
    assert set(sample(logits, [request(SamplingParams(), seed) for seed in range(500)])) == {1, 4}


def test_the_logits_are_left_alone() -> None:
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    sample(logits, [request(SamplingParams(repetition_penalty=2.0, temperature=0.5, top_k=3), token_ids=[1, 2])] * 4)
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_logits_as_they_are() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(4))
    expected = (logits[0].double() - logits[0].double().logsumexp(0)).tolist()
    ranked = sorted(range(12), key=lambda i: -expected[i])
    for k in (0, 1, 3, 12, 100):
        params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=1.9, logprobs=k)
        sampled = Sampler(12).sample(logits, [request(params, token_ids=ranked[:3])])
        (logprobs,) = sampled.logprobs
        assert logprobs is not None and next(iter(logprobs)) == sampled.token_ids[0]
        assert set(logprobs) == {*ranked[:k], sampled.token_ids[0]}
        assert all(math.isclose(value, expected[i], abs_tol=1e-5) for i, value in logprobs.items())
    assert list(top_logprobs(logits[0], ranked[5], 3)) == [ranked[5], *ranked[:3]]  # best first, after the drawn one
    assert Sampler(12).sample(logits, [request(SamplingParams())]).logprobs == [None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    params = [SamplingParams(temperature=0), SamplingParams(top_p=0.9), SamplingParams(repetition_penalty=1.2), *[
        SamplingParams(logprobs=1)
    ] * 5]  # fmt: skip
    requests = [request(p, seed) for seed, p in enumerate(params)]
    assert sample(logits, requests) == sample(logits.float(), requests)


def test_random_numbers_are_a_function_of_seed_and_position() -> None:
    seeds, positions = (x.reshape(-1).tolist() for x in np.meshgrid(np.arange(100), np.arange(100)))
    numbers = counter_uniforms(seeds, positions)
    assert numbers.dtype == np.float64 and ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(numbers)) == len(numbers)  # each pair its own
    shuffled = np.random.default_rng(0).permutation(len(numbers))
    again = counter_uniforms([seeds[i] for i in shuffled], [positions[i] for i in shuffled])
    assert (again == numbers[shuffled]).all()
    # Neighbours in seed or in position tell nothing about one another.
    grid = numbers.reshape(100, 100)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, 1:], grid[:-1, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < CHI_SQUARE[9]
    assert (
        counter_uniforms([2**64 - 1, 0], [0, 2**20]).tolist() != counter_uniforms([0, 2**64 - 1], [0, 2**20]).tolist()
    )


def test_draw_finds_the_token_under_the_number() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for number, token_id in ((0.0, 1), (0.249, 1), (0.25, 3), (0.749, 3), (0.75, 4), (1 - 2.0**-53, 4)):
        for scale in (1.0, 0.2, 7.0):
            assert draw(scale * probs, torch.tensor([number], dtype=torch.float64)).tolist() == [token_id]


WRONG: list[tuple[str, Any]] = [
    *[("n", x) for x in (0, -1, 1.0, True, None, "1", 10**6)],
    *[("temperature", x) for x in (-0.1, math.nan, math.inf, True, None, "1", 1j)],
    *[("top_k", x) for x in (-2, 1.5, True, None, "1")],
    *[("top_p", x) for x in (0, -0.5, 1.0001, math.nan, True, None, "1")],
    *[("min_p", x) for x in (-0.1, 1.1, math.nan, True, None)],
    *[("repetition_penalty", x) for x in (0, -1.0, math.nan, math.inf, True, None)],
    *[("max_tokens", x) for x in (0, -5, 2.5, True, None)],
    *[("min_tokens", x) for x in (-1, 17, 0.5, True, None)],
    *[("stop", x) for x in ("", [""], [1], None, 5, {"a"}, [["a"]])],
    *[("stop_token_ids", x) for x in (3, None, [-1], [1.5], ["a"], [True], [None])],
    *[("ignore_eos", x) for x in (0, 1, None, "yes")],
    *[("seed", x) for x in (-1, 2**64, 1.5, True, "7")],
    *[("logprobs", x) for x in (-1, 1.5, True, "2", 10**6)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda x: repr(x)[:20])
def test_each_parameter_refuses_what_is_wrong_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: value})


def test_parameters_take_what_is_right_in_any_spelling() -> None:
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_k=np.int32(-1),
        top_p=1,
        stop="END",
        stop_token_ids=[np.int64(3)],
    )
    assert (params.n, params.temperature, params.top_k, params.top_p) == (2, 0.5, 0, 1.0)
    assert params.stop == ("END",) and params.stop_token_ids == (3,)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert all(type(getattr(params, name)) is int for name in ("n", "top_k", "max_tokens", "min_tokens"))
    with pytest.raises(AttributeError):
        params.n = 3  # type: ignore[misc]
    defaults = SamplingParams()
    assert (defaults.n, defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (defaults.repetition_penalty, defaults.max_tokens, defaults.min_tokens) == (1.0, 16, 0)
    assert (defaults.stop, defaults.stop_token_ids, defaults.ignore_eos) == ((), (), False)
    assert defaults.seed is None and defaults.logprobs is None
