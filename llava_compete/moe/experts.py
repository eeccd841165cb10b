"""E feed-forward experts as packed parameters [E, out, in], used whole on every rank in every forward.

Two ways through, both by `__call__` so that ZeRO-3's hooks gather the parameters: the chosen experts
(`implementations.py`) and the competition of all (`competition.py`). Dense MLPs of both kinds: gated (gate and up
fused, gate first) and plain, biases optional.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from llava_compete.errors import UserError
from llava_compete.moe.all_experts import AllExpertsDown, AllExpertsUp, all_experts_down, all_experts_up
from llava_compete.moe.answers import AnswerMeans, answer_sums
from llava_compete.moe.competition import Contest, Picked, PickWinners, Responses, mix_winners, respond
from llava_compete.moe.coupling import coupling_loss
from llava_compete.moe.implementations import ExpertWeights, choose
from llava_compete.moe.judged import JudgedOutput, Judgement
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.parallel import Call, ExpertRanks
from llava_compete.moe.precision import compute_dtype, without_autocast
from llava_compete.moe.recomputed import Recomputation, RecomputedContest, chunks
from llava_compete.moe.slots import Slots

# Elements of all experts' outputs, or of their hidden rows where the loss judges, at a time where a competition runs in
# chunks of its own choice: 64 MB in float32.
CHUNK_OUTPUTS = 2**24


def activation_function(name: str) -> nn.Module:
    """An activation by the name transformers knows it by."""
    if name not in ACT2FN:
        raise UserError(f"activation: found {name!r}, expected one of {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]


class ExpertsOutput(NamedTuple):
    """output_TO: the weighted sum [T, O]; contest: what a competition found, None without one; answers:
    where the call asks for them, sums of what each chosen expert said (`answer_sums`); coupling: the coupling loss."""

    output_TO: Tensor
    contest: Contest | Responses | None
    answers: Tensor | None = None
    coupling: Tensor | None = None


class PackedExperts(nn.Module):
    """`up_proj` [E, I, D] or `gate_up_proj` [E, 2I, D], `down_proj` [E, O, I], and `*_bias` if the dense MLP has them.

    `hidden_dropout` acts after the activation (and gate). `slots`: what the choices mean; default an expert each.
    """

    down_proj: nn.Parameter

    def __init__(
        self,
        config: MoeLayerConfig,
        *,
        hidden_size: int,
        intermediate_size: int,
        output_size: int,
        activation: str,
        gated: bool,
        bias: bool,
        hidden_dropout: float = 0.0,
        slots: Slots | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.slots = Slots(config.num_experts) if slots is None else slots
        self.num_winners = config.num_experts_per_tok
        self.configure(config)
        self.ranks: ExpertRanks | None = None
        self.answer_means = AnswerMeans()
        self.activation = activation
        self.has_gate, self.has_bias = gated, bias
        self.act_fn: nn.Module = activation_function(activation)
        if hidden_dropout and not gated:  # transformers' functions apply a plain expert's `act_fn` and nothing else
            self.act_fn = nn.Sequential(self.act_fn, nn.Dropout(hidden_dropout))
        self.gate_dropout = nn.Dropout(hidden_dropout) if hidden_dropout and gated else nn.Identity()

        self.make_parameters(hidden_size, intermediate_size, output_size)

    def make_parameters(self, hidden_size: int, intermediate_size: int, output_size: int) -> None:
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        rows = 2 * intermediate_size if self.has_gate else intermediate_size
        self.add_linears({self.up_name: (rows, hidden_size), "down_proj": (output_size, intermediate_size)})

    def add_linears(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Each expert's matrices [out, in], and then its biases if it has any."""
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, *shape)))
        for name, (rows, _) in shapes.items() if self.has_bias else ():
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))

    def configure(self, config: MoeLayerConfig) -> None:
        """Take what of `config` is no part of the architecture: kernels, and how competitions are held."""
        self.affinity: Any = config.affinity  # None where the loss judges, and nothing asks for it
        self.chunk_tokens = config.competition_chunk_tokens
        self.kept = config.competition_kept
        self.judgement = judgement_of(config)
        self.implementation = config.experts_implementation
        self.coupling_alpha = 1.0 if config.coupling_alpha is None else config.coupling_alpha

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Each expert as nn.Linear would: uniform within 1/sqrt(fan in)."""
        for name, parameter in self.named_parameters(recurse=False):
            fan_in = self.get_parameter(name.removesuffix("_bias")).shape[2]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)

    def spread(self, ranks: ExpertRanks) -> None:
        """Keep this rank's experts alone, whole parameters of their own; from then on tokens travel to the others'.

        The state dict leaves the experts out, lest a part of them be taken for all.
        """
        self.ranks = ranks
        for name, parameter in list(self.named_parameters(recurse=False)):
            here = parameter.detach()[ranks.local].clone()
            setattr(self, name, nn.Parameter(here, requires_grad=parameter.requires_grad))
        self.register_state_dict_post_hook(_leave_out_experts)
        self.register_load_state_dict_post_hook(_miss_no_experts)

    @property
    def up(self) -> Tensor:
        return getattr(self, self.up_name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))

    def forward(
        self,
        x_TD: Tensor,
        choices_TC: Tensor | None = None,
        weights_TC: Tensor | None = None,
        judged_logits_TE: Tensor | None = None,
        heard_T: Tensor | None = None,
        shared_weight: float = 0.0,
        teaches: bool = False,
        proxies_RD: Tensor | None = None,
    ) -> Tensor | ExpertsOutput:
        """The weighted sum [T, O] of the chosen experts' outputs; with none given, a competition of them all.

        `judged_logits_TE`: the router's logits, where the loss judges the experts that were not selected (judged.py).
        `heard_T`: 1 for each token of which the answers' sums are wanted, else 0.
        `shared_weight`: where not 0, the last expert's weight in each token's output; the chosen ones have the rest.
        `teaches`: every expert also responds, for the losses alone.
        `proxies_RD`: of the first R experts, for the coupling loss.
        Done here because ZeRO-3 gathers the parameters for this module's call and for its backward.
        """
        weights = self._weights(compute_dtype(x_TD, self.down_proj))
        with without_autocast(x_TD.device.type):
            coupling = None if proxies_RD is None else self.coupling(proxies_RD, weights.up)
            x_TD = x_TD.to(weights.down.dtype)
            if choices_TC is None or weights_TC is None:
                return self._compete(weights, x_TD)._replace(coupling=coupling)
            calls: list[Call] = []
            if self.ranks is None:
                output_TO, answers = self._run(weights, x_TD, choices_TC, weights_TC, shared_weight, heard_T)
            else:
                ranks = self.ranks

                def call() -> None:  # a competition that teaches gathers its tokens while the chosen experts run
                    calls.append(ranks.call(x_TD.detach()))

                options = (shared_weight, heard_T, call if teaches else None)
                output_TO, answers = self._run_across(weights, x_TD, choices_TC, weights_TC, *options)
            if judged_logits_TE is not None and self._has_answers:
                output_TO = self._judged(weights, output_TO, judged_logits_TE, x_TD, choices_TC)
            if answers is None and coupling is None and not teaches:
                return output_TO
            contest = self._responses(weights, x_TD, calls) if teaches else None
            return ExpertsOutput(output_TO, contest, answers, coupling)

    def coupling(self, proxies_RD: Tensor, up_EMD: Tensor) -> Tensor:
        """The coupling loss of the first projection, a gate's where there is one."""
        num_read = up_EMD.shape[1] // (2 if self.has_gate else 1)
        return coupling_loss(proxies_RD, up_EMD, num_read, self.coupling_alpha)

    def _run(
        self,
        weights: ExpertWeights,
        x_TD: Tensor,
        choices_TC: Tensor,
        weights_TC: Tensor,
        shared_weight: float,
        heard_T: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum, and where it is asked for what the experts of `weights` said."""
        num_chosen = choices_TC.shape[1] + (shared_weight > 0)
        function = choose(self.implementation, weights, len(x_TD), num_chosen, x_TD.device)
        weights.heard = [] if heard_T is not None else None
        output_TO = function(weights, x_TD, choices_TC, weights_TC, shared_weight)
        if heard_T is None or not weights.heard:
            return output_TO, None
        return output_TO, answer_sums(weights.heard[0], choices_TC, heard_T, weights.down, weights.down_bias)

    def _run_across(
        self,
        weights: ExpertWeights,
        x_TD: Tensor,
        choices_TC: Tensor,
        weights_TC: Tensor,
        shared_weight: float,
        heard_T: Tensor | None,
        begin: Callable[[], None] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same over ranks: each runs its experts on the rows that come to it, one choice of weight 1 a row. The
        answers have zeros for the experts of others. `begin` is called when rows have come."""
        assert self.ranks is not None
        beside = self._borrowed(weights, shared_weight) if shared_weight else None
        if shared_weight:
            weights_TC = (1 - shared_weight) * weights_TC
        else:
            choices_TC, weights_TC = self.slots.runs(choices_TC, weights_TC)
        found: list[Tensor | None] = []

        def run(x_RD: Tensor, expert_R1: Tensor, heard_R: Tensor | None) -> Tensor:
            if begin is not None:
                begin()
            one_R1 = x_RD.new_ones(expert_R1.shape, dtype=torch.float32)
            y_RO, answers_LP = self._run(weights, x_RD, expert_R1, one_R1, 0.0, heard_R)
            found.append(answers_LP)
            return y_RO

        output_TO = self.ranks.run_chosen(x_TD, choices_TC, weights_TC, run, heard_T, beside)
        (answers_LP,) = found
        if answers_LP is None:
            return output_TO, None
        answers_EP = answers_LP.new_zeros(self.num_experts, answers_LP.shape[1])
        answers_EP[self.ranks.local] = answers_LP
        return output_TO, answers_EP

    def _borrowed(self, weights: ExpertWeights, shared_weight: float) -> Callable[[Tensor], Tensor]:
        """The shared expert's part in the outputs [t, O] of tokens [t, D], by its weights, which come from its rank."""
        assert self.ranks is not None
        names = [name for name in ("up", "up_bias", "down", "down_bias") if getattr(weights, name) is not None]
        loan = self.ranks.lend(tuple(getattr(weights, name) for name in names))
        shared: list[ExpertWeights] = []

        def run(x_tD: Tensor) -> Tensor:
            if not shared:
                lent: dict[str, Any] = {"up_bias": None, "down_bias": None}
                lent |= dict(zip(names, loan.wait(), strict=True))
                shared.append(ExpertWeights(**lent, **{**self.weights_options, "slots": Slots(1)}))
            first_t1 = torch.zeros(len(x_tD), 1, dtype=torch.int64, device=x_tD.device)
            weight_t1 = torch.full_like(first_t1, shared_weight, dtype=torch.float32)
            return self._run(shared[0], x_tD, first_t1, weight_t1, 0.0, None)[0]

        return run

    @property
    def _has_answers(self) -> bool:
        """Not where means alone answer and no step has ended yet."""
        assert self.judgement is not None
        return self.judgement.asks or self.answer_means.mean_EO is not None

    def linear(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """One of `add_linears` in that dtype, and its bias. With adapters around it is no parameter any more."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _weights(self, dtype: torch.dtype) -> ExpertWeights:
        return ExpertWeights(
            *self.linear(self.up_name, dtype), *self.linear("down_proj", dtype), **self.weights_options
        )

    @property
    def weights_options(self) -> dict[str, Any]:
        """What `ExpertWeights` is told beside its tensors."""
        return {
            "activation": self.activation,
            "act_fn": self.act_fn,
            "gated": self.has_gate,
            "gate_dropout": self.gate_dropout,
            "slots": self.slots if self.ranks is None else Slots(self.ranks.num_local),
        }

    @torch.compiler.disable  # its backward runs experts by rules of its own
    def _judged(
        self, weights: ExpertWeights, output_TO: Tensor, logits_TE: Tensor, x_TD: Tensor, selected_TK: Tensor
    ) -> Tensor:
        assert self.judgement is not None
        how = self.judgement._replace(
            activate=self._activate_without_dropout, chunk_tokens=self._chunk_tokens(self.up), ranks=self.ranks
        )
        if how.uses_means and self.answer_means.mean_EO is not None:
            how = how._replace(mean_EO=self.answer_means.mean_EO, seen_E=self.answer_means.seen_E)
        experts = (weights.up, weights.up_bias, weights.down, weights.down_bias)
        return JudgedOutput.apply(output_TO, logits_TE, x_TD, selected_TK, *experts, how)

    def _activate_without_dropout(self, up: Tensor) -> Tensor:
        act_fn = self.act_fn[0] if isinstance(self.act_fn, nn.Sequential) else self.act_fn
        if not self.has_gate:
            return act_fn(up)
        gate, up = up.chunk(2, dim=-1)
        return act_fn(gate) * up

    @torch.no_grad()
    def _responses(self, weights: ExpertWeights, x_TD: Tensor, calls: list[Call]) -> Responses:
        """What a competition finds that only teaches; over ranks it has been called."""
        if self.ranks is None:
            return self._respond(weights, x_TD)
        (call,) = calls
        return self.ranks.respond(call, self.num_winners, lambda x_GD: self._respond(weights, x_GD).affinity_TE)

    def _respond(self, weights: ExpertWeights, x_TD: Tensor) -> Responses:
        """By the experts of `weights`, in chunks and without dropout, so that nothing is kept."""
        found = []
        for tokens in chunks(len(x_TD), self._chunk_tokens(self.down_proj)):
            hidden_CEI = self._activate_without_dropout(all_experts_up(x_TD[tokens], weights.up, weights.up_bias))
            y_ECO = all_experts_down(hidden_CEI, weights.down, weights.down_bias)
            found.append(respond(y_ECO, self.affinity, self.num_winners))
        return Responses(*(torch.cat(column) for column in zip(*found, strict=True)))

    def _chunk_tokens(self, parameter: Tensor) -> int:
        """Tokens at a time, by default few enough for all experts' rows of `parameter` [E, rows, ...]."""
        return self.chunk_tokens or max(1, CHUNK_OUTPUTS // parameter[:, :, 0].numel())

    def _compete(self, weights: ExpertWeights, x_TD: Tensor) -> ExpertsOutput:
        def contest(x_TD: Tensor, num_winners: int) -> Picked:
            return self._contest(weights, x_TD, num_winners)

        if self.ranks is None:
            picked = contest(x_TD, self.num_winners)
        else:
            picked = self.ranks.compete(x_TD, self.num_winners, contest)
        return ExpertsOutput(*mix_winners(picked, self.affinity))

    def _contest(self, weights: ExpertWeights, x_TD: Tensor, num_winners: int) -> Picked:
        """Among the experts of `weights`."""
        if self.kept != "everything":
            return self._recomputed(weights, x_TD, num_winners)
        h_TEI = weights.activate(AllExpertsUp.apply(x_TD, weights.up, weights.up_bias))
        y_ETO = AllExpertsDown.apply(h_TEI, weights.down, weights.down_bias)
        return Picked(*PickWinners.apply(y_ETO, self.affinity, num_winners))

    @torch.compiler.disable  # its backward differentiates the activation again
    def _recomputed(self, weights: ExpertWeights, x_TD: Tensor, num_winners: int) -> Picked:
        how = Recomputation(
            activate=weights.activate,
            draws=any(isinstance(module, nn.Dropout) and module.training for module in self.modules()),
            affinity=self.affinity,
            num_winners=num_winners,
            chunk_tokens=self._chunk_tokens(self.down_proj),
            keeps_pre_activations=self.kept == "pre_activations",
        )
        arguments = (weights.up, weights.up_bias, weights.down, weights.down_bias, how)
        return Picked(*RecomputedContest.apply(x_TD, *arguments))


def _leave_out_experts(module: nn.Module, state_dict: Any, prefix: str, _: Any) -> None:
    for name, _parameter in module.named_parameters(recurse=False):
        state_dict.pop(f"{prefix}{name}", None)


def _miss_no_experts(module: nn.Module, keys: Any) -> None:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.rpartition(".")[2] not in own]


def judgement_of(config: MoeLayerConfig) -> Judgement | None:
    """What the configuration says of the loss's judgement; the call adds the rest."""
    if config.competition_judge != "loss":
        return None
    contenders = config.competition_contenders
    return Judgement(
        subtracts_output=config.competition_baseline == "output",
        margin=config.competition_margin or 0.0,
        contenders=contenders if isinstance(contenders, int) else None,
        asks=config.competition_answers != "mean",
        uses_means=config.competition_answers != "full",
    )
