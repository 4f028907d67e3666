"""What a fault may cost: each is injected on purpose, and ends no more than it must. No path leaks a page."""

import gc
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_tensors, tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minillm import LLM, SamplingParams
from minillm.errors import ContractError, EngineDeadError, OutOfPagesError
from minillm.metrics import Recorder
from minillm.page_manager import PageManager
from minillm.protocols import SampledTokens
from minillm.request import RequestOutput
from minillm.sampler import Sampler
from minillm.scheduler import Scheduler

POISON = 300  # a token whose embedding is NaN
PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17], list(range(20, 60)))
PAGE_SIZE = 4


def greedy(max_tokens: int = 8, **params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that one token turns into NaN."""
    folder = tiny_checkpoint("llama", tmp_path_factory.mktemp("poison"), tokenizer=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    embedding[POISON] = torch.nan
    edit_tensors(folder, model__embed_tokens__weight=embedding)
    return folder


def make(folder: Path, **options: Any) -> LLM:
    settings = {"device": "cpu", "num_pages": 64, "page_size": PAGE_SIZE, "max_batch_tokens": 64, "max_running": 8}
    return LLM(folder, **settings | options)


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with make(folder) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with make(folder) as llm:
        return [output.token_ids for output in llm.generate(list(PROMPTS), greedy())]


def check_books(llm: LLM) -> None:
    """No request is left, no page is in use, and the page manager's own books agree."""
    engine = llm.engine
    assert not engine.has_unfinished()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (0, 0)
    assert engine.page_manager.num_used == 0
    engine.page_manager.check_invariants()
    engine.scheduler.check_invariants()
    assert not any((engine._requests, engine._children, engine._texts, engine._outputs, engine._claimed))


def check_serves(llm: LLM, expected: list[list[int]]) -> None:
    check_books(llm)
    outputs = llm.generate(list(PROMPTS), greedy(), progress=False)
    assert [output.finish_reason for output in outputs] == ["length"] * len(PROMPTS)
    assert [output.token_ids for output in outputs] == expected
    check_books(llm)


def drain(llm: LLM) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while llm.engine.has_unfinished():
        for output in llm.engine.step():
            assert output.request_id not in outputs
            outputs[output.request_id] = output
    return outputs


# --- a fault in one request ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "seed": 3, "top_p": 0.8, "top_k": 20, "min_p": 0.01}])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_nan_ends_one_request(where: str, params: dict[str, Any], llm: LLM) -> None:
    alone = [output.token_ids for output in llm.generate(list(PROMPTS), greedy(**params))]
    bad = [POISON, 30, 31, 32, 33]
    index = {"first": 0, "middle": 1, "last": 3}[where]
    prompts = [*PROMPTS[:index], bad, *PROMPTS[index:]]
    outputs = llm.generate(prompts, greedy(**params, logprobs=2))
    failed = outputs.pop(index)
    assert failed.finish_reason == "error"
    assert "not finite" in (failed.error or "")
    assert failed.token_ids == []
    assert [output.token_ids for output in outputs] == alone
    assert all(output.error is None for output in outputs)
    check_books(llm)


def test_pages_that_held_nan_serve_others(folder: Path, expected: list[list[int]]) -> None:
    """Every slot of every page has held NaN once, also those beyond the last token of whoever comes next."""
    with make(folder, num_pages=24) as llm:
        for length in (96, 95, 93, 90, 50):
            output = llm.generate([POISON] * (length - 1), greedy())[0]
            assert output.finish_reason == "error"
            assert llm.engine.page_manager.num_cached == 0
        pool = llm.engine.runner.kv_pool.tensor[:, :24]
        assert pool.isnan().flatten(2).any(-1).all()
        check_serves(llm, expected)
        for prompt, tokens in zip(PROMPTS, expected, strict=True):  # and alone: other kernels, other shapes
            assert llm.generate(prompt, greedy())[0].token_ids == tokens
            for length in range(1, 9):
                output = llm.generate(prompt[:1] * length, greedy(3))[0]
                assert output.finish_reason == "length", (length, output.error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_pool_full_of_nan_is_as_good_as_one_of_zeros(dtype: str, folder: Path) -> None:
    prompts = [[5 + i] * n for i, n in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33))]
    with make(folder, dtype=dtype, prefix_caching=False, max_batch_tokens=16) as llm:
        clean = [output.token_ids for output in llm.generate(prompts, greedy(12))]
        llm.engine.runner.kv_pool.tensor.fill_(torch.nan)
        assert [output.token_ids for output in llm.generate(prompts, greedy(12))] == clean


