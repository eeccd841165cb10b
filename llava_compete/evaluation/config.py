"""Settings of one evaluation. Read from YAML (configs/*/eval.yaml) or made from the options of `llava-compete eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from llava_compete import shipped
from llava_compete.config import StrictConfig

EVAL_ROOT = shipped.folder("eval")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)


class EvalConfig(StrictConfig):
    """What to evaluate, on which benchmarks, and how to run it. None of `processes`, `device` and `batch_size` changes
    a score."""

    checkpoint: str = Field(description="directory that a stage wrote")
    suite: str | None = Field(default=None, description="name of a file in eval/suites, or a path to one")
    tasks: list[str] = Field(default=[], description="lmms-eval task names, in place of a suite")
    output_dir: str | None = Field(default=None, description="results go here; default: `eval` beside the checkpoint")
    include_path: str = Field(default=str(EVAL_ROOT / "tasks"), description="folder of further task YAMLs")
    batch_size: int = Field(default=16, ge=1, description="questions at a time; changes no score")
    limit: int | None = Field(
        default=None, ge=1, description="questions of each task, for trying out: scores of a part are not comparable"
    )
    processes: int | Literal["auto"] = Field(
        default="auto", description="data-parallel processes; auto is one for each GPU, or one; changes no score"
    )
    device: str | None = Field(default=None, description="default: the GPU if there is one; changes no score")
    dtype: Dtype = Field(default="auto", description="of the weights; auto is the stored one")
    attn_implementation: str | None = Field(default=None, description="attention kernel; default: transformers' choice")
    adapter: str | None = Field(default=None, description="LoRA adapter directory")
    competition_at_inference: bool = Field(
        default=False, description="route by the competition in place of the router (a study mode, slow)"
    )
    routing_data: list[str] = Field(
        default=[], description="test tables on which router agreement and expert use are measured; none skips it"
    )
    routing_rows: int = Field(default=200, ge=1, description="rows taken of each of them")

    @field_validator("checkpoint", "adapter")
    @classmethod
    def _no_comma(cls, value: str | None) -> str | None:
        if value and ("," in value or "=" in value):
            raise ValueError(f"found {value!r}: lmms-eval's --model_args cannot hold a path with ',' or '='")
        return value

    @field_validator("processes", mode="before")
    @classmethod
    def _at_least_one(cls, value: Any) -> Any:
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"found {value!r}, expected a number of at least 1, or auto")
        return value

    @model_validator(mode="after")
    def _suite_or_tasks(self) -> EvalConfig:
        if (self.suite is None) == (not self.tasks):
            raise ValueError("expected either suite or tasks")
        return self

    @property
    def directory(self) -> Path:
        """Where results go."""
        return Path(self.output_dir) if self.output_dir else Path(self.checkpoint).parent / "eval"
