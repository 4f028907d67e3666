"""What coursework checkers are made of: compare an attempt with what is expected, and say where the two first differ.

A checker is a generator of comparisons, made one by `@exercise`:

    @exercise("Mask the future")
    def ex01_mask(attempt):
        for num_queries, num_keys in ((3, 3), (1, 4)):
            expected = causal_mask(num_queries, num_keys)
            yield same(f"mask({num_queries}, {num_keys})", attempt(num_queries, num_keys), expected)

It runs up to the first comparison that fails, and says what was expected, what came, and where the two first differ. An
attempt that is None, that returns NotImplemented or raises NotImplementedError is not wrong but "not attempted yet": a
message. With `MINILLM_STRICT=1` in the environment (for graders and tests), both raise.

The checkers of chapter NN are in `checks_NN.py`; notebooks reach all of them as `checks.exNN_name`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TOLERANCE = 1e-4
MAX_SHOWN = 400


class WrongAnswerError(AssertionError):
    """An attempt that a checker does not accept; raised only with `MINILLM_STRICT=1`."""


class NotAttemptedError(AssertionError):
    """An exercise that nobody has tried; raised only with `MINILLM_STRICT=1`."""


@dataclass(frozen=True)
class Comparison:
    """One thing that was checked: what it is called, and the first difference (None: there is none)."""

    what: str
    difference: str | None


def same(what: str, got: Any, expected: Any, tolerance: float = TOLERANCE, index_name: str = "index") -> Comparison:
    """Compare two values of any depth; numbers within `tolerance`. `index_name` says what an index counts ("page")."""
    return Comparison(what, first_difference(got, expected, tolerance, index_name))


def holds(what: str, condition: bool, otherwise: str) -> Comparison:
    """`condition` should be true; `otherwise` says what it means that it is not."""
    return Comparison(what, None if condition else otherwise)


def raises(what: str, error: type[BaseException], function: Callable[..., Any], *arguments: Any) -> Comparison:
    """`function(*arguments)` should raise `error`."""
    try:
        got = function(*arguments)
    except NotImplementedError:
        raise
    except error:
        return Comparison(what, None)
    except Exception as other:
        return Comparison(what, f"expected {error.__name__}, got {type(other).__name__}: {other}")
    if got is NotImplemented:
        raise NotImplementedError
    return Comparison(what, f"expected {error.__name__}, but it returned {_shown(got)}")


def exercise(title: str) -> Callable[[Callable[[Any], Iterator[Comparison]]], Callable[..., None]]:
    """Make a checker of a generator of comparisons: `checker(attempt)` prints a verdict.

    Raises:
        WrongAnswerError, NotAttemptedError: with `MINILLM_STRICT=1`, instead of printing.
    """

    def decorate(comparisons: Callable[[Any], Iterator[Comparison]]) -> Callable[..., None]:
        @functools.wraps(comparisons)
        def checker(attempt: Any = None) -> None:
            try:
                num_passed, problem = _run(comparisons, attempt)
            except NotImplementedError:
                message = f"… {title}: not attempted yet."
                if _is_strict():
                    raise NotAttemptedError(message) from None
                print(message)
                return
            if problem:
                message = f"✗ {title}: {problem}"
                if _is_strict():
                    raise WrongAnswerError(message)
                print(message)
                return
            print(f"✓ {title}: {num_passed} check{'s' if num_passed != 1 else ''} passed.")

        return checker

    return decorate


def _is_strict() -> bool:
    return os.environ.get("MINILLM_STRICT", "") not in ("", "0")


def _run(comparisons: Callable[[Any], Iterator[Comparison]], attempt: Any) -> tuple[int, str]:
    """How many comparisons passed, and what is wrong with the first that did not."""
    if attempt is None or attempt is NotImplemented:
        raise NotImplementedError
    num_passed = 0
    try:
        for comparison in comparisons(attempt):
            if comparison.difference is not None:
                return num_passed, f"{comparison.what}\n    {comparison.difference}"
            num_passed += 1
    except NotImplementedError:
        raise
    except Exception as error:  # whatever the attempt raises is the answer, not a failure of the checker
        after = f"after {num_passed} passed checks it raised" if num_passed else "it raised"
        return num_passed, f"{after} {type(error).__name__}: {error}"
    if not num_passed:
        raise ValueError(f"{comparisons.__name__} compares nothing")
    return num_passed, ""


def first_difference(got: Any, expected: Any, tolerance: float = TOLERANCE, index_name: str = "index") -> str | None:
    """Where `got` first differs from `expected`, in words; None if it does not."""
    if got is NotImplemented:
        raise NotImplementedError
    got, expected = _plain(got), _plain(expected)
    if isinstance(expected, np.ndarray):
        return _array_difference(got, expected, tolerance, index_name)
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or got.keys() != expected.keys():
            return _expected_got(expected, got)
        pairs = ((f"[{key!r}]", got[key], expected[key]) for key in expected)
    elif isinstance(expected, Sequence) and not isinstance(expected, (str, bytes)):
        if not isinstance(got, Sequence) or isinstance(got, (str, bytes)):
            return _expected_got(expected, got)
        pairs = ((f"{index_name} {i}", a, b) for i, (a, b) in enumerate(zip(got, expected, strict=False)))
    else:
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (got, expected))
        equal = abs(got - expected) <= tolerance if numbers and isinstance(expected, float) else got == expected
        return None if equal or got is expected else _expected_got(expected, got)
    for where, one, other in pairs:
        difference = first_difference(one, other, tolerance, index_name)
        if difference:
            inner = difference.splitlines()[-1].strip()
            deeper = inner.removeprefix("first difference at ")
            place = f"{where}, {deeper}" if deeper != inner else f"{where}: {inner}"
            return f"{_expected_got(expected, got)}\n    first difference at {place}"
    if len(got) != len(expected):
        shorter = min(len(got), len(expected))
        missing = "nothing" if len(got) < len(expected) else "something"
        end = f"first difference at {index_name} {shorter}: {missing} there"
        return f"{_expected_got(expected, got)}\n    {end}; expected {len(expected)} items, got {len(got)}"
    return None


def _plain(value: Any) -> Any:
    """Tensors as arrays, NumPy's scalars as Python's, attempts at None as what they are."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return value.item() if isinstance(value, np.generic) else value


