"""The twin's sampling functions: which tokens they draw, how often, from what randomness, and their errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minillm.reference as reference

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.1, 0.2])
DRAWS = 20_000


def drawn(sample, rows=DRAWS, **options):
    """Frequencies of the tokens that `sample` draws from many copies of one row."""
    tokens = sample(PROBS.repeat(rows, 1), generator=torch.Generator().manual_seed(7), **options)
    assert tokens.dtype == torch.int32 and tokens.shape == (rows,)
    return tokens.bincount(minlength=6) / rows


def close(frequencies, expected):
    expected = torch.tensor(expected) / sum(expected)
    assert (frequencies[expected == 0] == 0).all()
    # Five standard deviations.
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-9).all()


def from_logits(function):
    return lambda probs, *args, **options: function(probs.log(), *args, **options)


FROM_PROBS, FROM_LOGITS = reference.top_k_top_p_sampling_from_probs, reference.top_k_top_p_sampling_from_logits


@pytest.mark.parametrize("sample", [reference.sampling_from_probs, from_logits(reference.sampling_from_logits)])
def test_the_distribution_is_the_one_given(sample):
    close(drawn(sample), PROBS.tolist())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("sample", [FROM_PROBS, from_logits(FROM_LOGITS)])
@pytest.mark.parametrize(
    ("top_k", "top_p", "order", "expected"),
    [
        (6, 1.0, "top_k_first", PROBS.tolist()),
        (2, 1.0, "top_k_first", [0, 0.4, 0, 0.25, 0, 0]),
        (1, 0.3, "joint", [0, 1, 0, 0, 0, 0]),
        (6, 0.6, "top_k_first", [0, 0.4, 0, 0.25, 0, 0]),
        # Of the three likeliest, 0.4 has 0.47 of the mass: with 0.25 it passes 0.7 - unless it is not renormalised.
        (3, 0.7, "top_k_first", [0, 0.4, 0, 0.25, 0, 0]),
        (3, 0.7, "joint", [0, 0.4, 0, 0.25, 0, 0.2]),
        (3, 1e-6, "joint", [0, 1, 0, 0, 0, 0]),
    ],
)
def test_top_k_and_top_p(sample, as_tensor, top_k, top_p, order, expected):
    if as_tensor:
        top_k, top_p = torch.full((DRAWS,), top_k, dtype=torch.int32), torch.full((DRAWS,), top_p)
    close(drawn(sample, top_k=top_k, top_p=top_p, filter_apply_order=order), expected)


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.0, PROBS.tolist()), (0.5, [0, 4, 0, 2.5, 0, 2]), (1.0, [0, 1, 0, 0, 0, 0])]
)
def test_min_p(min_p, expected):
    close(drawn(reference.min_p_sampling_from_probs, min_p=min_p), expected)
    close(drawn(reference.min_p_sampling_from_probs, min_p=torch.full((DRAWS,), min_p)), expected)


def test_each_row_has_its_own_parameters():
    probs = PROBS.repeat(3, 1)
    for seed in range(20):
        tokens = FROM_PROBS(probs, torch.tensor([1, 2, 6]), torch.tensor([1.0, 1.0, 0.1]), seed=seed, offset=0)
        assert tokens[0] == 1 and tokens[1] in (1, 3) and tokens[2] == 1


@given(
    rows=st.lists(st.lists(st.integers(0, 20), min_size=8, max_size=8).filter(any), min_size=1, max_size=4),
    top_k=st.integers(1, 9),
    top_p=st.floats(0.01, 1.0),
    joint=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_drawn_token_passed_every_filter(rows, top_k, top_p, joint, seed):
    probs = torch.tensor(rows, dtype=torch.float32)
    probs = probs / probs.sum(-1, keepdim=True)
    order = "joint" if joint else "top_k_first"
    tokens, valid = FROM_PROBS(probs, top_k, top_p, None, order, seed=seed, offset=3, return_valid=True)
    assert valid.all()
    for row, token in zip(probs.double(), tokens.tolist(), strict=True):
        likelier = row[row > row[token]]
        kept = row[row >= row.sort(descending=True).values[min(top_k, 8) - 1]] if not joint else row
        assert row[token] > 0 and len(likelier) < top_k
        assert likelier.sum() / kept.sum() < top_p + 1e-5


def test_indices_name_the_rows_to_draw_from():
    probs = torch.eye(4)
    for dtype in (torch.int32, torch.int64):
        indices = torch.tensor([2, 0, 2, 3, 1], dtype=dtype)
        for tokens in (
            reference.sampling_from_probs(probs, indices),
            reference.sampling_from_logits(probs.log(), indices),
            reference.min_p_sampling_from_probs(probs, 0.1, indices),
            FROM_PROBS(probs, torch.tensor([2, 1, 2, 1]), 0.9, indices),
            FROM_LOGITS(probs.log(), 2, 0.9, indices),
        ):
            assert tokens.dtype == dtype and torch.equal(tokens, indices)


def test_a_seed_fixes_the_draw_and_rows_differ():
    probs = torch.full((64, 1000), 1e-3)
    first = reference.sampling_from_probs(probs, seed=5, offset=0)
    assert torch.equal(first, reference.sampling_from_probs(probs, seed=5, offset=0))
    assert len(set(first.tolist())) > 50
    for changed in (
        {"seed": 6, "offset": 0},
        {"seed": 5, "offset": 4},
        {"seed": -1, "offset": 0},
        {"seed": 2**64 - 1, "offset": 1},
    ):
        assert not torch.equal(first, reference.sampling_from_probs(probs, **changed))
    one = torch.tensor([5]), torch.tensor([0])
    assert torch.equal(first, reference.sampling_from_probs(probs, seed=one[0], offset=one[1]))
    seeds = torch.arange(64)
    tokens = reference.sampling_from_probs(probs, seed=seeds, offset=torch.zeros_like(seeds))
    assert tokens[5] == first[5] and not torch.equal(tokens, first)
    by_generator = [reference.sampling_from_probs(probs, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*by_generator)
    generator = torch.Generator().manual_seed(1)
    again = [reference.sampling_from_probs(probs, generator=generator) for _ in range(2)]
    assert torch.equal(again[0], by_generator[0]) and not torch.equal(*again)


def test_seeded_draws_are_uniform_across_seeds_and_across_offsets():
    row = PROBS.repeat(1, 1)
    many = torch.arange(DRAWS)
    indices = torch.zeros(DRAWS, dtype=torch.int32)
    for seed, offset in ((many, torch.zeros_like(many)), (torch.zeros_like(many), many)):
        tokens = reference.sampling_from_probs(row, indices, seed=seed, offset=offset)
        close(tokens.bincount(minlength=6) / DRAWS, PROBS.tolist())


def test_rows_without_a_distribution_give_token_zero_and_are_reported():
    probs = torch.stack((PROBS, torch.zeros(6), torch.full((6,), torch.nan), PROBS))
    for sample in (
        reference.sampling_from_probs,
        lambda p, **options: reference.min_p_sampling_from_probs(p, 0.1, **options),
        lambda p, **options: FROM_PROBS(p, 3, 0.9, **options),
    ):
        tokens, valid = sample(probs, return_valid=True)
        assert valid.tolist() == [True, False, False, True] and tokens[1:3].tolist() == [0, 0]
        with pytest.raises(ValueError, match="Input probs contains NaN"):
            sample(probs, check_nan=True)
    with pytest.raises(ValueError, match="Input logits contains NaN"):
        reference.sampling_from_logits(probs, check_nan=True)


def test_sixteen_bit_inputs_are_sampled_in_float32():
    probs = torch.full((64, 1000), 1e-3, dtype=torch.bfloat16)
    assert reference.sampling_from_probs(probs, seed=1, offset=0).max() > 900


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_parameter_tensors_of_another_shape_are_refused(name):
    probs = PROBS.repeat(2, 1)

    def sample(value):
        if name == "min_p":
            return reference.min_p_sampling_from_probs(probs, value)
        return FROM_PROBS(probs, **({"top_k": 2, "top_p": 0.9} | {name: value}))

    for value, match in (
        (torch.tensor(1), r"Expected a 1D tensor of shape \(batch_size,\) or scalar"),
        (torch.ones(2, 1), "but got a 2D tensor"),
        (torch.ones(3), "batch size mismatch: expected length 2"),
    ):
        with pytest.raises(ValueError, match=match):
            sample(value)


def test_other_errors():
    probs, two = PROBS.repeat(2, 1), torch.zeros(2, dtype=torch.int64)
    for function in (FROM_PROBS, FROM_LOGITS):
        with pytest.raises(ValueError, match="Invalid filter_apply_order: top_p_first"):
            function(probs, 1, 0.5, filter_apply_order="top_p_first")
    for seed, offset, match in (
        (two, 0, "both be tensors or both be scalars"),
        (two.int(), two, "seed tensor must be int64/uint64"),
        (two, two[None], "offset tensor must be 1D"),
        (torch.zeros(3, dtype=torch.int64), two, "seed tensor length must be 1 or 2"),
    ):
        with pytest.raises(ValueError, match=match):
            reference.sampling_from_probs(probs, seed=seed, offset=offset)


def test_softmax():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.5, -torch.inf]])
    for x in (logits, logits.half()):
        assert reference.softmax(x).dtype == torch.float32
        torch.testing.assert_close(reference.softmax(x), logits.softmax(-1))
        torch.testing.assert_close(reference.softmax(x, 0.5), (logits * 2).softmax(-1))
        torch.testing.assert_close(
            reference.softmax(x, torch.tensor([0.5, 2.0])), (logits * torch.tensor([[2.0], [0.5]])).softmax(-1)
        )
    assert reference.softmax(logits[:1], 0).tolist() == reference.softmax(logits[:1] * 0).tolist()
    for temperature, error, match in (
        (torch.tensor(1.0), ValueError, "must be 1D"),
        (torch.ones(3), ValueError, "length must equal"),
        (torch.ones(2, dtype=torch.int64), ValueError, "must have dtype"),
        (True, TypeError, "real scalar"),
        ("1", TypeError, "real scalar"),
    ):
        with pytest.raises(error, match=match):
            reference.softmax(logits, temperature)
