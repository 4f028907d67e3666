"""Every coursework checker by its name: `checks.ex02_allocator(MyAllocator)`. Those of chapter NN are in
`checks_NN.py`.

A chapter's checkers are imported when one of them is first asked for, so that chapter 01 does not load chapter 10's
modules. How to write one: `minillm.lab.checking`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def checkers_of(chapter: str) -> dict[str, Callable[..., None]]:
    """The checkers of one chapter ("01"), by name; empty when it has none."""
    if not (Path(__file__).parent / f"checks_{chapter}.py").exists():
        return {}
    module = import_module(f"minillm.lab.checks_{chapter}")
    return {name: value for name, value in vars(module).items() if name.startswith(f"ex{chapter}_")}


def __getattr__(name: str) -> Callable[..., None]:
    chapter = re.match(r"ex(\w\w)_", name)
    known = checkers_of(chapter[1]) if chapter else {}
    if name not in known:
        hint = f"; chapter {chapter[1]} has {', '.join(known) or 'no checkers'}" if chapter else ""
        raise AttributeError(f"there is no checker {name!r}{hint}")
    return known[name]


def __dir__() -> list[str]:
    modules = sorted(Path(__file__).parent.glob("checks_*.py"))
    return [name for module in modules for name in checkers_of(module.stem.removeprefix("checks_"))]
