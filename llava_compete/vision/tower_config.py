"""What a YAML says of a vision tower, and its resolved configuration, as a checkpoint stores it.

The resolved form holds everything that decides pixels and features (architecture, activation, feature layer, scales,
preprocessing), so that a reload needs neither open_clip's registry nor a network and cannot change with either.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llava_compete.config import StrictConfig

ResizeMode = Literal["pad", "squash", "crop"]
Interpolation = Literal["bicubic", "bilinear"]
# Of a tower in a YAML and in a checkpoint.
FeatureLayer = Annotated[
    int,
    Field(
        description=(
            "block whose output is the feature: -1 the last, -2 the second last (LLaVA-1.5, arXiv 2310.03744); "
            "of a network of feature maps (ConvNeXt, EfficientNet, MobileCLIP, Swin) the stage"
        )
    ),
]
Select = Annotated[
    Literal["patch", "cls_patch"],
    Field(description="features used: those of the patches, or the class token before them"),
]
Scales = Annotated[
    tuple[int, ...],
    Field(
        description=(
            "S² scales (arXiv 2403.13043), ascending from 1: the picture at each multiple of the base size, cut into "
            "tiles"
        )
    ),
]
ScalesFrom = Annotated[
    Literal["image", "base"],
    Field(
        description=(
            "what the scales are made of: the image, prepared at the largest and shrunk, or the base, the picture at "
            "the tower's size and enlarged, which shows no more detail (LibMoE's and CuMo's checkpoints)"
        )
    ),
]
# How a picture becomes numbers (image_processing.py has what they cost). 1: Pillow resizes, and the image processor
# normalises to float32. 2: torch's uint8 kernel resizes, within 2/255 of Pillow's values, and the model normalises on
# its device. 3: as 2, but Pillow makes the width, which is within 1/255. A checkpoint keeps its version.
PixelVersion = Literal[1, 2, 3]
LATEST_PIXELS: PixelVersion = 3
TILE_PIXELS: PixelVersion = 2  # those of LLaVA-NeXT's own image processor
MOST_TILES = 1024  # 7,262 grids, each of which is tried on every picture
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PreprocessConfig(StrictConfig):
    """How an image becomes pixels for ONE tile of the tower; scales above 1 multiply `size`."""

    size: int = Field(gt=0, description="side in pixels of one tile, the tower's input")
    mean: tuple[float, float, float] = Field(
        default=CLIP_MEAN, description="subtracted from each channel of values in [0, 1]; default CLIP's"
    )
    std: tuple[float, float, float] = Field(
        default=CLIP_STD, description="each channel is divided by it; default CLIP's"
    )
    interpolation: Interpolation = Field(default="bicubic", description="filter of the resize")
    resize_mode: ResizeMode = Field(
        default="squash",
        description=(
            "how a picture becomes square: pad (longest side fits, the rest is the mean), squash, or crop "
            "(shortest side fits, the middle)"
        ),
    )
    version: PixelVersion = Field(
        default=1,
        description=(
            "of the pixels: 1 are Pillow's, and what checkpoints mean that do not say it; 2 are torch's uint8 "
            "kernel's; 3 are nearer to Pillow's"
        ),
    )
    jpeg_draft: bool = Field(default=False, description="decode large JPEGs at a half, quarter or eighth of their size")


class TilesSection(StrictConfig):
    """Pictures in tiles, as in LLaVA-NeXT: the whole picture, then the grid of tiles that fits it best."""

    max: int | None = Field(
        default=None,
        ge=1,
        le=MOST_TILES,
        description="tiles of a picture, its whole apart: every grid of at most so many is allowed",
    )
    grids: tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="the grids allowed, each [rows, columns] of tiles; default those of `max`, or LLaVA-NeXT's five",
    )

    @model_validator(mode="after")
    def _grids_fit(self) -> TilesSection:
        for rows, columns in self.grids or ():
            if rows < 1 or columns < 1:
                raise ValueError(f"grids: found [{rows}, {columns}], expected one tile or more each way")
            if self.max is not None and rows * columns > self.max:
                raise ValueError(f"grids: [{rows}, {columns}] has {rows * columns} tiles, more than max {self.max}")
        if self.grids is not None and (not self.grids or len(set(self.grids)) < len(self.grids)):
            raise ValueError(f"grids: found {[list(grid) for grid in self.grids]}, expected different grids")
        return self


class NaFlexSection(StrictConfig):
    """Pictures at their own proportions, in as many patches as a budget allows: timm's NaFlex towers (SigLIP 2)."""

    max_patches: int = Field(
        default=256,
        gt=0,
        description="patches of a picture at most, and each is resized to fill them; projector.pool² make a token",
    )


