"""From token ids to text, piece by piece: never half a character, and never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for bytes that are no character (yet)
CONTEXT_TOKENS = 6  # decoders treat the beginning of a text specially, so the prompt's last tokens come first


class Detokenizer:
    """Decodes the output of one request as it grows.

    A character may be spread over several tokens, and a token's text may depend on the one before it. So a window of
    the last tokens is decoded, and text is given out once it does not end in an unfinished character.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int]):
        self.tokenizer = tokenizer
        start = max(len(prompt_token_ids) - CONTEXT_TOKENS, 0)
        self.window = list(prompt_token_ids[start:])
        # A window of two halves of characters would look like nothing but an unfinished one.
        while 0 < start and len(self.window) < 2 * CONTEXT_TOKENS and self._decode().startswith(UNFINISHED):
            start -= 1
            self.window.insert(0, prompt_token_ids[start])
        self.num_emitted = len(self._decode().rstrip(UNFINISHED))  # characters of the window's text

    def _decode(self) -> str:
        return self.tokenizer.decode(self.window, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add, so far as it is certain. All at once or one by one gives the same."""
        self.window.extend(token_ids)
        text = self._decode()
        certain = text.rstrip(UNFINISHED)
        piece = certain[self.num_emitted :]
        self.num_emitted = max(self.num_emitted, len(certain))
        if len(certain) == len(text) and piece and len(self.window) > 2 * CONTEXT_TOKENS:
            del self.window[:-CONTEXT_TOKENS]
            self.num_emitted = len(self._decode())
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come: unfinished characters show as they are."""
        piece = self._decode()[self.num_emitted :]
        self.num_emitted += len(piece)
        return piece


class OutputText:
    """The text of one request: grows by tokens, ends before a stop string, and says what may be shown.

    Text that could be the beginning of a stop string is held back until the next tokens tell.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], stop: Sequence[str]):
        self.detokenizer = Detokenizer(tokenizer, prompt_token_ids)
        self.stop = tuple(stop)
        self.text = ""
        self.num_shown = 0
        self.is_stopped = False

    def push(self, token_ids: Sequence[int], may_stop: bool = True) -> str:
        """Add tokens; returns the text that may be shown now. Sets `is_stopped` if a stop string has appeared."""
        return self._grow(self.detokenizer.push(token_ids), may_stop)

    def finish(self) -> str:
        """The request has ended: returns the rest of what may be shown."""
        if not self.is_stopped:
            self.text += self.detokenizer.flush()
        return self._show(len(self.text))

    def _grow(self, piece: str, may_stop: bool) -> str:
        seen = len(self.text)
        self.text += piece
        if may_stop and self.stop:
            # Only a stop string that ends in the new text: one that was passed over under min_tokens stays passed.
            hits = [self.text.find(stop, max(0, seen - len(stop) + 1)) for stop in self.stop]
            hits = [hit for hit in hits if hit >= 0]
            if hits:
                self.is_stopped = True
                self.text = self.text[: min(hits)]
                return self._show(len(self.text))
        return self._show(len(self.text) - self._num_held())

    def _num_held(self) -> int:
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stop):
                return length
        return 0

    def _show(self, end: int) -> str:
        piece = self.text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return piece
