"""What the interface promises (docs/semantics.md), rule by rule."""

from __future__ import annotations

import gc
import json
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from checkpoints import byte_tokenizer, tiny_checkpoint

import minillm.llm
from minillm import LLM, LLMEngine, ModelConfig, RequestOutput, SamplingParams
from minillm.config import EngineConfig
from minillm.devices import load_kernels, resolve
from minillm.errors import ConfigError, ContractError, EngineClosedError, InvalidRequestError, KernelsUnavailableError
from minillm.metrics import Metrics, Recorder, chrome_trace
from minillm.page_manager import PageManager
from minillm.protocols import SampledTokens
from minillm.request import Request
from minillm.sampler import Sampler
from minillm.scheduler import Scheduler

TOKENIZER = byte_tokenizer()  # a token a byte, after <unk> 0, <s> 1 and </s> 2
EOS = 2
MODEL = ModelConfig(
    model_type="llama",
    vocab_size=len(TOKENIZER),
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    dtype="float32",
    eos_token_ids=(EOS,),
)
GREEDY = SamplingParams(temperature=0)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def tiny(**options: Any) -> LLM:
    """An engine on random weights, a millisecond a step."""
    options = {"max_batch_tokens": 64, "max_running": 8, "device": "cpu"} | options
    return LLM(MODEL, **({"weights": "random", "tokenizer": TOKENIZER} | options))


def tokens(*lengths: int, start: int = 3) -> list[list[int]]:
    return [[start + (7 * i * i + length) % 250 for i in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with tiny(page_size=4, num_pages=200) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """One engine for many tests: each must leave it idle, with every page given back."""
    yield shared
    assert not shared.engine.has_unfinished() and shared.engine.step() == []
    assert shared.engine.page_manager.num_used == 0
    shared.engine.page_manager.check_invariants()
    shared.engine.scheduler.check_invariants()


@pytest.fixture(scope="module")
def story() -> Iterator[LLM]:
    """The bundled model."""
    with LLM(device="cpu", max_batch_tokens=256, max_running=16) as llm:
        yield llm


class Scripted:
    """A sampler that draws what the test has written: token `i` of the script as output token `i`."""

    def __init__(self, vocab_size: int):
        self.script: list[int] = []

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
        ids = [self.script[request.num_output] for request in requests]
        return SampledTokens(ids, [True] * len(ids), [None] * len(ids))


@pytest.fixture(scope="module")
def scripted() -> Iterator[LLM]:
    with tiny(sampler=Scripted) as llm:
        yield llm


def play(llm: LLM, script: str | list[int], **params: Any) -> tuple[RequestOutput, list[str]]:
    """The model says `script`: the output, the same whether generated or streamed, and the streamed pieces."""
    llm.engine.sampler.script = encode(script) if isinstance(script, str) else script
    sampling = SamplingParams(**({"max_tokens": len(llm.engine.sampler.script)} | params))
    (output,) = llm.generate("x", sampling)
    pieces: list[tuple[int, str]] = []
    llm.engine.add_request("x", sampling, on_token=lambda token_id, piece: pieces.append((token_id, piece)))
    (again,) = drain(llm.engine)
    assert (again.text, again.token_ids, again.finish_reason) == (output.text, output.token_ids, output.finish_reason)
    assert [token_id for token_id, _ in pieces] == output.token_ids
    streamed = list(llm.stream("x", sampling))
    assert all(streamed) and streamed == [piece for _, piece in pieces if piece]
    return output, streamed


def drain(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


# --- prompts and outputs ----------------------------------------------------------------------------------------------


def test_forms_of_a_prompt(llm: LLM) -> None:
    text, ids = "hello", encode("hello")
    for one in (text, ids, tuple(ids), [text], [ids]):
        (output,) = llm.generate(one, GREEDY)
        assert output.prompt_token_ids == ids
    several = llm.generate([text, ids, [5], "by"], GREEDY)
    assert [output.prompt_token_ids for output in several] == [ids, ids, [5], encode("by")]
    assert several[0].token_ids == several[1].token_ids


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """Also where the last ends first."""
    prompts = tokens(30, 3, 17, 1)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 1, 7, 2)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.token_ids) for output in outputs] == [20, 1, 7, 2]


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == llm.generate([], []) == llm.generate([], GREEDY) == []


@pytest.mark.parametrize("bad", ["", [], [5, None], [5, len(TOKENIZER)], [5] * 128, 7, None, [[5]]], ids=repr)
def test_all_prompts_are_checked_before_any_is_admitted(bad: Any, llm: LLM) -> None:
    added: list[str] = []

    class Listener:
        def on_request_added(self, request_id: str, num_prompt_tokens: int) -> None:
            added.append(request_id)

    listener = Listener()
    llm.engine.observers.observers.append(listener)
    try:
        with pytest.raises(InvalidRequestError):
            llm.generate(["good", "good, too", bad], GREEDY)
        with pytest.raises(InvalidRequestError):
            llm.generate(["good"] * 2, [GREEDY, SamplingParams(stop_token_ids=(len(TOKENIZER),))])
        assert added == [] and not llm.engine.has_unfinished() and llm.engine.scheduler.num_waiting == 0
        llm.generate("good", GREEDY)
        assert len(added) == 1
    finally:
        llm.engine.observers.observers.remove(listener)


def test_one_or_many_sampling_params(llm: LLM) -> None:
    prompts = ["a", "b", "c"]
    assert [len(o.token_ids) for o in llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))] == [3] * 3
    each = tuple(SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2, 4))
    for many in (each, list(each)):
        assert [len(o.token_ids) for o in llm.generate(prompts, many)] == [1, 2, 4]
    assert [len(o.token_ids) for o in llm.generate("a", list(each[:1]))] == [1]
    assert max(len(output.token_ids) for output in llm.generate(prompts)) <= SamplingParams().max_tokens
    for wrong in (each[:2], [], [GREEDY] * 4):
        with pytest.raises(InvalidRequestError, match=f"{len(wrong)} SamplingParams for 3 prompts"):
            llm.generate(prompts, wrong)
    with pytest.raises(InvalidRequestError, match="SamplingParams"):
        llm.generate(prompts, {"max_tokens": 3})  # type: ignore[arg-type]


