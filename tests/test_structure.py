"""What the shape of the code promises: no hidden state, imports that point down, small modules, the whole book.

Every rule is a function from source text to a list of complaints. Each is run on the library, and on snippets that
break it, so that a rule which no longer bites is noticed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minillm"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
ENGINE = [path for path in LIBRARY if path.parent == PACKAGE]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# From the bottom up: a module imports only what stands before it. A concept may fill several modules, which share its
# first word and its place (`reference`, `reference_plan`); among themselves they must only be free of cycles.
STACK = (
    "errors",
    "doctor",
    "interrupts",
    "validation",
    "context",
    "rope",
    "config",
    "weights",
    "reference",
    "page_manager",
    "devices",
    "wrappers",
    "layers",
    "model",
    "memory",
    "loader",
    "sampling_params",
    "request",
    "detokenizer",
    "intake",
    "filters",
    "protocols",
    "sampler",
    "scheduler",
    "metrics",
    "runner",
    "distributed",
    "faults",
    "startup",
    "engine",
    "llm",
    "__init__",
    "cli",
    "__main__",
)
NARROW = {  # the modules that may import even less
    "context": frozenset(),
    "weights": frozenset({"config", "errors", "validation"}),
    "page_manager": frozenset({"context", "errors", "validation"}),
    "layers": frozenset({"context", "weights"}),
    "doctor": frozenset({"errors"}),
}
PATH_OF_A_TOKEN = (
    "config",
    "context",
    "page_manager",
    "wrappers",
    "layers",
    "model",
    "loader",
    "runner",
    "scheduler",
    "sampler",
    "request",
    "engine",
)
MAX_MODULE_LINES, MAX_PATH_LINES, MAX_PERIPHERY_LINES = 400, 2500, 2000


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def every(rule: Callable[[str], list[str]], paths: list[Path]) -> list[str]:
    return [f"{short(path)}:{complaint}" for path in paths for complaint in rule(path.read_text(encoding="utf-8"))]


# --- no hidden state -------------------------------------------------------------------------------------------------

IMMUTABLE_CALLS = frozenset(
    "bool bytes compile complex float frozenset int object range slice str tuple "
    "NamedTuple NewType ParamSpec TypeVar MappingProxyType Path PurePath Struct namedtuple getLogger "
    "attrgetter itemgetter methodcaller partial partialmethod property classmethod staticmethod "
    "exp format getsizeof join joinpath len log log2 lstrip max min resolve rstrip split sqrt strip sum version "
    "device dtype finfo iinfo".split()
)
MUTATORS = frozenset(
    "add append appendleft clear discard extend extendleft insert move_to_end pop popitem popleft remove reverse "
    "setdefault sort update copy_ fill fill_ zero_ __setitem__".split()
)
CACHES = frozenset({"cache", "lru_cache"})


def last_name(node: ast.AST) -> str:
    """`lru_cache` of `functools.lru_cache(maxsize=1)`; "" of what has no name."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def root_name(node: ast.AST) -> str:
    """`a` of `a.b[0].c`."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def frozen_classes(tree: ast.Module) -> set[str]:
    """The classes of a module whose instances cannot change: frozen dataclasses, NamedTuples, Enums."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            frozen = any(
                isinstance(d, ast.Call)
                and last_name(d) == "dataclass"
                and any(k.arg == "frozen" and getattr(k.value, "value", False) is True for k in d.keywords)
                for d in node.decorator_list
            )
            if frozen or any(last_name(base) in {"NamedTuple", "Enum", "IntEnum", "StrEnum"} for base in node.bases):
                names.add(node.name)
    return names


