"""`python -m minillm demo`: several stories at once through the whole engine, with a look at the batch and the pages.

The table is drawn by an observer from the engine's own records; the engine does not know that somebody is watching.
"""

from __future__ import annotations

import shutil
import string
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from minillm import LLM, SamplingParams
from minillm.metrics import StepRecord
from minillm.request import RequestOutput

# Two openings, longer than a page, each told on in several ways: who comes later finds the opening in the prefix cache.
MOUNTAINS = "Once upon a time, in a land far away beyond the seven mountains, there lived"
FOREST = "In the middle of the great dark forest, where no man had ever set his foot, there stood"
PROMPTS = (
    f"{MOUNTAINS} a king who",
    f"{FOREST} a little house, and",
    "There was once a poor fisherman and his wife",
    "The youngest of the three sisters",
    f"{MOUNTAINS} an old witch who",
    f"{FOREST} a castle of glass, and",
    "A fox met a wolf upon the road, and",
    f"{MOUNTAINS} a dragon who",
)
COLORS = (33, 208, 36, 175, 81, 166, 220)  # of a terminal's 256: close to the colours that the book gives to requests
MAX_TOKENS = (96, 64, 128, 80)  # of different lengths, so that requests come and go
MAX_NAMED = 8  # decoding requests that a row names one by one
MAP_WIDTH = 36


class Paint:
    """Colours for a terminal; does nothing where they are off."""

    def __init__(self, is_on: bool):
        self.is_on = is_on

    def dim(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self.is_on and text else text

    def bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self.is_on and text else text

    def letters(self, text: str) -> str:
        """Each request's letter in the request's colour, what belongs to nobody dim."""
        if not self.is_on:
            return text
        return "".join(f"\033[{style}m{''.join(run)}\033[0m" for style, run in groupby(text, key=_style))


def _style(character: str) -> str:
    """How a terminal shows one character of a map: an SGR code."""
    index = string.ascii_uppercase.find(character)
    return f"38;5;{COLORS[index % len(COLORS)]}" if index >= 0 else "1" if character == "*" else "2"


class Table:
    """An observer that prints a row for every step in which something happens, and for every nth of the quiet ones.

    Args:
        letters: the letter of each request id.
        every: of the steps in which the same requests decode as before, show one in so many.
    """

    def __init__(self, letters: dict[str, str], every: int, paint: Paint):
        self.letters, self.every, self.paint = letters, every, paint
        self.page_manager: Any = None  # known once the engine exists
        self.records: list[StepRecord] = []
        self.last: tuple[str, str] = ("", "")
        self.num_quiet = 0

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)
        decodes = record.chunks[: record.num_decode_tokens]
        prefills = record.chunks[record.num_decode_tokens :]
        names = "".join(sorted(self.letters[chunk.request_id] for chunk in decodes))
        chunks = " ".join(f"{self.letters[chunk.request_id]}{chunk.end - chunk.start}" for chunk in prefills)
        event = self.event(record)
        self.num_quiet = 0 if (names, chunks) != self.last or event else self.num_quiet + 1
        self.last = (names, chunks)
        if self.num_quiet % self.every == 0:
            self.print_row(record, names, chunks, event)

    def event(self, record: StepRecord) -> str:
        """What happened to requests in this step, in letters."""
        parts = [f"no page left: {self.letters[name]} goes back to the queue" for name in record.preempted]
        parts += [f"{self.letters[name]} ends" for name in record.finished]
        return ", ".join(parts)

    def header(self) -> str:
        return f"{'step':>5}  {'decode':<8}  {'prefill':<16}  {'pages'}"

    def print_row(self, record: StepRecord, names: str, chunks: str, event: str) -> None:
        if len(names) > MAX_NAMED:
            names = f"{names[: MAX_NAMED - 4]}+{len(names) - MAX_NAMED + 4}"
        if len(chunks) > 16:
            chunks = f"{chunks[:13]}..."
        first, *more = (self.paint.letters(row) for row in self.map_rows())
        names, chunks = self.paint.letters(f"{names:<8}"), self.paint.letters(f"{chunks:<16}")
        print(f"{record.index + 1:>5}  {names}  {chunks}  {first}")
        for row in more:
            print(" " * 35 + row)
        if event:
            print(" " * 7 + self.paint.dim(event))

    def map_rows(self) -> list[str]:
        """One character a page: the letter of its request, `*` shared, `+` cached, `.` free."""
        snapshot = self.page_manager.snapshot()
        marks = {"free": ".", "cached": "+", "used": "*"}
        pages = "".join(
            self.letters.get(owners[0], "?") if len(owners) == 1 else marks[state]
            for state, owners in zip(snapshot.states[: 6 * MAP_WIDTH], snapshot.owners, strict=False)
        )
        rows = [pages[start : start + MAP_WIDTH] for start in range(0, len(pages), MAP_WIDTH)]
        hidden = len(snapshot.states) - len(pages)
        return [*rows, f"... and {hidden} more pages"] if hidden > 0 else rows


