"""The checkers' frame says the right thing in every case; and every folded solution in the book passes its checker."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import notebook_tools
import numpy as np
import pytest
import torch

from minillm.lab import checks
from minillm.lab.checking import (
    Comparison,
    NotAttemptedError,
    WrongAnswerError,
    exercise,
    first_difference,
    holds,
    raises,
    same,
)

SOLUTIONS = [
    pytest.param(name, source, id=f"{path.stem[:2]}-{name}")
    for path in notebook_tools.paths_on_disk()
    for name, source in notebook_tools.solution_sources(notebook_tools.read(path))
]


@exercise("Double it")
def double(attempt) -> Iterator[Comparison]:
    for x in (1, 2):
        yield same(f"double({x})", attempt(x), 2 * x)
    yield raises("double('a')", TypeError, attempt, "a")


def good(x: int) -> int:
    return 2 * (x + 0)


def verdict(attempt, capsys: pytest.CaptureFixture) -> str:
    assert double(attempt) is None  # a cell that ends with a checker shows its verdict, nothing else
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINILLM_STRICT", raising=False)


def test_success(capsys: pytest.CaptureFixture) -> None:
    assert verdict(good, capsys) == "✓ Double it: 3 checks passed.\n"


def test_not_attempted_is_a_message(capsys: pytest.CaptureFixture) -> None:
    def unfinished(x):
        raise NotImplementedError

    for attempt in (None, NotImplemented, lambda x: NotImplemented, unfinished):
        assert verdict(attempt, capsys) == "… Double it: not attempted yet.\n"


def test_first_difference_is_named(capsys: pytest.CaptureFixture) -> None:
    assert verdict(lambda x: x + 1, capsys) == "✗ Double it: double(2)\n    expected 4, got 3\n"
    assert "expected TypeError, but it returned 'aa'" in verdict(lambda x: 2 * x, capsys)
    assert "expected TypeError, got ValueError" in verdict(lambda x: 2 * x if x != "a" else int(x), capsys)


def test_an_attempt_that_fails_is_an_answer(capsys: pytest.CaptureFixture) -> None:
    assert (
        verdict(lambda x: 1 // 0, capsys)
        == "✗ Double it: it raised ZeroDivisionError: integer division or modulo by zero\n"
    )
    assert "after 1 passed checks it raised KeyError" in verdict(lambda x: {1: 2}[x], capsys)


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_STRICT", "1")
    with pytest.raises(NotAttemptedError):
        double(None)
    with pytest.raises(WrongAnswerError, match=r"double\(2\)"):
        double(lambda x: x + 1)
    double(good)


def test_a_checker_that_compares_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="compares nothing"):
        exercise("Nothing")(lambda attempt: iter(()))(1)


@pytest.mark.parametrize(
    ("got", "expected", "part"),
    [
        (torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]), "first difference at page 2: expected 3, got 4"),
        ([1, 2, 4], np.array([1, 2, 3]), "first difference at page 2: expected 3, got 4"),
        (torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.5, 1.0]]), "page (1, 0): expected 0.5, got 0 (2 of 4 differ)"),
        (torch.zeros(3), torch.zeros(2), "expected shape (2,), got shape (3,)"),
        ("abc", np.zeros(2), "got 'abc'"),
        (object(), np.zeros(2), "an object of type object"),
        ([1, 2], [1, 2, 3], "first difference at page 2: nothing there; expected 3 items, got 2"),
        ([[1], [2, 5]], [[1], [2, 3]], "first difference at page 1, page 1: expected 3, got 5"),
        ({"a": 1}, {"a": 2}, "first difference at ['a']: expected 2, got 1"),
        ({"a": 1}, {"b": 1}, "expected {'b': 1}, got {'a': 1}"),
        (float("nan"), 1.0, "expected 1, got nan"),
        (5, None, "expected None, got 5"),
        (None, 5, "expected 5, got None"),
        (3, [3], "expected [3], got 3"),
    ],
)
def test_differences(got, expected, part: str) -> None:
    assert part in (first_difference(got, expected, index_name="page") or "none")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0, 2.0])),
        (1.00001, 1.0),
        (np.int32(3), 3),
        ((1, [2, torch.tensor([3])]), [1, (2, torch.tensor([3]))]),
        ({"a": [1]}, {"a": (1,)}),
        ("x", "x"),
        (True, True),
    ],
)
def test_equal_values(got, expected) -> None:
    assert first_difference(got, expected) is None


def test_holds() -> None:
    assert holds("x", True, "no").difference is None and holds("x", False, "no").difference == "no"


def test_checks_are_found_by_name() -> None:
    assert "ex01_cache_bytes" in dir(checks)
    assert checks.ex01_cache_bytes.__name__ == "ex01_cache_bytes"
    with pytest.raises(AttributeError, match="chapter 01 has ex01_cache_bytes"):
        _ = checks.ex01_nothing
    with pytest.raises(AttributeError, match="chapter 99 has no checkers"):
        _ = checks.ex99_nothing
    with pytest.raises(AttributeError, match=r"there is no checker 'nothing'$"):
        _ = checks.nothing


def test_every_checker_has_a_solution_in_its_notebook() -> None:
    solved = {name for _, name, *_ in ((None, *param.values) for param in SOLUTIONS)}
    chapters = {path.name[:2] for path in notebook_tools.paths_on_disk()}
    assert {name for name in dir(checks) if name[2:4] in chapters} == solved


@pytest.mark.parametrize(("name", "source"), SOLUTIONS)
def test_solution(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set-up, what is tagged `define`, and the solution alone, in strict mode: the checker accepts it."""
    monkeypatch.setenv("MINILLM_STRICT", "1")
    monkeypatch.chdir(notebook_tools.NOTEBOOKS)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, f"<solution of {name}>", "exec"), {"__name__": "__main__"})
    assert any(line.startswith("✓") for line in printed.getvalue().splitlines()), printed.getvalue()