def is_mutable(value: ast.AST | None, frozen: set[str]) -> bool:
    """Whether an expression makes a value that could be changed later; an unknown call counts as one."""
    if value is None or isinstance(
        value, ast.Constant | ast.Name | ast.Attribute | ast.JoinedStr | ast.Lambda | ast.Compare
    ):
        return False
    if isinstance(value, ast.Tuple):
        return any(is_mutable(element, frozen) for element in value.elts)
    if isinstance(value, ast.Call):
        name = last_name(value)
        if name == "tuple" or name == "frozenset" or name == "MappingProxyType":
            return False
        return name not in IMMUTABLE_CALLS | frozen
    if isinstance(value, ast.Subscript | ast.UnaryOp | ast.Starred):
        return False
    if isinstance(value, ast.BinOp):
        return is_mutable(value.left, frozen) or is_mutable(value.right, frozen)
    if isinstance(value, ast.IfExp):
        return is_mutable(value.body, frozen) or is_mutable(value.orelse, frozen)
    if isinstance(value, ast.BoolOp):
        return any(is_mutable(part, frozen) for part in value.values)
    return True  # lists, dicts, sets, comprehensions, generators, and whatever comes to exist


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when this body does: in `if`, `try`, `with`, loops, not in functions or classes."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        for name in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def targets_of(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [t for target in node.targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def no_global(source: str) -> list[str]:
    """No `global` statement, and no writing to `globals()` instead."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global):
            complaints.append(f"{node.lineno}: global {', '.join(node.names)}")
        for target in written_to(node):
            if isinstance(target, ast.Call) and last_name(target) == "globals":
                complaints.append(f"{target.lineno}: globals() is written to")
    return complaints


def written_to(node: ast.AST) -> list[ast.expr]:
    """The collections that this node changes: `a` of `a[0] = 1`, of `del a[0]`, of `a.append(1)`, of `a += [1]`."""
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        whole = [t for t in targets_of(node) if isinstance(node, ast.AugAssign) and not isinstance(t, ast.Subscript)]
        return whole + [t.value for t in targets_of(node) if isinstance(t, ast.Subscript)]
    if isinstance(node, ast.Delete):
        return [t.value for t in node.targets if isinstance(t, ast.Subscript)]
    is_mutation = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
    return [node.func.value] if is_mutation else []


def no_module_state(source: str) -> list[str]:
    """Module-level names are constants; importing changes nothing elsewhere; UPPER_CASE tables are never written to."""
    tree = ast.parse(source)
    frozen, tables, complaints = frozen_classes(tree), set(), []
    for node in statements(tree.body):
        for target in targets_of(node):
            if not isinstance(target, ast.Name):
                complaints.append(f"{node.lineno}: importing this module changes {ast.unparse(target)}")
            elif target.id.startswith("__") and target.id.endswith("__"):
                continue
            elif isinstance(node, ast.AugAssign) or is_mutable(getattr(node, "value", None), frozen):
                plain_table = isinstance(getattr(node, "value", None), ast.Dict | ast.DictComp | ast.List | ast.Set)
                if (
                    plain_table
                    and re.fullmatch(r"_?[A-Z][A-Z0-9_]*", target.id)
                    and not isinstance(node, ast.AugAssign)
                ):
                    tables.add(target.id)
                else:
                    complaints.append(f"{node.lineno}: module-level mutable state {target.id}")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            complaints.append(f"{node.lineno}: importing this module calls {ast.unparse(node.value.func)}")
    return complaints + [
        f"{target.lineno}: the constant {last_name(target)} is written to"
        for node in ast.walk(tree)
        for target in written_to(node)
        if last_name(target) in tables
    ]


def no_caches(source: str) -> list[str]:
    """No function remembers its calls: a cache is state that no argument shows (`cached_property` is its object's)."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "functools":
            names = [alias.name for alias in node.names]
        else:
            names = [node.attr] if isinstance(node, ast.Attribute) and root_name(node) == "functools" else []
        complaints += [f"{node.lineno}: {name} keeps state between calls" for name in names if name in CACHES]
    return complaints


def no_shared_attributes(source: str) -> list[str]:
    """No class attribute that all instances share and could change, and no mutable default argument."""
    tree = ast.parse(source)
    frozen, complaints = frozen_classes(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                for target in targets_of(statement):
                    name, value = getattr(target, "id", ""), getattr(statement, "value", None)
                    if name != "__slots__" and last_name(value) != "field" and is_mutable(value, frozen):
                        complaints.append(
                            f"{statement.lineno}: {node.name}.{name} is shared by all instances, and mutable"
                        )
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                if is_mutable(default, frozen):
                    complaints.append(f"{default.lineno}: mutable default argument {ast.unparse(default)}")
    return complaints


def no_writes_to_modules(source: str) -> list[str]:
    """No function writes to an attribute of a module, a class or a function: that is a global by another name."""
    tree = ast.parse(source)
    shared: set[str] = set()
    for node in statements(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            shared |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            shared.add(node.name)
    complaints = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        args = function.args
        local = {a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if a}
        inner = list(ast.walk(function))
        local |= {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in inner:
            for target in targets_of(node) if isinstance(node, ast.stmt) else []:
                if not isinstance(target, ast.Attribute | ast.Subscript):
                    continue
                name = root_name(target)
                if (
                    (name in shared and name not in local)
                    or name == "cls"
                    or ast.unparse(target).startswith("type(self).")
                ):
                    complaints.append(f"{node.lineno}: {ast.unparse(target)} is set for the whole process")
    return complaints


STATE_RULES = (no_global, no_module_state, no_caches, no_shared_attributes, no_writes_to_modules)


@pytest.mark.parametrize("rule", STATE_RULES)
def test_no_hidden_state(rule):
    assert every(rule, LIBRARY) == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (no_global, "def f():\n    global x\n    x = 1"),
        (no_global, "def f():\n    globals()['x'] = 1"),
        (no_global, "def f():\n    globals().update(x=1)"),
        (no_module_state, "current = None\nbatch = []"),
        (no_module_state, "requests: dict[str, int] = {}"),
        (no_module_state, "try:\n    import numpy\nexcept ImportError:\n    missing = ['numpy']"),
        (no_module_state, "from threading import local\nCONTEXT = local()"),
        (no_module_state, "import torch\nWORKSPACE = torch.empty(1 << 20)"),
        (no_module_state, "NAMES = ('a', ['b'])"),
        (no_module_state, "class Cache:\n    pass\nCACHE = Cache()"),
        (no_module_state, "COUNT = 0\nCOUNT += 1"),
        (no_module_state, "import os\nos.environ['A'] = '1'"),
        (no_module_state, "import torch\ntorch.set_num_threads(1)"),
        (no_module_state, "TABLE = {'a': 1}\ndef f():\n    TABLE['b'] = 2"),
        (no_module_state, "TABLE = {'a': 1}\ndef f():\n    TABLE.update(b=2)"),
        (no_module_state, "TABLE = {'a': 1}\ndef f():\n    del TABLE['a']"),
        (no_module_state, "seen = {x for x in (1, 2)}"),
        (no_caches, "from functools import cache\n@cache\ndef f(): pass"),
        (no_caches, "import functools\nclass A:\n    @functools.lru_cache(maxsize=2)\n    def f(self): pass"),
        (no_caches, "from functools import lru_cache\ng = lru_cache(len)"),
        (no_shared_attributes, "class A:\n    requests = []"),
        (no_shared_attributes, "class A:\n    tables: dict = dict()"),
        (no_shared_attributes, "def f(x=[]): pass"),
        (no_shared_attributes, "def f(*, x=dict()): pass"),
        (no_writes_to_modules, "class A:\n    n = 0\n    def f(self):\n        A.n += 1"),
        (no_writes_to_modules, "class A:\n    n = 0\n    def f(self):\n        type(self).n = 1"),
        (no_writes_to_modules, "class A:\n    @classmethod\n    def f(cls):\n        cls.n = 1"),
        (no_writes_to_modules, "import torch\ndef f():\n    torch.backends.cudnn.benchmark = True"),
        (no_writes_to_modules, "import os\ndef f():\n    os.environ['A'] = '1'"),
        (no_writes_to_modules, "def f():\n    f.calls = 1"),
    ],
)
def test_hidden_state_is_found(rule, source):
    assert len(rule(source)) == 1


def test_constants_are_let_through():
    source = """
from __future__ import annotations
import re
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple, TypeVar
T = TypeVar("T")
__all__ = ["A"]
PATTERN = re.compile("a")
NAMES = ("a", "b")
KINDS = frozenset({"a"})
SIZES = MappingProxyType({"a": 1})
TABLE = {"a": 1}
KiB = 2**10
Alias = list[int] | None
@dataclass(frozen=True)
class A:
    x: int = 1
    y: list[int] = field(default_factory=list)
    Z = ("a",)
    def f(self, torch=None, z=()):
        self.cache = {}
        torch.a = TABLE["a"]
    @cached_property
    def g(self): ...
DEFAULT = A()
if __name__ == "__main__":
    print(DEFAULT)
"""
    assert [complaint for rule in STATE_RULES for complaint in rule(source)] == []


# --- imports ---------------------------------------------------------------------------------------------------------


def concept(module: str) -> str | None:
    """The entry of STACK that a module belongs to: its own name, or the one that begins with the same word."""
    if module in STACK:
        return module
    word = module.split("_")[0]
    return next((name for name in STACK if name.split("_")[0] == word), None)


def imports_of(source: str, module: str = "minillm.x") -> list[tuple[int, str]]:
    """(line, module of minillm below the package) for each import in `source`, wherever in the file it stands.

    `minillm.lab.figures` counts as "lab"; `from minillm import LLM`, which asks the package itself, as "__init__".
    """
    package = module.split(".")[:-1]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names] if base == ["minillm"] else [".".join(base)]
        elif isinstance(node, ast.Call) and last_name(node) in {"import_module", "__import__"} and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                names = [target.value if not target.value.startswith(".") else "minillm" + target.value]
        for name in names:
            parts = name.split(".")
            if parts[0] == "minillm":
                inner = parts[1] if len(parts) > 1 else "__init__"
                known = (PACKAGE / f"{inner}.py").exists() or (PACKAGE / inner).is_dir() or concept(inner)
                found.append((node.lineno, inner if known else "__init__"))
    return found


def upward_imports(source: str, module: str) -> list[str]:
    """Imports by an engine module of what does not stand below it."""
    own = concept(module)
    if own is None:
        return [f"1: {module} has no place in STACK"]
    complaints = []
    for line, name in imports_of(source, f"minillm.{module}"):
        other = concept(name)
        if module == "__init__" and name != "lab":
            continue  # the package names its contents, and imports them when they are asked for
        if name == "lab":
            if own != "cli":
                complaints.append(f"{line}: the engine imports minillm.lab")
        elif other is None:
            complaints.append(f"{line}: {name} has no place in STACK")
        elif other != own and STACK.index(other) >= STACK.index(own):
            complaints.append(f"{line}: {module} imports {name}, which stands above it")
        elif other != own and own in NARROW and other not in NARROW[own]:
            complaints.append(
                f"{line}: {module} may import only {', '.join(sorted(NARROW[own])) or 'nothing of minillm'}, not {name}"
            )
    return complaints


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of the import graph, or []."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_imports_point_downwards():
    complaints = [
        f"{short(path)}:{complaint}"
        for path in ENGINE
        for complaint in upward_imports(path.read_text(encoding="utf-8"), path.stem)
    ]
    assert complaints == []


def test_imports_have_no_cycle():
    graph = {
        p.stem: {name for _, name in imports_of(p.read_text(encoding="utf-8"))} for p in ENGINE if p.stem != "__init__"
    }
    assert cycle_in(graph) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("context", "from minillm.errors import MiniLLMError"),
        ("layers", "from .page_manager import KVPool"),
        ("layers", "from minillm import page_manager"),
        ("page_manager", "import minillm.config"),
        ("page_manager", "def f():\n    from minillm import LLM"),
        ("scheduler", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .engine import LLMEngine"),
        ("runner", "import importlib\nimportlib.import_module('minillm.engine')"),
        ("engine", "from minillm.lab import figures"),
        ("engine", "def f():\n    from .lab.figures import draw"),
        ("reference_plan", "from .page_manager import KVPool"),
        ("gadgets", ""),
    ],
)
def test_an_upward_import_is_found(module, source):
    assert len(upward_imports(source, module)) == 1


