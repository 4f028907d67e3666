"""WeightSlot: where one tensor of a checkpoint goes; and how safetensors files are read into slots.

A model says what it needs (`slots`, by checkpoint name), a checkpoint says what it has (the headers of its files). What
can be wrong is found by comparing the two, before a byte of weights is read. Then each tensor is copied to its place,
only the slice that this rank owns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from minillm.config import read_json
from minillm.errors import CheckpointError
from minillm.validation import shown

FEW_ROWS = 64  # up to so many, a product is faster in parts


class Matrix:
    """A weight `[out_features, in_features]`, laid out for products with the few rows that decode consists of.

    On a CPU, the product of one row with a matrix is a matter of reading the matrix. It is fastest where the matrix
    lies in memory column by column, and where the threads read parts of it side by side, which the CPU's library does
    not do by itself for a single row: it is given the columns as a batch of narrower matrices. GPUs need none of this.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype):
        self.parts: torch.Tensor | None = None
        if device.type != "cpu":
            self.weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
            return
        columns = torch.empty(in_features, out_features, device=device, dtype=dtype)
        self.weight = columns.t()
        num_parts = max(n for n in range(1, min(torch.get_num_threads(), 8) + 1) if out_features % n == 0)
        if num_parts > 1:
            self.parts = columns.view(in_features, num_parts, -1).transpose(0, 1)  # [num_parts, in, out / num_parts]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x W^T + bias`, `[num_tokens, in_features]` to `[num_tokens, out_features]`."""
        num_rows = x.shape[0]
        if self.parts is None or num_rows > FEW_ROWS:
            return F.linear(x, self.weight, bias)
        y = torch.bmm(x.expand(self.parts.shape[0], -1, -1), self.parts)
        y = y.view(1, -1) if num_rows == 1 else y.transpose(0, 1).reshape(num_rows, -1)
        return y if bias is None else y.add_(bias)


@dataclass(frozen=True, eq=False)
class WeightSlot:
    """The place in this rank's memory for one tensor of the checkpoint.

    `target` has the shape of the shard: `shape`, but for `shard_dim`, of which rank `rank` of `world_size` owns
    `ceil(n / world_size)` entries, from `rank * ceil(n / world_size)` on (the last ranks own fewer where that does not
    divide). A fused parameter has several slots, whose targets are views of it.
    """

    target: torch.Tensor
    shape: tuple[int, ...]  # the full shape, as the checkpoint has it
    shard_dim: int | None = None  # None: every rank holds the whole tensor
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")
        if self.shard_dim is not None and not 0 <= self.shard_dim < len(self.shape):
            raise ValueError(f"shard_dim {self.shard_dim} is not a dimension of a tensor of shape {list(self.shape)}")
        if tuple(self.target.shape) != self.shard_shape:
            raise ValueError(
                f"target must have the shape of the shard, {list(self.shard_shape)}, got {list(self.target.shape)}"
            )

    def shard_slices(self) -> tuple[slice, ...]:
        """What this rank owns of the full tensor: one slice for each dimension."""
        slices = [slice(0, n) for n in self.shape]
        if self.shard_dim is not None:
            n = self.shape[self.shard_dim]
            per_rank = math.ceil(n / self.world_size)
            slices[self.shard_dim] = slice(min(self.rank * per_rank, n), min((self.rank + 1) * per_rank, n))
        return tuple(slices)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return tuple(s.stop - s.start for s in self.shard_slices())

    def load(self, source: Any) -> None:
        """Copy this rank's part of `source` into the target, converting its dtype.

        `source` is the full tensor, or a slice object of safetensors (`safe_open(...).get_slice(name)`), of which only
        this rank's part is read from the file.
        """
        if self.target.numel():
            with torch.no_grad():
                self.target.copy_(source[self.shard_slices()])


