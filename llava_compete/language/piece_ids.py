"""Token ids of a rendered chat text, cut at given places, as the tokenizer itself would make them for the whole text.

What `tokenizer.encode` of each piece alone gets wrong: a SentencePiece-style tokenizer may write a space before a text,
a control token such as Phi-3's `<|end|>` takes the white space behind it (`rstrip`), and the string of a control token
in somebody's text becomes that token. So control tokens are found here, and each stretch of plain text between two of
them is encoded as a whole, behind a stand-in for the control token before it. A cut inside a stretch gives the ids of
the text before the cut, then the rest of the whole's ids where those go on from it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from llava_compete.errors import UserError

# Noncharacters, which Unicode keeps for a program's own use: those in somebody's text are left out. (Private-use
# characters are text: with U+F8F0 to U+F8F4 PDFs spell tall brackets.) HIDE stands behind the first character of a
# control token's string in somebody's text, so that it does not read as that token; the stand-in is a token by itself;
# the others mark where contents lie while a template renders them.
HIDE, USER_END, ANSWER_START, ANSWER_END, _STAND_IN = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
MARKS = re.compile(f"[{USER_END}{ANSWER_START}{ANSWER_END}]")
_OURS = re.compile(f"[{HIDE}{USER_END}{ANSWER_START}{ANSWER_END}{_STAND_IN}]")
_ANCHORS = ("\n", ".", "a")
# Half of the texts of a row are the template's own, such as a role's name: their ids are remembered.
_SHORT, _MANY = 24, 4096  # characters, texts


class _Stretch(NamedTuple):
    """Characters of a text: one control token, or plain text (`token` is None) without the white space it loses."""

    start: int
    end: int
    token: str | None


class PieceEncoder:
    """Encodes with one tokenizer in its present state (`piece_encoder` makes a new one when it changes)."""

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content}
        template = str(tokenizer.chat_template or "")
        special = [text for text, token in added.items() if token.special]
        control = special + [t for t in added if t not in special and t in template and not t.isspace()]
        self.control = _any_of(control)
        self._special = _any_of(special)
        self._control_ids = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in control}
        self._strips_left = {text for text in control if added[text].lstrip}
        self._strips_right = {text for text in control if added[text].rstrip}
        self._unknown: int | None = tokenizer.unk_token_id  # also of a letter that is in no vocabulary
        self._tokenizer, self._backend = tokenizer, _plain_backend(tokenizer)
        self._short: dict[tuple[str, bool], list[int]] = {}
        self._anchors = {anchor: self._encode(anchor) for anchor in _ANCHORS}
        self._adds_prefix = self._encode("\nb") != self._encode("\n") + self._encode("b")

    def hide(self, text: str, *, answer: bool = False) -> str:
        """Somebody's text in which no string reads as a control token.

        An `answer` may hold control tokens that are not special ones, such as `<think>`: they are the model's to write.
        """
        pattern = self._special if answer else self.control
        return pattern.sub(lambda found: found[0][0] + HIDE + found[0][1:], _OURS.sub("", text))

    def encode(self, text: str, cuts: Sequence[int] = (), soft: Container[int] = ()) -> list[list[int]]:
        """Ids of the pieces of `text` between the `cuts` (ascending): len(cuts) + 1 lists.

        The pieces before a cut have the ids that they have without what follows, except for white space that a control
        token behind the cut takes. A token that lies across a `soft` cut stays whole, and belongs to the piece behind.
        """
        bounds = [*cuts, len(text)]
        pieces: list[list[int]] = [[] for _ in bounds]
        number, after_control = 0, False
        for stretch in self._stretches(text):
            while number < len(cuts) and cuts[number] <= stretch.start:
                number += 1
            if stretch.token is not None:
                pieces[number].append(self._control_ids[stretch.token])
            else:
                inside = [cut for cut in cuts[number:] if cut < stretch.end]
                places = [(cut - stretch.start, cut in soft) for cut in inside]
                parts = self._cut_ids(text[stretch.start : stretch.end], places, after_control)
                for offset, ids in enumerate(parts):
                    pieces[number + offset] += ids
            after_control = stretch.token is not None
        return pieces

    def _cut_ids(self, text: str, places: Sequence[tuple[int, bool]], after_control: bool) -> list[list[int]]:
        """Ids of a stretch of text between `places`, each with whether it is soft."""
        parts: list[list[int]] = []
        known: list[int] = []  # ids of the text before `start`
        start, soft, whole_so_far = 0, False, True
        for end, next_is_soft in [*places, (len(text), False)]:
            whole = self._plain_ids(text[:end], after_control)
            shared = _common_prefix(known, whole)
            if shared == len(known) or (soft and whole_so_far):
                if shared < len(known):
                    del parts[-1][shared - len(known) :]
                parts.append(whole[shared:])
                known = whole
            else:
                parts.append(self._ids_inside(text[start:end]))
                known, whole_so_far = known + parts[-1], False
            start, soft = end, next_is_soft
        return parts

    def _stretches(self, text: str) -> list[_Stretch]:
        found = list(self.control.finditer(text))
        stretches: list[_Stretch] = []
        position = 0
        for match in [*found, None]:
            start, end = position, match.start() if match else len(text)
            before = stretches[-1].token if stretches else None
            if before in self._strips_right:
                start = end - len(text[start:end].lstrip())
            if match is not None and match[0] in self._strips_left:
                end = start + len(text[start:end].rstrip())
            if start < end:
                stretches.append(_Stretch(start, end, None))
            if match is not None:
                stretches.append(_Stretch(match.start(), match.end(), match[0]))
                position = match.end()
        return stretches

    def _plain_ids(self, text: str, after_control: bool) -> list[int]:
        """Ids of a stretch of text at the beginning, or behind a control token."""
        ids = self._encode(text.replace(HIDE, ""), after_control)
        if HIDE not in text or not self._has_control(ids):
            return ids
        # The vocabulary itself spells the string as the control token (SentencePiece's "<s>"): cut it in two.
        first, *rest = text.split(HIDE)
        ids = self._encode(first, after_control)
        for part in rest:
            ids = ids + self._ids_inside(part)
        if self._has_control(ids, but=self._unknown):
            raise UserError(f"{text.replace(HIDE, '')!r}: the tokenizer has no spelling of it but a control token")
        return ids

    def _has_control(self, ids: Sequence[int], but: int | None = None) -> bool:
        return not (set(self._control_ids.values()) - {but}).isdisjoint(ids)

    def _ids_inside(self, text: str) -> list[int]:
        """Ids of text in the middle of a line: without the space that SentencePiece writes before a text."""
        if HIDE in text:
            return [token for part in text.split(HIDE) for token in self._ids_inside(part)]
        if self._adds_prefix:
            for anchor, anchor_ids in self._anchors.items():
                ids = self._encode(anchor + text)
                if ids[: len(anchor_ids)] == anchor_ids:
                    return ids[len(anchor_ids) :]
        return self._encode(text)

    def _encode(self, text: str, after_control: bool = False) -> list[int]:
        """Ids of plain text by the tokenizer; nothing in it is read as a special token."""
        if not text:
            return []
        if self._backend is None:
            return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        known = self._short.get((text, after_control))
        if known is None:
            try:
                ids = self._backend.encode(_STAND_IN + text if after_control else text, add_special_tokens=False).ids
            except TypeError as error:
                raise UserError(f"{_odd(text)}: bytes that are not UTF-8, or half of a surrogate pair") from error
            known = ids[1:] if after_control else ids
            if len(text) <= _SHORT and len(self._short) < _MANY:
                self._short[text, after_control] = known
        return list(known)


def _odd(text: str) -> str:
    """The place in a text that no tokenizer takes, as Python writes it."""
    found = re.search("[\ud800-\udfff]", text)
    return ascii(text if found is None else text[max(found.start() - 20, 0) : found.end() + 20])


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    if second[: len(first)] == first:  # nearly always, and no loop
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _any_of(strings: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first, unless its first character is followed by HIDE."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) + f"(?!{HIDE})" if strings else "(?!)")


def _plain_backend(tokenizer: Any) -> Tokenizer | None:
    """A copy of a fast tokenizer's core that reads special tokens as text, and one stand-in as a token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    copied = Tokenizer.from_str(backend.to_str())
    copied.no_padding()  # left switched on in the shared one, they would change the ids
    copied.no_truncation()
    copied.encode_special_tokens = True
    copied.add_tokens([AddedToken(_STAND_IN, special=False, normalized=False)])
    return copied


_encoders: weakref.WeakKeyDictionary[Any, tuple[tuple[int, str], PieceEncoder]] = weakref.WeakKeyDictionary()


def piece_encoder(tokenizer: Any) -> PieceEncoder:
    """The encoder of `tokenizer`, made again when its vocabulary or chat template changed."""
    state = (len(tokenizer), str(tokenizer.chat_template))
    known = _encoders.get(tokenizer)
    if known is None or known[0] != state:
        known = _encoders[tokenizer] = (state, PieceEncoder(tokenizer))
    return known[1]
