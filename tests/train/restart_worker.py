"""One rank that is lost once: `torchrun --max-restarts 1 restart_worker.py` (see test_torchrun.py)."""

from __future__ import annotations

import os
import time

from llava_compete.train.distributed import of_main, process_group, this_rank

rank = this_rank()
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if rank.is_main and not first:
    time.sleep(5)  # the other comes first, and must not take what it finds in the store for this one's
with process_group(rank):
    if first and rank.number == 1:
        os._exit(9)
    print(f"value {of_main(rank.number)}", flush=True)
