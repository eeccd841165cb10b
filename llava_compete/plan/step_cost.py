"""One micro-batch's forward and backward on the meta device: what it computes and what it keeps, in seconds.

Nothing is estimated by formula that the model's own code can say: saved tensors are counted by autograd's hooks and
products by torch's FLOP counter. Two things are replaced, because they depend on values or on the device: attention
(counted as the flash kernel, which keeps no score matrix) and packed experts (same matrix products, any routing).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.competition import Contest
from llava_compete.moe.experts import ExpertsOutput, PackedExperts
from llava_compete.moe.factorised import FactorisedExperts
from llava_compete.moe.routers import with_shared


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch: bytes kept for backward by each repeated layer and by the rest, and floating operations.

    loss_bytes: the two float32 gradients as large as the logits with which backward begins. asking_flops: beside
    `flops`, of all the experts that the loss may ask (`competition_judge`); how many it does depends on values.
    layer_tokens: how many tokens come to each mixture, by its name.
    """

    layer_bytes: dict[str, int]
    other_bytes: int
    layer_input_bytes: int
    loss_bytes: int
    flops: int
    layer_forward_flops: int
    asking_flops: int
    layer_tokens: dict[str, int]

    def activations(self, checkpointing: bool) -> int:
        """Bytes at the peak of a step: where backward begins or, with checkpointing, where a layer is recomputed."""
        layers = self.layer_bytes.values()
        if not checkpointing:
            return sum(layers) + self.other_bytes + self.loss_bytes
        return self.layer_input_bytes + self.other_bytes + max(self.loss_bytes, *layers)

    def step_flops(self, checkpointing: bool) -> int:
        """Of forward and backward, and of the layers' second forward with checkpointing."""
        return self.flops + (self.layer_forward_flops if checkpointing else 0)


def simulate(
    model: LlavaCompeteForConditionalGeneration, rows: int, length: int, images: int, competing: frozenset[str]
) -> StepCost:
    """Cost of a micro-batch of `rows` samples of `length` tokens with `images` images in all, on a meta-device model.

    Images in tiles are taken to be of the most tokens that their grids allow.
    Counts with the model's `requires_grad` flags: frozen parts cost no backward. Layers in `competing` run all experts.
    """
    counter = FlopCounterMode(display=False)
    recorder = _Recorder(model, counter)
    model.routing.competing = competing
    config = model.config
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool, device="meta")
    pixels, sizes, tiling = None, None, model.model.tiling
    # At most these tokens have a label, and the head runs for no others.
    tokens = tiles = 0
    if images:
        sizes = None if tiling is None else [tiling.largest] * images
        tokens = images * (config.num_image_tokens if tiling is None else tiling.num_tokens(tiling.largest))
        tiles = images * (1 if tiling is None else tiling.num_tiles(tiling.largest))
    labelled = rows * length - tokens
    if images:
        side = config.tower.image_size
        pixels = torch.empty(tiles, 3, side, side, device="meta", dtype=model.model.vision_tower_dtype)
    asking = _Asking()
    with counter, _stand_ins(asking), recorder, _tokens(model) as layer_tokens:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            image_sizes=sizes,
            labels=ids,
            label_positions=torch.zeros(max(labelled, 1), dtype=torch.long, device="meta"),
            num_items_in_batch=1,
            output_routing=False,
        )
        output.loss.backward()
    return StepCost(
        layer_bytes=dict(recorder.layer_bytes),
        other_bytes=recorder.other_bytes,
        layer_input_bytes=recorder.input_bytes,
        loss_bytes=2 * 4 * output.logits.numel(),
        flops=counter.get_total_flops(),
        layer_forward_flops=recorder.layer_flops,
        asking_flops=asking.flops,
        layer_tokens=layer_tokens,
    )


@contextlib.contextmanager
def _tokens(model: LlavaCompeteForConditionalGeneration) -> Iterator[dict[str, int]]:
    """How many tokens each mixture's router is called with."""
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda _, inputs: found.update({name: len(inputs[0])})

    blocks = moe_blocks(model).items()
    handles = [block.router.register_forward_pre_hook(count(name)) for name, block in blocks]
    yield found
    for handle in handles:
        handle.remove()


