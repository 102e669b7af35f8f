"""What a run reports: log.jsonl, the figure, trackers, run.log, time and memory by part."""

import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from support.distributed import is_first
from support.errors import UserError, as_user_error, brief, sanitize, write_or_drop
from support.files import read_json
from support.memory import peak_memory_gb
from support.report import aligned_columns


class Clock:
    """Seconds and peak memory of a run by part, and the throughput of its steps."""

    STEP = "forward and backward", "optimizer"  # evaluation, logging and saving are not counted

    def __init__(self, device):
        self.device, self.part, self.last = device, "data", time.perf_counter()
        self.seconds, self.peaks = defaultdict(float), defaultdict(float)
        self.tokens = self.examples = 0
        self.before = 0, 0, 0.0
        peak_memory_gb(device)

    def enter(self, part):
        """Ends the current part; the time from here on belongs to `part`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, peak = time.perf_counter(), peak_memory_gb(self.device)
        self.seconds[self.part] += now - self.last
        self.peaks[self.part] = max(peak, self.peaks[self.part])
        self.part, self.last = part, now

    def count_step(self, tokens, examples):
        self.enter("log")
        self.tokens += tokens
        self.examples += examples

    def steps(self):
        """(seconds, peak GB) of the steps so far."""
        seconds = sum(self.seconds[part] for part in self.STEP)
        return seconds, max(self.peaks[part] for part in self.STEP)

    def throughput(self):
        """Tokens and examples per second since the last call, and the steps' peak memory."""
        seconds, peak = self.steps()
        tokens, examples, before = self.before
        elapsed = max(seconds - before, 1e-9)
        self.before = self.tokens, self.examples, seconds
        return {
            "tokens_per_second": round((self.tokens - tokens) / elapsed, 1),
            "examples_per_second": round((self.examples - examples) / elapsed, 3),
            "peak_memory_gb": round(peak, 3),
        }


def print_summary(clock):
    """Prints a run's time and memory by part and its speed; returns the seconds by part."""
    clock.enter("log")
    rows = [["", "seconds", "peak GB"]]
    for part, seconds in clock.seconds.items():
        rows.append([part, f"{seconds:.1f}", f"{clock.peaks[part]:.2f}"])
    print(f"\n{aligned_columns(*rows)}")
    if clock.tokens:
        seconds, peak = clock.steps()
        print(f"{clock.tokens / seconds:,.1f} tokens/s; peak memory of the steps: {peak:.2f} GB")
    return {"seconds": {part: round(seconds, 1) for part, seconds in clock.seconds.items()}}


NOT_PRINTED = {  # of a line of the log
    "epoch",
    "scored_tokens",
    "examples_per_second",
    "seconds",
    "logps/chosen",
    "logps/rejected",
    "rows",
}


class Log:
    """log.jsonl, cut back to `size` bytes (those the checkpoint saw). Each line is also printed,
    drawn in training_loss.png and sent to the trackers, whose failure costs a warning alone. Ranks
    but the first have one that leads nowhere."""

    def __init__(self, folder, size=0, trackers=None, unit="scored token"):
        self.path, self.trackers, self.unit = folder / "log.jsonl", trackers or {}, unit
        self.next_plot = 0.0 if is_first() else math.inf
        self.file = open(self.path if is_first() else os.devnull, "a", encoding="utf-8")
        if self.size() > size:
            self.file.truncate(size)
        if is_first() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            self.file.write("\n")  # a damaged last line ends here

    def write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        words, numbers = [], {}
        for key, value in line.items():
            name = key.removeprefix("eval_")
            if name not in NOT_PRINTED:
                words.append(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                )
            if name != key:
                numbers[f"eval/{name}"] = value
            elif key != "step" and ("loss" in line or key.startswith("train_")):
                numbers[f"train/{key}"] = value
        tqdm.write("  ".join(words))
        if time.perf_counter() > self.next_plot:
            self.plot()
        for name, (send, _) in list(self.trackers.items()):
            with warn_on_error(f"report_to: the run goes on without {name}"):
                send(numbers, line["step"])
                continue
            del self.trackers[name]  # it failed

    def size(self):
        return self.file.tell()

    def plot(self):
        began = time.perf_counter()
        with warn_on_error("training_loss.png is not drawn"):
            plot_losses(self.path, self.unit)
        now = time.perf_counter()
        self.next_plot = now + 50 * (now - began)  # drawing takes at most a fiftieth of the time

    def sync(self):
        """Waits until the log is on the disk; returns its size in bytes."""
        os.fsync(self.file.fileno())
        return self.size()

    def close(self):
        for name, (_, finish) in self.trackers.items():
            with warn_on_error(f"report_to: {name} does not end"):
                finish()


@contextmanager
def warn_on_error(what):
    """An error in the block is printed as one line and ignored."""
    try:
        yield
    except Exception as error:
        print(f"{what} ({type(error).__name__}: {brief(str(error), 160)})", file=sys.stderr)