def test_downward_imports_are_let_through():
    assert upward_imports("from . import reference\nfrom .errors import ConfigError", "wrappers") == []
    assert upward_imports("from minillm.reference_kernel import attend", "reference") == []
    assert upward_imports("from minillm.lab import bench\nfrom minillm import LLM", "cli") == []
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}}) == []


# --- what the library never does -------------------------------------------------------------------------------------

UNSAFE_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
PROCESS_WIDE = frozenset({"set_default_dtype", "set_default_device", "set_default_tensor_type"})
PICKLING = frozenset(
    {
        "broadcast_object_list",
        "all_gather_object",
        "gather_object",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
    }
)


def no_unsafe_or_process_wide_calls(source: str) -> list[str]:
    """No pickle is read, no remote code trusted, no default of the whole process changed."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            complaints += [f"{line}: imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
            if getattr(node, "module", "") == "torch" and any(alias.name == "load" for alias in node.names):
                complaints.append(f"{line}: torch.load reads pickles")
        elif isinstance(node, ast.Attribute):
            if node.attr == "load" and ast.unparse(node.value) == "torch":
                complaints.append(f"{line}: torch.load reads pickles")
            if node.attr in PROCESS_WIDE:
                complaints.append(f"{line}: {node.attr} holds for the whole process")
            if node.attr in PICKLING:
                complaints.append(f"{line}: {node.attr} sends pickles")
        elif isinstance(node, ast.keyword):
            if node.arg in {"trust_remote_code", "allow_pickle"} and getattr(node.value, "value", True) is not False:
                complaints.append(f"{node.value.lineno}: {node.arg}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            complaints.append(f"{line}: {node.func.id}() runs text as code")
    return complaints


def no_assert(source: str) -> list[str]:
    """`python -O` drops asserts, and an AssertionError tells a caller nothing: the library raises its own errors."""
    return [f"{node.lineno}: assert" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def test_no_unsafe_or_process_wide_calls():
    assert every(no_unsafe_or_process_wide_calls, LIBRARY) == []


def test_no_assert_in_the_engine():
    assert every(no_assert, ENGINE) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "f(trust_remote_code=True)",
        "np.load('x', allow_pickle=True)",
        "import torch\ntorch.set_default_dtype(torch.float16)",
        "import torch\ntorch.set_default_device('cuda')",
        "dist.broadcast_object_list([1])",
        "eval('1')",
    ],
)
def test_unsafe_or_process_wide_calls_are_found(source):
    assert len(no_unsafe_or_process_wide_calls(source)) == 1


def test_an_assert_is_found():
    assert no_assert("def f(x):\n    assert x > 0") == ["2: assert"]


# --- sizes and names -------------------------------------------------------------------------------------------------


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def too_long(sizes: dict[str, int]) -> list[str]:
    """Complaints about module sizes, given as lines by module name."""
    complaints = [f"{name} has {n} lines, over {MAX_MODULE_LINES}" for name, n in sizes.items() if n > MAX_MODULE_LINES]
    path = sum(n for name, n in sizes.items() if name in PATH_OF_A_TOKEN)
    periphery = sum(n for name, n in sizes.items() if concept(name) in ("distributed", "metrics"))
    if path >= MAX_PATH_LINES:
        complaints.append(f"the path of a token has {path} lines, not under {MAX_PATH_LINES}")
    if periphery >= MAX_PERIPHERY_LINES:
        complaints.append(f"what stands beside the path has {periphery} lines, not under {MAX_PERIPHERY_LINES}")
    return complaints


def test_modules_are_small():
    assert too_long({path.stem: num_lines(path) for path in ENGINE}) == []
    assert too_long({path.stem: num_lines(path) for path in LIBRARY if path not in ENGINE}) == []


def test_long_modules_are_found():
    assert len(too_long({"engine": 401})) == 1
    assert len(too_long(dict.fromkeys(PATH_OF_A_TOKEN, 300))) == 1
    assert (
        len(too_long({"distributed_a": 400, "distributed_b": 400, "metrics": 400, "metrics_a": 400, "metrics_b": 400}))
        == 1
    )
    assert too_long({"engine": 400, "reference": 400}) == []


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [short(path) for path in LIBRARY if path.stem.strip("_") in drawers or path.parent.name in drawers] == []


# --- the book and the docs -------------------------------------------------------------------------------------------


def chapters_in(readme: str) -> list[str]:
    """The notebooks that the rows of README's table link to, in order."""
    return re.findall(r"^\|[^\n]*?\]\(notebooks/([^)]+\.ipynb)\)", readme, flags=re.MULTILINE)


