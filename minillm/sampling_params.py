"""SamplingParams: how a request wants its tokens drawn, and when it wants to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minillm.errors import InvalidRequestError
from minillm.validation import integer, number, one_of, shown

MAX_N = 1024
MAX_LOGPROBS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens, and when to stop. `InvalidRequestError` names a field with a wrong value.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p; each renormalises what is
    left.

    Args:
        n: how many outputs to draw for the prompt.
        temperature: divides the logits; 0 is greedy (the most probable token, filters and seed play no part).
        top_k: keep the k most probable tokens; 0 or -1 is off.
        top_p: keep the fewest most probable tokens whose probabilities add up to this
            (nucleus sampling, https://arxiv.org/abs/1904.09751).
        min_p: keep tokens at least this many times as probable as the most probable one
            (https://arxiv.org/abs/2407.01082).
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely
            (https://arxiv.org/abs/1909.05858).
        max_tokens: end with `length` after so many tokens.
        min_tokens: hold every kind of stop back until so many tokens.
        stop: strings that end the output; they are not part of its text.
        stop_token_ids: token ids that end the output, besides the model's own end tokens; they stay in `token_ids`.
        ignore_eos: do not stop at the model's end tokens.
        seed: makes the request's random numbers depend on the seed and the position alone.
        logprobs: also return the log-probabilities of this many most probable tokens and of the one drawn.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("n", integer("n", self.n, 1, MAX_N, error=InvalidRequestError))
        put("temperature", number("temperature", self.temperature, 0.0, above=False, error=InvalidRequestError))
        put("top_k", max(integer("top_k", self.top_k, -1, error=InvalidRequestError), 0))
        put("top_p", number("top_p", self.top_p, 0.0, 1.0, error=InvalidRequestError))
        put("min_p", number("min_p", self.min_p, 0.0, 1.0, above=False, error=InvalidRequestError))
        put("repetition_penalty", number("repetition_penalty", self.repetition_penalty, 0.0, error=InvalidRequestError))
        put("max_tokens", integer("max_tokens", self.max_tokens, 1, error=InvalidRequestError))
        put("min_tokens", integer("min_tokens", self.min_tokens, 0, error=InvalidRequestError))
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens {self.min_tokens} must not be above max_tokens {self.max_tokens}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise InvalidRequestError(f"stop must be a string or a list of non-empty strings, got {shown(self.stop)}")
        put("stop", tuple(stop))
        if not isinstance(self.stop_token_ids, (tuple, list)):
            raise InvalidRequestError(f"stop_token_ids must be a list of token ids, got {shown(self.stop_token_ids)}")
        put(
            "stop_token_ids",
            tuple(integer("stop_token_ids", i, 0, error=InvalidRequestError) for i in self.stop_token_ids),
        )
        one_of("ignore_eos", self.ignore_eos, (True, False), error=InvalidRequestError)
        if self.seed is not None:
            put("seed", integer("seed", self.seed, 0, 2**64 - 1, error=InvalidRequestError))
        if self.logprobs is not None:
            put("logprobs", integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, error=InvalidRequestError))


def check_fits(num_prompt: int, params: SamplingParams, max_num_tokens: int, num_pages: int, page_size: int) -> None:
    """Raise `InvalidRequestError` for a request that could not be finished even with the whole pool to itself."""
    most = min(num_prompt + params.max_tokens, max_num_tokens)
    if most - 1 > num_pages * page_size:  # the last token is returned, but never computed
        raise InvalidRequestError(
            f"the request may grow to {most} tokens, but all {num_pages} pages together hold {num_pages * page_size}"
        )
