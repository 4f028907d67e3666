"""Two ranks give what one gives; and whatever dies, nothing hangs and nothing stays behind."""

import ast
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config, tiny_checkpoint

import minillm
from minillm import LLM, SamplingParams
from minillm import distributed as distributed_module
from minillm.config import ModelConfig
from minillm.errors import EngineDeadError, WorkerError

ROOT = Path(minillm.__file__).parent.parent
SHM = Path("/dev/shm")
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=10, ignore_eos=True, logprobs=1)
SHARED = list(range(40, 75))
PROMPTS = [[5, 6, 7], list(range(8, 60)), [*SHARED, 90, 91], [*SHARED, 92], [100]]
FAMILIES: dict[str, dict[str, Any]] = {  # what is cut in another way, or not at all
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "vocab_size": 321},
    "mistral": {"tie_word_embeddings": False, "vocab_size": 323},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "num_attention_heads": 8, "num_key_value_heads": 4},
}

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")


def make(model: Any, size: int = 2, **options: Any) -> LLM:
    defaults = {"device": "cpu", "num_pages": 64, "page_size": 8, "max_batch_tokens": 24, "max_running": 4}
    return LLM(model, tensor_parallel_size=size, **defaults | {"tokenizer": None} | options)


def folders() -> set[Path]:
    return set(SHM.glob("minillm-*"))


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    before = folders()
    yield
    gc.collect()
    assert until(lambda: folders() <= before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"), **FAMILIES["qwen3"], tokenizer=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_tokens_of_one(family: str, tmp_path: Path) -> None:
    """With prompts in chunks, pages shared through the prefix cache, and more requests than run at once."""
    folder = tiny_checkpoint(family, tmp_path, **FAMILIES[family])
    with make(folder, 1) as one, make(folder, 2) as two:
        for params in (GREEDY, SAMPLED):
            alone, together = one.generate(PROMPTS, params), two.generate(PROMPTS, params)
            assert [output.token_ids for output in together] == [output.token_ids for output in alone]
            assert all(output.finish_reason == "length" for output in together)
            assert together[3].metrics.num_cached_tokens == alone[3].metrics.num_cached_tokens
        assert together[3].metrics.num_cached_tokens > 0
        for a, b in zip(alone, together, strict=True):
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert next(iter(x.values())) == pytest.approx(next(iter(y.values())), abs=1e-3)
        assert two.engine.runner.bytes_per_page * 2 == one.engine.runner.bytes_per_page
        whole, shard = (
            sum(slot.target.numel() for slot in llm.engine.runner.model.weight_slots().values()) for llm in (one, two)
        )
        assert 0.5 * whole <= shard < 0.55 * whole
        two.engine.page_manager.check_invariants()
        assert two.engine.page_manager.num_used == 0


def test_random_weights_are_the_same_model_however_it_is_cut() -> None:
    config = ModelConfig("llama", 321, 64, 96, 2, 4, 2, 16, 256)
    with make(config, 1, weights="random", seed=5) as one, make(config, 2, weights="random", seed=5) as two:
        expected = [output.token_ids for output in one.generate(PROMPTS, GREEDY)]
        assert [output.token_ids for output in two.generate(PROMPTS, GREEDY)] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


SCRIPT = """
from minillm import LLM, SamplingParams
import sys
llm = LLM(sys.argv[1], device="cpu", tensor_parallel_size=2, num_pages=64)
print("made")  # with multiprocessing, each worker would run this script again
print(llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))[0].token_ids)
print([worker.pid for worker in llm.engine.distributed.workers])
"""


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    with make(checkpoint, 1) as one:
        return one.generate([5, 6, 7], GREEDY)[0].token_ids


def test_a_script_without_a_guard(checkpoint: Path, expected: list[int], tmp_path: Path) -> None:
    """It also ends without closing the engine; and a file of the current folder is nobody's module."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made, tokens, pids = done.stdout.splitlines()
    assert (made, ast.literal_eval(tokens)) == ("made", expected)
    assert until(lambda: not any(map(is_alive, ast.literal_eval(pids))))


def test_a_notebook(checkpoint: Path, expected: list[int]) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    lines = ["import sys", f"sys.argv = ['', {str(checkpoint)!r}]", *SCRIPT.splitlines()]
    cells = [nbformat.v4.new_code_cell("\n".join(lines)), nbformat.v4.new_code_cell("del llm")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=150, kernel_name="python3").execute()
    printed = "".join(output.text for output in cells[0].outputs if output.output_type == "stream").splitlines()
    assert str(expected) in printed
    assert until(lambda: not any(map(is_alive, ast.literal_eval(printed[-1]))))


@pytest.mark.parametrize("moment", ["idle", "running"])
def test_a_worker_that_is_killed_ends_the_engine(moment: str, checkpoint: Path) -> None:
    llm = make(checkpoint, max_running=2)
    (worker,) = llm.engine.distributed.workers
    started = time.monotonic()
    if moment == "idle":
        llm.generate(PROMPTS[0], GREEDY)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        outputs = llm.generate(PROMPTS, GREEDY)
    else:
        stream_ids = [llm.engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        model, steps = llm.engine.runner.model, []
        original = model.forward

        def forward(*args: Any) -> torch.Tensor:
            steps.append(1)
            if len(steps) == 3:
                os.kill(worker.pid, signal.SIGKILL)  # it is waiting for this rank, or already computing
            return original(*args)

        model.forward = forward
        outputs = []
        while llm.engine.has_unfinished():
            outputs += llm.engine.step()
        assert sorted(output.request_id for output in outputs) == sorted(stream_ids)
        assert len(steps) == 3
        del forward, model, original
    assert time.monotonic() - started < 60
    assert len(outputs) == len(PROMPTS)
    for output in outputs:
        assert output.finish_reason == "error"
        assert "rank" in (output.error or "")
    for call in (llm.engine.step, lambda: llm.generate([1]), lambda: llm.stream([1])):
        with pytest.raises(EngineDeadError) as caught:
            call()
        assert isinstance(caught.value.__cause__, WorkerError)
    assert not llm.engine.has_unfinished()
    assert not is_alive(worker.pid)
    assert llm.engine.distributed.workers == []
    llm.close()


def test_a_fault_of_one_rank_in_a_step_ends_the_engine(checkpoint: Path) -> None:
    """The others wait in a sum for a rank that will not come: they are ended, and soon."""
    llm = make(checkpoint)
    pids = [worker.pid for worker in llm.engine.distributed.workers]
    norm = llm.engine.runner.model.layers[1].input_norm

    def add(*args: Any) -> torch.Tensor:
        raise RuntimeError("a bug")

    norm.add = add
    started = time.monotonic()
    output = llm.generate(PROMPTS[0], GREEDY)[0]
    assert time.monotonic() - started < 60
    assert output.finish_reason == "error"
    assert "a bug" in (output.error or "")
    assert not any(map(is_alive, pids))
    with pytest.raises(EngineDeadError, match="a bug"):
        llm.generate([1])


def test_closing_and_dropping_end_the_workers(checkpoint: Path, expected: list[int]) -> None:
    """Two engines in one process, with a process group each; one is closed, the other dropped."""
    gc.disable()
    try:
        closed, dropped = make(checkpoint), make(checkpoint, tokenizer="auto")
        assert closed.generate([5, 6, 7], GREEDY)[0].token_ids == expected
        stream = dropped.stream([5, 6, 7], GREEDY)
        next(stream)
        assert closed.generate([5, 6, 7], GREEDY)[0].token_ids == expected
        list(stream)
        pids = [worker.pid for llm in (closed, dropped) for worker in llm.engine.distributed.workers]
        assert len(set(pids)) == 2
        assert all(map(is_alive, pids))
        for pid in pids:  # the terminal's Ctrl-C reaches the whole foreground group, and whoever is sent it
            assert os.getpgid(pid) != os.getpgid(0)
            os.kill(pid, signal.SIGINT)
        assert dropped.generate([5, 6, 7], GREEDY)[0].token_ids == expected
        closed.close()
        closed.close()
        assert not is_alive(pids[0])
        assert is_alive(pids[1])
        assert dropped.generate([5, 6, 7], GREEDY)[0].token_ids == expected
        pool = weakref.ref(dropped.engine.runner.kv_pool.tensor)
        del stream, dropped
        assert not is_alive(pids[1])
        assert pool() is None
    finally:
        gc.enable()


PARENT = SCRIPT + "\nsys.stdout.flush()\nimport time\n"


@pytest.mark.parametrize("moment", ["idle", "running"])
def test_workers_do_not_outlive_a_killed_parent(moment: str, checkpoint: Path) -> None:
    before = folders()
    ending = "time.sleep(60)" if moment == "idle" else "while True: llm.generate([5] * 100, progress=False)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT + ending, str(checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = ast.literal_eval([parent.stdout.readline() for _ in range(3)][-1])
        assert all(map(is_alive, pids))
        assert len(folders() - before) == 1
        time.sleep(0.1)
        parent.kill()
    assert until(lambda: not any(map(is_alive, pids)))
    assert until(lambda: not folders() - before)


@pytest.mark.parametrize("fault", ["at once", "while it loads"])
def test_a_worker_that_does_not_start(
    fault: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message says why, and nobody waits for the time limit."""
    if fault == "at once":
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\nif 'minillm.distributed' in sys.orig_argv: raise SystemExit('no such luck')\n"
        )
        original = distributed_module._environment
        with_tmp = lambda: original() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}  # noqa: E731
        monkeypatch.setattr(distributed_module, "_environment", with_tmp)
        words = "no such luck"
    else:
        config = ModelConfig.from_hf(checkpoint)
        broken = tiny_checkpoint("qwen3", tmp_path, **FAMILIES["qwen3"])
        original_spec = distributed_module.json.dumps

        def dumps(value: Any, **options: Any) -> str:  # only the worker finds the checkpoint changed
            if isinstance(value, dict) and "checkpoint" in value:
                edit_config(broken, num_hidden_layers=1)
                value = value | {"checkpoint": str(broken)}
            return original_spec(value, **options)

        assert config.num_layers == 2
        monkeypatch.setattr(distributed_module, "json", type("Json", (), {"dumps": staticmethod(dumps)}))
        words = "model.layers.1."
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        make(checkpoint)
    assert time.monotonic() - started < 60
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_pickle_is_read_or_written() -> None:
    """What ranks say to each other is arrays and lines of text: no module that serialises objects is imported."""
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing", "joblib"}
    names = {"load", "save", "broadcast_object_list", "all_gather_object", "send_object_list", "scatter_object_list"}
    files = list((ROOT / "minillm").glob("*.py"))
    assert len(files) > 20
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.split(".")[0] for name in modules}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id in ("torch", "dist", "np") and node.attr in names), (path, node.lineno)
