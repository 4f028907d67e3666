"""Checks of single values, with messages that name what is wrong. The caller says which exception that is."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

from minillm.errors import ConfigError


def shown(value: object) -> str:
    """A value in an error message: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python does not print integers of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
    """What an exception says, on one line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def integer(name: str, value: Any, low: int, high: float = math.inf, error: type[Exception] = ConfigError) -> int:
    """`value` as an int from `low` to `high`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} must be an integer, got {shown(value)}")
    if not low <= int(value) <= high:
        bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise error(f"{name} must be {bounds}, got {shown(int(value))}")
    return int(value)


def number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    above: bool = True,
    error: type[Exception] = ConfigError,
) -> float:
    """`value` as a finite float up to `high`, and above `low` (with `above=False`, at least `low`)."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_inside = is_number and (low < value if above else low <= value) and value <= high  # NaN is neither
    try:
        is_finite = is_inside and math.isfinite(float(value))
    except OverflowError:  # an integer beyond any float
        is_finite = False
    if not is_finite:
        bounds = f"{'above' if above else 'of at least'} {low:g}" + ("" if high == math.inf else f", at most {high:g}")
        raise error(f"{name} must be a number {bounds}, got {shown(value)}")
    return float(value)


def one_of(name: str, value: Any, allowed: Iterable[Any], error: type[Exception] = ConfigError) -> Any:
    """`value`, which must equal one of `allowed` and be of its type."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in allowed):
        raise error(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")
    return value