class _Recorder:
    """Counts each storage saved for backward once, parameters apart, under the layer that saved it; and the layers'
    inputs and products, of those layers that a backward passes through."""

    def __init__(self, model: LlavaCompeteForConditionalGeneration, counter: FlopCounterMode) -> None:
        self.layer_bytes: dict[str, int] = defaultdict(int)
        self.other_bytes = 0
        self.input_bytes = 0
        self.layer_flops = 0
        self._counter = counter
        self._flops_before = 0
        self._scope: str | None = None
        self._seen: set[int] = set()
        self._kept: list[Any] = []
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._layers = _named_layers(model)

    def __enter__(self) -> _Recorder:
        self._handles = []
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._enter_layer(name)))
            self._handles.append(layer.register_forward_hook(self._leave_layer, with_kwargs=True))
        self._hooks = saved_tensors_hooks(self._pack, lambda packed: packed)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _enter_layer(self, name: str) -> Any:
        def hook(module: nn.Module, positional: tuple[Any, ...]) -> None:
            self._scope, self._flops_before = name, self._counter.get_total_flops()

        return hook

    def _leave_layer(
        self, module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        self._scope = None
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:  # else a checkpoint keeps nothing and recomputes nothing
            tensor = positional[0] if positional else keywords["hidden_states"]
            self.input_bytes += tensor.numel() * tensor.element_size()
            self.layer_flops += self._counter.get_total_flops() - self._flops_before

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen and storage._cdata not in self._parameters:
            self._seen.add(storage._cdata)
            self._kept.append(storage)  # so that no later storage takes its address
            size = storage.nbytes()
            if self._scope is None:
                self.other_bytes += size
            else:
                self.layer_bytes[self._scope] += size
        return tensor


def _named_layers(model: LlavaCompeteForConditionalGeneration) -> dict[str, nn.Module]:
    """The layers that gradient checkpointing recomputes: the tower's blocks and transformers' own choice."""
    layers = {name: item for name, item in model.named_modules() if isinstance(item, GradientCheckpointingLayer)}
    if model.vision_tower is not None:
        layers.update({f"vision_tower.{index}": block for index, block in enumerate(model.vision_tower.blocks)})
    return layers


class _Asking:
    """Adds up what the loss's judgement may cost."""

    def __init__(self) -> None:
        self.flops = 0

    def products(self, experts: PackedExperts, x_TD: Tensor, *chosen: Any, **options: Any) -> ExpertsOutput:
        """`_expert_products`, with the judgement of its output."""
        output_TO, contest, *_ = _expert_products(experts, x_TD, *chosen[:2], **options)
        logits_TE = chosen[2] if len(chosen) > 2 else None
        how = experts.judgement
        if logits_TE is not None and how is not None:
            output_TO = _JudgedOutput.apply(output_TO, logits_TE, x_TD, how.subtracts_output)
            most = experts.num_experts - experts.num_winners if how.contenders is None else how.contenders
            if how.contenders is None and how.margin == 0:
                most = experts.num_experts  # products of all on all tokens, without a sort
            if how.asks:
                products = experts.up[0].numel() + experts.down_proj[0].numel()
                self.flops += 2 * x_TD[..., 0].numel() * most * products
        proxies_RD = options.get("proxies_RD")
        if proxies_RD is not None:  # by way of the output, for where nothing is recorded no loss is read
            output_TO = output_TO + experts.coupling(proxies_RD, experts.up).to(output_TO.dtype)
        return ExpertsOutput(output_TO, contest)


@contextlib.contextmanager
def _stand_ins(asking: _Asking) -> Iterator[None]:
    def forward(experts: PackedExperts, *arguments: Any, **options: Any) -> ExpertsOutput:
        return asking.products(experts, *arguments, **options)

    def go_on(experts: FactorisedExperts, x_TD: Tensor, _: Tensor, weights_TC: Tensor, *, low_TEH: Tensor) -> Tensor:
        hidden_PI = _continued(experts, x_TD, low_TEH)
        return _weighted_sum(experts, hidden_PI, weights_TC.to(x_TD.dtype))

    with (
        mock.patch.object(F, "scaled_dot_product_attention", _flash_attention),
        mock.patch.object(PackedExperts, "forward", forward),
        mock.patch.object(FactorisedExperts, "forward", go_on),
        # Only ever switched off in our code and peft's, and unknown to the meta device.
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
    ):
        yield


def _expert_products(
    experts: PackedExperts,
    x_TD: Tensor,
    choices_TC: Tensor | None = None,
    weights_TC: Tensor | None = None,
    *_: Any,
    shared_weight: float = 0.0,
    teaches: bool = False,
    **__: Any,
) -> ExpertsOutput:
    """The products of a router step (K experts a token) or of a competition (all E), and what they keep."""
    if weights_TC is None:
        return _competition(experts, x_TD)
    if teaches:  # every expert responds, and nothing of it is kept
        with torch.no_grad():
            _responses(experts, _all_up(x_TD, experts.up), experts.down_proj)
    weights_TK = with_shared(weights_TC, shared_weight) if shared_weight else weights_TC
    return ExpertsOutput(_chosen_experts(experts, x_TD, weights_TK), None)


class _JudgedOutput(torch.autograd.Function):
    """Keeps what the loss's judgement keeps: also the tokens, which the router keeps too."""

    @staticmethod
    def forward(ctx: Any, output_TO: Tensor, logits_TE: Tensor, x_TD: Tensor, subtracts_output: bool) -> Tensor:
        ctx.save_for_backward(logits_TE, x_TD, output_TO if subtracts_output else None)
        return output_TO.view_as(output_TO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grad_TO, torch.zeros_like(ctx.saved_tensors[0]), None, None


def _chosen_experts(experts: PackedExperts, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
    x_PD = x_TD.repeat(experts.num_winners, 1)  # gathered for each chosen expert
    hidden_PI = _activate(experts, F.linear(x_PD, experts.up[0]))
    return _weighted_sum(experts, hidden_PI, weights_TK.to(x_TD.dtype))


def _continued(experts: FactorisedExperts, x_TD: Tensor, low_TEH: Tensor) -> Tensor:
    """Hidden states of the chosen experts, from what chose them."""
    low_PH = low_TEH[:, : experts.num_winners].reshape(-1, low_TEH.shape[2]).clone()
    of_low_PI = F.linear(low_PH, experts.high[0])
    if not experts.has_gate:
        return experts.act_fn(of_low_PI)
    return experts.act_fn(of_low_PI) * F.linear(x_TD.repeat(experts.num_winners, 1), experts.up[0])


def _weighted_sum(experts: PackedExperts, hidden_PI: Tensor, weights_TK: Tensor) -> Tensor:
    y_KTO = F.linear(hidden_PI, experts.down_proj[0]).unflatten(0, (experts.num_winners, -1))
    return (y_KTO * weights_TK.T.unsqueeze(-1)).sum(0)


def _competition(experts: PackedExperts, x_TD: Tensor) -> ExpertsOutput:
    if experts.kept == "everything":
        affinity_ET, won_KTO = _responses(experts, _all_up(x_TD, experts.up), experts.down_proj)
    else:
        affinity_ET, won_KTO = _RecomputedCompetition.apply(x_TD, experts.up, experts.down_proj, experts)
    output_TO = (won_KTO * affinity_ET[: experts.num_winners].unsqueeze(-1)).sum(0)
    # Where nothing is recorded, only the output is read.
    return ExpertsOutput(output_TO, Contest._make([affinity_ET] * len(Contest._fields)))


def _all_up(x_TD: Tensor, up_EMD: Tensor) -> Tensor:
    return F.linear(x_TD, up_EMD.flatten(0, 1)).unflatten(-1, up_EMD.shape[:2])


def _responses(experts: PackedExperts, up_TEM: Tensor, down_EOI: Tensor) -> tuple[Tensor, Tensor]:
    """Affinities [E, T] and as many outputs as win [K, T, O]."""
    y_ETO = torch.bmm(_activate(experts, up_TEM).transpose(0, 1), down_EOI.transpose(1, 2))
    # Softplus keeps y; the sigmoid stands for the gradient of y's size that a backward begins with.
    return (F.softplus(y_ETO) + y_ETO.sigmoid()).mean(-1), y_ETO[: experts.num_winners].clone()


class _RecomputedCompetition(torch.autograd.Function):
    """`_responses` of tokens where little is kept (`competition_keeps`): the rest is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, up_EMD: Tensor, down_EOI: Tensor, experts: PackedExperts
    ) -> tuple[Tensor, Tensor]:
        up_TEM = _all_up(x_TD, up_EMD)
        ctx.save_for_backward(x_TD, up_EMD, down_EOI, up_TEM if experts.kept == "pre_activations" else None)
        ctx.experts = experts
        return _responses(experts, up_TEM, down_EOI)

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_won_KTO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_EMD, down_EOI, up_TEM = ctx.saved_tensors
        x_wanted, up_wanted, down_wanted, _ = ctx.needs_input_grad
        up_TEM = _all_up(x_TD, up_EMD) if up_TEM is None else up_TEM
        hidden_ETI = _activate(ctx.experts, up_TEM).transpose(0, 1)
        grad_y_ETO = torch.bmm(hidden_ETI, down_EOI.transpose(1, 2))
        torch.bmm(grad_y_ETO, down_EOI)
        grad_up_TF = up_TEM.flatten(1)
        return (
            grad_up_TF @ up_EMD.flatten(0, 1) if x_wanted else None,
            (grad_up_TF.t() @ x_TD).view_as(up_EMD) if up_wanted else None,
            torch.bmm(grad_y_ETO.transpose(1, 2), hidden_ETI) if down_wanted else None,
            None,
        )


def _activate(experts: PackedExperts, up: Tensor) -> Tensor:
    if not experts.has_gate:
        return experts.act_fn(up)
    gate, value = up.chunk(2, dim=-1)
    return experts.act_fn(gate) * value


class _FlashAttention(torch.autograd.Function):
    """Keeps what a flash kernel keeps (q, k, v, output, one number a row) and costs its products."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = (query @ key.transpose(-1, -2)) @ value
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        scores = query @ key.transpose(-1, -2)  # recomputed, as flash attention does
        through = gradients[0] @ value.transpose(-1, -2)
        return through @ key, through.transpose(-1, -2) @ query, scores.transpose(-1, -2) @ gradients[0]


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    if key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    return _FlashAttention.apply(query, key, value)
