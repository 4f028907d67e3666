"""Text as it grows: never half a character, never a stop string, and in the end exactly what the tokens say."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import byte_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minillm.detokenizer import UNFINISHED, Detokenizer, OutputText
from minillm.loader import BUNDLED_MODEL, load_tokenizer

STORY = load_tokenizer(BUNDLED_MODEL)
BYTES = byte_tokenizer()
TOKENIZERS = (STORY, BYTES)
HARD = "Zwölf 🧙‍♀️ häxor, 中文字 и 👩🏽‍🚀🏳️‍🌈 é ñ ạ̈ 🇫🇷 ﷽ \u0301 naïve"


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


tokenizers = st.sampled_from(TOKENIZERS)
# Letters and spaces, what takes two to four bytes, and what joins with what came before.
characters = st.one_of(
    st.sampled_from(list("abc  \n.,") + list(HARD)),
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("👩🏽🚀中é"),
)
texts = st.text(characters, max_size=60).filter(lambda text: UNFINISHED not in text)


def splits(data: st.DataObject, items: list[int]) -> list[list[int]]:
    """The items in order, cut into groups at random."""
    groups, start = [], 0
    while start < len(items):
        size = data.draw(st.integers(1, 5))
        groups.append(items[start : start + size])
        start += size
    return groups


@given(tokenizers, texts, st.data())
def test_pieces_of_text_are_whole_characters_and_join_to_the_text(tokenizer: Any, text: str, data: Any) -> None:
    token_ids = encode(tokenizer, text)
    if tokenizer is STORY and data.draw(st.booleans()):  # spelled in another way than the tokenizer would
        token_ids = [i for token in token_ids for i in encode(tokenizer, decode(tokenizer, [token])) or [token]]
    whole = decode(tokenizer, token_ids)
    assume(UNFINISHED not in whole)
    num_prompt = data.draw(st.integers(0, len(token_ids)))
    prompt, output = token_ids[:num_prompt], token_ids[num_prompt:]
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(group) for group in splits(data, output)]
    assert UNFINISHED not in "".join(pieces)
    assert detokenizer.flush() == "" and detokenizer.push([]) == ""
    # A character that the prompt began belongs to the output, all of it.
    assert decode(tokenizer, prompt).rstrip(UNFINISHED) + "".join(pieces) == whole


@settings(max_examples=300)
@given(tokenizers, st.data())
def test_any_tokens_at_all(tokenizer: Any, data: Any) -> None:
    """Also such as no text encodes to: what is shown never changes, and one by one gives what all at once gives."""
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)
    if tokenizer is BYTES:  # continuation bytes and beginnings, mostly
        some = encode(BYTES, HARD)
        ids = st.lists(st.one_of(st.sampled_from(some), st.integers(0, len(BYTES) - 1)), max_size=40)
    prompt, output = encode(tokenizer, data.draw(texts)), data.draw(ids)
    prompt = prompt[: len(prompt) - data.draw(st.integers(0, 3))]  # which may cut a character
    one_by_one = Detokenizer(tokenizer, prompt)
    shown = ""
    for token_id in output:
        piece = one_by_one.push([token_id])
        assert not piece.endswith(UNFINISHED)
        shown += piece
    shown += one_by_one.flush()
    at_once = Detokenizer(tokenizer, prompt)
    assert at_once.push(output) + at_once.flush() == shown
    assert decode(tokenizer, prompt).rstrip(UNFINISHED) + shown == decode(tokenizer, prompt + output)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["story", "bytes"])
def test_a_character_is_shown_once_it_is_whole(tokenizer: Any) -> None:
    token_ids = encode(tokenizer, "🧙")
    assert len(token_ids) == 4
    detokenizer = Detokenizer(tokenizer, encode(tokenizer, "a"))
    assert [detokenizer.push([i]) for i in token_ids] == ["", "", "", "🧙"]
    assert [detokenizer.push([i]) for i in token_ids[:2]] == ["", ""]
    assert detokenizer.flush() == UNFINISHED  # the end: what is not whole shows as such
    assert detokenizer.flush() == ""


def test_special_tokens_are_not_text() -> None:
    text = OutputText(STORY, encode(STORY, "The king"), ())
    assert [text.push(encode(STORY, " sat")), text.push([STORY.eos_token_id]), text.finish()] == [" sat", "", ""]
    assert text.text == " sat"


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    class Counting:
        longest = 0

        def decode(self, token_ids: list[int], **options: Any) -> str:
            self.longest = max(self.longest, len(token_ids))
            return STORY.decode(token_ids, **options)

    tokenizer = Counting()
    detokenizer = Detokenizer(tokenizer, range(1000, 1500))
    for token_id in encode(STORY, "Once upon a time there was a king. " * 60):
        detokenizer.push([token_id])
    assert 0 < tokenizer.longest < 30


# --- stop strings -----------------------------------------------------------------------------------------------------


def reference_stop(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the stop string that is complete first; None if there is none."""
    for end in range(1, len(text) + 1):
        hits = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: min(hits)]
    return None


