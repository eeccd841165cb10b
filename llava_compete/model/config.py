"""`LlavaCompeteConfig`: config.json of a checkpoint, the only thing that decides what is built."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from llava_compete.files import PARTIAL
from llava_compete.model.card import model_card, write_card
from llava_compete.model.served import AUTO_MAP, declare_experts, write_stub
from llava_compete.moe.config import MoeConfig
from llava_compete.vision.naflex import NativeSizes, SizedPictures
from llava_compete.vision.projector import ProjectorSection
from llava_compete.vision.tiles import Tiling
from llava_compete.vision.tower_config import TowerConfig


class LlavaCompeteConfig(PreTrainedConfig):
    """Tower, projector, language model and mixtures of experts of one model.

    vision_config: a `TowerConfig` as a dict, or None for a text-only model.
    projector_config: a `ProjectorSection` as a dict, or None without a tower.
    text_config: the language model's own Hugging Face config.
    moe: a `MoeConfig` as a dict, or None for a dense model.
    image_token_id: id of the placeholder; one placeholder stands for one image feature.
    stage, parents: the stage that made these weights and the stages before it, oldest first.
    competition_at_inference: run the competition in place of the router in eval mode (a study mode, slow).

    `text_config` also declares the language model's mixtures to inference servers (`served.py`).
    """

    model_type = "llava_compete"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}  # noqa: RUF012

    vision_config: dict[str, Any] | None = None
    projector_config: Any = None
    text_config: Any = None
    moe: dict[str, Any] | None = None
    image_token_id: int | None = None
    stage: str = "initial"
    parents: Any = None
    competition_at_inference: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.parents = list(self.parents or [])
        self.auto_map = dict(AUTO_MAP)
        language = None if self.moe is None else MoeConfig.model_validate(self.moe).language
        if language is not None:
            declare_experts(self.text_config, language)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with a card, and the file by which others find this model's classes (`served.py`)."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_stub(Path(save_directory))
        name = Path(save_directory).resolve().name.removesuffix(PARTIAL)  # which it will have
        write_card(Path(save_directory), model_card(self, name))

    @property
    def tower(self) -> TowerConfig | None:
        """The typed form of `vision_config`."""
        return None if self.vision_config is None else TowerConfig.model_validate(self.vision_config)

    @property
    def projector(self) -> ProjectorSection:
        """The typed form of `projector_config`."""
        return ProjectorSection.model_validate(self.projector_config)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders (= embeddings) for one image, of tiles for one tile, of NaFlex at most; 0 without a tower."""
        tower = self.tower
        return 0 if tower is None else tower.num_tokens // self.projector.pool**2

    @property
    def tiling(self) -> SizedPictures | None:
        """How pictures are cut into tiles or patches; None where each is one picture of one size."""
        tower = self.tower
        if tower is not None and tower.max_patches is not None:
            return NativeSizes(tower.image_size, self.projector.pool, tower.max_patches)
        if tower is None or tower.tiles is None:
            return None
        return Tiling(tower.image_size, math.isqrt(self.num_image_tokens), tower.tiles)
