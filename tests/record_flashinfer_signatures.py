"""Record the signatures of the FlashInfer functions that the twin copies, into flashinfer_signatures.json.

    python tests/record_flashinfer_signatures.py PATH

PATH is a flashinfer-python wheel, or a folder that holds the `flashinfer` package. The source is parsed, never
imported: neither a GPU nor FlashInfer's dependencies are needed. Run it when the pinned version changes.
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

OUTPUT = Path(__file__).with_name("flashinfer_signatures.json")
METHODS = ("__init__", "plan", "_plan_impl", "run", "reset_workspace_buffer")
NAMES = {
    "decode.py": ("BatchDecodeWithPagedKVCacheWrapper", "single_decode_with_kv_cache"),
    "prefill.py": (
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
        "single_prefill_with_kv_cache",
    ),
    "cascade.py": ("MultiLevelCascadeAttentionWrapper", "merge_state", "merge_state_in_place", "merge_states"),
    "page.py": ("append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens"),
    "rope.py": (
        "apply_rope_pos_ids",
        "apply_rope_pos_ids_inplace",
        "apply_rope_with_cos_sin_cache",
        "apply_rope_with_cos_sin_cache_inplace",
    ),
    "norm/__init__.py": ("rmsnorm", "fused_add_rmsnorm"),
    "activation.py": ("silu_and_mul",),
    "sampling.py": (
        "softmax",
        "sampling_from_probs",
        "sampling_from_logits",
        "top_k_top_p_sampling_from_probs",
        "top_k_top_p_sampling_from_logits",
        "min_p_sampling_from_probs",
    ),
}


def parameters(function: ast.FunctionDef) -> list[list]:
    """[name, kind, default] of each parameter; the default is its Python text, or None where there is none."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    rows = [[a.arg, "positional", d and ast.unparse(d)] for a, d in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        rows.append([arguments.vararg.arg, "var_positional", None])
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    rows += [[a.arg, "keyword", d and ast.unparse(d)] for a, d in pairs]
    if arguments.kwarg:
        rows.append([arguments.kwarg.arg, "var_keyword", None])
    return rows


def definitions(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Functions and classes by name; of overloads, the last one, which is the implementation."""
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def record(read) -> dict:
    """Signatures by name, and `version`; `read(path)` returns a file of the package."""
    signatures = {}
    for path, names in NAMES.items():
        found = definitions(ast.parse(read(path)).body)
        for name in names:
            node = found[name]
            if isinstance(node, ast.ClassDef):
                methods = definitions(node.body)
                signatures[name] = {m: parameters(methods[m]) for m in METHODS if m in methods}
            else:
                signatures[name] = parameters(node)
    build = ast.parse(read("_build_meta.py")).body
    version = next(n.value.value for n in build if isinstance(n, ast.Assign) and n.targets[0].id == "__version__")
    return {"flashinfer": version, "signatures": signatures}


def main() -> None:
    source = Path(sys.argv[1])
    if source.suffix == ".whl":
        archive = zipfile.ZipFile(source)
        recorded = record(lambda path: archive.read(f"flashinfer/{path}"))
    else:
        recorded = record(lambda path: (source / "flashinfer" / path).read_bytes())
    text = json.dumps(recorded, indent=1)
    # One parameter a line, so that a diff of two versions can be read.
    text = re.sub(r"\[\s+(\"[^\"]*\"),\s+(\"[^\"]*\"),\s+(null|\".*?\")\s+\]", r"[\1, \2, \3]", text)
    OUTPUT.write_text(text + "\n")


if __name__ == "__main__":
    main()
