"""Soaks: the engine under random load for minutes. `make soak` runs them."""

import random
import time

import pytest

from minillm import LLMEngine, SamplingParams

SECONDS = 120


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1])
def test_random_load_loses_nothing(seed: int) -> None:
    """Arrivals, aborts, preemptions, prefix hits: all end once, alone they say the same, no page is lost."""
    rng = random.Random(seed)
    options = {"max_model_len": 192, "max_running": 12, "num_pages": 60, "page_size": 4, "max_batch_tokens": 48}
    prefixes = [[rng.randrange(1, 4096) for _ in range(40)] for _ in range(3)]
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    ended: dict[str, list] = {}
    aborted: set[str] = set()
    with LLMEngine(device="cpu", **options) as engine:
        started = time.monotonic()
        while time.monotonic() - started < SECONDS or engine.has_unfinished():
            if time.monotonic() - started < SECONDS and rng.random() < 0.3:
                prompt = rng.choice(prefixes)[: rng.randrange(1, 41)] + [rng.randrange(1, 4096)]
                params = SamplingParams(
                    temperature=rng.choice([0.0, 0.8]),
                    top_p=rng.choice([0.9, 1.0]),
                    max_tokens=rng.randrange(1, 120),
                    seed=rng.randrange(2**32),
                )
                asked[engine.add_request(prompt, params)] = (prompt, params)
            if rng.random() < 0.02 and asked:
                request_id = rng.choice(list(asked))
                if request_id not in ended:
                    aborted.add(request_id)
                engine.abort(request_id)
            for output in engine.step():
                ended.setdefault(output.request_id, []).append(output)
            engine.page_manager.check_invariants()
            engine.scheduler.check_invariants()
        assert engine.page_manager.num_used == 0
        assert ended.keys() == asked.keys()
        assert all(len(outputs) == 1 for outputs in ended.values())
        assert {outputs[0].finish_reason for outputs in ended.values()} <= {"stop", "length", "abort"}
        for request_id in rng.sample(sorted(asked.keys() - aborted), 40):
            alone = engine.add_request(*asked[request_id])
            outputs = []
            while engine.has_unfinished():
                outputs += engine.step()
            assert outputs[0].request_id == alone
            assert outputs[0].token_ids == ended[request_id][0].token_ids