def test_no_bos_is_added_that_the_tokenizer_does_not_add(llm: LLM) -> None:
    assert TOKENIZER.bos_token_id == 1
    assert llm.generate("ab", GREEDY)[0].prompt_token_ids == encode("ab")
    from tokenizers.processors import TemplateProcessing

    adds = byte_tokenizer()
    adds.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with tiny(tokenizer=adds) as other:
        assert other.generate("ab", GREEDY)[0].prompt_token_ids == [1, *encode("ab")]
        assert other.generate(encode("ab"), GREEDY)[0].prompt_token_ids == encode("ab")  # ids are taken as they are
        adds.chat_template = "<s>{{ messages[0].content }}"
        assert other.chat([{"role": "user", "content": "ab"}], GREEDY)[0].prompt_token_ids == [1, *encode("ab")]


def test_n_samples(llm: LLM) -> None:
    params = [SamplingParams(n=n, max_tokens=6, seed=3, ignore_eos=True) for n in (3, 1, 2)]
    outputs = llm.generate(["abc", "b", "abc"], params)
    assert [output.sample_index for output in outputs] == [0, 1, 2, 0, 0, 1]
    assert len({tuple(output.token_ids) for output in outputs[:3]}) == 3  # each draws for itself
    assert [o.token_ids for o in outputs[4:]] == [o.token_ids for o in outputs[:2]]  # of the same seed, the same
    assert len({output.request_id for output in outputs[:3]}) == 1
    request_id = llm.engine.add_request("a", SamplingParams(n=4, max_tokens=3))
    ended = drain(llm.engine)
    assert {(output.request_id, output.sample_index) for output in ended} == {(request_id, i) for i in range(4)}
    with pytest.raises(InvalidRequestError, match="n must be 1"):
        llm.stream("a", SamplingParams(n=2))


def test_fields_of_an_output(llm: LLM) -> None:
    (output,) = llm.generate("ab", SamplingParams(max_tokens=5, seed=1, logprobs=2, ignore_eos=True))
    assert isinstance(output.request_id, str) and output.sample_index == 0 and output.error is None
    assert output.prompt_token_ids == encode("ab") and len(output.token_ids) == 5
    assert all(type(token_id) is int for token_id in output.token_ids + output.prompt_token_ids)
    assert output.finish_reason == "length"
    whole = TOKENIZER.decode(output.prompt_token_ids + output.token_ids, skip_special_tokens=True)
    assert whole == "ab" + output.text
    assert len(output.logprobs) == 5 and all(2 <= len(of_token) <= 3 for of_token in output.logprobs)
    assert llm.generate("ab", GREEDY)[0].logprobs is None
    names = ("request_id", "text", "token_ids", "finish_reason", "prompt_token_ids", "metrics", "error", "logprobs")
    assert tuple(field.name for field in fields(RequestOutput)) == (*names, "sample_index")


def test_finish_reasons(llm: LLM, scripted: LLM) -> None:
    assert play(scripted, [*encode("ab"), EOS, *encode("c")])[0].finish_reason == "stop"
    assert play(scripted, "abc")[0].finish_reason == "length"
    request_id = llm.engine.add_request("a", SamplingParams(max_tokens=50, ignore_eos=True))
    llm.engine.step()
    llm.engine.abort(request_id)
    (aborted,) = llm.engine.step()
    assert aborted.finish_reason == "abort" and len(aborted.token_ids) == 1 and aborted.error is None
    llm.engine.add_request("a", on_token=lambda token_id, piece: 1 / 0)
    (failed,) = drain(llm.engine)
    assert failed.finish_reason == "error" and "ZeroDivisionError" in failed.error


def test_max_model_len_ends_with_length() -> None:
    with tiny(max_model_len=20) as llm:
        (output,) = llm.generate([5] * 12, SamplingParams(max_tokens=100, ignore_eos=True))
        assert (len(output.token_ids), output.finish_reason) == (8, "length")
        (output,) = llm.generate([5] * 19, SamplingParams(max_tokens=100, ignore_eos=True))
        assert (len(output.token_ids), output.finish_reason) == (1, "length")
        with pytest.raises(InvalidRequestError, match="20 tokens"):
            llm.generate([5] * 20)


def test_what_could_never_fit_is_refused_and_what_just_fits_is_served() -> None:
    with tiny(page_size=4, num_pages=5) as llm:  # 20 slots, of which the last token needs none
        assert llm.engine.config.max_model_len == 20
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        assert len(llm.generate([5] * 10, params)[0].token_ids) == 10
        assert llm.engine.page_manager.num_used == 0
    with tiny(page_size=4, num_pages=5, max_model_len=128) as llm:
        assert llm.engine.config.max_model_len == 20


def test_chat() -> None:
    tokenizer = byte_tokenizer()
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    with tiny(tokenizer=tokenizer) as llm:
        with pytest.raises(InvalidRequestError, match=r"no chat template.*generate"):
            llm.chat(messages)
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert output.prompt_token_ids == encode("<user>Hi<assistant>Yo<user>?<assistant>")
        assert output.token_ids == llm.generate(output.prompt_token_ids, GREEDY)[0].token_ids[:4]
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InvalidRequestError, match="roles must alternate"):
            llm.chat(messages)
        for wrong in ("Hi", [{"role": "user"}], {"role": "user", "content": "Hi"}, [["Hi"]], 5, None):
            with pytest.raises(InvalidRequestError, match="messages"):
                llm.chat(wrong)  # type: ignore[arg-type]
    with tiny(tokenizer=None) as llm, pytest.raises(InvalidRequestError, match="no chat template"):
        llm.chat(messages)


