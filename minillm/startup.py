"""Start-up: what an engine refuses before it takes memory or starts a process, and how swapped-in parts are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minillm.config import EngineConfig, ModelConfig
from minillm.context import SoloGroup
from minillm.devices import load_kernels
from minillm.errors import ConfigError, ContractError, MiniLLMError
from minillm.loader import ModelLoader
from minillm.memory import check_sizes, device_memory
from minillm.model import CausalLM
from minillm.page_manager import KVPool
from minillm.validation import shown


def check_options(model: Any, weights: Any, tokenizer: Any, observers: Any) -> None:
    """Raise `ConfigError` for wrong values of the options that are not plain values, as `EngineConfig`'s are."""
    if weights not in ("checkpoint", "random"):
        raise ConfigError(f"weights must be 'checkpoint' or 'random', got {shown(weights)}")
    if isinstance(model, ModelConfig) and weights != "random":
        raise ConfigError("a ModelConfig names no checkpoint: pass weights='random' with it")
    if tokenizer is not None and not isinstance(tokenizer, str):
        has_both = callable(getattr(tokenizer, "encode", None)) and callable(getattr(tokenizer, "decode", None))
        if not has_both or isinstance(tokenizer, type):
            raise ConfigError(
                f"tokenizer must be 'auto', a folder, None, or have encode and decode, got {shown(tokenizer)}"
            )
    if not isinstance(observers, (list, tuple)):
        raise ConfigError(f"observers must be a list of observers, got {shown(observers)}")


def check_factories(**factories: Any) -> None:
    """Raise `ConfigError` for what cannot be called to make a part."""
    for name, factory in factories.items():
        if not callable(factory):
            raise ConfigError(f"{name} must be a class, or a function that makes one, got {shown(factory)}")


def check_model(loader: ModelLoader, config: EngineConfig, random_weights: bool) -> None:
    """Raise what is wrong with a model, or too large for it, before memory is taken and other ranks are started."""
    device, dtype, shape = torch.device(config.device), getattr(torch, config.dtype), loader.config
    if config.kernels == "flashinfer":
        load_kernels(config.kernels, device)  # or raise
    rank0 = SoloGroup(config.tensor_parallel_size)
    on_meta = CausalLM(shape, "meta", dtype, rank0, num_positions=1)  # shapes without memory
    loader.check(on_meta.weight_slots(), device, random_weights)
    num_kv_heads = shape.num_kv_heads // rank0.size
    page_bytes = KVPool.bytes_per_page(shape.num_layers, config.page_size, num_kv_heads, shape.head_dim, dtype)
    check_sizes(config, shape, page_bytes, device_memory(device)[0])


def make_part(part: str, factory: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A part, of the library's own class or of one that is swapped in."""
    try:
        return factory(*args, **options)
    except MiniLLMError:
        raise
    except Exception as error:
        rule = f"it is made with the library's arguments, but that raised {type(error).__name__}: {error}"
        raise ContractError(part, rule) from error