def run(tokenizer: Any, token_ids: list[int], stops: tuple[str, ...], groups: list[list[int]]) -> tuple[str, list[str]]:
    text = OutputText(tokenizer, encode(tokenizer, "a"), stops)
    pieces = []
    for group in groups:
        pieces.append(text.push(group))
        shown = "".join(pieces)
        assert not any(stop in shown for stop in stops)
        if text.is_stopped:
            break
        # What is held back is no more than what could be the beginning of a stop string, and no less.
        held = text.text[len(shown) :]
        assert any(stop.startswith(held) for stop in stops) or not held
        for length in range(len(held) + 1, len(text.text) + 1):
            assert not any(stop.startswith(text.text[-length:]) for stop in stops)
    pieces.append(text.finish())
    return text.text, pieces


few = st.text(
    st.sampled_from("ab🧙"), max_size=30
)  # so few characters that stop strings occur, overlap and nearly occur
stop_strings = st.lists(st.text(st.sampled_from("ab🧙"), min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@settings(max_examples=400)
@given(few, stop_strings)
def test_stop_strings_one_character_at_a_time(text: str, stops: tuple[str, ...]) -> None:
    """A token a byte: the text ends before the stop string that is complete first."""
    token_ids = encode(BYTES, text)
    got, pieces = run(BYTES, token_ids, stops, [[i] for i in token_ids])
    expected = reference_stop(text, stops)
    assert got == (text if expected is None else expected)
    assert "".join(pieces) == got


@settings(max_examples=300)
@given(few, stop_strings, st.data())
def test_stop_strings_however_the_tokens_fall(text: str, stops: tuple[str, ...], data: Any) -> None:
    token_ids = encode(BYTES, text)
    got, pieces = run(BYTES, token_ids, stops, splits(data, token_ids))
    assert "".join(pieces) == got and text.startswith(got)
    assert not any(stop in got for stop in stops)
    if any(stop in text for stop in stops):
        assert any(text[len(got) :].startswith(stop) for stop in stops)
    else:
        assert got == text


@given(few, stop_strings, st.integers(0, 30))
def test_stops_held_back_stay_passed(text: str, stops: tuple[str, ...], num_held: int) -> None:
    """`may_stop=False` for the first tokens: only what is complete after them stops."""
    token_ids = encode(BYTES, text)
    growing = OutputText(BYTES, encode(BYTES, "a"), stops)
    shown = ""
    for i, token_id in enumerate(token_ids):
        shown += growing.push([token_id], may_stop=i >= num_held)
        assert not growing.is_stopped or i >= num_held
        if growing.is_stopped:
            break
    shown += growing.finish()
    first = len(decode(BYTES, token_ids[:num_held]).rstrip(UNFINISHED))  # characters that were complete too early
    ends = [
        (start + len(stop), start)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > first
    ]
    if ends:
        first_end = min(ends)[0]
        expected = text[: min(start for end, start in ends if end == first_end)]
        assert growing.is_stopped and growing.text == expected
        assert shown.startswith(expected)  # what was shown before it could stop cannot be taken back
    else:
        assert not growing.is_stopped and growing.text == shown == text


def test_what_looks_like_a_stop_string_is_shown_once_it_is_none() -> None:
    text = OutputText(BYTES, [], ("STOP",))
    assert [text.push([i]) for i in encode(BYTES, "a STO!")] == ["a", " ", "", "", "", "STO!"]
    assert [text.push([i]) for i in encode(BYTES, "SSTOP")] == ["", "S", "", "", ""]
    assert text.is_stopped and text.finish() == "" and text.text == "a STO!S"
