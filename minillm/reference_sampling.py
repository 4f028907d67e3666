"""The twin of FlashInfer's sampling functions: the same distributions, from random streams of its own.

FlashInfer samples by rejection, without sorting; here the filters sort, and one uniform number a row picks a token.
Source: https://flashinfer.ai/2025/03/10/sampling.html.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

Samples = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

TEMPERATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEED_DTYPES = (torch.int64, torch.uint64)


def softmax(
    logits: torch.Tensor, temperature: torch.Tensor | float | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """Softmax of `logits` `[batch, vocab]` over a temperature, a number or a tensor `[batch]`; float32.

    Temperature 0 multiplies by 0, as in FlashInfer: every token becomes as likely (greedy sampling needs no softmax).
    Raises ValueError (a tensor of another shape, dtype or device), TypeError (neither number nor tensor). Source: https://docs.flashinfer.ai/api/sampling.html.
    """
    if temperature is None:
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    if isinstance(temperature, torch.Tensor):
        if temperature.ndim != 1:
            raise ValueError(
                f"temperature tensor must be 1D with one value per logits row, got shape {tuple(temperature.shape)}"
            )
        if temperature.size(0) != logits.size(0):
            raise ValueError(
                f"temperature tensor length must equal logits.size(0) ({logits.size(0)}), got {temperature.size(0)}"
            )
        if temperature.device != logits.device:
            raise ValueError(
                f"temperature tensor must be on the same device as logits ({logits.device}), got {temperature.device}"
            )
        if temperature.dtype not in TEMPERATURE_DTYPES:
            raise ValueError(
                f"temperature tensor must have dtype float16, bfloat16, float32, or float64, got {temperature.dtype}"
            )
        temperature = temperature.float()[:, None]
        return torch.softmax(logits.float() * torch.where(temperature == 0, 0.0, 1.0 / temperature), dim=-1)
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(
            "temperature must be None, a real scalar, or a 1D floating-point tensor with one value per logits row"
        )
    return torch.softmax(logits.float() * (1.0 / float(temperature) if temperature else 0.0), dim=-1)


def sampling_from_logits(
    logits: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a token from each row of `logits` `[batch, vocab]`; int32 `[batch]`, or one for each of `indices`.

    Raises ValueError (NaN with `check_nan`, seed and offset as for `sampling_from_probs`).
    Source: https://docs.flashinfer.ai/api/sampling.html.
    """
    if check_nan and torch.any(torch.isnan(logits)):
        raise ValueError("Input logits contains NaN.")
    return _draw(softmax(logits), indices, generator, seed, offset)[0]


def sampling_from_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw a token from each row of `probs` `[batch, vocab]`; int32 `[batch]`.

    `indices` `[outputs]` int32 or int64 draws from the rows it names, and gives its dtype to the result. With `seed`
    and `offset` (two numbers, or two int64 tensors of length 1 or `outputs`) the draw depends on them and on the row's
    place alone; else on `generator`. A row that is all zero or holds NaN gives token 0, and False in the second result
    of `return_valid`. Raises ValueError (NaN with `check_nan`, ill-formed seed or offset).
    Source: https://docs.flashinfer.ai/api/sampling.html.
    """
    _check_nan(probs, check_nan)
    drawn = _draw(probs.float(), indices, generator, seed, offset)
    return drawn if return_valid else drawn[0]


def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: torch.Tensor | float,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw from the tokens at least `min_p` (a number, or `[batch]`) times as likely as the row's likeliest.

    The rest as `sampling_from_probs`; ValueError, too, for a `min_p` tensor of another shape.
    Source: arXiv:2407.01082, https://docs.flashinfer.ai/api/sampling.html.
    """
    _check_nan(probs, check_nan)
    probs = probs.float()
    floor = probs.amax(-1, keepdim=True) * _per_row(min_p, probs)
    drawn = _draw(probs * (probs >= floor), indices, generator, seed, offset)
    return drawn if return_valid else drawn[0]


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: torch.Tensor | int,
    top_p: torch.Tensor | float,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw from the `top_k` likeliest tokens, and of those from the fewest that reach the mass `top_p`.

    `top_k`, `top_p`: numbers or `[batch]`. "top_k_first" renormalises between the filters, "joint" applies both to
    `probs` as given. Tokens as likely as the last one kept are kept, too. The rest as `sampling_from_probs`;
    ValueError, too, for another order, or parameter tensors of another shape. Source: https://docs.flashinfer.ai/api/sampling.html.
    """
    _check_order(filter_apply_order)
    _check_nan(probs, check_nan)
    probs = probs.float()
    kept = _filtered(probs, top_k, top_p, filter_apply_order)
    drawn = _draw(kept, indices, generator, seed, offset)
    return drawn if return_valid else drawn[0]


def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: torch.Tensor | int,
    top_p: torch.Tensor | float,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`top_k_top_p_sampling_from_probs` of the softmax of `logits` `[batch, vocab]`."""
    _check_order(filter_apply_order)
    probs = softmax(logits)
    _check_nan(probs, check_nan)
    kept = _filtered(probs, top_k, top_p, filter_apply_order)
    return _draw(kept, indices, generator, seed, offset)[0]


