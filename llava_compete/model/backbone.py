"""`LlavaCompeteModel`: image -> tower -> projector -> image tokens in the text -> the language model's layers.

Everything below the head, as transformers' `AutoModel` builds it. The forward also keeps the routing state: it says
which tokens form a sequence in each part and collects the MoE layers' records and losses. It reads no clock, counter
or random number and makes no synchronisation with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from llava_compete.errors import UserError
from llava_compete.model.attention_masks import AttentionInputs, KeepsNothing, without_waiting
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.image_features import ImageFeaturesMixin
from llava_compete.model.losses import attach_losses, own_balance_loss, routing_losses
from llava_compete.model.place_experts import (
    install_language_experts,
    install_vision_experts,
    make_projector,
    make_tower,
)
from llava_compete.model.placeholders import check_counts, place_features, sample_positions
from llava_compete.model.served import check_served, is_served
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.records import stack_layers
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.vision.projector import Projector
from llava_compete.vision.tower import VisionTower


@dataclass
class LlavaCompeteModelOutput(ModelOutput):
    """`aux_losses` by part, with gradient; `loss_terms` are detached, unscaled, named "part/term"."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_losses: dict[str, Tensor] | None = None
    loss_terms: dict[str, Tensor] | None = None


class LlavaCompetePreTrainedModel(PreTrainedModel):
    """What the model with and without its head share: what transformers may do with either."""

    config_class = LlavaCompeteConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The tower whole: its trunk and torch's attention use parameters of their children without calling them, which
    # accelerate's hooks on the leaves would miss.
    _no_split_modules = ("VisionTower", "Projector")
    _skip_keys_device_placement = ("past_key_values",)

    def _init_weights(self, module: nn.Module) -> None:
        """Tower, projector and MoE blocks are initialised where they are built."""

    def initialize_weights(self) -> None:
        """As in transformers, which takes a tower for done once its weights are loaded, whatever buffers it has."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, VisionTower):
                module.restore_buffers()

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Checkpointing without reentrance: the reentrant kind gives the MoE layers' losses no gradient."""
        options = dict(activation_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise UserError(
                "gradient_checkpointing_kwargs.use_reentrant: found true; expected false, since reentrant "
                "checkpointing drops the gradients of the routing losses"
            )
        super()._activation_checkpointing_enable(options, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """As in transformers, also for the tower's blocks; recomputations see the routing state of their forward."""
        function = partial(_checkpoint, gradient_checkpointing_func, self.routing)
        super()._set_gradient_checkpointing(enable, function, every_n_layers)
        for module in self.modules():
            if isinstance(module, VisionTower):
                module.set_grad_checkpointing(enable, function)
            elif isinstance(module, GradientCheckpointingLayer):
                # In training the one cache that layers are given keeps nothing (`attention_masks`).
                module._can_checkpoint_with_cache = enable


def _checkpoint(function: Any, routing: RoutingState, *args: Any, **kwargs: Any) -> Any:
    # A compiled graph recomputes from the tensors of its own forward, and torch.compile takes no such contexts.
    contexts = {} if torch.compiler.is_compiling() else {"context_fn": routing.checkpoint_contexts}
    return function(*args, **contexts, **kwargs)


class LlavaCompeteModel(ImageFeaturesMixin, LlavaCompetePreTrainedModel):
    """The forward pass, for B rows of N tokens of width H, and n images of P features of width D:

        pixel_values [n, 3, S, S] -> vision_tower [n, P, D] -> multi_modal_projector [n, P, H]
            (of images in tiles n is that of the tiles, and [F, H] what the projector makes of them, see `vision.tiles`)
        input_ids [B, N] -> embeddings [B, N, H], the n * P (or F) placeholders among them replaced by the features
        -> language_model -> last_hidden_state [B, N, H]

    Any feed-forward block of the three parts may be a mixture of experts. A text-only model has but the language model.
    `routing` is the state that all mixtures share.

    attached_loss_scale: for trainers that run this backbone and a head of their own, such as trl's, and never see
        `aux_losses`: in training these then reach the gradients through the hidden states, times the scale. 1 over the
        number of accumulation steps is as if each micro-batch's loss held them; None attaches nothing.

    Args:
        config: what to build.
        make_language_model: builds the language model without its head, after the tower; default: `AutoModel`.
    """

    attached_loss_scale: float | None = None

    def __init__(
        self, config: LlavaCompeteConfig, make_language_model: Callable[[], PreTrainedModel] | None = None
    ) -> None:
        super().__init__(config)
        self.routing = RoutingState()
        self.vision_tower: VisionTower | None = None
        self.multi_modal_projector: Projector | None = None
        self.tiling = config.tiling
        moe = MoeConfig() if config.moe is None else MoeConfig.model_validate(config.moe)
        if config.tower is not None:
            self.vision_tower = make_tower(config.tower)
            if moe.vision is not None:
                install_vision_experts(self.vision_tower, moe.vision, self.routing)
            self.multi_modal_projector = make_projector(config, moe.projector, self.routing)
        elif moe.vision is not None or moe.projector is not None:
            raise UserError("moe: vision and projector need a vision tower, and this model has none")
        make = make_language_model or (lambda: AutoModel.from_config(config.text_config))
        self.language_model = make()
        if moe.language is not None:
            install_language_experts(self.language_model, config.text_config, moe.language, self.routing)
        check_served(config, {"vision_tower": self.vision_tower, "multi_modal_projector": self.multi_modal_projector})
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    @property
    def own_balance_coef(self) -> float:
        """Factor of the balance loss of experts that the language model brings; 0 where it has none, or none such."""
        recorded = getattr(self.language_model, "_can_record_outputs", None) or {}
        return (
            float(getattr(self.config.text_config, "router_aux_loss_coef", 0) or 0)
            if "router_logits" in recorded
            else 0
        )

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        num_sequences: dict[str, Any] | None,
        image_sizes: Any,
        num_tile_chunks: int | None,
        begins: bool,
    ) -> Tensor:
        """Token embeddings [B, N, H] with the image features in the placeholders' places; without a cache, where the
        sequences begin (`begins`), placeholders without an image are an error too."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if self.vision_tower is None:
            if pixel_values is not None:
                raise UserError(f"{len(pixel_values)} image(s) given, but this model has no vision tower")
            return inputs_embeds
        places = input_ids == self.config.image_token_id
        if pixel_values is not None or begins:
            _, lengths = self.image_lengths(pixel_values, image_sizes)
            check_counts(places, lengths, may_wait=not self.training)
        if pixel_values is not None:
            features = self._image_features(pixel_values, num_sequences, image_sizes, num_tile_chunks)
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            return place_features(inputs_embeds, places, features.flatten(0, -2))
        if self.training:
            return inputs_embeds + self._dummy_image_features(input_ids.device, num_tile_chunks).sum().to(
                inputs_embeds.dtype
            )
        return inputs_embeds

    # --- running ---------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        right_padded: bool = False,
        num_sequences_in_batch: dict[str, Tensor] | None = None,
        use_cache: bool | None = None,
        output_routing: bool | None = None,
        num_local_sequences: int | None = None,
        image_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        num_tile_chunks: int | None = None,
        attaches_losses: bool = True,
        **kwargs: Any,
    ) -> LlavaCompeteModelOutput:
        """Hidden states of the last layer, and the routing losses.

        input_ids, attention_mask, position_ids: int64 [B, N].
        pixel_values: [images, 3, S, S] at the largest scale, images in reading order over the batch; as the image
            processor made them, uint8 or normalised.
        sequence_ids: [B, N] for packed rows: which sample of the batch (0, 1, ...) a token belongs to, -1 padding.
        right_padded: all padding stands at the rows' ends, as `Collator` puts it; a training step then needs no mask.
        num_tile_chunks: in how many goes the tower takes the images, on the rank that needs most; see `tile_batch`.
        num_sequences_in_batch: images ("vision", "projector") and samples ("language") of the whole optimizer step.
        num_local_sequences: samples in this micro-batch, for packed rows; read off `sequence_ids` if not given, which
            waits for the device.
        attaches_losses: false where the caller adds the routing losses itself (`attached_loss_scale`).
        output_routing: leave records in `self.routing.records`; default: while training.
        """
        self._check_length(input_ids if input_ids is not None else inputs_embeds)
        if sequence_ids is not None and self.language_model._is_stateful:
            raise UserError(
                f"packing: a {self.config.text_config.model_type!r} model has layers with a running state, which would "
                "pass from one packed sample to the next; set data.packing: false"
            )
        record = self.training if output_routing is None else output_routing
        with self._routing_mode(), self.routing.recording() if record else nullcontext():
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self._embed(
                    input_ids,
                    pixel_values,
                    num_sequences_in_batch,
                    image_sizes,
                    num_tile_chunks,
                    past_key_values is None,
                )
            if self.routing.is_recording:
                count = (num_sequences_in_batch or {}).get("language")
                self._begin_language(attention_mask, sequence_ids, inputs_embeds, count, num_local_sequences)
            if use_cache is None and (self.training or right_padded or sequence_ids is not None):
                use_cache = False  # a cache would be waste, and it hides packed rows from transformers' masks
            if position_ids is None and past_key_values is None:
                position_ids = sample_positions(attention_mask, sequence_ids)
            # Packed rows are told apart by position ids that start again; a mask would hide that.
            attention = AttentionInputs(None if sequence_ids is not None else attention_mask, past_key_values)
            if use_cache is False and past_key_values is None and (right_padded or sequence_ids is not None):
                attention = without_waiting(self.language_model.config, inputs_embeds, attention, sequence_ids)
            balances_own = self.routing.is_recording and self.own_balance_coef > 0
            if balances_own:
                kwargs["output_router_logits"] = True
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                use_cache=use_cache,
                **attention._asdict(),
                **kwargs,
            )
        if record:
            self.routing.stacks = stack_layers(self.routing.records)
        aux_losses, loss_terms = routing_losses(self.routing.stacks) if record else ({}, {})
        if balances_own:
            chosen = self.config.text_config.num_experts_per_tok
            own = own_balance_loss(outputs.router_logits, chosen, self.routing.groups["language"])
            aux_losses["language"] = self.own_balance_coef * own
            loss_terms["language/own_balance_loss"] = own.detach()
        hidden = outputs.last_hidden_state
        if attaches_losses and self.training and self.attached_loss_scale is not None:
            hidden = attach_losses(hidden, list(aux_losses.values()), self.attached_loss_scale)
        return LlavaCompeteModelOutput(
            last_hidden_state=hidden,
            past_key_values=None if isinstance(outputs.past_key_values, KeepsNothing) else outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_losses=aux_losses,
            loss_terms=loss_terms,
        )

    def _check_length(self, tokens: Tensor | None) -> None:
        if tokens is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        if is_served(self.config):
            return  # one row then holds the tokens of many requests, whose lengths the server watches
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and tokens.shape[1] > limit:
            raise UserError(f"text of {tokens.shape[1]} tokens is longer than the language model's context of {limit}")

    def _begin_language(
        self,
        attention_mask: Tensor | None,
        sequence_ids: Tensor | None,
        inputs_embeds: Tensor,
        num_sequences: Tensor | None,
        num_local: int | None,
    ) -> None:
        """Group the text's tokens by sample."""
        if sequence_ids is not None:
            num_local = int(sequence_ids.max()) + 1 if num_local is None else num_local
            self.routing.begin("language", TokenGroups.from_ids(sequence_ids, num_local, num_sequences))
            return
        mask = attention_mask
        if mask is None:
            mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
        # With a cache the mask also covers the past, whose tokens do not run again.
        self.routing.begin("language", TokenGroups.from_mask(mask[:, -inputs_embeds.shape[1] :], num_sequences))

    @contextmanager
    def _routing_mode(self) -> Iterator[None]:
        """The router decides at inference, unless the config asks for the competition of every layer."""
        state = self.routing
        state.competition_enabled = self.training or self.config.competition_at_inference
        if self.training or not self.config.competition_at_inference:
            yield
            return
        scheduled, state.competing = state.competing, frozenset(moe_blocks(self))
        try:
            yield
        finally:
            state.competing = scheduled