def tell_stories(
    model: str | None,
    options: dict[str, Any],
    sampling: dict[str, Any],
    num_stories: int,
    every: int,
    color: bool,
) -> list[RequestOutput]:
    """Run the demo; prints everything, and returns the outputs in order.

    Args:
        model, options: of the engine, as for `LLM`. Without them the pool is small, so that it fits the screen.
        sampling: fields of `SamplingParams` for every story.
    """
    paint = Paint(color)
    letters: dict[str, str] = {}
    table = Table(letters, every, paint)
    small = {"max_running": 4, "max_batch_tokens": 32, "num_pages": MAP_WIDTH, "page_size": 16}
    small["max_batch_tokens"] = max(small["max_batch_tokens"], options.get("max_running", 0))
    options = {**small, **options}
    print(paint.dim("Loading the model ..."), flush=True)
    with LLM(model, observers=[table], **options) as llm:
        engine = llm.engine
        table.page_manager = engine.page_manager
        config = engine.config
        print(paint.bold(f"{num_stories} stories at once, at most {config.max_running} of them in a step"))
        print(f"{config.num_pages} pages of {config.page_size} tokens; device {config.device}, {config.dtype}\n")
        width = min(shutil.get_terminal_size((80, 24)).columns, 80)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num_stories)]
        ids = []
        for index, prompt in enumerate(prompts):
            fields: dict[str, Any] = {
                "max_tokens": MAX_TOKENS[index % len(MAX_TOKENS)],
                "temperature": 0.7,
                "top_k": 40,
                "seed": index,
            }
            if "seed" in sampling:
                fields["seed"] = sampling["seed"] + index
            fields.update((name, value) for name, value in sampling.items() if name != "seed")
            ids.append(engine.add_request(prompt, SamplingParams(**fields)))
            letters[ids[-1]] = string.ascii_uppercase[index]
        print(paint.dim("decode: one token each; prefill: so many tokens of the prompt; pages: one"))
        print(paint.dim("letter a page, * shared by several stories, + cached for who begins alike.\n"))
        print(paint.bold(table.header()))
        done: dict[str, RequestOutput] = {}
        while engine.has_unfinished():
            done.update((output.request_id, output) for output in engine.step())
            sys.stdout.flush()
    outputs = [done[request_id] for request_id in ids]
    print_stories(prompts, outputs, width, paint)
    print_timings(outputs, table.records, paint)
    return outputs


def print_stories(prompts: Sequence[str], outputs: Sequence[RequestOutput], width: int, paint: Paint) -> None:
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        text = prompt + output.text + (" ..." if output.finish_reason == "length" else "")
        paragraphs = [textwrap.wrap(line, width - 4) for line in text.split("\n")]
        lines = [line for paragraph in paragraphs for line in paragraph]
        for number, line in enumerate(lines):
            letter = paint.letters(string.ascii_uppercase[index]) if number == 0 else " "
            print(f"{chr(10) if number == 0 else ''}{letter}   {line}")


def print_timings(outputs: Sequence[RequestOutput], records: Sequence[StepRecord], paint: Paint) -> None:
    """Per request what its caller felt; over all steps where the time went."""
    header = (
        f"{'story':<7}{'prompt':>7}{'cached':>8}{'output':>8}{'queued':>10}{'first token':>13}{'tokens/s':>10}  end"
    )
    print("\n" + paint.bold(header))
    for index, output in enumerate(outputs):
        metrics = output.metrics
        gap = metrics.inter_token_latency
        row = f"{metrics.num_prompt_tokens:>13}{metrics.num_cached_tokens:>8}{metrics.num_output_tokens:>8}"
        row += f"{_ms(metrics.queue_time):>10}"
        row += f"{_ms(metrics.ttft):>13}{f'{1 / gap:.0f}' if gap else '-':>10}  {output.finish_reason}"
        print(paint.letters(string.ascii_uppercase[index]) + row)
    if not records:
        return
    seconds = {
        phase: sum(getattr(record, f"{phase}_time") for record in records)
        for phase in ("schedule", "prepare", "forward", "sample", "finish")
    }
    total = sum(seconds.values())
    num_tokens = sum(output.metrics.num_output_tokens for output in outputs)
    print(f"\n{len(records)} steps in {total:.2f} s: {num_tokens / total:.0f} tokens/s over all stories.")
    print("Where the time of a step went:")
    for phase, spent in seconds.items():
        share = spent / total
        print(f"  {phase:<9}{1e3 * spent / len(records):>8.2f} ms {share:>6.1%}  {paint.dim('#' * round(40 * share))}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"
