"""ModelLoader: from the name of a model to its config, weights and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from minillm.config import ModelConfig
from minillm.errors import CheckpointError, ConfigError
from minillm.memory import device_memory, gib
from minillm.validation import first_line, shown
from minillm.weights import WeightSlot, check_headers, load_weights, random_weights, read_headers

BUNDLED_MODEL = Path(__file__).parent / "assets" / "story-6m"
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no code, no pickles
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class ModelLoader:
    """What is known of one model before it exists: its config, and where its weights and tokenizer come from.

    `model` is None (the bundled story model), a checkpoint folder, a name on the Hugging Face hub (`Qwen/Qwen3-0.6B`),
    or a `ModelConfig`: a model without a checkpoint, with random weights and no tokenizer. Raises `CheckpointError`.
    """

    def __init__(self, model: str | PathLike[str] | ModelConfig | None = None):
        self.folder = None if isinstance(model, ModelConfig) else find_checkpoint(model)
        self.config = model if isinstance(model, ModelConfig) else ModelConfig.from_hf(self.folder or "")

    def check(self, slots: Mapping[str, WeightSlot], device: torch.device, random_weights: bool = False) -> None:
        """Raise, before memory is taken, what is wrong with the weights, or that they do not fit on the device.

        The slots are of a model on PyTorch's "meta" device, which has shapes but no memory.
        """
        if self.folder is not None and not random_weights:
            check_headers(read_headers(self.folder), slots, self.folder)
        needed = sum(slot.target.numel() * slot.target.element_size() for slot in slots.values())
        if needed > (free := device_memory(device)[0]):
            raise ConfigError(f"the model's weights take {gib(needed)}, but {device} has {gib(free)} free")

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
    name, path = str(model), Path(model)
    with suppress(OSError, RuntimeError):  # a name too long for the file system, or of no user, is no folder
        path = path.expanduser()
        if name and path.is_dir():
            return path
        if path.is_file():
            raise CheckpointError(f"model {shown(name)} is a file: name the folder that it lies in")
    part = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    if not isinstance(model, str) or not re.fullmatch(f"{part}(/{part})?", name):
        raise CheckpointError(
            f"model {shown(name)} is not an existing folder (looked in {Path.cwd()}), nor can it be a name on the "
            "Hugging Face hub like 'Qwen/Qwen3-0.6B'"
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
        raise CheckpointError(
            f"model {shown(name)} is not an existing folder (looked in {Path.cwd()}), and the Hugging Face hub did "
            f"not give it: {first_line(error)}"
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
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
