"""Re-executes the book's notebooks in place: `python -m minillm.lab.notebooks [--jobs 2] [--check] [01 02 ...]`.

What is stored is what a CPU gives: kernels get `MINILLM_DEVICE=cpu`. Everything that changes from run to run without
meaning anything (execution times, how a stream was cut into pieces, where the checkout lies) is normalised away, so
that a second execution leaves no difference in the cells whose outputs are compared.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

REPOSITORY = Path(__file__).resolve().parents[2]
CELL_TIMEOUT_SECONDS = 180
KERNEL_ENVIRONMENT = {
    "MINILLM_DEVICE": "cpu",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONHASHSEED": "0",
}
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
# An error's traceback names files; what remains of a name is the part that is the same on every machine.
INSTALLED_FILE = re.compile(r"(?:~|/|[A-Z]:\\)[^\s:'\"\x1b]*(?:site-packages|dist-packages|lib/python3\.\d+)[/\\]")


def notebook_paths(folder: Path = REPOSITORY / "notebooks", prefixes: tuple[str, ...] = ()) -> list[Path]:
    """The notebooks in `folder` in reading order (00, 01, ..., A1); with `prefixes`, those that start with one."""
    paths = sorted(folder.glob("*.ipynb"))
    return [path for path in paths if not prefixes or path.name.startswith(prefixes)]


def execute(notebook: NotebookNode, folder: Path, timeout: int = CELL_TIMEOUT_SECONDS) -> NotebookNode:
    """Run every cell in a fresh kernel whose working directory is `folder`; returns the normalised notebook.

    Raises:
        CellExecutionError: a cell failed that is not tagged `raises-exception`.
    """
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    python_path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    client.execute(env={**os.environ, **KERNEL_ENVIRONMENT, "PYTHONPATH": python_path})
    return normalise(notebook)


def normalise(notebook: NotebookNode, root: Path = REPOSITORY) -> NotebookNode:
    """Remove what differs between two equal runs, in place; returns the notebook."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("tags", "jupyter") if key in cell.metadata}
        )
        if cell.cell_type == "code":
            cell.outputs = _joined_streams(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "error":
                    output.traceback = [_without_paths(line, root) for line in output.traceback]
                elif output.output_type == "stream":
                    output.text = _without_paths(output.text, root)
    return notebook


def _joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Consecutive pieces of one stream as one output: where they were cut depends on timing."""
    joined: list[NotebookNode] = []
    for output in outputs:
        previous = joined[-1] if joined else None
        if (
            previous is not None
            and output.output_type == previous.output_type == "stream"
            and output.name == previous.name
        ):
            previous.text += output.text
        else:
            joined.append(output)
    return joined


def _without_paths(text: str, root: Path) -> str:
    for prefix in (str(root), str(root).replace(str(Path.home()), "~", 1)):
        text = text.replace(prefix + os.sep, "")
    return INSTALLED_FILE.sub("", text)


def compared_outputs(notebook: NotebookNode) -> list[tuple[str, object]]:
    """(source, outputs) of each cell whose outputs are compared, less what nbval leaves out: pictures, tracebacks."""
    compared: list[tuple[str, object]] = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or "nbval-ignore-output" in cell.metadata.get("tags", ()):
            continue
        outputs: list[object] = []
        for output in cell.outputs:
            if output.output_type == "error":
                outputs.append((output.ename, output.evalue))
            elif output.output_type == "stream":
                outputs.append(output.text)
            else:
                outputs.append({mime: data for mime, data in output.data.items() if mime != "image/png"})
        compared.append((cell.source, outputs))
    return compared


def refresh(path: Path, check: bool = False) -> tuple[Path, float, str]:
    """Execute one notebook, write it back (not with `check`); returns its path, the seconds taken, what is wrong."""
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    before = compared_outputs(notebook)
    problem = ""
    try:
        execute(notebook, path.parent)
    except CellExecutionError as error:
        problem = f"a cell failed: {error.ename}: {error.evalue}"
    else:
        if check:
            changed = [
                source for (source, old), (_, new) in zip(before, compared_outputs(notebook), strict=True) if old != new
            ]
            problem = "".join(f"\n  the output changed of: {source.splitlines()[0]} ..." for source in changed)
        else:
            nbformat.write(notebook, path)
    return path, time.perf_counter() - start, problem


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minillm.lab.notebooks", description="Re-execute the book in place."
    )
    parser.add_argument("chapters", nargs="*", help="first characters of file names, such as 01 or A1 (default: all)")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "notebooks")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time (default: 2)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a compared output has changed")
    options = parser.parse_args(arguments)
    if options.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    paths = notebook_paths(options.folder, tuple(options.chapters))
    if not paths:
        parser.error(f"no notebook in {options.folder} matches {options.chapters or 'anything'}")
    failures = 0
    with ThreadPoolExecutor(options.jobs) as executor:
        for path, seconds, problem in executor.map(lambda path: refresh(path, options.check), paths):
            print(f"{path.name:34} {seconds:6.1f} s  {problem or 'ok'}", flush=True)
            failures += bool(problem)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