def _array_difference(got: Any, expected: np.ndarray, tolerance: float, index_name: str) -> str | None:
    if not isinstance(got, np.ndarray):
        try:
            array = np.asarray(got)
        except (TypeError, ValueError):  # rows of different lengths
            array = np.empty(0, dtype=object)
        if array.dtype.kind not in "biuf":
            return f"expected an array of shape {expected.shape}, got {_shown(got)}"
        got = array
    if got.shape != expected.shape:
        return f"expected shape {expected.shape}, got shape {got.shape}"
    if np.issubdtype(expected.dtype, np.floating):
        equal = np.isclose(got.astype(np.float64), expected.astype(np.float64), tolerance, tolerance, equal_nan=True)
    else:
        equal = got == expected
    if equal.all():
        return None
    place = tuple(int(i) for i in np.argwhere(~equal)[0])
    where = f"{index_name} {place[0] if len(place) == 1 else place}" if place else "its value"
    here = f"first difference at {where}: {_expected_got(expected[place], got[place])}"
    count = int((~equal).sum())
    return here if expected.size == 1 else f"{here} ({count} of {expected.size} differ)"


def _expected_got(expected: Any, got: Any) -> str:
    return f"expected {_shown(expected)}, got {_shown(got)}"


def _shown(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, np.ndarray):
        return np.array2string(value, precision=4, threshold=20)
    text = repr(value)
    if " at 0x" in text:
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