# --- sampling parameters ----------------------------------------------------------------------------------------------


def test_greedy_is_repeatable_and_takes_the_most_probable(story: LLM) -> None:
    prompts = ["Once upon a time", "The king", "There was"]
    params = [
        SamplingParams(temperature=0, max_tokens=12, logprobs=1, top_p=p, seed=s) for p, s in ((1, 1), (0.1, 2), (1, 3))
    ]
    first = story.generate(prompts, params)
    for output in first:  # the drawn one comes first, and no other is more probable
        assert all(len(of_token) == 1 for of_token in output.logprobs)
    assert [o.token_ids for o in story.generate(prompts, SamplingParams(temperature=0, max_tokens=12))] == [
        o.token_ids for o in first
    ]


def test_the_engine_filters_as_the_sampler_does(llm: LLM) -> None:
    """Each field arrives: with it, everything drawn is what it keeps, of the model's own logits."""
    prompt = encode("filter me")
    (free,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, logprobs=1000))
    logprobs = torch.tensor([free.logprobs[0][i] for i in range(len(TOKENIZER))], dtype=torch.float64)
    order = logprobs.argsort(descending=True).tolist()
    many = {"n": 150, "max_tokens": 1, "temperature": 1.0, "seed": 5}

    def drawn(**params: Any) -> set[int]:
        return {output.token_ids[0] for output in llm.generate(prompt, SamplingParams(**(many | params)))}

    assert drawn(top_k=3) == set(order[:3])
    assert drawn(top_k=1) == {order[0]} == drawn(temperature=1e-9) == drawn(min_p=1.0) == drawn(top_p=1e-9)
    assert len(drawn(top_k=0)) > 60 and drawn(top_k=0) == drawn(top_k=-1) == drawn()
    probs = logprobs.exp()[order]
    total = probs.cumsum(0)
    for most in (2, 5):
        assert drawn(top_p=float(total[most - 2] + total[most - 1]) / 2) == set(order[:most])
        assert drawn(min_p=float((probs[most - 1] + probs[most]) / 2 / probs[0])) == set(order[:most])
    (never,) = llm.generate([order[0], *prompt], SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1e30))
    assert len(set(never.token_ids)) == len(never.token_ids) and not set(never.token_ids) & {order[0], *prompt}


def test_logprobs_are_of_the_models_own_logits(llm: LLM) -> None:
    """The same for every way to draw, as long as the tokens are; all together they add up to 1."""
    prompt = encode("abc")
    (greedy,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, logprobs=len(TOKENIZER)))
    everything = greedy.logprobs[0]
    assert len(everything) == len(TOKENIZER)
    assert sum(torch.tensor(list(everything.values())).exp()) == pytest.approx(1, abs=1e-4)
    for params in (
        {"temperature": 0.2, "top_k": 2},
        {"temperature": 3.0, "repetition_penalty": 1.7},
        {"top_p": 0.2, "min_p": 0.5},
    ):
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, logprobs=3, seed=1, **params))
        got = output.logprobs[0]
        assert next(iter(got)) == output.token_ids[0]
        assert {*sorted(everything, key=everything.get)[-3:], output.token_ids[0]} == set(got)
        assert all(value == pytest.approx(everything[i], abs=1e-4) for i, value in got.items())
    (chosen_only,) = llm.generate(prompt, SamplingParams(max_tokens=2, logprobs=0, seed=1, ignore_eos=True))
    assert [list(of_token) for of_token in chosen_only.logprobs] == [[i] for i in chosen_only.token_ids]


def test_the_id_that_stopped_is_in_token_ids(scripted: LLM) -> None:
    output, _ = play(scripted, [*encode("ab"), EOS, *encode("cd")])
    assert (output.token_ids, output.text, output.finish_reason) == ([*encode("ab"), EOS], "ab", "stop")
    (x,) = encode("!")
    output, _ = play(scripted, "ab!cd", stop_token_ids=(x,))
    assert (output.token_ids, output.text, output.finish_reason) == (encode("ab!"), "ab!", "stop")


def test_ignore_eos(scripted: LLM) -> None:
    script = [*encode("ab"), EOS, *encode("cd!"), EOS]
    output, _ = play(scripted, script, ignore_eos=True)
    assert (output.token_ids, output.text, output.finish_reason) == (script, "abcd!", "length")
    output, _ = play(scripted, script, ignore_eos=True, stop_token_ids=tuple(encode("!")))
    assert (output.token_ids, output.finish_reason) == (script[:-1], "stop")
    output, _ = play(scripted, script, ignore_eos=True, stop_token_ids=(EOS,))  # asked for by the caller
    assert (output.token_ids, output.finish_reason) == (script[:3], "stop")


@pytest.mark.parametrize(
    ("script", "stop", "text", "num_tokens"),
    [
        ("hello STOP world", ("STOP",), "hello ", 10),
        ("hello STOP world", "STOP", "hello ", 10),
        ("hello STOP", ("STOP",), "hello ", 10),
        ("STOP", ("STOP",), "", 4),
        ("abcdefgh", ("ef", "cd"), "ab", 4),  # the one that is complete first
        ("abcdefgh", ("def", "cdefg", "zzz"), "abc", 6),  # although the other one begins earlier
        ("abcdefgh", ("cdef", "ef"), "ab", 6),  # both are complete: the text ends before either
        ("aab aaab", ("aaab",), "aab ", 8),  # a false start
        ("ababac", ("abac",), "ab", 6),  # one that begins within a false start
        ("STO", ("STOP",), "STO", 3),  # held back, and shown in the end
        ("x🧙y", ("🧙",), "x", 5),
        ("nothing", ("\n", "é"), "nothing", 7),
        ("", (), "", 0),
    ],
)
def test_stop_strings(script: str, stop: Any, text: str, num_tokens: int, scripted: LLM) -> None:
    if not script:
        script, text, num_tokens = "ab", "ab", 2
    output, pieces = play(scripted, script, stop=stop)
    assert output.text == "".join(pieces) == text
    assert len(output.token_ids) == num_tokens
    assert output.finish_reason == (
        "stop" if any(s in script for s in ([stop] if isinstance(stop, str) else stop)) else "length"
    )
    for piece_end in range(len(pieces)):
        assert text.startswith("".join(pieces[: piece_end + 1]))


