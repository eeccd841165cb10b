"""`LlavaCompeteForConditionalGeneration`: the backbone and the language model's head, with losses and generation."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple

from llava_compete.language.loading_report import damage_named, refuse_wrong_keys
from llava_compete.model.backbone import LlavaCompeteModel, LlavaCompetePreTrainedModel
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.generation import ImageGenerationMixin
from llava_compete.model.language_head import LanguageHead
from llava_compete.model.losses import language_loss
from llava_compete.model.parameter_names import old_names_mapping
from llava_compete.model.placeholders import placeholder_rows, sent
from llava_compete.model.sequence_shares import sequences_by_labels
from llava_compete.model.strict_loading import refuse_offloaded_tower, spare_from_quantization
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.state import RoutingState
from llava_compete.parts import Part
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


class LlavaCompeteForConditionalGeneration(LlavaCompetePreTrainedModel, ImageGenerationMixin):
    """A vision-language model whose feed-forward blocks may be sparse mixtures of experts.

    The parameters have the names of transformers' own Llava: `model.vision_tower.`, `model.multi_modal_projector.`,
    `model.language_model.` and `lm_head.`; a text-only model has only the last two. `LlavaCompeteModel` draws the
    forward up to the hidden states [B, N, H]; here they become logits [B, N, V] and losses.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: LlavaCompeteConfig) -> None:
        super().__init__(config)
        self.model = LlavaCompeteModel(config, self._make_language_model)
        self.lm_head = self.language_head.module
        self.post_init()

    def _make_language_model(self) -> PreTrainedModel:
        # What pads a batch also ends a document or a turn where the tokenizer has no token for padding alone; known as
        # padding, its embedding would begin with zeros and be left out of training. Padding itself needs neither:
        # nothing attends to it, and so it has no gradient.
        text = self.config.text_config
        pad, text.pad_token_id = getattr(text, "pad_token_id", None), None
        try:
            causal = AutoModelForCausalLM.from_config(text)
        finally:
            text.pad_token_id = pad
        causal.config.pad_token_id = pad
        return self._take_head(causal)

    def _take_head(self, causal: PreTrainedModel) -> PreTrainedModel:
        """Keep the head of `causal` and return its layers."""
        causal.get_input_embeddings().padding_idx = None
        self.language_head = LanguageHead(causal)
        self._tied_weights_keys = self.language_head.tied
        return self.language_head.language_model

    def set_language_model(self, causal: PreTrainedModel) -> None:
        """Put the layers and the head of a causal LM, such as a pretrained one, in the place of ours."""
        self.model.language_model = self._take_head(causal)
        self.lm_head = self.language_head.module
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def adopt_language_model(self, other: LlavaCompeteForConditionalGeneration) -> None:
        """Put another model's language part, its experts too, in the place of ours; `other` is of no use afterwards."""
        self.language_head = other.language_head
        self._tied_weights_keys = other._tied_weights_keys
        self.model.language_model, self.lm_head = other.model.language_model, other.lm_head
        for block in moe_blocks(self).values():
            if block.part == "language":
                block.state = self.routing
                self.routing.join(block.name)
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    @property
    def vision_tower(self) -> VisionTower | None:
        """None in a text-only model."""
        return self.model.vision_tower

    @property
    def multi_modal_projector(self) -> Projector | None:
        """None in a text-only model."""
        return self.model.multi_modal_projector

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model without its head."""
        return self.model.language_model

    @property
    def routing(self) -> RoutingState:
        """What the mixtures of experts share."""
        return self.model.routing

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`LlavaCompeteModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def image_lengths(self, pixel_values: Tensor | None, image_sizes: Any = None) -> tuple[list[int], list[int]]:
        """Tiles and features of each image."""
        return self.model.image_lengths(pixel_values, image_sizes)

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
        kwargs.setdefault("key_mapping", old_names_mapping(path))
        with damage_named(path):
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        refuse_wrong_keys(path, info)
        if model.vision_tower is not None:
            refuse_offloaded_tower(getattr(model, "hf_device_map", {}))
        if quantization is not None and (blocks := moe_blocks(model)):
            parts = ", ".join(dict.fromkeys(block.part for block in blocks.values()))
            logger.warning("quantization: the packed experts of %s stay unquantised", parts)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the files hold this model's own names, also where it was read from older ones."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCompeteOutput:
        """One forward; further arguments are `LlavaCompeteModel.forward`'s.

        labels: int64 [B, N], -100 where nothing is predicted.
        label_positions: int64 [M], where in [B, N] flattened the next token has a label, as `Collator` finds them. The
            head then computes these logits alone, [1, M, V]: most of a conversation's tokens have no label.
        num_items_in_batch: supervised tokens of the whole optimizer step, over which lm_loss is a mean. Without
            `num_sequences_in_batch`, as from Hugging Face's Trainer, a sample counts by them in the routing losses.
        logits_to_keep: compute logits of so many last tokens of each row (0: all), or of these positions.
        """
        if num_items_in_batch is not None and labels is not None and kwargs.get("num_sequences_in_batch") is None:
            kwargs["num_sequences_in_batch"] = self._sequences(
                labels, num_items_in_batch, input_ids, self.image_lengths(pixel_values, image_sizes)[1], kwargs
            )
        kwargs["attaches_losses"] = labels is None  # else they are added below
        outputs = self.model(
            input_ids, attention_mask, pixel_values, image_sizes=image_sizes, return_dict=True, **kwargs
        )
        hidden = outputs.last_hidden_state
        if label_positions is None:
            hidden = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        else:
            hidden = hidden.flatten(0, 1).index_select(0, label_positions.to(hidden.device))[None]
        logits = self.language_head(hidden, self.lm_head)
        loss = lm_loss = None
        if labels is not None:
            loss = lm_loss = language_loss(logits, labels, num_items_in_batch, label_positions)
            for aux_loss in outputs.aux_losses.values():
                loss = loss + aux_loss.to(loss.device)
        return LlavaCompeteOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=None if lm_loss is None else lm_loss.detach(),
            aux_losses=outputs.aux_losses,
            loss_terms=outputs.loss_terms,
        )

    def _sequences(
        self,
        labels: Tensor,
        num_items: Tensor | int,
        input_ids: Tensor | None,
        lengths: list[int],
        options: dict[str, Any],
    ) -> dict[Part, Tensor] | None:
        """What each sequence counts, where the caller counts supervised tokens alone; None if nothing asks for it."""
        if not self.training or (self.config.moe is None and not self.model.own_balance_coef):
            return None
        first = None
        if lengths and input_ids is not None:
            starts = sent(np.cumsum([0, *lengths[:-1]]), input_ids.device)
            first = placeholder_rows(input_ids == self.config.image_token_id, sum(lengths))[starts]
        return sequences_by_labels(
            labels, num_items, options.get("sequence_ids"), options.get("num_local_sequences"), first
        )
