"""All that can be wrong with one row, by kind.

Rows go through the code of training (`parse_row`, `open_image`, `encode_conversation`), so that what passes here does
not fail there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava_compete.data.config import SourceSection
from llava_compete.data.page_words import check_inside
from llava_compete.data.records import Conversation, RecordError, message_texts, parse_row
from llava_compete.data.row_images import images_first
from llava_compete.data.row_turns import ROLES
from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import Message, cut_to_length, encode_conversation
from llava_compete.language.chat_rendering import writes_system
from llava_compete.language.piece_ids import piece_encoder
from llava_compete.parts import IGNORE_INDEX, IMAGE_TOKEN
from llava_compete.vision.image_decoder import BadImageError, full_size, image_size, open_image
from llava_compete.vision.naflex import SizedPictures

MIN_SIDE, MAX_ASPECT = 8, 50  # a picture below or beyond says nothing once resized


# kind -> (is it an error, what it means)
PROBLEMS: dict[str, tuple[bool, str]] = {
    "file_unreadable": (True, "a source that is missing, empty, of another format, or broken from some place on"),
    "not_json": (True, "a line or stretch of the file is not JSON"),
    "key_twice": (True, "a key stands twice in one mapping, where only one value can count"),
    "not_a_mapping": (True, "the row is not a mapping"),
    "no_conversation": (True, "no turns"),
    "turn_not_a_mapping": (True, "a turn is not a mapping"),
    "unknown_role": (True, f"a role that is none of {', '.join(ROLES)}"),
    "text_missing": (True, "a turn whose content is no text"),
    "content_part_invalid": (True, "a content part that is neither text nor image"),
    "field_unsupported": (True, "a key without which the row means something else: video, audio, objects, bbox"),
    "system_not_first": (True, "a system turn after the first turn"),
    "system_twice": (True, "a system text of the row and another one among its turns"),
    "no_question": (True, "the conversation has no question before its answers"),
    "turns_out_of_order": (True, "questions and answers do not alternate"),
    "last_question_unanswered": (True, "the only question has no answer"),
    "turn_weight_unsupported": (True, "a turn's loss or weight is neither 0 nor 1"),
    "nothing_to_learn": (True, "loss: false or weight: 0 on every answer"),
    "empty_answer": (True, "an answer without text"),
    "empty_question": (True, "a later question without text or image"),
    "not_unicode": (True, "bytes that are not UTF-8, or half of a surrogate pair"),
    "image_reference_invalid": (True, "an image entry that is neither embedded bytes nor a path from one known folder"),
    "image_in_answer": (True, "an image part inside an answer"),
    "placeholder_without_image": (True, "the text has placeholders, the row has no image"),
    "placeholders_do_not_match": (True, "placeholders and images differ in number"),
    "page_words_invalid": (True, "page_words that are no list of {text, box}, without one image, or outside of it"),
    "image_missing": (True, "no such image file"),
    "image_is_a_folder": (True, "the image path is a folder"),
    "image_empty": (True, "the image file has no bytes"),
    "image_unreadable": (True, "not an image that Pillow can open"),
    "image_truncated": (True, "the image file ends too early"),
    "image_too_large": (True, "more pixels than a decoder should be given (decompression bomb)"),
    "image_too_small": (True, f"a side below {MIN_SIDE} pixels, or one side over {MAX_ASPECT} times the other"),
    "no_answer_in_limit": (True, "no whole answer to learn within data.max_length"),
    "template_fails": (True, "the chat template cannot express the row"),
    "duplicate_row": (True, "same id and same content as an earlier row"),
    "duplicate_id": (False, "an earlier row with other content has this id"),
    "field_ignored": (False, "a key that nothing reads"),
    "answer_not_learnt": (False, "an answer with loss: false or weight: 0: context for the others, no target"),
    "system_not_written": (False, "a system text that the chat template leaves out"),
    "reasoning_not_written": (False, "reasoning that the chat template does not write: it is not learnt"),
    "first_answer_dropped": (False, "an answer before the first question: left out, as LLaVA does"),
    "last_question_dropped": (False, "a last question without an answer: left out"),
    "id_missing": (False, "no id: the row's number stands in"),
    "image_without_placeholder": (False, "images but no placeholder: they are put before the first question"),
    "placeholder_as_text": (False, "a literal <image> in an answer or in a typed text part: taken as text"),
    "control_token_in_text": (False, "the string of a special token in a text: taken as text"),
    "image_outside_folder": (False, "an absolute image path, or one that leaves the image folder"),
    "image_mode": (False, "an image that is not RGB or grey: converted"),
    "undecodable_text": (False, "U+FFFD or a null character: bytes lost before"),
    "cut_to_limit": (False, "turns beyond data.max_length are cut off"),
}


@dataclass
class RowFacts:
    """What a worker found out about one row."""

    id: str  # the row's number where it has none
    has_id: bool
    content_hash: bytes
    problems: list[tuple[str, str]]
    tokens: int = 0
    supervised: int = 0
    image_tokens: int = 0
    images: int = 0
    turns: int = 0


class TextSide(NamedTuple):
    """What is needed to count tokens; without it length and template are not checked."""

    tokenizer: Any
    num_image_tokens: int
    tiling: SizedPictures | None = None

    def tokens_per_image(self, source: SourceSection, images: Sequence[str | bytes]) -> int | list[int]:
        """Placeholders of every image, or of each where the picture's size decides; errors as `image_size`."""
        if self.tiling is None:
            return self.num_image_tokens
        files = (image if isinstance(image, bytes) else source.images / image for image in images)
        return [self.tiling.num_tokens(image_size(file)) for file in files]


