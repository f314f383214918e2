"""What a training step on a CPU costs beside one other busy process, against the step alone.

    python benchmarks/busy.py

The busy process computes in a loop at the same priority. Linux may divide the processors among sessions first, then
among the processes of each (autogroups, see sched(7)). So it is measured twice: in the session of the training step, as
when one shell starts both, and in a session of its own, as when two users share a machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import DEVICE, Figure, ratio, seconds, table
from training import LENGTH, build, load_run_config

SIZE, BATCH = "20m", 2
SESSIONS = {"in its session": False, "in a session of its own": True}  # the values of start_new_session
MOST_DISTURBED = 0.2  # cores that processes of others may take on average
PAUSE = 0.2  # seconds until the busy process computes


@contextmanager
def busy_process(new_session: bool) -> Iterator[None]:
    """A process that computes in a loop, for a while."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], start_new_session=new_session)
    try:
        time.sleep(PAUSE)
        yield
    finally:
        process.kill()
        process.wait()


def step_seconds(rounds: int) -> dict[str, list[float]]:
    """Seconds of steps by what runs beside them, ``"alone"`` or one of `SESSIONS`; every round has one of each."""
    step = build("nt_hf", load_run_config([SIZE]), BATCH, None).step
    times: dict[str, list[float]] = {"alone": [], **{name: [] for name in SESSIONS}}
    step()
    for _ in range(rounds):
        times["alone"].append(seconds(step))
        for name, new_session in SESSIONS.items():
            with busy_process(new_session):
                times[name].append(seconds(step))
    return times


def processor_seconds() -> float | None:
    """Of all processes since the machine started; ``None`` where the system does not tell."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    except OSError:
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def measure(rounds: int = 5) -> list[Figure]:
    """Row 10 of the table of goals."""
    if DEVICE.type != "cpu":
        return []
    start, before, own = time.perf_counter(), processor_seconds(), sum(os.times()[:4])
    # A process that imports nt_hf before torch, as programs do, whatever this one did.
    command = [sys.executable, __file__, "--rounds", str(rounds), "--times"]
    times = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    disturbed = ""
    if before is not None:
        used = processor_seconds() - before - (sum(os.times()[:4]) - own)
        if (cores := used / (time.perf_counter() - start)) > MOST_DISTURBED:
            disturbed = f"not alone: other processes took {cores:.2f} cores"
    alone = statistics.median(times["alone"])
    return [
        Figure(
            10,
            f"step beside one busy process {name}, against the step alone, {SIZE}, {BATCH} x {LENGTH}",
            None if disturbed else ratio(times, name, "alone"),
            at_most=2.2,
            note=disturbed or f"{statistics.median(times[name]):.2f} s, {alone:.2f} s on {os.cpu_count()} cores",
        )
        for name in SESSIONS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(json.dumps(step_seconds(args.rounds)) if args.times else table(measure(args.rounds)))


if __name__ == "__main__":
    main()
