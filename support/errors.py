"""Mistakes that are the user's, told in a line or two, and what every command does with them."""

import difflib
import json
import os
import re
import sys
from contextlib import contextmanager
from traceback import walk_tb

import torch
from huggingface_hub.utils import disable_progress_bars, get_token

from support.memory import tune_allocator


class UserError(Exception):
    """A user's mistake. Its text is one or two lines: the file, row, key or flag, and the way out."""


def nearest(name, options) -> str:
    """' (nearest: X, Y)', the up to two options that look most like name; '' where none does."""
    close = difflib.get_close_matches(str(name), list(map(str, options)), n=2, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def run_command(main):
    """Runs a command: a UserError, or a disk that refuses, ends in 'error: ...' and exit status 2, no traceback."""
    try:
        for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
        if not sys.stderr.isatty():
            disable_progress_bars()
        tune_allocator()
        return main()
    except UserError as error:
        message = str(error)
    except (
        MemoryError,
        torch.OutOfMemoryError,
    ) as error:  # not in a step, which would be done again in parts
        message = f"out of memory ({str(error).partition('. ')[0]}): take a smaller model or batch, or --load_in_4bit"
    except (
        BrokenPipeError
    ):  # `python data.py show ... | head`: whoever read has gone, and there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdout.flush()
    message = sanitize(message).replace("\n", " ")
    print(f"error: {message[:1000]}{'…' * (len(message) > 1000)}", file=sys.stderr)
    sys.exit(2)


def sanitize(text):
    """`text` without the hub's token, and with what a terminal would obey (control characters, changes of direction)
    and halves of characters written as escapes."""
    if token := get_token():
        text = text.replace(token, "***")
    return re.sub(
        "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda found: ascii(found[0])[1:-1],
        text,
    )


def brief(value, width=60):
    """`value` as one short quoted line, for messages."""
    text = " ".join(
        (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        ).split()
    )
    return repr(text[:width] + "…" if len(text) > width else text)


TEMPLATES = "<template>", "<unknown>"  # how jinja's frames name their file


@contextmanager
def as_user_error(where, *kinds, on=None):
    """Errors of these kinds become a UserError: `where` is wrong, the error's words, what was found there (`on`)."""
    try:
        yield
    except kinds as error:
        told = [getattr(error, name, None) for name in ("strerror", "problem", "msg")]
        words = next(filter(None, [*told, str(error)]), type(error).__name__)
        words = words if isinstance(error, UserError) else " ".join(sanitize(words).split())[:160]
        lines = [
            line
            for frame, line in walk_tb(error.__traceback__)
            if frame.f_code.co_filename in TEMPLATES
        ]
        if (
            line := lines[-1]
            if lines
            else getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        ):  # YAML's
            words = f"line {line}: {words}"
        raise UserError(
            f"{where}: {words}" + (f": {brief(on)}" if on is not None else "")
        ) from None
