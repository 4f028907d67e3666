"""The contracts: what a part of the engine must do, written once, and executable.

The same contract checks the library's class, FlashInfer's kernels, their twin on the CPU, and the reader's own attempt.
Each raises `ContractFailure`, which names the rule in one sentence and shows where it was broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from minillm.context import BatchArrays
from minillm.lab.contract_failure import ContractFailure
from minillm.lab.contract_pages import check_page_manager
from minillm.lab.naive import paged_attention

__all__ = ["ContractFailure", "check_attention", "check_page_manager", "check_rmsnorm", "check_rope"]

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WORKSPACE_BYTES = 128 * 1024 * 1024


def check_attention(kernels: Any, device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> None:
    """Raise `ContractFailure` unless `kernels` appends to, prefills from and decodes from scattered pages correctly.

    `kernels` has FlashInfer's names: `append_paged_kv_cache`, `BatchPrefillWithPagedKVCacheWrapper` and
    `BatchDecodeWithPagedKVCacheWrapper` (https://docs.flashinfer.ai/api/attention.html). Compared with naive attention
    in float32. FlashInfer itself serves neither float32 nor the CPU: pass `device="cuda"` and `dtype=torch.bfloat16`.
    """
    generator = torch.Generator().manual_seed(0)
    workspace = torch.zeros(WORKSPACE_BYTES if device != "cpu" else 4096, dtype=torch.uint8, device=device)
    prefill = kernels.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    decode = kernels.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def compare(
        rule: str, got: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, arrays: BatchArrays, causal: bool
    ) -> None:
        expected = paged_attention(q.float().cpu(), kv.float().cpu(), arrays, causal)
        _require_close(rule, got, expected, dtype, ("row", "head", "element"), _rows_of(arrays))

    for page_size, num_qo_heads, num_kv_heads, lengths in (
        (4, 1, 1, ((0, 4), (0, 4))),  # (tokens in the cache before, tokens of this step)
        (4, 1, 1, ((0, 5), (0, 3), (0, 8))),
        (1, 2, 2, ((0, 3), (0, 1))),
        (16, 4, 2, ((0, 40), (3, 14), (16, 16))),
        (5, 8, 2, ((11, 4), (0, 1), (24, 1), (4, 7))),
    ):
        arrays = _scattered_batch(page_size, lengths)
        index = {name: torch.from_numpy(getattr(arrays, name)) for name in vars(arrays) if name != "page_size"}
        plan = [index[name] for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")]
        plan[2] = plan[2].to(device)
        heads = (num_qo_heads, num_kv_heads, head_dim, page_size)
        num_pages = 2 * len(arrays.kv_indices)
        q = random(arrays.num_tokens, num_qo_heads, head_dim)
        k, v = (random(arrays.num_tokens, num_kv_heads, head_dim) for _ in range(2))
        kv = random(num_pages, 2, page_size, num_kv_heads, head_dim)  # what others have left in the pages is there, too

        expected_kv = kv.clone()
        row = 0
        for request, (start, count) in enumerate(lengths):
            for position in range(start, start + count):
                page = arrays.kv_indices[arrays.kv_indptr[request] + position // page_size]
                expected_kv[page, 0, position % page_size], expected_kv[page, 1, position % page_size] = k[row], v[row]
                row += 1
        on_device = {name: tensor.to(device) for name, tensor in index.items()}
        names = ("kv_indices", "kv_indptr", "kv_last_page_len")
        where = (on_device["batch_indices"], on_device["positions"], kv, *(on_device[name] for name in names))
        kernels.append_paged_kv_cache(k, v, *where)
        rule = "append writes each token's K and V to its slot, and nothing else"
        _require_close(rule, kv, expected_kv, dtype, ("page", "K/V", "slot", "head", "element"), exact=True)

        prefill.plan(*plan, *heads, causal=True, q_data_type=dtype, kv_data_type=dtype)
        rule = "prefill attends to the request's own pages, causally, its last query being its last token"
        compare(rule, prefill.run(q, kv), q, kv, arrays, causal=True)
        prefill.plan(*plan, *heads, causal=False, q_data_type=dtype, kv_data_type=dtype)
        rule = "prefill that is not causal attends to all of the request's tokens, and no others"
        compare(rule, prefill.run(q, kv), q, kv, arrays, causal=False)

        last = _scattered_batch(page_size, [(start + count - 1, 1) for start, count in lengths])
        decode.plan(*plan[1:], *heads, q_data_type=dtype, kv_data_type=dtype)
        q = random(len(lengths), num_qo_heads, head_dim)
        rule = "decode attends with one query a request to all of its tokens, and no others"
        compare(rule, decode.run(q, kv), q, kv, last, causal=True)


def check_rmsnorm(
    fn: Callable[..., torch.Tensor],
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
) -> None:
    """Raise `ContractFailure` unless `fn(x, weight, eps)` is the RMS norm of each row of `x` `[num_tokens, size]`.

    `x * weight / sqrt(mean(x**2) + eps)`, computed in float32 whatever the dtype, returned in that of `x`, which is not
    changed. https://arxiv.org/abs/1910.07467
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        for rule, scale, shift, eps, num_tokens in (
            ("each row is divided by its own root mean square", 1.0, 0.0, 1e-6, 1),
            ("each row is divided by its own root mean square", 3.0, 0.0, 1e-6, 4),
            ("the mean is not subtracted", 1.0, 2.0, 1e-6, 3),
            ("eps is added to the mean square, under the root", 1e-2, 0.0, 1e-3, 3),
            ("the squares are summed in float32: they may neither overflow nor drown", 100.0, 300.0, 1e-6, 3),
        ):
            x = (torch.randn(num_tokens, 128, generator=generator) * scale + shift).to(device, dtype)
            for weight_rule, weight in (
                (rule, torch.ones(128)),
                ("the result is multiplied by the weight", torch.rand(128, generator=generator) + 0.5),
            ):
                weight = weight.to(device, dtype)
                before = x.clone()
                got = fn(x, weight, eps)
                wide = x.float()
                expected = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
                # One rounding at the end is half a unit in the last place; allow a second one before the weight.
                tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
                _require_close(weight_rule, got, expected, dtype, ("row", "element"), tolerance=tolerance)
                _require("the result has the dtype of the input", got.dtype == dtype, f"{got.dtype}, not {dtype}")
                _require("the input is left as it was", torch.equal(x, before), "it was changed in place")


def check_rope(
    fn: Callable[..., tuple[torch.Tensor, torch.Tensor]], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Raise `ContractFailure` unless `fn(q, k, positions, rope_theta=theta)` returns rotated copies of `q` and `k`.

    `q` and `k` are `[num_tokens, heads, head_dim]`, positions `[num_tokens]` int32. Element `i` of the first half and
    element `i` of the second are a pair, rotated by `position * theta ** (-2 * i / head_dim)` (the halves are not
    interleaved), as `flashinfer.apply_rope_pos_ids` does. https://arxiv.org/abs/2104.09864
    """
    generator = torch.Generator().manual_seed(0)
    head_dim, num_tokens = 64, 6
    q, k = (torch.randn(num_tokens, heads, head_dim, generator=generator).to(device, dtype) for heads in (4, 2))

    def rotate(positions: Sequence[int], theta: float, rule: str) -> None:
        pos_ids = torch.tensor(positions, dtype=torch.int32, device=device)
        before = q.clone(), k.clone()
        got = fn(q, k, pos_ids, rope_theta=theta)
        _require(
            "the inputs are left as they were",
            torch.equal(q, before[0]) and torch.equal(k, before[1]),
            "changed in place",
        )
        for name, rotated, x in (("q", got[0], q), ("k", got[1], k)):
            wide = x.double().cpu()
            angle = np.outer(positions, theta ** (-2 * np.arange(head_dim // 2) / head_dim))
            cos, sin = (torch.from_numpy(f(angle)).unsqueeze(1) for f in (np.cos, np.sin))
            first, second = wide.chunk(2, dim=-1)
            expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
            # A float32 angle of some thousands is exact to 2**-12 or so; fast sines lose a little more.
            tolerance = max(TOLERANCES[dtype], 1e-2 if max(positions) > 1000 else 0.0)
            names = (f"{name} row", "head", "element")
            _require_close(rule, rotated, expected, dtype, names, tolerance=tolerance)

    rotate([0] * num_tokens, 1e4, "position 0 is not rotated")
    rotate([1] * num_tokens, 1e4, "position 1 rotates each pair, one element of each half, by its own frequency")
    rotate(range(num_tokens), 1e4, "each row is rotated by its position")
    rotate([7, 3, 3, 100, 0, 41], 1e4, "positions come from the argument, not from the order of the rows")
    rotate([7, 3, 3, 100, 0, 41], 5e5, "theta sets the frequencies")
    rotate([4095, 2048, 8191, 4096, 5000, 1], 1e4, "far positions are rotated precisely: angles are float32")


def _scattered_batch(page_size: int, lengths: Sequence[tuple[int, int]]) -> BatchArrays:
    """A batch of requests with `(tokens before, tokens of this step)`, its pages scattered among twice as many."""
    starts, counts = (np.array(column) for column in zip(*lengths, strict=True))
    num_pages = -(-(starts + counts) // page_size)
    total = int(num_pages.sum())
    pages = np.random.default_rng(total).permutation(2 * total)[:total]
    return BatchArrays(
        qo_indptr=np.cumsum([0, *counts], dtype=np.int32),
        kv_indptr=np.cumsum([0, *num_pages], dtype=np.int32),
        kv_indices=pages.astype(np.int32),
        kv_last_page_len=(starts + counts - (num_pages - 1) * page_size).astype(np.int32),
        positions=np.concatenate([np.arange(start, start + count) for start, count in lengths]).astype(np.int32),
        batch_indices=np.repeat(np.arange(len(lengths)), counts).astype(np.int32),
        page_size=page_size,
    )


def _rows_of(arrays: BatchArrays) -> Callable[[int], str]:
    """Which request and position a row is, in words."""
    table = [
        f"request {request}, position {position} of {arrays.kv_lens[request]} tokens in pages of {arrays.page_size}"
        for request, position in zip(arrays.batch_indices, arrays.positions, strict=True)
    ]
    return lambda row: table[row]


def _require(rule: str, holds: bool, detail: str) -> None:
    if not holds:
        raise ContractFailure(rule, detail)


def _require_close(
    rule: str,
    got: Any,
    expected: torch.Tensor,
    dtype: torch.dtype,
    names: Sequence[str],
    describe_first: Callable[[int], str] | None = None,
    tolerance: float | None = None,
    exact: bool = False,
) -> None:
    """Compare with a relative and absolute tolerance; the message says where the first difference is."""
    _require(rule, isinstance(got, torch.Tensor), f"expected a tensor, got {type(got).__name__}")
    shapes = tuple(got.shape), tuple(expected.shape)
    _require(rule, shapes[0] == shapes[1], f"expected the shape {shapes[1]}, got {shapes[0]}")
    got, expected = got.detach().double().cpu(), expected.double().cpu()
    tolerance = 0.0 if exact else TOLERANCES[dtype] if tolerance is None else tolerance
    wrong = ~((got - expected).abs() <= tolerance * (1 + expected.abs()))  # NaN is wrong, too
    if wrong.any():
        first = tuple(int(i) for i in wrong.nonzero()[0])
        place = ", ".join(f"{name} {i}" for name, i in zip(names, first, strict=True))
        if describe_first is not None:
            place += f" ({describe_first(first[0])})"
        share = math.ceil(100 * float(wrong.double().mean()))
        detail = f"at {place} expected {expected[first]:.6g}, got {got[first]:.6g}; {share} % of all elements differ"
        raise ContractFailure(rule, detail)
