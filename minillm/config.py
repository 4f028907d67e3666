"""ModelConfig and EngineConfig: what the model is, and how the engine runs it. Checked once, frozen afterwards.

A checkpoint that needs something which is not built here (a sliding window, experts, quantised weights, another RoPE)
would often still run, and write nonsense. So what is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from minillm.errors import CheckpointError, ConfigError
from minillm.rope import RopeConfig
from minillm.validation import integer, number, one_of, shown

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What transformers assumes where a family's config.json is silent.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
# Bounds that no model of these families comes near: a number beyond them is a mistake, and would only fail later.
_MODEL_LIMITS = {
    "vocab_size": (1, 2**22),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**19),
    "num_layers": (1, 1024),
    "num_qo_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 2**22),
}
_ENGINE_LIMITS = {
    "page_size": (1, 64),
    "num_pages": (1, 2**31 - 2),  # page ids are int32, and the pool has one page more, for padding
    "max_running": (1, 2**16),
    "max_batch_tokens": (1, 2**20),
    "max_model_len": (2, 2**22),  # a token of prompt and one of output
    "tensor_parallel_size": (1, 64),
    "seed": (0, 2**63 - 1),
}


def _name(value: Any) -> Any:
    """A torch.dtype or torch.device as its name, without importing torch; other values as they are."""
    return str(value).removeprefix("torch.") if isinstance(value, str) or type(value).__module__ == "torch" else value


def read_json(path: Path, max_bytes: int = 64 * 2**20) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; `CheckpointError` if it is missing, huge, or not a JSON object."""
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder of the Llama, Mistral, Qwen2 or Qwen3 family consists of. Wrong values raise `ConfigError`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int  # not always hidden_size / num_qo_heads
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False  # the output layer's weights are the embedding's
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head of q and k, before the rotation
    dtype: str = "bfloat16"  # of the checkpoint's weights
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        one_of("model_type", self.model_type, FAMILIES)
        for name, (low, high) in _MODEL_LIMITS.items():
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high))
        number("rms_norm_eps", self.rms_norm_eps, 0.0, 0.1)
        if self.num_qo_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads {self.num_kv_heads} must divide num_qo_heads {self.num_qo_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if not isinstance(self.rope, RopeConfig):
            raise ConfigError(f"rope must be a RopeConfig, got {shown(self.rope)}")
        for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
            one_of(name, getattr(self, name), (True, False))
        object.__setattr__(self, "dtype", one_of("dtype", _name(self.dtype), DTYPE_BYTES))
        if not isinstance(self.eos_token_ids, (tuple, list)):
            raise ConfigError(f"eos_token_ids must be a tuple of integers, got {shown(self.eos_token_ids)}")
        eos_token_ids = (integer("eos_token_ids", i, 0, self.vocab_size - 1) for i in self.eos_token_ids)
        object.__setattr__(self, "eos_token_ids", tuple(dict.fromkeys(eos_token_ids)))

    @property
    def num_parameters(self) -> int:
        """How many weights the model has; tied embeddings count once."""
        h, i, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_qo_heads * d, self.num_kv_heads * d
        attention = h * (q + 2 * kv) + q * h + self.qkv_bias * (q + 2 * kv) + self.o_bias * h + self.qk_norm * 2 * d
        mlp = 3 * h * i + self.mlp_bias * (2 * i + h)
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + mlp + 2 * h) + h

    def num_bytes(self, dtype: Any = None) -> int:
        """The bytes of the weights in `dtype` (a name or a torch.dtype; None: the checkpoint's)."""
        return self.num_parameters * DTYPE_BYTES[one_of("dtype", _name(dtype or self.dtype), DTYPE_BYTES)]

    @classmethod
    def from_hf(cls, folder: str | PathLike[str]) -> ModelConfig:
        """Read a checkpoint folder's config.json and generation_config.json; whatever is wrong: `CheckpointError`."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise CheckpointError(f"{folder} has no config.json: it is no checkpoint folder")
        config = read_json(path)
        generation = path.with_name("generation_config.json")
        eos = read_json(generation).get("eos_token_id") if generation.exists() else None
        try:
            return cls.from_dict(config, eos)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], generation_eos: Any = None) -> ModelConfig:
        """From a config.json's content (and a generation_config.json's `eos_token_id`); may raise `ConfigError`."""
        family = one_of("model_type", config.get("model_type"), FAMILIES)
        config = _FAMILY_DEFAULTS[family] | dict(config)
        _refuse_unsupported(family, config)
        heads = integer("num_attention_heads", config.get("num_attention_heads"), *_MODEL_LIMITS["num_qo_heads"])
        hidden_size = integer("hidden_size", config.get("hidden_size"), *_MODEL_LIMITS["hidden_size"])
        kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
        if head_dim is None and hidden_size % heads:
            raise ConfigError(f"hidden_size {hidden_size} must be a multiple of num_attention_heads {heads}")
        attention_bias = one_of("attention_bias", config.get("attention_bias") or False, (True, False))
        attention_bias = attention_bias and family in ("llama", "qwen3")  # elsewhere it is refused, or has no meaning
        eos: list[Any] = []
        for ids in (generation_eos, config.get("eos_token_id")):
            eos += ids if isinstance(ids, list) else [] if ids is None else [ids]
        return cls(
            model_type=family,
            vocab_size=config.get("vocab_size", 0),
            hidden_size=hidden_size,
            intermediate_size=config.get("intermediate_size", 0),
            max_position_embeddings=config["max_position_embeddings"],
            num_layers=integer("num_hidden_layers", config.get("num_hidden_layers"), *_MODEL_LIMITS["num_layers"]),
            num_qo_heads=heads,
            num_kv_heads=heads if kv_heads is None else integer("num_key_value_heads", kv_heads, 1, heads),
            head_dim=hidden_size // heads if head_dim is None else head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_dict(config),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=one_of("mlp_bias", config.get("mlp_bias") or False, (True, False)),
            qk_norm=family == "qwen3",
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            eos_token_ids=tuple(eos),
        )


def _refuse_unsupported(family: str, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what the model needs and minillm does not have."""

    def refuse(name: str, why: str = "") -> None:
        raise ConfigError(f"{name}={shown(config[name])} is not supported{why}")

    if config.get("architectures") not in (None, [f"{family.capitalize()}ForCausalLM"]):
        refuse("architectures", f" (it must be {family.capitalize()}ForCausalLM)")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", " (it must be 'silu')")
    for name in ("quantization_config", "compression_config", "is_encoder_decoder", "add_cross_attention"):
        if config.get(name):
            refuse(name)
    for name in ("pretraining_tp", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if config.get(name) not in (None, 0, 1):
            refuse(name)
    for name, families in (("attention_bias", ("mistral",)), ("mlp_bias", ("mistral", "qwen2", "qwen3"))):
        if config.get(name) and family in families:
            refuse(name, f" for {family}")
    layer_types = config.get("layer_types")
    if layer_types and not (isinstance(layer_types, list) and all(t == "full_attention" for t in layer_types)):
        refuse("layer_types", " (each must be 'full_attention')")
    if config.get("sliding_window") is None:
        return
    longest = integer("max_position_embeddings", config["max_position_embeddings"], 1, 2**62)
    in_use = integer("sliding_window", config["sliding_window"], 1, 2**62) < longest
    if family.startswith("qwen"):  # only if asked for, and not for the first `max_window_layers`
        num_full, num_layers = config.get("max_window_layers", 28), config.get("num_hidden_layers")
        all_full = isinstance(num_full, int) and isinstance(num_layers, int) and num_full >= num_layers
        in_use = in_use and bool(config.get("use_sliding_window")) and not layer_types and not all_full
    if in_use:
        refuse("sliding_window", f": every token must see all {longest} positions")


@dataclass(frozen=True)
class EngineConfig:
    """The engine's options that are plain values. A wrong one raises `ConfigError`.

    Attributes:
        device: "cpu", "cuda", "cuda:N", or "auto": MINILLM_DEVICE if it is set, else CUDA where it is usable, else CPU.
        dtype: "float32", "bfloat16", "float16" (or a torch.dtype), or "auto": float32 on CPU, on CUDA the checkpoint's.
        kernels: "flashinfer", "reference" (its twin in plain PyTorch), or "auto": flashinfer where it can run.
        page_size: tokens in a page of the KV cache, 1 to 64.
        num_pages: pages of the KV cache. None: as many as fit.
        memory_fraction: of the device's total memory, for weights, activations and KV cache together.
        max_running: requests that may share a step.
        max_batch_tokens: tokens that may share a step; at least max_running, as each running request decodes one.
        max_model_len: tokens of a prompt and its output together. None: the model's max_position_embeddings.
        prefix_caching: keep the pages of ended requests, for prompts that begin alike.
        tensor_parallel_size: GPUs (or, on CPU, processes) that share each layer's weights.
        seed: of sampling, where a request has none of its own, and of random weights.
    """

    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    page_size: int = 16
    num_pages: int | None = None
    memory_fraction: float = 0.9
    max_running: int = 64
    max_batch_tokens: int = 2048
    max_model_len: int | None = None
    prefix_caching: bool = True
    tensor_parallel_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", _name(self.device))
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {shown(self.device)}")
        object.__setattr__(self, "dtype", one_of("dtype", _name(self.dtype), ("auto", *DTYPE_BYTES)))
        one_of("kernels", self.kernels, ("auto", "flashinfer", "reference"))
        for name, (low, high) in _ENGINE_LIMITS.items():
            if getattr(self, name) is not None or name not in ("num_pages", "max_model_len"):
                object.__setattr__(self, name, integer(name, getattr(self, name), low, high))
        object.__setattr__(self, "memory_fraction", number("memory_fraction", self.memory_fraction, 0.0, 1.0))
        one_of("prefix_caching", self.prefix_caching, (True, False))
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(f"max_batch_tokens {self.max_batch_tokens} is below max_running {self.max_running}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all options here, in order."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def from_options(cls, extra_names: Iterable[str] = (), **options: Any) -> EngineConfig:
        """From keyword options; an unknown name raises `TypeError` with the nearest of these and `extra_names`."""
        for name in options:
            if name not in cls.field_names():
                near = difflib.get_close_matches(name, (*cls.field_names(), *extra_names), n=1)
                raise TypeError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return cls(**options)
