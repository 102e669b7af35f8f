"""What a run tells while it goes on: log.jsonl, the figure, trackers, run.log, time and memory by part."""

import json
import os
import re
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from support.errors import UserError, as_user_error, brief, sanitize
from support.files import read_json
from support.memory import peak_memory_gb
from support.report import aligned_columns


class Clock:
    """Seconds and peak memory of a run by part, and the throughput of its steps since it was last read."""

    STEP = "forward and backward", "optimizer"  # evaluation, logging and saving are not counted

    def __init__(self, device):
        self.device, self.part, self.last, self.parts = device, "data", time.perf_counter(), {}
        self.tokens, self.examples, self.before = 0, 0, (0, 0, 0.0)
        peak_memory_gb(device)

    def enter(self, part):
        """What comes from here on is `part`'s."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        (seconds, peak), now = self.parts.get(self.part, (0.0, 0.0)), time.perf_counter()
        self.parts[self.part] = seconds + now - self.last, max(peak, peak_memory_gb(self.device))
        self.part, self.last = part, now

    def count_step(self, tokens, examples):
        self.enter("log")
        self.tokens, self.examples = self.tokens + tokens, self.examples + examples

    def steps(self):
        """(seconds, peak GB) of the steps so far."""
        seconds, peaks = zip(*(self.parts.get(part, (0.0, 0.0)) for part in self.STEP))
        return sum(seconds), max(peaks)

    def throughput(self):
        seconds, peak = self.steps()
        done = self.tokens, self.examples, seconds
        tokens, examples, took = (new - old for new, old in zip(done, self.before))
        self.before = done
        return {
            "tokens_per_second": round(tokens / max(took, 1e-9), 1),
            "examples_per_second": round(examples / max(took, 1e-9), 3),
            "peak_memory_gb": round(peak, 3),
        }


def print_summary(clock):
    """Prints a run's time and memory by part and its speed. Returns the seconds for the last line of the log."""
    clock.enter("log")
    rows = ((part, f"{took:.1f}", f"{peak:.2f}") for part, (took, peak) in clock.parts.items())
    print(f"\n{aligned_columns(('', 'seconds', 'peak GB'), *rows)}")
    if clock.tokens:
        took, peak = clock.steps()
        print(f"{clock.tokens / took:,.1f} tokens/s; peak memory of the steps: {peak:.2f} GB")
    return {"seconds": {part: round(took, 1) for part, (took, _) in clock.parts.items()}}


UNSHOWN = (
    "epoch",
    "scored_tokens",
    "examples_per_second",
    "seconds",
    "logps/chosen",
    "logps/rejected",
    "rows",
)


class Log:
    """log.jsonl, cut back to `size` bytes (what the checkpoint saw), echoed to the terminal, drawn as
    training_loss.png, told to the trackers. Neither drawing nor a tracker can cost the run more than a warning."""

    def __init__(self, folder, size=0, trackers=None):
        self.path, self.next, self.trackers = folder / "log.jsonl", 0.0, trackers or {}
        self.path.touch()
        os.truncate(self.path, min(size, self.path.stat().st_size))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        shown = {k: v for k, v in line.items() if k.removeprefix("eval_") not in UNSHOWN}
        tqdm.write(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
            )
        )
        if time.perf_counter() > self.next:
            self.plot()
        numbers = {
            ("eval/" if k.startswith("eval_") else "train/") + k.removeprefix("eval_"): v
            for k, v in line.items()
            if ("loss" in line or k.startswith(("eval_", "train_"))) and k != "step"
        }
        for name, (log, _) in list(self.trackers.items()):
            with warn_on_error(f"report_to: the run goes on without {name}"):
                log(numbers, line["step"])
                continue
            del self.trackers[name]  # it failed

    def plot(self):
        began = time.perf_counter()
        with warn_on_error("training_loss.png is not drawn"):
            plot_losses(self.path)
        now = time.perf_counter()
        self.next = now + 50 * (now - began)  # drawing takes a fiftieth of the time

    def sync(self):
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self):
        for name, (_, finish) in self.trackers.items():
            with warn_on_error(f"report_to: {name} does not end"):
                finish()


@contextmanager
def warn_on_error(what):
    """An error in the block is told in a line, no more."""
    try:
        yield
    except Exception as error:
        print(f"{what} ({type(error).__name__}: {brief(str(error), 160)})", file=sys.stderr)


def read_log(path):
    """The whole lines of a log.jsonl, as dicts; what a kill cut short is left out."""
    return [
        json.loads(line)
        for line in Path(path).read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    ]


