"""Where a device's memory goes, measured by a warm-up; and how many KV pages fit into the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minillm.config import EngineConfig, ModelConfig
from minillm.errors import ConfigError

CPU_POOL_BYTES = 512 * 2**20


@dataclass(frozen=True)
class MemoryReport:
    """Where a device's memory goes, in bytes: measured by a step of the largest size, before the KV pool is made."""

    device: str
    total_bytes: int
    free_bytes: int  # free for this process, while the engine idles
    weights_bytes: int
    activation_bytes: int  # the most that a step takes and gives back; on CPU as far as Linux tells
    kv_bytes: int = 0  # the KV pool; filled in when it exists

    @property
    def other_bytes(self) -> int:
        """In use by something else: the CUDA context, kernels' workspaces, other processes."""
        return max(0, self.total_bytes - self.free_bytes - self.weights_bytes)


def device_memory(device: torch.device) -> tuple[int, int]:
    """The free and total bytes of a device's memory, for the CPU the machine's; if the system does not tell, 2**62."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**62, 2**62
    return _proc_bytes("/proc/meminfo", "MemAvailable") or total, total


def _proc_bytes(path: str, name: str) -> int:
    """A number of kilobytes that Linux reports under /proc, in bytes; 0 where there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def warm_up(
    run_step: Callable[[int], object], num_tokens: int, device: torch.device, weights_bytes: int
) -> MemoryReport:
    """Run the largest step once (kernels load, workspaces are made), and measure what it took.

    `run_step(num_tokens)` runs a forward pass over that many tokens, with logits for up to `max_running` of them.
    """
    run_step(1)  # what is loaded once and kept is not a step's
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run_step(num_tokens)
        torch.cuda.synchronize(device)
        activation_bytes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
    else:
        with suppress(OSError):  # Linux: let the process's peak (VmHWM) start from here
            Path("/proc/self/clear_refs").write_text("5")
        before = _proc_bytes("/proc/self/status", "VmHWM")
        run_step(num_tokens)
        activation_bytes = _proc_bytes("/proc/self/status", "VmHWM") - before
    free, total = device_memory(device)
    return MemoryReport(str(device), total, free, weights_bytes, activation_bytes)


def num_pages_that_fit(
    *, page_bytes: int, total_bytes: int, free_bytes: int, activation_bytes: int, memory_fraction: float
) -> int:
    """How many KV pages a device has room for, besides what is in use, a step's activations, and the scratch page.

    `memory_fraction` is of the total. Raises `ConfigError` if not even one page fits.
    """
    in_use = total_bytes - free_bytes
    budget = int(total_bytes * memory_fraction) - in_use - activation_bytes
    num_pages = budget // page_bytes - 1
    if num_pages < 1:
        raise ConfigError(
            f"no memory is left for the KV cache: {gib(total_bytes)} * memory_fraction {memory_fraction:g}, less "
            f"{gib(in_use)} in use and {gib(activation_bytes)} for a step's activations, does not hold two pages of "
            f"{page_bytes} bytes; raise memory_fraction, lower max_batch_tokens, or take a smaller model"
        )
    return num_pages


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def check_sizes(config: EngineConfig, model: ModelConfig, page_bytes: int, free_bytes: int) -> None:
    """Raise `ConfigError` for a `max_model_len` or `num_pages`, where they are given, that cannot be had."""
    if (config.max_model_len or 0) > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the model's max_position_embeddings, "
            f"{model.max_position_embeddings}"
        )
    needed = ((config.num_pages or 0) + 1) * page_bytes
    if needed > free_bytes:
        raise ConfigError(
            f"num_pages {config.num_pages} of {page_bytes} bytes (and one for padding) take {gib(needed)}, but "
            f"{config.device} has {gib(free_bytes)} free; give a smaller num_pages or max_model_len"
        )


def pool_size(config: EngineConfig, model: ModelConfig, page_bytes: int, memory: MemoryReport) -> tuple[int, int]:
    """The KV pool's `num_pages`, and the `max_model_len` that it allows.

    `num_pages` if it is given; else on CUDA what fits; else what `max_running` requests of `max_model_len` need, up to
    512 MiB, but always one request of the `max_model_len` that was asked for. `max_model_len` is at most what the pool
    holds. Raises `ConfigError` if the pool cannot be had.
    """
    longest = config.max_model_len or model.max_position_embeddings
    num_pages = config.num_pages
    if num_pages is None and memory.device.startswith("cuda"):
        num_pages = num_pages_that_fit(
            page_bytes=page_bytes,
            total_bytes=memory.total_bytes,
            free_bytes=memory.free_bytes,
            activation_bytes=memory.activation_bytes,
            memory_fraction=config.memory_fraction,
        )
    elif num_pages is None:
        pages_each = -(-longest // config.page_size)
        at_least = pages_each if config.max_model_len else 1
        num_pages = max(at_least, min(config.max_running * pages_each, CPU_POOL_BYTES // page_bytes - 1))
    check_sizes(replace(config, num_pages=num_pages), model, page_bytes, memory.free_bytes)
    return num_pages, min(longest, num_pages * config.page_size)
