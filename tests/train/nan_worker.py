"""One rank of the NaN test: `torchrun nan_worker.py CONFIG FIRST LAST` (see test_stage_faults.py).

A stage whose last rank gets NaN pixels in the steps FIRST to LAST (1-based).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from llava_compete.cli import main
from llava_compete.train.trainer import StageTrainer

get_batch_samples = StageTrainer.get_batch_samples


def poisoned(self: Any, *arguments: Any) -> Any:
    batches, count = get_batch_samples(self, *arguments)
    in_time = int(sys.argv[2]) <= self.state.global_step + 1 <= int(sys.argv[3])
    if in_time and self.args.process_index == self.args.world_size - 1:
        for batch in batches:
            if "pixel_values" in batch:
                batch["pixel_values"] = torch.full_like(batch["pixel_values"], torch.nan)
    return batches, count


if __name__ == "__main__":
    StageTrainer.get_batch_samples = poisoned
    sys.exit(main(["train", sys.argv[1]]))