def _check_order(filter_apply_order: str) -> None:
    if filter_apply_order not in ("top_k_first", "joint"):
        raise ValueError(f"Invalid filter_apply_order: {filter_apply_order}")


def _check_nan(probs: torch.Tensor, check_nan: bool) -> None:
    if check_nan and torch.any(torch.isnan(probs)):
        raise ValueError("Input probs contains NaN.")


def _per_row(parameter: Any, probs: torch.Tensor) -> Any:
    """A sampling parameter that broadcasts against `probs`; ValueError for a tensor that is not `[batch]`."""
    if not isinstance(parameter, torch.Tensor):
        return parameter
    if parameter.ndim == 0:
        raise ValueError(
            "Expected a 1D tensor of shape (batch_size,) or scalar for the sampling parameter, but got a 0-dimensional "
            "tensor."
        )
    if parameter.ndim > 1:
        raise ValueError(
            f"Expected a 1D tensor or scalar for the sampling parameter, but got a {parameter.ndim}D tensor."
        )
    if parameter.size(0) != probs.size(0):
        raise ValueError(
            f"Sampling parameter tensor batch size mismatch: expected length {probs.size(0)} to match the reference "
            f"tensor batch size, but got length {parameter.size(0)}."
        )
    return parameter[:, None]


def _filtered(probs: torch.Tensor, top_k: torch.Tensor | int, top_p: torch.Tensor | float, order: str) -> torch.Tensor:
    """`probs` with 0 for the tokens that the filters drop; not renormalised."""
    vocab = probs.size(-1)
    k, p = _per_row(top_k, probs), _per_row(top_p, probs)
    descending = probs.sort(dim=-1, descending=True).values
    if isinstance(k, torch.Tensor):
        kth = descending.gather(-1, k.to(torch.int64).clamp(1, vocab) - 1)
    else:
        kth = descending[:, min(max(int(k), 1), vocab) - 1, None]
    ranked = descending
    if order == "top_k_first":
        ranked = ranked * (ranked >= kth)
        ranked = ranked / ranked.sum(-1, keepdim=True)
    # A token stays while the likelier ones do not reach p; the likeliest always stays.
    before = ranked.cumsum(-1) - ranked
    last = ((before < p).sum(-1, keepdim=True) - 1).clamp_min_(0)
    pth = descending.gather(-1, last)
    return probs * (probs >= torch.maximum(kth, pth))


def _draw(
    probs: torch.Tensor,
    indices: torch.Tensor | None,
    generator: torch.Generator | None,
    seed: int | torch.Tensor | None,
    offset: int | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the cumulative distribution of each row (which need not sum to 1) at one uniform number."""
    if indices is not None:
        probs = probs.index_select(0, indices)
    rows = probs.size(0)
    if seed is None or offset is None:
        uniform = torch.rand(rows, 1, generator=generator, device=probs.device)
    else:
        uniform = _seeded_uniform(seed, offset, rows, probs.device)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding can never pick a token of probability 0 or none at all.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    samples = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    valid = (total > 0).squeeze(1)
    samples = (samples * valid).to(torch.int32 if indices is None else indices.dtype)
    return samples, valid


def _seeded_uniform(
    seed: int | torch.Tensor, offset: int | torch.Tensor, rows: int, device: torch.device
) -> torch.Tensor:
    """One uniform number in [0, 1) a row, float32 `[rows, 1]`, from seed, offset and the row's place alone."""
    if isinstance(seed, torch.Tensor) != isinstance(offset, torch.Tensor):
        raise ValueError("seed and offset must both be tensors or both be scalars")
    words = []
    for name, word in (("seed", seed), ("offset", offset)):
        if isinstance(word, torch.Tensor):
            if word.device != device:
                raise ValueError(f"{name} tensor must be on {device}")
            if word.dtype not in SEED_DTYPES:
                raise ValueError(f"{name} tensor must be int64/uint64")
            if word.ndim != 1:
                raise ValueError(f"{name} tensor must be 1D")
            if word.size(0) not in (1, rows):
                raise ValueError(f"{name} tensor length must be 1 or {rows}")
            words.append(word.view(torch.int64))
        else:
            signed = (int(word) + 2**63) % 2**64 - 2**63
            words.append(torch.full((1,), signed, dtype=torch.int64, device=device))
    mixed = _mix(words[0])
    mixed = _mix(mixed + torch.arange(rows, device=device))
    mixed = _mix(mixed + words[1])
    return ((mixed >> 40) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)[:, None]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 64-bit integers (the finaliser of SplitMix64, doi:10.1145/2714064.2660195); products wrap around."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right without copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
