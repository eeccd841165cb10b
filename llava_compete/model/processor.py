"""`LlavaCompeteProcessor`: text with placeholders and images -> model inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import MultiModalData
from transformers.utils import PROCESSOR_NAME

from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import encode_conversation, on_lines_of_their_own
from llava_compete.language.chat_rendering import with_fixed_day
from llava_compete.model.served import AUTO_MAP, write_stub
from llava_compete.parts import IMAGE_TOKEN
from llava_compete.vision.image_decoder import full_size, open_image
from llava_compete.vision.naflex import SizedPictures


class LlavaCompeteProcessor(ProcessorMixin):
    """Tokenizer and image processor of a checkpoint.

    Each `<image>` in a text stands for one image and becomes `num_image_tokens` placeholders, one for each feature
    the model will put there; of images in tiles that is one tile's number, and `tokens_per_image` counts. The chat
    template is the tokenizer's.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        # transformers asks this file alone for the processor's class, and takes the tokenizer where it is not named.
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        tokenizer.padding_side = "left"  # tokenizer files keep the side of their last use
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @property
    def tiling(self) -> SizedPictures | None:
        """How pictures are cut into tiles or patches; None where each is one picture of one size, or there are none."""
        if self.image_processor is None:
            return None
        return self.image_processor.tiling(math.isqrt(self.num_image_tokens))

    def open_image(self, source: str | Path | bytes, name: str | None = None) -> Image.Image:
        """A file as these settings decode it (`image_decoder.open_image`, with the same errors)."""
        return open_image(source, name, None if self.image_processor is None else self.image_processor.wanted)

    def tokens_per_image(self, sizes: Iterable[tuple[int, int]]) -> int | list[int]:
        """Placeholders of every image or, where that depends on their heights and widths (`sizes`), of each.

        Raises:
            BadImageError: a picture so thin that tiles show nothing of it.
        """
        tiling = self.tiling
        return self.num_image_tokens if tiling is None else [tiling.num_tokens(size) for size in sizes]

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Placeholders and rows of pixel_values for images of these heights and widths, as servers ask."""
        sizes = [(int(height), int(width)) for height, width in image_sizes or []]
        tiling = self.tiling
        if tiling is None:
            return MultiModalData(
                num_image_tokens=[self.num_image_tokens] * len(sizes), num_image_patches=[1] * len(sizes)
            )
        return MultiModalData(
            num_image_tokens=[tiling.num_tokens(size) for size in sizes],
            num_image_patches=[tiling.num_tiles(size) for size in sizes],
        )

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As in transformers; a text-only model has no image processor."""
        if argument_name == "image_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers, which asks every part for its class; a text-only model has but a tokenizer to save."""
        write_stub(save_directory)
        if self.image_processor is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        file = Path(save_directory) / PROCESSOR_NAME
        self.to_json_file(file)
        return [str(file)]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        if processor_dict is not None and processor_dict.get("image_processor") is None:
            return [None, cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)]
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Model inputs; the counts of images and placeholders must agree. An empty list of images means none."""
        if images is not None and not isinstance(images, str) and hasattr(images, "__len__") and len(images) == 0:
            images = None
        if images is not None:
            self._check_sees_images()
        try:
            return super().__call__(images=images, text=text, **kwargs)
        except ValueError as error:
            if "images" in str(error) and self.image_token in str(error):
                raise UserError(str(error)) from error
            raise

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "auto",
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; with `tokenize`, ids are made as in training.

        So a literal "<image>" or another control token in somebody's text is text, and cannot stand for an image.
        `enable_thinking` (a switch of some templates) is off unless it is given; today's date is the one in training.
        """
        kwargs.setdefault("enable_thinking", False)
        asked = {key for key, value in kwargs.items() if value}
        if not tokenize or chat_template is not None or asked - {"padding", "enable_thinking"}:
            if not tokenize and chat_template is None:
                # A language model's own template takes texts alone.
                conversations, is_batched = self._normalize_conversations(conversation)
                texts = [[_as_text(message) for message in messages] for messages in conversations]
                conversation = texts if is_batched else texts[0]
            if not kwargs["enable_thinking"] and "enable_thinking" not in str(chat_template or self.chat_template):
                del kwargs["enable_thinking"]  # a template without it needs no telling, and transformers warns
            if chat_template is None and isinstance(self.chat_template, str):
                chat_template = with_fixed_day(self.chat_template)
            return super().apply_chat_template(
                conversation,
                chat_template,
                tokenize=tokenize,
                return_dict=return_dict,
                return_tensors=return_tensors,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
        conversations, _ = self._normalize_conversations(conversation)
        rows, images = [], []
        for conversation in conversations:
            messages = [_with_lines(message) for message in conversation]
            given = [image for message in messages for image in _images_of(message)]
            if given:
                self._check_sees_images()
                given = self.image_processor.fetch_images(given)
            encoded = encode_conversation(
                self.tokenizer,
                messages,
                tokens_per_image=self.tokens_per_image(full_size(image) for image in given),
                add_generation_prompt=add_generation_prompt,
                thinking=bool(kwargs["enable_thinking"]),
            )
            if encoded.num_images != len(given):
                raise UserError(f"the conversation shows {encoded.num_images} images, but gives {len(given)}")
            rows.append(encoded.input_ids)
            images.extend(given)
        tensors = None if return_tensors == "auto" else return_tensors
        data = dict(self.tokenizer.pad({"input_ids": rows}, padding=len(rows) > 1))
        if images:
            data.update(self.image_processor(images))
        inputs = BatchFeature(data, tensor_type=tensors)
        return inputs if return_dict else inputs["input_ids"]

    def _check_sees_images(self) -> None:
        if self.image_processor is None:
            raise UserError("images given, but this model has no vision tower")

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that one image's placeholder becomes."""
        count = self.num_image_tokens
        if (tiling := self.tiling) is not None:
            height, width = image_inputs["image_sizes"][image_idx]
            count = tiling.num_tokens((int(height), int(width)))
        return self.image_token * count


def _with_lines(message: dict[str, Any]) -> dict[str, Any]:
    """A message as training has it: images in front of a text stand on lines of their own."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": on_lines_of_their_own(content)}


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one string, with a placeholder for each image."""
    parts = message["content"] if isinstance(message["content"], list) else []
    if not all(part.get("type") in ("text", "image") for part in parts):
        return message
    texts = [IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in on_lines_of_their_own(parts)]
    return {**message, "content": "".join(texts)} if parts else message


def _images_of(message: dict[str, Any]) -> list[Any]:
    """The images that a message's content parts hold: Pillow, or where to find one."""
    content = message["content"]
    parts = [] if isinstance(content, str) else [part for part in content if part["type"] == "image"]
    keys = ("image", "url", "path", "base64")
    found = [next((part[key] for key in keys if part.get(key) is not None), None) for part in parts]
    if any(image is None for image in found):
        raise UserError("an image part of the conversation gives no image; expected one of the keys " + ", ".join(keys))
    return found
