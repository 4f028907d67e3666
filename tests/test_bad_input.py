"""Bad prompts, parameters and options: one clear exception each, at once and at no cost; the engine serves on."""

import enum
import re
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TINY, byte_tokenizer, edit_config, tiny_checkpoint

from minillm import LLM, SamplingParams
from minillm.config import ModelConfig
from minillm.errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    EngineClosedError,
    InvalidRequestError,
    KernelsUnavailableError,
    MiniLLMError,
)

NAN, INF, HUGE = float("nan"), float("inf"), 10**5000
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
GOOD = [5, 6, 7]
NO_GPU = not torch.cuda.is_available()


class Text(str):
    """Text all the same."""


class Token(enum.IntEnum):
    """Integers all the same."""

    FIVE = 5
    SIX = 6
    SEVEN = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", num_pages=64, max_batch_tokens=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[int]:
    return llm.generate(GOOD, GREEDY)[0].token_ids


def check_message(error: BaseException, word: str = "") -> None:
    message = str(error)
    assert word in message, message
    assert message
    assert "\n" not in message, message
    assert len(message) < 500, message


def check_unharmed(llm: LLM, expected: list[int]) -> None:
    """Nothing was admitted, nothing is held, and the engine gives the tokens it always gave."""
    engine = llm.engine
    assert not engine.has_unfinished()
    assert engine.page_manager.num_used == 0
    engine.page_manager.check_invariants()
    assert llm.generate(GOOD, GREEDY, progress=False)[0].token_ids == expected
    assert engine.step() == []


