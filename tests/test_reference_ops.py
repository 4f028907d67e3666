"""The twin's page, merge, norm, activation and rotary functions, against plain arithmetic in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_contract import assert_close, check_append, load, over_kernels

import minillm.reference as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@over_kernels
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_append(module, device, dtype, layout, page_size, as_tuple):
    check_append(load(module), device, dtype, layout, page_size, as_tuple)


def append_one(page=0, **changes):
    """Append one token at position 1 of a request whose pages are [2, page]."""
    cache = torch.zeros(3, 2, 4, 1, 16)
    arguments = {
        "append_key": torch.ones(1, 1, 16),
        "append_value": torch.ones(1, 1, 16),
        "batch_indices": torch.tensor([0]).int(),
        "positions": torch.tensor([5]).int(),
        "paged_kv_cache": cache,
        "kv_indices": torch.tensor([2, page]).int(),
        "kv_indptr": torch.tensor([0, 2]).int(),
        "kv_last_page_len": torch.tensor([2]).int(),
    }
    reference.append_paged_kv_cache(**(arguments | changes))
    return cache


def test_append_refuses_what_it_cannot_place():
    assert float(append_one()[0, :, 1].sum()) == 32
    for error, changes in (
        (IndexError, {"page": 3}),
        (IndexError, {"positions": torch.tensor([8]).int()}),
        (KeyError, {"kv_layout": "DHN"}),
        (KeyError, {"paged_kv_cache": [torch.zeros(3, 4, 1, 16)] * 2}),
        (RuntimeError, {"append_key": torch.ones(1, 1, 16).bfloat16()}),
    ):
        with pytest.raises(error):
            append_one(**changes)


def test_append_takes_strided_rows_and_leaves_no_trace_in_autograd():
    packed = torch.randn(1, 3, 16, requires_grad=True)
    cache = append_one(append_key=packed[:, 1:2], append_value=packed[:, 2:])
    assert torch.equal(cache[0, :, 1, 0], packed[0, 1:].detach()) and not cache.requires_grad


def test_batch_indices_of_a_padded_batch():
    indptr, lens = torch.tensor([0, 2, 2, 3]).int(), torch.tensor([7, 3, 1]).int()
    indices, positions = reference.get_batch_indices_positions(indptr, lens, 5)
    assert indices.tolist() == [0, 0, 2, -1, -1] and positions.tolist() == [5, 6, 0, 0, 0]
    assert indices.dtype == positions.dtype == torch.int32
    given_indices, given_positions = torch.full((5,), 9).int(), torch.full((5,), 9).int()
    result = reference.get_batch_indices_positions(indptr, lens, 5, given_indices, given_positions)
    assert result[0] is given_indices and result[1] is given_positions
    assert given_indices.tolist() == indices.tolist() and given_positions.tolist() == [5, 6, 0, 9, 9]
    for bad in (torch.zeros(4).int(), torch.zeros(5)):
        with pytest.raises(ValueError, match="of batch_indices"):
            reference.get_batch_indices_positions(indptr, lens, 5, bad)
        with pytest.raises(ValueError, match="of positions"):
            reference.get_batch_indices_positions(indptr, lens, 5, None, bad)
    assert [x.tolist() for x in reference.get_batch_indices_positions(indptr[:1], lens[:0], 2)] == [[-1, -1], [0, 0]]


def states(count, seed=0, dtype=torch.float32, device="cpu"):
    random = torch.Generator().manual_seed(seed)
    v = torch.randn(6, count, 2, 64, generator=random).to(dtype).to(device)
    s = (torch.randn(6, count, 2, generator=random) * 20).to(device)
    s[0, 0] = -math.inf
    s[1] = -math.inf
    return v, s


def merged(v, s):
    """Merge by weights in float64; a row of nothing is 0."""
    s = s.double().cpu()
    weights = torch.exp2(s - s.amax(1, keepdim=True).clamp_min(-1e300))
    total = weights.sum(1)
    out = (v.double().cpu() * weights[..., None]).sum(1) / total.clamp_min(1e-300)[..., None]
    return out, total.log2() + s.amax(1).clamp_min(-1e300)


@over_kernels
def test_merges(module, device, dtype):
    kernels = load(module)
    v, s = states(3, dtype=dtype, device=device)
    expected, expected_s = merged(v, s)
    out, lse = kernels.merge_states(v, s)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected, dtype)
    assert_close(lse, expected_s, torch.float32)
    pairs = [(v[:, i].contiguous(), s[:, i].contiguous()) for i in range(3)]
    expected, expected_s = merged(v[:, :2], s[:, :2])
    out, lse = kernels.merge_state(*pairs[0], *pairs[1])
    assert_close(out, expected, dtype)
    assert_close(lse, expected_s, torch.float32)
    mask = torch.tensor([True, True, False, True, False, True], device=device)
    v_masked, s_masked = (x.clone() for x in pairs[0])
    assert kernels.merge_state_in_place(v_masked, s_masked, *pairs[1], mask) is None
    for i, merge in enumerate(mask.tolist()):
        assert torch.equal(v_masked[i], out[i] if merge else pairs[0][0][i])
        assert torch.equal(s_masked[i], lse[i] if merge else pairs[0][1][i])


@given(st.integers(0, 50), st.permutations(range(3)))
def test_the_order_of_merging_does_not_matter(seed, order):
    v, s = states(3, seed)
    expected, expected_s = reference.merge_states(v, s)
    a, b, c = ((v[:, i], s[:, i]) for i in order)
    for result in (
        reference.merge_state(*reference.merge_state(*a, *b), *c),
        reference.merge_state(*a, *reference.merge_state(*b, *c)),
    ):
        torch.testing.assert_close(result[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result[1], expected_s, atol=1e-5, rtol=1e-5)


def test_an_s_of_another_dtype_is_not_updated():
    v, s = states(2)
    half = s[:, 0].half()
    before = half.clone()
    reference.merge_state_in_place(v[:, 0].clone(), half, v[:, 1], s[:, 1])
    assert torch.equal(half, before)


def rms(x, weight, eps):
    x = x.double().cpu()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double().cpu()


def one_rounding(actual, exact):
    """At most one unit in the last place from the exact result: what a single rounding at the end leaves."""
    assert not actual.isnan().any()
    unit = torch.finfo(actual.dtype).eps * exact.abs().clamp_min(1e-3)
    assert ((actual.double().cpu() - exact).abs() <= (0.51 if actual.dtype != torch.float32 else 4) * unit).all()


@over_kernels
@pytest.mark.parametrize("shape", [(5, 96), (3, 4, 64)])
def test_rmsnorm_rounds_once(module, device, dtype, shape):
    if module == "flashinfer" and dtype == torch.float32:
        pytest.skip("FlashInfer takes 16-bit inputs")
    kernels = load(module)
    random = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(shape, generator=random)).to(dtype).to(device)
    weight = torch.randn(shape[-1], generator=random).to(dtype).to(device)
    for eps in (1e-6, 0.1):
        one_rounding(kernels.rmsnorm(x, weight, eps), rms(x, weight, eps))
    out = torch.empty_like(x)
    assert kernels.rmsnorm(x, weight, out=out).data_ptr() == out.data_ptr()
    one_rounding(out, rms(x, weight, 1e-6))


@over_kernels
def test_fused_add_rmsnorm(module, device, dtype):
    kernels = load(module)
    random = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(5, 96, generator=random).to(dtype).to(device) for _ in range(2))
    weight = torch.randn(96, generator=random).to(dtype).to(device)
    total = x.double().cpu() + residual.double().cpu()
    assert kernels.fused_add_rmsnorm(x, residual, weight) is None
    assert torch.equal(residual.cpu(), total.to(dtype))
    one_rounding(x, rms(total, weight, 1e-6))


@over_kernels
def test_silu_and_mul(module, device, dtype):
    kernels = load(module)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    gate, up = x.double().cpu().chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    assert_close(kernels.silu_and_mul(x), expected, dtype)
    out = torch.empty(2, 3, 64, dtype=dtype, device=device)
    assert kernels.silu_and_mul(x, out).data_ptr() == out.data_ptr()
    assert_close(out, expected, dtype)


def test_silu_and_mul_refuses_other_shapes():
    with pytest.raises(ValueError, match="must be even"):
        reference.silu_and_mul(torch.ones(2, 3))
    for shape in ((4,), (3, 2), (2, 3)):
        with pytest.raises(AssertionError):
            reference.silu_and_mul(torch.ones(2, 4), torch.ones(shape))


def rotated(x, positions, dim, interleave, scale=1.0, theta=1e4):
    """RoPE by loops, in float64."""
    out = x.double().cpu().clone()
    for t, position in enumerate(positions):
        for i in range(dim // 2):
            a, b = (2 * i, 2 * i + 1) if interleave else (i, i + dim // 2)
            angle = position * theta ** (-2 * i / dim) / scale
            c, s = math.cos(angle), math.sin(angle)
            u, w = out[t, :, a].clone(), out[t, :, b].clone()
            out[t, :, a], out[t, :, b] = u * c - w * s, w * c + u * s
    return out


@over_kernels
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(("rotary_dim", "scale", "theta"), [(None, 1.0, 1e4), (32, 4.0, 5e5)])
def test_rope_by_position(module, device, dtype, interleave, rotary_dim, scale, theta):
    kernels = load(module)
    random = torch.Generator().manual_seed(1)
    packed = torch.randn(4, 6, 64, generator=random).to(dtype).to(device)
    q, k = packed[:, :4], packed[:, 4:]
    positions = [0, 7, 131, 3]
    ids = torch.tensor(positions, dtype=torch.int32, device=device)
    options = {"rotary_dim": rotary_dim, "interleave": interleave, "rope_scale": scale, "rope_theta": theta}
    expected = [rotated(x, positions, rotary_dim or 64, interleave, scale, theta) for x in (q, k)]
    for result, exact in zip(kernels.apply_rope_pos_ids(q, k, ids, **options), expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double().cpu(), exact, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-2
        )
    assert kernels.apply_rope_pos_ids_inplace(q, k, ids, **options) is None
    for result, exact in zip((q, k), expected, strict=True):
        torch.testing.assert_close(
            result.double().cpu(), exact, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-2
        )


@over_kernels
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_rope_by_table(module, device, dtype, is_neox, rotary_dim):
    kernels = load(module)
    random = torch.Generator().manual_seed(1)
    q, k = (torch.randn(4, heads * 64, generator=random).to(dtype).to(device) for heads in (4, 2))
    angles = torch.arange(200)[:, None] * 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    table = torch.cat((angles.cos(), angles.sin()), -1).to(device)
    positions = [0, 7, 131, 3]
    for index_dtype in (torch.int32, torch.int64):
        ids = torch.tensor(positions, dtype=index_dtype, device=device)
        expected = [rotated(x.view(4, -1, 64), positions, rotary_dim, not is_neox).view(4, -1) for x in (q, k)]
        results = kernels.apply_rope_with_cos_sin_cache(ids, q, k, 64, table, is_neox)
        copies = q.clone(), k.clone()
        assert kernels.apply_rope_with_cos_sin_cache_inplace(ids, *copies, 64, table, is_neox) is None
        for result, copy, exact in zip(results, copies, expected, strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(result.double().cpu(), exact, atol=tolerance, rtol=1e-2)
            assert torch.equal(result, copy)
    with pytest.raises(ValueError, match="cos_sin_cache should be float32"):
        kernels.apply_rope_with_cos_sin_cache(ids, q, k, 64, table.half())
