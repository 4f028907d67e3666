"""WeightSlot: where one tensor of a checkpoint goes; and how safetensors files are read into slots.

A model says what it needs (`slots`, by checkpoint name), a checkpoint says what it has (the headers of its files). Everything
that can be wrong is found by comparing the two, before a byte of weights is read. Then each tensor is copied to its place, only
the slice that this rank owns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class WeightSlot:
    """The place in this rank's memory for one tensor of the checkpoint.

    `target` has the shape of the shard: `shape`, but for `shard_dim`, of which rank `rank` of `world_size` owns
    `ceil(n / world_size)` entries from `rank * ceil(n / world_size)` on (the last ranks own fewer where that does not divide).
    A fused parameter has several slots, whose targets are views of it; a transposed one has a transposed view as target.
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

        `source` is the full tensor, or a slice object of safetensors (`safe_open(...).get_slice(name)`), of which only this
        rank's part is read from the file.
        """
        if self.target.numel():
            with torch.no_grad():
                self.target.copy_(source[self.shard_slices()])