def read_log(path):
    """The lines of a log.jsonl as dicts. A line that is none, which a kill or the disk damaged, is
    left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


PLOTTED = {
    "loss": "loss (mean per {unit})",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "{unit}s ranked right",
}


def plot_losses(path, unit):
    """Draws training_loss.png beside a log.jsonl: a panel for each metric of PLOTTED that it has,
    with a curve for training and one for the evaluation set. unit: what the loss is a mean over."""
    # matplotlib is slow to import; without pyplot, which takes over a notebook's own figures
    from matplotlib.figure import Figure

    curves = {}
    for line in read_log(path):
        for key, value in line.items():
            steps, values = curves.setdefault(key, ([], []))
            steps.append(line["step"])
            values.append(value)
    panels = [key for key in PLOTTED if key in curves or f"eval_{key}" in curves]
    figure = Figure(figsize=(3 + 4 * len(panels), 4), layout="constrained")
    for n, key in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), n + 1)
        axes.set(xlabel="step", ylabel=PLOTTED[key].format(unit=unit))
        if key in curves:
            axes.plot(*curves[key], label="training")
        if f"eval_{key}" in curves:
            axes.plot(*curves[f"eval_{key}"], "o-", label="evaluation", markersize=4)
        axes.grid(alpha=0.3)
        axes.legend()
    unfinished = Path(path).with_name(".training_loss.png")
    figure.savefig(unfinished, dpi=130, format="png")
    unfinished.replace(Path(path).with_name("training_loss.png"))


TRACKERS = ("tensorboard", "wandb", "trackio")


def find_trackers(config):
    """The names that report_to means; UserError for one that is not installed."""
    installed = [*filter(find_spec, TRACKERS)]
    if "all" in config.report_to:
        return installed
    names = [name for name in config.report_to if name != "none"]
    for name in names:
        if name not in installed:
            raise UserError(
                f"report_to: {name} is not installed; pip install {name}, or name another tracker"
            )
    return names


def start_trackers(config, step):
    """{name: (send(numbers, step), finish())} of report_to, and of a notebook that runs this.

    What a killed process sent from `step` on is sent again and counted once."""
    folder, trackers = Path(config.output_dir), {}
    for name in find_trackers(config):
        with as_user_error(f"report_to: {name} does not start; set it up, or omit it", Exception):
            if name == "tensorboard":
                trackers[name] = tensorboard(config.logging_dir or folder / "runs", step)
            else:
                trackers[name] = dashboard(name, config)
    if "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        if hasattr(shell, "kernel"):
            trackers["notebook"] = notebook(folder / "training_loss.png")
    return trackers


def tensorboard(folder, step):
    """TensorBoard's files; what they hold from `step` on is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=step)
    default_hook = threading.excepthook

    def hook(error):  # its writer thread's: a full disk is reported by `send`
        if not issubclass(error.exc_type, OSError):
            default_hook(error)

    def send(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a kill loses nothing

    threading.excepthook = hook
    return send, writer.close


def dashboard(library, config):
    """wandb or trackio; a resumed run continues there under its name."""
    folder = Path(config.output_dir).resolve()
    began = read_json(folder / "config.json")["began"][:19]
    key = re.sub(r"\W+", "-", f"{folder.name}-{began}")
    options = {"id": key, "dir": folder} if library == "wandb" else {}
    run = import_module(library).init(
        project=os.environ.get(f"{library.upper()}_PROJECT", "plaintune"),
        name=config.run_name or key,
        resume="allow",
        config=asdict(config),
        **options,
    )
    first = getattr(run, "_next_step", 0)  # trackio's; wandb skips the steps it has by itself

    def send(numbers, step):
        if step >= first:
            run.log(numbers, step=step)

    return send, run.finish


def notebook(path):
    """The figure in the cell that runs this, redrawn in place."""
    from IPython.display import Image, display

    handles = []

    def send(numbers, step):
        image = Image(filename=str(path))
        if handles:
            handles[0].update(image)
        else:
            handles.append(display(image, display_id=True))

    return send, handles.clear


class Tee:
    """A stream whose texts also go to record(text)."""

    def __init__(self, stream, record):
        self.stream, self.record = stream, record

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.record(text)
        write_or_drop(self.stream, text)


@contextmanager
def copy_output(folder):
    """While the block runs, what is printed goes to folder/run.log too, each line with its time,
    and a dead terminal or a full disk under it does not end the run.

    It is buffered until this command has written config.json: one that is refused leaves no trace.
    """
    config, buffer = folder / "config.json", []

    def modified():
        return config.stat().st_mtime_ns if config.exists() else None

    def record(text):
        if "\r" not in text:  # a progress bar
            buffer.append(text)
        if text.endswith("\n") and modified() != before:
            with suppress(OSError), open(folder / "run.log", "a", encoding="utf-8") as file:
                for line in sanitize("".join(buffer)).splitlines():
                    file.write(f"{datetime.now():%F %T} {line}\n")
            buffer.clear()

    before = modified()
    try:
        with redirect_stdout(Tee(sys.stdout, record)), redirect_stderr(Tee(sys.stderr, record)):
            yield
    except Exception as error:
        expected = isinstance(error, (UserError, OSError))
        record(f"error: {error}\n" if expected else traceback.format_exc())
        raise
