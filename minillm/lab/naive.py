"""Attention without pages or fused kernels: the baseline that is easy to beat, and the oracle that is hard to doubt.

Everything here is plain PyTorch, as close to the formulas as code can be, and as slow as that makes it. Kernels, their
twin on the CPU, and a reader's own attempt are all compared with `attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minillm.context import BatchArrays


def causal_mask(num_queries: int, num_keys: int) -> torch.Tensor:
    """Which keys each query may see, `[num_queries, num_keys]` bool, aligned bottom-right.

    The queries are the *last* `num_queries` of `num_keys` tokens, as when a cache holds the earlier ones: query `i`
    sees keys `0` to `i + num_keys - num_queries`.
    """
    query = torch.arange(num_queries).unsqueeze(1) + num_keys - num_queries
    return torch.arange(num_keys).unsqueeze(0) <= query


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, sm_scale: float | None = None
) -> torch.Tensor:
    """`softmax(q k^T * sm_scale) v` for each head (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Args:
        q: `[num_queries, num_qo_heads, head_dim]`; the last `num_queries` of the sequence's tokens.
        k: `[num_keys, num_kv_heads, head_dim]`; query head `h` reads K/V head `h // (num_qo_heads // num_kv_heads)`
            (grouped-query attention, https://arxiv.org/abs/2305.13245).
        v: like `k`.
        causal: hide from each query the keys that come after it.
        sm_scale: default `1 / sqrt(head_dim)`.

    Returns:
        `[num_queries, num_qo_heads, head_dim]`, of q's dtype; computed in float32 or wider. A query that sees no key
        gives 0.

    Raises:
        ValueError: the shapes do not belong together.
    """
    num_qo_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    if k.shape != v.shape or k.shape[2] != head_dim or num_qo_heads % num_kv_heads:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    group_size = num_qo_heads // num_kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    q_heads = q.to(wide).transpose(0, 1)  # [num_qo_heads, num_queries, head_dim]
    k_heads = k.to(wide).transpose(0, 1).repeat_interleave(group_size, dim=0)
    v_heads = v.to(wide).transpose(0, 1).repeat_interleave(group_size, dim=0)
    scores = q_heads @ k_heads.transpose(1, 2) * (1 / math.sqrt(head_dim) if sm_scale is None else sm_scale)
    if causal:
        scores = scores.masked_fill(~causal_mask(len(q), len(k)).to(scores.device), -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row of -inf only: it sees nothing
    return (weights @ v_heads).transpose(0, 1).to(q.dtype)


def gather_pages(
    kv_layer: torch.Tensor, page_table: Sequence[int], num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy one request's K and V out of its pages, `[num_tokens, num_kv_heads, head_dim]` each.

    `kv_layer` is `[num_pages, 2, page_size, num_kv_heads, head_dim]`.
    """
    pages = kv_layer[torch.as_tensor(page_table, dtype=torch.long, device=kv_layer.device)]
    k, v = (pages[:, i].flatten(0, 1)[:num_tokens] for i in (0, 1))
    return k, v


def paged_attention(
    q: torch.Tensor, kv_layer: torch.Tensor, arrays: BatchArrays, causal: bool = True, sm_scale: float | None = None
) -> torch.Tensor:
    """Attention of a batch to pages, by copying each request's pages together and calling `attention`.

    `q` is `[num_tokens, num_qo_heads, head_dim]`, all requests' query rows one after the other; so is the result.
    """
    outputs = []
    for request in range(arrays.num_requests):
        rows = slice(arrays.qo_indptr[request], arrays.qo_indptr[request + 1])
        page_table = arrays.kv_indices[arrays.kv_indptr[request] : arrays.kv_indptr[request + 1]].tolist()
        k, v = gather_pages(kv_layer, page_table, int(arrays.kv_lens[request]))
        outputs.append(attention(q[rows], k, v, causal, sm_scale))
    return torch.cat(outputs) if outputs else torch.empty_like(q)


class ContiguousKVCache:
    """One request's K and V, one after the other in two tensors allocated for the longest it might become."""

    def __init__(self, max_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32):
        self._k = torch.empty(max_tokens, num_kv_heads, head_dim, dtype=dtype)
        self._v = torch.empty_like(self._k)
        self.num_tokens = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add `k` and `v` `[num_new, num_kv_heads, head_dim]`; `ValueError` when they do not fit."""
        end = self.num_tokens + len(k)
        if end > len(self._k):
            raise ValueError(f"the cache has room for {len(self._k)} tokens, not for {end}")
        self._k[self.num_tokens : end], self._v[self.num_tokens : end] = k, v
        self.num_tokens = end

    @property
    def k(self) -> torch.Tensor:
        return self._k[: self.num_tokens]

    @property
    def v(self) -> torch.Tensor:
        return self._v[: self.num_tokens]


@dataclass(frozen=True)
class TinyModel:
    """One attention layer between an embedding and an output head: the least that generates. Weights are random.

    Attributes:
        embedding, head: `[vocab_size, hidden_size]`.
        positions: `[max_tokens, hidden_size]`, added to the embedding.
        w_q, w_o: `[hidden_size, num_qo_heads * head_dim]`; w_k, w_v: `[hidden_size, num_kv_heads * head_dim]`.
    """

    embedding: torch.Tensor
    positions: torch.Tensor
    w_q: torch.Tensor
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor
    head: torch.Tensor
    head_dim: int

    @staticmethod
    def random(
        vocab_size: int = 512,
        hidden_size: int = 256,
        num_qo_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        max_tokens: int = 2048,
        seed: int = 0,
    ) -> TinyModel:
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) / math.sqrt(hidden_size)

        return TinyModel(
            embedding=weight(vocab_size, hidden_size),
            positions=weight(max_tokens, hidden_size),
            w_q=weight(hidden_size, num_qo_heads * head_dim),
            w_k=weight(hidden_size, num_kv_heads * head_dim),
            w_v=weight(hidden_size, num_kv_heads * head_dim),
            w_o=weight(hidden_size, num_qo_heads * head_dim),
            head=weight(vocab_size, hidden_size),
            head_dim=head_dim,
        )

    @property
    def max_tokens(self) -> int:
        return len(self.positions)

    @property
    def num_kv_heads(self) -> int:
        return self.w_k.shape[1] // self.head_dim

    def embed(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """The hidden states of tokens at positions `start`, `start + 1`, ...; `[num_tokens, hidden_size]`."""
        return self.embedding[torch.as_tensor(token_ids)] + self.positions[start : start + len(token_ids)]

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, `[num_tokens, heads, head_dim]` each."""
        q, k, v = ((x @ w).unflatten(1, (-1, self.head_dim)) for w in (self.w_q, self.w_k, self.w_v))
        return q, k, v

    def logits(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The next token's logits, `[num_tokens, vocab_size]`; the layer's output is added to its input."""
        return (x + attended.flatten(1) @ self.w_o.T) @ self.head.T


def generate_without_cache(model: TinyModel, prompt: Sequence[int], num_new: int) -> list[int]:
    """Greedy generation that computes everything again for each token; returns the new tokens' ids."""
    token_ids = list(prompt)
    for _ in range(num_new):
        x = model.embed(token_ids)
        logits = model.logits(x, attention(*model.qkv(x)))
        token_ids.append(int(logits[-1].argmax()))
    return token_ids[len(prompt) :]


def generate_with_cache(model: TinyModel, prompt: Sequence[int], num_new: int) -> list[int]:
    """The same tokens, each of them put through the model once: what attention needs of the earlier ones is kept."""
    cache = ContiguousKVCache(len(prompt) + num_new, model.num_kv_heads, model.head_dim)
    new_ids, generated = list(prompt), []
    for _ in range(num_new):
        x = model.embed(new_ids, start=cache.num_tokens)
        q, k, v = model.qkv(x)
        cache.append(k, v)
        logits = model.logits(x, attention(q, cache.k, cache.v))
        new_ids = [int(logits[-1].argmax())]
        generated += new_ids
    return generated