def memory(name: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def refused(
    call: Callable[[], object],
    kind: type[Exception] = InvalidRequestError,
    word: str = "",
    seconds: float = 1.0,
    megabytes: int = 8,
) -> None:
    """The call raises that very kind of exception, soon, and takes no memory on the way."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # let the process's peak start from here
    except OSError:
        pass
    before, started = memory("VmHWM"), time.process_time()
    with pytest.raises(kind) as caught:
        call()
    assert time.process_time() - started < seconds
    assert memory("VmHWM") - before <= megabytes * 2**20
    assert type(caught.value) is kind, caught.value
    check_message(caught.value, word)


PROMPTS: dict[str, tuple[Any, str]] = {  # what is handed in, and what the message says
    "None": (None, "None"),
    "True": (True, "True"),
    "a float": (3.5, "3.5"),
    "an int": (3, "3"),
    "a huge int": (HUGE, "prompt"),
    "bytes": (b"text", "b'text'"),
    "a dict": ({"prompt": "x"}, "prompt"),
    "a set": ({1, 2}, "prompt"),
    "an iterator": (iter([1, 2]), "prompt"),
    "an object": (object(), "object"),
    "empty text": ("", "empty"),
    "no tokens": ([], "empty"),
    "no tokens in a tuple": ((), "empty"),
    "no tokens in an array": (np.array([], dtype=np.int64), "empty"),
    "a bool among tokens": ([1, True], "True"),
    "None among tokens": ([1, None], "None"),
    "a float among tokens": ([1, 2.0], "2.0"),
    "NaN among tokens": ([NAN], "nan"),
    "text among tokens": ([1, "a"], "'a'"),
    "a list among tokens": ([1, [2]], "[2]"),
    "nested lists": ([[1, 2], [3]], "[1, 2]"),
    "deeply nested": ([[[[1]]]], "[[[1]]]"),
    "an id of the size of the vocabulary": ([1, 320], "320"),
    "a negative id": ([-1], "-1"),
    "an id beyond int32": ([2**31], str(2**31)),
    "an id beyond int64": ([2**64 + 5], "vocabulary"),
    "an id of 5000 digits": ([HUGE], "vocabulary"),
    "a numpy float among tokens": ([np.float32(1)], "1.0"),
    "a numpy bool among tokens": ([np.True_], "True"),
    "an array of floats": (np.array([1.0, 2.0]), "1.0"),
    "an array of bools": (np.array([True, False]), "True"),
    "an array of text": (np.array(["a", "b"]), "'a'"),
    "an array of objects": (np.array([None, 1], dtype=object), "None"),
    "an array of two dimensions": (np.array([[1, 2]]), "array"),
    "an array of no dimension": (np.array(3), "array"),
    "an array with a wrong id": (np.array([1, 2**40]), str(2**40)),
    "an array with a negative id": (np.array([1, -7], dtype=np.int8), "-7"),
    "a tensor of floats": (torch.tensor([1.5]), "1.5"),
    "a tensor of two dimensions": (torch.tensor([[1]]), "tensor"),
    "a tensor of no dimension": (torch.tensor(3), "tensor"),
    "too many tokens": ([1] * 256, "256 tokens"),
    "far too many tokens": (range(10**12), "max_model_len"),
    "far too large an array": (np.broadcast_to(np.int64(1), (10**9,)), "max_model_len"),
    "too long a text": ("a" * 300, "300 tokens"),
    "far too long a text": ("ab" * 50_000, "100000 tokens"),
    "half a surrogate pair": ("a \ud800 b", "tokenizer"),
    "the other half": ("\udc00", "tokenizer"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_bad_prompt(case: str, llm: LLM, expected: list[int]) -> None:
    prompt, word = PROMPTS[case]
    refused(lambda: llm.engine.add_request(prompt), word=word, megabytes=64 if isinstance(prompt, str) else 8)
    check_unharmed(llm, expected)
    if not (isinstance(prompt, (list, tuple)) and len(prompt) == 0):  # no prompts are no mistake
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate([GOOD, prompt] if not isinstance(prompt, range) else prompt, GREEDY)
        check_message(caught.value)
    refused(lambda: llm.stream(prompt), word=word, megabytes=64 if isinstance(prompt, str) else 8)
    check_unharmed(llm, expected)


@pytest.mark.parametrize(
    "prompt",
    [(5, 6, 7), range(5, 8), np.array(GOOD), np.array(GOOD, dtype=np.uint8), [np.int16(5), 6, 7], list(Token)],
    ids=lambda prompt: type(prompt).__name__,
)
def test_integers_of_every_kind_are_tokens(prompt: Any, llm: LLM, expected: list[int]) -> None:
    output = llm.generate(prompt, GREEDY)[0]
    assert output.token_ids == expected
    assert output.prompt_token_ids == GOOD
    assert all(type(token_id) is int for token_id in output.prompt_token_ids)


def test_a_subclass_of_str_is_text(llm: LLM) -> None:
    plain, subclass = llm.generate(["abc", Text("abc")], GREEDY)
    assert plain.prompt_token_ids == subclass.prompt_token_ids
    assert plain.text == subclass.text
    assert llm.generate(Text("abc"), GREEDY)[0].text == plain.text


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.generate([], []) == []


NOT_A_NUMBER: tuple[Any, ...] = (None, True, "1", [1], NAN, 1j, Decimal(1))
NOT_AN_INTEGER: tuple[Any, ...] = (None, False, 1.0, "1", (1,), NAN, INF, np.float64(1), Fraction(1))
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "n": (*NOT_AN_INTEGER, 0, -1, 1025, HUGE),
    "temperature": (*NOT_A_NUMBER, -0.1, -INF, INF, 10**400, -HUGE),
    "top_k": (*NOT_AN_INTEGER, -2, -HUGE),
    "top_p": (*NOT_A_NUMBER, 0, -0.5, 1.0001, INF, HUGE),
    "min_p": (*NOT_A_NUMBER, -0.1, 1.1, -INF, HUGE),
    "repetition_penalty": (*NOT_A_NUMBER, 0, -1, INF, HUGE),
    "max_tokens": (*NOT_AN_INTEGER, 0, -1),
    "min_tokens": (*NOT_AN_INTEGER, -1, 17),
    "stop": (None, True, 3, b"x", "", [""], ["a", ""], ["a", None], [["a"]], {"a"}),
    "stop_token_ids": (None, 3, "3", [True], [1.0], [-1], [None], [[1]], {3}, np.array([3])),
    "ignore_eos": (None, 0, 1, "yes", [], np.True_),
    "seed": (True, 1.0, "1", -1, 2**64, NAN, HUGE),
    "logprobs": (True, 1.0, "1", -1, 1025, HUGE),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_bad_parameter(name: str) -> None:
    for value in PARAMETERS[name]:
        refused(lambda value=value: SamplingParams(**{name: value}), word=name)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", np.int8(2)),
        ("temperature", 0),
        ("temperature", np.float32(0.5)),
        ("temperature", Fraction(1, 2)),
        ("temperature", 1e300),
        ("temperature", 1e-300),
        ("top_k", 10**30),
        ("top_p", 1),
        ("min_p", 1),
        ("repetition_penalty", 1e-6),
        ("repetition_penalty", 1e300),
        ("max_tokens", 10**30),
        ("stop", ["x"]),
        ("stop_token_ids", [np.int64(3)]),
        ("seed", 2**64 - 1),
        ("logprobs", 0),
        ("logprobs", 1024),
    ],
)
def test_an_extreme_but_right_parameter_is_served(name: str, value: Any, llm: LLM, expected: list[int]) -> None:
    outputs = llm.generate(GOOD, SamplingParams(**{"max_tokens": 4, name: value}), progress=False)
    assert {output.finish_reason for output in outputs} <= {"stop", "length"}
    assert all(output.error is None for output in outputs)
    check_unharmed(llm, expected)


def test_an_unknown_parameter() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


P = SamplingParams
REQUESTS: dict[str, tuple[Callable[[LLM], object], str]] = {
    "params is a dict": (lambda llm: llm.engine.add_request(GOOD, {"temperature": 0}), "SamplingParams"),
    "params is the class": (lambda llm: llm.engine.add_request(GOOD, SamplingParams), "SamplingParams"),
    "params is a number": (lambda llm: llm.generate(GOOD, 3), "SamplingParams"),
    "params is a list, for one prompt of the engine": (lambda llm: llm.engine.add_request(GOOD, [P()]), "SamplingP"),
    "one of the params is a dict": (lambda llm: llm.generate([GOOD, GOOD], [P(), {}]), "SamplingParams"),
    "too few params": (lambda llm: llm.generate([GOOD, GOOD], [P()]), "1 SamplingParams for 2 prompts"),
    "too many params": (lambda llm: llm.generate(GOOD, [P(), P()]), "2 SamplingParams for 1 prompt"),
    "params without prompts": (lambda llm: llm.generate([], [P()]), "1 SamplingParams for 0 prompts"),
    "no params in a list": (lambda llm: llm.generate([GOOD], []), "0 SamplingParams for 1 prompt"),
    "an empty id": (lambda llm: llm.engine.add_request(GOOD, request_id=""), "request_id"),
    "an id of another type": (lambda llm: llm.engine.add_request(GOOD, request_id=7), "request_id"),
    "an id of bytes": (lambda llm: llm.engine.add_request(GOOD, request_id=b"a"), "request_id"),
    "on_token cannot be called": (lambda llm: llm.engine.add_request(GOOD, on_token=3), "on_token"),
    "a stop token outside the vocabulary": (lambda llm: llm.generate(GOOD, P(stop_token_ids=[320])), "stop_token_ids"),
    "a huge stop token": (lambda llm: llm.generate(GOOD, P(stop_token_ids=[HUGE])), "stop_token_ids"),
    "prompts is None": (lambda llm: llm.generate(None), "prompts"),
    "prompts is a number": (lambda llm: llm.generate(7), "prompts"),
    "prompts is bytes": (lambda llm: llm.generate(b"text"), "prompts"),
    "prompts is a dict": (lambda llm: llm.generate({"a": 1}), "prompts"),
    "prompts is a set": (lambda llm: llm.generate({"a"}), "prompts"),
    "prompts is a generator": (lambda llm: llm.generate(p for p in ("a", "b")), "prompts"),
    "an array of prompts": (lambda llm: llm.generate(np.array([[1, 2]])), "prompts"),
    "text and tokens mixed in one": (lambda llm: llm.generate(["a", 3]), "prompt"),
    "lists too deep": (lambda llm: llm.generate([[[1, 2]], [[3]]]), "[1, 2]"),
    "one bad of many": (lambda llm: llm.generate([GOOD] * 50 + [[999]]), "999"),
    "the first bad of many": (lambda llm: llm.generate([[True], *[GOOD] * 50]), "True"),
    "a stream of two samples": (lambda llm: llm.stream("a", P(n=2)), "n must be 1"),
    "a stream of a list": (lambda llm: llm.stream(["a", "b"]), "'a'"),
    "a stream with params of another type": (lambda llm: llm.stream("a", {"n": 1}), "SamplingParams"),
    "a chat without a template": (lambda llm: llm.chat([{"role": "user", "content": "Hi"}]), "chat template"),
    "a chat with nothing": (lambda llm: llm.chat(None), "chat template"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_bad_request(case: str, llm: LLM, expected: list[int]) -> None:
    call, word = REQUESTS[case]
    refused(lambda: call(llm), word=word)
    check_unharmed(llm, expected)


MESSAGES: dict[str, Any] = {
    "nothing": None,
    "text": "Hi",
    "a dict": {"role": "user", "content": "Hi"},
    "a list of text": ["Hi"],
    "no content": [{"role": "user"}],
    "no role": [{"content": "Hi"}],
    "a role that the template refuses": [{"role": "pirate", "content": "Ahoy"}],
    "content of another type": [{"role": "user", "content": 3}],
    "no messages": [],
}


@pytest.mark.parametrize("case", MESSAGES)
def test_bad_messages(case: str, llm: LLM, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('no such role') }}{% endif %}"
        "{{ 'Q: ' + m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(llm.engine.tokenizer, "chat_template", template, raising=False)
    assert llm.chat([{"role": "user", "content": "Hi"}], GREEDY)[0].prompt_token_ids == llm.engine.tokenizer.encode(
        "Q: Hi"
    )
    refused(lambda: llm.chat(MESSAGES[case]), seconds=3)
    check_unharmed(llm, expected)


def test_an_id_in_use_is_refused_and_the_first_request_is_served(llm: LLM, expected: list[int]) -> None:
    engine = llm.engine
    engine.add_request(GOOD, GREEDY, "mine")
    refused(lambda: engine.add_request(GOOD, request_id="mine"), word="'mine'")
    refused(lambda: engine.add_request(GOOD, P(n=2), request_id="mine"), word="'mine'")
    engine.add_request(GOOD, P(n=2, max_tokens=1), "pair")
    refused(lambda: engine.add_request(GOOD, request_id="pair"), word="'pair'")
    refused(lambda: engine.add_request(GOOD, request_id="pair#1"), word="'pair#1'")
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["pair", "pair", "mine"]
    assert outputs[-1].token_ids == expected
    check_unharmed(llm, expected)


def test_a_request_that_could_never_fit_is_refused(folder: Path) -> None:
    with LLM(folder, device="cpu", num_pages=2, page_size=4) as small:
        assert small.engine.config.max_model_len == 8
        refused(lambda: small.generate([1] * 8, P(max_tokens=1)), word="8 tokens")
        assert len(small.generate([1] * 7, P(max_tokens=HUGE, ignore_eos=True))[0].token_ids) == 1


def test_without_a_tokenizer_text_is_refused(folder: Path) -> None:
    with LLM(folder, device="cpu", tokenizer=None, num_pages=8) as llm:
        expected = llm.generate(GOOD, GREEDY)[0].token_ids
        refused(lambda: llm.generate("text"), word="no tokenizer")
        refused(lambda: llm.generate(GOOD, P(stop="x")), word="stop")
        refused(lambda: llm.chat([{"role": "user", "content": "Hi"}]), word="chat template")
        check_unharmed(llm, expected)


class Tokenizer:
    """A tokenizer that does as it is told."""

    def __init__(self, ids: Any = None, text: Any = "x"):
        self.ids, self.text = ids, text

    def encode(self, text: str, **options: Any) -> Any:
        if isinstance(self.ids, Exception):
            raise self.ids
        return self.ids

    def decode(self, ids: Any, **options: Any) -> Any:
        if isinstance(self.text, Exception):
            raise self.text
        return self.text


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        (None, "tokenizer"),
        (RuntimeError("no\nidea"), "tokenizer"),
        (KeyError(), "tokenizer"),
        (3, "tokenizer"),
        ([], "empty"),
        ([None], "None"),
        ([[1]], "[1]"),
        ([10**9], "vocabulary"),
        ("text", "'t'"),
    ],
    ids=repr,
)
def test_a_tokenizer_that_encodes_to_nonsense(ids: Any, word: str, folder: Path) -> None:
    with LLM(folder, device="cpu", tokenizer=Tokenizer(ids), num_pages=8) as llm:
        expected = llm.generate(GOOD, GREEDY)[0].token_ids
        refused(lambda: llm.generate("text"), word=word)
        check_unharmed(llm, expected)


class HalfATokenizer:
    def encode(self, text: str) -> list[int]:
        return GOOD


MODEL = ModelConfig("llama", 320, 64, 96, 2, 4, 2, 16, 256)
OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "misspelt": ({"page_sise": 8}, TypeError, "'page_size'"),
    "misspelt for another list": ({"tokeniser": None}, TypeError, "'tokenizer'"),
    "of another engine": ({"max_model_length": 8}, TypeError, "'max_model_len'"),
    "capital letters": ({"num_Pages": 8}, TypeError, "'num_pages'"),
    "unlike anything": ({"xyzzy": 1}, TypeError, "xyzzy"),
    "code from the hub": ({"trust_remote_code": True}, TypeError, "trust_remote_code"),
    "device of no kind": ({"device": "tpu"}, ConfigError, "device"),
    "device is a number": ({"device": 0}, ConfigError, "device"),
    "device is None": ({"device": None}, ConfigError, "device"),
    "dtype": ({"dtype": "float64"}, ConfigError, "dtype"),
    "dtype of torch": ({"dtype": torch.int32}, ConfigError, "dtype"),
    "kernels": ({"kernels": "triton"}, ConfigError, "kernels"),
    "FlashInfer on the CPU": ({"kernels": "flashinfer"}, KernelsUnavailableError, "flashinfer"),
    "page_size 0": ({"page_size": 0}, ConfigError, "page_size"),
    "page_size 65": ({"page_size": 65}, ConfigError, "page_size"),
    "page_size huge": ({"page_size": HUGE}, ConfigError, "page_size"),
    "page_size is text": ({"page_size": "16"}, ConfigError, "page_size"),
    "page_size is a float": ({"page_size": 16.0}, ConfigError, "page_size"),
    "page_size is NaN": ({"page_size": NAN}, ConfigError, "page_size"),
    "num_pages 0": ({"num_pages": 0}, ConfigError, "num_pages"),
    "num_pages negative": ({"num_pages": -5}, ConfigError, "num_pages"),
    "num_pages True": ({"num_pages": True}, ConfigError, "num_pages"),
    "num_pages beyond int32": ({"num_pages": 2**31}, ConfigError, "num_pages"),
    "num_pages beyond int32 slots": ({"num_pages": 2**31 - 2, "page_size": 64}, ConfigError, "num_pages"),
    "num_pages beyond memory": ({"num_pages": 10**8}, ConfigError, "num_pages"),
    "num_pages huge": ({"num_pages": HUGE}, ConfigError, "num_pages"),
    "memory_fraction 0": ({"memory_fraction": 0}, ConfigError, "memory_fraction"),
    "memory_fraction 90": ({"memory_fraction": 90}, ConfigError, "memory_fraction"),
    "memory_fraction NaN": ({"memory_fraction": NAN}, ConfigError, "memory_fraction"),
    "memory_fraction huge": ({"memory_fraction": HUGE}, ConfigError, "memory_fraction"),
    "max_running 0": ({"max_running": 0}, ConfigError, "max_running"),
    "max_running huge": ({"max_running": 2**40}, ConfigError, "max_running"),
    "max_batch_tokens below max_running": ({"max_batch_tokens": 8}, ConfigError, "max_batch_tokens"),
    "max_batch_tokens huge": ({"max_batch_tokens": 2**62}, ConfigError, "max_batch_tokens"),
    "max_model_len 1": ({"max_model_len": 1}, ConfigError, "max_model_len"),
    "max_model_len beyond the model": ({"max_model_len": 257}, ConfigError, "max_position_embeddings"),
    "max_model_len far beyond the model": ({"max_model_len": 2**22}, ConfigError, "max_model_len"),
    "max_model_len huge": ({"max_model_len": HUGE}, ConfigError, "max_model_len"),
    "prefix_caching": ({"prefix_caching": "yes"}, ConfigError, "prefix_caching"),
    "prefix_caching 1": ({"prefix_caching": 1}, ConfigError, "prefix_caching"),
    "no ranks": ({"tensor_parallel_size": 0}, ConfigError, "tensor_parallel_size"),
    "ranks that do not divide the heads": ({"tensor_parallel_size": 3}, ConfigError, "num_qo_heads"),
    "ranks that do not divide the K/V heads": ({"tensor_parallel_size": 4}, ConfigError, "num_kv_heads"),
    "a thousand ranks": ({"tensor_parallel_size": 1000}, ConfigError, "tensor_parallel_size"),
    "seed": ({"seed": -1}, ConfigError, "seed"),
    "seed is a float": ({"seed": 1.5}, ConfigError, "seed"),
    "weights": ({"weights": "dummy"}, ConfigError, "weights"),
    "weights is None": ({"weights": None}, ConfigError, "weights"),
    "weights is a list": ({"weights": ["random"]}, ConfigError, "weights"),
    "tokenizer is a number": ({"tokenizer": 3}, ConfigError, "tokenizer"),
    "tokenizer is True": ({"tokenizer": True}, ConfigError, "tokenizer"),
    "tokenizer cannot decode": ({"tokenizer": HalfATokenizer()}, ConfigError, "decode"),
    "tokenizer is a class": ({"tokenizer": Tokenizer}, ConfigError, "tokenizer"),
    "tokenizer is no folder": ({"tokenizer": "/no/such/folder"}, CheckpointError, "/no/such/folder"),
    "tokenizer is empty text": ({"tokenizer": ""}, CheckpointError, "tokenizer"),
    "observers is a number": ({"observers": 3}, ConfigError, "observers"),
    "observers is None": ({"observers": None}, ConfigError, "observers"),
    "page_manager is a number": ({"page_manager": 3}, ConfigError, "page_manager"),
    "scheduler is None": ({"scheduler": None}, ConfigError, "scheduler"),
    "sampler is text": ({"sampler": "greedy"}, ConfigError, "sampler"),
    "page_manager takes no arguments": ({"page_manager": lambda: None}, ContractError, "PageManager"),
    "scheduler takes no arguments": ({"scheduler": object}, ContractError, "Scheduler"),
    "sampler raises": ({"sampler": lambda vocab_size: 1 // 0}, ContractError, "ZeroDivisionError"),
    "model is a number": ({"model": 3}, CheckpointError, "model"),
    "model is no folder": ({"model": "/no/such/folder"}, CheckpointError, "/no/such/folder"),
    "model without weights": ({"model": MODEL}, ConfigError, "weights='random'"),
    "model as a dict": ({"model": dict(TINY)}, CheckpointError, "model"),
    "model beyond memory": (
        {"model": ModelConfig("llama", 2**22, 2**17, 2**19, 90, 1024, 1024, 128, 256), "weights": "random"},
        ConfigError,
        "weights take",
    ),
    "model and pages beyond memory": (
        {"model": MODEL, "weights": "random", "num_pages": 2**24},
        ConfigError,
        "num_pages",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option(case: str, folder: Path) -> None:
    """Refused before memory is taken or a process started, but for parts, which are made when the weights are there."""
    options, kind, word = OPTIONS[case]
    megabytes = 64 if kind is ContractError else 8
    refused(lambda: LLM(**{"model": folder, "device": "cpu"} | options), kind, word, seconds=3, megabytes=megabytes)


@pytest.mark.skipif(not NO_GPU, reason="for machines without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", torch.device("cuda")], ids=str)
def test_a_gpu_that_is_not_there(device: Any, folder: Path) -> None:
    refused(lambda: LLM(folder, device=device), ConfigError, "0 usable GPUs")


@pytest.mark.parametrize("value", ["gpu", "cuda:x", "", " cpu"])
def test_a_wrong_environment(value: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_DEVICE", value)
    refused(lambda: LLM(folder), ConfigError, "device")


def test_absurd_sizes_in_a_checkpoint_take_no_memory(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path)
    edit_config(folder, hidden_size=2**17, intermediate_size=2**19, vocab_size=2**22, num_hidden_layers=100)
    refused(lambda: LLM(folder, device="cpu", tokenizer=None), CheckpointError, "lacks tensors", seconds=3)
    edit_config(folder, num_hidden_layers=2)
    refused(lambda: LLM(folder, device="cpu", tokenizer=None), CheckpointError, "shape", seconds=3)


def test_a_broken_checkpoint_takes_no_memory(tmp_path: Path) -> None:
    """The headers are read before the model is made."""
    folder = tiny_checkpoint("llama", tmp_path, vocab_size=200_000)
    assert (folder / "model.safetensors").stat().st_size > 100_000_000
    edit_config(folder, vocab_size=200_001)
    refused(lambda: LLM(folder, device="cpu", tokenizer=None), CheckpointError, "embed_tokens")
    edit_config(folder, vocab_size=200_000, num_hidden_layers=1)
    refused(lambda: LLM(folder, device="cpu", tokenizer=None), CheckpointError, "model.layers.1.")


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path, tokenizer=True)
    (folder / "tokenizer.json").write_text("{")
    refused(lambda: LLM(folder, device="cpu"), CheckpointError, "tokenizer", seconds=5, megabytes=64)
    assert LLM(folder, device="cpu", tokenizer=None, num_pages=8).generate(GOOD, GREEDY)[0].finish_reason == "length"
    assert LLM(folder, device="cpu", tokenizer=byte_tokenizer(), num_pages=8).generate("a", GREEDY)[0].text


def test_a_closed_engine_says_so(folder: Path) -> None:
    llm = LLM(folder, device="cpu", num_pages=8)
    stream = llm.stream("a")
    llm.close()
    llm.close()
    calls = (
        lambda: llm.generate(GOOD),
        lambda: llm.stream("a"),
        lambda: next(stream),
        lambda: llm.engine.add_request(GOOD),
        llm.engine.step,
    )
    for call in calls:
        refused(call, EngineClosedError, "closed")
    llm.engine.abort("x")
    assert not llm.engine.has_unfinished()


def test_every_refusal_is_also_the_error_that_python_programs_expect() -> None:
    assert issubclass(InvalidRequestError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(EngineClosedError, RuntimeError)
    assert issubclass(InvalidRequestError, MiniLLMError)
    num_cases = len(PROMPTS) + len(REQUESTS) + len(OPTIONS) + sum(map(len, PARAMETERS.values()))
    assert num_cases >= 200
