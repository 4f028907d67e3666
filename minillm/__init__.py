"""minillm: an LLM inference engine that one person can read in an afternoon, on FlashInfer or in plain PyTorch.

from minillm import LLM, SamplingParams
print(LLM().generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.config import EngineConfig as EngineConfig
    from minillm.config import ModelConfig as ModelConfig
    from minillm.context import InferenceContext as InferenceContext
    from minillm.engine import LLMEngine as LLMEngine
    from minillm.llm import LLM as LLM
    from minillm.page_manager import PageManager as PageManager
    from minillm.request import RequestOutput as RequestOutput
    from minillm.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

# Where each public name lives: importing minillm costs nothing until a name is used.
HOMES = (
    ("LLM", "llm"),
    ("LLMEngine", "engine"),
    ("SamplingParams", "sampling_params"),
    ("RequestOutput", "request"),
    ("ModelConfig", "config"),
    ("EngineConfig", "config"),
    ("InferenceContext", "context"),
    ("PageManager", "page_manager"),
)
__all__ = tuple(name for name, _ in HOMES)


def __getattr__(name: str) -> Any:
    home = dict(HOMES).get(name)
    if home is None:
        raise AttributeError(f"module 'minillm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minillm.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
