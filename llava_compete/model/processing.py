"""`LlavaCompeteProcessor`: text with placeholders and images -> model inputs."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

from llava_compete.errors import UserError

IMAGE_TOKEN = "<image>"


class LlavaCompeteProcessor(ProcessorMixin):
    """Tokenizer and image processor of a checkpoint.

    Each `<image>` in a text stands for one image and becomes `num_image_tokens` placeholders, one for each feature
    the model will put there. The chat template is the tokenizer's.
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
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As in transformers; a text-only model has no image processor."""
        if argument_name == "image_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Model inputs; the counts of images and placeholders must agree. An empty list of images means none."""
        if images is not None and not isinstance(images, str) and hasattr(images, "__len__") and len(images) == 0:
            images = None
        try:
            return super().__call__(images=images, text=text, **kwargs)
        except ValueError as error:
            if "images" in str(error) and self.image_token in str(error):
                raise UserError(str(error)) from error
            raise

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that one image's placeholder becomes."""
        return self.image_token * self.num_image_tokens
