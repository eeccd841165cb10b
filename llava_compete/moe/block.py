"""`SparseMoeBlock` = router + packed experts: takes the place of a dense feed-forward block anywhere in the model.

It never guesses its mode: the shared `RoutingState` says which tokens count and whether this layer competes in this
step. Its forward has no counter, RNG or print, and no host synchronisation (but for eager experts, which read how many
rows each has); what its losses are made of leaves through the state's records. Suffixes: T tokens, D in, O out, E
experts, K chosen.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_compete.moe.coupling import proxies
from llava_compete.moe.experts import ExpertsOutput, PackedExperts, judgement_of
from llava_compete.moe.factorised import FactorisedExperts, first_rank
from llava_compete.moe.gradients import SOURCES
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.records import RoutingRecord
from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.routers import Routing
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.parts import PARTS


class _Learners(NamedTuple):
    """One router's decision, for the output, the judgement, the balance and z losses, and the distillation."""

    spoken: Routing
    judged_TR: Tensor
    balanced: Routing
    taught_TR: Tensor


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
        self.config, self.name, self.state, self.hidden_size = config, name, state, hidden_size
        self.part = name.split(".")[0]
        state.join(name)
        output_size = hidden_size if output_size is None else output_size
        make_router = ROUTER_CLASSES[config.router]
        rank = 0
        if make_router.factorises:
            rank = first_rank(config.autonomy_rank, hidden_size, intermediate_size, self.part)
        self.router = make_router(config.num_experts, config.num_experts_per_tok, hidden_size, output_size, rank)
        make_experts: Any = partial(FactorisedExperts, rank=rank) if rank else PackedExperts
        self.experts: PackedExperts = make_experts(
            config,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            output_size=output_size,
            activation=activation,
            gated=gated,
            bias=bias,
            hidden_dropout=hidden_dropout,
            slots=self.router.slots,
        )
        self.configure(config)
        # After the weighted sum, as a dense block drops its output: it commutes with the sum over experts.
        self.output_dropout = nn.Dropout(output_dropout) if output_dropout else nn.Identity()
        self.reset_parameters()

    def configure(self, config: MoeLayerConfig) -> None:
        """Take what of `config` is no part of the architecture: coefficients, losses, kernels."""
        self.config, self.router.couples = config, config.couples
        self.experts.configure(config)

    @property
    def num_slots(self) -> int:
        """What its router chooses among: experts, and more with some routers (slots.py)."""
        return self.router.slots.total

    def reset_parameters(self) -> None:
        """Router N(0, 0.02), experts as nn.Linear; nothing on the meta device.

        Each from a generator of its own, made of torch's seed and the layer's name: with another router, or with other
        layers as mixtures, the experts and all that is drawn after them start as they would.
        """
        if self.experts.down_proj.is_meta:
            return
        for module in (self.router, self.experts):
            kind = PackedExperts if module is self.experts else type(module)
            key = zlib.crc32(f"{torch.initial_seed()}/{self.name}/{kind.__name__}".encode())
            module.reset_parameters(torch.Generator(self.experts.down_proj.device).manual_seed(key))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        groups = self._groups(x_TD.shape[0]) if self.state.is_recording else None
        # Called on a competition step too, on every rank: ZeRO-3 gathers a router's weights by its call.
        routing: Routing = self.router(x_TD, *self._residual())
        if self.router.has_residual:
            self.state.logits[self.name] = routing.logits_TR
        learners = self._learners(routing, groups)
        spoken = learners.spoken
        options: dict[str, Any] = {**routing.begun}
        if not isinstance(self.experts, PackedExperts):
            chosen: tuple[Tensor, ...] = self.router.slots.runs_something(
                spoken.selected_experts_TK, spoken.routing_weights_TK
            )
        else:
            chosen = (spoken.choices_TC, spoken.weights_TC)
            options |= {"shared_weight": routing.shared_weight} if routing.shared_weight else {}
        judgement = judgement_of(self.config) if self._asks(routing) else None  # experts may have adapters around
        if self.config.competition_judge == "loss":
            chosen += () if judgement is None else (learners.judged_TR,)
            if groups is not None and self._listens():
                options["heard_T"] = groups.counted_T
        elif self.config.router == "competition" and self.state.competes(self.name):
            # In evaluation, where nobody learns, a competition is always of outputs.
            if self.config.competition_output == "router" and self.training:
                options["teaches"] = True
            else:
                chosen = ()
        if routing.rows_RD is not None:
            options["proxies_RD"] = proxies(routing.rows_RD, self.state.noise.get(self.name))
        # A tensor from our experts too, where there is nothing else: servers put experts of their own here.
        result: Tensor | ExpertsOutput = self.experts(x_TD, *chosen, **options)
        output_TO, contest, answers, coupling = (result, None, None, None) if isinstance(result, Tensor) else result
        if self.router.free_experts is not None:
            output_TO = output_TO + self.router.free_experts(x_TD, spoken.choices_TC, spoken.weights_TC).to(output_TO)
        if answers is not None:
            self.state.answers[self.name] = answers
        if groups is not None:
            self.state.records[self.name] = RoutingRecord(
                learners.balanced,
                contest,
                groups,
                self.config,
                learners.taught_TR,
                self.router.slots,
                judgement,
                coupling,
            )
        return self.output_dropout(output_TO).view(*hidden_states.shape[:-1], output_TO.shape[-1])

    def _residual(self) -> tuple[Tensor | None, ...]:
        """What the call of a router gets that reads the logits of the layer before."""
        return (self.state.logits_before(self.name),) if self.router.has_residual else ()

    def _asks(self, routing: Routing) -> bool:
        """Whether this step's loss judges the experts that were not chosen; at a rate of 1 without any schedule."""
        if self.config.competition_judge != "loss":
            return False
        learns = self.training and torch.is_grad_enabled() and routing.logits_TR.requires_grad
        return learns and (self.config.competition_rate == 1 or self.state.competes(self.name))

    def _listens(self) -> bool:
        """Whether what the experts say enters their running means: not in a recomputation, which would count twice."""
        learns = self.state.is_recording and self.training and torch.is_grad_enabled()
        return learns and self.config.competition_answers in ("mean", "both")

    def _learners(self, routing: Routing, groups: TokenGroups | None) -> _Learners:
        """The router's logits for each use of them: in a step that is measured a view for each source of gradients.

        Also in a recomputation, which must save the same tensors; only the first forward's views are passed backwards.
        """
        logits_TR, measured = routing.logits_TR, self.state.gradients
        if measured is None:
            return _Learners(routing, logits_TR, routing, logits_TR)
        counted_T = None if groups is None else groups.counted_T
        views = {source: measured.view(logits_TR, source, self.name, counted_T) for source in SOURCES}
        balanced = self.router.route(views["balance"])._replace(logits_TR=views["z"])
        return _Learners(self.router.route(views["task"]), views["judge"], balanced, views["distillation"])

    def _groups(self, num_tokens: int) -> TokenGroups:
        """How this forward's tokens group."""
        state = self.state
        groups = state.groups.get(self.part)
        if groups is None or groups.sequence_weights_ST.shape[1] != num_tokens:
            found = "none" if groups is None else str(groups.sequence_weights_ST.shape[1])
            raise RuntimeError(f"{self.name}: {num_tokens} tokens, but state.begin({self.part!r}) described {found}")
        if state.recording_gradients and not torch.is_grad_enabled() and self.training and _trains(self):
            raise RuntimeError(
                f"{self.name}: ran without gradients inside a training forward. Reentrant gradient checkpointing does "
                "this, and would silently give routing losses no gradient: set use_reentrant=False"
            )
        return groups


def moe_blocks(model: nn.Module) -> dict[str, SparseMoeBlock]:
    """The model's MoE blocks by name, in forward order: vision, projector, language."""
    blocks = [module for module in model.modules() if isinstance(module, SparseMoeBlock)]
    return {block.name: block for block in sorted(blocks, key=lambda block: PARTS.index(block.part))}


def competition_layers(model: nn.Module) -> list[str]:
    """Names of the layers that hold contests in the steps of a schedule; a frozen one would learn nothing from it."""
    blocks = moe_blocks(model).items()
    return [name for name, block in blocks if block.config.holds_contests and _trains(block)]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
