"""What `llava-compete fetch` knows, by the name that a user types."""

from __future__ import annotations

from llava_compete.fetch import dinov2, emoji, smollm2, tokenizer_files
from llava_compete.fetch.target import Target

TARGETS: dict[str, Target] = {
    "smollm2": smollm2.TARGET,
    "dinov2": dinov2.TARGET,
    "emoji": emoji.TARGET,
    "tokenizers": tokenizer_files.TARGET,
}