def test_stop_strings_over_tokens_of_several_characters(story: LLM) -> None:
    (free,) = story.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=24))
    for start, length in ((3, 5), (9, 2), (20, 7), (0, 1)):
        stop = free.text[start : start + length]
        params = SamplingParams(temperature=0, max_tokens=24, stop=(stop,))
        (output,) = story.generate("Once upon a time", params)
        assert output.text == free.text[: free.text.index(stop)] and output.finish_reason == "stop"
        assert "".join(story.stream("Once upon a time", params)) == output.text
        assert output.token_ids == free.token_ids[: len(output.token_ids)]


def test_min_tokens_holds_every_stop_back(scripted: LLM) -> None:
    script = [*encode("a!"), EOS, *encode("STOP b!"), EOS, *encode("STOPc")]
    stops = {"stop": ("STOP",), "stop_token_ids": tuple(encode("!"))}
    ends = {0: 2, 1: 2, 2: 2, 3: 3, 4: 7, 7: 7, 8: 10, 10: 10, 11: 11, 12: 15, 15: 15, 16: 16}
    for min_tokens, num_tokens in ends.items():
        output, _ = play(scripted, script, min_tokens=min_tokens, **stops)
        assert len(output.token_ids) == num_tokens, min_tokens
        assert output.finish_reason == ("length" if num_tokens == 16 else "stop")
    assert play(scripted, script, min_tokens=12, **stops)[0].text == "a!STOP b!"


def test_max_tokens(scripted: LLM) -> None:
    for max_tokens in (1, 2, 5):
        output, _ = play(scripted, "abcdefgh", max_tokens=max_tokens)
        assert (output.text, output.finish_reason) == ("abcdefgh"[:max_tokens], "length")
    assert play(scripted, [*encode("ab"), EOS], max_tokens=3)[0].finish_reason == "stop"  # both: the end token wins


def test_a_seed_makes_tokens_independent_of_company() -> None:
    """Neighbours, place in the batch, chunks, the prefix cache and preemption: none of them changes a draw."""
    prompts = tokens(5, 23, 11)
    params = SamplingParams(temperature=1.2, top_p=0.95, seed=77, max_tokens=14, ignore_eos=True)
    with tiny(max_running=1) as lone:
        alone = [lone.generate(prompt, params)[0].token_ids for prompt in prompts]
    crowd = [SamplingParams(max_tokens=14, ignore_eos=True, temperature=t) for t in (0, 1, 2)]
    recorder = Recorder()
    for options in (
        {},
        {"max_batch_tokens": 9, "page_size": 4},
        {"num_pages": 14, "page_size": 4, "observers": [recorder]},
        {"prefix_caching": False, "page_size": 1},
    ):
        with tiny(**options) as llm:
            for order in ((0, 1, 2), (2, 0, 1)):
                mixed = [prompts[order[0]], *tokens(7, 19), prompts[order[1]], *tokens(2), prompts[order[2]]]
                outputs = llm.generate(mixed, [params, *crowd[:2], params, crowd[2], params])
                assert [outputs[i].token_ids for i in (0, 3, 5)] == [alone[i] for i in order]
    assert any(record.preempted for record in recorder.steps)


def test_seeds_and_positions_differ(llm: LLM) -> None:
    params = [SamplingParams(seed=seed, max_tokens=8, temperature=5.0, ignore_eos=True) for seed in range(20)]
    outputs = [tuple(output.token_ids) for output in llm.generate(["abc"] * 20, params)]
    assert len(set(outputs)) == 20
    assert all(len(set(token_ids)) > 3 for token_ids in outputs)
    again = [tuple(output.token_ids) for output in llm.generate(["abc"] * 20, params)]
    assert again == outputs


def test_the_seed_of_the_engine() -> None:
    def run(seed: int) -> list[list[int]]:
        with tiny(seed=seed, num_pages=40) as llm:
            params = SamplingParams(max_tokens=8, temperature=5.0, ignore_eos=True)
            return [output.token_ids for output in llm.generate(["a", "a"], params)]

    first = run(0)
    assert first == run(0) != run(1)
    assert first[0] != first[1]  # a request without a seed of its own gets one nobody else has


# --- stream -----------------------------------------------------------------------------------------------------------


def test_pieces_of_a_stream_join_to_the_text(story: LLM) -> None:
    for params in (
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(seed=4, max_tokens=30, temperature=1.5),
        SamplingParams(temperature=0, max_tokens=20, stop=(" a",)),
    ):
        pieces = list(story.stream("Once upon a", params))
        assert all(pieces) and len(pieces) > 1
        assert "".join(pieces) == story.generate("Once upon a", params)[0].text


def test_a_stream_shows_text_as_soon_as_it_is_certain(story: LLM) -> None:
    recorder = Recorder()
    story.engine.observers.observers.append(recorder)
    try:
        stream = story.stream("Once upon a time", SamplingParams(temperature=0, max_tokens=20))
        assert len(recorder.steps) == 0
        next(stream)
        assert len(recorder.steps) <= 2
        assert len(list(stream)) > 5
    finally:
        story.engine.observers.observers.remove(recorder)


