"""Signals that announce the end of a process."""

import logging
import signal

logger = logging.getLogger(__name__)

#: Exit code of a run that a signal stopped, once its state was saved: "temporary failure, try again" in sysexits.h.
EXIT_PREEMPTED = 75


class Preemption:
    """Remembers that SIGTERM or SIGUSR1 came, with which schedulers announce that a process will be killed.

    A context manager: it puts the signals' handlers back when it is left.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        logger.info("%s: saving after this step, then stopping", signal.Signals(number).name)
        self.received = True
