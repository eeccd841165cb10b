"""`SparseMoeBlock` = router + packed experts: takes the place of a dense feed-forward block anywhere in the model.

It never guesses its mode: the shared `RoutingState` says which tokens count and whether this layer competes in this
step. Its forward has no counter, RNG or print, and no host synchronisation (but for the eager experts' products, which
read their row counts); its losses leave through the state's records. Suffixes: T tokens, D in, O out, E experts,
K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_compete.moe import losses
from llava_compete.moe.competition import CompetitionResult
from llava_compete.moe.config import MoeLayerConfig
from llava_compete.moe.experts import PackedExperts
from llava_compete.moe.routers import ROUTER_CLASSES, Routing
from llava_compete.moe.state import RoutingMetrics, RoutingRecord, RoutingState, TokenGroups
from llava_compete.parts import PARTS


class SparseMoeBlock(nn.Module):
    """forward: [..., D] -> [..., O].

    `name` is "<part>.<layer>", such as "language.3"; `state` is shared by all blocks of a model. `hidden_dropout` and
    `output_dropout` are the dense block's, after its activation and after its down projection. Parameters are left
    uninitialised on the meta device; elsewhere `reset_parameters` has run.
    """

    def __init__(
        self,
        config: MoeLayerConfig,
        *,
        name: str,
        state: RoutingState,
        hidden_size: int,
        intermediate_size: int,
        output_size: int | None = None,
        activation: str,
        gated: bool,
        bias: bool,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.name, self.state = config, name, state
        self.part = name.split(".")[0]
        state.join(name)
        self.router = ROUTER_CLASSES[config.router](config, hidden_size)
        self.experts = PackedExperts(
            config,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            output_size=hidden_size if output_size is None else output_size,
            activation=activation,
            gated=gated,
            bias=bias,
            hidden_dropout=hidden_dropout,
        )
        # After the weighted sum, as a dense block drops its output: it commutes with the sum over experts.
        self.output_dropout = nn.Dropout(output_dropout) if output_dropout else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Router N(0, 0.02), experts as nn.Linear; nothing on the meta device."""
        if self.experts.down_proj.is_meta:
            return
        self.router.reset_parameters(generator)
        self.experts.reset_parameters(generator)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: Routing = self.router(x_TD)
        result: CompetitionResult | None = None
        if self.config.router == "competition" and self.state.competes(self.name):
            result = self.experts(x_TD)
            output_TO = result.output_TO
        else:
            output_TO = self.experts(x_TD, routing.selected_experts_TK, routing.routing_weights_TK)
        groups = self._groups(x_TD.shape[0])
        if groups is not None:
            # Also done in a recomputation, which must save the same tensors; only a recording keeps the result.
            record = self._record(routing, result, groups)
            if self.state.is_recording:
                self.state.records[self.name] = record
        return self.output_dropout(output_TO).view(*hidden_states.shape[:-1], output_TO.shape[-1])

    def _groups(self, num_tokens: int) -> TokenGroups | None:
        """How this forward's tokens group, or None where nothing reads statistics."""
        state = self.state
        groups = state.groups.get(self.part)
        fits = groups is not None and groups.sequence_weights_ST.shape[1] == num_tokens
        if not state.is_recording:
            return groups if fits and torch.is_grad_enabled() else None
        if not fits:
            found = "none" if groups is None else str(groups.sequence_weights_ST.shape[1])
            raise RuntimeError(f"{self.name}: {num_tokens} tokens, but state.begin({self.part!r}) described {found}")
        if state.recording_gradients and not torch.is_grad_enabled() and self.training and _trains(self):
            raise RuntimeError(
                f"{self.name}: ran without gradients inside a training forward. Reentrant gradient checkpointing does "
                "this, and would silently give routing losses no gradient: set use_reentrant=False"
            )
        return groups

    def _record(self, routing: Routing, result: CompetitionResult | None, groups: TokenGroups) -> RoutingRecord:
        with torch.autocast(routing.logits_TR.device.type, enabled=False):
            terms = self._router_terms(routing, groups) if result is None else self._terms(routing, result, groups)
            coefs = self.config.loss_coefs(competing=result is not None)
            aux_loss = torch.stack([coef * terms[name] for name, coef in coefs.items()]).sum()
            return RoutingRecord(terms, aux_loss, self._metrics(routing, result, groups))

    def _router_terms(self, routing: Routing, groups: TokenGroups) -> dict[str, Tensor]:
        return {
            "balance_loss": losses.balance_loss(routing.probs_TR, self._counted(routing.choices_TC), groups),
            "router_z_loss": losses.router_z_loss(routing.logits_TR, groups),
        }

    def _terms(self, routing: Routing, result: CompetitionResult, groups: TokenGroups) -> dict[str, Tensor]:
        """Terms of a competition step: p is the router's, q the competition's."""
        p_TE, q_TE, winners_TK = routing.probs_TR, result.affinity_TE.softmax(-1), result.winners_TK
        return {
            "distillation_loss": losses.distillation_loss(p_TE, q_TE, groups),
            "winner_distillation_loss": losses.winner_distillation_loss(p_TE, q_TE, winners_TK, groups),
            "diversity_loss": losses.diversity_loss(result.diversity_T, groups),
            "balance_loss": losses.balance_loss(q_TE, self._counted(winners_TK), groups),
        }

    def _counted(self, choices_TC: Tensor) -> Tensor:
        return choices_TC[:, :1] if self.config.balance_over == "first_choice" else choices_TC

    @torch.no_grad()
    def _metrics(self, routing: Routing, result: CompetitionResult | None, groups: TokenGroups) -> RoutingMetrics:
        counted_T = groups.counted_T
        probs_TR, choices_TC = routing.probs_TR, routing.choices_TC
        used_TK = routing.selected_experts_TK if result is None else result.winners_TK
        weights_TK = routing.routing_weights_TK if result is None else result.weights_TK
        load_E = counted_T.new_zeros(self.config.num_experts)
        load_E.index_add_(0, used_TK.reshape(-1), counted_T.repeat_interleave(used_TK.shape[1]))
        tokens, zero = counted_T.sum(), counted_T.new_zeros(())
        left_out_T = probs_TR.scatter(1, choices_TC, 0.0).amax(-1)
        margin_T = probs_TR.gather(1, choices_TC[:, -1:])[:, 0] - left_out_T
        recall_T = None
        if result is not None:
            recall_T = (used_TK[:, :, None] == choices_TC[:, None, :]).any(-1).float().mean(-1)
        return RoutingMetrics(
            tokens=tokens,
            load_E=load_E,
            entropy_sum=(counted_T * torch.special.entr(probs_TR).sum(-1)).sum(),
            margin_sum=(counted_T * margin_T).sum(),
            dropped=(counted_T * (weights_TK == 0).sum(-1)).sum(),
            recall_sum=zero if recall_T is None else (counted_T * recall_T).sum(),
            competition_tokens=zero if recall_T is None else tokens,
        )


def moe_blocks(model: nn.Module) -> dict[str, SparseMoeBlock]:
    """The model's MoE blocks by name, in forward order: vision, projector, language."""
    blocks = [module for module in model.modules() if isinstance(module, SparseMoeBlock)]
    return {block.name: block for block in sorted(blocks, key=lambda block: PARTS.index(block.part))}


def competition_layers(model: nn.Module) -> list[str]:
    """Names of the layers that a competition schedule covers."""
    return [name for name, block in moe_blocks(model).items() if block.config.router == "competition"]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
