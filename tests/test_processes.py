"""A pool's processes do not outlive the command, however that ended."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llava_compete import processes

FOLDER = str(Path(processes.__file__).parent)
COMMAND = """
    import os, sys, time
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    sys.path.append(sys.argv[2])  # alone: the package imports torch, in each process
    from processes import end_with_parent

    def number(seconds):
        time.sleep(seconds)
        return os.getpid()

    if __name__ == "__main__":
        with ProcessPoolExecutor(3, get_context(sys.argv[1]), end_with_parent) as pool:
            print(*set(pool.map(number, [0.5] * 6)), flush=True)
            pool.submit(number, 600)
            time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_ends_with_a_command_that_is_killed(method, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(textwrap.dedent(COMMAND))
    command = subprocess.Popen([sys.executable, str(script), method, FOLDER], stdout=subprocess.PIPE, text=True)
    workers = [int(word) for word in command.stdout.readline().split()]
    assert len(workers) > 1
    command.send_signal(signal.SIGKILL)
    command.wait()
    ends = time.monotonic() + 30
    while (alive := [worker for worker in workers if _runs(worker)]) and time.monotonic() < ends:
        time.sleep(0.05)
    for worker in alive:
        os.kill(worker, signal.SIGKILL)
    assert not alive


def _runs(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
