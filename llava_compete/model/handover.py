"""A model that one process makes and many read in parts: through a directory that is there for the start alone.

For what lies nowhere as it is in the model: a tower and a projector that join a language model, random weights, weights
in another form (GGUF, experts one by one, pickled towers). What one process draws and converts is then what it is in a
plain start. A language model's tensors that lie in its own files as they are in the model stay there.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import GenerationConfig

from llava_compete.errors import UserError
from llava_compete.language.gguf import gguf_options
from llava_compete.language.sources import causal_name
from llava_compete.model.checkpoint import (
    MODEL,
    TensorFacts,
    read_config,
    read_text_config,
    read_weight_headers,
    save_checkpoint,
)
from llava_compete.model.dtypes import cast
from llava_compete.model.hub_errors import HUB_ERRORS
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.model.section import ModelSection
from llava_compete.model.shards import SHARD_BYTES, PlannedTensor, write_shards
from llava_compete.model.unread import fill


def language_headers(name: str) -> dict[str, TensorFacts]:
    """Where the tensors of a named language model lie, by the names of the causal LM alone; nothing without safetensors
    of the usual names."""
    directory = Path(name)
    try:
        if not directory.is_dir():
            directory = Path(snapshot_download(name, allow_patterns=f"{MODEL}*.safetensors*"))
        if gguf_options(name):
            return {}
        return {causal_name(key): facts for key, facts in read_weight_headers(directory).items()}
    except UserError:  # transformers' own loader then finds them, or says what is wrong
        return {}
    except HUB_ERRORS:
        return {}


def read_embeddings(model: LlavaCompeteForConditionalGeneration, name: str) -> None:
    """Give embeddings and head their weights where these were left in the files of the language model `name`."""
    if not model.get_input_embeddings().get_parameter("weight").is_meta:
        return
    headers = _places(model, name)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        (path,) = (path for path, found in model.named_modules() if found is module)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                weight = nn.Parameter(headers[f"{path}.{key}"].whole(), requires_grad=parameter.requires_grad)
                setattr(module, key, weight)
        model.tie_weights()  # a head that is the embeddings' has its weights now


def write_handover(
    model: LlavaCompeteForConditionalGeneration,
    processor: LlavaCompeteProcessor,
    directory: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """All of a model but for its tensors on the meta device, which are read from where they lie."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save_checkpoint(model, processor, directory, {})
    planned = {
        name: PlannedTensor(tuple(tensor.shape), tensor.dtype, partial(_plain, tensor))
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys and not tensor.is_meta
    }
    write_shards(directory, planned, shard_bytes)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def read_handover(
    directory: Path, section: ModelSection
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor]:
    """What was handed over, its weights still in files (`unread.py`); `section` is what it was made of."""
    config = read_config(directory, section.trust_remote_code)
    config.name_or_path = str(section.checkpoint or "")
    if section.attention is not None:
        config._attn_implementation = section.attention
    with torch.device("meta"):
        model = LlavaCompeteForConditionalGeneration(config)
    cast(model, getattr(torch, section.dtype)).tie_weights()
    name = None if section.language_model is None else section.language_model.name
    in_place = {} if name is None else _places(model, name)
    handed = read_weight_headers(directory) if any(directory.glob(f"{MODEL}*.safetensors")) else {}
    for path in [path for path in model.all_tied_weights_keys if path in handed]:  # which its config says, but not it
        module, _, key = path.rpartition(".")
        tied = model.get_parameter(path)
        setattr(model.get_submodule(module), key, nn.Parameter(torch.empty_like(tied)))
        del model.all_tied_weights_keys[path]
    fill(model, {**in_place, **handed})
    model.generation_config = GenerationConfig.from_pretrained(directory)
    processor = LlavaCompeteProcessor.from_pretrained(directory, trust_remote_code=section.trust_remote_code)
    return model, processor


def _places(model: LlavaCompeteForConditionalGeneration, name: str) -> dict[str, TensorFacts]:
    """Where the tensors of the language model `name` lie, by their names in our model."""
    if read_text_config(name) is not None:
        return read_weight_headers(name)
    return {model.language_head.own_name(key): facts for key, facts in language_headers(name).items()}
