"""The twin's attention, against loops in float64 (see kernel_contract), and its errors."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_contract import (
    Batch,
    Case,
    assert_close,
    attend_one,
    check_cascade,
    check_decode,
    check_prefill,
    check_ragged,
    load,
    over_kernels,
    workspace,
)

import minillm.reference as reference

MIXED = {"qo_lens": (1, 3, 0, 7, 1, 4), "kv_lens": (20, 3, 9, 2, 33, 0)}  # empty, blind and idle rows among them
DECODE = {"qo_lens": (1,) * 5, "kv_lens": (1, 17, 0, 33, 16)}


def ids(value):
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


PREFILL_CASES = [
    {},
    {"layout": "HND", "as_tuple": True},
    {"as_tuple": True, "page_size": 5},
    {"layout": "HND", "page_size": 1, "num_qo_heads": 2, "head_dim": 128},
    {"causal": False},
    {"window_left": 0},
    {"window_left": 3, "page_size": 5},
    {"window_left": 4, "causal": False},
    {"soft_cap": 2.0},
    {"soft_cap": 30.0, "window_left": 2, "sm_scale": 0.5},
    {"sm_scale": 0.03, "num_qo_heads": 8},
]


@over_kernels
@pytest.mark.parametrize("changes", PREFILL_CASES, ids=ids)
def test_prefill(module, device, dtype, changes):
    check_prefill(load(module), device, dtype, Case(**(MIXED | changes)))


@over_kernels
@pytest.mark.parametrize("changes", [*PREFILL_CASES[:4], {"window_left": 3}, {"soft_cap": 2.0}], ids=ids)
def test_decode(module, device, dtype, changes):
    check_decode(load(module), device, dtype, Case(**(DECODE | changes)))


@over_kernels
def test_decode_of_groups_of_seven(module, device, dtype):
    case = Case(**DECODE, num_qo_heads=14, num_kv_heads=2)
    check_decode(load(module), device, dtype, case, use_tensor_cores=True)


@over_kernels
@pytest.mark.parametrize("changes", [{}, {"causal": False, "soft_cap": 3.0}, {"window_left": 3}], ids=ids)
def test_ragged(module, device, dtype, changes):
    check_ragged(load(module), device, dtype, Case(**(MIXED | changes)))


@over_kernels
@pytest.mark.parametrize(("qo_lens", "kv_lens"), [((1, 1, 1), (5, 17, 0)), ((3, 1, 6), (3, 20, 9))])
def test_cascade_is_attention_over_the_whole(module, device, dtype, qo_lens, kv_lens):
    check_cascade(load(module), device, dtype, Case(qo_lens, kv_lens), shared_pages=3)


@settings(max_examples=40)
@given(
    lens=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20)), min_size=1, max_size=5),
    group=st.sampled_from((1, 2, 7)),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from((16, 32)),
    page_size=st.sampled_from((1, 3, 5, 16)),
    layout=st.sampled_from(("NHD", "HND")),
    as_tuple=st.booleans(),
    causal=st.booleans(),
    window_left=st.sampled_from((-1, 0, 1, 4)),
    soft_cap=st.sampled_from((None, 1.5)),
    seed=st.integers(0, 3),
)
def test_any_batch(lens, group, num_kv_heads, head_dim, seed, **options):
    qo_lens, kv_lens = zip(*lens, strict=True)
    if sum(qo_lens) == 0:
        return
    case = Case(qo_lens, kv_lens, group * num_kv_heads, num_kv_heads, head_dim, **options)
    check_prefill(reference, "cpu", torch.float32, case, seed)


@over_kernels
def test_large_scores(module, device, dtype):
    # Scores near 10,000: exp(s) overflows, and a float32 log-sum-exp keeps three digits after the point.
    case = Case((1, 3), (20, 5), amplitude=4000.0)
    kernels = load(module)
    batch = Batch(case, device, dtype)
    wrapper = kernels.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
    batch.plan_prefill(wrapper)
    expected, expected_lse = batch.expected()
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert float(expected_lse.max()) > 8000
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-4, atol=0.1)
    for result in (out, wrapper.run(batch.q, batch.cache)):
        torch.testing.assert_close(result.double().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_a_cache_that_is_a_strided_view_is_read_where_it_lies():
    batch = Batch(Case(**MIXED))
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper)
    expected = wrapper.run(batch.q, batch.cache)
    layers = torch.full((3, *batch.cache.shape), math.nan)
    layers[1] = batch.cache
    padded = torch.full((*batch.cache.shape[:-1], 100), math.nan)  # rows of 100, of which attention sees 64
    padded[..., :64] = batch.cache
    for view in (layers[1], batch.cache.unbind(1), padded[..., :64], padded[..., :64].unbind(1)):
        assert torch.equal(wrapper.run(batch.q, view), expected)
    # A dimension of one element may have any stride.
    one = Batch(Case((1,), (3,), 1, 1, page_size=4))
    one.plan_prefill(wrapper)
    page = one.cache[int(one.kv_indices[0])]
    one.kv_indices.zero_()
    one.plan_prefill(wrapper)
    odd = page.unsqueeze(0).as_strided((1, *page.shape), (3, *page.stride()), page.storage_offset())
    assert_close(wrapper.run(one.q, odd), one.expected()[0], torch.float32)


def test_a_page_size_of_one_may_drop_the_page_axis():
    for layout, axis in (("NHD", -3), ("HND", -2)):
        batch = Batch(Case(**MIXED, page_size=1, layout=layout))
        wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"), layout)
        batch.plan_prefill(wrapper)
        expected = wrapper.run(batch.q, batch.cache)
        dropped = batch.cache.squeeze(axis)
        assert torch.equal(wrapper.run(batch.q, dropped), expected)
        assert torch.equal(wrapper.run(batch.q, dropped.unbind(1)), expected)


def test_a_long_and_a_short_request_do_not_share_a_group():
    lens = [500, 30, *range(400, 460)]
    batch = Batch(Case((1,) * 62 + (40,), (*lens, 40), 1, 1, 16))
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper)
    groups = wrapper._plan.groups
    assert len(groups) <= 6
    assert sum(g.num_requests * g.qo_len for g in groups) == 102
    assert sum(g.num_requests * g.kv_len for g in groups) <= 1.3 * sum(lens)
    out = wrapper.run(batch.q, batch.cache)
    for row in (0, 1, 17, 61):
        o, _ = attend_one(batch.q[row, 0].double(), batch.k[row], batch.v[row], batch.case, 0, 1, 0, None)
        assert_close(out[row, 0], o, torch.float32)


def masks(batch):
    random = torch.Generator().manual_seed(3)
    pairs = zip(batch.case.qo_lens, batch.case.kv_lens, strict=True)
    return [torch.rand(q, k, generator=random) < 0.6 for q, k in pairs]


@pytest.mark.parametrize("window_left", [-1, 2])
def test_a_custom_mask_replaces_the_causal_one(window_left):
    batch = Batch(Case(**MIXED, window_left=window_left))
    mask = masks(batch)
    mask[0][:] = False
    flat = torch.cat([m.reshape(-1) for m in mask])
    expected, expected_lse = batch.expected(mask)
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper, custom_mask=flat)
    assert_close(wrapper.run(batch.q, batch.cache), expected, torch.float32)
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert_close(out, expected, torch.float32)
    assert_close(lse, expected_lse, torch.float32)
    ragged = reference.BatchPrefillWithRaggedKVCacheWrapper(workspace("cpu"))
    kv_indptr = torch.tensor([0, *batch.case.kv_lens]).cumsum(0).int()
    ragged.plan(batch.qo_indptr, kv_indptr, *batch.heads(), custom_mask=flat, **batch.plan_options())
    out = ragged.run(batch.q, torch.cat(batch.k).float(), torch.cat(batch.v).float())
    assert_close(out, expected, torch.float32)
    with pytest.raises(ValueError, match="custom mask has"):
        batch.plan_prefill(wrapper, custom_mask=flat[1:])


def test_a_packed_mask_is_read_from_its_least_significant_bit():
    batch = Batch(Case((3,), (7,)))
    [mask] = masks(batch)
    bits = [*mask.reshape(-1).int().tolist(), 0, 0, 0]
    packed = torch.tensor(
        [sum(bit << n for n, bit in enumerate(bits[i : i + 8])) for i in (0, 8, 16)], dtype=torch.uint8
    )
    expected, _ = batch.expected([mask])
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper, packed_custom_mask=packed)
    assert_close(wrapper.run(batch.q, batch.cache), expected, torch.float32)
    k, v = batch.k[0].float(), batch.v[0].float()
    for option in ({"custom_mask": mask}, {"packed_custom_mask": packed}):
        assert_close(reference.single_prefill_with_kv_cache(batch.q, k, v, **option), expected, torch.float32)


def test_a_single_request():
    for layout in ("NHD", "HND"):
        for changes in ({}, {"causal": False}, {"window_left": 2}, {"soft_cap": 2.0, "sm_scale": 0.3}):
            case = Case((4,), (9,), **changes)
            batch = Batch(case)
            k, v = (x[0].float() if layout == "NHD" else x[0].float().transpose(0, 1) for x in (batch.k, batch.v))
            options = {n: o for n, o in batch.plan_options().items() if "type" not in n} | {"kv_layout": layout}
            expected, expected_lse = batch.expected()
            out = reference.single_prefill_with_kv_cache(batch.q, k, v, causal=case.causal, **options)
            assert_close(out, expected, torch.float32)
            result = reference.single_prefill_with_kv_cache(
                batch.q, k, v, causal=case.causal, return_lse=True, **options
            )
            assert_close(result[0], expected, torch.float32)
            assert_close(result[1], expected_lse, torch.float32)
            out, lse = reference.single_decode_with_kv_cache(batch.q[-1], k, v, return_lse=True, **options)
            assert_close(out, expected[-1], torch.float32)
            assert_close(lse, expected_lse[-1], torch.float32)
    assert reference.single_decode_with_kv_cache(batch.q[-1], k, v, kv_layout="HND").shape == (4, 64)
    with pytest.raises(RuntimeError, match="kv_len must be greater than or equal to qo_len"):
        reference.single_prefill_with_kv_cache(torch.ones(3, 1, 16), *torch.ones(2, 2, 1, 16), causal=True)
    with pytest.raises(RuntimeError, match="at least one token"):
        reference.single_decode_with_kv_cache(torch.ones(1, 16), *torch.ones(2, 0, 1, 16))


def test_values_may_be_of_another_width_than_keys():
    q, k, v = torch.randn(3, 4, 32), torch.randn(9, 2, 32), torch.randn(9, 2, 16)
    out = reference.single_prefill_with_kv_cache(q, k, v, causal=True)
    wide = reference.single_prefill_with_kv_cache(q, k, torch.cat((v, v), -1), causal=True)
    torch.testing.assert_close(out, wide[..., :16])
    wrapper = reference.BatchPrefillWithRaggedKVCacheWrapper(workspace("cpu"))
    indptr = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32)
    wrapper.plan(*indptr, 4, 2, 32, 16, causal=True, q_data_type=torch.float32)
    torch.testing.assert_close(wrapper.run(q, k, v), out)


def test_rope_inside_attention_is_rope_before_it():
    batch = Batch(Case((1, 3), (20, 9), window_left=5))
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper, pos_encoding_mode="ROPE_LLAMA", rope_theta=1e3, rope_scale=2.0)
    out = wrapper.run(batch.q, batch.cache)
    at = 0
    for i, (qo_len, kv_len) in enumerate(((1, 20), (3, 9))):
        positions = torch.arange(kv_len)
        keys = batch.k[i].float()
        _, k = reference.apply_rope_pos_ids(keys, keys, positions, rope_theta=1e3, rope_scale=2.0)
        q = batch.q[at : at + qo_len]
        q, _ = reference.apply_rope_pos_ids(q, q, positions[kv_len - qo_len :], rope_theta=1e3, rope_scale=2.0)
        expected = reference.single_prefill_with_kv_cache(q, k, batch.v[i].float(), causal=True, window_left=5)
        torch.testing.assert_close(out[at : at + qo_len], expected)
        at += qo_len


def test_scales_multiply_scores_and_values():
    batch = Batch(Case(**MIXED, sm_scale=0.25))
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper, sm_scale=0.5)
    scaled = wrapper.run(batch.q, batch.cache, q_scale=2.0, k_scale=torch.tensor(0.25), v_scale=3.0)
    assert_close(scaled / 3, batch.expected()[0], torch.float32)


def test_the_base_and_layout_of_the_log_sum_exp():
    batch = Batch(Case(**MIXED))
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper)
    _, lse = wrapper.run_return_lse(batch.q, batch.cache)
    _, natural = wrapper.run(batch.q, batch.cache, return_lse=True, lse_base="ln", lse_layout="HN")
    assert natural.is_contiguous()
    torch.testing.assert_close(natural, lse.t() * math.log(2))
    given = torch.empty(lse.shape[::-1])
    assert wrapper.run(batch.q, batch.cache, return_lse=True, lse=given, lse_layout="HN")[1] is given
    torch.testing.assert_close(given, lse.t())
    for options in ({"lse_base": "e"}, {"lse_layout": "HNN"}):
        with pytest.raises(ValueError, match="must be one of"):
            wrapper.run(batch.q, batch.cache, **options)


def test_an_output_of_another_dtype():
    batch = Batch(Case(**MIXED), dtype=torch.bfloat16)
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    batch.plan_prefill(wrapper, o_data_type=torch.float32)
    out = wrapper.run(batch.q, batch.cache)
    assert out.dtype == torch.float32
    assert_close(out, batch.expected()[0], torch.bfloat16)


def test_several_rows_a_request_in_decode():
    batch = Batch(Case((2, 2, 2), (5, 17, 2)))
    wrapper = reference.BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), use_tensor_cores=True)
    batch.plan_decode(wrapper, q_len_per_req=2)
    assert_close(wrapper.run(batch.q, batch.cache), batch.expected()[0], torch.float32)
    with pytest.raises(ValueError, match="q implies q_len_per_req=1 but plan"):
        wrapper.run(batch.q[:3], batch.cache)
    with pytest.raises(ValueError, match="does not match batch_size"):
        wrapper.run(batch.q[:5], batch.cache)
    with pytest.raises(ValueError, match="empty KV range"):
        batch.plan_decode(wrapper, q_len_per_req=3)


def test_runs_in_inference_mode_and_outside_of_it_alike():
    batch = Batch(Case(**MIXED))
    wrapper = reference.BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    with torch.inference_mode():
        batch.plan_prefill(wrapper)
        expected = wrapper.run(batch.q, batch.cache)
    out = wrapper.run(batch.q.requires_grad_(), batch.cache)
    assert torch.equal(out, expected) and not out.requires_grad


def graph_wrapper(kind, batch_size, max_pages):
    def buffer(n):
        return torch.full((n,), -1, dtype=torch.int32)

    if kind == "decode":
        buffers = [buffer(batch_size + 1), buffer(max_pages), buffer(batch_size)]
        names = [f"paged_kv_{n}_buffer" for n in ("indptr", "indices", "last_page_len")]
        cls = reference.BatchDecodeWithPagedKVCacheWrapper
    else:
        buffers = [buffer(batch_size + 1), buffer(batch_size + 1), buffer(max_pages), buffer(batch_size)]
        names = ["qo_indptr_buf", *(f"paged_kv_{n}_buf" for n in ("indptr", "indices", "last_page_len"))]
        cls = reference.BatchPrefillWithPagedKVCacheWrapper
    options = dict(zip(names, buffers, strict=True))
    return cls, options


def test_graph_mode_refreshes_its_buffers():
    for kind in ("prefill", "decode"):
        cls, buffers = graph_wrapper(kind, 3, 20)
        wrapper = cls(workspace("cpu"), use_cuda_graph=True, **buffers)
        assert wrapper.is_cuda_graph_enabled
        for seed, kv_lens in enumerate(((40, 33, 16), (1, 70, 17), (5, 5, 0))):
            batch = Batch(Case((1, 1, 1), kv_lens), seed=seed)
            getattr(batch, f"plan_{kind}")(wrapper)
            assert_close(wrapper.run(batch.q, batch.cache), batch.expected()[0], torch.float32)
            held = list(buffers.values())[-3:]
            assert torch.equal(held[0], batch.kv_indptr)
            assert torch.equal(held[1][: len(batch.kv_indices)], batch.kv_indices)
            assert torch.equal(held[2], batch.last_page_len)


def test_graph_mode_keeps_the_mask_in_its_buffers():
    cls, buffers = graph_wrapper("prefill", 2, 20)
    mask_buffers = {"custom_mask_buf": torch.zeros(99, dtype=torch.uint8), "mask_indptr_buf": torch.zeros(3).int()}
    batch = Batch(Case((3, 2), (5, 9)))
    mask = masks(batch)
    flat = torch.cat([m.reshape(-1) for m in mask])
    without = cls(workspace("cpu"), use_cuda_graph=True, **buffers)
    with pytest.raises(ValueError, match="custom_mask_buf must be initialized"):
        batch.plan_prefill(without, custom_mask=flat)
    wrapper = cls(workspace("cpu"), use_cuda_graph=True, **buffers, **mask_buffers)
    batch.plan_prefill(wrapper, custom_mask=flat)
    assert_close(wrapper.run(batch.q, batch.cache), batch.expected(mask)[0], torch.float32)
    assert mask_buffers["mask_indptr_buf"].tolist() == [0, 2, 5]  # 15 and 18 bits, in whole bytes
    packed = mask_buffers["custom_mask_buf"]
    assert [int(packed[i // 8]) >> i % 8 & 1 for i in range(15)] == mask[0].reshape(-1).int().tolist()
    assert [int(packed[2 + i // 8]) >> i % 8 & 1 for i in range(18)] == mask[1].reshape(-1).int().tolist()


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_graph_mode_refuses_what_does_not_fit(kind):
    cls, buffers = graph_wrapper(kind, 3, 5)
    for name in buffers:
        with pytest.raises(ValueError, match=f"{name} should be a torch.Tensor"):
            cls(workspace("cpu"), use_cuda_graph=True, **(buffers | {name: None}))
    for name in list(buffers)[:-1]:
        if "indices" not in name:
            with pytest.raises(ValueError, match="batch_size"):
                cls(workspace("cpu"), use_cuda_graph=True, **(buffers | {name: torch.zeros(9).int()}))
    wrapper = cls(workspace("cpu"), use_cuda_graph=True, **buffers)
    plan = f"plan_{kind}"
    getattr(Batch(Case((1, 1, 1), (1, 2, 3))), plan)(wrapper)
    with pytest.raises(ValueError, match="batch size should be fixed"):
        getattr(Batch(Case((1, 1), (1, 2))), plan)(wrapper)
    with pytest.raises(ValueError, match=r"exceeds the allocated|less than or equal to the allocated"):
        getattr(Batch(Case((1, 1, 1), (16, 48, 32))), plan)(wrapper)
    if kind == "prefill":
        with pytest.raises(ValueError, match="cannot exceed the number of rows set during initialization 3"):
            getattr(Batch(Case((1, 2, 1), (1, 2, 3))), plan)(wrapper)


def test_graph_mode_of_ragged_and_of_cascade():
    ragged = reference.BatchPrefillWithRaggedKVCacheWrapper
    buffers = {"qo_indptr_buf": torch.zeros(3).int(), "kv_indptr_buf": torch.zeros(3).int()}
    wrapper = ragged(workspace("cpu"), use_cuda_graph=True, **buffers)
    indptr = torch.tensor([0, 1, 3], dtype=torch.int32)
    wrapper.plan(indptr, indptr, 1, 1, 16, q_data_type=torch.float32)
    assert torch.equal(buffers["kv_indptr_buf"], indptr)
    for bad in ({"qo_indptr_buf": None}, {"kv_indptr_buf": None}, {"kv_indptr_buf": torch.zeros(9).int()}):
        with pytest.raises(ValueError, match="should be"):
            ragged(workspace("cpu"), use_cuda_graph=True, **(buffers | bad))
    with pytest.raises(ValueError, match="cannot exceed"):
        wrapper.plan(indptr * 2, indptr, 1, 1, 16)
    arrays = [[torch.zeros(n).int() for _ in range(2)] for n in (2, 2, 9, 1)]
    cascade = reference.MultiLevelCascadeAttentionWrapper(2, workspace("cpu"), "NHD", True, *arrays)
    two = [torch.tensor([0, 1]).int()] * 2
    cascade.plan(
        two, two, [torch.tensor([3]).int(), torch.tensor([5]).int()], [torch.tensor([4]).int()] * 2, 1, 1, 16, 4
    )
    assert [int(x[0]) for x in arrays[2]] == [3, 5] and cascade.is_cuda_graph_enabled
    with pytest.raises(ValueError, match="zip"):
        cascade.plan(two[:1], two, two, [torch.tensor([4]).int()] * 2, 1, 1, 16, 4)


def test_errors_of_run():
    batch = Batch(Case(**DECODE))
    wrappers = [
        cls(workspace("cpu"))
        for cls in (reference.BatchPrefillWithPagedKVCacheWrapper, reference.BatchDecodeWithPagedKVCacheWrapper)
    ]
    for wrapper, plan in zip(wrappers, (batch.plan_prefill, batch.plan_decode), strict=True):
        with pytest.raises(RuntimeError, match=r"plan\(\) must be called before run\(\)"):
            wrapper.run(batch.q, batch.cache)
        plan(wrapper)
        for error, match, q, cache, options in (
            (
                ValueError,
                "dtype of q torch.bfloat16 does not match the q_data_type",
                batch.q.bfloat16(),
                batch.cache,
                {},
            ),
            (ValueError, "dtype of k torch.float16 does not match the kv_data_type", batch.q, batch.cache.half(), {}),
            (ValueError, r"q.shape\[0\] \(4\) does not match", batch.q[:4], batch.cache, {}),
            (KeyError, "Unrecognized paged_kv_cache type", batch.q, list(batch.cache.unbind(1)), {}),
            (ValueError, "4D or 5D", batch.q, batch.cache[0, 0], {}),
            (ValueError, "3D or 4D", batch.q, (batch.cache, batch.cache), {}),
            (ValueError, "but plan", batch.q, batch.cache[:, :, :8], {}),
            (ValueError, "Invalid shape of out", batch.q, batch.cache, {"out": batch.q[1:]}),
            (ValueError, "dtype of out", batch.q, batch.cache, {"out": batch.q.half()}),
            (ValueError, "Invalid shape of lse", batch.q, batch.cache, {"lse": torch.empty(3), "return_lse": True}),
            (
                ValueError,
                "Invalid dtype of lse",
                batch.q,
                batch.cache,
                {"lse": torch.ones(5, 4).half(), "return_lse": True},
            ),
            (AssertionError, "window_left", batch.q, batch.cache, {"window_left": 3}),
            (NotImplementedError, "'sinks'", batch.q, batch.cache, {"sinks": torch.ones(4)}),
            (NotImplementedError, "'kv_cache_sf'", batch.q, batch.cache, {"kv_cache_sf": batch.cache}),
        ):
            with pytest.raises(error, match=match):
                wrapper.run(q, cache, **options)
    with pytest.raises(ValueError, match="q implies q_len_per_req=2"):
        wrapper.run(batch.q.repeat(2, 1, 1), batch.cache)
    with pytest.warns(DeprecationWarning, match="q_len_per_req"):
        wrapper.run(batch.q, batch.cache, q_len_per_req=1)
    ragged = reference.BatchPrefillWithRaggedKVCacheWrapper(workspace("cpu"))
    with pytest.raises(RuntimeError, match=r"plan\(\) must be called"):
        ragged.run(batch.q, batch.q, batch.q)
    ragged.plan(*[torch.tensor([0, 5]).int()] * 2, 4, 4, 64, q_data_type=torch.float32)
    with pytest.raises(NotImplementedError, match="'k_scale'"):
        ragged.run(batch.q, batch.q, batch.q, k_scale=2.0)
    with pytest.raises(ValueError, match="ragged prefill"):
        ragged.run(batch.q[1:], batch.q, batch.q)


def test_errors_of_construction_and_of_plan():
    decode, prefill = reference.BatchDecodeWithPagedKVCacheWrapper, reference.BatchPrefillWithPagedKVCacheWrapper
    ragged = reference.BatchPrefillWithRaggedKVCacheWrapper
    for cls in (decode, prefill, ragged):
        with pytest.raises(KeyError, match="Invalid kv_layout DHN"):
            cls(workspace("cpu"), "DHN")
        with pytest.raises(NotImplementedError, match="backend='trtllm-gen'"):
            cls(workspace("cpu"), backend="trtllm-gen")
        with pytest.raises(NotImplementedError, match="'jit_args'"):
            cls(workspace("cpu"), jit_args=[])
    with pytest.raises(ValueError, match="16-byte aligned"):
        decode(torch.zeros(32, dtype=torch.uint8)[1:])
    batch = Batch(Case(**DECODE))
    wrapper = prefill(workspace("cpu"))
    for error, match, options in (
        (KeyError, "Invalid pos_encoding_mode ROPE", {"pos_encoding_mode": "ROPE"}),
        (NotImplementedError, "ALIBI", {"pos_encoding_mode": "ALIBI"}),
        (NotImplementedError, "kv_data_type", {"kv_data_type": torch.float8_e4m3fn}),
        (NotImplementedError, "block_tables", {"block_tables": torch.zeros(5, 3).int()}),
        (TypeError, "dtype must be", {"q_data_type": 3}),
    ):
        with pytest.raises(error, match=match):
            batch.plan_prefill(wrapper, **options)
        with pytest.raises(error, match=match):
            batch.plan_decode(decode(workspace("cpu")), **options)
    for option in ("prefix_len_ptr", "token_pos_in_items_ptr", "max_item_len_ptr"):
        with pytest.raises(NotImplementedError, match=option):
            batch.plan_prefill(wrapper, **{option: torch.zeros(5).int()})
    with pytest.raises(RuntimeError, match="should be divisible"):
        wrapper.plan(batch.qo_indptr, batch.kv_indptr, batch.kv_indices, batch.last_page_len, 3, 2, 64, 16)
    empty = torch.zeros(1).int()
    with pytest.raises(RuntimeError, match="at least one request"):
        wrapper.plan(empty, empty, empty[:0], empty[:0], 2, 2, 64, 16)
    for error, match, options in (
        (ValueError, "q_len_per_req must be >= 1", {"q_len_per_req": 0}),
        (ValueError, "requires tensor-core decode", {"q_len_per_req": 2}),
        (ValueError, "fixed_split_size", {"fixed_split_size": 2}),
        (NotImplementedError, "window_right", {"window_right": 1}),
        (NotImplementedError, "is_causal", {"is_causal": True}),
        (TypeError, "unexpected keyword argument 'causal'", {"causal": True}),
    ):
        with pytest.raises(error, match=match):
            batch.plan_decode(decode(workspace("cpu")), **options)


def test_decode_options_given_positionally_work_but_warn():
    batch = Batch(Case(**DECODE, window_left=3))
    wrapper = reference.BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
    arrays = (batch.kv_indptr, batch.kv_indices, batch.last_page_len, *batch.heads(), 16)
    with pytest.warns(DeprecationWarning, match="positionally is deprecated"):
        wrapper.plan(*arrays, "NONE", 3, None, torch.float32)
    assert_close(wrapper.run(batch.q, batch.cache), batch.expected()[0], torch.float32)
    with pytest.raises(TypeError, match="multiple values for argument 'window_left'"):
        wrapper.plan(*arrays, "NONE", 3, window_left=3)
    with pytest.raises(TypeError, match="at most 16"):
        wrapper.plan(*arrays, *[None] * 17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.plan(*arrays, data_type=torch.float16)


def test_the_default_dtype_is_float16():
    batch = Batch(Case(**DECODE))
    wrapper = reference.BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
    wrapper.plan(batch.kv_indptr, batch.kv_indices, batch.last_page_len, *batch.heads(), 16)
    with pytest.raises(ValueError, match=r"q_data_type torch\.float16"):
        wrapper.run(batch.q, batch.cache)


def test_a_page_outside_the_cache_is_an_error():
    batch = Batch(Case(**DECODE))
    wrapper = reference.BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
    for page in (1000, -1000):
        batch.kv_indices[2] = page
        batch.plan_decode(wrapper)
        with pytest.raises(IndexError):
            wrapper.run(batch.q, batch.cache)
