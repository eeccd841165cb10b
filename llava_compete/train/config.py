"""One training stage as a strict config: what to start from, what to train, on which data, how.

Read by `llava-compete train`; one YAML per stage in configs/. Sections of other parts (model, moe, data) are typed
next to their own code, `training` in training_section.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from llava_compete import shipped
from llava_compete.config import StrictConfig
from llava_compete.data.config import DataSection
from llava_compete.data.text.config import TextSection
from llava_compete.model.section import ModelSection
from llava_compete.moe.config import MoeConfig
from llava_compete.parts import Part
from llava_compete.train.training_section import TrainingSection
from llava_compete.train.word_start import WordStart

DEEPSPEED_DIR = shipped.folder("configs") / "deepspeed"


class PartTraining(StrictConfig):
    """How one part trains; `learning_rate` and `weight_decay` default to those of `training`."""

    mode: Literal["frozen", "full", "lora"] = Field(
        default="full", description="frozen, full, or lora (adapters; a mixture's router trains in full)"
    )
    learning_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="of this part; default training.learning_rate"
    )
    weight_decay: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="of this part; default training.weight_decay"
    )
    lora_rank: int = Field(default=16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(
        default=32.0, gt=0, allow_inf_nan=False, description="the adapters' update is scaled by alpha / rank"
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="on the adapters' input; the same for all parts, and 0 with packed experts"
    )


class Guards(StrictConfig):
    """When a run stops or warns by itself."""

    max_bad_steps: int = Field(
        default=3,
        ge=0,
        description=("steps in a row with a non-finite loss or gradient norm that are skipped before the run stops"),
    )
    collapse_share: float = Field(
        default=0.01, ge=0, le=1, description="warn when an expert gets less than this share of a layer's tokens"
    )
    collapse_patience: int = Field(default=3, ge=1, description="... in this many logging steps in a row")


def _kind_of_data(value: Any) -> str:
    """Conversations name `sources`, text names `train`."""
    is_text = "train" in value if isinstance(value, dict) else isinstance(value, TextSection)
    return "<text>" if is_text else "<conversations>"


Data = Annotated[
    Annotated[DataSection, Tag("<conversations>")] | Annotated[TextSection, Tag("<text>")],
    Discriminator(_kind_of_data),
]


class TrainConfig(StrictConfig):
    """The whole of one stage's YAML."""

    stage: Literal["pretrain_align", "pft", "sft", "pretrain_lm"] = Field(
        description="which stage; decides what model it may start from"
    )
    output_dir: Path = Field(description="everything of the run goes here")
    model: ModelSection = Field(description="what to start from")
    moe: MoeConfig | Literal[False] | None = Field(
        default=None,
        union_mode="left_to_right",
        description=(
            "settings laid over the checkpoint's; false says that sft of a dense checkpoint is meant (a baseline)"
        ),
    )
    data: Data = Field(description="conversations (sources: ...) or, for pretrain_lm, text (train: ...)")
    trainable: dict[Part, PartTraining] = Field(
        description=("part (vision, projector, language) -> mode, or a section; a part that is not named is frozen")
    )
    training: TrainingSection = Field(
        default=TrainingSection(),
        description=(
            "optimizer, schedule, batches, logging and saving, by the names of transformers' TrainingArguments"
        ),
    )
    deepspeed: str | None = Field(default="zero2", description="a file of configs/deepspeed by name, or null for none")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of new weights and of the order of rows")
    guards: Guards = Field(default=Guards(), description="when a run stops or warns by itself")
    word_start: WordStart | None = Field(
        default=None,
        description=(
            "pretrain_align: before its first step the projector learns, on cached features, to make a picture look "
            "like the words of its answer or, of rows with page_words, each token like the words that it shows; "
            "null: it does not"
        ),
    )
    sample_steps: int = Field(
        default=0, ge=0, description="write a few greedy answers on held-out rows every this many steps; 0 writes none"
    )

    def _mode(self, part: Part) -> str:
        return self.trainable[part].mode if part in self.trainable else "frozen"

    @field_validator("trainable", mode="before")
    @classmethod
    def _mode_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {part: {"mode": entry} if isinstance(entry, str) else entry for part, entry in value.items()}

    @field_validator("deepspeed")
    @classmethod
    def _known_deepspeed(cls, value: str | None) -> str | None:
        known = sorted(path.stem for path in DEEPSPEED_DIR.glob("*.json"))
        if value not in (None, "none", *known):
            raise ValueError(f"found {value!r}, expected null or one of {', '.join(known)} (files of {DEEPSPEED_DIR})")
        return None if value == "none" else value

    @model_validator(mode="after")
    def _data_fits_the_stage(self) -> TrainConfig:
        if isinstance(self.data, TextSection) != (self.stage == "pretrain_lm"):
            kind = "text (train: ...)" if self.stage == "pretrain_lm" else "conversations (sources: ...)"
            raise ValueError(f"data: stage {self.stage} trains on {kind}")
        return self

    @model_validator(mode="after")
    def _does_not_write_over_its_start(self) -> TrainConfig:
        if self.model.checkpoint is None:
            return self
        start, target = Path(self.model.checkpoint).resolve(), self.output_dir.resolve()
        if start == target or (start.parent == target and start.name.startswith("checkpoint-")):
            where = " itself" if start == target else f"'s {start.name}"
            raise ValueError(
                f"output_dir: model.checkpoint is {self.output_dir}{where}, which the stage would write over; "
                "choose another output_dir"
            )
        if start in target.parents:
            raise ValueError(
                f"output_dir: {self.output_dir} lies inside model.checkpoint, {start}; choose a place outside"
            )
        return self

    def _check_word_start(self) -> None:
        if self.stage != "pretrain_align" or self._mode("projector") != "full":
            raise ValueError(
                f"word_start: stage {self.stage} with trainable.projector {self._mode('projector')}, expected "
                "pretrain_align and full"
            )
        if self.deepspeed and self.deepspeed.startswith("zero3"):
            raise ValueError(f"word_start: needs whole weights, which {self.deepspeed} shards; use zero2")
        tower = self.model.vision_tower
        if tower is not None and tower.naflex is not None:
            raise ValueError("word_start: found vision_tower.naflex, by which pictures differ in their tokens")

    @model_validator(mode="after")
    def _something_trains(self) -> TrainConfig:
        if all(part.mode == "frozen" for part in self.trainable.values()):
            raise ValueError("trainable: no part is trained; set one of vision, projector, language to full or lora")
        if self.model.quantization and (language := self._mode("language")) != "lora":
            raise ValueError(f"model.quantization: trainable.language is {language}, expected lora")
        if self.model.quantization and self.deepspeed and self.deepspeed.startswith("zero3"):
            raise ValueError(f"model.quantization: quantised weights cannot be sharded by {self.deepspeed}; use zero2")
        if self.word_start is not None:
            self._check_word_start()
        if self.sample_steps and self.stage == "pretrain_lm":
            raise ValueError("sample_steps: running text has no questions to answer; set 0")
        return self
