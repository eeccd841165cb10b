"""A competition that the loss judges: in backward the router hears what experts that it did not choose would have said.

The forward is the router's step. With y its output, g = dL/dy, p = softmax(r) over all experts and C the choice, the
router's logits r get, besides their usual gradient, that of

    sum over asked j not in C of p_j · <g, Y_j - y>,    with g, Y_j and y constant:

the first-order change of the loss had expert j spoken. Asked are the experts with p_j >= margin x (smallest p of C), at
most the `contenders` next by p. Nothing flows into them, and no Y_j is ever written: with Y_j = V_j h_j + b_j, <g, Y_j>
= <g V_j, h_j> + <g, b_j>. y itself is kept: <g, y> is also the sum over C of w_i · dL/dw_i, but kernels give those in
the dtype of computation, where it is rounded again. In the place of those that are not asked, or of all, running means
of what experts say where they are chosen may answer (`answers.py`). Suffixes: T tokens, C tokens of a chunk, E experts,
K chosen, m asked at most, P = C m rows sorted by expert, D in, M = I or 2 I hidden rows, I hidden, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.all_experts import all_experts_up, down_input_gradient
from llava_compete.moe.grouped import aligned, fits_grouped_mm
from llava_compete.moe.looped import grouped_linear
from llava_compete.moe.pairs import Pairs, is_gpu, rows_by_token
from llava_compete.moe.parallel import ExpertRanks
from llava_compete.moe.precision import without_autocast
from llava_compete.moe.recomputed import chunks
from llava_compete.moe.routers import top_experts


class Judgement(NamedTuple):
    """subtracts_output: the baseline is y and not 0; contenders: None for all that were not chosen; asks: whether any
    expert is asked, or means alone answer; uses_means: whether these answer for experts that are not asked. Of a call:
    activate: pre-activations [..., M] to hidden states [..., I], without dropout; chunk_tokens: tokens at a time;
    mean_EO, seen_E: the means, and which experts have one; ranks: over which the experts are spread."""

    subtracts_output: bool
    margin: float
    contenders: int | None
    asks: bool = True
    uses_means: bool = False
    activate: Callable[[Tensor], Tensor] = torch.nn.Identity()
    chunk_tokens: int = 1
    mean_EO: Tensor | None = None
    seen_E: Tensor | None = None
    ranks: ExpertRanks | None = None


class _Asked(NamedTuple):
    """What the questions of some tokens are about, of whom each has at most `most`; the experts' weights are in
    `_Experts`."""

    x_CD: Tensor
    grad_CO: Tensor
    contested_CE: Tensor
    most: int


class _Experts(NamedTuple):
    up_EMD: Tensor
    up_bias_EM: Tensor | None
    down_EOI: Tensor
    down_bias_EO: Tensor | None


class JudgedOutput(torch.autograd.Function):
    """The output as it is; backwards a gradient for the logits, from the gradient of the output that passes by.

    The packed parameters are saved themselves and take no gradient here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output_TO: Tensor,
        logits_TE: Tensor,
        x_TD: Tensor,
        selected_TK: Tensor,
        up_EMD: Tensor,
        up_bias_EM: Tensor | None,
        down_EOI: Tensor,
        down_bias_EO: Tensor | None,
        how: Judgement,
    ) -> Tensor:
        ctx.how = how
        baseline_TO = output_TO if how.subtracts_output else None
        experts = (up_EMD, up_bias_EM, down_EOI, down_bias_EO)
        ctx.save_for_backward(baseline_TO, logits_TE, x_TD, selected_TK, *experts)
        return output_TO.view_as(output_TO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        baseline_TO, logits_TE, x_TD, selected_TK, *experts = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad_TO, *(None,) * 8
        with without_autocast(grad_TO.device.type):  # a backward may run under the caller's
            of_logits_TE = judge(
                grad_TO.contiguous(), baseline_TO, logits_TE, x_TD, selected_TK, _Experts(*experts), ctx.how
            )
        return grad_TO, of_logits_TE, *(None,) * 7


def judge(
    grad_TO: Tensor,
    baseline_TO: Tensor | None,
    logits_TE: Tensor,
    x_TD: Tensor,
    selected_TK: Tensor,
    experts: _Experts,
    how: Judgement,
) -> Tensor:
    """The term's gradient at the logits [T, E], in their dtype."""
    probs_TE = logits_TE.softmax(-1)
    contested_TE = contested(probs_TE, selected_TK, how)
    value_TE = torch.zeros_like(probs_TE)
    answered_TE = contested_TE
    if how.mean_EO is not None and how.seen_E is not None:
        answered_TE = contested_TE | how.seen_E.expand_as(probs_TE).scatter(1, selected_TK, False)
    if how.asks:
        most = logits_TE.shape[1] - selected_TK.shape[1] if how.contenders is None else how.contenders

        def values(x_TD: Tensor, grad_TO: Tensor, contested_TE: Tensor) -> Tensor:
            return _values(_Asked(x_TD, grad_TO, contested_TE, most), experts, how)

        asked = x_TD, grad_TO, contested_TE
        value_TE = values(*asked) if how.ranks is None else how.ranks.ask(*asked, values)
    for tokens in chunks(len(x_TD), how.chunk_tokens):
        grad_CO = grad_TO[tokens].float()  # sums of products in float32, of a chunk at a time
        value_CE = value_TE[tokens]
        if how.mean_EO is not None:
            # `where`, not a product, here and below: rows that were not computed hold anything.
            value_CE.copy_(torch.where(contested_TE[tokens], value_CE, grad_CO @ how.mean_EO.t()))
        if baseline_TO is not None:
            value_CE -= (grad_CO * baseline_TO[tokens].float()).sum(-1, keepdim=True)
    value_TE = torch.where(answered_TE, value_TE, 0.0)
    return torch._softmax_backward_data(value_TE, probs_TE, -1, probs_TE.dtype)


def _values(asked: _Asked, experts: _Experts, how: Judgement) -> Tensor:
    """<g, Y_j> of contested experts of `experts`, [T, E] in float32; anything elsewhere."""
    value_TE = torch.zeros(asked.contested_CE.shape, dtype=torch.float32, device=asked.x_CD.device)
    products = _some_products if _asks_few(experts, how) else _all_products
    for tokens in chunks(len(value_TE), how.chunk_tokens):
        of_chunk = asked.x_CD[tokens], asked.grad_CO[tokens], asked.contested_CE[tokens]
        value_CE = value_TE[tokens].copy_(products(_Asked(*of_chunk, asked.most), experts, how))
        if experts.down_bias_EO is not None:
            value_CE.addmm_(of_chunk[1].float(), experts.down_bias_EO.float().t())
    return value_TE


def contested(probs_TE: Tensor, selected_TK: Tensor, how: Judgement) -> Tensor:
    """Which experts are asked [T, E]: by token, so that no cut of the batch changes it."""
    if not how.asks:
        return torch.zeros_like(probs_TE, dtype=torch.bool)
    least_T1 = probs_TE.gather(1, selected_TK).amin(-1, keepdim=True)
    contested_TE = (probs_TE >= how.margin * least_T1).scatter_(1, selected_TK, False)
    if how.contenders is not None:
        next_Tm = _next_experts(probs_TE, selected_TK, how.contenders)
        contested_TE &= torch.zeros_like(contested_TE).scatter_(1, next_Tm, True)
    return contested_TE


def _next_experts(probs_TE: Tensor, selected_TK: Tensor, count: int) -> Tensor:
    """The `count` likeliest of a token that were not chosen, [T, count], best first; ties go to the lowest index."""
    return top_experts(probs_TE.scatter(1, selected_TK, -1.0), count)


def _asks_few(experts: _Experts, how: Judgement) -> bool:
    """Whether to compute the rows of contested pairs alone: where a kernel leaves the others out, without waiting."""
    if how.margin == 0 and how.contenders is None:
        return False
    return not is_gpu(experts.down_EOI) or _grouped(experts)


def _grouped(experts: _Experts) -> bool:
    """Whether torch's grouped product fits: without reading the host it has a kernel for bfloat16 only."""
    output_size, intermediate_size = experts.down_EOI.shape[1:]
    widths = (*experts.up_EMD.shape[1:], intermediate_size, output_size)
    return experts.down_EOI.dtype == torch.bfloat16 and fits_grouped_mm(torch.bfloat16, *widths)


def _all_products(asked: _Asked, experts: _Experts, how: Judgement) -> Tensor:
    """<g V_j, h_j> of every expert, [C, E]."""
    h_CEI = how.activate(all_experts_up(asked.x_CD, experts.up_EMD, experts.up_bias_EM))
    num_experts = experts.down_EOI.shape[0]
    grad_h_CEI = down_input_gradient(asked.grad_CO.expand(num_experts, -1, -1), experts.down_EOI)
    return (h_CEI * grad_h_CEI).sum(-1, dtype=torch.float32)


def _some_products(asked: _Asked, experts: _Experts, how: Judgement) -> Tensor:
    """<g V_j, h_j> of contested experts, [C, E], anything elsewhere.

    A fixed number of rows, so that nothing waits for the host: those that are not contested go last, beyond the end of
    the last expert's group, and no product reaches them.
    """
    num_experts = experts.down_EOI.shape[0]
    asked_Cm = top_experts(asked.contested_CE.to(torch.uint8), min(asked.most, num_experts))
    # One more expert than there are stands for none; its rows are sorted after all others.
    key_Cm = asked_Cm.masked_fill(~asked.contested_CE.gather(1, asked_Cm), num_experts)
    pairs = Pairs.sort(key_Cm, num_experts + 1)
    ends_E = pairs.ends_E[:num_experts]
    up_EDM, down_EOI = aligned(experts.up_EMD).transpose(1, 2), aligned(experts.down_EOI)
    up_PM = _linear(asked.x_CD.index_select(0, pairs.token_P), up_EDM, ends_E)
    if experts.up_bias_EM is not None:
        expert_P = pairs.expert_P.int().clamp_(max=num_experts - 1)
        up_PM += experts.up_bias_EM.index_select(0, expert_P)
    grad_h_PI = _linear(asked.grad_CO.index_select(0, pairs.token_P), down_EOI, ends_E)
    products_P = (how.activate(up_PM) * grad_h_PI).sum(-1, keepdim=True, dtype=torch.float32)
    products_Cm = rows_by_token(products_P, pairs).squeeze(-1)
    return products_Cm.new_zeros(asked.contested_CE.shape).scatter_(1, asked_Cm, products_Cm)


def _linear(x_PH: Tensor, weight_EHM: Tensor, ends_E: Tensor) -> Tensor:
    """Rows `ends[e-1]:ends[e]` times expert e's matrix; rows beyond the last end hold anything."""
    if is_gpu(x_PH):
        return F.grouped_mm(x_PH, weight_EHM, offs=ends_E)
    return grouped_linear(x_PH, weight_EHM.transpose(1, 2), None, ends_E)
