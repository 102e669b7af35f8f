"""A user's mistakes, reported in one or two lines, and how every command ends."""

import difflib
import json
import os
import re
import sys
from contextlib import contextmanager, suppress
from traceback import walk_tb

import torch
import torch.distributed as dist
from huggingface_hub.utils import disable_progress_bars, get_token

from support.memory import tune_allocator

# characters that a terminal would obey (control, change of direction) and halves of surrogate pairs
UNPRINTABLE = "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
COLOURS = r"\x1b\[(?:32|0)m"  # `data.py show` marks what is scored
LACK_OF_MEMORY = "out of memory; take a smaller model or batch, or --load_in_4bit"
TEMPLATES = "<template>", "<unknown>"  # the file names of jinja's frames


class UserError(Exception):
    """A user's mistake, in one or two lines: the file, row, key or flag, and the way out."""


def nearest(name, options, similarity=0.5) -> str:
    """' (nearest: X, Y)', the up to two options most similar to `name`; '' if none is similar."""
    close = difflib.get_close_matches(str(name), map(str, options), n=2, cutoff=similarity)
    return f" (nearest: {', '.join(close)})" if close else ""


def run_command(main):
    """Runs a command. A UserError, a lack of memory or an error of the disk ends it with the line
    'error: ...' and exit status 2, without a traceback."""
    message, status = "", 2
    try:
        prepare_streams()
        if not sys.stderr.isatty():
            disable_progress_bars()
        tune_allocator()
        with as_user_error(LACK_OF_MEMORY, MemoryError, torch.OutOfMemoryError):
            result = main()
            sys.stdout.flush()
            return result
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # the reader of `python data.py show ... | head` has closed the pipe
        status = 141
    except OSError as error:
        if error.errno is None:
            raise
        message = str(error)
    except KeyboardInterrupt:
        status = 130
    except SystemExit as ended:
        status = ended.code
    except Exception:
        if is_first_to_fail():
            raise
    line = ""
    if message and is_first_to_fail():
        message = sanitize(message).replace("\n", " ")
        line = f"error: {shorten(message, 1000)}\n"
    write_or_drop(sys.stdout, "")
    write_or_drop(sys.stderr, line)
    sys.exit(status)


def write_or_drop(stream, text):
    """Writes and flushes; after an error, of a full disk or a dead terminal, the stream leads
    nowhere, as Python's own last flush would fail too."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_first_to_fail():
    """Whether no other rank of a distributed run reports an error. One that fails takes the others
    along, and theirs would only say so. Before they have met, all ranks of a node fail alike."""
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    with suppress(RuntimeError):
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    return True  # the store ended with the first rank, or its node


def prepare_streams():
    """Makes every print safe: streams that the caller closed lead nowhere, control characters and
    what the terminal's encoding lacks are escaped."""
    for name in ("stdin", "stdout", "stderr"):  # in this order, so that each gets its own number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    with suppress(AttributeError):  # a notebook's or a test's lacks it
        sys.stdin.reconfigure(errors="replace")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    write = sys.stdout.write
    sys.stdout.write = lambda text: write(re.sub(f"(?!{COLOURS}){UNPRINTABLE}", escape, text))


def escape(match):
    """The matched character as Python writes it: '\\x1b'."""
    return ascii(match[0])[1:-1]


def sanitize(text):
    """`text` without the hub's token, and with unprintable characters escaped."""
    token = None
    with suppress(Exception):  # a token's file that cannot be read holds none that was sent
        token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(UNPRINTABLE, escape, text)


def shorten(text, width):
    """`text`, cut off after `width` characters."""
    return text if len(text) <= width else f"{text[:width]}…"


def brief(value, width=60):
    """`value` as one short quoted line, for messages."""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return repr(shorten(" ".join(value.split()), width))


@contextmanager
def as_user_error(where, *kinds, on=None):
    """Errors of these kinds become a UserError: `where`, line, reason, and the value `on` if any.

    The line is that of a YAML file, or of the jinja template that was being rendered.
    """
    try:
        yield
    except kinds as error:
        reason = str(error) or type(error).__name__
        for attribute in ("strerror", "problem", "msg"):  # of the system, YAML and JSON
            reason = getattr(error, attribute, None) or reason
        if not isinstance(error, UserError):
            reason = " ".join(sanitize(reason).split())[:160]
        mark = getattr(error, "problem_mark", None)  # YAML's
        line = mark.line + 1 if mark else 0
        for frame, number in walk_tb(error.__traceback__):
            if frame.f_code.co_filename in TEMPLATES:
                line = number
        if line:
            where = f"{where}: line {line}"
        value = "" if on is None else f": {brief(on)}"
        raise UserError(f"{where}: {reason}{value}") from None
