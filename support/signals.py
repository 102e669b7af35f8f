"""Signals that stop a run at the end of its step."""

import signal
from contextlib import contextmanager

from support.distributed import size


@contextmanager
def stop_signals():
    """A list that gets the number of a SIGINT, SIGTERM or SIGHUP. A second one interrupts, unless
    torchrun may have sent it."""
    caught, handlers = [], {}

    def note(number, frame):
        if caught and size() == 1:
            raise KeyboardInterrupt
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has SIGHUP
            handlers[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
