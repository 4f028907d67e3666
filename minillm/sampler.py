"""Sampler: from logits to tokens.

A request's random numbers are a function of its seed and of the position to fill, and of nothing else: no generator
advances from step to step. So what a request draws does not depend on which others happen to share its batch, on when
it was scheduled, or on whether it was preempted. (Parallel random numbers as a function of a counter: Salmon et al.,
2011, https://doi.org/10.1145/2063384.2063405.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from minillm.filters import filtered_probs, penalize
from minillm.protocols import SampledTokens
from minillm.request import Request

MIN_TEMPERATURE = 1e-30  # below it, and above its inverse, nothing changes any more; float32 holds both


class Sampler:
    """Greedy, temperature, top-k, top-p and min-p sampling with repetition penalty, for each request its own."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
        """Draw the next token of each request from its row of `logits` `[len(requests), vocab_size]`, on any device."""
        params = [request.params for request in requests]
        # The one copy to the host that every row needs; NaN is the largest of any row that holds it.
        best_logits, best = (x.tolist() for x in logits.max(dim=-1))
        is_valid = [-np.inf < x < np.inf for x in best_logits]
        token_ids = best
        drawn = [i for i, p in enumerate(params) if p.temperature > 0 or p.repetition_penalty != 1]
        if drawn:
            token_ids = list(best)
            rows = logits if len(drawn) == len(requests) else logits[drawn]
            for i, token_id in zip(drawn, self._draw(rows.float(), [requests[i] for i in drawn]), strict=True):
                token_ids[i] = token_id
        logprobs: list[dict[int, float] | None] = [None] * len(requests)
        for i, p in enumerate(params):
            if p.logprobs is not None and is_valid[i]:
                logprobs[i] = top_logprobs(logits[i], token_ids[i], p.logprobs)
        return SampledTokens(token_ids, is_valid, logprobs)

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
        params = [request.params for request in requests]

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(-1)

        if any(p.repetition_penalty != 1 for p in params):
            logits = logits.clone()
            for row, request in zip(logits, requests, strict=True):
                if request.params.repetition_penalty != 1:
                    penalize(row, request.token_ids, request.params.repetition_penalty)
        # A greedy row divides by 1 here and takes the largest below. With the largest at 0, no quotient overflows.
        temperatures = [min(max(p.temperature, MIN_TEMPERATURE), 1 / MIN_TEMPERATURE) for p in params]
        logits = logits - logits.amax(-1, keepdim=True)
        logits = logits / column([t if p.temperature else 1.0 for t, p in zip(temperatures, params, strict=True)])
        probs = filtered_probs(
            torch.softmax(logits, dim=-1),
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        )
        uniforms = counter_uniforms([r.seed for r in requests], [r.num_tokens for r in requests])
        token_ids = draw(probs, torch.from_numpy(uniforms).to(logits.device))
        greedy = torch.tensor([p.temperature == 0 for p in params], device=logits.device)
        return torch.where(greedy, logits.argmax(dim=-1), token_ids).tolist()


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-transform sampling: the first token at which the running sum of `probs` passes `uniforms` of its total.

    `probs` is `[num_rows, vocab_size]` and need not add up to 1; `uniforms` `[num_rows]` float64 in [0, 1). Returns
    `[num_rows]` int64. Tokens of zero probability are never drawn.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    goals = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goals, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def counter_uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """A number in [0, 1) for each pair of a seed and a position, `[n]` float64: two rounds of SplitMix64's mixer.

    Source of the mixer: Steele, Lea and Flood, 2014, https://doi.org/10.1145/2714064.2660195.
    """

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    keys = mix(np.asarray(seeds, dtype=np.uint64) + golden)
    bits = mix(keys + np.asarray(positions, dtype=np.uint64) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def top_logprobs(logits: torch.Tensor, token_id: int, k: int) -> dict[int, float]:
    """Log-probabilities of the drawn token and of the `k` most probable ones, of logits `[vocab_size]`."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(min(k, len(logprobs)))
    return {token_id: float(logprobs[token_id])} | dict(zip(ids.tolist(), values.tolist(), strict=True))
