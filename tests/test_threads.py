"""Two engines in two threads do not know of each other."""

import ast
import importlib
import pkgutil
import threading
import types
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint

import minillm
from minillm import LLM, SamplingParams

PROMPTS = [[5, 6, 7], list(range(8, 40)), [9] * 20, list(range(100, 117))]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_pages": 12, "page_size": 4, "max_batch_tokens": 16, "max_running": 3},  # preempts
    "qwen3": {"num_pages": 64, "page_size": 16, "max_batch_tokens": 256, "dtype": "bfloat16"},
    "qwen2": {"num_pages": 40, "page_size": 8, "prefix_caching": False},
}
KINDS = (
    SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=14, ignore_eos=True),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"llama": {}, "qwen3": {"num_hidden_layers": 3}, "qwen2": {"num_attention_heads": 8, "vocab_size": 300}}
    return {
        family: tiny_checkpoint(family, tmp_path_factory.mktemp(family), **sizes[family], max_position_embeddings=128)
        for family in FAMILIES
    }


def make(family: str, folders: dict[str, Path]) -> LLM:
    return LLM(folders[family], device="cpu", tokenizer=None, **FAMILIES[family])


def serve(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output.token_ids for params in KINDS for output in llm.generate(prompts, params, progress=False)]


def prompts_of(family: str) -> list[list[int]]:
    return [prompt[: 30 if family == "llama" else 40] for prompt in PROMPTS]


@pytest.mark.parametrize("families", [("llama", "qwen3"), ("qwen2", "qwen2"), ("llama", "qwen2", "qwen3")])
def test_engines_in_threads_give_what_they_give_alone(families: tuple[str, ...], folders: dict[str, Path]) -> None:
    """Made, run and freed in their threads, of different shapes, dtypes, page sizes; step by step at the same time."""
    expected = {}
    for family in set(families):
        with make(family, folders) as llm:
            expected[family] = serve(llm, prompts_of(family))
    assert len({str(tokens) for tokens in expected.values()}) == len(expected)
    barrier = threading.Barrier(len(families))
    results: list[Any] = [None] * len(families)

    def work(index: int, family: str) -> None:
        try:
            llm = make(family, folders)
            barrier.wait(30)
            results[index] = [serve(llm, prompts_of(family)) for _ in range(3)]
            assert llm.engine.page_manager.num_used == 0
            llm.engine.page_manager.check_invariants()
        except BaseException as error:
            results[index] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=item) for item in enumerate(families)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert results == [[expected[family]] * 3 for family in families]


def test_engines_take_turns_within_a_thread(folders: dict[str, Path]) -> None:
    """Step by step, one after the other, half a request here and half a request there."""
    expected = {}
    for family in FAMILIES:
        with make(family, folders) as llm:
            expected[family] = [output.token_ids for output in llm.generate(prompts_of(family), KINDS[0])]
    engines = {family: make(family, folders) for family in FAMILIES}
    outputs: dict[str, dict[str, list[int]]] = {family: {} for family in FAMILIES}
    for family, llm in engines.items():
        for index, prompt in enumerate(prompts_of(family)):
            llm.engine.add_request(prompt, KINDS[0], str(index))  # the same ids in each
    while any(llm.engine.has_unfinished() for llm in engines.values()):
        for family, llm in engines.items():
            for output in llm.engine.step():
                outputs[family][output.request_id] = output.token_ids
    assert {family: [tokens[str(i)] for i in range(4)] for family, tokens in outputs.items()} == expected


def modules() -> list[types.ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(minillm.__path__, "minillm.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


MUTABLE = (list, dict, set, bytearray, deque, defaultdict, OrderedDict, torch.Tensor, np.ndarray, threading.local)


def is_mutable(value: object) -> bool:
    return isinstance(value, MUTABLE) and not isinstance(value, types.MappingProxyType)


def test_nothing_of_a_module_changes_while_engines_run(folders: dict[str, Path]) -> None:
    """Tables are allowed (UPPER_CASE, made on import): what is in them is the same before and after."""

    def state() -> dict[tuple[str, str], str]:
        found = {}
        for module in modules():
            for name, value in vars(module).items():
                if not name.startswith("__"):
                    found[module.__name__, name] = repr(value) if is_mutable(value) else str(id(value))
        return found

    before = state()
    assert len(before) > 200
    first, second = make("llama", folders), make("qwen3", folders)
    serve(first, prompts_of("llama"))
    serve(second, prompts_of("qwen3"))
    after = state()
    assert {key: after[key] for key in before} == before
    assert {name for _, name in after.keys() - before.keys()} <= {"LLM", "LLMEngine", "SamplingParams"}


def test_mutable_values_of_modules_and_classes_are_tables() -> None:
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith(("__", "@")):
                continue
            assert not is_mutable(value) or name.isupper(), f"{module.__name__}.{name}"
            if isinstance(value, type) and value.__module__ == module.__name__:
                for attribute, held in vars(value).items():
                    is_dunder = attribute.startswith("__") or attribute in ("_fields", "_field_defaults")
                    is_enum_or_protocol = attribute.startswith(("_abc", "_member", "_value2", "_unhash", "_hash"))
                    if not is_dunder and not is_enum_or_protocol:
                        assert not is_mutable(held) or attribute.isupper(), f"{value}.{attribute}"


def test_no_setting_of_torch_is_changed() -> None:
    """They are global: another engine, or the reader's own code, would see it."""
    forbidden = {
        "set_default_dtype",
        "set_default_device",
        "set_default_tensor_type",
        "manual_seed",
        "set_grad_enabled",
    }
    forbidden |= {"set_float32_matmul_precision", "use_deterministic_algorithms", "set_num_threads", "seed"}
    allowed = {("distributed.py", "set_num_threads")}  # of a worker, which is a process of its own
    for path in Path(minillm.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                is_global = isinstance(owner, ast.Name) and owner.id in ("torch", "random", "np")
                name = (path.name, node.func.attr)
                assert not (is_global and node.func.attr in forbidden) or name in allowed, (name, node.lineno)


def test_objects_of_two_engines_are_two(folders: dict[str, Path]) -> None:
    """No object that can change is reachable from both, caches of kernels and wrappers included."""
    first, second = make("qwen2", folders), make("qwen2", folders)
    serve(first, prompts_of("qwen2"))
    serve(second, prompts_of("qwen2"))

    def reachable(root: object) -> dict[int, object]:
        found: dict[int, object] = {}
        stack = [root]
        while stack:
            value = stack.pop()
            if id(value) in found or isinstance(value, (type, types.ModuleType, types.FunctionType, str, bytes, int)):
                continue
            found[id(value)] = value
            if isinstance(value, dict):
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple, set, frozenset, deque)):
                stack += list(value)
            else:
                stack += list(getattr(value, "__dict__", {}).values())
                slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
                stack += [getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)]
                if isinstance(value, types.MethodType):
                    stack.append(value.__self__)
        return found

    one, two = reachable(first), reachable(second)
    assert len(one) > 150
    assert any(isinstance(value, torch.Tensor) for value in one.values())
    shared = [one[key] for key in one.keys() & two.keys() if is_mutable(one[key])]
    assert shared == []
    memory = []
    for found in (one, two):
        tensors = [value for value in found.values() if isinstance(value, torch.Tensor) and value.numel()]
        memory.append({tensor.untyped_storage().data_ptr() for tensor in tensors})
    assert len(memory[0]) > 20
    assert not memory[0] & memory[1]
