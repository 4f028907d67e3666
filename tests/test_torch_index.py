"""Which index `make` takes torch from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "torch_index.py"


@pytest.fixture
def tool(monkeypatch):
    """The script as a module, on a Linux without a GPU."""
    spec = importlib.util.spec_from_file_location("torch_index", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module, "answers", lambda url, seconds: True)
    return module


def test_linux_without_a_gpu_takes_the_cpu_build(tool):
    assert tool.pip_options("auto")[0] == ["--extra-index-url", tool.CPU_INDEX]


def test_an_index_that_does_not_answer_is_not_named_to_pip(tool, monkeypatch):
    monkeypatch.setattr(tool, "answers", lambda url, seconds: False)
    options, why = tool.pip_options("auto")
    assert options == [] and "does not answer" in why


def test_a_gpu_gets_the_cuda_build(tool, monkeypatch):
    monkeypatch.setattr(tool, "has_nvidia_gpu", lambda: True)
    assert tool.pip_options("auto")[0] == []


def test_other_systems_have_a_cpu_build_anyway(tool, monkeypatch):
    monkeypatch.setattr(tool.sys, "platform", "darwin")
    assert tool.pip_options("auto")[0] == []


def test_the_choice_can_be_made_by_hand(tool):
    assert tool.pip_options("none")[0] == []
    assert tool.pip_options("https://example.org/whl")[0] == ["--extra-index-url", "https://example.org/whl"]


def test_a_look_up_that_hangs_is_given_up(tool, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tool.urllib.request, "urlopen", lambda url, timeout: time.sleep(30))
    started = time.perf_counter()
    assert not tool.answers(tool.CPU_INDEX, seconds=0.2)
    assert time.perf_counter() - started < 5


def test_the_script_prints_options_on_stdout_and_reasons_on_stderr():
    done = subprocess.run([sys.executable, str(SCRIPT), "none"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "\n") and done.stderr.startswith("minillm: ")
