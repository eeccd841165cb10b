"""New models whose weights are handed over in files, against the same models built whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from start_kit import named, save_language_model, save_tower
from test_unread import EXPERTS, read
from tiny import tiny_model, tiny_section, tiny_tokenizer
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.model.build import build_model, build_unread
from llava_compete.model.checkpoint import save_checkpoint
from llava_compete.model.section import ModelSection
from llava_compete.moe.config import MoeConfig


def check(section: ModelSection, place: Path, moe: MoeConfig | None = None, tokenizer: Any = None) -> set[str]:
    """Built in files it is the same model; gives the names of what was handed over."""
    plain, processor = build_model(section, moe, 0, tokenizer)
    expected = {**plain.state_dict(), **dict(plain.named_buffers())}
    drawn = torch.rand(4)  # what is drawn next, such as adapters
    model, again = build_unread(section, moe, 0, tokenizer, place, makes=True)
    assert torch.equal(torch.rand(4), drawn)
    build_unread(section, moe, 1, tokenizer, place, makes=False)  # another rank, whatever it draws
    assert all(hasattr(parameter, "stored") for parameter in model.parameters())
    assert model.training
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == processor.tokenizer.chat_template
    architectures = {"architectures": model.config.architectures}  # which every save adds
    assert model.config.to_dict() == {**plain.config.to_dict(), **architectures}
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }
    assert model.all_tied_weights_keys == plain.all_tied_weights_keys
    handed = {name for name, p in model.named_parameters() if p.stored.file.parent == place}
    values: dict[str, Tensor] = read(model)
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert values[name].dtype == tensor.dtype, name
        assert torch.equal(values[name], tensor), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (
        plain.lm_head.weight is plain.get_input_embeddings().weight
    )
    return handed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied"])
def test_of_a_language_model_the_embeddings_that_grow_are_handed_over(tied: bool, dtype: str, tmp_path: Path) -> None:
    language = save_language_model(tmp_path / "language", tied=tied)
    tower = save_tower(tmp_path / "tower", pickled=tied)
    handed = check(named(tower, language, dtype=dtype), tmp_path / "start")
    eyes = ("model.vision_tower.", "model.multi_modal_projector.")
    grown = {"model.language_model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))}
    assert {name for name in handed if not name.startswith(eyes)} == grown
    assert len(handed) > 10


def test_nothing_is_handed_over_of_a_language_model_whose_vocabulary_has_room(tmp_path: Path) -> None:
    language = save_language_model(tmp_path / "language", spare=40)
    assert check(named(None, language), tmp_path / "start") == set()


def test_nor_of_a_text_only_model_of_ours(tmp_path: Path) -> None:
    moe = MoeConfig.model_validate({"language": {**EXPERTS, "router": "bias_balanced"}})
    save_checkpoint(*build_model(tiny_section(tower=None), moe, 0, tiny_tokenizer()), tmp_path / "own")
    assert check(named(None, tmp_path / "own"), tmp_path / "start") == set()


def test_a_language_model_stored_otherwise_is_read_by_one_process(tmp_path: Path) -> None:
    """Mixtral's experts lie one by one."""
    language = save_language_model(tmp_path / "language", "mixtral")
    handed = check(named(None, language), tmp_path / "start")
    assert any(".experts." in name for name in handed)


def test_random_weights_are_those_of_a_plain_start(tmp_path: Path) -> None:
    moe = MoeConfig.model_validate(dict.fromkeys(("vision", "projector", "language"), EXPERTS))
    check(tiny_section(), tmp_path / "start", moe, tiny_tokenizer())


def test_a_checkpoint_stored_otherwise_is_read_by_one_process(tmp_path: Path) -> None:
    model, processor = tiny_model(language={"tie_word_embeddings": True})
    save_checkpoint(model, processor, tmp_path / "stage")
    file = tmp_path / "stage" / "model.safetensors"
    save_file({**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach() + 1}, file, {"format": "pt"})
    assert check(ModelSection(checkpoint=tmp_path / "stage"), tmp_path / "start")


def test_a_node_that_does_not_see_what_was_handed_over_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"elsewhere: rank 0 wrote .* on a disk that all nodes share"):
        build_unread(tiny_section(), None, 0, tiny_tokenizer(), tmp_path / "elsewhere", makes=False)
