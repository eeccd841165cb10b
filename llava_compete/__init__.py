"""llava_compete: visual instruction tuning with competition-routed sparse mixtures of experts.

Importing this package makes transformers' Auto classes and pipelines know the model type `llava_compete`, and does
nothing else.
"""

from __future__ import annotations

from llava_compete.model import (
    LlavaCompeteConfig,
    LlavaCompeteForConditionalGeneration,
    LlavaCompeteImageProcessor,
    LlavaCompeteProcessor,
)

__all__ = [
    "LlavaCompeteConfig",
    "LlavaCompeteForConditionalGeneration",
    "LlavaCompeteImageProcessor",
    "LlavaCompeteProcessor",
]
