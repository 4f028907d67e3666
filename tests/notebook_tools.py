"""The book's rules as functions: each takes a parsed notebook and returns, in words, what breaks a rule (or `[]`)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"

CHAPTERS = {
    "00": "00_start_here",
    "01": "01_attention_naively",
    "02": "02_pages",
    "03": "03_no_globals",
    "04": "04_flashinfer",
    "05": "05_how_fast_is_it",
    "06": "06_loading_a_model",
    "07": "07_one_forward_pass",
    "08": "08_continuous_batching",
    "09": "09_sharing_prefixes",
    "10": "10_more_than_one_gpu",
    "11": "11_when_things_break",
    "12": "12_the_race",
    "A1": "A1_training_the_story_model",
}

# What each chapter may import of minillm besides what the chapters before it may: whole modules, or `module: names`.
EVERYWHERE = {
    "minillm": {"LLM", "LLMEngine", "SamplingParams"},
    "minillm.lab.figures": None,
    "minillm.lab.checks": None,
}
INTRODUCED: dict[str, dict[str, set[str] | None]] = {
    "00": {"minillm.metrics": {"Recorder"}, "minillm.protocols": {"SampledTokens", "SamplerProtocol"}},
    "01": {
        "minillm.lab.naive": None,
        "minillm.reference": {"single_prefill_with_kv_cache", "single_decode_with_kv_cache"},
    },
    "02": {
        "minillm.page_manager": None,
        "minillm.page_view": {"PageSnapshot"},
        "minillm.errors": None,
        "minillm.context": {"Chunk", "BatchArrays"},
        "minillm.lab.contracts": None,
        "minillm.reference": {"append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens"},
    },
    "03": {"minillm.context": None, "minillm.layers": None, "minillm.reference": None},
    "04": {"minillm.reference": None, "minillm.wrappers": None, "minillm.devices": None},
    "05": {"minillm.lab.bench": None},
    "06": {"minillm.config": None, "minillm.loader": None, "minillm.weights": None},
    "07": {"minillm.model": None, "minillm.runner": None, "minillm.sampler": None},
    "08": {"minillm.scheduler": None, "minillm.request": None, "minillm.engine": None},
    "09": {},
    "10": {"minillm.distributed": None},
    "11": {"minillm.metrics": None},
    "12": {},
    "A1": {"minillm.lab.train": None},
}
THIRD_PARTY = frozenset({"torch", "numpy", "matplotlib", "IPython", "transformers", "safetensors", "flashinfer"})

ALLOWED_TAGS = frozenset(
    {"setup", "define", "exercise", "solution", "hide-input", "nbval-ignore-output", "raises-exception"}
)

# Second-level headings, in this order; one may go on after a colon ("## A puzzle: why is the second token cheap?").
SECTIONS = (
    "What you will be able to do",
    "Set-up",
    "A puzzle",
    "Predict before you run",
    "Build it small",
    "The picture",
    "In FlashInfer's interface",
    "Measure it",
    "Break it",
    "Now in minillm",
    "Try it",
    "Exercises",
    "Summary",
    "Limits",
    "References",
)
# Chapters that use no kernels have nothing to show in FlashInfer's interface; the tour and the appendix build nothing.
OPTIONAL_SECTIONS = {
    "In FlashInfer's interface": frozenset({"00", "02", "03", "06", "08", "10", "11", "12", "A1"}),
    "Build it small": frozenset({"00", "05", "12", "A1"}),
    "Break it": frozenset({"12", "A1"}),
    "Exercises": frozenset({"A1"}),
    "Now in minillm": frozenset({"12"}),
}

MAX_KILOBYTES = 500
MAX_CELL_LINES = 25
CODE_CELLS = range(20, 41)
WORDS = range(1200, 2501)
MAX_IGNORED_SHARE = 0.15

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:/home/|/work/|/root/|/tmp/|/Users/|[A-Z]:\\)|site-packages|dist-packages")
MEMORY_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
CAPTION = re.compile(r"\*Figure (\w\w)\.(\d+)\.\*\s+\S")


def paths_on_disk() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def chapter_of(path: Path) -> str:
    return path.name[:2]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def first_line(cell: NotebookNode) -> str:
    return cell.source.splitlines()[0] if cell.source else "(empty cell)"


def python_source(cell: NotebookNode) -> str:
    """The cell without IPython's magics, which `ast` does not know."""
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in cell.source.splitlines())


def prose(notebook: NotebookNode) -> str:
    """All Markdown text, without its code blocks."""
    markdown = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)


def num_words(notebook: NotebookNode) -> int:
    return len(re.findall(r"\w+", prose(notebook)))