@pytest.mark.parametrize("how", ["close", "del", "break", "raise"])
def test_an_abandoned_stream_aborts_its_request(how: str, llm: LLM) -> None:
    finished: list[RequestOutput] = []

    class Listener:
        def on_request_finished(self, output: RequestOutput) -> None:
            finished.append(output)

    listener = Listener()
    llm.engine.observers.observers.append(listener)
    other = llm.engine.add_request("b", SamplingParams(max_tokens=3, ignore_eos=True))
    stream = llm.stream("a", SamplingParams(max_tokens=60, ignore_eos=True, seed=0))
    next(stream)
    assert llm.engine.page_manager.num_used > 0
    if how == "close":
        stream.close()
    elif how == "del":
        del stream
    elif how == "break":
        for _ in stream:
            break
        del stream
    else:
        with pytest.raises(KeyError):
            for _ in stream:
                raise KeyError
        del stream
        gc.collect()
    llm.engine.observers.observers.remove(listener)
    assert [output.finish_reason for output in finished if output.request_id != other] == ["abort"]
    assert [output.request_id for output in drain(llm.engine)] == [other]  # nobody else is harmed, or told


def test_a_stream_that_never_began_costs_nothing(llm: LLM) -> None:
    stream = llm.stream("a")
    assert not llm.engine.has_unfinished()
    del stream
    stream = llm.stream("a", GREEDY)
    # It has no id yet that somebody else could take.
    number = int(llm.engine.add_request("c", GREEDY).removeprefix("request-"))
    names = [f"request-{number + offset}" for offset in (-1, 1, 2)]
    for name in names:
        assert llm.engine.add_request("b", GREEDY, request_id=name) == name
    assert "".join(stream) == llm.generate("a", GREEDY)[0].text
    assert len(drain(llm.engine)) == 4