class TensorInfo(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    path: Path
    dtype: str  # as safetensors names them: "F32", "BF16", "F16", "I64", ...
    shape: tuple[int, ...]


def _some(names: Iterable[str]) -> str:
    """The first few of many names, and how many there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f", ... ({len(ordered)} in all)" if len(ordered) > 4 else "")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose faults are `CheckpointError`. Its header is checked against its size on opening."""
    try:
        if not path.is_file():
            raise CheckpointError(f"weight file {path} does not exist")
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint folder, each with the tensors that the index (if any) says it holds.

    An index may only name files of its own folder, by plain names. What is a symbolic link there is followed: the cache
    of the Hugging Face hub consists of links, and whoever may make links in the folder may put files there, too.
    """
    single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or single.is_symlink():
        return {single: []}
    if not index_path.exists():
        found = sorted(
            p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".safetensors")
        )
        if found and not any(name.endswith((".safetensors", ".gguf")) for name in found):
            raise CheckpointError(
                f"{folder} has its weights as pickles only ({_some(found)}), which are never read because they can "
                "run code: convert them to safetensors"
            )
        raise CheckpointError(f"{folder} has no model.safetensors" + (f", only {_some(found)}" if found else ""))
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map")
    files: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path} names {shown(name)} for {shown(tensor)}: only .safetensors files of its "
                "own folder are read"
            )
        files.setdefault(folder / name, []).append(tensor)
    return files


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Name, dtype and shape of every tensor in a checkpoint folder, from the files' headers alone."""
    tensors: dict[str, TensorInfo] = {}
    for path, expected in weight_files(folder).items():
        with _opened(path) as file:
            for name in file.keys():
                if name in tensors:
                    raise CheckpointError(
                        f"{name} is in two files, {tensors[name].path.name} and {path.name}, of {folder}"
                    )
                header = file.get_slice(name)
                tensors[name] = TensorInfo(path, header.get_dtype(), tuple(header.get_shape()))
        if missing := [name for name in expected if name not in tensors]:
            raise CheckpointError(f"{path} lacks tensors that the index promises: {_some(missing)}")
    return tensors


def check_headers(tensors: Mapping[str, TensorInfo], slots: Mapping[str, WeightSlot], folder: Path) -> None:
    """Raise `CheckpointError` unless the checkpoint has exactly the tensors that the model needs, as it needs them.

    Two surplus ones are fine: `lm_head.weight` where the model has no slot for it (tied embeddings), and the RoPE
    frequencies that old checkpoints carry along.
    """
    if missing := slots.keys() - tensors.keys():
        raise CheckpointError(f"{folder} lacks tensors that its config.json calls for: {_some(missing)}")
    surplus = {
        n for n in tensors.keys() - slots.keys() if n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")
    }
    if surplus:
        raise CheckpointError(f"{folder} has tensors that its config.json has no place for: {_some(surplus)}")
    for name, slot in slots.items():
        _, dtype, shape = tensors[name]
        if dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(f"{name} in {folder} is {dtype}; only F32, BF16 and F16 weights are supported")
        if shape != tuple(slot.shape):
            raise CheckpointError(
                f"{name} in {folder} has shape {list(shape)}; config.json calls for {list(slot.shape)}"
            )


def load_weights(folder: str | PathLike[str], slots: Mapping[str, WeightSlot]) -> None:
    """Fill every slot from the safetensors files of a folder, converting dtypes; only this rank's slices are read.

    Raises `CheckpointError` for whatever is wrong with the checkpoint, by its headers, before any weight is read. Host
    memory above the slots' own stays at about the size of one file, because files are mapped one at a time.
    """
    folder = Path(folder)
    tensors = read_headers(folder)
    check_headers(tensors, slots, folder)
    by_file: dict[Path, list[str]] = {}
    for name in slots:
        by_file.setdefault(tensors[name].path, []).append(name)
    for path, names in by_file.items():
        with _opened(path) as file:
            for name in names:
                slots[name].load(file.get_slice(name))


def random_weights(slots: Mapping[str, WeightSlot], seed: int) -> None:
    """Fill every slot with random weights: norms with ones, everything else from a normal distribution, std 0.02.

    A tensor's values depend on the seed, its name, its full shape and the kind of device (CUDA draws other numbers than
    the CPU). Each rank draws the full tensor, block by block, and keeps its part: so its shard is the same slice of the
    same model however many ranks there are.
    """
    for name, slot in slots.items():
        if len(slot.shape) == 1 and name.endswith("norm.weight"):
            slot.target.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(slot.target.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        (rows, *rest), num_rows = slot.shard_slices(), slot.shape[0]
        block_rows = max(1, 2**22 // max(1, math.prod(slot.shape[1:])))
        for start in range(0, num_rows, block_rows):
            stop = min(start + block_rows, num_rows)
            block = torch.randn(stop - start, *slot.shape[1:], generator=generator, device=slot.target.device)
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                part = block[(slice(first - start, last - start), *rest)]
                slot.target[first - rows.start : last - rows.start].copy_(part.mul_(0.02))
