"""The engine against transformers: the same logits, the same greedy tokens, however the work is cut up.

Prompts are chosen by their margin: at every greedy step the best token leads by more than rounding could hide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm import LLM, LLMEngine, SamplingParams
from minillm.context import Chunk
from minillm.loader import BUNDLED_MODEL
from minillm.metrics import Recorder
from minillm.page_manager import PageManager
from minillm.request import Request

MARGIN = 1e-3  # of logits; rounding in float32 moves them by 1e-5
NUM_NEW = 12
LENGTHS = (1, 2, 3, 7, 16, 17, 40, 90)  # of prompts: ragged, around the page sizes, beyond RoPE's original context

LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GQA_1 = {"num_attention_heads": 4, "num_key_value_heads": 4}
GQA_7 = {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56, "head_dim": 8}
WIDE_HEADS = {"head_dim": 32, "hidden_size": 48}  # 4 heads of 32 are not 48
SMALL = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 80}

# Each family with each kind of bias it may have, tied and untied, each GQA ratio, each RoPE, each stored dtype.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased-linear": (
        "llama",
        {
            **WIDE_HEADS,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LINEAR,
        },
    ),
    "llama-gqa7-llama3-bf16": ("llama", {**GQA_7, "rope_parameters": LLAMA3, "dtype": "bfloat16"}),
    "llama-gqa1-yarn": ("llama", {**GQA_1, "rope_parameters": YARN, "mlp_bias": True}),
    "mistral-wide-fp16": ("mistral", {**WIDE_HEADS, "dtype": "float16"}),
    "mistral-tied-gqa7-yarn": ("mistral", {**GQA_7, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "qwen2-tied-gqa7-linear-bf16": (
        "qwen2",
        {**GQA_7, "tie_word_embeddings": True, "rope_parameters": LINEAR, "dtype": "bfloat16"},
    ),
    "qwen3-tied-wide": ("qwen3", {**WIDE_HEADS, "tie_word_embeddings": True}),
    "qwen3-biased-gqa1-llama3": ("qwen3", {**GQA_1, "attention_bias": True, "rope_parameters": LLAMA3}),
}
FAMILIES = ("llama", "mistral-wide-fp16", "qwen2", "qwen3-tied-wide")


@dataclass
class Expected:
    """What transformers says of one checkpoint, in float32."""

    folder: Path
    vocab_size: int
    model: Any
    prompts: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([token_ids])).logits[0]

    def greedy(self, prompt: list[int], num_new: int) -> tuple[list[int], float]:
        """transformers' greedy tokens, and the smallest lead of any of them."""
        ids = torch.tensor([prompt])
        given = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(
            ids,
            do_sample=False,
            max_new_tokens=num_new,
            output_logits=True,
            return_dict_in_generate=True,
            **given,
        )
        best = torch.cat(out.logits).topk(2).values
        return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())

    def add(self, prompts: list[list[int]], num_new: int = NUM_NEW) -> None:
        for prompt in prompts:
            tokens, margin = self.greedy(prompt, num_new)
            if margin > MARGIN:
                self.prompts.append(prompt)
                self.tokens.append(tokens)


def load(folder: Path) -> Expected:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Expected(folder, model.config.vocab_size, model)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def build(name: str) -> Expected:
        family, config = MODELS[name]
        folder = tiny_checkpoint(family, tmp_path_factory.mktemp(name), seed=len(name), **(SMALL | config))
        expected = load(folder)
        rng = np.random.default_rng(0)
        shared = rng.integers(0, expected.vocab_size, 64).tolist()
        prompts = [rng.integers(0, expected.vocab_size, length).tolist() for length in LENGTHS]
        prompts += [shared + prompts[1], shared + prompts[3], shared[:50] + prompts[4]]
        expected.add(prompts)
        assert len(expected.prompts) >= 8, "too many near ties: choose other weights"
        return expected

    return build


def engine(expected: Expected, **options: Any) -> LLM:
    return LLM(expected.folder, tokenizer=None, device="cpu", dtype="float32", **({"max_batch_tokens": 256} | options))


GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)


def check(llm: LLM, expected: Expected, rounds: int = 1) -> list[Any]:
    """All prompts at once, in a ragged batch; the last round's outputs."""
    for _ in range(rounds):
        outputs = llm.generate(expected.prompts, GREEDY, progress=False)
        assert [output.token_ids for output in outputs] == expected.tokens
        assert all(output.finish_reason == "length" for output in outputs)
        llm.engine.page_manager.check_invariants()
        llm.engine.scheduler.check_invariants()
        assert llm.engine.page_manager.num_used == 0
    return outputs


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logits_of_every_kind_of_model(name: str, models: Any) -> None:
    expected = models(name)
    with engine(expected) as llm:
        check(llm, expected)
        runner = llm.engine.runner
        pages = PageManager(llm.engine.config.num_pages, llm.engine.config.page_size, False)
        prompts = [prompt for prompt in expected.prompts if len(prompt) > 2]
        wanted = torch.cat([expected.logits(prompt) for prompt in prompts])
        for cuts in ((), (1,), (2, -1), (-1,)):  # whole prompts, and prompts in chunks: each row as if all at once
            got: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
            bounds = [[0, *(cut % len(prompt) for cut in cuts), len(prompt)] for prompt in prompts]
            for index, prompt in enumerate(prompts):
                pages.allocate(str(index), prompt)
            for part in range(len(cuts) + 1):
                chunks = [
                    Chunk(str(i), bounds[i][part], bounds[i][part + 1])
                    for i in range(len(prompts))
                    if bounds[i][part] < bounds[i][part + 1]
                ]
                for chunk in chunks:
                    pages.extend(chunk.request_id, chunk.end)
                token_ids = [t for c in chunks for t in prompts[int(c.request_id)][c.start : c.end]]
                rows = np.arange(len(token_ids), dtype=np.int32)
                logits = runner.forward(pages.batch_arrays(chunks), np.array(token_ids, np.int32), rows)
                for chunk, of_chunk in zip(
                    chunks, logits.clone().split([c.end - c.start for c in chunks]), strict=True
                ):
                    got[int(chunk.request_id)].append(of_chunk)
            for index in range(len(prompts)):
                pages.free(str(index))
            joined = torch.cat([rows for index in got for rows in got[index]])
            torch.testing.assert_close(joined, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_chunks_pages_of_any_size_with_and_without_cache(name: str, page_size: int, models: Any) -> None:
    expected, recorder = models(name), Recorder()
    budget = {1: 9, 4: 16, 16: 33, 64: 100}[page_size]
    options = {"page_size": page_size, "max_batch_tokens": budget, "max_running": 6, "observers": [recorder]}
    with engine(expected, prefix_caching=False, **options) as llm:
        outputs = check(llm, expected, rounds=2)
        assert not any(output.metrics.num_cached_tokens for output in outputs)
        longest = max(range(len(expected.prompts)), key=lambda i: len(expected.prompts[i]))
        assert len(expected.prompts[longest]) > budget or page_size == 64  # it really was cut into chunks
        assert any(r.num_prefill_tokens and r.num_decode_tokens for r in recorder.steps)  # mixed steps
        assert all(r.num_prefill_tokens + r.num_decode_tokens <= budget for r in recorder.steps)
    recorder.steps.clear()
    with engine(expected, prefix_caching=True, **options) as llm:
        outputs = check(llm, expected, rounds=2)
        for prompt, output in zip(expected.prompts, outputs, strict=True):  # the second round finds all full pages
            assert output.metrics.num_cached_tokens == (len(prompt) - 1) // page_size * page_size
        assert sum(record.num_prefix_hit_tokens for record in recorder.steps) >= sum(
            output.metrics.num_cached_tokens for output in outputs
        )


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", FAMILIES)
def test_preempted_requests_give_the_same_tokens(name: str, caching: bool, models: Any) -> None:
    expected, recorder = models(name), Recorder()
    num_pages = -(-(max(map(len, expected.prompts)) + NUM_NEW) // 4) + 1  # little more than the longest needs alone
    options = {"page_size": 4, "num_pages": num_pages, "max_batch_tokens": 40, "max_running": 8}
    with engine(expected, prefix_caching=caching, observers=[recorder], **options) as llm:
        outputs = check(llm, expected)
        outputs += check(llm, expected)
    assert sum(len(record.preempted) for record in recorder.steps) >= 2
    preempted = [output for output in outputs if output.metrics.num_preemptions]
    assert preempted and all(output.metrics.num_output_tokens == NUM_NEW for output in preempted)


def test_the_bundled_model() -> None:
    from minillm.loader import load_tokenizer

    expected = load(BUNDLED_MODEL)
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    texts = [
        "Once upon a time",
        "The",
        "The old king had three daughters, and the youngest of them",
        '"Oh!" she said, "',
    ]
    texts += ["In the middle of the forest there stood a little house. " * 4]
    expected.add([tokenizer.encode(text) for text in texts], num_new=NUM_NEW)
    assert len(expected.prompts) >= 3, "too many near ties: choose other prompts"
    recorder = Recorder()
    options = {"page_size": 4, "max_batch_tokens": 24, "num_pages": 24, "max_running": 4, "observers": [recorder]}
    with engine(expected, **options) as llm:
        outputs = check(llm, expected, rounds=2)
        assert any(output.metrics.num_cached_tokens for output in outputs)
        pages = PageManager(llm.engine.config.num_pages, 4, False)
        prompt = max(expected.prompts, key=len)
        pages.allocate("a", prompt), pages.extend("a", len(prompt))
        arrays = pages.batch_arrays([Chunk("a", 0, len(prompt))])
        rows = np.arange(len(prompt), dtype=np.int32)
        logits = llm.engine.runner.forward(arrays, np.array(prompt, np.int32), rows)
        torch.testing.assert_close(logits, expected.logits(prompt), rtol=0, atol=1e-4)


# --- random workloads -------------------------------------------------------------------------------------------------

POOLS = {  # small enough that requests wait, are cut into chunks, and are preempted
    "tight": {"page_size": 4, "num_pages": 14, "max_running": 6, "max_batch_tokens": 9, "prefix_caching": True},
    "uncached": {"page_size": 4, "num_pages": 12, "max_running": 5, "max_batch_tokens": 24, "prefix_caching": False},
    "single-slot": {"page_size": 1, "num_pages": 40, "max_running": 3, "max_batch_tokens": 5, "prefix_caching": True},
    "roomy": {"page_size": 16, "num_pages": 64, "max_running": 8, "max_batch_tokens": 64, "prefix_caching": True},
}
NUM_PROMPTS = 9
sampling = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 3]),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    max_tokens=st.integers(1, 10),
    stop_token_ids=st.sampled_from([(), (), tuple(range(0, 101, 4))]),
    seed=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0, 2]),
)
arrivals = st.tuples(st.integers(0, 3), st.integers(0, NUM_PROMPTS - 1), sampling, st.integers(0, 40))


