"""One conversation to token ids and labels: the one owner of the ids of training, prompts and scored answers.

The chat template is rendered once (`chat_rendering`), and the text is cut where the model begins and ends to write, so
that a training row begins with exactly the ids of the prompt at generation time (`piece_ids`).

- The string of a special token inside anybody's text stays text.
- An image is a content part `{"type": "image"}`: one image token in the text, `tokens_per_image` ids (one number for
  all, or one for each image in reading order; more of them than images are left over). The white space
  around it is that of the texts beside it. A literal "<image>" in a text is text like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_compete.language.chat_rendering import EncodingError, Message, content_parts, render_chat
from llava_compete.language.piece_ids import piece_encoder
from llava_compete.parts import IGNORE_INDEX, IMAGE_TOKEN

__all__ = [
    "EncodedAnswer",
    "EncodedConversation",
    "EncodingError",
    "Message",
    "content_parts",
    "cut_to_length",
    "encode_answer",
    "encode_conversation",
    "images_before",
    "on_lines_of_their_own",
    "refuse_other_prompts",
    "stop_token_ids",
]

_SHOWN_IDS = 8  # of a prompt's end, in a message


class EncodedAnswer(NamedTuple):
    """Tokens of an answer: written by the model from `start`, its own words to `answer_end`, its end token to `end`."""

    start: int
    answer_end: int
    end: int
    num_images: int  # images before it


class EncodedConversation(NamedTuple):
    """Token ids with images expanded, labels of the same length (-100 outside answers), and where the answers are."""

    input_ids: list[int]
    labels: list[int]
    answers: list[EncodedAnswer]
    num_images: int


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tokens_per_image: int | Sequence[int] = 0,
    add_generation_prompt: bool = False,
    thinking: bool = False,
) -> EncodedConversation:
    """Render `messages` with the tokenizer's template and tokenise; see the module's docstring.

    `messages` have a role and a content: a string, or parts `{"type": "text", "text"}` and `{"type": "image"}`. An
    answer with `supervised: False` is not learnt; `reasoning_content` goes where the template writes it, and is learnt
    with the answer. `thinking`: the template's own switch `enable_thinking`, where it has one.
    Raises `EncodingError` if the template cannot render them or does not write each image once.
    """
    encoder = piece_encoder(tokenizer)
    chat = render_chat(tokenizer, encoder, messages, add_generation_prompt=add_generation_prompt, thinking=thinking)
    cuts = [place for span in chat.answers for place in span]
    pieces = encoder.encode(chat.text, cuts, soft={span.answer_end for span in chat.answers})
    learnt = [message.get("supervised", True) for message in messages if message["role"] == "assistant"]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    input_ids: list[int] = []
    labels: list[int] = []
    answers: list[EncodedAnswer] = []
    images = 0
    for number, is_learnt in enumerate([*learnt, False]):
        between = pieces[3 * number]
        for token in between:
            if token != image_id:
                input_ids.append(token)
                continue
            input_ids += [token] * _tokens_of(images, tokens_per_image)
            images += 1
        labels += [IGNORE_INDEX] * (len(input_ids) - len(labels))
        if number < len(learnt):
            words, end = pieces[3 * number + 1 : 3 * number + 3]
            start = len(input_ids)
            input_ids += words + end
            labels += words + end if is_learnt else [IGNORE_INDEX] * len(words + end)
            answers.append(EncodedAnswer(start, start + len(words), len(input_ids), images))
    expected = sum(part["type"] == "image" for message in messages for part in content_parts(message))
    if images != expected:
        raise EncodingError(f"the chat template writes {images} image tokens ({IMAGE_TOKEN}) for {expected} images")
    return EncodedConversation(input_ids, labels, answers, images)


def _tokens_of(image: int, tokens_per_image: int | Sequence[int]) -> int:
    if isinstance(tokens_per_image, int):
        return tokens_per_image
    if image >= len(tokens_per_image):
        raise EncodingError(f"the text shows more images than the {len(tokens_per_image)} given")
    return tokens_per_image[image]


def encode_answer(
    tokenizer: Any, messages: Sequence[Message], answer: str, *, tokens_per_image: int | Sequence[int] = 0
) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of an answer to it, without the end of its turn, as training would have them."""
    whole = encode_conversation(
        tokenizer, [*messages, {"role": "assistant", "content": answer}], tokens_per_image=tokens_per_image
    )
    start, end = whole.answers[-1].start, whole.answers[-1].answer_end
    return whole.input_ids[:start], whole.input_ids[start:end]


def images_before(count: int, content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images in front of the other parts, each on a line of its own: how LLaVA puts images that have no place."""
    return _on_lines([{"type": "image"} for _ in range(count)], content)


def on_lines_of_their_own(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts that begin with images and go on with a text, and no white space between: the form of `images_before`."""
    count = next((number for number, part in enumerate(content) if part["type"] != "image"), 0)
    if count and not content[count].get("text", " ")[:1].isspace():
        return _on_lines(content[:count], content[count:])
    return list(content)


def _on_lines(images: Sequence[dict[str, Any]], content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    parts = [part for image in images for part in (image, {"type": "text", "text": "\n"})]
    if not content:
        return parts[:-1]
    if images and content[0]["type"] == "text":
        return [*parts[:-1], {"type": "text", "text": "\n" + content[0]["text"]}, *content[1:]]
    return [*parts, *content]


def cut_to_length(
    tokenizer: Any,
    messages: Sequence[Message],
    encoded: EncodedConversation,
    max_length: int,
    tokens_per_image: int | Sequence[int],
) -> EncodedConversation | None:
    """The longest beginning of a conversation, ending with an answer, of at most `max_length` tokens; None if none is.

    It is encoded anew, since some templates write the last turn differently from the ones before it.
    """
    if len(encoded.input_ids) <= max_length:
        return encoded
    turns = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    fitting = sum(answer.end <= max_length for answer in encoded.answers)
    for end in reversed(turns[:fitting]):
        shorter = encode_conversation(tokenizer, messages[:end], tokens_per_image=tokens_per_image)
        # What follows an answer's end is not learnt, and may be left out to fit.
        length = shorter.answers[-1].end
        if length <= max_length:
            return shorter._replace(input_ids=shorter.input_ids[:length], labels=shorter.labels[:length])
    return None


def refuse_other_prompts(tokenizer: Any) -> None:
    """Raise an `EncodingError` where the template's prompt for an answer is not what stands before one in a row.

    DeepSeek-R1's opens a thought and leaves thoughts out of rows: a model would be asked what it never learnt.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    prompt = encode_conversation(tokenizer, [question], add_generation_prompt=True).input_ids
    row = encode_conversation(tokenizer, [question, answer])
    before = row.input_ids[: row.answers[0].start]
    if before != prompt:
        shown = [tokenizer.decode(ids[-_SHOWN_IDS:]) for ids in (prompt, before)]
        raise EncodingError(f"its prompt for an answer ends with {shown[0]!r}, and a row has {shown[1]!r} before one")


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: the template's end-of-turn token, and the tokenizer's eos."""
    encoded = encode_conversation(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = encoded.input_ids[encoded.answers[-1].end - 1]
    return sorted({last} | ({tokenizer.eos_token_id} - {None}))
