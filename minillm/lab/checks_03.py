"""The checkers of chapter 03, "No globals"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

from minillm.context import Chunk, InferenceContext
from minillm.lab.checking import Comparison, exercise, holds, same
from minillm.page_manager import PageManager
from minillm.reference import append_paged_kv_cache


def _norm(x: Any) -> Any:
    return x / SCALE  # type: ignore[name-defined]  # noqa: F821


def _layer(x: Any) -> Any:
    return norm(x) + math.sqrt(CONTEXT.position)  # type: ignore[name-defined]  # noqa: F821


def _model(x: Any, depth: int) -> Any:
    return model(layer(x), depth - 1) if depth else x  # type: ignore[name-defined]  # noqa: F821


def _pure(x: Any, context: Any) -> Any:
    return x * context.position


def _module() -> dict[str, Any]:
    """The names of a module of its own, in which the functions above are `norm`, `layer`, `model` and `pure`."""
    names: dict[str, Any] = {"CONTEXT": {"position": 3}, "SCALE": [2.0], "UNUSED": [], "math": math}
    for function in (_norm, _layer, _model, _pure):
        name = function.__name__[1:]
        names[name] = FunctionType(function.__code__, names, name)
    return names


@exercise("What the signature hides")
def ex03_hidden_state(attempt: Callable[[Callable[..., Any]], list[str]]) -> Iterator[Comparison]:
    """`attempt(function)` -> sorted names of the module-level variables that it reads, through what it calls."""
    module = _module()
    cases = {
        "a function of its arguments alone": ("pure", []),
        "norm(x) reads SCALE": ("norm", ["SCALE"]),
        "layer(x) reads CONTEXT, and calls norm; math is a module": ("layer", ["CONTEXT", "SCALE"]),
        "model(x, depth) calls layer, and itself": ("model", ["CONTEXT", "SCALE"]),
    }
    for what, (name, expected) in cases.items():
        yield same(what, attempt(module[name]), expected)


def _context(lengths: dict[str, int], starts: dict[str, int], page_size: int) -> InferenceContext:
    """A step that computes the tokens of each request from its start on."""
    pages = PageManager(num_pages=16, page_size=page_size, prefix_caching=False)
    for turn in range(max(lengths.values())):  # by turns, so that no request's pages lie in order
        for name, length in lengths.items():
            if turn == 0:
                pages.allocate(name, range(length))
            if turn < length:
                pages.extend(name, turn + 1)
    arrays = pages.batch_arrays([Chunk(name, starts[name], length) for name, length in lengths.items()])
    names = ("positions", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "batch_indices")
    tensors: dict[str, Any] = {name: torch.from_numpy(getattr(arrays, name)) for name in names}
    return InferenceContext(kernels=None, page_manager=pages, **tensors)


@exercise("Where the context says")
def ex03_append(
    attempt: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, InferenceContext], None],
) -> Iterator[Comparison]:
    """`attempt(k, v, kv_layer, context)` writes the step's keys and values into the pages, and returns nothing."""
    cases = {
        "one request, one page": ({"a": 3}, {"a": 0}, 4),
        "one request, three pages": ({"a": 9}, {"a": 0}, 4),
        "one decode": ({"a": 9}, {"a": 8}, 4),
        "two prompts whose pages alternate": ({"a": 9, "b": 6}, {"a": 0, "b": 0}, 2),
        "a decode beside a second chunk": ({"a": 9, "b": 6}, {"a": 8, "b": 3}, 4),
        "pages of one token": ({"a": 3, "b": 2}, {"a": 0, "b": 0}, 1),
    }
    generator = torch.Generator().manual_seed(3)
    for what, (lengths, starts, page_size) in cases.items():
        context = _context(lengths, starts, page_size)
        k, v = torch.randn(2, context.num_tokens, 2, 8, generator=generator)
        expected = torch.zeros(17, 2, page_size, 2, 8)
        csr = (context.kv_indices, context.kv_indptr, context.kv_last_page_len)
        append_paged_kv_cache(k, v, context.batch_indices, context.positions, expected, *csr)
        got = torch.zeros_like(expected)
        attempt(k, v, got, context)
        yield same(what, got, expected, index_name="(page, K or V, slot, head, dimension)")


@exercise("A context to keep")
def ex03_snapshot(attempt: Callable[[InferenceContext], InferenceContext]) -> Iterator[Comparison]:
    """`attempt(context)` -> a context of its own memory."""
    buffer = torch.arange(6, dtype=torch.int32)
    kernels, page_manager, attention = object(), PageManager(2, 4), object()
    fields: dict[str, Any] = {"kernels": kernels, "page_manager": page_manager, "attention": attention}
    context = InferenceContext(positions=buffer[:4], kv_indices=buffer[4:], **fields)
    got = attempt(context)
    yield same("it is a context", type(got).__name__, "InferenceContext")
    yield holds("it is a new one", got is not context, "it is the context that came in")
    yield same("its positions", got.positions, context.positions, index_name="row")
    for name, value in fields.items():
        yield holds(f"{name} is the same object", getattr(got, name) is value, f"{name} is another object")
    yield holds("group is the same object", got.group is context.group, "group is another object")
    yield holds("fields that were not given", got.qo_indptr is None, "qo_indptr was None, and is something now")
    buffer.fill_(-1)  # the next step
    yield same("positions after the next step", got.positions, torch.arange(4), index_name="row")
    yield same("kv_indices after the next step", got.kv_indices, torch.arange(4, 6), index_name="page")
    yield same("the context that came in still sees its buffer", context.positions, buffer[:4], index_name="row")
