"""trl's trainers on a tiny mixture: rows of two pictures, and the routing losses in the gradients to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from transformers import TrainerCallback

from llava_compete.model.build import save_checkpoint
from llava_compete.moe.block import moe_blocks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # trl's own warnings, of its own defaults
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {"vision": EXPERTS, "projector": EXPERTS, "language": EXPERTS}
PLAIN = {
    "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "learning_rate": 0.1, "save_strategy": "no",
    "per_device_train_batch_size": 2, "gradient_checkpointing": False, "optim": "sgd", "max_grad_norm": 0.0,
    "logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant", "seed": 0,
}  # fmt: skip


def pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(number)
    return [Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(2)]


def rows(**columns: list[Any]) -> Any:
    """Two rows of two pictures each."""
    table = {"images": [pictures(0), pictures(1)], **columns}
    return datasets.Dataset.from_dict(table).cast_column("images", datasets.List(datasets.Image()))


def said(role: str, *texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


PROMPTS = said("user", "what colour is the circle ?", "how many ?")


def make_trainer(kind: str, folder: Path, scale: float | None, accumulation: int = 1) -> Any:
    """A trainer of a model whose routers tell tokens apart; the same rows, and the same model, each time."""
    torch.manual_seed(0)
    model, processor = tiny_model(MOE)
    for block in moe_blocks(model).values():
        block.router.weight.data.normal_()
    model.model.attached_loss_scale = scale
    options = {**PLAIN, "output_dir": str(folder), "gradient_accumulation_steps": accumulation}
    options["per_device_train_batch_size"] = 2 // accumulation
    if kind == "sft":
        data = rows(prompt=PROMPTS, completion=said("assistant", "red .", "two shapes ."))
        return trl.SFTTrainer(model, trl.SFTConfig(**options), train_dataset=data, processing_class=processor)
    if kind == "dpo":
        pair = {"chosen": said("assistant", "red .", "two ."), "rejected": said("assistant", "blue .", "one shape .")}
        data = rows(prompt=PROMPTS, **pair)
        ref = copy.deepcopy(model)
        return trl.DPOTrainer(model, ref, trl.DPOConfig(**options), train_dataset=data, processing_class=processor)
    arguments = trl.GRPOConfig(**options, num_generations=2, max_completion_length=6, temperature=1.0)
    return trl.GRPOTrainer(
        model, longer_is_better, arguments, train_dataset=rows(prompt=PROMPTS), processing_class=processor
    )


def longer_is_better(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def step(trainer: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Gradients of one step, and the inputs of the backbone's training forwards."""
    gradients: dict[str, torch.Tensor] = {}
    seen: list[dict[str, Any]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradients.update({name: value.grad.clone() for name, value in model.named_parameters()})

    def keep(module: Any, _: Any, given: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append(dict(given))

    handle = trainer.model.model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.add_callback(Keep())
    trainer.train()
    handle.remove()
    return gradients, seen


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_attached_losses_add_their_gradients_and_nothing_else(kind: str, tmp_path: Path) -> None:
    plain, _ = step(make_trainer(kind, tmp_path, None))
    trainer = make_trainer(kind, tmp_path, 1.0)
    twin = copy.deepcopy(trainer.model).train()
    attached, seen = step(trainer)
    assert len(seen) == 1
    assert len(seen[0]["pixel_values"]) == (8 if kind == "dpo" else 4)  # two a row, and chosen and rejected
    twin.model.attached_loss_scale = None
    sum(twin.model(**seen[0]).aux_losses.values()).backward()
    moved = 0
    for name, parameter in twin.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # Each gradient is rounded; their difference keeps the rounding of the larger.
        exact = 1e-6 * float(plain[name].abs().max())
        torch.testing.assert_close(attached[name] - plain[name], expected, atol=exact + 1e-6, rtol=1e-4)
        moved += "router" in name and bool(expected.abs().sum() > 0)
    assert moved == len(moe_blocks(twin))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_sft_is_that_of_the_models_own_loss(accumulation: int, tmp_path: Path) -> None:
    """The language loss is a mean over the step's labels, the routing losses one over its micro-batches."""
    trainer = make_trainer("sft", tmp_path, 1 / accumulation, accumulation)
    twin = copy.deepcopy(trainer.model).train()
    twin.model.attached_loss_scale = None
    taken, seen = step(trainer)
    assert len(seen) == accumulation
    data = trainer.train_dataset
    batches = [
        trainer.data_collator([dict(data[n]) for n in part]) for part in ([[0, 1]] if accumulation == 1 else [[0], [1]])
    ]
    total = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    for batch in batches:
        output = type(twin).forward(twin, **batch)
        aux = sum(output.aux_losses.values())
        language = (output.loss - aux) * (batch["labels"] != -100).sum() / total
        (language + aux / accumulation).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(taken[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_checkpoint_is_found_by_its_auto_map(tmp_path: Path) -> None:
    """trl makes model and processor of a path: the stub beside config.json names the classes."""
    model, processor = tiny_model(MOE)
    save_checkpoint(model, processor, tmp_path / "model")
    data = rows(prompt=PROMPTS, completion=said("assistant", "red .", "two shapes ."))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), **PLAIN, model_init_kwargs={"dtype": "float32"}, trust_remote_code=True
    )
    trainer = trl.SFTTrainer(str(tmp_path / "model"), arguments, train_dataset=data)
    trainer.model.model.attached_loss_scale = 1.0
    trainer.train()
    assert trainer.state.global_step == 1
    assert type(trainer.processing_class).__name__ == "LlavaCompeteProcessor"
