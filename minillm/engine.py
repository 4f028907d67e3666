"""LLMEngine: requests in, tokens out. It owns everything below it, and decides what a fault may cost.

The boundaries, from the inside out: a bad request is refused before it costs anything; a fault in one request ends
that request; a fault in a step ends the requests of that step; a fault of the device, of a worker, or of the engine's
own books ends every request, and the engine with them. Whatever happens, every request ends with a reason, and no
page is lost.
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import index
from os import PathLike
from typing import Any, NoReturn

from minillm.config import EngineConfig, ModelConfig
from minillm.detokenizer import OutputText
from minillm.devices import resolve
from minillm.distributed import DistributedManager
from minillm.errors import ContractError, EngineClosedError, EngineDeadError
from minillm.faults import is_device_fault, is_out_of_memory
from minillm.intake import Intake
from minillm.interrupts import deferred_interrupts
from minillm.loader import ModelLoader, load_tokenizer
from minillm.memory import pool_size
from minillm.metrics import Observers
from minillm.page_manager import PageManager
from minillm.protocols import StepPlan
from minillm.request import FinishReason, Request, RequestOutput
from minillm.runner import ModelRunner, StepResult
from minillm.sampler import Sampler
from minillm.sampling_params import SamplingParams
from minillm.scheduler import Scheduler
from minillm.startup import check_factories, check_model, check_options, make_part

MAX_RETRIES = 3  # of a step that ran out of memory, each with half the tokens
OTHER_OPTIONS = ("tokenizer", "weights", "observers", "page_manager", "scheduler", "sampler")


class LLMEngine:
    """Serves requests step by step.

    Args:
        model: a checkpoint folder, a name on the Hugging Face hub, or a `ModelConfig` (with `weights="random"`); None
            is the bundled story model.
        tokenizer: `"auto"` is the checkpoint's own; None serves token ids only; or anything with `encode` and `decode`.
        weights: `"checkpoint"`, or `"random"`.
        observers: told of every step and request; see `minillm.metrics.Observer`.
        page_manager, scheduler, sampler: classes (or factories) to run instead of the library's own; see
            `PageManagerProtocol`, `SchedulerProtocol` and `SamplerProtocol` for what they must do.
        **options: the fields of `EngineConfig`.

    Raises:
        TypeError: an option that does not exist; the message names the nearest.
        ConfigError: an option has a wrong value, or the model does not fit.
        CheckpointError: the checkpoint is missing, broken or not supported.
        KernelsUnavailableError: FlashInfer is asked for where it cannot run.
    """

    def __init__(
        self,
        model: str | PathLike[str] | ModelConfig | None = None,
        *,
        tokenizer: Any = "auto",
        weights: str = "checkpoint",
        observers: Sequence[Any] = (),
        page_manager: Callable[..., Any] = PageManager,
        scheduler: Callable[..., Any] = Scheduler,
        sampler: Callable[..., Any] = Sampler,
        **options: Any,
    ):
        self._is_closed = True  # until everything below exists
        config = EngineConfig.from_options(OTHER_OPTIONS, **options)
        check_options(model, weights, tokenizer, observers)
        check_factories(page_manager=page_manager, scheduler=scheduler, sampler=sampler)
        loader = ModelLoader(model)
        if isinstance(tokenizer, str):
            tokenizer = loader.load_tokenizer() if tokenizer == "auto" else load_tokenizer(tokenizer)
        self.model_config, self.tokenizer = loader.config, tokenizer
        config = resolve(config, loader.config)
        is_random = weights == "random"
        check_model(loader, config, is_random)
        self.distributed = distributed = DistributedManager(loader, config, is_random)
        try:
            self.runner: Any = ModelRunner(loader, config, distributed.group, distributed.announce, is_random)
            memory = self.runner.warm_up()
            num_pages, max_model_len = pool_size(config, loader.config, self.runner.bytes_per_page, memory)
            self.config = config = replace(config, num_pages=num_pages, max_model_len=max_model_len)
            self.runner.make_pool(num_pages)
            pages = (num_pages, config.page_size, config.prefix_caching)
            self.page_manager = make_part("PageManager", page_manager, *pages)
            limits = {"max_running": config.max_running, "max_batch_tokens": config.max_batch_tokens}
            self.scheduler = make_part("Scheduler", scheduler, self.page_manager, **limits)
            self.sampler = make_part("Sampler", sampler, loader.config.vocab_size)
        except BaseException:
            self.distributed.close()
            raise
        self.memory = replace(memory, kv_bytes=self.runner.kv_pool.num_bytes)
        self.observers = Observers(observers)
        self.intake = Intake(tokenizer, loader.config, config)
        self._requests: dict[str, Request] = {}  # unfinished, by internal id
        self._children: dict[str, list[str]] = {}  # internal ids of the unfinished samples of each caller's id
        self._texts: dict[str, OutputText] = {}  # of requests whose text is wanted as it grows
        self._outputs: dict[str, list[RequestOutput]] = {}  # ended, not delivered yet, by the caller's id
        self._claimed: set[str] = set()  # ids whose outputs `take` will fetch, not `step`
        self._num_steps, self._is_stepping = 0, False
        self._finished_in_step: list[str] = []
        self._fault: BaseException | None = None
        self._is_closed = False

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        on_token: Callable[[int, str], None] | None = None,
    ) -> str:
        """Queue a prompt; returns the id under which its outputs will come.

        Args:
            prompt: text, or token ids.
            params: how to sample; the defaults of `SamplingParams` if None.
            request_id: an id that is not in use; made up if None.
            on_token: called with each new token id and the text it makes certain (maybe none yet, maybe more than its
                own). If it raises, the request ends with `error`.

        Raises:
            InvalidRequestError: the prompt or a parameter cannot be served.
        """
        self._check_usable()
        return self._admit(self.prepare(prompt, params, on_token, request_id))

    def abort(self, request_id: str) -> None:
        """End a request with `abort`; its output is delivered by the next step. Unknown and ended ids are ignored."""
        for child in list(self._children.get(request_id, ())):
            try:
                self._end(self._requests[child], "abort")
            except Exception as error:
                self._blame("scheduler or page manager", error)

    def has_unfinished(self) -> bool:
        """Whether there is work to do or an output that `step` has not delivered."""
        return bool(self._requests) or any(request_id not in self._claimed for request_id in self._outputs)

    def step(self) -> list[RequestOutput]:
        """Run one step; returns every request that has ended since the last call, each sample exactly once.

        Raises:
            EngineClosedError, EngineDeadError: the engine cannot run any more.
            ContractError: a swapped-in part broke a rule; every request has ended with `error`.
        """
        if self._fault is None or not self.has_unfinished():
            self._check_usable()
        if self._requests:
            self.advance()
        mine = [request_id for request_id in self._outputs if request_id not in self._claimed]
        return [output for request_id in mine for output in self._outputs.pop(request_id)]

    def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        on_token: Callable[[int, str], None] | None = None,
        request_id: str | None = None,
    ) -> list[Request]:
        """The requests (one for each sample) that a prompt makes, checked but not admitted; see `add_request`."""
        self._check_usable()
        taken = ChainMap[str, Any](self._requests, self._children, self._outputs)
        return self.intake.requests(self.intake.encode(prompt), params, request_id, on_token, taken)

    def submit(self, requests: list[Request]) -> str:
        """Queue prepared requests; their outputs are kept for `take`."""
        self._check_usable()
        self._claimed.add(requests[0].parent_id)
        return self._admit(requests)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether any sample of a submitted request is still running."""
        return request_id in self._children

    def take(self, request_id: str) -> list[RequestOutput]:
        """The outputs of a submitted request, in order of sample; aborts what is unfinished, and forgets it."""
        try:
            self.abort(request_id)
        finally:
            self._claimed.discard(request_id)
            outputs = self._outputs.pop(request_id, [])
        return sorted(outputs, key=lambda output: output.sample_index)

    def advance(self) -> None:
        """Run one step and keep what it gives. An interrupt that arrives meanwhile is raised after it."""
        self._check_usable()
        if self._is_stepping:
            raise RuntimeError("a step is running: callbacks and other threads may not start another one")
        self._is_stepping = True
        try:
            with deferred_interrupts():
                self._advance()
        finally:
            self._is_stepping = False

    def _advance(self) -> None:
        self._finished_in_step = []
        started = time.perf_counter()
        plan = self._schedule()
        scheduled = time.perf_counter()
        result, fault = self._run(plan)
        ran = time.perf_counter()
        if result is not None:
            plan = result.plan
            try:
                self.scheduler.complete(plan)
                self._take_tokens(result)
            except Exception as error:
                self._blame("scheduler, page manager or sampler", error)
        if self.observers:
            books = (self.scheduler, self.page_manager, self._finished_in_step)
            self.observers.tell_step(self._num_steps, plan, result, (started, scheduled, ran), *books, fault)
        self._num_steps += 1

    def _run(self, plan: StepPlan) -> tuple[StepResult | None, str | None]:
        """Run the plan, smaller and smaller if memory runs out; if it fails, its requests end with `error`."""
        num_retries = 0
        while True:
            try:
                return self.runner.step(plan, self.page_manager, self.sampler), None
            except ContractError as error:
                self._die(error)
                raise
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                # With several ranks, a fault of one leaves the others waiting in a sum.
                if is_device_fault(error) or self.config.tensor_parallel_size > 1:
                    self._die(error)
                    return None, fault
                smaller = None
                if is_out_of_memory(error) and num_retries < MAX_RETRIES and plan.num_tokens > 1:
                    smaller = self._schedule(plan.num_tokens // 2)
            if not smaller:
                for request in plan.requests:
                    self._end(request, "error", f"the step failed with {fault}")
                return None, fault
            plan, num_retries = smaller, num_retries + 1

    def _take_tokens(self, result: StepResult) -> None:
        sampled, now = result.sampled, time.perf_counter()
        if len(sampled.token_ids) != len(result.requests):
            raise ContractError("Sampler", "one token for each row of the logits")
        for request in result.plan.requests:
            if request.first_scheduled_time is None:
                request.first_scheduled_time = result.started
        is_clean, leaving = True, None
        rows = zip(result.requests, sampled.token_ids, sampled.is_valid, sampled.logprobs, strict=True)
        for request, token_id, is_valid, logprobs in rows:
            if request.request_id not in self._requests:
                continue  # a callback of another request has aborted it just now
            if not is_valid:
                self._end(request, "error", "the model's logits are not finite numbers")
                is_clean = False
                continue
            token_id = index(token_id)  # of whatever type the sampler has integers
            if not 0 <= token_id < self.model_config.vocab_size:
                raise ContractError("Sampler", f"token ids are of the vocabulary, got {token_id}", request.request_id)
            request.token_ids.append(token_id)
            if request.first_token_time is None:
                request.first_token_time = now
            if logprobs is not None:
                request.logprobs.append(logprobs)
            reason = request.stop_reason()
            text = self._texts.get(request.request_id)
            if text is None and request.on_token is None:
                if reason is not None:
                    self._end(request, reason)
                continue
            try:
                self._show(request, text, token_id, reason)
            except BaseException as error:  # a callback may even want to leave: when the others have their tokens
                self._end(request, "error", f"{type(error).__name__}: {error}")
                leaving = leaving if isinstance(error, Exception) else error
        if not is_clean:  # cached K/V may be NaN, too, of which others with the same prefix would die
            self.page_manager.evict()
        if leaving is not None:
            raise leaving

    def _show(self, request: Request, text: OutputText | None, token_id: int, reason: FinishReason | None) -> None:
        """Grow the text of a request by a token, look for its stop strings, and tell the caller."""
        piece = ""
        if text is not None:
            piece = text.push([token_id], may_stop=request.num_output >= request.params.min_tokens)
            if text.is_stopped:
                reason = "stop"
            if reason is not None:
                piece += text.finish()
        if request.on_token is not None:
            request.on_token(token_id, piece)
        if reason is not None:
            self._end(request, reason)

    def _admit(self, requests: list[Request]) -> str:
        parent_id = requests[0].parent_id
        self._requests |= {request.request_id: request for request in requests}
        self._children[parent_id] = [request.request_id for request in requests]
        try:
            for request in requests:
                if self.tokenizer is not None and (request.on_token is not None or request.params.stop):
                    self._texts[request.request_id] = OutputText(self.tokenizer, request.token_ids, request.params.stop)
                self.scheduler.add(request)
                self.observers.tell("on_request_added", request.request_id, request.num_prompt)
        except BaseException:
            self.take(parent_id)
            raise
        return parent_id

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """A request ends, once: its pages go back, its output waits to be delivered."""
        if self._requests.pop(request.request_id, None) is None:
            return
        text = self._texts.pop(request.request_id, None)
        try:
            if text is None and self.tokenizer is not None:
                text = OutputText(self.tokenizer, request.token_ids[: request.num_prompt], ())
                text.push(request.output_token_ids)
            if text is not None:
                text.finish()
        except Exception as fault:  # a tokenizer that cannot decode what the model says
            reason, error = "error", error or f"{type(fault).__name__}: {fault}"
        request.finish_reason, request.error = reason, error
        output = request.output("" if text is None else text.text)
        siblings = self._children[request.parent_id]
        siblings.remove(request.request_id)
        if not siblings:
            del self._children[request.parent_id]
        self._outputs.setdefault(request.parent_id, []).append(output)
        self._finished_in_step.append(request.request_id)
        try:
            if self._fault is None:  # after a fault the books cannot be trusted, nor are they needed
                self.scheduler.finish(request)
        finally:
            self.observers.tell("on_request_finished", output)

    def _schedule(self, max_tokens: int | None = None) -> StepPlan:
        """The next step's plan; with `max_tokens`, a smaller one for which cached pages have been freed."""
        try:
            if max_tokens is not None:
                self.page_manager.evict()
            plan = self.scheduler.schedule(max_tokens)
            if not plan:
                raise ContractError("Scheduler", "while requests are unfinished, a step computes something")
            if any(request.request_id not in self._requests for request in plan.requests):
                raise ContractError("Scheduler", "only unfinished requests are planned")
            return plan
        except Exception as error:
            self._blame("scheduler or page manager", error)

    def _blame(self, part: str, error: Exception) -> NoReturn:
        """Die of a part that has left the engine's books undone."""
        self._die(error)
        if isinstance(error, ContractError):
            raise error
        raise ContractError(part, f"does not raise, but it raised {type(error).__name__}: {error}") from error

    def _die(self, fault: BaseException) -> None:
        """End every request with `error` and free everything; from now on the engine only delivers outputs."""
        self._fault = fault
        for request in list(self._requests.values()):
            self._end(request, "error", f"the engine failed with {type(fault).__name__}: {fault}")
        self._free()

    def _free(self) -> None:
        self.distributed.close()
        self.runner = self.page_manager = self.scheduler = self.sampler = None

    def _check_usable(self) -> None:
        if self._is_closed:
            raise EngineClosedError("this engine is closed; make a new one")
        if self._fault is not None:
            raise EngineDeadError(
                f"the engine failed with {type(self._fault).__name__}: {self._fault}"
            ) from self._fault

    def close(self) -> None:
        """Abort what is running, stop the workers, free the memory. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            for held in (self._requests, self._children, self._texts, self._outputs):
                held.clear()
            self._free()

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True):
            self.close()