class TowerConfig(StrictConfig):
    """A vision tower with its architecture spelled out."""

    name: str | None = Field(default=None, description="what the YAML named, for information")
    pretrained: str | None = Field(default=None, description="the weights that the YAML named, for information")
    embed_dim: int = Field(gt=0, description="open_clip's: width of its joint space, which the tower does not use")
    quick_gelu: bool = Field(default=False, description="open_clip's: activation x * sigmoid(1.702 x) in place of GELU")
    vision_cfg: dict[str, Any] = Field(description="open_clip's architecture of the visual part")
    feature_layer: FeatureLayer = -2
    select: Select = "patch"
    scales: Scales = (1,)
    scales_from: ScalesFrom = "image"
    tiles: tuple[tuple[int, int], ...] | None = Field(
        default=None, description="grids of tiles that a picture may be cut into; none: one picture of one size"
    )
    max_patches: int | None = Field(
        default=None, description="patches of a picture at its own proportions (NaFlex); none: pictures of one size"
    )
    preprocess: PreprocessConfig = Field(description="how a picture becomes pixels; of NaFlex size is a patch's side")
    # Facts of the built tower: with them a config alone tells the number of image tokens and the projector's width.
    width: int = Field(gt=0, description="of one block's output")
    num_tokens: int = Field(gt=0, description="features of one picture")
    num_layers: int = Field(gt=0, description="blocks or stages kept")

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
        """Side in pixels of what the image processor delivers: the largest scale, or the base."""
        return self.preprocess.size * (self.scales[-1] if self.scales_from == "image" else 1)


class PreprocessOverrides(StrictConfig):
    """What to change in the preprocessing that comes with a tower."""

    mean: tuple[float, float, float] | None = Field(default=None, description="in place of the tower's own")
    std: tuple[float, float, float] | None = Field(default=None, description="in place of the tower's own")
    interpolation: Interpolation | None = Field(
        default=None, description="in place of the tower's own: bicubic or bilinear"
    )
    resize_mode: ResizeMode | None = Field(default=None, description="in place of the tower's own: pad, squash or crop")
    version: PixelVersion | None = Field(
        default=None,
        description=(
            "of the pixels: 1 Pillow's; 2 torch's, fastest, within 2/255 of Pillow's, and those of tiles; 3 between "
            "them, within 1/255; default 3, with tiles 2"
        ),
    )
    jpeg_draft: bool | None = Field(
        default=None,
        description=(
            "decode a JPEG at a half, quarter or eighth of its size where twice the size wanted is left: faster for "
            "large photographs, with slightly other pixels; default false. Pictures that arrive decoded, those of "
            "lmms-eval's tasks and of the page, are taken whole"
        ),
    )


class VisionTowerSection(StrictConfig):
    """An open_clip tower: `name` (registry, `hf-hub:`, `local-dir:`) or `config` (open_clip's own dict, inline)."""

    name: str | None = Field(default=None, description="open_clip model name, hf-hub:org/repo or local-dir:path")
    config: dict[str, Any] | None = Field(
        default=None, description="open_clip's model config, written out, in place of a name"
    )
    pretrained: str | None = Field(
        default=None,
        description=(
            "open_clip's weight tag or a file; null leaves the weights random. hf-hub: and local-dir: bring theirs. "
            "Pixels for a file are those that all tags of the name agree in, or `preprocess`"
        ),
    )
    feature_layer: FeatureLayer = -2
    select: Select = "patch"
    scales: Scales = (1,)
    scales_from: ScalesFrom = "image"
    tiles: TilesSection | None = Field(
        default=None, description="pictures in tiles at their own proportions, for documents and charts (LLaVA-NeXT)"
    )
    naflex: NaFlexSection | None = Field(
        default=None, description="pictures at their own proportions and no tiles, for a NaFlex tower of timm"
    )
    preprocess: PreprocessOverrides = Field(
        default=PreprocessOverrides(), description="what to change in the tower's own preprocessing"
    )

    @model_validator(mode="after")
    def _one_source(self) -> VisionTowerSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name or config")
        if self.tiles is not None and (self.scales != (1,) or self.select != "patch"):
            raise ValueError(
                f"tiles: found with scales {list(self.scales)} and select {self.select}, expected scales [1] and "
                "select patch: tiles stand in for larger scales, and rows of tiles have no class tokens"
            )
        if self.naflex is not None and (self.tiles is not None or self.scales != (1,) or self.select != "patch"):
            raise ValueError(
                f"naflex: found with {'tiles, ' if self.tiles else ''}scales {list(self.scales)} and select "
                f"{self.select}, expected neither tiles nor larger scales, and select patch"
            )
        return self