def test_the_readme_lists_the_notebooks_on_disk():
    assert chapters_in((ROOT / "README.md").read_text(encoding="utf-8")) == [path.name for path in NOTEBOOKS]


def test_a_chapter_is_read_off_the_readme():
    assert chapters_in("| [00 Start](notebooks/00_start.ipynb) | x |\n\n[b](notebooks/b.ipynb)\n") == ["00_start.ipynb"]


def test_every_notebook_is_collected():
    if not NOTEBOOKS:
        pytest.skip("no notebook on disk")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "--nbval",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    result = subprocess.run([*command, "notebooks"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    collected = {Path(line.split("::")[0]).name for line in result.stdout.splitlines() if "::" in line}
    assert collected == {path.name for path in NOTEBOOKS}


def missing_tests(markdown: str, root: Path = ROOT) -> list[str]:
    """The tests that a page names as `tests/file.py::test_name`, and that are not there."""
    missing = []
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", markdown):
        path = root / file
        if not path.exists() or not re.search(rf"def {name}\b", path.read_text(encoding="utf-8")):
            missing.append(f"{file}::{name}")
    return missing


def test_the_tests_that_the_docs_name_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        assert missing_tests(page.read_text(encoding="utf-8")) == [], short(page)


def test_a_missing_test_is_found():
    names = ("test_structure.py::test_modules_are_small", "test_structure.py::test_nothing", "test_x.py::test_y")
    page = "\n".join(f"| a rule | `tests/{name}` |" for name in names)
    assert missing_tests(page) == ["tests/test_structure.py::test_nothing", "tests/test_x.py::test_y"]


HEAVY = ("torch", "transformers", "matplotlib", "flashinfer", "numpy", "safetensors", "tqdm")


@pytest.mark.parametrize("statement", ["import minillm", "import minillm.cli", "import minillm.doctor"])
def test_import_is_light(statement):
    script = f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
