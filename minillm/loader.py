"""ModelLoader: from the name of a model to its config, weights and tokenizer; and how many KV pages fit beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from minillm.config import EngineConfig, ModelConfig, shown
from minillm.errors import CheckpointError, ConfigError
from minillm.weights import WeightSlot, check_headers, load_weights, random_weights, read_headers

BUNDLED_MODEL = Path(__file__).parent / "assets" / "story-6m"
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no code, no pickles
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
CPU_POOL_BYTES = 512 * 2**20


class ModelLoader:
    """What is known of one model before it exists: its config, and where its weights and tokenizer come from.

    `model` is None (the bundled story model), a checkpoint folder, a name on the Hugging Face hub (`Qwen/Qwen3-0.6B`),
    or a `ModelConfig`: a model without a checkpoint, with random weights and no tokenizer. Raises `CheckpointError`.
    """

    def __init__(self, model: str | PathLike[str] | ModelConfig | None = None):
        self.folder = None if isinstance(model, ModelConfig) else find_checkpoint(model)
        self.config = model if isinstance(model, ModelConfig) else ModelConfig.from_hf(self.folder or "")

    def check(self, slots: Mapping[str, WeightSlot], device: torch.device) -> None:
        """Raise, before memory is taken, what is wrong with the weights, or that they do not fit on the device.

        The slots are of a model on PyTorch's "meta" device, which has shapes but no memory.
        """
        if self.folder is not None:
            check_headers(read_headers(self.folder), slots, self.folder)
        needed = sum(slot.target.numel() * slot.target.element_size() for slot in slots.values())
        if needed > (free := device_memory(device)[0]):
            raise ConfigError(f"the model's weights take {_gib(needed)}, but {device} has {_gib(free)} free")

    def load_weights(self, slots: Mapping[str, WeightSlot], seed: int | None = None) -> None:
        """Fill the slots from the checkpoint, or at random if there is none or a seed is given."""
        if self.folder is None or seed is not None:
            random_weights(slots, seed or 0)
        else:
            load_weights(self.folder, slots)

    def load_tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None if there is no checkpoint."""
        return None if self.folder is None else load_tokenizer(self.folder)


def find_checkpoint(model: str | PathLike[str] | None) -> Path:
    """The folder of a model: the bundled one (None), a local one, or one downloaded from the Hugging Face hub."""
    if model is None:
        if not (BUNDLED_MODEL / "config.json").exists():
            raise CheckpointError(
                f"the bundled model is missing from this installation: {BUNDLED_MODEL} has no config.json"
            )
        return BUNDLED_MODEL
    if not isinstance(model, (str, PathLike)):
        raise CheckpointError(f"model must be a folder, a hub name, a ModelConfig or None, got {type(model).__name__}")
    name, path = str(model), Path(model).expanduser()
    with suppress(OSError):  # a name too long for the file system is no folder
        if name and path.is_dir():
            return path
    if path.is_file():
        raise CheckpointError(f"model {shown(name)} is a file: name the folder that it lies in")
    part = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    if not isinstance(model, str) or not re.fullmatch(f"{part}(/{part})?", name):
        raise CheckpointError(
            f"model {shown(name)} is not an existing folder (looked in {Path.cwd()}), nor can it be a name on the Hugging "
            "Face hub like 'Qwen/Qwen3-0.6B'"
        )
    return _download(name)


def _download(name: str) -> Path:
    import huggingface_hub

    try:  # the files of the repository's top level only: subfolders hold other formats of the same weights
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(HUB_PATTERNS), ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except Exception as error:  # a dozen types from four libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"model {shown(name)} is not an existing folder (looked in {Path.cwd()}), and the Hugging Face hub did not give "
            f"it: {reason}"
        ) from error


def load_tokenizer(folder: str | PathLike[str]) -> Any:
    """The tokenizer of a checkpoint folder, through transformers (imported here, because it is slow to import)."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); tokenizer=None runs without"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


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

    `run_step(num_tokens)` runs a forward pass over that many tokens, and the sampler over `max_running` rows. Its pages
    are of a small pool of its own, which it drops.
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
            f"no memory is left for the KV cache: {_gib(total_bytes)} * memory_fraction {memory_fraction:g}, less "
            f"{_gib(in_use)} in use and {_gib(activation_bytes)} for a step's activations, does not hold two pages of "
            f"{page_bytes} bytes; raise memory_fraction, lower max_batch_tokens, or take a smaller model"
        )
    return num_pages


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def pool_size(config: EngineConfig, model: ModelConfig, page_bytes: int, memory: MemoryReport) -> tuple[int, int]:
    """The KV pool's `num_pages`, and the `max_model_len` that it allows.

    `num_pages` if it is given; else on CUDA what fits; else what `max_running` requests of `max_model_len` need, up to
    512 MiB, but always one request of the `max_model_len` that was asked for. `max_model_len` is at most what the pool
    holds. Raises `ConfigError` if the pool cannot be had.
    """
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {longest} is more than the model's max_position_embeddings, {model.max_position_embeddings}"
        )
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
    needed = (num_pages + 1) * page_bytes
    if needed > memory.free_bytes:
        raise ConfigError(
            f"num_pages {num_pages} of {page_bytes} bytes (and one for padding) take {_gib(needed)}, but "
            f"{memory.device} has {_gib(memory.free_bytes)} free; give a smaller num_pages or max_model_len"
        )
    return num_pages, min(longest, num_pages * config.page_size)
