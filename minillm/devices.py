"""Where and with what an engine computes: the device, the dtype, and FlashInfer or its twin. Decided once, here."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import replace
from typing import Any

import torch

from minillm.config import EngineConfig, ModelConfig
from minillm.doctor import require_flashinfer
from minillm.errors import ConfigError, KernelsUnavailableError


def resolve(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """The config with `device` and `dtype` decided.

    `device="auto"` is `MINILLM_DEVICE` if set, else CUDA where it is usable, else the CPU. `dtype="auto"` is float32
    on a CPU, and on CUDA the checkpoint's, but for float32, which FlashInfer does not serve: bfloat16 then, with a
    notice.
    """
    name = config.device
    if name == "auto":
        name = os.environ.get("MINILLM_DEVICE", "auto")
        config = replace(config, device=name)  # checks it
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r}: PyTorch sees {torch.cuda.device_count()} usable GPUs here")
        name = f"cuda:{index}"
    dtype = config.dtype
    if dtype == "auto" and name == "cpu":
        dtype = "float32"
    elif dtype == "auto":
        dtype = model.dtype
        if dtype == "float32":
            warnings.warn("the checkpoint is float32: computing in bfloat16, which GPU kernels serve", stacklevel=2)
            dtype = "bfloat16"
    return replace(config, device=name, dtype=dtype)


def load_kernels(name: str, device: torch.device) -> Any:
    """The module whose functions compute: `flashinfer` on CUDA, its twin `minillm.reference` elsewhere.

    Args:
        name: `"flashinfer"`, `"reference"`, or `"auto"`: FlashInfer if the device is a GPU on which it can run.

    Raises:
        KernelsUnavailableError: FlashInfer is asked for where it cannot run.
    """
    if name == "flashinfer" and device.type != "cuda":
        raise KernelsUnavailableError(f"kernels='flashinfer' needs an NVIDIA GPU; the engine's device is {device}")
    if name == "reference" or device.type != "cuda":
        return importlib.import_module("minillm.reference")
    try:
        require_flashinfer()
    except KernelsUnavailableError as error:
        if name == "flashinfer":
            raise
        warnings.warn(f"{error} Until then FlashInfer's slow twin in plain PyTorch computes.", stacklevel=2)
        return importlib.import_module("minillm.reference")
    return importlib.import_module("flashinfer")