def output_texts(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield from (output.evalue, *output.traceback)
        else:
            yield from (str(data) for mime, data in output.data.items() if not mime.startswith("image/"))


def figures(cell: NotebookNode) -> list[NotebookNode]:
    """The outputs of `cell` that are pictures."""
    return [output for output in cell.outputs if any(mime.startswith("image/") for mime in output.get("data", {}))]


def execution_problems(notebook: NotebookNode) -> list[str]:
    problems = []
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        problems.append(f"cells were not all executed once, in order: {counts}")
    for cell in code_cells(notebook):
        failed = any(output.output_type == "error" for output in cell.outputs)
        if failed != ("raises-exception" in tags(cell)):
            problems.append(
                f"{'an error without' if failed else 'no error despite'} raises-exception: {first_line(cell)}"
            )
        if any(output.output_type == "stream" and output.name == "stderr" for output in cell.outputs):
            problems.append(f"writes to stderr: {first_line(cell)}")
    return problems


def size_problems(notebook: NotebookNode, num_bytes: int) -> list[str]:
    cells = code_cells(notebook)
    problems = [
        f"{len(cell.source.splitlines())} lines in a cell: {first_line(cell)}"
        for cell in cells
        if len(cell.source.splitlines()) > MAX_CELL_LINES
    ]
    if num_bytes > MAX_KILOBYTES * 1024:
        problems.append(f"{num_bytes / 1024:.0f} KB, at most {MAX_KILOBYTES}")
    if len(cells) not in CODE_CELLS:
        problems.append(f"{len(cells)} code cells, not {CODE_CELLS[0]} to {CODE_CELLS[-1]}")
    if num_words(notebook) not in WORDS:
        problems.append(f"{num_words(notebook)} words, not {WORDS[0]} to {WORDS[-1]}")
    return problems


def tag_problems(notebook: NotebookNode) -> list[str]:
    problems = []
    for cell in notebook.cells:
        unknown = set(tags(cell)) - ALLOWED_TAGS
        if unknown:
            problems.append(f"tags {sorted(unknown)}: {first_line(cell)}")
        if re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source):
            problems.append(f"a marker in a comment, where no tag shows it: {first_line(cell)}")
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        if "solution" in tags(cell) and not folded:
            problems.append(f"a solution that is not folded: {first_line(cell)}")
    ignored = sum("nbval-ignore-output" in tags(cell) for cell in code_cells(notebook))
    if ignored >= MAX_IGNORED_SHARE * len(code_cells(notebook)):
        problems.append(f"the outputs of {ignored} of {len(code_cells(notebook))} code cells are not compared")
    if sum("setup" in tags(cell) for cell in code_cells(notebook)) != 1:
        problems.append("there must be exactly one cell tagged setup")
    return problems


def portability_problems(notebook: NotebookNode) -> list[str]:
    problems = []
    for cell in notebook.cells:
        texts = [cell.source, *(output_texts(cell) if cell.cell_type == "code" else ())]
        for text in texts:
            for kind, pattern in (("an absolute path", ABSOLUTE_PATH), ("a memory address", MEMORY_ADDRESS)):
                found = pattern.search(text)
                if found:
                    problems.append(f"{kind} ({text[found.start() : found.start() + 40]!r}) in: {first_line(cell)}")
    return problems


def heading_problems(notebook: NotebookNode, chapter: str) -> list[str]:
    problems = []
    head = notebook.cells[0].source if notebook.cells and notebook.cells[0].cell_type == "markdown" else ""
    if not re.match(rf"# {chapter} · \S", head):
        problems.append(f"the first cell must begin with '# {chapter} · Title'")
    for word in ("Claim", "Time", "Needs"):
        if f"**{word}.**" not in head:
            problems.append(f"the first cell lacks **{word}.**")
    headings = re.findall(r"^## (.+)$", prose(notebook), flags=re.MULTILINE)
    position = -1
    for section in SECTIONS:
        places = [i for i, heading in enumerate(headings) if heading == section or heading.startswith(section + ":")]
        if not places:
            if chapter not in OPTIONAL_SECTIONS.get(section, ()):
                problems.append(f"no section '## {section}'")
        elif places[0] < position:
            problems.append(f"section '## {section}' comes too early")
        else:
            position = places[0]
    if headings and not headings[-1].startswith("References"):
        problems.append(f"the last section is '{headings[-1]}', not 'References'")
    return problems