def plot_losses(path):
    """Draws training_loss.png beside a log.jsonl: the loss, and what else of PLOTTED was logged, in training and held
    out."""
    from matplotlib.figure import (
        Figure,  # without pyplot, which would take a notebook's own figures over
    )

    lines = read_log(path)
    keys = [key for key in PLOTTED if any(key in line or f"eval_{key}" in line for line in lines)]
    figure = Figure(figsize=(3 + 4 * len(keys), 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for key, label, style in ((title, "training", "-"), (f"eval_{title}", "held out", "o-")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points), style, label=label, markersize=4)
        axes.set(xlabel="step", ylabel=PLOTTED[title])
        axes.grid(alpha=0.3)
        axes.legend()
    aside = Path(path).with_name(".training_loss.png")
    figure.savefig(aside, dpi=130, format="png")
    aside.replace(Path(path).with_name("training_loss.png"))


PLOTTED = {
    "loss": "loss (per scored token or pair)",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "pairs ranked right",
}


TRACKERS = ("tensorboard", "wandb", "trackio")


def find_trackers(config):
    """The names that report_to means; UserError for one that is not installed."""
    found = [name for name in TRACKERS if sys.modules.get(name) or find_spec(name)]
    wanted = (
        found
        if "all" in config.report_to
        else [name for name in config.report_to if name != "none"]
    )
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"report_to: {missing[0]} is not installed; pip install {missing[0]}, or name another tracker"
        )
    return wanted


def start_trackers(config, step):
    """{name: (log(numbers, step), finish())} of report_to, and of a notebook that runs this. What a killed process told
    from `step` on, which is done again, is not there twice."""
    folder, trackers = Path(config.output_dir), {}
    for name in find_trackers(config):
        with as_user_error(
            f"report_to: {name} does not start; set it up, or leave it out", Exception
        ):
            trackers[name] = (
                tensorboard(folder / "runs", step)
                if name == "tensorboard"
                else dashboard(name, config)
            )
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return trackers | (
        {"notebook": notebook(folder / "training_loss.png")} if hasattr(shell, "kernel") else {}
    )


def tensorboard(folder, step):
    """TensorBoard's files; what they already hold from `step` on counts no more."""
    from torch.utils.tensorboard import SummaryWriter

    writer, hook = SummaryWriter(folder, purge_step=step), threading.excepthook
    threading.excepthook = lambda at: (
        issubclass(at.exc_type, OSError) or hook(at)
    )  # its thread's; `log` tells it

    def log(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a kill loses nothing

    return log, writer.close


def dashboard(library, config):
    """wandb or trackio; a run that goes on goes on there."""
    folder = Path(config.output_dir).resolve()
    name = re.sub(r"\W+", "-", f"{folder.name}-{read_json(folder / 'config.json')['began'][:19]}")
    options = {"id": name, "dir": folder} if library == "wandb" else {}
    run = import_module(library).init(
        project=os.environ.get(f"{library.upper()}_PROJECT", "plaintune"),
        name=name,
        resume="allow",
        config=asdict(config),
        **options,
    )
    known = getattr(
        run, "_next_step", 0
    )  # trackio's; wandb itself passes over the steps that it has
    return lambda numbers, step: step < known or run.log(numbers, step=step), run.finish


def notebook(file):
    """The figure in the cell that runs this, redrawn in place."""
    from IPython.display import Image, display

    def log(numbers, step):
        image = Image(filename=str(file))
        shown.append(shown[0].update(image) if shown else display(image, display_id=True))

    shown = []
    return log, shown.clear


@contextmanager
def copy_output(folder):
    """While the block runs, what is printed goes to folder/run.log too, each line with its time. It is held back until
    this command has written config.json: one that is refused leaves no trace."""
    file, held, streams = folder / "config.json", [], {sys.stdout, sys.stderr}
    written = lambda: file.stat().st_mtime_ns if file.exists() else None
    before = written()

    def keep(write, text):
        held.extend([text] * ("\r" not in text))  # a progress bar has it
        if text.endswith("\n") and written() != before:
            with suppress(OSError), open(folder / "run.log", "a", encoding="utf-8") as log:
                log.writelines(
                    f"{datetime.now():%F %T} {line}\n"
                    for line in sanitize("".join(held)).splitlines()
                )
            held.clear()
        return write(text)

    for stream in streams:
        stream.write = partial(keep, stream.write)
    try:
        yield
    except Exception as error:
        keep(
            len,
            f"error: {error}\n"
            if isinstance(error, (UserError, OSError))
            else traceback.format_exc(),
        )
        raise
    finally:
        for stream in streams:
            del stream.write
