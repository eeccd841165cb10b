"""One rank of the save test: `deepspeed --num_gpus 2 save_worker.py CONFIG...` (see test_stage_launch.py).

Trains each stage, saves it, changes the tower's weights as no training would, and saves again beside it:
`OUTPUT_DIR` holds the second model, `OUTPUT_DIR-first` the first, `OUTPUT_DIR.pt` the weights it must hold.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from llava_compete.config import load_config
from llava_compete.train import run
from llava_compete.train.config import TrainConfig
from llava_compete.train.distributed import Rank
from llava_compete.train.trainer import StageTrainer

save_final = run._save_final


def save_perturb_save(config: TrainConfig, trainer: StageTrainer, rank: Rank) -> None:
    save_final(config, trainer, rank)
    parameters = dict(trainer.core_model.named_parameters())
    if rank.is_main:
        shutil.copytree(config.output_dir, config.output_dir.with_name(f"{config.output_dir.name}-first"))
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in parameters.items():
            if name.startswith("model.vision_tower."):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        if rank.is_main:
            expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            torch.save(expected, config.output_dir.with_suffix(".pt"))
    dist.barrier()
    save_final(config, trainer, rank)


if __name__ == "__main__":
    run._save_final = save_perturb_save
    for path in sys.argv[1:]:
        run.train(load_config(TrainConfig, Path(path), []))
