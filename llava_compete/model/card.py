"""README.md of a checkpoint: what it is, what it came from, and how to load it, as hubs show it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_compete.config import read_yaml
from llava_compete.files import write_text
from llava_compete.moe.config import MoeConfig

if TYPE_CHECKING:
    from llava_compete.model.config import LlavaCompeteConfig

CARD = "README.md"
# A card without this line is somebody's own and stays as it is.
MARK = "<!-- Written anew with each save by llava_compete, while this line stands here. -->"
_LOAD = """```python
import llava_compete  # pip install llava_compete; registers the model with transformers
from transformers import AutoModelFor{task}, AutoProcessor

model = AutoModelFor{task}.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```"""


def model_card(
    config: LlavaCompeteConfig, name: str, data: Sequence[str] = (), scores: Sequence[Sequence[Any]] = ()
) -> str:
    """The card's text.

    name: by which it is loaded; data: a line for each source; scores: rows (benchmark, accuracy, chance, questions).
    """
    sees = config.vision_config is not None
    text = config.text_config
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}",
        "tags: [llava_compete, mixture-of-experts]" if config.moe else "tags: [llava_compete]",
        "---",
        "",
        MARK,
        "",
        f"# {name.rpartition('/')[2]}",
        "",
        "A vision-language model in the style of LLaVA" if sees else "A language model",
        f"({text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}).",
        f"Stages: {' -> '.join([*config.parents, config.stage])}.",
    ]
    if config.tower is not None:
        tower = config.tower
        lines.append(f"Vision tower: {tower.name or 'of its own config'}, {config.num_image_tokens} tokens a picture.")
    lines += ["", "## Experts", ""]
    parts = {} if config.moe is None else MoeConfig.model_validate(config.moe).parts()
    lines += [
        f"- {part}: router `{layer.router}`, {layer.num_experts_per_tok} of {layer.num_experts} experts a token"
        for part, layer in parts.items()
    ] or ["None: a dense model."]
    if data:
        lines += ["", "## Data", "", *(f"- {line}" for line in data)]
    if scores:
        lines += ["", "## Scores", "", "| benchmark | accuracy | chance | questions |", "| --- | --- | --- | --- |"]
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in scores]
    task = "ImageTextToText" if sees else "CausalLM"
    return "\n".join([*lines, "", "## Use", "", _LOAD.format(task=task, name=name), ""])


def recorded_data(directory: Path) -> list[str]:
    """A line for each source of the data that a directory's own run was trained on; none without its run."""
    path = directory / "run" / "config.yaml"
    data = read_yaml(path).get("data") if path.is_file() else None
    sources = (data or {}).get("sources") or []
    return [f"{source.get('name')} (weight {source.get('weight', 1.0):g})" for source in sources]


def write_card(directory: str | Path, text: str) -> None:
    """Put the card in its place, unless there is one that somebody wrote."""
    if not _is_own(path := Path(directory) / CARD):
        write_text(path, text)


def stage_card(staged: Path, directory: Path, config: LlavaCompeteConfig) -> None:
    """The card of a model that lies in `staged` and moves to `directory`: its name and its run's data there.

    None where it would replace one that somebody wrote.
    """
    if _is_own(directory / CARD):
        (staged / CARD).unlink(missing_ok=True)
    else:
        write_card(staged, model_card(config, directory.resolve().name, recorded_data(directory)))


def _is_own(path: Path) -> bool:
    """Whether somebody wrote it."""
    return path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
