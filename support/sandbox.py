"""Limits on time and memory for untrusted chat templates, regular expressions and tokenizers."""

import json
import math
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


def check_growth(backend, where, most=64):
    """UserError: a tokenizer of the `tokenizers` library may lengthen what it encodes or decodes
    more than `most` times, or has a token of more than 2^14 characters. Its native code can't be
    limited from outside: without memory it ends the process."""
    for part in ("normalizer", "post_processor", "decoder"):
        state = getattr(backend, part)
        times = growth(json.loads(state.__getstate__())) if state else 1
        if times > most:
            raise UserError(f"{where}: its {part} makes a text up to {times:,.0f} times longer")
    longest = max(map(len, backend.get_vocab()), default=0)
    if longest > 2**14:
        raise UserError(f"{where}: has a token of {longest:,} characters")


def growth(part):
    """How many times longer a step of a tokenizer, as its JSON, may make a text."""
    if isinstance(part, list):
        return math.prod(map(growth, part))
    if not isinstance(part, dict):
        return 1
    if part.get("type") == "TemplateProcessing":
        tokens = [special["ids"] for special in part["special_tokens"].values()]
        return len(part["single"]) * max(map(len, tokens), default=1)
    inserted = len(part.get("content") or part.get("prepend") or "")
    replaced = len(part["pattern"].get("String", "")) if "pattern" in part else 0
    if replaced:
        return max(1, inserted / replaced)
    return math.prod(map(growth, part.values())) * (1 + inserted)  # a regex may match nothing
