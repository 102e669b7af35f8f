"""Limits on time and memory for untrusted chat templates, regular expressions and tokenizers."""

import resource
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from support.errors import UserError


class Overrun(BaseException):
    """Ends a block of `bounded`. No Exception, so that the code in it does not catch it."""


@contextmanager
def bounded(where, seconds=5, more=2**30):
    """A block for untrusted code: UserError after `seconds`, MemoryError above `more` bytes.

    The seconds are the processor's, so that a busy machine refuses nothing. Time is limited in the
    main thread alone, memory on Linux alone. A block inside another one shares the outer one's
    limits.
    """

    def stop(*_):
        raise Overrun

    nested = signal.getitimer(signal.ITIMER_PROF)[0] > 0
    if nested or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGPROF, stop)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if (
        sys.platform == "linux" and limits[0] == resource.RLIM_INFINITY
    ):  # else the user's own limit
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_DATA, (most, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except Overrun:
        raise UserError(f"{where}: timed out after {seconds} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
