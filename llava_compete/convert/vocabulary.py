"""Room for `<image>` in the embeddings of a language model whose tokenizer had no such token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llava_compete.convert.recipes import Recipe
from llava_compete.weight_files import StoredTensor

_EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def grow_vocabulary(
    recipes: dict[str, Recipe], tensors: dict[str, StoredTensor], image_id: int, text: PreTrainedConfig
) -> None:
    """Let the recipes of embeddings and head add rows up to `image_id`, each the mean of the others, and say so in
    `text`; features stand in the places of the placeholder, and generation never writes it."""
    stored = tensors.get(_EMBEDDINGS[0])
    if stored is None:
        return  # missing, which the check of all tensors says
    text.vocab_size = max(stored.shape[0], image_id + 1)
    missing = text.vocab_size - stored.shape[0]
    for name in _EMBEDDINGS:
        if missing and name in recipes:
            recipes[name] = recipes[name]._replace(make=partial(_grown, missing, recipes[name].make))


def _grown(count: int, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    table = make(*tensors)
    return torch.cat([table, table.float().mean(0, keepdim=True).to(table.dtype).expand(count, -1)])
