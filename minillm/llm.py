"""LLM: the front door. Prompts in, texts out; underneath is an `LLMEngine`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from minillm.engine import LLMEngine
from minillm.errors import EngineClosedError, InvalidRequestError
from minillm.request import Request, RequestOutput
from minillm.sampling_params import SamplingParams
from minillm.validation import shown

Prompt = str | Sequence[int]


class LLM:
    """Generates text with one model; takes the same arguments as `LLMEngine`, which does the work as `.engine`.

        llm = LLM()
        llm.generate(["Once upon a time"], SamplingParams(max_tokens=64))[0].text

    Calls may interleave: while a `stream` is half read, `generate` may run, and `engine.add_request` beside both.
    """

    def __init__(self, model: Any = None, **options: Any):
        self.engine = LLMEngine(model, **options)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; returns their outputs in order (with `n` samples of a prompt, one after the other).

        Args:
            prompts: a text, a list of token ids (one prompt), or a list of those.
            params: for all prompts, or one for each.
            progress: show a progress bar if it takes longer than a second.

        Raises:
            InvalidRequestError: any of it cannot be served; nothing has been admitted then.
        """
        listed = as_prompts(prompts)
        if not isinstance(params, (list, tuple)):
            each: Sequence[Any] = [params] * len(listed)
        else:
            each = params
        if len(each) != len(listed):
            raise InvalidRequestError(
                f"{len(each)} SamplingParams for {len(listed)} prompts: give one, or one for each"
            )
        return self._run([self.engine.prepare(p, s) for p, s in zip(listed, each, strict=True)], progress)

    def _run(self, prepared: list[list[Request]], progress: bool) -> list[RequestOutput]:
        engine, ids = self.engine, [requests[0].parent_id for requests in prepared]
        bar = progress_bar(len(prepared)) if progress and prepared else None
        try:
            for requests in prepared:
                engine.submit(requests)
            unfinished = list(ids)
            while unfinished:
                engine.advance()
                left = [request_id for request_id in unfinished if engine.is_unfinished(request_id)]
                if bar is not None:
                    bar.update(len(unfinished) - len(left))
                unfinished = left
            return [output for request_id in ids for output in engine.take(request_id)]
        finally:
            for request_id in ids:  # after an interrupt or a fault; nothing is left of those that were taken
                engine.take(request_id)
            if bar is not None:
                bar.close()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt, piece by piece, as soon as text is certain. Dropping the iterator aborts the request.

        Raises:
            InvalidRequestError: the request cannot be served (at once), or has `n` above 1.
            RuntimeError: the request ended with `error`, or the engine was closed (while iterating).
        """
        if isinstance(params, SamplingParams) and params.n != 1:
            raise InvalidRequestError("stream gives one output: n must be 1")
        (checked,) = self.engine.prepare(prompt, params)
        return self._pieces(checked.token_ids, params)

    def _pieces(self, token_ids: list[int], params: SamplingParams | None) -> Iterator[str]:
        pieces: deque[str] = deque()
        # Only now, when the reading begins, it gets an id: nobody else can take it meanwhile.
        requests = self.engine.prepare(token_ids, params, lambda token_id, piece: pieces.append(piece))
        request_id = requests[0].parent_id
        try:
            self.engine.submit(requests)
            while True:
                while pieces:
                    if piece := pieces.popleft():
                        yield piece
                if not self.engine.is_unfinished(request_id):
                    break
                self.engine.advance()
        finally:
            outputs = self.engine.take(request_id)
        if not outputs:
            raise EngineClosedError("the engine was closed while its stream was read")
        for output in outputs:
            if output.finish_reason == "error":
                raise RuntimeError(output.error)

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        params: SamplingParams | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, rendered with the checkpoint's own chat template.

        Args:
            messages: dicts with `role` and `content`.

        Raises:
            InvalidRequestError: the model has no chat template, or the messages do not fit it.
        """
        tokenizer = self.engine.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidRequestError("this model has no chat template: it continues texts, so use generate()")
        if not isinstance(messages, Sequence) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            raise InvalidRequestError(
                f"messages must be a list of dicts with 'role' and 'content', got {shown(messages)}"
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise InvalidRequestError(f"the chat template refuses the messages: {error}") from error
        token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written them
        return self._run([self.engine.prepare(token_ids, params)], progress)

    def close(self) -> None:
        """Stop the engine and free its memory; may be called again."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def as_prompts(prompts: Any) -> list[Any]:
    """A list of prompts from one prompt (text, or token ids) or a list of them."""
    if isinstance(prompts, (str, range)) or getattr(prompts, "ndim", None) == 1:
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise InvalidRequestError(f"prompts must be text, token ids, or a list of those, got {shown(prompts)}")
    is_tokens = bool(prompts) and not any(
        isinstance(p, (str, list, tuple, range)) or (hasattr(p, "ndim") and p.ndim) for p in prompts
    )
    return [list(prompts)] if is_tokens else list(prompts)


def progress_bar(total: int) -> Any:
    """A bar that appears after a second."""
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="prompt", delay=1.0, leave=False)
