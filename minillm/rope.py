"""RopeConfig: the frequencies of the rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.errors import ConfigError
from minillm.validation import integer, number, one_of, shown

# What each RoPE type takes from config.json besides theta; RopeConfig has the same names.
_LLAMA3 = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
_ROPE_PARAMETERS = {"default": (), "linear": _LLAMA3[:1], "llama3": _LLAMA3, "yarn": _LLAMA3[:2] + _YARN}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, and how they are stretched for contexts longer than trained.

    Types: `default` (https://arxiv.org/abs/2104.09864), `linear` (https://arxiv.org/abs/2306.15595), `yarn`
    (https://arxiv.org/abs/2309.00071), and `llama3` (Llama 3.1's, which stretches long wavelengths only). Fields are
    named as in config.json; those that a type does not use keep their defaults.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # llama3, yarn: the context length before stretching
    low_freq_factor: float | None = None  # llama3: what rotates less often than this in that context is stretched,
    high_freq_factor: float | None = None  # llama3: and what rotates more often than this stays
    beta_fast: float = 32.0  # yarn: what rotates more often than this stays,
    beta_slow: float = 1.0  # yarn: and what rotates less often than this is stretched
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; None: follows from factor and the mscales
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions

    def __post_init__(self) -> None:
        one_of("rope_type", self.rope_type, _ROPE_PARAMETERS)
        number("theta", self.theta, 1.0, 1e15)
        required = ("factor", "beta_fast", "beta_slow", *(_LLAMA3[2:] if self.rope_type == "llama3" else ()))
        for name in (*required, "mscale", "mscale_all_dim", "attention_factor"):
            if name in required or getattr(self, name) is not None:
                number(name, getattr(self, name), 0.0, 1e15)
        if self.rope_type in ("llama3", "yarn"):
            integer("original_max_position_embeddings", self.original_max_position_embeddings, 1, 2**24)
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            raise ConfigError("high_freq_factor must be above low_freq_factor")
        if self.beta_fast < self.beta_slow:
            raise ConfigError("beta_fast must not be below beta_slow")
        one_of("truncate", self.truncate, (True, False))

    def inv_freq(self, head_dim: int) -> tuple[np.ndarray, float]:
        """The angle per position of each pair of dimensions, `[head_dim / 2]` float32; and the scale of cos and sin."""
        inv_freq = np.float32(1) / np.float32(self.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        if self.rope_type == "default":
            return inv_freq, 1.0
        if self.rope_type == "linear":
            return inv_freq / np.float32(self.factor), 1.0
        # How much of each frequency stays as it is: a ramp over rotations in the old context, or over dimensions.
        keep, scale = self._llama3(inv_freq) if self.rope_type == "llama3" else self._yarn(head_dim)
        return (inv_freq / self.factor * (1 - keep) + inv_freq * keep).astype(np.float32), scale

    def _llama3(self, inv_freq: np.ndarray) -> tuple[np.ndarray, float]:
        low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
        num_rotations = (self.original_max_position_embeddings or 0) * inv_freq / (2 * math.pi)
        return np.clip((num_rotations - low) / (high - low), 0.0, 1.0), 1.0

    def _yarn(self, head_dim: int) -> tuple[np.ndarray, float]:
        def dimension(num_rotations: float) -> float:  # the one that rotates so often in the old context
            wavelength = (self.original_max_position_embeddings or 0) / (num_rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        def mscale(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        first, last = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first or 0.001)
        scale = self.attention_factor
        if scale is None and self.mscale and self.mscale_all_dim:
            scale = mscale(self.mscale) / mscale(self.mscale_all_dim)
        return 1 - np.clip(ramp, 0.0, 1.0), mscale(1.0) if scale is None else scale

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RopeConfig:
        """From a config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` as transformers 5 writes them."""
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"rope_parameters must be an object, got {shown(given)}")
        # As transformers has it, null is the default, and so is 0 for beta_fast and beta_slow.
        parameters = {k: v for k, v in given.items() if v is not None and not (k in _YARN[:2] and v == 0)}
        old_name, theta = parameters.pop("type", "default"), parameters.pop("rope_theta", config.get("rope_theta"))
        rope_type = one_of("rope_type", parameters.pop("rope_type", old_name), _ROPE_PARAMETERS)
        partial = parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial is not None and partial != 1:
            raise ConfigError(f"partial_rotary_factor={shown(partial)} is not supported: it must be 1")
        if surplus := parameters.keys() - set(_ROPE_PARAMETERS[rope_type]):
            raise ConfigError(f"rope_parameters has {sorted(surplus)}, which rope_type {rope_type!r} does not use")
        if rope_type in ("llama3", "yarn"):
            name, longest = "original_max_position_embeddings", config.get("max_position_embeddings")
            parameters[name] = original = config.get(name) or parameters.get(name) or longest
            if rope_type == "yarn" and "factor" not in parameters:
                longest = integer("max_position_embeddings", longest, 1, 2**24)
                parameters["factor"] = longest / integer(name, original, 1, 2**24)
        if rope_type != "default" and "factor" not in parameters:
            raise ConfigError(f"rope_parameters lacks 'factor', which rope_type {rope_type!r} needs")
        return cls(rope_type, cls.theta if theta is None else theta, **parameters)
