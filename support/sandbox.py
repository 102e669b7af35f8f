"""Limits of time and memory for what comes from strangers: chat templates, regexes, tokenizers."""

import resource
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from support.errors import UserError


class Overrun(BaseException):
    """What stops a block of `bounded`; no Exception, so that nothing inside takes it for its own."""


@contextmanager
def bounded(where, seconds=5, more=2**30):
    """Untrusted code runs in this block: UserError after so many seconds (in the main thread), MemoryError where it
    wants so many bytes more than there are (on Linux). A block within another one is a part of it."""

    def stop(*_):
        raise Overrun

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getitimer(signal.ITIMER_REAL)[0]
    ):
        yield
        return
    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        most = min(limit for limit in (held + more, *limits) if limit >= 0)
        resource.setrlimit(resource.RLIMIT_DATA, (most, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Overrun:
        raise UserError(f"{where}: not done after {seconds} s, so it is stopped") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
