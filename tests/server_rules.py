"""What vLLM 0.33 and SGLang 0.5.23 do with a model they have no code for, restated without them.

From `vllm/model_executor/models/transformers/{base,moe,multimodal}.py` and `sglang/srt/models/transformers.py`:
they build `AutoModel` with an attention of their own, put a kernel in the place of each child named `experts` whose
parameters all have three dimensions, load the file's tensors into it by name, merge image features into embeddings, and
call the backbone on one row of tokens. `tests/packages/test_server_sources.py` holds these rules against the sources.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NUM_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


class Kernel(nn.Module):
    """Gated SiLU experts that are called `(x, ids, weights)` and return a tensor."""

    def __init__(self, text_config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        experts, inner, width = text_config.num_experts, text_config.moe_intermediate_size, text_config.hidden_size
        self.chosen = text_config.num_experts_per_tok
        self.w13_weight = nn.Parameter(torch.empty(experts, 2 * inner, width, dtype=dtype))
        self.w2_weight = nn.Parameter(torch.empty(experts, width, inner, dtype=dtype))

    def load(self, name: str, tensor: Tensor) -> None:
        own = {"gate_up_proj": self.w13_weight, "down_proj": self.w2_weight}[name]
        assert own.shape == tensor.shape, (name, own.shape, tensor.shape)
        own.data.copy_(tensor)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        assert topk_ids.shape == topk_weights.shape == (len(hidden_states), self.chosen)
        gate, up = torch.einsum("td,emd->tem", hidden_states, self.w13_weight).chunk(2, dim=-1)
        every = torch.einsum("tei,eoi->teo", F.silu(gate) * up, self.w2_weight)
        picked = every.gather(1, topk_ids[:, :, None].expand(-1, -1, every.shape[-1]))
        return (picked * topk_weights[:, :, None].to(picked.dtype)).sum(1)


class Served:
    """A backbone as a server has it.

    Args:
        config: of a checkpoint, as read from config.json.
        weights: the file's tensors by name.
        attention: what the server calls its attention.
    """

    def __init__(self, config: Any, weights: dict[str, Tensor], attention: str = "vllm") -> None:
        ALL_ATTENTION_FUNCTIONS.register(attention, _causal)
        config = copy.deepcopy(config)
        self.text_config = config.text_config
        self.text_config._attn_implementation = attention
        with _parameters_on_meta():
            self.model = AutoModel.from_config(config)
        self.taken: list[str] = []
        if any(getattr(self.text_config, name, None) for name in NUM_EXPERTS):
            self._take_experts(self.model, "model")
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        self.model.eval()
        self._load(weights)

    def _take_experts(self, module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            parameters = list(child.parameters())
            packed = bool(parameters) and all(parameter.ndim == 3 for parameter in parameters)
            if name == "experts" and (packed or isinstance(child, nn.ModuleList)):
                setattr(module, name, Kernel(self.text_config, parameters[0].dtype))
                self.taken.append(f"{prefix}.{name}")
            else:
                self._take_experts(child, f"{prefix}.{name}")

    def _load(self, weights: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for full, tensor in weights.items():
            if not full.startswith("model."):
                continue  # the head, which a server has itself
            name = full.removeprefix("model.")
            owner, _, last = full.rpartition(".")
            if owner in self.taken:
                self.model.get_submodule(owner.removeprefix("model.")).load(last, tensor)
            else:
                parameters.pop(name).data.copy_(tensor)
        left = [name for name in parameters if "w13_weight" not in name and "w2_weight" not in name]
        assert not left, left

    @torch.inference_mode()
    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_token_id: int) -> Tensor:
        """[N] ids and the images' pixels -> [N, H]."""
        embeddings = self.model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
            embeddings[input_ids == image_token_id] = features.flatten(0, -2)
        return embeddings

    @torch.inference_mode()
    def hidden_states(self, embeddings: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
        """[N, H] and [N] -> last hidden states [N, H]."""
        outputs = self.model(
            input_ids=None,
            inputs_embeds=embeddings[None],
            use_cache=False,
            position_ids=positions[None],
            return_dict=False,
            **kwargs,
        )
        return outputs[0][0]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Each parameter goes to the meta device as it is registered; buffers keep what they hold."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            made = module._parameters[name]
            keywords = {**made.__dict__, "requires_grad": parameter.requires_grad}
            module._parameters[name] = type(made)(made.to("meta"), **keywords)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    kwargs = {name: kwargs[name] for name in ("scaling",) if name in kwargs}
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)
