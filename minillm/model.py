"""CausalLM: one decoder, driven by its config, for the Llama, Mistral, Qwen2 and Qwen3 families.

The four differ in a handful of switches (which projections have a bias, whether queries and keys are normed, how rotary
frequencies are scaled, whether the embedding is also the output head), all of which are fields of `ModelConfig`.
"""

from __future__ import annotations

import numpy as np
import torch

from minillm.config import ModelConfig, RopeConfig
from minillm.context import Group, InferenceContext, SoloGroup
from minillm.errors import ConfigError
from minillm.layers import MLP, Attention, Layer, RMSNorm, Slots, VocabParallel


def cos_sin_cache(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of the rotary embedding, `[num_positions, head_dim]` float32: cosines first, then sines.

    Source: RoFormer, https://arxiv.org/abs/2104.09864. The layout is FlashInfer's.
    """
    inv_freq, scaling = rope.inv_freq(head_dim)
    angles = torch.outer(
        torch.arange(num_positions, dtype=torch.float32), torch.from_numpy(inv_freq.astype(np.float32))
    )
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * scaling).to(device)


class DecoderLayer(Layer):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        cos_sin: torch.Tensor,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.attention = Attention(
            layer_index,
            config.hidden_size,
            config.num_qo_heads,
            config.num_kv_heads,
            config.head_dim,
            config.qkv_bias,
            config.o_bias,
            config.rms_norm_eps if config.qk_norm else None,
            cos_sin,
            group,
            device,
            dtype,
        )
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias, group, device, dtype)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """Adds `x` and then the attention's output to `residual`, in place; returns what is still to be added.

        Both are `[num_tokens, hidden_size]`. Handing the addition on to the next norm lets one kernel do both.
        """
        x = self.attention(self.input_norm.add(x, residual, context), context)
        return self.mlp(self.post_norm.add(x, residual, context), context)

    def slots(self, prefix: str) -> Slots:
        return (
            self.input_norm.slots(f"{prefix}.input_layernorm")
            | self.attention.slots(f"{prefix}.self_attn")
            | self.post_norm.slots(f"{prefix}.post_attention_layernorm")
            | self.mlp.slots(f"{prefix}.mlp")
        )


class CausalLM(Layer):
    """A decoder-only language model: token ids and a context in, logits out.

    Args:
        config: the model's shape.
        device, dtype: where its weights live and in which type it computes.
        group: the ranks over which its weights are cut.
        num_positions: how many positions the rotary table covers; the config's maximum by default.

    Raises:
        ConfigError: the heads or the MLP cannot be cut evenly over the ranks of `group`.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group: Group | None = None,
        num_positions: int | None = None,
    ):
        device, group = torch.device(device), group or SoloGroup()
        for name in ("num_qo_heads", "num_kv_heads", "intermediate_size"):
            if getattr(config, name) % group.size:
                raise ConfigError(f"tensor_parallel_size {group.size} does not divide {name} = {getattr(config, name)}")
        self.config = config
        num_positions = num_positions or config.max_position_embeddings
        cos_sin = cos_sin_cache(config.rope, config.head_dim, num_positions, device)
        self.embedding = VocabParallel(config.vocab_size, config.hidden_size, group, device, dtype)
        self.layers = [DecoderLayer(config, i, cos_sin, group, device, dtype) for i in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else VocabParallel(config.vocab_size, config.hidden_size, group, device, dtype)
        )

    def forward(self, token_ids: torch.Tensor, context: InferenceContext) -> torch.Tensor:
        """Logits of the rows that `context.logits_rows` names.

        Args:
            token_ids: `[num_tokens]` int64, the step's tokens, all requests one after the other.
            context: the step.

        Returns:
            `[num_logits, vocab_size]` in the model's dtype.
        """
        x = self.embedding.embed(token_ids, context)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x, residual, context)
        if context.logits_rows is not None:  # most rows of a prefill need no logits: drop them first
            x, residual = x[context.logits_rows], residual[context.logits_rows]
        return self.head.logits(self.norm.add(x, residual, context), context)

    def weight_slots(self) -> Slots:
        """Where each tensor of a Hugging Face checkpoint goes, by its name there."""
        slots = self.embedding.slots("model.embed_tokens.weight")
        for i, layer in enumerate(self.layers):
            slots |= layer.slots(f"model.layers.{i}")
        slots |= self.norm.slots("model.norm")
        if self.head is not self.embedding:
            slots |= self.head.slots("lm_head.weight")
        return slots
