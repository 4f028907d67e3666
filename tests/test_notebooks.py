"""Every notebook on disk keeps the book's rules; and the checks can fail."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import notebook_tools as rules
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minillm.lab.notebooks import main, normalise, refresh

PATHS = rules.paths_on_disk()
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@every_notebook
def test_file_name(path: Path) -> None:
    assert rules.CHAPTERS.get(rules.chapter_of(path)) == path.stem


@every_notebook
def test_executed_in_order(path: Path) -> None:
    assert rules.execution_problems(rules.read(path)) == []


@every_notebook
def test_size(path: Path) -> None:
    assert rules.size_problems(rules.read(path), path.stat().st_size) == []


@every_notebook
def test_tags(path: Path) -> None:
    assert rules.tag_problems(rules.read(path)) == []


@every_notebook
def test_portable(path: Path) -> None:
    assert rules.portability_problems(rules.read(path)) == []


@every_notebook
def test_headings(path: Path) -> None:
    assert rules.heading_problems(rules.read(path), rules.chapter_of(path)) == []


@every_notebook
def test_figures(path: Path) -> None:
    assert rules.figure_problems(rules.read(path), rules.chapter_of(path)) == []


@every_notebook
def test_imports(path: Path) -> None:
    assert rules.import_problems(rules.read(path), rules.chapter_of(path)) == []


@every_notebook
def test_links(path: Path) -> None:
    assert rules.link_problems(rules.read(path)) == []


@every_notebook
def test_exercises(path: Path) -> None:
    assert rules.exercise_problems(rules.read(path), rules.chapter_of(path)) == []


@every_notebook
def test_is_normalised(path: Path) -> None:
    notebook = rules.read(path)
    assert normalise(rules.read(path)) == notebook
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_nbval_collects_every_cell_of_every_notebook() -> None:
    command = [sys.executable, "-m", "pytest", "--nbval", "--collect-only", "-q", "-p", "no:cacheprovider", "notebooks"]
    root = rules.NOTEBOOKS.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    collected = Counter(line.split("::")[0] for line in done.stdout.splitlines() if "::Cell " in line)
    expected = {path.relative_to(root).as_posix(): len(rules.code_cells(rules.read(path))) for path in PATHS}
    assert dict(collected) == expected, done.stdout + done.stderr


def test_nbval_compares_every_output(tmp_path: Path) -> None:
    one = new_output("stream", name="stdout", text="1\n")
    cells = [
        code("print(1)", 1, outputs=(one,)),
        code("print(2)", 2, outputs=(one,)),
        code("print(3)", 3),
        code("4", 4),
    ]
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "wrong.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout and "3 failed" in done.stdout, done.stdout + done.stderr


def test_refresh_stores_outputs_and_check_compares_them(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    cells = [code("import os; print(os.environ['MINILLM_DEVICE'])", None), code("print(os.getpid())", None)]
    cells[1].metadata["tags"] = ["nbval-ignore-output"]
    nbformat.write(new_notebook(cells=cells), path)
    assert refresh(path)[2] == ""
    stored = rules.read(path)
    assert [cell.execution_count for cell in stored.cells] == [1, 2] and stored.cells[0].outputs[0].text == "cpu\n"
    assert refresh(path, check=True)[2] == ""

    stored.cells[0].outputs[0].text = "cuda\n"
    nbformat.write(stored, path)
    assert "the output changed of: import os; print" in refresh(path, check=True)[2]

    stored.cells[1].source = "1 / 0"
    nbformat.write(stored, path)
    before = path.read_bytes()
    assert "a cell failed: ZeroDivisionError" in refresh(path)[2]
    assert path.read_bytes() == before


def test_the_command_names_what_it_cannot_find(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path), "07"])
    assert "matches ['07']" in capsys.readouterr().err


# The checks themselves: a small notebook that breaks each rule once.


def code(source: str, count: int | None = 1, tags: tuple[str, ...] = (), outputs: tuple = ()):
    return new_code_cell(source, execution_count=count, metadata={"tags": list(tags)}, outputs=list(outputs))


def picture(alt: str = "A line that rises from one to ten and then stays flat."):
    return new_output("display_data", data={"image/png": "AAAA"}, metadata={"image/png": {"alt": alt}})


def test_execution_problems_are_found() -> None:
    error = new_output("error", ename="ValueError", evalue="no", traceback=[])
    noise = new_output("stream", name="stderr", text="a warning")
    assert rules.execution_problems(new_notebook(cells=[code("1", 1), code("2", 2)])) == []
    assert "in order" in rules.execution_problems(new_notebook(cells=[code("1", 2), code("2", 1)]))[0]
    assert "in order" in rules.execution_problems(new_notebook(cells=[code("1", None)]))[0]
    assert "without" in rules.execution_problems(new_notebook(cells=[code("1", outputs=(error,))]))[0]
    assert "despite" in rules.execution_problems(new_notebook(cells=[code("1", tags=("raises-exception",))]))[0]
    assert "stderr" in rules.execution_problems(new_notebook(cells=[code("1", outputs=(noise,))]))[0]


def test_size_problems_are_found() -> None:
    problems = rules.size_problems(new_notebook(cells=[code("\n".join("x" * 26))]), 501 * 1024)
    assert [problem.split()[0] for problem in problems] == ["26", "501", "1", "0"]


def test_tag_problems_are_found() -> None:
    cells = [
        code("1", tags=("nbval-skip",)),
        code("2", tags=("solution",)),
        code("# NBVAL_SKIP"),
        code("4", tags=("setup",)),
    ]
    problems = rules.tag_problems(new_notebook(cells=cells))
    assert ["nbval-skip" in problems[0], "folded" in problems[1], "marker" in problems[2]] == [True] * 3 and len(
        problems
    ) == 3
    problems = rules.tag_problems(new_notebook(cells=[code("1", tags=("setup", "nbval-ignore-output"))]))
    assert problems == ["the outputs of 1 of 1 code cells are not compared"]


@pytest.mark.parametrize(
    "text", ["see /home/me/x", "C:\\Users\\me", "<object at 0x7f12ab34cd56>", "lib/site-packages/torch"]
)
def test_portability_problems_are_found(text: str) -> None:
    printed = new_output("stream", name="stdout", text=text)
    assert len(rules.portability_problems(new_notebook(cells=[code("1", outputs=(printed,))]))) == 1
    assert len(rules.portability_problems(new_notebook(cells=[new_markdown_cell(text)]))) == 1
    assert (
        rules.portability_problems(new_notebook(cells=[new_markdown_cell("https://a.b/home/work/ and a/tmp/b")])) == []
    )


def test_heading_problems_are_found() -> None:
    head = "# 01 · Attention\n\n**Claim.** a **Time.** b **Needs.** c"
    body = "\n\n".join(f"## {section}" for section in rules.SECTIONS)
    assert rules.heading_problems(new_notebook(cells=[new_markdown_cell(head + "\n\n" + body)]), "01") == []
    assert len(rules.heading_problems(new_notebook(cells=[new_markdown_cell(body)]), "01")) == 4
    swapped = body.replace("## Set-up", "## ?").replace("## A puzzle", "## Set-up").replace("## ?", "## A puzzle: why")
    assert rules.heading_problems(new_notebook(cells=[new_markdown_cell(head + "\n" + swapped)]), "01") == [
        "section '## A puzzle' comes too early"
    ]
    assert "no section '## Limits'" in rules.heading_problems(
        new_notebook(cells=[new_markdown_cell(head + "\n" + body.replace("## Limits", ""))]), "01"
    )


def test_figure_problems_are_found() -> None:
    caption = new_markdown_cell("*Figure 01.1.* Cost per token.")
    good = code("draw()\nplt.show()", outputs=(picture(),))
    assert rules.figure_problems(new_notebook(cells=[good, caption]), "01") == []
    assert "caption" in rules.figure_problems(new_notebook(cells=[good]), "01")[0]
    assert "Figure 02" in rules.figure_problems(new_notebook(cells=[good, caption]), "02")[0]
    assert (
        "numbered" in rules.figure_problems(new_notebook(cells=[good, new_markdown_cell("*Figure 01.3.* C")]), "01")[0]
    )
    assert (
        "alt"
        in rules.figure_problems(new_notebook(cells=[code("plt.show()", outputs=(picture("short"),)), caption]), "01")[
            0
        ]
    )
    assert (
        "end with"
        in rules.figure_problems(new_notebook(cells=[code("draw()", outputs=(picture(),)), caption]), "01")[0]
    )
    assert "no figure" in rules.figure_problems(new_notebook(cells=[code("plt.show()")]), "01")[0]


def test_import_problems_are_found() -> None:
    def problems(source: str, chapter: str) -> int:
        return len(rules.import_problems(new_notebook(cells=[code(source)]), chapter))

    assert problems("from minillm import LLM\nfrom minillm.lab import checks, figures\nimport torch, math", "00") == 0
    assert problems("from minillm.scheduler import Scheduler", "07") == 1
    assert problems("from minillm.scheduler import Scheduler", "08") == 0
    assert problems("from minillm import scheduler", "07") == 1
    assert problems("import minillm.scheduler", "07") == 1
    assert problems("from minillm.reference import BatchDecodeWithPagedKVCacheWrapper", "01") == 1
    assert problems("from minillm.reference import single_decode_with_kv_cache", "01") == 0
    assert problems("import pandas", "12") == 1


def test_link_problems_are_found() -> None:
    def problems(text: str) -> int:
        return len(rules.link_problems(new_notebook(cells=[new_markdown_cell("## Measure it\n" + text)])))

    assert problems("[a](https://x.org) [b](02_pages.ipynb) [c](#Measure-it)") == 0
    assert problems("[a](03_nothing.ipynb)") == problems("[a](#Nowhere)") == problems("[a](results/none.json)") == 1


def test_exercise_problems_are_found() -> None:
    def problems(*cells) -> list[str]:
        return rules.exercise_problems(new_notebook(cells=list(cells)), "01")

    attempts = [code(f"checks.ex01_{name}(None)", tags=("exercise",)) for name in "ab"]
    solutions = [code(f"checks.ex01_{name}(1)", tags=("solution",)) for name in "ab"]
    assert problems(*attempts, *solutions) == []
    assert "correspond" in problems(*attempts, solutions[0])[0]
    assert "not 2 to 4" in problems(attempts[0], solutions[0])[0]
    assert "calls no" in problems(code("checks.ex02_a(None)", tags=("exercise",)))[0]


def test_normalise_removes_what_differs_between_runs() -> None:
    root = Path("/somewhere/else/checkout")
    streams = [new_output("stream", name="stdout", text=text) for text in ("a", "b")]
    trace = [
        f"File {root}/minillm/engine.py:3",
        "File /opt/x/lib/python3.11/site-packages/torch/nn.py:5",
        "Cell In[3], line 2",
    ]
    error = new_output("error", ename="E", evalue="e", traceback=trace)
    cell = code("1", tags=("raises-exception",), outputs=(*streams, error))
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    normalised = normalise(new_notebook(cells=[cell], metadata={"widgets": {}}), root)
    assert "widgets" not in normalised.metadata and "execution" not in cell.metadata
    assert [output.get("text") for output in cell.outputs] == ["ab", None]
    assert cell.outputs[1].traceback == ["File minillm/engine.py:3", "File torch/nn.py:5", "Cell In[3], line 2"]
