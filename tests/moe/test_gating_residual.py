"""MoE++'s gating residuals: a router adds a map of the logits of the layer before, also where layers are recomputed."""

from __future__ import annotations

from typing import Any

import torch
from block_kit import SIZES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.state import RoutingState, TokenGroups

X = torch.randn(2, 2, 5, 12, generator=torch.Generator().manual_seed(2))


class Layers(nn.Module):
    """Layers 1 and 10 of the language model and 2 of the tower, which is another part's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config, self.state = MoeLayerConfig(router="moe_plus_plus", num_experts_per_tok=3), RoutingState()
        names = ("language.10", "vision.2", "language.1")
        self.blocks = nn.ModuleList(SparseMoeBlock(config, name=name, state=self.state, **SIZES) for name in names)
        self.blocks = nn.ModuleList(reversed(self.blocks))
        with torch.no_grad():
            for block in self.blocks:
                for parameter in block.router.parameters():
                    parameter.mul_(20)

    def forward(self, x: Tensor, contexts: Any = None) -> Tensor:
        for part in ("language", "vision"):
            self.state.begin(part, TokenGroups.from_mask(torch.ones(x.shape[:2])))
        with self.state.recording():
            for block in self.blocks:
                run = checkpoint(block, x, use_reentrant=False, context_fn=contexts) if contexts else block(x)
                x = x + run
        return x

    def logits(self) -> list[Tensor]:
        return [self.state.records[block.name].routing.logits_TR for block in self.blocks]


def test_logits_of_the_layer_before_of_the_same_part_are_added() -> None:
    model = Layers()
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    model(X[0])
    first, tower, last = (block.router for block in model.blocks)
    plain = [x @ router.weight.t() for x, router in zip(inputs, (first, tower, last), strict=True)]
    expected = [plain[0], plain[1], plain[2] + plain[0] @ last.residual.t()]
    for found, logits in zip(model.logits(), expected, strict=True):
        torch.testing.assert_close(found, logits)
    # Into the first layer's router too, beside what passes through its output.
    inputs.clear()
    cotangent = torch.randn(10, 8)
    (ours,) = torch.autograd.grad(model.logits()[2], first.weight, cotangent, retain_graph=True)
    detached = plain[2] + plain[0].detach() @ last.residual.t()
    (through_output,) = torch.autograd.grad(detached, first.weight, cotangent, retain_graph=True)
    direct = (cotangent @ last.residual).t() @ X[0].flatten(0, 1)
    torch.testing.assert_close(ours, through_output + direct)


def test_recomputed_layers_see_their_own_forward() -> None:
    """Two forwards, then one backward: the logits before a layer are those of its own forward."""
    grads = []
    for checkpointed in (False, True):
        model = Layers()
        loss = torch.zeros(())
        for x in X:
            output = model(x, model.state.checkpoint_contexts if checkpointed else None)
            aux = sum(record.aux_loss for record in model.state.records.values())
            loss = loss + output.square().mean() + 10 * aux
        loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_without_records_too() -> None:
    model = Layers()
    expected = model(X[0])
    with torch.no_grad():
        x = X[0]
        for block in model.blocks:
            x = x + block(x)
    torch.testing.assert_close(x, expected)