def figure_problems(notebook: NotebookNode, chapter: str) -> list[str]:
    problems, numbers = [], []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        drawn = figures(cell)
        last = cell.source.rstrip().splitlines()[-1] if cell.source.strip() else ""
        if drawn and last != "plt.show()":
            problems.append(f"draws, but does not end with plt.show(): {first_line(cell)}")
        if last == "plt.show()" and not drawn:
            problems.append(f"ends with plt.show(), but has no figure: {first_line(cell)}")
        if not drawn:
            continue
        if len(drawn) > 1:
            problems.append(f"{len(drawn)} figures in one cell: {first_line(cell)}")
        for output in drawn:
            alt = output.metadata.get("image/png", {}).get("alt", "")
            if len(alt.split()) < 8:
                problems.append(f"no alt text (at least 8 words) in: {first_line(cell)}")
        following = notebook.cells[index + 1] if index + 1 < len(notebook.cells) else None
        caption = (
            CAPTION.match(following.source) if following is not None and following.cell_type == "markdown" else None
        )
        if caption is None or caption[1] != chapter:
            problems.append(f"the next cell must begin with '*Figure {chapter}.N.* caption': {first_line(cell)}")
        else:
            numbers.append(int(caption[2]))
    if not numbers:
        problems.append("no figure")
    if numbers != list(range(1, len(numbers) + 1)):
        problems.append(f"figures are numbered {numbers}")
    return problems


def imported_names(source: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each import in `source`; name is None for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def import_problems(notebook: NotebookNode, chapter: str) -> list[str]:
    import sys

    allowed: dict[str, set[str] | None] = dict(EVERYWHERE)
    for earlier, introduced in INTRODUCED.items():
        for module, names in introduced.items():
            known = allowed.get(module, set())
            allowed[module] = None if names is None or known is None else known | names
        if earlier == chapter:
            break
    problems = []
    for cell in code_cells(notebook):
        for module, name in imported_names(python_source(cell)):
            top = module.split(".")[0]
            if top == "minillm":
                whole = module if name is None else f"{module}.{name}"
                names = allowed.get(module, set())
                good = (name is None and module == "minillm") or allowed.get(whole, 0) is None
                good = good or whole in allowed or names is None or name in names
                if not good:
                    problems.append(f"{whole} belongs to a later chapter: {first_line(cell)}")
            elif top not in THIRD_PARTY and top not in sys.stdlib_module_names:
                problems.append(f"{module} is not a dependency of the book: {first_line(cell)}")
    return problems


def link_problems(notebook: NotebookNode, folder: Path = NOTEBOOKS) -> list[str]:
    problems = []
    planned = {f"{name}.ipynb" for name in CHAPTERS.values()}
    for target in LINK.findall(prose(notebook)):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = folder / file if file else None
        if path is not None and not path.exists():
            if file not in planned:
                problems.append(f"a link to {file}, which does not exist")
            continue
        if anchor:
            there = notebook if path is None else read(path)
            headings = re.findall(r"^#+ (.+)$", prose(there), flags=re.MULTILINE)
            if anchor not in {heading.replace(" ", "-") for heading in headings}:
                problems.append(f"a link to {target}: no such heading")
    return problems


def exercise_problems(notebook: NotebookNode, chapter: str) -> list[str]:
    """2 to 4 exercises, each with an attempt, a checker of this chapter, and a folded solution for the same checker."""
    called = {"exercise": [], "solution": []}
    for cell in code_cells(notebook):
        for kind, checkers in called.items():
            if kind in tags(cell):
                found = re.findall(rf"\bchecks\.(ex{chapter}_\w+)\(", cell.source)
                checkers.extend(found)
                if not found:
                    problems = [f"a cell tagged {kind} calls no checks.ex{chapter}_...: {first_line(cell)}"]
                    return problems
    problems = []
    if called["exercise"] != called["solution"]:
        problems.append(f"exercises {called['exercise']} and solutions {called['solution']} do not correspond")
    if not (2 <= len(called["exercise"]) <= 4) and chapter not in OPTIONAL_SECTIONS["Exercises"]:
        problems.append(f"{len(called['exercise'])} exercises, not 2 to 4")
    return problems


def solution_sources(notebook: NotebookNode) -> list[tuple[str, str]]:
    """(checker's name, source) of each folded solution: set-up, the cells tagged `define` before it, then itself."""
    sources, prelude = [], []
    for cell in code_cells(notebook):
        if {"setup", "define"} & set(tags(cell)):
            prelude.append(python_source(cell))
        if "solution" in tags(cell):
            name = re.search(r"\bchecks\.(ex\w+)\(", cell.source)
            sources.append((name[1] if name else first_line(cell), "\n\n".join([*prelude, python_source(cell)])))
    return sources