def check_row(source: SourceSection, raw: Any, number: int, text_side: TextSide | None, max_length: int) -> RowFacts:
    """All problems of one row but duplicates, and its numbers."""
    row_id = raw.get("id") if isinstance(raw, dict) else None
    label = str(number) if row_id in (None, "") else str(row_id).encode(errors="backslashreplace").decode()
    content = hashlib.blake2b(repr(raw).encode(errors="replace"), digest_size=8).digest()
    facts = RowFacts(label, row_id not in (None, ""), content, [])
    try:
        if isinstance(raw, RecordError):
            raise raw
        conversation = parse_row(raw, default_id=label)
    except RecordError as error:
        facts.problems.append((error.kind, str(error)))
        return facts
    facts.images = len(conversation.images)
    facts.turns = sum(message["role"] == "assistant" for message in conversation.messages)
    if not facts.has_id:
        facts.problems.append(("id_missing", PROBLEMS["id_missing"][1]))
    facts.problems += conversation.notes
    facts.problems += _text_problems(conversation)
    facts.problems += _image_problems(source, conversation)
    if text_side is not None:
        if source.images_first:
            conversation = conversation._replace(messages=images_first(conversation.messages))
        try:
            counts = text_side.tokens_per_image(source, conversation.images)
        except BadImageError as error:
            if error.kind not in {kind for kind, _ in facts.problems}:
                facts.problems.append((error.kind, str(error)))
            return facts
        facts.problems += _length_problems(facts, conversation, text_side, counts, max_length)
    return facts


def _text_problems(conversation: Conversation) -> Iterator[tuple[str, str]]:
    for message in conversation.messages:
        text = "".join(part.get("text", "") for part in message["content"])
        if "\ufffd" in text or "\0" in text:
            yield "undecodable_text", f"{message['role']}: {text[:40]!r}"
        if IMAGE_TOKEN in text:
            yield "placeholder_as_text", f"{message['role']}: {text[:60]!r}"


def _image_problems(source: SourceSection, conversation: Conversation) -> Iterator[tuple[str, str]]:
    folder = source.images
    for image in conversation.images:
        if isinstance(image, str) and (Path(image).is_absolute() or ".." in Path(image).parts):
            yield "image_outside_folder", image
        try:
            if isinstance(image, str):
                source.refuse_path(image)
        except UserError as error:
            yield "image_reference_invalid", str(error)
            continue
        try:
            opened = open_image(image if isinstance(image, bytes) else folder / image)
        except BadImageError as error:
            yield error.kind, str(error)
            continue
        try:
            check_inside(conversation.words, full_size(opened))
        except RecordError as error:
            yield error.kind, str(error)
        short, long = sorted(opened.size)
        name, mode = image if isinstance(image, str) else "embedded image", opened.info["source_mode"]
        if short < MIN_SIDE or long > MAX_ASPECT * short:
            yield "image_too_small", f"{name}: {opened.width}×{opened.height} pixels"
        if mode not in ("RGB", "L"):
            yield "image_mode", f"{name}: mode {mode}"


def _length_problems(
    facts: RowFacts, conversation: Conversation, text_side: TextSide, counts: int | list[int], max_length: int
) -> Iterator[tuple[str, str]]:
    tokenizer, messages = text_side.tokenizer, conversation.messages
    try:
        whole = encode_conversation(tokenizer, messages, tokens_per_image=counts)
        cut = cut_to_length(tokenizer, messages, whole, max_length, counts)
    except UserError as error:
        yield "template_fails", str(error)
        return
    if any(message["role"] == "system" for message in messages) and not writes_system(tokenizer):
        yield "system_not_written", PROBLEMS["system_not_written"][1]
    if _loses_reasoning(tokenizer, messages, counts, whole.input_ids):
        yield "reasoning_not_written", PROBLEMS["reasoning_not_written"][1]
    if _has_control_tokens(text_side.tokenizer, conversation):
        yield "control_token_in_text", PROBLEMS["control_token_in_text"][1]
    if cut is None or all(label == IGNORE_INDEX for label in cut.labels):
        first = whole.answers[0].end if whole.answers else len(whole.input_ids)
        yield "no_answer_in_limit", f"the first answer ends at token {first}, data.max_length is {max_length}"
        return
    if len(cut.answers) < len(whole.answers):
        yield "cut_to_limit", f"{len(whole.input_ids)} tokens, {len(cut.input_ids)} kept"
    facts.tokens = len(cut.input_ids)
    facts.supervised = sum(label != IGNORE_INDEX for label in cut.labels)
    facts.image_tokens = cut.num_images * counts if isinstance(counts, int) else sum(counts[: cut.num_images])


def _loses_reasoning(tokenizer: Any, messages: list[Message], counts: int | list[int], input_ids: list[int]) -> bool:
    """Whether the ids of a conversation are those of its answers alone, and there is more in it."""
    bare = [_without_reasoning(message) for message in messages]
    try:
        return bare != messages and encode_conversation(tokenizer, bare, tokens_per_image=counts).input_ids == input_ids
    except UserError:
        return False


def _without_reasoning(message: Message) -> Message:
    """An answer without its reasoning, which may be a field of its own or stand in the text."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    _, mark, answer = "".join(part["text"] for part in message["content"]).rpartition("</think>")
    return {**kept, "content": [{"type": "text", "text": answer.lstrip("\n")}]} if mark else kept


def _has_control_tokens(tokenizer: Any, conversation: Conversation) -> bool:
    hide = piece_encoder(tokenizer).hide
    texts = (text.replace(IMAGE_TOKEN, "") for text in message_texts(conversation.messages))
    return any(hide(plain) != plain for plain in texts)
