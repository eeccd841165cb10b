"""One rank of the ZeRO gradient parity test: `deepspeed --num_gpus 2 zero_worker.py STAGES OUT` (see test_zero.py).

Every case builds the same two-layer model, gives each rank its half of the data, forces the halves onto disjoint
experts, and compares DeepSpeed's full gradients with those of one plain process over all the data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llava_compete.moe.block import SparseMoeBlock, competition_layers
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.state import RoutingState, TokenGroups

WIDTH, EXPERTS, SEQUENCES, LENGTH = 8, 4, 8, 6
MODES = (
    "router",
    "contest",
    "taught",
    "judged",
    "judged behind a frozen front",
    "judged, routers only",
    "judged by means",
    "tc_moe",
    "moe_plus_plus",
    "autonomy",
    "coupled",
)


class Model(nn.Module):
    """Linear, two residual MoE blocks, linear; loss = mean over sequences + auxiliary losses."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        # The second layer asks by rows sorted by expert, the first every expert.
        judged: dict[str, Any] = (
            {"competition_judge": "loss", "competition_margin": 0.0} if mode.startswith("judged") else {}
        )
        asks_one: dict[str, Any] = {"competition_contenders": 1} if mode.startswith("judged") else {}
        if mode == "judged by means":  # in the first layer for experts that are not asked, in the second for all
            judged |= {"competition_answers": "both", "competition_margin": 0.9}
            asks_one = {"competition_answers": "mean", "competition_margin": None}
        others: dict[str, Any] = {}
        if mode in ("tc_moe", "moe_plus_plus"):  # the third choice runs no expert, or the same with the other sign
            others = {"router": mode, "num_experts_per_tok": 3}
        if mode == "autonomy":
            others = {"router": mode}
        if mode == "coupled":
            others = {"router": "softmax", "coupling_coef": 1.0}
        self.routing = RoutingState()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            SparseMoeBlock(
                # The second layer holds its competition in chunks, and recomputes each in the backward pass.
                MoeLayerConfig.model_validate(
                    {
                        "num_experts": EXPERTS,
                        "num_experts_per_tok": 2,
                        "competition_chunk_tokens": 5 if layer == 1 and not others else None,
                        **judged,
                        **(asks_one if layer == 1 else {}),
                        **others,
                    }
                ),
                name=f"language.{layer}",
                state=self.routing,
                hidden_size=WIDTH,
                intermediate_size=12,
                activation="gelu",
                gated=layer == 0,
                bias=layer == 1,
            )
            for layer in range(2)
        )
        self.last = nn.Linear(WIDTH, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(WIDTH) + 0.1 * self.first.weight)
            for block in self.blocks:
                # Experts 0 and 1 like a positive first coordinate, 2 and 3 a negative one, router and affinity alike.
                sign_E = torch.tensor([1.0, 1.0, -1.0, -1.0])
                if mode == "autonomy":
                    # Norms know no sign: two experts like the first coordinate and two the second.
                    block.router.low_proj[:2, 0, 0] = block.router.low_proj[2:, 0, 1] = 3
                    continue
                # Where the loss judges, probabilities of experts that were not chosen must not vanish.
                block.router.weight[:, 0] = 0
                block.router.weight[:EXPERTS, 0] = (0.1 if judged else 2) * sign_E
                block.experts.up[:, :, 0] = sign_E[:, None]
                block.experts.down_proj.add_(0.1)
                if block.experts.has_gate:
                    block.experts.up[:, block.experts.up.shape[1] // 2 :, 0] = sign_E[:, None]

                # What experts said in a step before; the last one was never chosen.
                said_EP = torch.randn(EXPERTS, WIDTH + 1)
                said_EP[:, -1] = torch.tensor([3.0, 1.0, 2.0, 0.0])
                block.experts.answer_means.end_step(said_EP)

        for name, parameter in self.named_parameters():
            frozen = {"judged behind a frozen front": "first" in name, "judged, routers only": "router" not in name}
            parameter.requires_grad_(not frozen.get(mode, False))

    def forward(self, x: Tensor, num_sequences: int) -> Tensor:
        self.routing.begin("language", TokenGroups.from_mask(torch.ones(x.shape[:2]), num_sequences))
        with self.routing.recording():
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
            loss = self.last(x).square().mean(1).sum() / num_sequences
        # Coefficients are 0.01 and less: enlarge the auxiliary losses so that an error in them shows.
        return loss + 50 * sum(record.aux_loss for record in self.routing.records.values())


def data(mode: str) -> Tensor:
    x = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    x[: SEQUENCES // 2, :, 0] = 4.0
    x[SEQUENCES // 2 :, :, 0] = -4.0
    if mode == "autonomy":
        x[SEQUENCES // 2 :, :, :2] = torch.tensor([0.0, 4.0])
    return x


def make_model(mode: str) -> Model:
    model = Model(mode)
    model.routing.competition_enabled = True
    model.routing.competing = frozenset(competition_layers(model)) if mode in ("contest", "taught") else frozenset()
    return model


def one_process(mode: str) -> dict[str, Tensor]:
    model = make_model(mode)
    model(data(mode), SEQUENCES).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return grads | model.routing.answers


def two_processes(stage: int, mode: str, micro_batches: int) -> tuple[dict[str, Tensor], list[float]]:
    """Full gradients under ZeRO, and how many choices this rank made of each expert of the first layer."""
    model = make_model(mode)
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = SEQUENCES // world // micro_batches
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": micro_batches,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    load_E, answers = torch.zeros(()), dict[str, Tensor]()
    for x in data(mode).chunk(world)[rank].split(rows):
        # The sum of all micro-batches' and ranks' losses is the loss; DeepSpeed takes means over both.
        engine.backward(engine(x, SEQUENCES) * world * micro_batches)
        load_E = load_E + model.routing.records["language.0"].metrics.load_E
        answers = {name: answers.get(name, 0) + sums for name, sums in model.routing.answers.items()}
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = {name: deepspeed.utils.safe_get_full_grad(parameter) for name, parameter in trained.items()}
    engine.destroy()
    for sums in answers.values():
        dist.all_reduce(sums)
    return grads | answers, load_E.tolist()


def main(stages: list[int], out: Path) -> None:
    # Gloo is enough, and DeepSpeed would compile a kernel for this.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    results: list[dict[str, Any]] = []
    for mode in MODES:
        expected = one_process(mode)
        for stage in stages:
            for micro_batches in (1, 2):
                grads, load = two_processes(stage, mode, micro_batches)
                sizes = {name: expected[name].norm().clamp(min=1e-12) for name in grads}  # the first residual's is 0
                errors = {name: float((grads[name] - expected[name]).norm() / sizes[name]) for name in grads}
                worst = max(errors, key=lambda name: errors[name])
                case = {"stage": stage, "mode": mode, "micro_batches": micro_batches}
                results.append({**case, "load": load, "worst": worst, "error": errors[worst]})
    out.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    # The launcher puts --local_rank first.
    stages, out = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    torch.set_num_threads(1)
    main([int(stage) for stage in stages.split(",")], Path(out))
