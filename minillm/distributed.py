"""DistributedManager: the ranks of a tensor-parallel engine, what they say to each other, and their life and death.

Rank 0 is the engine's own process. The others are fresh processes of `python -m minillm.distributed` (not forks, and
no import of the caller's script: an engine may be made anywhere, in a notebook cell too). Each builds its part of the
model and then waits for rank 0 to say what to run. Two channels:

- a pipe to each worker's standard input carries one short line per command. It is also the lifeline: when rank 0
  ends, however it ends, the pipe closes, and the worker with it.
- shared memory (a memory-mapped file) carries the arrays of a step. No object is ever serialised, so none is ever
  unpickled.

Sums over the ranks go through Gloo on CPUs and NCCL on GPUs, in a process group of the engine's own: torch's default
group is global to a process, and would be shared by two engines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minillm.config import EngineConfig, ModelConfig, RopeConfig
from minillm.context import BatchArrays, Group, SoloGroup
from minillm.errors import ConfigError, WorkerError
from minillm.loader import ModelLoader
from minillm.runner import ModelRunner
from minillm.validation import first_line

START_SECONDS = 300.0  # for all ranks to meet: importing torch takes a while on a busy machine
STEP_SECONDS = 120.0  # for a rank to arrive at a sum
ARRAYS = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "positions", "batch_indices")


class ProcessGroup:
    """The ranks of one engine: sums and concatenations over them.

    Args:
        folder: where the ranks find each other.
        rank, size: which of how many this is.
        device: where the tensors live.
        logs: of the other ranks, for the message when one is gone.

    Raises:
        WorkerError: (any method) another rank has died, or does not answer.
    """

    def __init__(self, folder: Path, rank: int, size: int, device: torch.device, logs: Sequence[Path] = ()):
        self.rank, self.size, self._logs = rank, size, logs
        store = dist.FileStore(str(folder / "store"), size)
        store.set_timeout(timedelta(seconds=START_SECONDS))
        try:
            if device.type == "cuda":
                self._group: Any = dist.ProcessGroupNCCL(store, rank, size)  # type: ignore[call-arg]
            else:
                options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
                options._timeout = timedelta(seconds=STEP_SECONDS)
                self._group = dist.ProcessGroupGloo(store, rank, size, options)
            self.all_reduce(torch.zeros(1, device=device))
        except RuntimeError as error:
            raise WorkerError(f"the {size} ranks did not find each other: {first_line(error)}") from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the ranks, in place."""
        self._wait(self._group.allreduce([x]))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, joined along the last dimension."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(self._group.allgather([parts], [x.contiguous()]))
        return torch.cat(parts, dim=-1)

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            reason = f"another rank of the engine is gone, or does not answer: {_last_words(self._logs)}"
            raise WorkerError(reason) from error


