"""The oracle itself, against PyTorch's own attention; and caching changes nothing but the time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minillm.context import Chunk
from minillm.lab import naive
from minillm.page_manager import PageManager


def qkv(num_queries: int, num_keys: int, num_qo_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 16):
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    shapes = ((num_queries, num_qo_heads, head_dim), *[(num_keys, num_kv_heads, head_dim)] * 2)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 7), (3, 7), (7, 7)])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_equals_pytorch(num_queries: int, num_keys: int, num_kv_heads: int, causal: bool) -> None:
    q, k, v = qkv(num_queries, num_keys, num_kv_heads=num_kv_heads)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        mask = mask.tril(diagonal=num_keys - num_queries)
    assert (naive.causal_mask(num_queries, num_keys) == mask).all() or not causal
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(naive.attention(q, k, v, causal), expected.transpose(0, 1))


def test_attention_scale_dtype_and_empty_rows() -> None:
    q, k, v = qkv(3, 3)
    torch.testing.assert_close(naive.attention(q, k, v, sm_scale=0.5), naive.attention(q * 2, k, v))
    assert naive.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
    assert naive.attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert (naive.attention(q, k[:1], v[:1])[:2] == 0).all()  # the first two queries come before the only key
    with pytest.raises(ValueError, match="do not belong together"):
        naive.attention(q, k, v[:2])
    with pytest.raises(ValueError, match="do not belong together"):
        naive.attention(q[:, :3], k, v)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_paged_attention_equals_contiguous(page_size: int) -> None:
    manager = PageManager(num_pages=64, page_size=page_size, prefix_caching=False)
    kv_layer = torch.full((65, 2, page_size, 2, 16), torch.nan)  # what nobody wrote must not be read
    chunks, queries, expected = [], [], []
    for request_id, num_keys, num_queries in (("A", 9, 1), ("B", 4, 4), ("C", 17, 3)):
        q, k, v = qkv(num_queries, num_keys)
        manager.allocate(request_id, list(range(num_keys)))
        manager.extend(request_id, num_keys)
        table = manager.page_table(request_id)
        for position in range(num_keys):
            page, slot = table[position // page_size], position % page_size
            kv_layer[page, 0, slot], kv_layer[page, 1, slot] = k[position], v[position]
        chunks.append(Chunk(request_id, num_keys - num_queries, num_keys))
        queries.append(q)
        expected.append(naive.attention(q, k, v))
    got = naive.paged_attention(torch.cat(queries), kv_layer, manager.batch_arrays(chunks))
    torch.testing.assert_close(got, torch.cat(expected))


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    model = naive.TinyModel.random(hidden_size=64, head_dim=16)
    prompt = [3, 14, 15, 92]
    without = naive.generate_without_cache(model, prompt, 24)
    assert len(set(without)) > 5
    assert naive.generate_with_cache(model, prompt, 24) == without


def test_cache_has_bounds() -> None:
    cache = naive.ContiguousKVCache(max_tokens=3, num_kv_heads=2, head_dim=4)
    cache.append(torch.ones(2, 2, 4), torch.zeros(2, 2, 4))
    assert cache.num_tokens == 2 and cache.k.shape == cache.v.shape == (2, 2, 4)
    with pytest.raises(ValueError, match="room for 3 tokens, not for 4"):
        cache.append(torch.ones(2, 2, 4), torch.zeros(2, 2, 4))
    assert cache.num_tokens == 2
