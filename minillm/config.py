"""ModelConfig and EngineConfig: what the model is, and how the engine runs it. Checked once, frozen afterwards.

A checkpoint that needs something which is not built here (a sliding window, experts, quantised weights, another RoPE) would
often still run, and write nonsense. So what is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError, ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What transformers assumes where a family's config.json is silent. Absent here: num_attention_heads, or no default at all.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
# The parameters of each RoPE type, by their names in config.json (which are RopeConfig's), but for theta.
_ROPE_PARAMETERS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim attention_factor truncate".split()
    ),
}
# Bounds that no model of these families comes near: beyond them a number is a mistake, and would only fail later, in a
# message about memory.
_MODEL_LIMITS = {
    "vocab_size": (1, 2**22),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**19),
    "num_layers": (1, 1024),
    "num_qo_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 2**24),
}
_ENGINE_LIMITS = {
    "page_size": (1, 64),
    "num_pages": (1, 2**31 - 2),  # page ids are int32, and the pool has one page more, for padding
    "max_running": (1, 2**16),
    "max_batch_tokens": (1, 2**20),
    "max_model_len": (2, 2**24),  # a token of prompt and one of output
    "tensor_parallel_size": (1, 64),
    "seed": (0, 2**63 - 1),
}


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name} must be an integer, got {reprlib.repr(value)}")
    if not low <= int(value) <= high:
        raise ConfigError(f"{name} must be from {low} to {high}, got {reprlib.repr(int(value))}")
    return int(value)


def _number(name: str, value: Any, above: float, most: float) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name} must be a number, got {reprlib.repr(value)}")
    if not above < value <= most:  # also refuses NaN
        raise ConfigError(f"{name} must be above {above:g} and at most {most:g}, got {reprlib.repr(value)}")
    return float(value)


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {reprlib.repr(value)}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"{name} must be True or False, got {reprlib.repr(value)}")
    return bool(value)


def _dtype_name(value: Any) -> Any:
    """`torch.bfloat16` and `"torch.bfloat16"` as `"bfloat16"`, without importing torch; anything else as it is."""
    is_dtype = type(value).__module__ == "torch" and type(value).__name__ == "dtype"
    return str(value).removeprefix("torch.") if is_dtype or isinstance(value, str) else value


def read_json(path: Path, max_bytes: int = 64 * 2**20) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; `CheckpointError` if it is missing, too large, or not a JSON object."""
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} is larger than {max_bytes} bytes: not what it should be")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, and how they are stretched for contexts longer than trained.

    `default` (https://arxiv.org/abs/2104.09864), `linear` (position interpolation, https://arxiv.org/abs/2306.15595), `yarn`
    (https://arxiv.org/abs/2309.00071), and `llama3` (Llama 3.1's: stretch long wavelengths only). Fields are named as in
    config.json; those that a type does not use keep their defaults.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # llama3, yarn: the context length before stretching
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float = 32.0  # yarn: dimensions that rotate more often than this in the old context stay as they are,
    beta_slow: float = 1.0  # yarn: and those that rotate less often than this are interpolated
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; None: follows from the factor
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions

    def __post_init__(self) -> None:
        _one_of("rope_type", self.rope_type, _ROPE_PARAMETERS)
        for name in ("theta", "factor", "beta_fast", "beta_slow"):
            _number(name, getattr(self, name), 1.0 if name == "theta" else 0.0, 1e15)
        needed = {"llama3": ("low_freq_factor", "high_freq_factor")}.get(self.rope_type, ())
        for name in ("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None or name in needed:
                _number(name, getattr(self, name), 0.0, 1e15)
        if self.original_max_position_embeddings is not None or self.rope_type in ("llama3", "yarn"):
            _integer("original_max_position_embeddings", self.original_max_position_embeddings, 1, 2**24)
        if needed and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            raise ConfigError("high_freq_factor must be above low_freq_factor")
        if self.beta_fast < self.beta_slow:
            raise ConfigError("beta_fast must not be below beta_slow")
        _flag("truncate", self.truncate)

    def inv_freq(self, head_dim: int) -> tuple[np.ndarray, float]:
        """The angle per position of each pair of dimensions, `[head_dim / 2]` float32; and the scale of cos and sin."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        inv_freq = np.float32(1.0) / np.float32(self.theta) ** exponents
        if self.rope_type == "linear":
            return (inv_freq / np.float32(self.factor)), 1.0
        if self.rope_type == "llama3":
            return self._llama3(inv_freq), 1.0
        if self.rope_type == "yarn":
            return self._yarn(inv_freq, head_dim), self._yarn_attention_factor()
        return inv_freq, 1.0

    def _llama3(self, inv_freq: np.ndarray) -> np.ndarray:
        assert (
            self.original_max_position_embeddings and self.low_freq_factor and self.high_freq_factor
        )  # see __post_init__
        rotations = self.original_max_position_embeddings * inv_freq / (2 * math.pi)  # in the context it was trained on
        keep = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return ((1 - keep) * inv_freq / self.factor + keep * inv_freq).astype(np.float32)

    def _yarn(self, inv_freq: np.ndarray, head_dim: int) -> np.ndarray:
        assert self.original_max_position_embeddings  # see __post_init__

        def dimension(num_rotations: float) -> float:  # the dimension that rotates so often in the old context
            wavelength = self.original_max_position_embeddings / (num_rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        keep = 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
        return (inv_freq / self.factor * (1 - keep) + inv_freq * keep).astype(np.float32)

    def _yarn_attention_factor(self) -> float:
        def scale(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RopeConfig:
        """From a config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` as transformers 5 writes them."""
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"rope_parameters must be an object, got {reprlib.repr(given)}")
        parameters = {name: value for name, value in given.items() if value is not None}
        old_type, theta = parameters.pop("type", "default"), parameters.pop("rope_theta", config.get("rope_theta"))
        rope_type = _one_of("rope_type", parameters.pop("rope_type", old_type), _ROPE_PARAMETERS)
        partial = parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial is not None and partial != 1:
            raise ConfigError(f"partial_rotary_factor={reprlib.repr(partial)} is not supported: it must be 1")
        if surplus := parameters.keys() - _ROPE_PARAMETERS[rope_type]:
            raise ConfigError(f"rope_parameters has {sorted(surplus)}, which rope_type {rope_type!r} does not use")
        if rope_type in ("llama3", "yarn"):
            longest = config.get("max_position_embeddings")
            original = config.get("original_max_position_embeddings") or parameters.get(
                "original_max_position_embeddings"
            )
            original = parameters["original_max_position_embeddings"] = original or longest
            if rope_type == "yarn" and "factor" not in parameters:
                _integer("original_max_position_embeddings", original, 1, 2**24)
                parameters["factor"] = _integer("max_position_embeddings", longest, 1, 2**24) / original
            for name in ("beta_fast", "beta_slow"):
                if parameters.get(name) == 0:
                    del parameters[name]  # as transformers does: 0 means the default
        if rope_type != "default" and "factor" not in parameters:
            raise ConfigError(f"rope_parameters lacks 'factor', which rope_type {rope_type!r} needs")
        return cls(rope_type, 10000.0 if theta is None else theta, **parameters)


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
        _one_of("model_type", self.model_type, FAMILIES)
        for name, (low, high) in _MODEL_LIMITS.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))
        _number("rms_norm_eps", self.rms_norm_eps, 0.0, 0.1)
        if self.num_qo_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads must divide num_qo_heads, got {self.num_kv_heads} and {self.num_qo_heads} heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if not isinstance(self.rope, RopeConfig):
            raise ConfigError(f"rope must be a RopeConfig, got {reprlib.repr(self.rope)}")
        for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
            _flag(name, getattr(self, name))
        object.__setattr__(self, "dtype", _one_of("dtype", _dtype_name(self.dtype), DTYPE_BYTES))
        if not isinstance(self.eos_token_ids, (tuple, list)):
            raise ConfigError(f"eos_token_ids must be a tuple of integers, got {reprlib.repr(self.eos_token_ids)}")
        eos_token_ids = (_integer("eos_token_ids", i, 0, self.vocab_size - 1) for i in self.eos_token_ids)
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
        return self.num_parameters * DTYPE_BYTES[_one_of("dtype", _dtype_name(dtype or self.dtype), DTYPE_BYTES)]

    @classmethod
    def from_hf(cls, folder: str | PathLike[str]) -> ModelConfig:
        """Read a checkpoint folder's config.json and generation_config.json; whatever is wrong: `CheckpointError`."""
        path = Path(folder) / "config.json"
        config = read_json(path)
        generation = path.with_name("generation_config.json")
        eos = read_json(generation).get("eos_token_id") if generation.exists() else None
        try:
            return cls.from_dict(config, eos)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], generation_eos: Any = None) -> ModelConfig:
        """From a config.json's content (and generation_config.json's `eos_token_id`); `ConfigError` names what is wrong."""
        family = _one_of("model_type", config.get("model_type"), FAMILIES)
        config = _FAMILY_DEFAULTS[family] | dict(config)
        _refuse_unsupported(family, config)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if config.get(name) is None:
                raise ConfigError(f"{name} is missing")
        heads = _integer("num_attention_heads", config["num_attention_heads"], *_MODEL_LIMITS["num_qo_heads"])
        hidden_size = _integer("hidden_size", config["hidden_size"], *_MODEL_LIMITS["hidden_size"])
        kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
        if head_dim is None and hidden_size % heads:
            raise ConfigError(f"hidden_size {hidden_size} must be a multiple of num_attention_heads {heads}")
        attention_bias = _flag("attention_bias", config.get("attention_bias") or False) and family in ("llama", "qwen3")
        eos: list[Any] = []
        for ids in (generation_eos, config.get("eos_token_id")):
            eos += ids if isinstance(ids, list) else [] if ids is None else [ids]
        return cls(
            model_type=family,
            vocab_size=config["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            num_layers=_integer("num_hidden_layers", config["num_hidden_layers"], *_MODEL_LIMITS["num_layers"]),
            num_qo_heads=heads,
            num_kv_heads=heads if kv_heads is None else _integer("num_key_value_heads", kv_heads, 1, heads),
            head_dim=hidden_size // heads if head_dim is None else head_dim,
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_dict(config),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=_flag("mlp_bias", config.get("mlp_bias") or False),
            qk_norm=family == "qwen3",
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            eos_token_ids=tuple(eos),
        )


def _refuse_unsupported(family: str, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what the model needs and minillm does not have."""

    def refuse(name: str, why: str = "") -> None:
        raise ConfigError(f"{name}={reprlib.repr(config[name])} is not supported{why}")

    architectures = config.get("architectures")
    expected = f"{family.capitalize()}ForCausalLM"
    if architectures is not None and architectures != [expected]:
        refuse("architectures", f" (it must be [{expected!r}])")
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
    if layer_types and set(map(str, layer_types)) != {"full_attention"}:
        refuse("layer_types", " (only 'full_attention' is)")
    window, longest = config.get("sliding_window"), config["max_position_embeddings"]
    in_use = not family.startswith("qwen") or (config.get("use_sliding_window") and not layer_types)
    if family.startswith("qwen") and in_use:  # the first layers may be exempt, and all of them may be first
        first, num_layers = config.get("max_window_layers", 28), config.get("num_hidden_layers")
        in_use = not (isinstance(first, int) and isinstance(num_layers, int) and first >= num_layers)
    if (
        window is not None
        and in_use
        and not (isinstance(longest, int) and _integer("sliding_window", window, 1, 2**62) >= longest)
    ):
        refuse("sliding_window", f": every token must see all {reprlib.repr(longest)} positions")


@dataclass(frozen=True)
class EngineConfig:
    """The engine's options that are plain values. Wrong values raise `ConfigError`; the comments are the documentation."""

    device: str = (
        "auto"  # "cpu", "cuda", "cuda:N"; "auto": MINILLM_DEVICE if set, else CUDA where it is usable, else CPU
    )
    dtype: str = (
        "auto"  # "float32", "bfloat16", "float16" or a torch.dtype; "auto": float32 on CPU, the checkpoint's on CUDA
    )
    kernels: str = "auto"  # "flashinfer", "reference" (its twin in plain PyTorch); "auto": flashinfer where it can run
    page_size: int = 16  # tokens in a page of the KV cache, 1 to 64
    num_pages: int | None = None  # pages in the KV cache; None: what fits into memory
    memory_fraction: float = 0.9  # of the device's total memory, for weights, activations and KV cache together
    max_running: int = 64  # requests that may be in a step
    max_batch_tokens: int = 2048  # tokens that may be in a step, at least max_running: each running request decodes one
    max_model_len: int | None = None  # tokens of prompt and output together; None: the model's max_position_embeddings
    prefix_caching: bool = True  # keep the pages of finished requests, and share them with prompts that begin alike
    tensor_parallel_size: int = 1  # GPUs (or CPU processes) that share each layer's weights
    seed: int = 0  # of sampling where a request has no seed of its own, and of random weights

    def __post_init__(self) -> None:
        if type(self.device).__module__ == "torch" and type(self.device).__name__ == "device":
            object.__setattr__(self, "device", str(self.device))
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {reprlib.repr(self.device)}")
        object.__setattr__(self, "dtype", _one_of("dtype", _dtype_name(self.dtype), ("auto", *DTYPE_BYTES)))
        _one_of("kernels", self.kernels, ("auto", "flashinfer", "reference"))
        for name, (low, high) in _ENGINE_LIMITS.items():
            if getattr(self, name) is not None or name not in ("num_pages", "max_model_len"):
                object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))
        object.__setattr__(self, "memory_fraction", _number("memory_fraction", self.memory_fraction, 0.0, 1.0))
        _flag("prefix_caching", self.prefix_caching)
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"max_batch_tokens must be at least max_running (each running request decodes one token a step), "
                f"got {self.max_batch_tokens} and {self.max_running}"
            )

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
