"""Intake: what a caller hands in becomes requests, or is refused before it costs anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from minillm.config import EngineConfig, ModelConfig
from minillm.errors import InvalidRequestError
from minillm.request import Request
from minillm.sampling_params import SamplingParams, check_fits
from minillm.validation import first_line, shown

SAMPLE_STRIDE = 0x9E3779B97F4A7C15  # odd: the samples of a prompt get seeds that are far apart


class Intake:
    """Checks prompts and parameters against what one engine can serve.

    Args:
        tokenizer: None if the engine serves token ids only.
        model_config: the vocabulary and the end tokens.
        config: with `max_model_len` and `num_pages` known.
    """

    def __init__(self, tokenizer: Any, model_config: ModelConfig, config: EngineConfig):
        self.tokenizer, self.model_config, self.config = tokenizer, model_config, config
        self._numbers = itertools.count()
        self._seeds = itertools.count()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt, checked.

        Raises:
            InvalidRequestError: not text or token ids; empty; too long; an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("this engine has no tokenizer: give the prompt as token ids")
            try:
                token_ids: Any = list(self.tokenizer.encode(prompt))
            except Exception as error:
                reason = first_line(error)
                raise InvalidRequestError(f"the tokenizer cannot encode the prompt: {reason}") from error
        elif isinstance(prompt, (list, tuple, range)) or getattr(prompt, "ndim", None) == 1:
            token_ids = prompt  # not copied before its length is known
        else:
            raise InvalidRequestError(f"a prompt must be text or a list of token ids, got {shown(prompt)}")
        if len(token_ids) == 0:
            raise InvalidRequestError("the prompt is empty: there is nothing to continue")
        longest = (self.config.max_model_len or 0) - 1
        if len(token_ids) > longest:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len {longest + 1} at most {longest} leave "
                "room for an output token"
            )
        vocab_size = self.model_config.vocab_size
        token_ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids  # an array, or a tensor
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                raise InvalidRequestError(f"token ids must be integers, got {shown(token_id)}")
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(f"token id {shown(int(token_id))} is outside the vocabulary of {vocab_size}")
        return [int(token_id) for token_id in token_ids]

    def requests(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None,
        request_id: str | None,
        on_token: Callable[[int, str], None] | None,
        taken: Container[str] = (),
    ) -> list[Request]:
        """One request for each of the `n` samples; all have the caller's id as `parent_id`.

        Raises:
            InvalidRequestError: a parameter that this engine cannot serve, or an id in `taken`.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params must be SamplingParams, got {shown(params)}")
        if request_id is None:
            request_id = next(name for i in self._numbers if (name := f"request-{i}") not in taken)
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequestError(f"request_id must be a non-empty string, got {shown(request_id)}")
        if on_token is not None and not callable(on_token):
            raise InvalidRequestError(f"on_token must be callable, got {shown(on_token)}")
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer, and this engine has none")
        vocab_size = self.model_config.vocab_size
        if any(token_id >= vocab_size for token_id in params.stop_token_ids):
            raise InvalidRequestError(f"stop_token_ids must be below the vocabulary's size, {vocab_size}")
        max_num_tokens = self.config.max_model_len or 0
        check_fits(len(token_ids), params, max_num_tokens, self.config.num_pages or 0, self.config.page_size)
        names = [request_id] if params.n == 1 else [f"{request_id}#{index}" for index in range(params.n)]
        if used := [name for name in (request_id, *names) if name in taken]:
            raise InvalidRequestError(f"request_id {used[0]!r} is in use")
        ends = () if params.ignore_eos else self.model_config.eos_token_ids
        # Without a seed of its own a request gets one from the engine's, so that a run can be repeated as a whole.
        seed = params.seed if params.seed is not None else (self.config.seed << 32) + next(self._seeds)
        return [
            Request(
                request_id=name,
                token_ids=list(token_ids),
                params=params,
                max_num_tokens=max_num_tokens,
                seed=(seed + index * SAMPLE_STRIDE) % 2**64,
                stop_token_ids=frozenset(params.stop_token_ids) | frozenset(ends),
                on_token=on_token,
                parent_id=request_id,
                sample_index=index,
            )
            for index, name in enumerate(names)
        ]
