"""The checkers of chapter 01, "Attention, naively"."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from minillm.lab.checking import Comparison, exercise, holds, same
from minillm.lab.naive import attention


def _qkv(num_queries: int, num_keys: int, num_qo_heads: int, num_kv_heads: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_queries, num_qo_heads, 8), (num_keys, num_kv_heads, 8), (num_keys, num_kv_heads, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@exercise("Cache bytes")
def ex01_cache_bytes(attempt: Callable[[int, int, int, int, int], int]) -> Iterator[Comparison]:
    """`attempt(num_layers, num_kv_heads, head_dim, bytes_per_number, num_tokens)` -> bytes of K and V."""
    cases = {
        "one layer, one head, one token": (1, 1, 64, 4, 1),
        "the bundled story model, 512 tokens in float32": (6, 2, 64, 4, 512),
        "Llama-3.1-8B, 8192 tokens in bfloat16": (32, 8, 128, 2, 8192),
    }
    for name, (layers, heads, head_dim, width, tokens) in cases.items():
        yield same(
            name, attempt(layers, heads, head_dim, width, tokens), layers * 2 * heads * head_dim * width * tokens
        )


@exercise("A sliding window")
def ex01_sliding_window(attempt: Callable[[int, int, int], torch.Tensor]) -> Iterator[Comparison]:
    """`attempt(num_queries, num_keys, window_left)` -> bool mask `[num_queries, num_keys]`."""
    for num_queries, num_keys, window_left in ((4, 4, 1), (1, 6, 2), (3, 5, 0), (2, 4, 9)):
        expected = torch.tensor(
            [
                [0 <= query + num_keys - num_queries - key <= window_left for key in range(num_keys)]
                for query in range(num_queries)
            ]
        )
        what = f"mask({num_queries}, {num_keys}, window_left={window_left})"
        yield same(what, attempt(num_queries, num_keys, window_left), expected, index_name="(query, key)")


@exercise("Attention in pieces")
def ex01_online_softmax(
    attempt: Callable[[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]], torch.Tensor],
) -> Iterator[Comparison]:
    """`attempt(q, pieces)`: q `[num_qo_heads, head_dim]`, pieces `[(k, v), ...]` -> `[num_qo_heads, head_dim]`."""
    for sizes, scale in (((5,), 1.0), ((4, 1), 1.0), ((1, 2, 3), 1.0), ((2, 2), 60.0)):
        q, k, v = _qkv(1, sum(sizes), 4, 4, seed=sum(sizes))
        pieces = list(zip(k.split(sizes), v.split(sizes), strict=True))
        got = attempt(q[0] * scale, pieces)
        what = f"pieces of {sizes} tokens" + (", large scores" if scale > 1 else "")
        if isinstance(got, torch.Tensor):
            yield holds(what, not bool(got.isnan().any()), "the result has NaN: subtract the largest score before exp")
        yield same(what, got, attention(q * scale, k, v)[0], index_name="(head, dimension)")
