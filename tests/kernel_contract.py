"""What attention kernels must compute, against loops in float64: for the twin, and for FlashInfer where there is a GPU.

Every check takes the kernels module, a device and a dtype. Page ids are scattered, and all that no request owns is
NaN: whoever reads it shows it.
"""

import importlib
import math
from dataclasses import dataclass

import pytest
import torch

TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TWIN = [("minillm.reference", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
REAL = [("flashinfer", "cuda", dtype) for dtype in (torch.bfloat16, torch.float16)]
KERNELS = [pytest.param(*row, id=f"twin-{str(row[2])[6:]}") for row in TWIN]
KERNELS += [pytest.param(*row, id=f"flashinfer-{str(row[2])[6:]}", marks=pytest.mark.gpu) for row in REAL]
over_kernels = pytest.mark.parametrize(("module", "device", "dtype"), KERNELS)


def load(module):
    """The kernels module; the test is skipped where it cannot be imported."""
    return importlib.import_module(module) if module.startswith("minillm") else pytest.importorskip(module)


def workspace(device):
    """Memory for a wrapper: FlashInfer wants 128 MB, zeroed; the twin none."""
    return torch.zeros(128 * 1024 * 1024 if device == "cuda" else 16, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Case:
    """A batch to attend over; lengths in tokens."""

    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    layout: str = "NHD"
    as_tuple: bool = False
    causal: bool = True
    window_left: int = -1
    soft_cap: float | None = None
    sm_scale: float | None = None
    amplitude: float = 1.0


class Batch:
    """Random tensors for a case: `q`, the `cache` in the case's layout, the index arrays, and K/V in float64."""

    def __init__(self, case, device="cpu", dtype=torch.float32, seed=0, index_device="cpu"):
        random = torch.Generator().manual_seed(seed)
        self.case, self.device, self.dtype = case, device, dtype
        heads, dim, page_size = case.num_kv_heads, case.head_dim, case.page_size
        pages = [-(-length // page_size) for length in case.kv_lens]
        total = sum(pages)
        scattered = torch.randperm(total + 7, generator=random)[:total]
        nhd = torch.full((total + 7, 2, page_size, heads, dim), math.nan, dtype=torch.float64)
        self.k, self.v = [], []
        at = 0
        for length, count in zip(case.kv_lens, pages, strict=True):
            kv = torch.randn(2, length, heads, dim, generator=random, dtype=torch.float64)
            kv[0] *= case.amplitude
            kv = kv.to(dtype).double()
            for j in range(length):
                nhd[scattered[at + j // page_size], :, j % page_size] = kv[:, j]
            self.k.append(kv[0])
            self.v.append(kv[1])
            at += count
        cache = nhd.to(dtype).to(device)
        if case.layout == "HND":
            cache = cache.transpose(2, 3).contiguous()
        self.cache = tuple(x.contiguous() for x in cache.unbind(1)) if case.as_tuple else cache
        self.q = torch.randn(sum(case.qo_lens), case.num_qo_heads, dim, generator=random).to(dtype).to(device)

        def index(values):
            return torch.tensor(values, dtype=torch.int32, device=index_device)

        self.qo_indptr = index([0, *case.qo_lens]).cumsum(0, dtype=torch.int32)
        self.kv_indptr = index([0, *pages]).cumsum(0, dtype=torch.int32)
        self.kv_indices = scattered.to(torch.int32).to(device)
        self.last_page_len = index(
            [
                length - (count - 1) * page_size if count else 0
                for length, count in zip(case.kv_lens, pages, strict=True)
            ]
        )
        self.scattered = scattered

    def expected(self, mask=None):
        """(output, base-2 log-sum-exp) by loops in float64; `mask[i]` `[qo_len, kv_len]` replaces the causal one."""
        case, outputs, lses = self.case, [], []
        q = self.q.double().cpu()
        at = 0
        for i, qo_len in enumerate(case.qo_lens):
            for row in range(qo_len):
                for head in range(case.num_qo_heads):
                    o, lse = attend_one(
                        q[at + row, head], self.k[i], self.v[i], case, row, qo_len, head, mask and mask[i]
                    )
                    outputs.append(o)
                    lses.append(lse)
            at += qo_len
        shape = (at, case.num_qo_heads)
        return torch.stack(outputs).view(*shape, -1), torch.tensor(lses, dtype=torch.float64).view(shape)

    def plan_options(self):
        case = self.case
        return {
            "window_left": case.window_left,
            "logits_soft_cap": case.soft_cap,
            "sm_scale": case.sm_scale,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    def heads(self):
        return self.case.num_qo_heads, self.case.num_kv_heads, self.case.head_dim

    def plan_prefill(self, wrapper, **options):
        options = self.plan_options() | {"causal": self.case.causal} | options
        arrays = (self.qo_indptr, self.kv_indptr, self.kv_indices, self.last_page_len)
        wrapper.plan(*arrays, *self.heads(), self.case.page_size, **options)

    def plan_decode(self, wrapper, **options):
        options = self.plan_options() | options
        arrays = (self.kv_indptr, self.kv_indices, self.last_page_len)
        wrapper.plan(*arrays, *self.heads(), self.case.page_size, **options)


def attend_one(q, k, v, case, row, qo_len, head, mask):
    """One row and head of attention, token by token."""
    kv_len = k.shape[0]
    kv_head = head // (case.num_qo_heads // case.num_kv_heads)
    scale = 1 / math.sqrt(case.head_dim) if case.sm_scale is None else case.sm_scale
    position = row + kv_len - qo_len
    scores, values = [], []
    for j in range(kv_len):
        if (mask is None and case.causal and j > position) or (mask is not None and not mask[row, j]):
            continue
        if case.window_left >= 0 and j < position - case.window_left:
            continue
        score = float(q @ k[j, kv_head]) * scale
        if case.soft_cap:
            score = case.soft_cap * math.tanh(score / case.soft_cap)
        scores.append(score)
        values.append(v[j, kv_head])
    if not scores:
        return torch.zeros(v.shape[-1], dtype=torch.float64), -math.inf
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return sum(w * x for w, x in zip(weights, values, strict=True)) / total, (top + math.log(total)) / math.log(2)


def assert_close(actual, expected, dtype, what=""):
    """Close within the dtype's tolerance, with infinities in the same places and NaN nowhere."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected, atol=tolerance, rtol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def check_prefill(kernels, device, dtype, case, seed=0):
    """Paged prefill, with and without log-sum-exp, into given buffers too."""
    batch = Batch(case, device, dtype, seed)
    wrapper = kernels.BatchPrefillWithPagedKVCacheWrapper(workspace(device), case.layout)
    batch.plan_prefill(wrapper)
    expected, expected_lse = batch.expected()
    assert_close(wrapper.run(batch.q, batch.cache), expected, dtype, "output")
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert_close(out, expected, dtype, "output beside lse")
    assert lse.dtype == torch.float32
    assert_close(lse, expected_lse, dtype, "lse")
    given, given_lse = torch.full_like(out, 7), torch.full_like(lse, 7)
    returned = wrapper.run(batch.q, batch.cache, out=given, lse=given_lse, return_lse=True)
    assert returned[0].data_ptr() == given.data_ptr() and returned[1].data_ptr() == given_lse.data_ptr()
    assert_close(given, expected, dtype, "out=")
    assert_close(given_lse, expected_lse, dtype, "lse=")


def check_decode(kernels, device, dtype, case, seed=0, **options):
    """Paged decode, the same as prefill with one row a request."""
    batch = Batch(case, device, dtype, seed)
    wrapper = kernels.BatchDecodeWithPagedKVCacheWrapper(workspace(device), case.layout, **options)
    batch.plan_decode(wrapper)
    expected, expected_lse = batch.expected()
    assert_close(wrapper.run(batch.q, batch.cache), expected, dtype, "output")
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert_close(out, expected, dtype, "output beside lse")
    assert_close(lse, expected_lse, dtype, "lse")
    given = torch.full_like(out, 7)
    assert wrapper.run(batch.q, batch.cache, out=given).data_ptr() == given.data_ptr()
    assert_close(given, expected, dtype, "out=")


def check_ragged(kernels, device, dtype, case, seed=0):
    """Ragged prefill computes what paged prefill computes."""
    batch = Batch(case, device, dtype, seed)
    wrapper = kernels.BatchPrefillWithRaggedKVCacheWrapper(workspace(device))
    kv_indptr = torch.tensor([0, *case.kv_lens]).cumsum(0).to(torch.int32)
    wrapper.plan(batch.qo_indptr, kv_indptr, *batch.heads(), causal=case.causal, **batch.plan_options())
    k, v = (torch.cat(x).to(dtype).to(device) for x in (batch.k, batch.v))
    expected, expected_lse = batch.expected()
    assert_close(wrapper.run(batch.q, k, v), expected, dtype, "output")
    out, lse = wrapper.run(batch.q, k, v, return_lse=True)
    assert_close(out, expected, dtype, "output beside lse")
    assert_close(lse, expected_lse, dtype, "lse")


def check_cascade(kernels, device, dtype, case, shared_pages, seed=0):
    """Two levels over a shared prefix compute what one paged prefill over prefix and own pages computes."""
    own = Batch(case, device, dtype, seed)
    prefix = torch.arange(own.cache.shape[0], own.cache.shape[0] + shared_pages, dtype=torch.int32)
    random = torch.Generator().manual_seed(seed + 1)
    shape = (shared_pages, *own.cache.shape[1:])
    cache = torch.cat((own.cache, torch.randn(shape, generator=random).to(dtype).to(device)))
    requests = len(case.qo_lens)
    wrapper = kernels.MultiLevelCascadeAttentionWrapper(2, workspace(device), case.layout)
    ends = torch.tensor([0, own.q.shape[0]], dtype=torch.int32)
    wrapper.plan(
        [ends, own.qo_indptr],
        [torch.tensor([0, shared_pages], dtype=torch.int32), own.kv_indptr],
        [prefix.to(device), own.kv_indices],
        [torch.tensor([case.page_size], dtype=torch.int32), own.last_page_len],
        *own.heads(),
        case.page_size,
        causal=case.causal,
        q_data_type=dtype,
        kv_data_type=dtype,
    )
    tables = [
        torch.cat((prefix, own.kv_indices[own.kv_indptr[i] : own.kv_indptr[i + 1]].cpu())) for i in range(requests)
    ]
    whole = kernels.BatchPrefillWithPagedKVCacheWrapper(workspace(device), case.layout)
    whole.plan(
        own.qo_indptr,
        torch.tensor([0, *(len(table) for table in tables)]).cumsum(0).to(torch.int32),
        torch.cat(tables).to(device),
        torch.where(own.last_page_len == 0, case.page_size, own.last_page_len),
        *own.heads(),
        case.page_size,
        causal=case.causal,
        q_data_type=dtype,
        kv_data_type=dtype,
    )
    assert_close(wrapper.run(own.q, cache), whole.run(own.q, cache).double().cpu(), dtype)


def check_append(kernels, device, dtype, layout, page_size, as_tuple, head_dim=64, seed=0):
    """Appending writes each token to its slot, and nothing else."""
    before, added, heads = (3, 0, 2 * page_size, 5), (2, 1, 1, 0), 2
    lens = tuple(a + b for a, b in zip(before, added, strict=True))
    case = Case(added, lens, heads, heads, head_dim, page_size, layout, as_tuple)
    batch = Batch(case, device, dtype, seed)
    pair = batch.cache if as_tuple else batch.cache.unbind(1)
    written = [x.clone() for x in pair]
    key, value = (
        torch.cat([x[n:] for x, n in zip(side, before, strict=True)]).to(dtype).to(device)
        for side in (batch.k, batch.v)
    )
    # The cache as it was: the new tokens' slots hold something else.
    at = 0
    for i, n in enumerate(added):
        for t in range(n):
            position = before[i] + t
            page = batch.scattered[int(batch.kv_indptr[i]) + position // page_size]
            for x in pair:
                slot = x[page, position % page_size] if layout == "NHD" else x[page, :, position % page_size]
                slot.fill_(9)
            at += 1
    seq_lens = kernels.get_seq_lens(batch.kv_indptr, batch.last_page_len, page_size)
    assert seq_lens.tolist() == list(lens)
    indices, positions = kernels.get_batch_indices_positions(batch.qo_indptr.to(device), seq_lens.to(device), at)
    assert indices.tolist() == [i for i, n in enumerate(added) for _ in range(n)]
    assert positions.tolist() == [before[i] + t for i, n in enumerate(added) for t in range(n)]
    tables = (batch.kv_indices, batch.kv_indptr.to(device), batch.last_page_len.to(device))
    assert kernels.append_paged_kv_cache(key, value, indices, positions, batch.cache, *tables, layout) is None
    for x, y in zip(pair, written, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
