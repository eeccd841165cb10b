"""Adapters on torch's MultiheadAttention, which calls neither of its projections: peft's layer, but for its arithmetic.

peft's adds the output projection's update twice, with the gradient of one (huggingface/peft#3774). Its forward
exchanges weights for merged ones and subtracts the update again: that leaves a rounding in the frozen weights, which in
bfloat16 adds up step by step, and ZeRO-3 loses the parameters that it has sharded.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F


class AdaptedAttention(MultiheadAttention):
    """peft's layer, by the same names; its weights are base + update in every forward, and no parameter is exchanged.

    It uses the parameters of all modules below it without calling them.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        """As torch's MultiheadAttention."""
        if self.merged or self.disable_adapters:
            return super().forward(query, key, value, *args, **options)
        in_weight, out_weight = self.in_proj_weight, self.out_proj.weight
        for name in self._active():
            in_weight = in_weight + _update(self, name, in_weight)
            out_weight = out_weight + _update(self.base_layer.out_proj, name, out_weight)
        return _attend(self.base_layer, in_weight, out_weight, query, key, value, *args, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weights, once.

        Raises:
            ValueError: with `safe_merge`, a weight would not be finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        for name in names:
            merged = self.in_proj_weight.data + _update(self, name, self.in_proj_weight).detach()
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"adapter {name}: the merged weights are not finite")
            self.in_proj_weight.data.copy_(merged)
            self.merged_adapters.append(name)
        self.base_layer.out_proj.merge(safe_merge, names)

    def unmerge(self) -> None:
        """Take the update off again, but for rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self.in_proj_weight.data -= _update(self, name, self.in_proj_weight).detach()
        self.base_layer.out_proj.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """The plain layer."""
        if merge:
            self.merge(safe_merge, adapter_names)
        base = self.base_layer
        base.out_proj = base.out_proj.get_base_layer()
        return base

    def _restore_weights(self) -> None:
        """Nothing was exchanged; peft makes new parameters here, whenever modules are listed, unknown to ZeRO-3."""

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]


def _update(layer: Any, name: str, weight: Tensor) -> Tensor:
    """[out, in], scaling · B A, in the dtype of `weight`."""
    update: Tensor = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
    return update.to(weight.dtype)


def _attend(
    base: nn.MultiheadAttention,
    in_weight: Tensor,
    out_weight: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Any]:
    """`base`'s forward with other weights."""
    turned = base.batch_first and query.dim() == 3
    if turned:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    output, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        base.embed_dim,
        base.num_heads,
        in_weight,
        base.in_proj_bias,
        base.bias_k,
        base.bias_v,
        base.add_zero_attn,
        base.dropout,
        out_weight,
        base.out_proj.bias,
        training=base.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return output.transpose(0, 1) if turned else output, weights


def use_for_attention(config: LoraConfig) -> LoraConfig:
    """`config`, whose adapters on torch's attention are these; said to the config alone, not saved with it."""
    config._register_custom_module({nn.MultiheadAttention: AdaptedAttention})
    return config
