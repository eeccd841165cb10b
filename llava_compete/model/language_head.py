"""From last hidden states to logits, by the language model's own causal-LM class.

Families scale or soft-cap their logits (Gemma, Cohere, Granite) inside the causal LM's forward. Running that forward on
hidden states that are there already keeps the arithmetic theirs: no table of scales to fall behind. The layers
below it and the head's parameters belong to our model, under transformers' own Llava names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from llava_compete.errors import UserError


class _Output(MoeModelOutputWithPast):
    """With all that some family's causal LM hands on."""

    cross_attentions = None  # of GPT-2 and its like


class _Done(nn.Module):
    """Stands where the causal LM has its layers, which have run: hands on what it is given as hidden states."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _Done:
        """OPT's layers lie in a module of this name below its layers."""
        return self


class LanguageHead:
    """The head's arithmetic. A plain object: its one parameter is the model's `lm_head`, which is registered there.

    Args:
        causal: a causal LM; its layers are taken out (`self.language_model`), its head stays in.
    """

    def __init__(self, causal: PreTrainedModel) -> None:
        # Not by `base_model_prefix`, which is not the name of the layers in every family (Llama 4).
        below = [name for name, module in causal.named_children() if isinstance(module, PreTrainedModel)]
        head = causal.get_output_embeddings()
        if len(below) != 1 or head is None:
            raise UserError(f"{type(causal).__name__}: no layers with a separate output head, expected a causal LM")
        self.language_model: Any = causal.get_submodule(below[0])
        self._below = f"{below[0]}."
        self.tied = self._tied_names(causal)
        self._name = next(name for name, module in causal.named_children() if module is head)
        setattr(causal, below[0], _Done())
        self.causal = causal

    @property
    def module(self) -> nn.Module:
        """The output projection."""
        return self.causal.get_submodule(self._name)

    def __call__(self, hidden_states: Tensor, module: nn.Module) -> Tensor:
        """[B, N, H] -> logits [B, N, V] with the output projection `module`.

        It is the model's own, which may have been put in the place of the first one (resized, adapted, quantised).
        """
        if self.module is not module:
            setattr(self.causal, self._name, module)
        return self.causal(inputs_embeds=hidden_states, use_cache=False, return_dict=True).logits

    def own_name(self, name: str) -> str:
        """The name that a tensor of the causal LM has in our model."""
        if name.startswith(self._below):
            return f"model.language_model.{name.removeprefix(self._below)}"
        return f"lm_head.{name.rpartition('.')[2]}"

    def _tied_names(self, causal: PreTrainedModel) -> dict[str, str] | None:
        """transformers' map from tied parameters to their sources, by the names they have in our model."""
        keys = causal._tied_weights_keys
        return None if keys is None else {self.own_name(tied): self.own_name(source) for tied, source in keys.items()}
