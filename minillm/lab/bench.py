"""Benchmarks: what the engine does in a second, beside a peer in the same run; and what it costs the host.

Each comparison alternates between the two sides and takes the best of several rounds, since a busy machine only ever
makes a run slower. What is reported is the ratio; the absolute numbers are of this machine, today.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillm.llm import LLM
from minillm.loader import BUNDLED_MODEL
from minillm.page_manager import PageManager
from minillm.page_protocol import check_batch_arrays
from minillm.request import Request
from minillm.sampling_params import SamplingParams
from minillm.scheduler import Scheduler

PROMPT = "Once upon a time there was a king who had three daughters"


def provenance(command: str) -> dict[str, Any]:
    """Where and with what a number was measured."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "date": date.today().isoformat(),
        "command": command,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "transformers", "numpy", "flashinfer-python")},
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def side_by_side(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """The best rate of each side, in what its function counts per second; the sides take turns."""
    best = dict.fromkeys(sides, 0.0)
    for _ in range(rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            count = run()
            best[name] = max(best[name], count / (time.perf_counter() - started))
    return best


class TransformersPeer:
    """transformers' `generate` on the same checkpoint, in float32."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """Exactly `num_new` greedy tokens for each prompt, as one batch, padded on the left."""
        longest = max(map(len, prompts))
        token_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self.model.generate(
                token_ids,
                attention_mask=mask,
                max_new_tokens=num_new,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,
                eos_token_id=None,
            )
        return out[:, longest:].tolist()


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def bench_single(llm: LLM, peer: TransformersPeer | None, rounds: int, num_tokens: int = 200) -> dict[str, Any]:
    """Tokens per second of one request that decodes alone."""
    prompt = llm.engine.intake.encode(PROMPT)
    tokens: dict[str, list[int]] = {}

    def ours() -> int:
        tokens["minillm"] = llm.generate(prompt, greedy(num_tokens), progress=False)[0].token_ids
        return num_tokens

    def theirs() -> int:
        assert peer is not None
        tokens["transformers"] = peer.generate([prompt], num_tokens)[0]
        return num_tokens

    sides = {"minillm": ours} | ({"transformers": theirs} if peer else {})
    side_by_side(sides, 1)  # warm
    rates = side_by_side(sides, rounds)
    return report(rates, "tokens/s", equal=len(set(map(tuple, tokens.values()))) == 1)


def ragged_workload(num_requests: int, vocab_size: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Prompts and output lengths, each uniform in 16 to 256."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(1, vocab_size) for _ in range(rng.randint(16, 256))], rng.randint(16, 256))
        for _ in range(num_requests)
    ]


def bench_batch(
    llm: LLM, peer: TransformersPeer | None, rounds: int, num_requests: int = 64, batch: int = 64
) -> dict[str, Any]:
    """Tokens asked for per second over ragged requests: continuous batching beside static, left-padded batches."""
    work = ragged_workload(num_requests, llm.engine.model_config.vocab_size)
    asked = sum(n for _, n in work)

    def ours() -> int:
        outputs = llm.generate([p for p, _ in work], [greedy(n) for _, n in work], progress=False)
        return sum(len(output.token_ids) for output in outputs)

    def theirs() -> int:
        assert peer is not None
        for start in range(0, len(work), batch):
            part = work[start : start + batch]
            peer.generate([p for p, _ in part], max(n for _, n in part))
        return asked  # what was generated beyond is of no use to anybody

    sides = {"minillm": ours} | ({"transformers": theirs} if peer else {})
    return report(side_by_side(sides, rounds), "tokens/s")


def report(rates: dict[str, float], unit: str, **facts: Any) -> dict[str, Any]:
    """Rates, and the ratio of the first to the second."""
    result: dict[str, Any] = {"unit": unit, "rates": {name: round(rate, 1) for name, rate in rates.items()}, **facts}
    if len(rates) == 2:
        first, second = rates.values()
        result["ratio"] = round(first / second, 2)
    return result


def bench_host(num_running: int = 256, num_waiting: int = 1000, num_steps: int = 200) -> dict[str, float]:
    """Milliseconds of host work in a decode step without a model: schedule, CSR arrays, completion; the median."""
    pages = PageManager(num_running * 64, 16)
    scheduler = Scheduler(pages, max_running=num_running, max_batch_tokens=1 << 20)
    params = SamplingParams(max_tokens=1 << 12)
    for index in range(num_running + num_waiting):
        tokens = [index] * 16 + list(range(500))
        scheduler.add(Request(f"request-{index}", tokens, params, max_num_tokens=1 << 14))
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        plan = scheduler.schedule()
        arrays = pages.batch_arrays(plan.chunks)
        scheduler.complete(plan)
        times.append(time.perf_counter() - started)
        check_batch_arrays(arrays, plan.chunks, pages.num_pages, pages.page_size)
        for request in plan.requests:
            request.token_ids.append(0)
    return {"median_ms": round(1e3 * float(np.median(times[1:])), 3)}


def bench_import(rounds: int = 5) -> dict[str, float]:
    """Seconds that a fresh interpreter takes to import, less what an empty one takes; the best of several."""

    def best(statement: str) -> float:
        return min(
            seconds(lambda: subprocess.run([sys.executable, "-c", statement], check=True)) for _ in range(rounds)
        )

    empty, torch_alone = best("pass"), best("import torch")
    return {
        "import minillm": round(best("import minillm") - empty, 3),
        "import torch": round(torch_alone - empty, 3),
        "from minillm import LLM": round(best("from minillm import LLM") - empty, 3),
    }


def main(argv: list[str]) -> int:
    """`python -m minillm bench`."""
    parser = argparse.ArgumentParser(prog="minillm bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default=None, help="a checkpoint folder; the bundled model if left out")
    parser.add_argument("--peer", choices=("transformers",), help="measure transformers' generate beside it")
    parser.add_argument("--only", choices=("single", "batch", "host", "import"), help="one of the measurements")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement; the best counts (default 3)")
    parser.add_argument("--requests", type=int, default=64, help="of the batch (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2)")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args(argv)
    for name in ("rounds", "requests", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"provenance": provenance("python -m minillm bench " + " ".join(argv))}
    wanted = (args.only,) if args.only else ("single", "batch", "host", "import")
    if {"single", "batch"} & set(wanted):
        with LLM(args.model, device="cpu", prefix_caching=False) as llm:
            peer = TransformersPeer(Path(args.model or BUNDLED_MODEL)) if args.peer else None
            if "single" in wanted:
                results["single"] = bench_single(llm, peer, args.rounds)
                print("one request decoding:          ", describe(results["single"]), flush=True)
            if "batch" in wanted:
                results["batch"] = bench_batch(llm, peer, args.rounds, args.requests, batch=args.requests)
                print(f"{args.requests} ragged requests:            ", describe(results["batch"]), flush=True)
    if "host" in wanted:
        results["host"] = {f"{n} waiting": bench_host(num_waiting=n) for n in (0, 10_000)}
        print("host work, 256 running requests:", json.dumps(results["host"]), flush=True)
    if "import" in wanted:
        results["import"] = bench_import()
        print("imports, seconds:               ", json.dumps(results["import"]), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {args.out}")
    return 0


def describe(result: dict[str, Any]) -> str:
    parts = [f"{name} {rate:g} {result['unit']}" for name, rate in result["rates"].items()]
    if "ratio" in result:
        parts.append(f"ratio {result['ratio']:g}")
    if result.get("equal") and len(result["rates"]) == 2:
        parts.append("the same tokens")
    return ", ".join(parts)
