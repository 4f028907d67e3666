"""Tiny checkpoints, made by transformers, for the tests: real models, only small and with random weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minillm.weights import WeightSlot

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(family: str, seed: int = 0, dtype: str = "float32", **config: Any) -> Any:
    """A random transformers model of a family; `config` overrides `TINY`, by the names of config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in (TINY | config).items() if name != "sliding_window" or family != "llama"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # biases and norms, too, are far from 0 and 1: a model without them gives other logits
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else noise / parameter.shape[-1] ** 0.5)
    return model.to(getattr(torch, dtype)).eval()


def tiny_checkpoint(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str | int = "1GB",
    tokenizer: bool = False,
    **config: Any,
) -> Path:
    """Save a `tiny_model` to a folder, as one file or as shards of `max_shard_size`, and return the folder.

    `config` overrides `TINY`: `tie_word_embeddings=True`, `attention_bias=True`, `num_key_value_heads=1`,
    `rope_parameters={"rope_type": "linear", "factor": 2.0}`, ... With `tokenizer`, a `byte_tokenizer` comes along.
    """
    from transformers.utils import logging

    model = tiny_model(family, seed, dtype, **config)
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return Path(folder)


def byte_tokenizer() -> Any:
    """A tokenizer of one token a byte, after `<unk>` 0, `<s>` 1 and `</s>` 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {char: 3 + i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's config.json; None as a value is written as null."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, *drop: str, **changes: torch.Tensor) -> None:
    """Drop tensors of a single-file checkpoint, and change or add others (`__` in a name stands for a dot)."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name not in drop}
    save_file(tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}, path)


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", header_size: int | None = None) -> None:
    """Write a safetensors file by hand, with whatever mistakes it should have."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if header_size is None else header_size) + raw + data)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read the simple way."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def slots_for(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **shard: Any
) -> dict[str, WeightSlot]:
    """A slot for each tensor of a checkpoint; `shard` gives `shard_dim`, `rank` and `world_size` of matrices."""
    slots = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                options = shard if len(shape) == 2 else {}
                sizes = list(shape)
                if options:
                    per_rank = -(-shape[options["shard_dim"]] // options["world_size"])
                    start = min(options["rank"] * per_rank, shape[options["shard_dim"]])
                    sizes[options["shard_dim"]] = min(per_rank, shape[options["shard_dim"]] - start)
                slots[name] = WeightSlot(torch.full(sizes, torch.nan, dtype=dtype, device=device), shape, **options)
    return slots
