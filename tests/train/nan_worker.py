"""One rank of the NaN tests: `torchrun nan_worker.py CONFIG FIRST LAST` (see test_stage_faults.py).

A stage whose last rank gets NaN pixels in the steps FIRST to LAST (1-based); without the two numbers, one whose
gradients are NaN from the second attention layer down, in every step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from llava_compete.cli import main
from llava_compete.train.trainer import StageTrainer

get_batch_samples = StageTrainer.get_batch_samples


def poisoned(self: Any, *arguments: Any) -> Any:
    batches, count = get_batch_samples(self, *arguments)
    in_time = int(sys.argv[2]) <= self.state.global_step + 1 <= int(sys.argv[3])
    if in_time and self.args.process_index == self.args.world_size - 1:
        for batch in batches:
            if "pixel_values" in batch:
                # Not bytes, which the model would normalise and which cannot be NaN.
                batch["pixel_values"] = torch.full_like(batch["pixel_values"], torch.nan, dtype=torch.float32)
    return batches, count


class BadBackward(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("nan")


def breaking_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`LlamaAttention.forward` whose output's gradient is NaN in layer 1."""

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        output, *others = forward(self, *arguments, **options)
        return (BadBackward.apply(output) if self.layer_idx == 1 else output, *others)

    return broken


if __name__ == "__main__":
    if len(sys.argv) > 2:
        StageTrainer.get_batch_samples = poisoned
    else:
        LlamaAttention.forward = breaking_backward(LlamaAttention.forward)
    sys.exit(main(["train", sys.argv[1]]))
