"""The command line: what it prints, what it exits with, and that an error is one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint

from minillm import cli
from minillm.loader import BUNDLED_MODEL

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint with a byte tokenizer."""
    return str(tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model"), tokenizer=True))


@pytest.fixture
def run(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def is_one_line_error(err):
    return err.startswith("minillm: error: ") and err.count("\n") == 1 and "Traceback" not in err


# --- arguments


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["demo", "--help"], ["doctor", "--help"]])
def test_help_names_the_options_and_shows_examples(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "") and out.startswith("usage: minillm")
    assert len(arguments) == 1 or "examples:\n  python -m minillm" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_without_a_command_the_help_is_shown(run):
    code, out, err = run()
    assert (code, err) == (2, "") and "generate" in out and "bench" in out


def test_every_option_of_the_library_is_there():
    from minillm.config import EngineConfig
    from minillm.request import SamplingParams

    parsed = cli.make_parser().parse_args(["generate", "x", "--no-prefix-caching", "--seed", "1"])
    assert cli.engine_options(parsed) == {"prefix_caching": False}
    known = {name for name, _, _ in cli.ENGINE_OPTIONS} | {"prefix_caching"}
    assert known <= set(EngineConfig.field_names())
    assert {name for name, _, _ in cli.SAMPLING_OPTIONS} <= set(SamplingParams.__dataclass_fields__)
    assert cli.sampling_options(parsed) == {"max_tokens": cli.MAX_NEW_TOKENS, "seed": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sing"], "invalid choice"),
        (["generate"], "PROMPT"),
        (["generate", "x", "--top-k", "many"], "--top-k"),
        (["generate", "x", "--dtype", "int3"], "--dtype"),
        (["generate", "x", "--temprature", "1"], "--temprature"),
        (["generate", "x", "y", "--stream"], "--stream"),
        (["generate", "x", "--stream", "--n", "2"], "--n"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--min-tokens", "9", "--max-tokens", "3"], "min_tokens"),
        (["generate", "x", "--model", "/no/such/folder"], "/no/such/folder"),
        (["demo", "--stories", "0"], "--stories"),
        (["demo", "--stories", "27"], "--stories"),
        (["demo", "--every", "0"], "--every"),
        (["doctor", "--now"], "--now"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and is_one_line_error(err) and words in err


def test_options_of_the_engine_are_checked(run, model):
    for options, words in (
        (["--page-size", "0"], "page_size"),
        (["--device", "tpu"], "device"),
        (["--kernels", "flashinfer", "--device", "cpu"], "flashinfer"),
    ):
        code, out, err = run("generate", "x", "--model", model, *options)
        assert (code, out) == (2, "") and is_one_line_error(err) and words in err


# --- generate


def test_generate_is_repeatable_and_streams_the_same(run, model):
    options = ("--model", model, "--temperature", "0", "--max-tokens", "12")
    code, out, err = run("generate", "Once upon", *options)
    assert (code, err) == (0, "") and out.startswith("Once upon") and len(out) > len("Once upon\n")
    assert run("generate", "Once upon", "--stream", *options) == (0, out, "")
    assert run("generate", "Once upon", "--no-echo", *options) == (0, out.removeprefix("Once upon"), "")


def test_generate_takes_several_prompts_and_stdin(run, model, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("From a file\n"))
    code, out, err = run("generate", "One", "-", "--n", "2", "--model", model, "--max-tokens", "3", "--seed", "1")
    assert (code, err) == (0, "")
    stories = out.split("\n" + "-" * 40 + "\n")
    assert [story[:3] for story in stories] == ["One", "One", "Fro", "Fro"]


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_shown(run, model):
    for extra in ([], ["--stream"]):
        code, out, err = run("generate", "x" * 500, "--model", model, *extra)
        assert (code, out.strip()) == (2, "") and is_one_line_error(err) and "max_model_len" in err


def test_a_request_that_failed_is_reported(capsys):
    from types import SimpleNamespace

    fine = SimpleNamespace(finish_reason="stop", request_id="a", error=None)
    failed = SimpleNamespace(finish_reason="error", request_id="b", error="not finite")
    assert cli.report_failures([fine]) == 0
    assert cli.report_failures([fine, failed]) == 2
    assert capsys.readouterr().err == "minillm: error: b failed: not finite\n"


# --- demo


def test_demo_shows_batch_pages_stories_and_timings(run, model):
    code, out, err = run("demo", "--model", model, "--stories", "5", "--max-tokens", "24", "--seed", "3")
    assert (code, err) == (0, "") and "\033" not in out
    rows = re.findall(r"^ +(\d+)  ([A-Z]*) +([A-Z0-9. ]*?) +([A-Z*+.]{36})$", out, flags=re.MULTILINE)
    assert rows and rows[0][0] == "1" and rows[0][1] == "" and rows[0][2].startswith("A")
    assert any(len(decode) > 1 for _, decode, _, _ in rows), "several stories decode in one step"
    assert rows[-1][3].strip("+.") == "", "at the end no page belongs to a story"
    assert [line[0] for line in re.findall(r"^[A-E]   \S.*$", out, flags=re.MULTILINE)] == list("ABCDE")
    timings = re.findall(r"^([A-E]) +(\d+) +(\d+) +(\d+) +\d+ ms +\d+ ms +\S+  (\w+)$", out, flags=re.MULTILINE)
    assert [row[0] for row in timings] == list("ABCDE")
    assert all(phase in out for phase in ("schedule", "prepare", "forward", "sample"))
    assert max(len(line) for line in out.splitlines()) <= 80


def test_demo_survives_too_few_pages(run, model):
    code, out, err = run(
        "demo", "--model", model, "--stories", "4", "--num-pages", "14", "--max-tokens", "64", "--every", "100"
    )
    assert (code, err) == (0, "") and "goes back to the queue" in out
    assert len(re.findall(r"^[A-D] +\d+ .* (?:stop|length)$", out, flags=re.MULTILINE)) == 4


def test_colours_are_for_terminals():
    from minillm.cli_demo import Paint

    assert Paint(False).letters("A.*") == "A.*" and Paint(False).dim("x") == "x"
    painted = Paint(True).letters("AH.*")
    assert re.sub(r"\033\[[0-9;]*m", "", painted) == "AH.*"
    assert len(set(re.findall(r"38;5;\d+", painted))) == 1, "A and H share a colour: there are seven"


# --- doctor and bench


def test_doctor_says_what_works(run):
    if not (BUNDLED_MODEL / "config.json").exists():
        pytest.skip("the bundled model is not here")
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and "The CPU path works" in out
    assert re.search(r"ok  a first story +\"Once upon a time", out)


def test_doctor_says_what_does_not(run, monkeypatch):
    from minillm import doctor

    broken = doctor.Check("torch", False, "not installed", "install it")
    monkeypatch.setattr(doctor, "EVERYTHING", (lambda: broken,))
    code, out, _ = run("doctor")
    assert code == 1 and "--  torch         not installed\n      -> install it" in out and "CPU path works" not in out


def test_doctor_gpu_fails_where_there_is_none(run, monkeypatch):
    from minillm import doctor

    absent = doctor.Check("GPU", False, "no NVIDIA GPU found", "none needed")
    monkeypatch.setattr(doctor, "GPU", (lambda: absent,))
    monkeypatch.setattr(cli, "check_cpu_path", lambda: doctor.Check("a first story", True, "told"))
    monkeypatch.setattr(doctor, "EVERYTHING", (doctor.check_python,))
    assert run("doctor")[0] == 0
    code, out, _ = run("doctor", "--gpu")
    assert code == 1 and "-> none needed" in out


def test_bench_gets_its_own_arguments(run, monkeypatch):
    import types

    fake = types.ModuleType("minillm.lab.bench")
    seen = []
    fake.main = seen.append
    monkeypatch.setitem(sys.modules, "minillm.lab.bench", fake)
    import minillm.lab

    monkeypatch.setattr(minillm.lab, "bench", fake, raising=False)
    assert run("bench", "--peer", "transformers")[0] == 0
    assert seen == [["--peer", "transformers"]]


# --- as a process


def process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "minillm", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_module_runs_and_answers_an_error_at_once():
    started = time.perf_counter()
    child = process("generate", "x", "--top-k", "many")
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (2, "") and is_one_line_error(err)
    assert time.perf_counter() - started < 5, "a mistyped option does not wait for torch"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_ends_quietly(model):
    child = process("generate", "x", "--stream", "--model", model, "--max-tokens", "200", "--ignore-eos")
    assert child.stdout.read(1) == "x"  # the model is loaded, the request runs
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=30)[1]
    assert child.returncode in (130, 0) and "Traceback" not in err  # 0: it was faster than the signal
    assert child.returncode == 0 or err.strip().endswith("minillm: interrupted")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error(model):
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [sys.executable, "-m", "minillm", "generate", "x", "--model", model, "--max-tokens", "2"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert "Traceback" not in child.stderr
