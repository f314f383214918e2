"""Functions on several processes of this machine, which share their results over gloo.

One server process imports everything once; each process is a fork of it, which takes milliseconds.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
# Packages only: the server does not know this folder.
SERVER.set_forkserver_preload(["nt_hf.cli.train", "pytest"])


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def finish(processes: Sequence[BaseProcess], seconds: float = 120) -> list[int]:
    """Waits for the processes and returns their exit codes; when one fails the others are killed, as launchers do."""
    while any(process.is_alive() for process in processes):
        ended = multiprocessing.connection.wait(
            [process.sentinel for process in processes if process.is_alive()], seconds
        )
        if not ended or any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            break
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def wait_for(path: Path, text: str, seconds: float = 60) -> None:
    """Waits until a file holds a text."""
    end = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"{path} does not hold {text}"
        time.sleep(0.02)


def run_on(processes: int, function: Callable, *arguments: object) -> list:
    """What ``function(*arguments)`` returns in each of some gloo processes; it must be importable.

    Raises:
        AssertionError: a process failed; the message is its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        started = [
            SERVER.Process(target=_work, args=(folder, rank, processes, port, function, arguments), daemon=True)
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        codes = finish(started)
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert codes == [0] * processes, "\n".join(failures) or f"exit codes {codes}"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _work(folder: str, rank: int, processes: int, port: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank)
    )
    try:
        dist.init_process_group("gloo")
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"process {rank}:\n{traceback.format_exc()}")
        raise
