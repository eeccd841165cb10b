"""Token ids of a piece of rendered chat text, as they would be in the middle of the whole.

What a plain `tokenizer.encode` of a piece gets wrong: a SentencePiece-style tokenizer writes a space before every text,
the string of a special token in a user's text becomes that token, and the white space that a control token such as
Phi-3's `<|end|>` takes with it (`rstrip`) stays when the cut is there. Caller: `data.encoding`.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

from tokenizers import Tokenizer

from llava_compete.errors import UserError

# Private-use characters around the string of a special token in somebody's text; taken out of all texts beforehand.
OPEN, CLOSE = "\uf8f0", "\uf8f1"
_ANCHORS = ("\n", ".", "a")


class PieceEncoder:
    """Encodes pieces with one tokenizer in its present state (`piece_encoder` makes a new one when it changes)."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if isinstance(backend, Tokenizer):
            # An own copy: padding or truncation left switched on in the shared one would change the ids.
            self._backend: Tokenizer | None = Tokenizer.from_str(backend.to_str())
            self._backend.no_padding()
            self._backend.no_truncation()
        else:
            self._backend, self._slow = None, tokenizer
        template = tokenizer.chat_template or ""
        control = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (token.content in template and not token.content.isspace())
        ]
        longest_first = sorted((token for token in control if token), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._control_ids = set(tokenizer.convert_tokens_to_ids(control))
        self._strips_right = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.rstrip)
        self._anchors = {anchor: self._ids(anchor) for anchor in _ANCHORS}
        self._adds_prefix = self._ids("\nb") != self._ids("\n") + self._ids("b")
        # A space that the text begins with may stand for the one that would be written: then it takes two.
        self._swallows_space = self._adds_prefix and self._ids(" b") == self._ids("b")

    def mark(self, text: str) -> str:
        """Put `OPEN` and `CLOSE` around each special token's string in somebody's text."""
        if OPEN in text or CLOSE in text:
            text = text.replace(OPEN, "").replace(CLOSE, "")
        return self._control.sub(f"{OPEN}\\g<0>{CLOSE}", text)

    def encode(self, piece: str, before: str, *, answer: bool) -> list[int]:
        """Ids of a piece that follows the text `before`; an `answer` keeps white space that a control token takes.

        Where the text before ends in a word, as in "ASSISTANT:", the space that SentencePiece writes is kept: it is
        how such a model spells the first word of an answer.
        """
        if not answer and before.endswith(self._strips_right):
            piece = piece.lstrip()
        if not piece:
            return []
        fresh = not before[-1:].isspace()
        if self._swallows_space and fresh and before and piece.startswith(" "):
            piece = " " + piece
        if OPEN not in piece:
            return self._ids(piece) if fresh else self._ids_inside(piece)
        ids: list[int] = []
        for part in re.split(f"({OPEN}[^{CLOSE}]*{CLOSE})", piece):
            if part.startswith(OPEN):
                ids += self._plain_ids(part.strip(OPEN + CLOSE), fresh)
            elif part:
                ids += self._ids(part) if fresh else self._ids_inside(part)
            fresh = fresh and not part
        return ids

    def _ids(self, text: str) -> list[int]:
        if self._backend is None:
            return self._slow.encode(text, add_special_tokens=False)
        return self._backend.encode(text, add_special_tokens=False).ids

    def _ids_inside(self, text: str) -> list[int]:
        """Ids of text in the middle of a line: without the space that SentencePiece writes before a text."""
        if not self._adds_prefix:
            return self._ids(text)
        for anchor, anchor_ids in self._anchors.items():
            ids = self._ids(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self._ids(text)

    def _plain_ids(self, text: str, fresh: bool) -> list[int]:
        """Ids of a special token's string as ordinary characters: cut after its first one, it cannot match."""
        ids = self._ids(text[:1]) if fresh else self._ids_inside(text[:1])
        rest = text[1:]
        if rest:
            ids = ids + (self._plain_ids(rest, False) if self._control.search(rest) else self._ids_inside(rest))
        if self._control_ids & set(ids):
            raise UserError(f"{text!r} inside a text: the tokenizer has no other spelling of it than a control token")
        return ids


_encoders: weakref.WeakKeyDictionary[Any, tuple[tuple[int, str | None], PieceEncoder]] = weakref.WeakKeyDictionary()


def piece_encoder(tokenizer: Any) -> PieceEncoder:
    """The encoder of `tokenizer`, made again when its vocabulary or chat template changed."""
    state = (len(tokenizer), tokenizer.chat_template)
    known = _encoders.get(tokenizer)
    if known is None or known[0] != state:
        known = _encoders[tokenizer] = (state, PieceEncoder(tokenizer))
    return known[1]
