"""torchrun for the stage scripts: its ranks end as they would by themselves, and their exit status is its own.

torchrun answers a signal by giving its ranks 30 s before it kills them, too short for a large save, and a rank that
leaves by a traceback and status 1. Here signals leave the launcher alone, since the stage script tells the ranks, and
the status is that of the rank that left first: 143 for a stage that was stopped, 128 + N for one ended by signal N.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main(words: Sequence[str]) -> int:
    """Start the ranks that `words` (torchrun's own options) ask for; returns their status."""
    for number in TOLD:
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a hang-up stays ignored, also in the ranks
            # A function, not SIG_IGN: that would be passed on to the ranks, which must hear these signals.
            signal.signal(number, lambda *_: None)
    logging.disable(logging.ERROR)  # its report of a failed rank, which has said by itself what was wrong
    arguments = parse_args(["--signals_to_handle", "SIGQUIT", *words])
    try:
        run(arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        status = int(first.exitcode)
        if status < 0 and -status != signal.SIGTERM:
            sys.stderr.write(f"error: rank {rank} was ended by {signal.Signals(-status).name}\n")
        return status if status >= 0 else 128 - status
    except (dist.DistError, RendezvousError, RuntimeError, ValueError) as error:
        address = f"{arguments.master_addr}:{arguments.master_port}"
        if "EADDRINUSE" in str(error):
            sys.stderr.write(f"error: port in use: {address}; set MASTER_PORT to a free port\n")
        else:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            sys.stderr.write(f"error: the machines do not meet at {address}: {lines[0]}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
