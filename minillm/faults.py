"""What kind of fault an exception is: one that a smaller step may avoid, or one after which nothing can be trusted."""

from __future__ import annotations

import torch

from minillm.errors import WorkerError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the device or of the host, ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def is_device_fault(error: BaseException) -> bool:
    """Whether the device or another rank is beyond use. CUDA reports a fault once and fails every call after it."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, (torch.AcceleratorError, WorkerError)) or "CUDA error" in str(error)
