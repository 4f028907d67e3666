"""The model's layers: each takes `(x[, residual], context)` and knows nothing of the engine.

Everything a layer needs of the current step arrives in its `InferenceContext`: the kernels, the positions, the pages,
the group of ranks. A layer keeps only its weights. `forward` of each works on `[num_tokens, ...]`: the tokens of all
requests of the step, one after the other, with no batch dimension and no padding.

Weights are cut over the ranks of a tensor-parallel group as in Megatron-LM (https://arxiv.org/abs/1909.08053): the
first of two matrices by columns, the second by rows, so that one all-reduce joins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from minillm.context import Group, InferenceContext
from minillm.weights import Matrix, WeightSlot

Slots = dict[str, WeightSlot]


class Layer:
    """Weights, and a `forward` that is called with the step's context. No hooks, no modes, no hidden registration.

    Plain Python objects rather than `torch.nn.Module`: nothing here is trained, and looking up a module's parameters
    and calling it takes longer than many a kernel of a small model.
    """

    forward: Callable[..., torch.Tensor]

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.forward(*args, **options)


class RMSNorm(Layer):
    """Root-mean-square norm (https://arxiv.org/abs/1910.07467), alone or fused with the addition before it."""

    def __init__(self, size: int, eps: float, device: torch.device, dtype: torch.dtype):
        self.weight = torch.empty(size, device=device, dtype=dtype)
        self.eps = eps

    def forward(self, x: torch.Tensor, context: InferenceContext, out: torch.Tensor | None = None) -> torch.Tensor:
        """Norm over the last dimension of `x` `[num_tokens, size]` or `[num_tokens, num_heads, size]`.

        It is written to `out` if that is given, which may be `x` itself.
        """
        return context.kernels.rmsnorm(x, self.weight, self.eps, out=out)

    def add(self, x: torch.Tensor, residual: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """`residual += x` in place, then the norm of the sum, written over `x`, which is returned."""
        context.kernels.fused_add_rmsnorm(x, residual, self.weight, self.eps)
        return x

    def slots(self, prefix: str) -> Slots:
        return {f"{prefix}.weight": WeightSlot(self.weight, tuple(self.weight.shape))}


class ColumnParallelLinear(Layer):
    """`y = x W^T + b` for matrices with the same input, fused to one; each rank computes a slice of every output.

    `parts` names the matrices as the checkpoint does, with the full size of their outputs.
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.parts, self.group = parts, group
        self.sizes = [size // group.size for size in parts.values()]  # of this rank's outputs
        self.matrix = Matrix(sum(self.sizes), in_features, device, dtype)
        self.bias = torch.empty(sum(self.sizes), device=device, dtype=dtype) if bias else None

    def forward(self, x: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """`[num_tokens, in_features]` to `[num_tokens, sum(sizes)]`."""
        return self.matrix.product(x, self.bias)

    def slots(self, prefix: str) -> Slots:
        slots = {}
        weights = self.matrix.weight.split(self.sizes)
        biases = self.bias.split(self.sizes) if self.bias is not None else [None] * len(weights)
        for (name, size), weight, bias in zip(self.parts.items(), weights, biases, strict=True):
            shard = {"shard_dim": 0, "rank": self.group.rank, "world_size": self.group.size}
            slots[f"{prefix}.{name}.weight"] = WeightSlot(weight, (size, weight.shape[1]), **shard)
            if bias is not None:
                slots[f"{prefix}.{name}.bias"] = WeightSlot(bias, (size,), **shard)
        return slots


class RowParallelLinear(Layer):
    """`y = x W^T + b` where each rank holds a slice of `x`; the partial products are summed over the ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.in_features, self.group = in_features, group
        self.matrix = Matrix(out_features, in_features // group.size, device, dtype)
        self.bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None

    def forward(self, x: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """`[num_tokens, in_features / ranks]` to `[num_tokens, out_features]`, the same on every rank."""
        bias = self.bias if context.group.rank == 0 else None  # the sum over the ranks must hold it once
        return context.group.all_reduce(self.matrix.product(x, bias))

    def slots(self, prefix: str) -> Slots:
        weight = self.matrix.weight
        shape = (weight.shape[0], self.in_features)
        shard = {"shard_dim": 1, "rank": self.group.rank, "world_size": self.group.size}
        slots = {f"{prefix}.weight": WeightSlot(weight, shape, **shard)}
        if self.bias is not None:
            slots[f"{prefix}.bias"] = WeightSlot(self.bias, (shape[0],))
        return slots


class VocabParallel:
    """A matrix with a row for each token of the vocabulary, cut by rows: the embedding, the output head, or both."""

    def __init__(self, vocab_size: int, hidden_size: int, group: Group, device: torch.device, dtype: torch.dtype):
        self.vocab_size, self.group = vocab_size, group
        per_rank = math.ceil(vocab_size / group.size)  # the last rank may hold fewer
        self.first = min(group.rank * per_rank, vocab_size)
        self.per_rank = per_rank
        self.matrix = Matrix(min(per_rank, vocab_size - self.first), hidden_size, device, dtype)

    def embed(self, token_ids: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """Token ids `[num_tokens]` int64 to rows `[num_tokens, hidden_size]`."""
        weight = self.matrix.weight
        if self.group.size == 1:
            return F.embedding(token_ids, weight)
        mine = (token_ids >= self.first) & (token_ids < self.first + len(weight))
        rows = F.embedding(torch.where(mine, token_ids - self.first, 0), weight)
        return context.group.all_reduce(rows * mine.unsqueeze(-1))

    def logits(self, x: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """Hidden states `[num_rows, hidden_size]` to logits `[num_rows, vocab_size]`, the same on every rank."""
        logits = self.matrix.product(x)
        if self.group.size == 1:
            return logits
        logits = F.pad(logits, (0, self.per_rank - logits.shape[-1]))  # all ranks must send as much
        return context.group.all_gather(logits)[:, : self.vocab_size]

    def slots(self, name: str) -> Slots:
        shape = (self.vocab_size, self.matrix.weight.shape[1])
        shard = {"shard_dim": 0, "rank": self.group.rank, "world_size": self.group.size}
        return {name: WeightSlot(self.matrix.weight, shape, **shard)}


class Attention(Layer):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) over paged K/V, with rotary positions.

    It holds no cache and no reference to whoever runs it: pages and plan come with the context.
    """

    def __init__(
        self,
        layer_index: int,
        hidden_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm_eps: float | None,
        cos_sin_cache: torch.Tensor,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.layer_index, self.head_dim = layer_index, head_dim
        q_size, kv_size = num_qo_heads * head_dim, num_kv_heads * head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = ColumnParallelLinear(hidden_size, parts, qkv_bias, group, device, dtype)
        self.num_heads = [size // head_dim for size in self.qkv.sizes]  # of q, k and v, on this rank
        self.out = RowParallelLinear(q_size, hidden_size, o_bias, group, device, dtype)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, device, dtype)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, device, dtype)
        self.cos_sin_cache = cos_sin_cache  # one tensor, shared by all layers

    def forward(self, x: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same shape."""
        qkv = self.qkv(x, context)
        heads = qkv.view(len(x), -1, self.head_dim)  # [num_tokens, num_heads, head_dim], those of q, k, v in turn
        q, k, v = heads.split_with_sizes(self.num_heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(q, context, out=q)
            self.k_norm(k, context, out=k)
        flat_q, flat_k, _ = qkv.split_with_sizes(self.qkv.sizes, dim=1)
        context.kernels.apply_rope_with_cos_sin_cache_inplace(
            context.positions, flat_q, flat_k, self.head_dim, self.cos_sin_cache, is_neox=True
        )
        context.kv_pool.append(self.layer_index, k, v, context)
        attended = context.attention.run(q, context.kv_pool.layer(self.layer_index))
        return self.out(attended.flatten(1), context)

    def slots(self, prefix: str) -> Slots:
        slots = self.qkv.slots(prefix) | self.out.slots(f"{prefix}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            slots |= self.q_norm.slots(f"{prefix}.q_norm") | self.k_norm.slots(f"{prefix}.k_norm")
        return slots


class MLP(Layer):
    """The gated feed-forward layer SwiGLU (https://arxiv.org/abs/2002.05202): `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ):
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = ColumnParallelLinear(hidden_size, parts, bias, group, device, dtype)
        self.down = RowParallelLinear(intermediate_size, hidden_size, bias, group, device, dtype)

    def forward(self, x: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same shape."""
        return self.down(context.kernels.silu_and_mul(self.gate_up(x, context)), context)

    def slots(self, prefix: str) -> Slots:
        return self.gate_up.slots(prefix) | self.down.slots(f"{prefix}.down_proj")