@pytest.mark.gpu
def test_a_pool_full_of_nan_on_a_gpu() -> None:
    """FlashInfer's kernels, too, must not let in what lies beyond a request's last token."""
    prompts = [[50 + i] * n for i, n in enumerate((1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 200))]
    for page_size in (1, 16, 64):
        with LLM(device="cuda", page_size=page_size, num_pages=4096 // page_size, prefix_caching=False) as llm:
            clean = [output.token_ids for output in llm.generate(prompts, greedy(12))]
            llm.engine.runner.kv_pool.tensor.fill_(torch.nan)
            assert [output.token_ids for output in llm.generate(prompts, greedy(12))] == clean


@pytest.mark.parametrize("chunk", [64, 8])
def test_nan_never_enters_the_prefix_cache(chunk: int, folder: Path, expected: list[list[int]]) -> None:
    """The tokens before the poisoned one are the same as another prompt's, and were computed beside it."""
    clean = PROMPTS[2]
    with make(folder, max_batch_tokens=chunk) as llm:
        for _ in range(3):
            poisoned = llm.generate([*clean[:30], POISON, *clean[30:]], greedy())[0]
            assert poisoned.finish_reason == "error"
            output = llm.generate(clean, greedy())[0]
            assert output.finish_reason == "length"
            assert output.token_ids == expected[2]
        assert llm.generate(clean, greedy())[0].metrics.num_cached_tokens > 0
        check_serves(llm, expected)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError(), RecursionError("deep"), AssertionError()])
def test_a_callback_that_raises_ends_its_request(error: Exception, llm: LLM, expected: list[list[int]]) -> None:
    seen: list[int] = []

    def on_token(token_id: int, piece: str) -> None:
        seen.append(token_id)
        if len(seen) == 3:
            raise error

    for i, prompt in enumerate(PROMPTS):
        llm.engine.add_request(prompt, greedy(), str(i), on_token if i == 1 else None)
    outputs = drain(llm)
    assert outputs["1"].finish_reason == "error"
    assert type(error).__name__ in (outputs["1"].error or "")
    assert outputs["1"].token_ids == seen == expected[1][:3]
    assert [outputs["0"].token_ids, outputs["2"].token_ids] == [expected[0], expected[2]]
    check_serves(llm, expected)