@pytest.fixture(scope="module")
def workload(models: Any) -> Any:
    """Prompts with shared beginnings, an engine for each kind of pool, and what each request gives when it is alone."""
    expected = models("qwen2")
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, expected.vocab_size, 24).tolist() for _ in range(2))
    prompts = [first[:1], first[:4], first[:17], first, first[:20] + second[:4], second[:8], second[:9], second]
    prompts.append([7] * 10)
    assert len(prompts) == NUM_PROMPTS
    recorders = {name: Recorder() for name in POOLS}
    engines = {
        name: LLMEngine(
            expected.folder, tokenizer=None, device="cpu", observers=[recorders[name]], max_model_len=48, **options
        )
        for name, options in POOLS.items()
    }
    lone = engine(expected, max_running=1, prefix_caching=False, max_model_len=48)

    @cache
    def alone(prompt_index: int, params: SamplingParams) -> list[tuple[list[int], str]]:
        outputs = lone.generate(prompts[prompt_index], params, progress=False)
        assert len(outputs) == params.n
        return [(output.token_ids, output.finish_reason) for output in outputs]

    yield prompts, engines, recorders, alone
    for each in engines.values():
        each.close()
    lone.close()


@pytest.mark.parametrize("pool", POOLS)
def test_random_workloads(pool: str, workload: Any) -> None:
    """Requests come and go: the books are in order after every step, all end once, and nobody notices the others."""
    prompts, engines, recorders, alone = workload
    server, recorder = engines[pool], recorders[pool]
    recorder.steps.clear()

    @settings(max_examples=30, deadline=None)
    @example([(0, 3 + i % 2, SamplingParams(max_tokens=10, seed=i), 40) for i in range(9)])  # all long, all at once
    @given(st.lists(arrivals, min_size=1, max_size=9))
    def serve(events: list[tuple[int, int, SamplingParams, int]]) -> None:
        coming = [(sum(e[0] for e in events[: i + 1]), *event[1:]) for i, event in enumerate(events)]
        asked: dict[str, tuple[int, SamplingParams]] = {}
        aborts: dict[int, list[str]] = {}
        aborted: set[str] = set()
        got: dict[str, list[Any]] = {}
        tick = 0
        while coming or server.has_unfinished():
            while coming and coming[0][0] <= tick:
                _, prompt_index, params, lifetime = coming.pop(0)
                request_id = server.add_request(prompts[prompt_index], params)
                asked[request_id] = (prompt_index, params)
                if lifetime < 12:  # a third is aborted on its way, or tried to, once it has ended
                    aborts.setdefault(tick + lifetime, []).append(request_id)
            for request_id in aborts.pop(tick, ()):
                server.abort(request_id)
                aborted.add(request_id)
            for output in server.step():
                got.setdefault(output.request_id, []).append(output)
            server.page_manager.check_invariants()
            server.scheduler.check_invariants()
            tick += 1
            assert tick < 2000
        assert server.page_manager.num_used == 0
        assert server.scheduler.num_running == server.scheduler.num_waiting == 0
        assert server.step() == []
        assert got.keys() == asked.keys()
        for request_id, (prompt_index, params) in asked.items():
            outputs = sorted(got[request_id], key=lambda output: output.sample_index)
            assert [output.sample_index for output in outputs] == list(range(params.n))
            for output, (tokens, reason) in zip(outputs, alone(prompt_index, params), strict=True):
                assert output.prompt_token_ids == prompts[prompt_index] and output.error is None
                if output.finish_reason == "abort":
                    assert request_id in aborted
                    assert output.token_ids == tokens[: len(output.token_ids)]
                else:
                    assert (output.token_ids, output.finish_reason) == (tokens, reason)
                assert (output.logprobs is None) == (params.logprobs is None)
                if output.logprobs is not None:
                    assert [next(iter(of_token)) for of_token in output.logprobs] == output.token_ids

    serve()
    if pool != "roomy":
        assert any(record.preempted for record in recorder.steps)
    assert any(record.num_prefix_hit_tokens for record in recorder.steps) == POOLS[pool]["prefix_caching"]


def test_a_swapped_part_may_not_change_the_tokens(models: Any) -> None:
    """A page manager that hands out pages in another order, and a scheduler of one request at a time."""
    from minillm.scheduler import Scheduler

    class Backwards(PageManager):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self._free_pages.reverse()

    class OneByOne(Scheduler):
        def schedule(self, max_tokens: int | None = None) -> Any:
            self.max_running = 1
            return super().schedule(max_tokens)

        def add(self, request: Request) -> None:
            assert request.num_computed == 0
            super().add(request)

    expected, recorder = models("llama"), Recorder()
    with engine(expected, page_manager=Backwards, scheduler=OneByOne, page_size=4, observers=[recorder]) as llm:
        check(llm, expected)
    assert all(len(record.chunks) == 1 for record in recorder.steps)