def test_a_stream_raises_what_ended_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_numbers(logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
        return SampledTokens([0] * len(requests), [False] * len(requests), [None] * len(requests))

    monkeypatch.setattr(llm.engine.sampler, "sample", no_numbers)
    with pytest.raises(RuntimeError, match="not finite"):
        list(llm.stream("a"))


def test_calls_interleave(llm: LLM) -> None:
    """Streams, generate and add_request on one engine at once: each caller gets what is its own, all of it."""
    params = [SamplingParams(seed=i, max_tokens=12, ignore_eos=True) for i in range(4)]
    expected = [llm.generate(prompt, p)[0] for prompt, p in zip("abcd", params, strict=True)]
    first, second = llm.stream("a", params[0]), llm.stream("b", params[1])
    texts = [next(first), next(second)]
    request_id = llm.engine.add_request("c", params[2])
    (generated,) = llm.generate("d", params[3])
    texts[0] += next(first)
    outputs = llm.engine.step()
    texts[1] += "".join(second)
    texts[0] += "".join(first)
    outputs += drain(llm.engine)
    assert texts == [output.text for output in expected[:2]]
    assert [(output.request_id, output.token_ids) for output in outputs] == [(request_id, expected[2].token_ids)]
    assert generated.token_ids == expected[3].token_ids


# --- the engine -------------------------------------------------------------------------------------------------------


def test_step_returns_what_ended_each_once(llm: LLM) -> None:
    engine = llm.engine
    assert engine.step() == [] and not engine.has_unfinished()
    ids = [
        engine.add_request("abc", SamplingParams(max_tokens=n, ignore_eos=True), request_id=f"r{n}")
        for n in (1, 3, 3, 9)
        if f"r{n}" not in engine._children
    ]
    assert ids == ["r1", "r3", "r9"]
    by_step = []
    while engine.has_unfinished():
        by_step.append([output.request_id for output in engine.step()])
    assert by_step == [["r1"], [], ["r3"], *[[]] * 5, ["r9"]]


def test_abort(llm: LLM) -> None:
    engine = llm.engine
    engine.abort("unknown")
    running = engine.add_request("abc", SamplingParams(max_tokens=30, ignore_eos=True))
    engine.step()
    assert engine.page_manager.num_used > 0
    waiting = engine.add_request("abc", SamplingParams(max_tokens=30, n=2))
    for _ in range(2):
        engine.abort(running)
        engine.abort(waiting)
    assert engine.page_manager.num_used == 0  # at once
    assert engine.has_unfinished()  # while they are undelivered
    outputs = engine.step()
    assert [(o.request_id, o.sample_index, len(o.token_ids)) for o in outputs] == [
        (running, 0, 1),
        (waiting, 0, 0),
        (waiting, 1, 0),
    ]
    assert all(output.finish_reason == "abort" for output in outputs)
    engine.abort(running)
    assert not engine.has_unfinished() and engine.step() == []


def test_abort_from_a_callback(llm: LLM) -> None:
    """Of another request in the same step, and of itself."""
    engine = llm.engine
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    first = engine.add_request("a", params, on_token=lambda token_id, piece: engine.abort("victim"))
    engine.add_request("b", params, request_id="victim")
    engine.add_request("c", params, request_id="self", on_token=lambda token_id, piece: engine.abort("self"))
    outputs = {output.request_id: output for output in drain(engine)}
    assert {name: (o.finish_reason, len(o.token_ids)) for name, o in outputs.items()} == {
        first: ("length", 6),
        "victim": ("abort", 0),
        "self": ("abort", 1),
    }


def test_ids(llm: LLM) -> None:
    engine = llm.engine
    assert engine.add_request("a", GREEDY, request_id="mine") == "mine"
    with pytest.raises(InvalidRequestError, match="'mine' is in use"):
        engine.add_request("a", request_id="mine")
    made_up = {engine.add_request("a", GREEDY) for _ in range(3)}
    assert len(made_up) == 3
    assert {output.request_id for output in drain(engine)} == made_up | {"mine"}
    engine.add_request("a", GREEDY, request_id="mine")  # free again
    assert len(drain(engine)) == 1


def test_close(story: LLM) -> None:
    llm = tiny()
    engine = llm.engine
    engine.add_request("a", request_id="running")
    engine.add_request("b", SamplingParams(max_tokens=1, ignore_eos=True))
    stream = llm.stream("a", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    engine.abort("running")
    llm.close()
    llm.close()
    engine.close()
    calls: tuple[Callable[[], Any], ...] = (
        engine.step,
        lambda: engine.add_request("a"),
        lambda: llm.generate("a"),
        lambda: llm.stream("a"),
        lambda: llm.generate(["a"]),
    )
    for call in calls:
        with pytest.raises(EngineClosedError, match="closed"):
            call()
    assert issubclass(EngineClosedError, RuntimeError)
    engine.abort("running")
    assert not engine.has_unfinished()  # so that a loop over steps ends
    stream.close()
    with tiny() as other:
        assert other.generate("a", GREEDY)
    with pytest.raises(EngineClosedError):
        other.generate("a")
    with tiny().engine as engine:
        engine.add_request("a")
    with pytest.raises(EngineClosedError):
        engine.step()


def test_closing_under_a_stream() -> None:
    llm = tiny()
    stream = llm.stream("a", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(EngineClosedError):
        list(stream)


def test_parts_can_be_read(llm: LLM) -> None:
    engine = llm.engine
    assert isinstance(engine.page_manager, PageManager) and isinstance(engine.scheduler, Scheduler)
    engine.add_request("a", SamplingParams(max_tokens=4, ignore_eos=True))
    assert engine.scheduler.num_waiting == 1 and engine.page_manager.num_used == 0
    engine.step()
    assert engine.scheduler.num_running == 1 and engine.page_manager.num_used == 1
    assert repr(engine.page_manager) and "<" in engine.page_manager._repr_html_()
    drain(engine)


def interrupt(engine: LLMEngine, at_step: int) -> Any:
    """An observer that presses the stop button while a step is running."""

    class Button:
        num_steps = 0

        def on_step(self, record: Any) -> None:
            self.num_steps += 1
            if self.num_steps == at_step:
                signal.raise_signal(signal.SIGINT)

    button = Button()
    engine.observers.observers.append(button)
    return button


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_an_interrupt_aborts_the_callers_requests_only(call: str, llm: LLM) -> None:
    before = signal.getsignal(signal.SIGINT)
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    (expected,) = llm.generate("other", params)
    other = llm.engine.add_request("other", params)
    button = interrupt(llm.engine, at_step=3)
    with pytest.raises(KeyboardInterrupt):
        if call == "generate":
            llm.generate(["a", "b"], SamplingParams(max_tokens=50, ignore_eos=True))
        else:
            list(llm.stream("a", SamplingParams(max_tokens=50, ignore_eos=True)))
    llm.engine.observers.observers.remove(button)
    assert signal.getsignal(signal.SIGINT) is before
    gc.collect()  # the traceback held the stream
    assert llm.engine.scheduler.num_running == 1
    (output,) = drain(llm.engine)
    assert (output.request_id, output.token_ids) == (other, expected.token_ids)


def test_an_exception_in_one_callback_ends_one_request(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    (expected,) = llm.generate("a", params)

    def fails(token_id: int, piece: str) -> None:
        raise ValueError("no room on the screen")

    good, bad = llm.engine.add_request("a", params), llm.engine.add_request("a", params, on_token=fails)
    outputs = {output.request_id: output for output in drain(llm.engine)}
    assert outputs[good].token_ids == expected.token_ids
    assert outputs[bad].finish_reason == "error" and "no room on the screen" in outputs[bad].error


@pytest.mark.parametrize("when", ["idle", "running", "streaming"])
def test_del_frees_everything(when: str) -> None:
    llm = tiny()
    llm.generate("a", GREEDY)
    if when == "running":
        llm.engine.add_request("a", on_token=lambda token_id, piece: None)
        llm.engine.step()
    if when == "streaming":
        stream = llm.stream("a")
        next(stream)
        del stream
    gone = [weakref.ref(x) for x in (llm.engine, llm.engine.runner, llm.engine.runner.kv_pool, llm.engine.page_manager)]
    gc.disable()
    try:
        del llm
        assert [ref() for ref in gone] == [None] * 4  # at once: no cycle waits for the collector
    finally:
        gc.enable()


def test_two_engines_in_two_threads() -> None:
    prompts, params = tokens(5, 20, 33), SamplingParams(seed=2, max_tokens=20, ignore_eos=True)
    with tiny(seed=1) as first, tiny(seed=2, page_size=4) as second:
        alone = [[o.token_ids for o in llm.generate(prompts, params)] for llm in (first, second)]
        assert alone[0] != alone[1]
        together: list[Any] = [None, None]

        def run(index: int, llm: LLM) -> None:
            for _ in range(3):
                together[index] = [o.token_ids for o in llm.generate(prompts, params, progress=False)]

        threads = [threading.Thread(target=run, args=each) for each in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == alone


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("page_sise", "page_size"), ("max_runing", "max_running"), ("tokeniser", "tokenizer"), ("observer", "observers")],
)
def test_an_unknown_option_names_the_nearest(option: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"{option}.*{nearest}"):
        LLM(**{option: 1})
    with pytest.raises(TypeError, match=f"{option}.*{nearest}"):
        LLMEngine(**{option: 1})


def test_a_wrong_option_names_itself() -> None:
    for name, value in (
        ("page_size", 65),
        ("dtype", "int8"),
        ("weights", "none"),
        ("kernels", "triton"),
        ("device", 3),
    ):
        with pytest.raises(ConfigError, match=name):
            tiny(**{name: value})


def test_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(**options: Any) -> str:
        return resolve(EngineConfig(**options), MODEL).device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("MINILLM_DEVICE", "cpu")
    assert device() == "cpu" and device(device="cuda:1", dtype="bfloat16") == "cuda:1"  # what is said counts for more
    monkeypatch.setenv("MINILLM_DEVICE", "cuda:1")
    assert device(dtype="bfloat16") == "cuda:1" and device(device="cpu") == "cpu"
    monkeypatch.delenv("MINILLM_DEVICE")
    assert device(dtype="bfloat16") == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == "cpu"
    with pytest.raises(ConfigError, match="cuda"):
        device(device="cuda")


def test_the_default_dtype(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    import dataclasses

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def dtype(device: str, stored: str, **options: Any) -> str:
        return resolve(EngineConfig(device=device, **options), dataclasses.replace(MODEL, dtype=stored)).dtype

    assert {dtype("cpu", stored) for stored in ("float32", "bfloat16", "float16")} == {"float32"}
    assert dtype("cuda", "bfloat16") == "bfloat16" and dtype("cuda", "float16") == "float16"
    assert dtype("cpu", "float32", dtype="bfloat16") == "bfloat16"
    assert len(recwarn) == 0
    with pytest.warns(UserWarning, match="bfloat16"):
        assert dtype("cuda", "float32") == "bfloat16"


def test_the_default_kernels(llm: LLM) -> None:
    import minillm.reference

    cpu = torch.device("cpu")
    assert load_kernels("auto", cpu) is load_kernels("reference", cpu) is minillm.reference
    assert llm.engine.runner.kernels is minillm.reference
    with pytest.raises(KernelsUnavailableError, match="flashinfer"):
        tiny(kernels="flashinfer")


def test_the_size_of_the_pool() -> None:
    with tiny(page_size=4, max_running=3, max_model_len=30) as llm:  # 3 requests of 8 pages
        assert llm.engine.config.num_pages == llm.engine.page_manager.num_pages == 24
    with tiny(page_size=4, num_pages=10) as llm:  # what they hold limits a request
        assert llm.engine.config.max_model_len == 40
    with tiny(page_size=4, num_pages=10, max_model_len=12) as llm:
        assert llm.engine.config.max_model_len == 12
    with tiny() as llm:
        assert llm.engine.config.max_model_len == MODEL.max_position_embeddings
        assert llm.engine.runner.kv_pool.num_bytes <= 512 * 2**20


def test_no_tokenizer() -> None:
    with tiny(tokenizer=None) as llm:
        (output,) = llm.generate([5, 6], GREEDY)
        assert output.text == "" and output.token_ids
        seen: list[tuple[int, str]] = []
        llm.engine.add_request([5, 6], GREEDY, on_token=lambda *told: seen.append(told))
        drain(llm.engine)
        assert seen == [(token_id, "") for token_id in output.token_ids]
        for refused in ("text", ["text"]):
            with pytest.raises(InvalidRequestError, match="no tokenizer"):
                llm.generate(refused)
        with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
            llm.generate([5], SamplingParams(stop="x"))


def test_random_weights_need_no_checkpoint() -> None:
    runs = []
    for seed in (0, 0, 1):
        with LLM(MODEL, weights="random", seed=seed, device="cpu", num_pages=16) as llm:
            assert llm.engine.tokenizer is None
            runs.append(llm.generate([5, 6, 7], SamplingParams(temperature=0, ignore_eos=True))[0].token_ids)
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(ConfigError, match="random"):
        LLM(MODEL)


def test_a_folder_is_a_model(tmp_path: Any) -> None:
    folder = tiny_checkpoint("qwen3", tmp_path, tokenizer=True)
    for model in (folder, str(folder)):
        with LLM(model, device="cpu", num_pages=8) as llm:
            assert llm.generate("ab", GREEDY)[0].prompt_token_ids == encode("ab")


def test_swapped_parts() -> None:
    used: set[str] = set()

    class Pages(PageManager):
        def allocate(self, request_id: str, token_ids: Sequence[int]) -> int:
            used.add("pages")
            return super().allocate(request_id, token_ids)

    class Queue(Scheduler):
        def complete(self, plan: Any) -> None:
            used.add("scheduler")
            super().complete(plan)

    class Dice(Sampler):
        def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
            used.add("sampler")
            return super().sample(logits, requests)

    with (
        tiny() as plain,
        tiny(page_manager=Pages, scheduler=Queue, sampler=lambda vocab_size: Dice(vocab_size)) as mine,
    ):
        assert mine.generate("abc", GREEDY)[0].token_ids == plain.generate("abc", GREEDY)[0].token_ids
    assert used == {"pages", "scheduler", "sampler"}

    class Lies(PageManager):
        def allocate(self, request_id: str, token_ids: Sequence[int]) -> int:
            super().allocate(request_id, token_ids)
            return 3

    with tiny(page_manager=Lies) as llm:
        with pytest.raises(ContractError) as caught:
            llm.generate("abcdef")
        assert caught.value.part == "PageManager" and "page size" in caught.value.rule
        assert caught.value.request_id is not None


def test_the_bundled_model_works(story: LLM) -> None:
    assert story.engine.model_config.model_type == "qwen3"
    (output,) = story.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=64))
    assert len(output.text.split()) > 20 and output.text.isascii()
    assert 0 < output.metrics.ttft < output.metrics.latency


# --- watching ---------------------------------------------------------------------------------------------------------


def test_progress_bar(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Bar:
        def __init__(self, total: int):
            self.total, self.done, self.is_closed = total, 0, False
            bars.append(self)

        def update(self, n: int) -> None:
            assert not self.is_closed
            self.done += n

        def close(self) -> None:
            self.is_closed = True

    bars: list[Bar] = []
    prompts, params = ["a"] * 5, SamplingParams(max_tokens=3, n=2)
    llm.generate(prompts, params)
    assert capsys.readouterr() == ("", "")  # nothing for what takes less than a second
    monkeypatch.setattr(minillm.llm, "progress_bar", Bar)
    llm.generate(prompts, params)
    assert [(bar.total, bar.done, bar.is_closed) for bar in bars] == [(5, 5, True)]
    llm.generate(prompts, params, progress=False)
    llm.generate([])
    assert len(bars) == 1


def test_observers() -> None:
    events: list[tuple[str, Any]] = []

    class Everything:
        def on_step(self, record: Any) -> None:
            events.append(("step", record))

        def on_request_added(self, request_id: str, num_prompt_tokens: int) -> None:
            events.append(("added", (request_id, num_prompt_tokens)))

        def on_request_finished(self, output: RequestOutput) -> None:
            events.append(("finished", output))

    class Nothing:
        pass

    class Broken:
        def on_step(self, record: Any) -> None:
            raise OSError("disk full")

    with tiny(observers=[Everything(), Nothing(), Broken()], page_size=4) as llm:
        with pytest.warns(UserWarning, match=r"dropped an observer.*disk full") as warned:
            outputs = llm.generate(["abc", "de"], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(warned) == 1 and len(llm.engine.observers.observers) == 2
        assert [output.finish_reason for output in outputs] == ["length"] * 2
    assert [name for name, _ in events] == ["added"] * 2 + ["step"] * 3 + ["finished"] * 2 + ["step"]
    assert [size for name, (_, size) in events[:2]] == [3, 2]
    assert [output for name, output in events if name == "finished"] == outputs
    steps = [record for name, record in events if name == "step"]
    assert [record.index for record in steps] == [0, 1, 2, 3]
    assert [(r.num_prefill_tokens, r.num_decode_tokens) for r in steps] == [(5, 0), (0, 2), (0, 2), (0, 2)]
    assert steps[-1].finished and not steps[0].finished and steps[-1].num_pages_used == 0
    for record in steps:
        assert record.total_time > 0 and record.error is None
        assert record.num_pages_used + record.num_pages_available == llm.engine.config.num_pages
        assert len(record.chunks) == 2


def test_metrics_of_a_request(llm: LLM) -> None:
    llm.engine.page_manager.evict()
    prompt = encode("a prompt of more than one page")
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    before = time.perf_counter()
    first, second = (llm.generate(prompt, params)[0].metrics for _ in range(2))
    after = time.perf_counter()
    for m in (first, second):
        assert before < m.arrival_time < after
        assert 0 < m.queue_time < m.ttft < m.latency < after - before
        assert 0 < m.inter_token_latency < m.latency
        assert m.inter_token_latency == pytest.approx((m.latency - m.ttft) / 5)
        assert (m.num_prompt_tokens, m.num_output_tokens, m.num_preemptions) == (len(prompt), 6, 0)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (len(prompt) - 1) // 4 * 4  # what fills pages, but never the last token
    llm.engine.abort(llm.engine.add_request("never ran"))
    (output,) = llm.engine.step()
    m = output.metrics
    assert m.queue_time is m.ttft is m.inter_token_latency is None and m.latency > 0 and m.num_output_tokens == 0


def test_metrics_of_the_engine() -> None:
    metrics, recorder = Metrics(), Recorder()
    assert metrics.prometheus().endswith("\n") and str(metrics)  # before anything has happened
    with tiny(observers=[metrics, recorder], page_size=4, num_pages=12) as llm:
        params = SamplingParams(max_tokens=12, ignore_eos=True, n=2)
        llm.generate(tokens(20, 20, 20), params)
        llm.engine.abort(llm.engine.add_request([5]))
        llm.engine.step()
    counters = metrics.counters
    assert counters["steps"] == len(recorder.steps) and counters["step_errors"] == 0
    assert counters["preemptions"] == sum(len(record.preempted) for record in recorder.steps) > 0
    assert counters["prefix_hit_tokens"] > 0
    assert counters["prefill_tokens"] + counters["decode_tokens"] == sum(
        chunk.end - chunk.start for record in recorder.steps for chunk in record.chunks
    )
    assert metrics.finished == {"stop": 0, "length": 6, "abort": 1, "error": 0}
    assert all(0 < p["p50"] <= p["p99"] for p in metrics.latencies().values()) and len(metrics.latencies()) == 3
    samples = {}
    declared: dict[str, str] = {}
    for line in metrics.prometheus().splitlines():  # the exposition format
        if match := re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge|summary)", line):
            assert match[1] not in declared
            declared[match[1]] = match[2]
            continue
        match = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[a-z0-9.]+"\})? ([0-9.]+)', line)
        assert match and match[1] in declared, line  # each sample belongs to a metric that was declared before it
        assert match[1].endswith("_total") == (declared[match[1]] == "counter")
        samples[match[1] + (match[2] or "")] = float(match[3])
    assert samples["minillm_steps_total"] == counters["steps"]
    assert samples['minillm_requests_finished_total{reason="length"}'] == 6
    assert samples["minillm_pages_used"] == 0 and samples["minillm_pages_available"] == 12
    assert samples['minillm_ttft_seconds{quantile="0.5"}'] > 0
    assert f"{counters['steps']} steps" in str(metrics) and "ttft" in str(metrics)


def test_the_trace_is_one_that_a_browser_reads() -> None:
    recorder = Recorder()
    with tiny(observers=[recorder]) as llm:
        llm.generate(["abc", "d"], SamplingParams(max_tokens=3, ignore_eos=True))
    events = json.loads(chrome_trace(recorder.steps))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 5 * len(recorder.steps) == 15
    for earlier, later in pairwise(slices):  # one after the other: phases never overlap
        assert earlier["ts"] + earlier["dur"] <= later["ts"] + 1
    assert all(event["dur"] >= 0 and event["pid"] == 0 for event in slices)
    counters = [event for event in events if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {"tokens", "pages", "requests"}
    assert [e["args"]["prefill"] for e in counters if e["name"] == "tokens"] == [4, 0, 0]
    assert json.loads(chrome_trace([])) == {"traceEvents": []}


def test_a_recorder_forgets_what_is_old() -> None:
    recorder = Recorder(max_steps=2)
    with tiny(observers=[recorder]) as llm:
        llm.generate("abc", SamplingParams(max_tokens=5, ignore_eos=True))
    assert [record.index for record in recorder.steps] == [3, 4]
