"""What a YAML says of a vision tower, and its resolved configuration, as a checkpoint stores it.

The resolved form holds everything that decides pixels and features (architecture, activation, feature layer, scales,
preprocessing), so that a reload needs neither open_clip's registry nor a network and cannot change with either.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llava_compete.config import StrictConfig

ResizeMode = Literal["pad", "squash", "crop"]
Interpolation = Literal["bicubic", "bilinear"]
# How a picture becomes numbers. 1: Pillow resizes, and the image processor normalises to float32. 2: torch's uint8
# kernel resizes (within 2/255 of Pillow), and the model normalises on its device. A checkpoint keeps its version.
PixelVersion = Literal[1, 2]
LATEST_PIXELS: PixelVersion = 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PreprocessConfig(StrictConfig):
    """How an image becomes pixels for ONE tile of the tower; scales above 1 multiply `size`.

    version: checkpoints from before there were versions do not say it, and mean 1; new models say `LATEST_PIXELS`.
    """

    size: int = Field(gt=0)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "squash"
    version: PixelVersion = 1


class TowerConfig(StrictConfig):
    """A vision tower with its architecture spelled out."""

    name: str | None = None
    pretrained: str | None = None
    embed_dim: int = Field(gt=0)
    quick_gelu: bool = False
    vision_cfg: dict[str, Any]
    feature_layer: int = -2
    select: Literal["patch", "cls_patch"] = "patch"
    scales: tuple[int, ...] = (1,)
    preprocess: PreprocessConfig
    # Facts of the built tower, kept so that a config alone tells the number of image tokens and the projector's width.
    width: int = Field(gt=0)
    num_tokens: int = Field(gt=0)
    num_layers: int = Field(gt=0)

    @field_validator("scales")
    @classmethod
    def _scales_ascend_from_one(cls, scales: tuple[int, ...]) -> tuple[int, ...]:
        if not scales or scales[0] != 1 or list(scales) != sorted(set(scales)):
            raise ValueError(
                f"scales {list(scales)}: expected ascending whole numbers that start with 1, such as [1, 3]"
            )
        return scales

    @property
    def feature_width(self) -> int:
        """Width of a feature: S² concatenates the scales."""
        return self.width * len(self.scales)

    @property
    def image_size(self) -> int:
        """Side in pixels of what the image processor delivers (the largest scale)."""
        return self.preprocess.size * self.scales[-1]


class PreprocessOverrides(StrictConfig):
    """What to change in the preprocessing that comes with a tower."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None
    version: PixelVersion | None = None


class VisionTowerSection(StrictConfig):
    """An open_clip tower: `name` (registry, `hf-hub:`, `local-dir:`) or `config` (open_clip's own dict, inline)."""

    name: str | None = None
    config: dict[str, Any] | None = None
    pretrained: str | None = None
    """open_clip's weight tag or a file; null leaves the weights random. `hf-hub:` and `local-dir:` bring theirs."""
    feature_layer: int = -2
    select: Literal["patch", "cls_patch"] = "patch"
    scales: tuple[int, ...] = (1,)
    preprocess: PreprocessOverrides = PreprocessOverrides()

    @model_validator(mode="after")
    def _one_source(self) -> VisionTowerSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name or config")
        return self
