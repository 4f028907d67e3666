"""Filters: what sampling parameters do to a row of logits or probabilities before a token is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def penalize(logits: torch.Tensor, token_ids: Sequence[int], penalty: float) -> None:
    """Make the tokens that occurred less likely, in place: divide their positive logits, multiply their negative ones.

    `logits` is `[vocab_size]` float32. Source: CTRL, https://arxiv.org/abs/1909.05858.
    """
    seen = torch.tensor(sorted(set(token_ids)), device=logits.device)
    values = logits[seen]
    penalized = torch.where(values > 0, values / penalty, values * penalty)
    largest = torch.finfo(logits.dtype).max
    logits[seen] = penalized.clamp(-largest, largest)  # whatever the penalty, what it gives is a number


def filtered_probs(
    probs: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]
) -> torch.Tensor:
    """Zero what top-k, then top-p, then min-p exclude, each on what the one before left, renormalised.

    Args:
        probs: `[num_rows, vocab_size]` float32.
        top_k, top_p, min_p: one for each row; 0, 1.0 and 0.0 are off.

    Returns:
        `[num_rows, vocab_size]`, rows not renormalised. Each filter is a threshold, so that equal probabilities live
        or die together and the result does not depend on how a sort breaks ties.
    """
    vocab_size = probs.shape[-1]

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=probs.device).unsqueeze(-1)

    if any(top_k) or any(p < 1 for p in top_p):
        most = max(min(k or vocab_size, vocab_size) for k in top_k)  # no row keeps more, ties aside
        ordered = (
            torch.topk(probs, most, dim=-1).values if most < vocab_size else probs.sort(-1, descending=True).values
        )
        last = column([min(k or vocab_size, vocab_size) - 1 for k in top_k], torch.int64)
        threshold = ordered.gather(-1, last)
        ordered = ordered.where(ordered >= threshold, 0)
        # All ties of the k-th count, also those beyond `most`, which depends on the other rows.
        total = probs.where(probs >= threshold, 0).sum(-1, keepdim=True)
        # Top-p keeps a token while those before it do not yet add up to p (of what top-k left).
        before = ordered.cumsum(-1) - ordered
        kept = before < column(top_p, torch.float32) * total
        kept |= column([p == 1 for p in top_p], torch.bool)  # the sum must not cut what rounding pushed past 1
        kept &= ordered >= threshold
        kept[:, 0] = True  # also where p is too small for float32, and in a row of NaN, which must not fail the others
        threshold = ordered.gather(-1, kept.sum(-1, keepdim=True) - 1)
        probs = probs.where(probs >= threshold, 0)
    if any(min_p):
        threshold = column(min_p, torch.float32) * probs.amax(-1, keepdim=True)
        probs = probs.where(probs >= threshold, 0)
    return probs