class StepMailbox:
    """Shared memory for the arrays of one step: rank 0 writes, the others read.

    There is no lock: rank 0 writes the next step only after the sums of the last one, which no rank reaches before it
    has read its arrays.
    """

    def __init__(self, path: Path, capacity: int, create: bool = False):
        self._memory = np.memmap(path, np.int32, "w+" if create else "r+", shape=(capacity,))

    @staticmethod
    def capacity(config: EngineConfig, max_model_len: int) -> int:
        """How many int32 the largest step takes."""
        tokens = max(config.max_batch_tokens, config.max_running)
        pages = max(config.max_running * -(-max_model_len // config.page_size), tokens + config.max_running)
        return 8 + 3 * tokens + 4 * (tokens + 1) + pages

    def write(self, arrays: BatchArrays, token_ids: np.ndarray, logits_rows: np.ndarray) -> None:
        parts = [*(getattr(arrays, name) for name in ARRAYS), token_ids, logits_rows]
        sizes = np.array([len(part) for part in parts], dtype=np.int32)
        message = np.concatenate([sizes, *parts])
        self._memory[: len(message)] = message

    def read(self, page_size: int) -> tuple[BatchArrays, np.ndarray, np.ndarray]:
        sizes = self._memory[: len(ARRAYS) + 2].astype(np.int64)
        ends = len(sizes) + np.cumsum(sizes)
        parts = [np.array(self._memory[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
        arrays = BatchArrays(**dict(zip(ARRAYS, parts, strict=False)), page_size=page_size)
        return arrays, parts[-2], parts[-1]


class DistributedManager:
    """Starts, commands and ends the other ranks. With one rank it does nothing.

    Args:
        loader, config: what each rank runs; `config` is resolved.
        random_weights: fill weights from the seed instead of a checkpoint.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
        WorkerError: a worker did not start.
    """

    def __init__(self, loader: ModelLoader, config: EngineConfig, random_weights: bool = False):
        self.group: Group = SoloGroup()
        self.workers: list[subprocess.Popen[bytes]] = []
        size = config.tensor_parallel_size
        if size == 1:
            self._finalizer = weakref.finalize(self, _stop, self.workers, None)
            return
        if config.device.startswith("cuda") and torch.cuda.device_count() < size:
            raise ConfigError(
                f"tensor_parallel_size {size} needs {size} GPUs, PyTorch sees {torch.cuda.device_count()}"
            )
        shm = Path("/dev/shm")  # memory, not a disk, where there is one
        folder = Path(tempfile.mkdtemp(prefix="minillm-", dir=shm if os.access(shm, os.W_OK) else None))
        self._finalizer = weakref.finalize(self, _stop, self.workers, folder)
        self._logs = [folder / f"rank{rank}.log" for rank in range(1, size)]
        try:
            max_model_len = config.max_model_len or loader.config.max_position_embeddings
            capacity = StepMailbox.capacity(config, max_model_len)
            self._mailbox = StepMailbox(folder / "mailbox", capacity, create=True)
            threads = max(1, torch.get_num_threads() // size)
            for rank, log in enumerate(self._logs, start=1):
                spec = {
                    "folder": str(folder),
                    "parent": os.getpid(),
                    "rank": rank,
                    "checkpoint": None if loader.folder is None else str(loader.folder),
                    "model": asdict(loader.config),
                    "config": asdict(config),
                    "random_weights": random_weights,
                    "capacity": capacity,
                    "num_threads": threads,
                }
                with log.open("wb") as stderr:
                    worker = subprocess.Popen(
                        [sys.executable, "-P", "-m", "minillm.distributed"],  # -P: nothing from the current folder
                        stdin=subprocess.PIPE,
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                        env=_environment(),
                        start_new_session=True,  # the terminal's Ctrl-C is for rank 0
                    )
                self.workers.append(worker)
                self._send(worker, json.dumps(spec))
            self._await_start(folder)
            self.group = ProcessGroup(folder, 0, size, torch.device(config.device), self._logs)
        except BaseException:
            self.close()
            raise

    def _await_start(self, folder: Path) -> None:
        """Wait until every worker is about to look for the others: nobody would notice one that dies before."""
        deadline = time.monotonic() + START_SECONDS
        while not all((folder / f"rank{rank}.ready").exists() for rank in range(1, len(self.workers) + 1)):
            self.check()
            if time.monotonic() > deadline:
                raise WorkerError(f"a rank did not start within {START_SECONDS:g} seconds")
            time.sleep(0.01)

    def announce(self, command: str, *details: Any) -> None:
        """Tell the workers what rank 0 is about to do: `pool` with a number of pages, or `step` with its arrays.

        Raises:
            WorkerError: a worker has died.
        """
        if not self.workers:
            return
        self.check()
        if command == "step":
            self._mailbox.write(*details)
            details = ()
        for worker in self.workers:
            self._send(worker, " ".join([command, *map(str, details)]))

    def check(self) -> None:
        """Raise `WorkerError` if a worker has died."""
        for rank, worker in enumerate(self.workers, start=1):
            if worker.poll() is not None:
                raise WorkerError(f"rank {rank} ended with exit code {worker.returncode}: {_last_words(self._logs)}")

    def close(self) -> None:
        """End the workers and remove what they shared. May be called again."""
        self._finalizer()
        self.group = SoloGroup()

    def _send(self, worker: subprocess.Popen[bytes], line: str) -> None:
        pipe: Any = worker.stdin
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except OSError as error:
            raise WorkerError(f"a worker has died: {_last_words(self._logs)}") from error


def _last_words(logs: Sequence[Path]) -> str:
    """The last line that any worker wrote to its standard error: usually its exception."""
    for log in logs:
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        if lines:
            return lines[-1]
    return "it left no message"


def _environment() -> dict[str, str]:
    """The environment of a worker: it must find the same minillm, wherever it was imported from."""
    home = str(Path(__file__).resolve().parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _stop(workers: list[subprocess.Popen[bytes]], folder: Path | None) -> None:
    for worker in workers:
        if worker.stdin is not None:
            try:
                worker.stdin.close()
            except OSError:
                pass  # it had died with a line unread
    for worker in workers:
        try:
            worker.wait(timeout=2.0)
        except subprocess.TimeoutExpired:  # in a sum that will never complete
            worker.kill()
            worker.wait()
    workers.clear()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """A worker: serve rank 0 until it is gone; if it was killed, nobody else removes the folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = json.loads(sys.stdin.readline())
    folder = Path(spec["folder"])
    try:
        serve(spec, folder, sys.stdin)
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        time.sleep(0.2)  # a sum fails a moment before the death of rank 0 shows
        if os.getppid() != spec["parent"]:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def serve(spec: dict[str, Any], folder: Path, commands: Iterable[str]) -> None:
    """Build this rank's part, then do what rank 0 says, line by line."""
    torch.set_num_threads(spec["num_threads"])
    model = ModelConfig(**{**spec["model"], "rope": RopeConfig(**spec["model"]["rope"])})
    config, rank = EngineConfig(**spec["config"]), spec["rank"]
    if config.device.startswith("cuda"):
        config = replace(config, device=f"cuda:{rank}")
    mailbox = StepMailbox(folder / "mailbox", spec["capacity"])
    (folder / f"rank{rank}.ready").touch()
    group = ProcessGroup(folder, rank, config.tensor_parallel_size, torch.device(config.device))
    loader = ModelLoader(model if spec["checkpoint"] is None else spec["checkpoint"])
    runner = ModelRunner(loader, config, group, lambda *_: None, spec["random_weights"])
    for line in commands:
        command, *details = line.split()
        if command == "pool":
            runner.make_pool(int(details[0]))
        else:
            runner.forward(*mailbox.read(config.page_size))


if __name__ == "__main__":
    main()
