"""`LlavaCompeteForConditionalGeneration`: image -> tower -> projector -> image tokens in the text -> causal LM.

The forward also keeps the routing state (design: `moe.state`): it says which tokens form a sequence in each part,
collects the MoE layers' records, and adds their losses. It reads no clock, counter or random number and makes no
synchronisation with the device. Called by transformers' generate and by the trainer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from llava_compete.errors import UserError
from llava_compete.language.loading_report import refuse_wrong_keys
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.functional import check_counts, language_loss, place_features, routing_losses, sample_positions
from llava_compete.model.generation import ImageGenerationMixin
from llava_compete.model.place_experts import install_language_experts, install_vision_experts, make_projector
from llava_compete.model.strict_loading import refuse_offloaded_tower, spare_from_quantization
from llava_compete.moe.block import SparseMoeBlock, moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.vision.projector import Projector
from llava_compete.vision.tower import VisionTower

logger = logging.getLogger(__name__)


@dataclass
class LlavaCompeteOutput(ModelOutput):
    """loss = lm_loss + the sum of `aux_losses`; `loss_terms` are detached, unscaled, named "part/term"."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    loss_terms: dict[str, Tensor] | None = None


class LlavaCompeteForConditionalGeneration(PreTrainedModel, ImageGenerationMixin):
    """A vision-language model whose feed-forward blocks may be sparse mixtures of experts.

    Parameters lie under `vision_tower.`, `projector.` and `language_model.`; a text-only model has only the last.
    """

    config_class = LlavaCompeteConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The tower whole: its trunk and torch's attention use parameters of their children without calling them, which
    # accelerate's hooks on the leaves would miss.
    _no_split_modules = ("VisionTower", "Projector")
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(self, config: LlavaCompeteConfig) -> None:
        super().__init__(config)
        self.routing = RoutingState()
        self.vision_tower: VisionTower | None = None
        self.projector: Projector | None = None
        moe = MoeConfig() if config.moe is None else MoeConfig.model_validate(config.moe)
        if config.tower is not None:
            self.vision_tower = VisionTower(config.tower)
            if moe.vision is not None:
                install_vision_experts(self.vision_tower, moe.vision, self.routing)
            self.projector = make_projector(config, moe.projector, self.routing)
        elif moe.vision is not None or moe.projector is not None:
            raise UserError("moe: vision and projector need a vision tower, and this model has none")
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if moe.language is not None:
            install_language_experts(self.language_model, config.text_config, moe.language, self.routing)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Tower, projector and MoE blocks are initialised where they are built; a load leaves only buffers to fill."""
        if isinstance(module, VisionTower):
            module.restore_buffers()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    @property
    def zero3_leaf_modules(self) -> list[type[nn.Module]]:
        """Module classes whose parameters ZeRO-3 must gather together: packed experts, and torch's attention, which
        uses its output projection's parameters without calling it."""
        kinds = (SparseMoeBlock, nn.MultiheadAttention)
        return [kind for kind in kinds if any(isinstance(module, kind) for module in self.modules())]

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
        if self.vision_tower is not None:
            self.vision_tower.set_grad_checkpointing(True)

    def _activation_checkpointing_disable(self) -> None:
        super()._activation_checkpointing_disable()
        if self.vision_tower is not None:
            self.vision_tower.set_grad_checkpointing(False)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but strict: a missing, unexpected or misshapen tensor is an error that names it."""
        path, wants_info = str(pretrained_model_name_or_path), kwargs.pop("output_loading_info", False)
        quantization = kwargs.get("quantization_config")
        if quantization is not None:
            spare_from_quantization(quantization)
        # Mismatched shapes are not ignored: collected with the other wrong keys, and refused below.
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise UserError(f"{path}: truncated or damaged weights ({error})") from error
        refuse_wrong_keys(path, info)
        if model.vision_tower is not None:
            refuse_offloaded_tower(getattr(model, "hf_device_map", {}))
        if quantization is not None and (blocks := moe_blocks(model)):
            parts = ", ".join(dict.fromkeys(block.part for block in blocks.values()))
            logger.warning("quantization: the packed experts of %s stay unquantised", parts)
        return (model, info) if wants_info else model

    # --- running -------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor, num_sequences: dict[str, Any] | None = None) -> Tensor:
        """Projected features [n, num_image_tokens, hidden]; each image is one sequence of tower and projector."""
        assert self.vision_tower is not None
        assert self.projector is not None
        counts = num_sequences or {}
        if self.routing.is_recording:
            ids = self.vision_tower.tile_image_ids(len(pixel_values), pixel_values.device)
            self.routing.begin("vision", TokenGroups.from_ids(ids, len(pixel_values), counts.get("vision")))
        features = self.vision_tower(pixel_values.to(self.vision_tower_dtype))
        if self.routing.is_recording:
            ones = torch.ones(features.shape[:2], device=features.device)
            self.routing.begin("projector", TokenGroups.from_mask(ones, counts.get("projector")))
        return self.projector(features)

    @property
    def vision_tower_dtype(self) -> torch.dtype:
        """Precision that the tower's first layer computes in."""
        assert self.vision_tower is not None
        return next(parameter.dtype for parameter in self.vision_tower.parameters() if parameter.is_floating_point())

    def _dummy_image_features(self, device: torch.device) -> Tensor:
        """The features of one blank image, absent from every statistic, times 0.

        It sends a text-only micro-batch of training through the same modules at the same place, so that all ranks run
        the same collectives and the tower's parameters have (zero) gradients.
        """
        assert self.vision_tower is not None
        assert self.projector is not None
        side = self.config.tower.image_size
        pixels = torch.zeros(1, 3, side, side, device=device, dtype=self.vision_tower_dtype)
        tiles = sum(scale * scale for scale in self.config.tower.scales)
        self.routing.begin("vision", TokenGroups.empty(tiles * self.vision_tower.tokens_per_tile, device))
        features = self.vision_tower(pixels)
        self.routing.begin("projector", TokenGroups.empty(features.shape[1], device))
        return self.projector(features) * 0

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        num_sequences: dict[str, Any] | None,
        begins: bool,
    ) -> Tensor:
        """Token embeddings [B, N, hidden] with the image features in the placeholders' places; without a cache, where
        the sequences begin (`begins`), placeholders without an image are an error too."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if self.vision_tower is None:
            if pixel_values is not None:
                raise UserError(f"{len(pixel_values)} image(s) given, but this model has no vision tower")
            return inputs_embeds
        places = input_ids == self.config.image_token_id
        if pixel_values is not None or begins:
            num_images = 0 if pixel_values is None else len(pixel_values)
            check_counts(places, num_images, self.config.num_image_tokens, may_wait=not self.training)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, num_sequences)
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            return place_features(inputs_embeds, places, features.flatten(0, 1))
        if self.training:
            return inputs_embeds + self._dummy_image_features(input_ids.device).sum().to(inputs_embeds.dtype)
        return inputs_embeds

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_sequences_in_batch: dict[str, Tensor] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routing: bool | None = None,
        num_local_sequences: int | None = None,
        **kwargs: Any,
    ) -> LlavaCompeteOutput:
        """One forward.

        input_ids, attention_mask, labels, position_ids: int64 [B, N]; labels are -100 where nothing is predicted.
        pixel_values: [images, 3, S, S] at the largest scale, images in reading order over the batch.
        sequence_ids: [B, N] for packed rows: which sample of the batch (0, 1, ...) a token belongs to, -1 padding.
        num_items_in_batch: supervised tokens of the whole optimizer step, over which lm_loss is a mean.
        num_sequences_in_batch: images ("vision", "projector") and samples ("language") of the whole optimizer step.
        num_local_sequences: samples in this micro-batch, for packed rows; read off `sequence_ids` if not given, which
            waits for the device.
        output_routing: leave records in `self.routing.records`; default: while training.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        self._check_length(tokens)
        record = self.training if output_routing is None else output_routing
        with self._routing_mode(), self.routing.recording() if record else nullcontext():
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self._embed(input_ids, pixel_values, num_sequences_in_batch, past_key_values is None)
            if self.routing.is_recording:
                count = (num_sequences_in_batch or {}).get("language")
                self._begin_language(attention_mask, sequence_ids, inputs_embeds, count, num_local_sequences)
            if use_cache is None and (self.training or sequence_ids is not None):
                use_cache = False  # a cache would be waste, and it hides packed rows from transformers' masks
            if position_ids is None and past_key_values is None:
                position_ids = sample_positions(attention_mask, sequence_ids)
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                # Packed rows are told apart by position ids that start again; a mask would hide that.
                attention_mask=None if sequence_ids is not None else attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        lm_loss = None
        if labels is not None:
            lm_loss = language_loss(outputs.logits, labels, num_items_in_batch)
        aux_losses, loss_terms = routing_losses(self.routing.records) if record else ({}, {})
        loss = lm_loss
        for aux_loss in aux_losses.values():
            loss = None if loss is None else loss + aux_loss.to(loss.device)
        return LlavaCompeteOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=None if lm_loss is None else lm_loss.detach(),
            aux_losses=aux_losses,
            loss_terms=loss_terms,
        )

    def _check_length(self, tokens: Tensor | None) -> None:
        if tokens is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
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