@pytest.mark.parametrize("leaving", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_callback_that_leaves_ends_its_request_only(
    leaving: BaseException, llm: LLM, expected: list[list[int]]
) -> None:
    def on_token(token_id: int, piece: str) -> None:
        raise leaving

    for i, prompt in enumerate(PROMPTS):
        llm.engine.add_request(prompt, greedy(), str(i), on_token if i == 0 else None)
    with pytest.raises(type(leaving)):
        llm.engine.step()
    outputs = drain(llm)
    assert outputs["0"].finish_reason == "error"
    assert [outputs["1"].token_ids, outputs["2"].token_ids] == expected[1:]
    check_serves(llm, expected)


def test_callbacks_may_add_and_abort_but_not_step(llm: LLM, expected: list[list[int]]) -> None:
    engine, refusals = llm.engine, []

    def on_token(token_id: int, piece: str) -> None:
        engine.abort("victim")
        engine.abort("victim")
        engine.abort("nobody")
        if not refusals:
            engine.add_request(PROMPTS[2], greedy(), "child")
            for call in (engine.step, lambda: llm.generate(PROMPTS[0], greedy())):
                with pytest.raises(RuntimeError, match="step is running") as caught:
                    call()
                refusals.append(caught.value)

    engine.add_request(PROMPTS[0], greedy(), "parent", on_token)
    engine.add_request(PROMPTS[1], greedy(), "victim")
    outputs = drain(llm)
    assert len(refusals) == 2
    assert outputs["victim"].finish_reason == "abort"
    assert outputs["parent"].token_ids == expected[0]
    assert outputs["child"].token_ids == expected[2]
    check_serves(llm, expected)


class BadDecoder:
    """A tokenizer that fails on the n-th call of `decode`."""

    def __init__(self, tokenizer: Any, fails_from: int):
        self.tokenizer, self.fails_from, self.num_calls = tokenizer, fails_from, 0

    def encode(self, text: str, **options: Any) -> Any:
        return self.tokenizer.encode(text, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        self.num_calls += 1
        if self.num_calls >= self.fails_from:
            raise UnicodeError("no such text")
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("fails_from", [1, 2, 3])
@pytest.mark.parametrize("stop", [(), ("never",)])
def test_a_tokenizer_that_cannot_decode(
    fails_from: int, stop: tuple[str, ...], folder: Path, llm: LLM, expected: list[list[int]]
) -> None:
    tokenizer = BadDecoder(llm.engine.tokenizer, fails_from)
    with make(folder, tokenizer=tokenizer) as broken:
        if stop and fails_from == 1:  # the text is begun when the request is admitted
            with pytest.raises(UnicodeError):
                broken.generate(PROMPTS[0], greedy(stop=stop))
        else:
            output = broken.generate(PROMPTS[0], greedy(stop=stop))[0]
            assert (output.finish_reason, output.error) == ("error", "UnicodeError: no such text")
        check_books(broken)
        tokenizer.fails_from = 10**9
        check_serves(broken, expected)


class Grumpy:
    def __init__(self, event: str):
        self.event, self.num_calls = event, 0

    def __getattr__(self, name: str) -> Any:
        if name != self.event:
            raise AttributeError(name)

        def handler(*details: Any) -> None:
            self.num_calls += 1
            raise OSError("no space left")

        return handler


@pytest.mark.parametrize("event", ["on_step", "on_request_added", "on_request_finished"])
def test_an_observer_that_raises_is_dropped(event: str, folder: Path, expected: list[list[int]]) -> None:
    grumpy, recorder = Grumpy(event), Recorder()
    with make(folder, observers=[grumpy, recorder]) as llm:
        with pytest.warns(UserWarning, match=f"{event} raised OSError"):
            outputs = llm.generate(list(PROMPTS), greedy())
        assert [output.token_ids for output in outputs] == expected
        assert grumpy.num_calls == 1
        assert len(recorder.outputs) == len(PROMPTS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_serves(llm, expected)


# --- a fault in a step -----------------------------------------------------------------------------------------------


class Injector:
    """Raises errors from the model's forward pass: `plan(step, tokens)` says which, or None."""

    def __init__(self, llm: LLM, plan: Callable[[int, int], BaseException | None]):
        self.calls: list[int] = []  # tokens of each try
        model = llm.engine.runner.model
        original = model.forward

        def forward(token_ids: torch.Tensor, context: Any) -> torch.Tensor:
            self.calls.append(len(token_ids))
            error = plan(len(self.calls) - 1, len(token_ids))
            if error is not None:
                if len(self.calls) % 2:  # some faults come when half the layers have run
                    original(token_ids, context)
                raise error
            return original(token_ids, context)

        model.forward = forward


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
@pytest.mark.parametrize("num_faults", [1, 2, 3])
def test_out_of_memory_is_tried_again_smaller(
    num_faults: int, error: BaseException, llm: LLM, expected: list[list[int]]
) -> None:
    llm.generate([70] * 20, greedy())
    assert llm.engine.page_manager.num_cached > 0
    recorder = Recorder()
    llm.engine.observers.observers.append(recorder)
    injector = Injector(llm, lambda step, tokens: error if step < num_faults else None)
    outputs = llm.generate(list(PROMPTS), greedy())
    assert [output.token_ids for output in outputs] == expected
    sizes = injector.calls[: num_faults + 1]
    assert all(smaller <= larger // 2 for larger, smaller in pairwise(sizes)), sizes
    assert recorder.steps[0].error is None
    assert recorder.steps[0].num_prefill_tokens == sizes[-1]
    check_serves(llm, expected)


def test_retrying_frees_cached_pages_first(llm: LLM) -> None:
    llm.generate([70] * 20, greedy())
    cached = llm.engine.page_manager.num_cached
    seen = []

    def plan(step: int, tokens: int) -> BaseException | None:
        seen.append(llm.engine.page_manager.num_cached)
        return out_of_memory() if step == 0 else None

    Injector(llm, plan)
    llm.generate(PROMPTS[1], greedy(2))
    assert cached > 0
    assert seen[:2] == [cached, 0]


def test_a_step_that_never_fits_ends_its_own_requests(folder: Path, expected: list[list[int]]) -> None:
    """Memory is enough for 5 tokens. Halved three times, the first step still has 6 of two requests: only these end."""
    with make(folder, max_batch_tokens=64) as llm:
        Injector(llm, lambda step, tokens: out_of_memory() if tokens > 5 else None)
        for i, prompt in enumerate(PROMPTS):
            llm.engine.add_request(prompt, greedy(), str(i))
        outputs = drain(llm)
        reasons = {name: output.finish_reason for name, output in outputs.items()}
        assert reasons == {"0": "error", "1": "error", "2": "length"}
        assert "out of memory" in (outputs["0"].error or "")
        assert outputs["2"].token_ids == expected[2]
        check_books(llm)
        assert llm.generate([1, 2, 3], greedy())[0].finish_reason == "length"


def test_out_of_memory_always(llm: LLM, expected: list[list[int]]) -> None:
    broken = [True]
    injector = Injector(llm, lambda step, tokens: out_of_memory() if broken[0] else None)
    outputs = llm.generate(list(PROMPTS), greedy())
    assert [output.finish_reason for output in outputs] == ["error"] * 3
    assert all("OutOfMemoryError" in (output.error or "") for output in outputs)
    assert len(injector.calls) <= 4 * len(PROMPTS)
    broken[0] = False
    check_serves(llm, expected)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("x"), NotImplementedError(), IndexError("out of range")]
)
@pytest.mark.parametrize("step", [0, 3])
def test_a_step_that_fails_ends_its_requests(error: Exception, step: int, llm: LLM, expected: list[list[int]]) -> None:
    recorder = Recorder()
    llm.engine.observers.observers.append(recorder)
    Injector(llm, lambda number, tokens: error if number == step else None)
    outputs = llm.generate(list(PROMPTS), greedy())
    for output, tokens in zip(outputs, expected, strict=True):
        assert output.finish_reason == "error"
        assert type(error).__name__ in (output.error or "")
        assert output.token_ids == tokens[:step]
    assert type(error).__name__ in (recorder.steps[step].error or "")
    assert sorted(recorder.steps[step].finished) == sorted(output.request_id for output in outputs)
    check_serves(llm, expected)


def test_requests_that_were_not_in_the_step_live_on(folder: Path, expected: list[list[int]]) -> None:
    with make(folder, max_running=2) as llm:
        Injector(llm, lambda step, tokens: RuntimeError("once") if step == 0 else None)
        outputs = llm.generate(list(PROMPTS), greedy())
        assert [output.finish_reason for output in outputs] == ["error", "error", "length"]
        assert outputs[2].token_ids == expected[2]
        check_serves(llm, expected)


def test_a_stream_whose_step_fails_says_so(llm: LLM, expected: list[list[int]]) -> None:
    Injector(llm, lambda step, tokens: RuntimeError("once") if step == 2 else None)
    with pytest.raises(RuntimeError, match="once"):
        list(llm.stream("abc", greedy()))
    check_serves(llm, expected)


# --- a fault of the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
)
@pytest.mark.parametrize("step", [0, 2])
def test_a_fault_of_the_device_ends_the_engine(fault: Exception, step: int, folder: Path) -> None:
    recorder = Recorder()
    llm = make(folder, max_running=2, observers=[recorder])
    engine = llm.engine
    Injector(llm, lambda number, tokens: fault if number == step else None)
    pool = weakref.ref(engine.runner.kv_pool.tensor)
    for i, prompt in enumerate(PROMPTS):  # the third still waits
        engine.add_request(prompt, greedy(), str(i))
    outputs = drain(llm)
    assert sorted(outputs) == ["0", "1", "2"]
    for output in outputs.values():
        assert output.finish_reason == "error"
        assert "CUDA error" in (output.error or "")
    assert len(recorder.outputs) == 3
    assert "CUDA error" in (recorder.steps[-1].error or "")
    calls = (
        engine.step,
        lambda: engine.add_request([1]),
        lambda: llm.generate([1]),
        lambda: llm.stream([1]),
        lambda: llm.generate("text"),
    )
    for call in calls:
        with pytest.raises(EngineDeadError, match="CUDA error") as caught:
            call()
        assert caught.value.__cause__ is fault
    engine.abort("0")
    assert not engine.has_unfinished()
    fault.__traceback__ = None  # it holds the frames of the step, and they the pool
    gc.collect()
    assert pool() is None
    llm.close()
    llm.close()


def test_generate_returns_what_a_dying_engine_leaves(folder: Path, expected: list[list[int]]) -> None:
    with make(folder) as llm:
        stream = llm.stream("abc", greedy(32))
        first = next(stream)
        Injector(llm, lambda number, tokens: RuntimeError("CUDA error: unknown error") if number == 4 else None)
        outputs = llm.generate(list(PROMPTS), greedy())
        assert [output.finish_reason for output in outputs] == ["error"] * 3
        assert [output.token_ids for output in outputs] == [tokens[:4] for tokens in expected]
        assert first
        with pytest.raises(RuntimeError, match="CUDA error"):
            list(stream)
        with pytest.raises(EngineDeadError):
            llm.generate("abc")


# --- parts that break their contract ---------------------------------------------------------------------------------


class NeverFits(PageManager):
    def extend(self, request_id: str, num_tokens: int) -> None:
        raise OutOfPagesError("none")


class HitsTooMuch(PageManager):
    def allocate(self, request_id: str, token_ids: Any) -> int:
        super().allocate(request_id, token_ids)
        return len(token_ids)


class OutOfThePool(PageManager):
    def batch_arrays(self, chunks: Any) -> Any:
        arrays = super().batch_arrays(chunks)
        arrays.kv_indices[:] = self.num_pages
        return arrays


class SamePageForAll(PageManager):
    def batch_arrays(self, chunks: Any) -> Any:
        arrays = super().batch_arrays(chunks)
        arrays.kv_indices[:] = 0
        return arrays


class AllocateRaises(PageManager):
    def allocate(self, request_id: str, token_ids: Any) -> int:
        raise LookupError("my bug")


class FreeRaises(PageManager):
    def free(self, request_id: str) -> None:
        raise LookupError("my bug")


class CommitRaises(PageManager):
    def commit(self, request_id: str, token_ids: Any, num_computed: int) -> None:
        raise LookupError("my bug")


class IdleScheduler(Scheduler):
    def schedule(self, max_tokens: int | None = None) -> Any:
        plan = super().schedule(max_tokens)
        return type(plan)((), (), 0, 0)


class NoPlan(Scheduler):
    def schedule(self, max_tokens: int | None = None) -> Any:
        return None


class Necromancer(Scheduler):
    """Plans requests that have ended."""

    def finish(self, request: Any) -> None:
        pass


class ScheduleRaises(Scheduler):
    def schedule(self, max_tokens: int | None = None) -> Any:
        raise LookupError("my bug")


class CompleteRaises(Scheduler):
    def complete(self, plan: Any) -> None:
        raise LookupError("my bug")


class FinishRaises(Scheduler):
    def finish(self, request: Any) -> None:
        raise LookupError("my bug")


class TooFewTokens(Sampler):
    def sample(self, logits: torch.Tensor, requests: Any) -> SampledTokens:
        return SampledTokens([1], [True], [None])


class OutsideTheVocabulary(Sampler):
    def sample(self, logits: torch.Tensor, requests: Any) -> SampledTokens:
        n = len(requests)
        return SampledTokens([self.vocab_size] * n, [True] * n, [None] * n)


class FloatTokens(Sampler):
    def sample(self, logits: torch.Tensor, requests: Any) -> Any:
        n = len(requests)
        return SampledTokens([1.5] * n, [True] * n, [None] * n)  # type: ignore[list-item]


class NoSample(Sampler):
    def sample(self, logits: torch.Tensor, requests: Any) -> Any:
        return None


PARTS: dict[str, tuple[dict[str, Any], str, str]] = {  # the part, who is named, the rule
    "never fits": ({"page_manager": NeverFits}, "PageManager", "fits"),
    "hits too much": ({"page_manager": HitsTooMuch}, "PageManager", "page size|last token"),
    "outside the pool": ({"page_manager": OutOfThePool}, "PageManager", "pages of the pool"),
    "one page for all": ({"page_manager": SamePageForAll}, "PageManager", "one page table only"),
    "allocate raises": ({"page_manager": AllocateRaises}, "page manager", "LookupError: .*my bug"),
    "free raises": ({"page_manager": FreeRaises}, "page manager", "LookupError: .*my bug"),
    "commit raises": ({"page_manager": CommitRaises}, "page manager", "LookupError: .*my bug"),
    "plans nothing": ({"scheduler": IdleScheduler}, "Scheduler", "computes something"),
    "no plan": ({"scheduler": NoPlan}, "Scheduler", "computes something"),
    "plans the dead": ({"scheduler": Necromancer}, "Scheduler", "only unfinished"),
    "schedule raises": ({"scheduler": ScheduleRaises}, "scheduler", "LookupError: .*my bug"),
    "complete raises": ({"scheduler": CompleteRaises}, "scheduler", "LookupError: .*my bug"),
    "finish raises": ({"scheduler": FinishRaises}, "scheduler", "LookupError: .*my bug"),
    "too few tokens": ({"sampler": TooFewTokens}, "Sampler", "one token for each row"),
    "outside the vocabulary": ({"sampler": OutsideTheVocabulary}, "Sampler", "of the vocabulary"),
    "tokens that are floats": ({"sampler": FloatTokens}, "sampler", "TypeError"),
    "no sample": ({"sampler": NoSample}, "sampler", "AttributeError"),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_that_breaks_a_rule(case: str, folder: Path) -> None:
    parts, part, rule = PARTS[case]
    recorder = Recorder()
    llm = make(folder, observers=[recorder], **parts)
    for i, prompt in enumerate(PROMPTS):
        llm.engine.add_request(prompt, greedy(2 + i), str(i))
    with pytest.raises(ContractError, match=rule) as caught:
        drain(llm)
    assert part in caught.value.part
    assert caught.value.rule in str(caught.value)
    if "LookupError" in rule:
        assert type(caught.value.__cause__) is LookupError
    outputs = llm.engine.step()  # what ended with it is still delivered
    assert {output.request_id for output in recorder.outputs} == {"0", "1", "2"}
    assert {output.request_id for output in outputs} <= {"0", "1", "2"}
    assert any(output.finish_reason == "error" for output in recorder.outputs)
    with pytest.raises(EngineDeadError):
        llm.engine.step()
    with pytest.raises(EngineDeadError):
        llm.generate([1])
    assert not llm.engine.has_unfinished()


def test_a_contract_error_comes_out_of_generate_and_stream(folder: Path) -> None:
    for call in (lambda llm: llm.generate(list(PROMPTS)), lambda llm: list(llm.stream("abc"))):
        with make(folder, sampler=OutsideTheVocabulary) as llm, pytest.raises(ContractError, match="vocabulary"):
            call(llm)


@pytest.mark.parametrize("method", ["abort", "close of a stream"])
def test_a_part_that_fails_while_aborting(method: str, folder: Path) -> None:
    llm = make(folder, scheduler=FinishRaises)
    if method == "abort":
        llm.engine.add_request(PROMPTS[0], request_id="a")
        llm.engine.add_request(PROMPTS[1], request_id="b")
        with pytest.raises(ContractError, match="my bug"):
            llm.engine.abort("a")
        assert {output.request_id: output.finish_reason for output in llm.engine.step()} == {"a": "abort", "b": "error"}
    else:
        stream = llm.stream("abc", greedy())
        next(stream)
        with pytest.raises(ContractError, match="my bug"):
            stream.close()
    with pytest.raises(EngineDeadError):
        llm.engine.step()


def test_a_sampler_that_raises_costs_the_step(folder: Path) -> None:
    class SampleRaises(Sampler):
        def sample(self, logits: torch.Tensor, requests: Any) -> SampledTokens:
            if any(request.token_ids[0] == 5 for request in requests):
                raise LookupError("my bug")
            return super().sample(logits, requests)

    with make(folder, sampler=SampleRaises) as llm:
        assert "my bug" in (llm.generate(PROMPTS[0])[0].error or "")
        assert llm.generate(PROMPTS[1], greedy())[0].finish_reason == "length"
        check_books(llm)


# --- interrupts, exceptions, abandoned streams -----------------------------------------------------------------------


def interrupt_later(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.parametrize("how", ["callback", "timer"])
def test_an_interrupt_of_generate(how: str, llm: LLM, expected: list[list[int]]) -> None:
    engine = llm.engine
    engine.add_request(PROMPTS[0], greedy(), "mine")
    if how == "callback":
        engine.add_request(PROMPTS[1], greedy(), "trigger", lambda *_: signal.raise_signal(signal.SIGINT))
    else:
        interrupt_later(0.05)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            llm.generate([[9] * 20] * 6, greedy(200), progress=False)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        try:
            outputs |= {output.request_id: output for output in engine.step()}
        except KeyboardInterrupt:  # the trigger's later tokens
            assert how == "callback"
    assert outputs["mine"].finish_reason == "length"
    assert outputs["mine"].token_ids == expected[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_serves(llm, expected)


def test_an_interrupt_of_a_stream(llm: LLM, expected: list[list[int]]) -> None:
    interrupt_later(0.05)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            for _ in llm.stream("abc", greedy(200)):
                pass
    check_serves(llm, expected)


def test_an_interrupt_waits_for_the_end_of_the_step(llm: LLM) -> None:
    """It arrives in the middle of the forward pass; the step's tokens are delivered all the same."""
    Injector(llm, lambda step, tokens: signal.raise_signal(signal.SIGINT) if step == 1 else None)
    tokens: list[int] = []
    llm.engine.add_request(PROMPTS[0], greedy(), "a", lambda token_id, piece: tokens.append(token_id))
    llm.engine.step()
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    assert len(tokens) == 2
    assert drain(llm)["a"].finish_reason == "length"
    check_books(llm)


def test_an_own_signal_handler_is_kept(llm: LLM) -> None:
    arrived: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        Injector(llm, lambda step, tokens: signal.raise_signal(signal.SIGINT) if step == 1 else None)
        assert llm.generate(PROMPTS[0], greedy())[0].finish_reason == "length"
        assert arrived == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)


def test_an_abandoned_stream_is_aborted(folder: Path, expected: list[list[int]]) -> None:
    recorder = Recorder()
    with make(folder, observers=[recorder]) as llm:
        llm.stream("never begun", greedy())
        check_books(llm)
        stream = llm.stream("abc", greedy(100))
        next(stream)
        assert llm.engine.page_manager.num_used > 0
        del stream
        assert [output.finish_reason for output in recorder.outputs] == ["abort"]
        check_serves(llm, expected)
        for i, _ in enumerate(llm.stream("abc", greedy(100))):
            if i == 3:
                break
        check_serves(llm, expected)


def test_an_exception_among_the_pieces_aborts(llm: LLM, expected: list[list[int]]) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in llm.stream("abc", greedy(100)):
            1 // 0  # noqa: B018
    gc.collect()
    check_serves(llm, expected)


def test_calls_interleave(llm: LLM, expected: list[list[int]]) -> None:
    whole = "".join(llm.stream("abc", greedy(30)))
    engine = llm.engine
    engine.add_request(PROMPTS[1], greedy(), "own")
    stream = llm.stream("abc", greedy(30))
    pieces = [next(stream)]
    assert [output.token_ids for output in llm.generate(list(PROMPTS), greedy())] == expected
    pieces.append(next(stream))
    other = llm.stream("abc", greedy(30))
    next(other)
    outputs = engine.step()
    assert [output.token_ids for output in outputs if output.request_id == "own"] == [expected[1]]
    assert "".join([*pieces, *stream]) == whole
    other.close()
    check_serves(llm, expected)


# --- life and death --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["idle", "after generate", "half a stream", "unfinished", "after a fault", "closed"])
def test_an_engine_is_freed_without_the_collector(use: str, folder: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        llm = make(folder, observers=[Recorder()])
        refs = [weakref.ref(x) for x in (llm, llm.engine, llm.engine.runner, llm.engine.runner.model)]
        refs.append(weakref.ref(llm.engine.runner.kv_pool.tensor))
        refs.append(weakref.ref(llm.engine.page_manager))
        if use == "after generate":
            llm.generate(list(PROMPTS), greedy())
        elif use == "half a stream":
            stream = llm.stream("abc", greedy())
            next(stream)
            stream.close()
            del stream
        elif use == "unfinished":
            llm.engine.add_request(PROMPTS[0], greedy(), on_token=print)
            llm.engine.step()
        elif use == "after a fault":

            class Faulty:
                def add(self, *args: Any) -> torch.Tensor:
                    raise RuntimeError("once")

            llm.engine.runner.model.norm = Faulty()
            assert llm.generate(PROMPTS[0])[0].finish_reason == "error"
        elif use == "closed":
            llm.close()
            llm.close()
        del llm
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


def test_rebinding_a_name_frees_the_old_engine(folder: Path) -> None:
    gc.disable()
    try:
        llm = make(folder)
        pool = weakref.ref(llm.engine.runner.kv_pool.tensor)
        llm = make(folder)
        assert pool() is None
        assert llm.generate(PROMPTS[0], greedy())[0].finish_reason == "length"
    finally:
        gc.enable()


def test_closing_forgets_what_is_undelivered(folder: Path) -> None:
    llm = make(folder)
    llm.engine.add_request(PROMPTS[0], greedy(1))
    llm.engine.add_request(PROMPTS[1], greedy(9))
    with llm:
        llm.engine.advance()
        assert llm.engine.has_unfinished()
    assert not llm.engine.has_unfinished()


# --- all of it at random ---------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[], BaseException]] = {
    "memory": out_of_memory,
    "step": lambda: RuntimeError("a bug"),
    "host memory": MemoryError,
}


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LLM]:
    with make(folder, num_pages=16, max_running=3, max_batch_tokens=12) as llm:
        yield llm


@settings(max_examples=60)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(3, 9), min_size=1, max_size=24),
            st.booleans(),  # poisoned
            st.sampled_from(["", "raises", "aborts", "n"]),
            st.integers(1, 12),
        ),
        min_size=1,
        max_size=7,
    ),
    faults=st.dictionaries(st.integers(0, 20), st.sampled_from(sorted(FAULTS)), max_size=4),
    aborts=st.dictionaries(st.integers(0, 20), st.integers(0, 6), max_size=3),
)
def test_no_path_leaks_a_page(
    shared: LLM,
    requests: list[tuple[list[int], bool, str, int]],
    faults: dict[int, str],
    aborts: dict[int, int],
) -> None:
    engine = shared.engine
    model = engine.runner.model
    Injector(shared, lambda call, tokens: FAULTS[faults[call]]() if call in faults else None)

    def raises(token_id: int, piece: str) -> None:
        raise ValueError("mine")

    try:
        expected: dict[str, int] = {}
        for i, (tokens, is_poisoned, kind, max_tokens) in enumerate(requests):
            prompt = [*tokens[:-1], POISON] if is_poisoned else tokens
            aborted = f"r{(i + 1) % len(requests)}"
            callback = {"raises": raises, "aborts": lambda *_, aborted=aborted: engine.abort(aborted)}.get(kind)
            expected[f"r{i}"] = 2 if kind == "n" else 1
            engine.add_request(prompt, greedy(max_tokens, n=expected[f"r{i}"]), f"r{i}", callback)
        counts = dict.fromkeys(expected, 0)
        step = 0
        while engine.has_unfinished():
            for output in engine.step():
                counts[output.request_id] += 1
                assert output.finish_reason in ("stop", "length", "abort", "error")
                assert (output.error is not None) == (output.finish_reason == "error")
            engine.page_manager.check_invariants()
            engine.scheduler.check_invariants()
            if step in aborts:
                engine.abort(f"r{aborts[step]}")
            step += 1
            assert step < 1000
        assert counts == expected
        check_books(shared)
    finally:
        del model.forward
    output = shared.generate([5, 6, 7], greedy(4))[0]
    assert output.finish_reason == "length"
