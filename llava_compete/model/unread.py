"""A checkpoint's model without its weights: each parameter knows where its tensor lies, and is one NaN many times over.

So a process can build a model that it will never hold whole. What wraps, freezes, counts and describes parameters works
as on any model on the CPU; what reads one too early gets NaN, and what writes into one an error of torch. Buffers are
there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_compete.model.checkpoint import TensorFacts, load_checkpoint, read_weight_headers
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.processor import LlavaCompeteProcessor

logger = logging.getLogger(__name__)


def load_unread(
    directory: str | Path, dtype: torch.dtype, **options: Any
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor] | None:
    """What `load_checkpoint` gives, less the weights; None where these are not stored as they are in the model.

    Files may hold a language model's tensors in its original form, such as experts one by one, or a tied one twice.

    Raises:
        UserError: weights that a load would refuse.
    """
    headers = read_weight_headers(directory)
    model, processor = load_checkpoint(directory, dtype=dtype, device_map={"": "meta"}, **options)
    if (name := stored_otherwise(model, headers)) is not None:
        logger.info("%s: %s is stored in another form, so that the model is read whole", directory, name)
        return None
    fill(model, headers)
    return model, processor


def stored_otherwise(model: Any, headers: Mapping[str, TensorFacts]) -> str | None:
    """The first tensor of a model of transformers' kind that is not stored under its name, once and in its shape."""
    tensors = _tensors(model)
    places = {id(tensor): headers[name].shape for name, tensor in tensors.items() if name in headers}
    for name, tensor in tensors.items():
        is_tied = name in model.all_tied_weights_keys
        if (is_tied and name in headers) or (not is_tied and places.get(id(tensor)) != tuple(tensor.shape)):
            return name
    return None


def _tensors(model: nn.Module) -> dict[str, Any]:
    """All that is or could be stored."""
    return {**dict(model.named_parameters()), **model.state_dict(keep_vars=True)}


def fill(model: LlavaCompeteForConditionalGeneration, headers: Mapping[str, TensorFacts]) -> None:
    """Parameters without weights, and buffers with what is stored or else with what the model's classes compute.

    model: on the meta device; every parameter of it is among `headers`.
    """
    places = {id(tensor): headers[name] for name, tensor in _tensors(model).items() if name in headers}
    made: dict[int, Any] = {}  # one for one, so that ties stay
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = _unread(parameter, places[id(parameter)])
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            facts = places.get(id(buffer))
            stored = None if facts is None else facts.whole().to(buffer.dtype)
            module._buffers[name] = torch.empty_like(buffer, device="cpu") if stored is None else stored
            module._buffers[name]._is_hf_initialized = stored is not None
        module.__dict__.pop("_is_hf_initialized", None)  # a load says so of all modules, buffers or not
    model.initialize_weights()


def _unread(parameter: nn.Parameter, facts: TensorFacts) -> Any:
    one = torch.full((), torch.nan, dtype=parameter.dtype)
    unread: Any = nn.Parameter(one.expand(parameter.shape), requires_grad=parameter.requires_grad)
    unread.stored, unread._is_hf_initialized = facts, True
    return unread
