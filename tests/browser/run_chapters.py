"""Runs chapters as a reader does: JupyterLab in a real browser, *Restart Kernel and Run All Cells*, light and dark.

    python tests/browser/run_chapters.py [01 02 ...] [--output browser-report] [--themes light dark]

`make test-browser` does the same with what it needs: minillm[dev], the package `playwright` (used without its own
browsers), and a Chromium on this machine (Debian: `apt-get install chromium`; otherwise `--chromium PATH`).

The notebooks are copied to a temporary folder, where JupyterLab runs with settings of its own; the checkout stays as it
is. Each chapter is opened, restarted and run in each theme. Then the page itself is checked:

- every cell ran, in order; only cells tagged `raises-exception` show an error, and nothing is written to stderr;
- every figure is an `<img>` of non-zero size, not wider than its cell, and its caption follows;
- Markdown is rendered (formulas without errors, tables, no markup left over), HTML outputs have a size and contrast;
- solutions are folded; the outputs that the book stores are what the reader gets; the page asks nothing of the network.

Into the output folder go pictures of each figure, each HTML output, the top of each chapter and its exercises, in each
theme; the exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, Page, TimeoutError, sync_playwright

from minillm.lab.notebooks import KERNEL_ENVIRONMENT, compared_outputs, normalise, notebook_paths

THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
REPOSITORY = Path(__file__).resolve().parents[2]  # kernels import this checkout, whichever is installed
SECONDS_TO_RUN = 300
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What JupyterLab needs to be asked for: no news, no autosave, and all cells in the page, not only those in sight.
SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}

# One dictionary for each cell of the page, in order.
DESCRIBE_CELLS = r"""() => {
  const size = (node) => { const r = node.getBoundingClientRect(); return [r.width, r.height]; };
  const rgb = (color) => (color.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const background = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const opacity = (node) => node ? Number(getComputedStyle(node).opacity) * opacity(node.parentElement) : 1;
  const contrast = (node) => {
    const back = background(node), share = opacity(node);
    const front = rgb(getComputedStyle(node).color).slice(0, 3).map((c, i) => c * share + back[i] * (1 - share));
    const [dark, bright] = [luminance(front), luminance(back)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  const texts = (root) => [...root.querySelectorAll("*")].filter(
    (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
  const wider = (nodes, room) => nodes.filter((node) => size(node)[0] > size(room)[0] + 1).length;
  const prose = (root) => {
    const copy = root.cloneNode(true);
    copy.querySelectorAll("code, pre, mjx-container").forEach((node) => node.remove());
    return copy.textContent;
  };
  return [...document.querySelectorAll(".jp-Notebook .jp-Cell")].map((cell) => {
    if (cell.classList.contains("jp-MarkdownCell")) {
      const rendered = cell.querySelector(".jp-RenderedMarkdown");
      if (!rendered) return {kind: "markdown", rendered: false};
      return {
        kind: "markdown", rendered: true, height: size(rendered)[1], text: rendered.innerText, prose: prose(rendered),
        formulas: rendered.querySelectorAll("mjx-container").length,
        formula_errors: rendered.querySelectorAll("mjx-merror, [data-mjx-error]").length,
        tables: rendered.querySelectorAll("table").length,
        wider: wider([...rendered.querySelectorAll("table, pre, mjx-container, img")], rendered),
        contrast: Math.min(21, ...texts(rendered).filter((n) => !n.closest("mjx-container")).map(contrast)),
      };
    }
    const output = cell.querySelector(".jp-Cell-outputWrapper");
    const html = [...cell.querySelectorAll(".jp-OutputArea-output.jp-RenderedHTMLCommon")];
    return {
      kind: "code",
      folded: !cell.querySelector(".jp-InputArea-editor")?.checkVisibility(),
      errors: cell.querySelectorAll(  // tracebacks, and what was written to stderr
        '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]').length,
      images: [...cell.querySelectorAll(".jp-OutputArea-output img")].map((image) => ({
        natural: [image.naturalWidth, image.naturalHeight], shown: size(image),
      })),
      wider: wider([...cell.querySelectorAll(".jp-OutputArea-output img")], output ?? cell),
      html: html.map((node) => ({
        shown: size(node), overflows: node.scrollWidth > node.clientWidth + 1,
        contrast: Math.min(21, ...texts(node).map(contrast)),
      })),
    };
  });
}"""
RUNNING = "() => [...document.querySelectorAll('.jp-InputPrompt')].some((prompt) => prompt.textContent.includes('*'))"
READABLE = 4.5  # the contrast that WCAG 2 asks of text
MARKUP = re.compile(r"\$\$|\$[^$\n]+\$|\\\(|\\frac|\*\*|^#+ |^\|.*\|$|\]\(|```", re.MULTILINE)


@dataclass(frozen=True)
class Lab:
    """A JupyterLab server that runs: where it is, how to get in, and the copies of the notebooks that it shows."""

    address: str
    token: str
    notebooks: Path


@contextlib.contextmanager
def jupyterlab(folder: Path, theme: str) -> Iterator[Lab]:
    """JupyterLab on a free port of this machine, with copies of the notebooks and settings of its own in `folder`."""
    notebooks = folder / "notebooks"
    shutil.copytree(REPOSITORY / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "tests").mkdir()
    for path in (REPOSITORY / "tests").glob("*.json"):  # a chapter reads `../tests/flashinfer_signatures.json`
        shutil.copy(path, folder / "tests")
    settings = SETTINGS | {"apputils-extension/themes": {"theme": THEMES[theme]}}
    for name, values in settings.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_urlsafe(24)
    own = {
        "JUPYTER_TOKEN": token,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
    }
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR"):
        own[name] = str(folder / name.lower())
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={notebooks}"]
    # The backend of figures is the kernel's own choice here, as it is for a reader.
    environment = {**os.environ, **KERNEL_ENVIRONMENT, **own}
    del environment["MPLBACKEND"]
    with open(folder / "jupyterlab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        lab = Lab(f"http://127.0.0.1:{port}", token, notebooks)
        wait_for_server(server, lab, folder / "jupyterlab.log")
        yield lab
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ask(lab: Lab, path: str, method: str = "GET") -> bytes:
    """The server's answer from its own interface."""
    headers = {"Authorization": f"token {lab.token}"}
    request = urllib.request.Request(f"{lab.address}/api/{path}", headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def end_sessions(lab: Lab) -> None:
    """Shut down the kernels, so that one chapter's memory is free for the next."""
    for session in json.loads(ask(lab, "sessions")):
        ask(lab, f"sessions/{session['id']}", "DELETE")


def wait_for_server(server: subprocess.Popen, lab: Lab, log: Path) -> None:
    for _ in range(120):
        if server.poll() is not None:
            break
        try:
            ask(lab, "status")
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def run_all_cells(page: Page, lab: Lab, name: str) -> None:
    """Open a chapter, choose *Run > Restart Kernel and Run All Cells…*, and wait until nothing runs any more."""
    page.goto(f"{lab.address}/lab/tree/{name}?token={lab.token}&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
    idle = page.locator('.jp-NotebookPanel-toolbar [data-status="idle"]')
    idle.wait_for(timeout=120_000)
    for attempt in range(3):
        page.wait_for_timeout(1000)  # a kernel that has only just connected may miss the restart
        page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
        page.locator(".lm-Menu-item", has_text="Restart Kernel and Run All Cells").click()
        page.wait_for_timeout(500)
        page.locator(".jp-Dialog .jp-mod-accept").click()
        try:
            page.wait_for_function(RUNNING, timeout=20_000)
            break
        except TimeoutError:
            if attempt == 2:
                raise
    page.wait_for_function(f"() => !({RUNNING})()", timeout=SECONDS_TO_RUN * 1000, polling=250)
    for _ in range(3):  # folded cells show no prompt: the kernel has to stay idle
        idle.wait_for(timeout=SECONDS_TO_RUN * 1000)
        page.wait_for_timeout(700)
    page.wait_for_function(
        "() => document.fonts.status === 'loaded' && [...document.querySelectorAll('.jp-Notebook img')]"
        ".every((image) => image.complete)"
    )


def saved(page: Page, path: Path) -> NotebookNode:
    """The notebook as the reader's *Save* leaves it on disk."""
    before = path.stat().st_mtime_ns
    page.locator(".jp-Notebook .jp-Cell").first.click(position={"x": 3, "y": 3})
    page.keyboard.press("Control+s")
    for _ in range(100):
        if path.stat().st_mtime_ns != before:
            break
        page.wait_for_timeout(100)
    page.wait_for_timeout(300)
    return normalise(nbformat.read(path, as_version=4))


def run_problems(notebook: NotebookNode, ran: NotebookNode) -> list[str]:
    """Cells of the book that did not run in the reader's copy, or not in order, or gave another output."""
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    problems = [
        f"run as number {cell.execution_count}, not {number}: {first_line(cell)!r}"
        for number, cell in enumerate(code, start=1)
        if cell.execution_count != number
    ]
    for (source, stored), (_, new) in zip(compared_outputs(notebook), compared_outputs(ran), strict=True):
        if stored != new:
            problems.append(f"another output than the book's: {source.splitlines()[0]!r}")
    return problems


def page_problems(notebook: NotebookNode, cells: list[dict[str, Any]]) -> list[str]:
    """What is wrong on the page; `notebook` says what should be there."""
    problems = []
    if len(cells) != len(notebook.cells):
        return [f"{len(cells)} cells in the page, {len(notebook.cells)} in the file"]
    for index, (cell, seen) in enumerate(zip(notebook.cells, cells, strict=True)):
        where = f"cell {index}, {first_line(cell)!r}: "
        found = code_problems(cell, seen) if cell.cell_type == "code" else markdown_problems(cell, seen)
        if cell.cell_type == "code" and seen["images"]:
            following = cells[index + 1] if index + 1 < len(cells) else {}
            if not re.match(r"Figure \w\w\.\d+\. \S", following.get("text", "")):
                found.append("no caption follows the figure")
        problems += [where + problem for problem in found]
    return problems


def first_line(cell: NotebookNode) -> str:
    return cell.source.split("\n", 1)[0][:80]


def code_problems(cell: NotebookNode, seen: dict[str, Any]) -> list[str]:
    problems = []
    tags = cell.metadata.get("tags", [])
    if seen["errors"] != ("raises-exception" in tags):
        problems.append(f"{seen['errors']} errors or warnings shown, with the tags {tags}")
    if seen["folded"] != bool(cell.metadata.get("jupyter", {}).get("source_hidden")):
        problems.append("folded" if seen["folded"] else "not folded")
    stored = [output.get("data", {}) for output in cell.outputs]
    if len(seen["images"]) != sum("image/png" in data for data in stored):
        problems.append(f"{len(seen['images'])} pictures shown")
    for image in seen["images"]:
        if min(*image["natural"], *image["shown"]) < 50:
            problems.append(f"a picture of {image['natural']} pixels, shown as {image['shown']}")
    if seen["wider"]:
        problems.append("a picture is wider than its cell")
    if len(seen["html"]) != sum("text/html" in data for data in stored):
        problems.append(f"{len(seen['html'])} HTML outputs shown")
    for html in seen["html"]:
        if min(html["shown"]) < 10 or html["overflows"]:
            problems.append(f"an HTML output is shown as {html['shown']}, or is wider than that")
        if html["contrast"] < READABLE:
            problems.append(f"text in an HTML output has a contrast of {html['contrast']:.1f}")
    return problems


def markdown_problems(cell: NotebookNode, seen: dict[str, Any]) -> list[str]:
    if not seen["rendered"] or seen["height"] < 5:
        return ["not rendered"]
    source = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)
    problems = []
    if seen["formula_errors"] or (seen["formulas"] > 0) != bool(re.search(r"\$[^$]+\$", source)):
        problems.append(f"{seen['formulas']} formulas, {seen['formula_errors']} with errors")
    if seen["tables"] != len(re.findall(r"^\|[\s:|-]+\|$", source, flags=re.MULTILINE)):
        problems.append(f"{seen['tables']} tables")
    if left_over := MARKUP.search(seen["prose"]):
        problems.append(f"markup left over: {left_over[0]!r}")
    if seen["wider"]:
        problems.append("a table, a formula or a code block is wider than its cell")
    if seen["contrast"] < 3:  # links and comments of code have JupyterLab's own colours
        problems.append(f"text has a contrast of {seen['contrast']:.1f}")
    return problems


def take_pictures(page: Page, notebook: NotebookNode, folder: Path, prefix: str) -> int:
    """Pictures of figures and HTML outputs, of the top of the page and of the exercises; returns how many figures."""
    cells = page.locator(".jp-Notebook .jp-Cell")
    num_figures = num_html = 0

    def picture(locator: Locator | Page, name: str) -> None:
        if isinstance(locator, Page) or locator.count():  # what is missing, page_problems() has said
            locator.screenshot(path=folder / f"{prefix}_{name}.png")

    for index, cell in enumerate(notebook.cells):
        data = [set(output.get("data", {})) for output in cell.get("outputs", [])]
        if any("image/png" in kinds for kinds in data):
            num_figures += 1
            cells.nth(index).scroll_into_view_if_needed()
            picture(cells.nth(index).locator(".jp-OutputArea-output img").first, f"figure_{num_figures}")
        if any("text/html" in kinds for kinds in data):
            num_html += 1
            picture(cells.nth(index), f"html_{num_html}")
        if cell.cell_type == "markdown" and re.search(r"^## Exercises", cell.source, flags=re.MULTILINE):
            cells.nth(index).evaluate("cell => (cell.querySelector('#Exercises') ?? cell).scrollIntoView()")
            page.wait_for_timeout(300)
            picture(page, "exercises")
    cells.first.evaluate("cell => cell.scrollIntoView()")
    page.wait_for_timeout(300)
    picture(page, "top")
    return num_figures


def run_chapter(page: Page, lab: Lab, path: Path, output: Path, theme: str) -> tuple[list[str], str]:
    """Run and check one chapter in one theme; returns its problems, and a line that says what was seen."""
    start = time.perf_counter()
    run_all_cells(page, lab, path.name)
    seconds = time.perf_counter() - start
    notebook = nbformat.read(path, as_version=4)
    problems = page_problems(notebook, page.evaluate(DESCRIBE_CELLS))
    is_light = page.locator("body").get_attribute("data-jp-theme-light") == "true"
    if is_light != (theme == "light"):
        problems.append("the page is in the other theme")
    num_figures = take_pictures(page, notebook, output, f"{path.name[:2]}_{theme}")
    problems += run_problems(notebook, saved(page, lab.notebooks / path.name))
    num_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    return problems, f"{num_cells} cells in {seconds:.0f} s, {num_figures} figures"


def run_theme(theme: str, paths: list[Path], output: Path, chromium: str) -> int:
    """All chapters in one theme; prints a line for each and its problems, and returns how many chapters have any."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="minillm-browser-", ignore_cleanup_errors=True) as temporary:
        with jupyterlab(Path(temporary), theme) as lab, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_FLAGS))
            for path in paths:
                context = browser.new_context(viewport={"width": 1400, "height": 1000})
                page = context.new_page()
                page.set_default_timeout(120_000)  # for slow machines
                outside: list[str] = []
                broken: list[str] = []

                def noted(request: Any, outside: list[str] = outside) -> None:
                    if request.url.startswith(("http", "ws")) and "//127.0.0.1:" not in request.url:
                        outside.append(f"a request to {request.url}")

                page.on("request", noted)
                page.on("pageerror", lambda error, broken=broken: broken.append(f"a script failed: {error}"))
                try:
                    problems, summary = run_chapter(page, lab, path, output, theme)
                except PlaywrightError as error:
                    page.screenshot(path=output / f"{path.name[:2]}_{theme}_failed.png")
                    problems, summary = [str(error)], "not finished"
                # JupyterLab itself complains of what a restart cut off.
                problems += sorted({*outside, *(error for error in broken if "Canceled future" not in error)})
                print(f"{path.stem}, {theme}: {summary}, {len(problems)} problems", flush=True)
                for problem in problems:
                    print(f"  {problem}", flush=True)
                failed += bool(problems)
                context.close()
                end_sessions(lab)
            browser.close()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the chapters in JupyterLab in Chromium, and look at the pages.")
    parser.add_argument("chapters", nargs="*", help="first characters of file names, such as 01 (default: all)")
    parser.add_argument("--output", type=Path, default=Path("browser-report"), help="folder for pictures")
    parser.add_argument("--themes", nargs="+", choices=THEMES, default=list(THEMES))
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    paths = notebook_paths(REPOSITORY / "notebooks", tuple(options.chapters))
    if not paths:
        parser.error(f"no chapter matches {options.chapters}")
    if not options.chromium:
        parser.error("no Chromium found; name one with --chromium PATH")
    options.output.mkdir(parents=True, exist_ok=True)
    failed = sum(run_theme(theme, paths, options.output, options.chromium) for theme in options.themes)
    print(f"pictures are in {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
