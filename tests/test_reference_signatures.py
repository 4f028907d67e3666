"""The twin's signatures are those of the pinned FlashInfer, as recorded from its source."""

import ast
import inspect
import json
import tomllib
from pathlib import Path

import pytest

import minillm.reference as reference

RECORDED = json.loads(Path(__file__).with_name("flashinfer_signatures.json").read_text())
SIGNATURES = RECORDED["signatures"]
KINDS = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.VAR_POSITIONAL: "var_positional",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "var_keyword",
}
FUNCTIONS = [(name, None) for name, recorded in SIGNATURES.items() if isinstance(recorded, list)]
METHODS = [(name, method) for name, recorded in SIGNATURES.items() if isinstance(recorded, dict) for method in recorded]


def signature(function):
    """[name, kind, default] of each parameter; parameters without a default have None, as in the record."""
    rows = []
    for parameter in inspect.signature(function).parameters.values():
        has_default = parameter.default is not inspect.Parameter.empty
        rows.append([parameter.name, KINDS[parameter.kind], [parameter.default] if has_default else None])
    return rows


@pytest.mark.parametrize(("name", "method"), FUNCTIONS + METHODS)
def test_the_signature_is_flashinfers(name, method):
    recorded = SIGNATURES[name] if method is None else SIGNATURES[name][method]
    expected = [[n, kind, None if default is None else [ast.literal_eval(default)]] for n, kind, default in recorded]
    function = getattr(reference, name)
    assert signature(function if method is None else getattr(function, method)) == expected


def test_the_twin_exports_what_is_recorded_and_nothing_else():
    assert sorted(reference.__all__) == sorted(SIGNATURES)


def test_the_record_is_of_the_version_that_is_pinned():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert f"flashinfer-python=={RECORDED['flashinfer']}" in project["optional-dependencies"]["gpu"]


def test_options_of_decode_plan_given_positionally_keep_their_order():
    from minillm.reference_decode import LEGACY_PLAN_ORDER

    options = [
        name for name, kind, _ in SIGNATURES["BatchDecodeWithPagedKVCacheWrapper"]["_plan_impl"] if kind == "keyword"
    ]
    assert list(LEGACY_PLAN_ORDER) == [name for name in options if name not in ("window_right", "is_causal")]


@pytest.mark.gpu
def test_the_record_is_what_the_installed_flashinfer_has():
    flashinfer = pytest.importorskip("flashinfer")
    import record_flashinfer_signatures as recorder

    folder = Path(flashinfer.__file__).parent
    assert recorder.record(lambda path: (folder / path).read_bytes()) == RECORDED
