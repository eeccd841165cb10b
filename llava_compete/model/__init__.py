"""The model: open_clip tower, projector, Hugging Face language model; importing it registers it with transformers."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from llava_compete.model.backbone import LlavaCompeteModel
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration, LlavaCompeteOutput
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor

__all__ = [
    "LlavaCompeteConfig",
    "LlavaCompeteForConditionalGeneration",
    "LlavaCompeteImageProcessor",
    "LlavaCompeteModel",
    "LlavaCompeteOutput",
    "LlavaCompeteProcessor",
]

AutoConfig.register(LlavaCompeteConfig.model_type, LlavaCompeteConfig, exist_ok=True)
# One class for both of transformers' backends: ours needs Pillow only.
AutoImageProcessor.register(
    LlavaCompeteConfig,
    image_processor_classes={"pil": LlavaCompeteImageProcessor, "torchvision": LlavaCompeteImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(LlavaCompeteConfig, LlavaCompeteProcessor, exist_ok=True)
AutoModel.register(LlavaCompeteConfig, LlavaCompeteModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaCompeteConfig, LlavaCompeteForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(LlavaCompeteConfig, LlavaCompeteForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LlavaCompeteConfig, LlavaCompeteForConditionalGeneration, exist_ok=True)
# transformers' server tells by this table that a model takes pictures.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[LlavaCompeteConfig.model_type] = LlavaCompeteForConditionalGeneration.__name__
