"""Several ranks beside one process: the same numbers, whatever trains and however it is divided.

Every case trains the embedded model in one process and on 2 and 4 ranks over gloo, with the same
command and without dropout. Compared: every logged loss, metric and gradient norm (the largest
difference, relative to the number where that is above 1), and the tensors of the last checkpoint
(absolute). Then a run is stopped and goes on with another number of ranks; a rank is killed with
SIGKILL under `torchrun --max-restarts 1`; and one of the ranks runs out of memory.

    python benchmarks/distributed.py [--ranks 2,4] [--cases sft-lora,dpo-4bit-base]
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import dpo  # noqa: E402
import sft  # noqa: E402
from support import distributed  # noqa: E402
from support.errors import run_command  # noqa: E402

DATA = ROOT / "examples" / "mcqa"
COMMON = """
    --max_samples 45 --max_eval_samples 16 --eval_answers 2 --max_new_tokens 8 --logging_steps 1
    --per_device_train_batch_size 8 --num_train_epochs 1 --save_steps 2 --lora_r 8 --merge false
    --micro_batch_tokens 512 --report_to none --adam_epsilon 1e-5 --learning_rate 1e-3
"""
TRAINED = {"lora": "", "4bit": "--load_in_4bit true", "full": "--lora_r 0"}
MODES = {"replicas": "", "base": "--sharding base --gradient_checkpointing true"}
CASES = {
    f"{script}-{trained}-{mode}": (script, f"{TRAINED[trained]} {MODES[mode]}")
    for script in ("sft", "dpo")
    for trained in TRAINED
    for mode in MODES
    if (trained, mode) != ("full", "base")
}


def command(case, out):
    script, settings = CASES[case]
    pairs = "_pairs" if script == "dpo" else ""
    flags = ["--model", ROOT / "examples" / "tiny-qwen3", "--output_dir", out]
    flags += ["--data", DATA / f"train{pairs}.jsonl"]
    flags += ["--eval_data", DATA / f"validation{pairs}.jsonl"]
    if pairs:
        flags += ["--ref_cache", f"{out}-reference"]
    return [script, *map(str, flags), *COMMON.split(), *settings.split()]


def start(commands, ranks, restarts=0, **env):
    """A finished process, of Python or of torchrun over so many ranks, that ran the commands one
    after another."""
    python = [sys.executable]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        python += [*torchrun, f"--max-restarts={restarts}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    argv = [*python, __file__, "rank", json.dumps(commands)]
    return subprocess.run(argv, env=env, capture_output=True, text=True)


def logged(out):
    """{(step, name): value} of the losses, gradient norms and evaluations."""
    values = {}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if re.search("loss|grad_norm|rewards|accuracy", name):
                values[line["step"], name] = value
    return values


def differences(first, second):
    """The largest differences of two runs' logs, and of the tensors of their last checkpoints."""
    a, b = logged(first), logged(second)
    assert a.keys() == b.keys()
    log = max(abs(a[key] - b[key]) / max(1, abs(a[key])) for key in a)
    *_, checkpoint = sorted(first.glob("checkpoint-*"))
    weights = 0.0
    for file in checkpoint.glob("*model.safetensors"):
        tensors = load_file(file)
        others = load_file(second / checkpoint.name / file.name)
        for name, tensor in tensors.items():
            weights = max(weights, float((tensor - others[name]).abs().max()))
    return f"{log:.1e} | {weights:.1e}"


def check(ended, status=0):
    if ended.returncode != status:
        sys.exit(
            f"{ended.args}: {ended.returncode}\n{ended.stdout[-2000:]}{ended.stderr[-3000:]}"
        )


def compare(folder, cases, numbers):
    sent = {}
    for ranks in (1, *numbers):
        ended = start([command(case, folder / case / str(ranks)) for case in cases], ranks)
        check(ended)
        sent[ranks] = re.findall(r"bytes a step: ([\d,]+)", ended.stderr)
    for n, case in enumerate(cases):
        row = [case]
        for ranks in numbers:
            row += [differences(folder / case / "1", folder / case / str(ranks)), sent[ranks][n]]
        print(f"| {' | '.join(row)} |", flush=True)


def resume(folder, case, numbers):
    """Stops the run after step 2 with the first number of ranks, after 4 with the second, and ends
    it with the last."""
    alone, out = folder / case / "1", folder / "-".join(map(str, numbers))
    for n, ranks in enumerate(numbers):
        last = n == len(numbers) - 1
        env = {} if last else {"STOP_AT": str(2 * n + 2)}
        ended = start([command(case, out)], ranks, **env)
        check(ended, 0 if last else 143 if ranks == 1 else 1)  # torchrun's own status
    name = " → ".join(map(str, numbers))
    print(f"| {case}, {name} ranks | {differences(alone, out)} |", flush=True)


def disturb(folder, case, what, label):
    alone, out = folder / case / "1", folder / what
    ended = start([command(case, out)], 2, restarts=1, **{what: "3"})
    check(ended)
    print(f"| {case}, {label} | {differences(alone, out)} |", flush=True)
    return ended


# --- a rank ---------------------------------------------------------------------------------------


def at_step(variable, act):
    """Calls act() on the last rank when it takes up the step that an environment variable names;
    after a restart never."""
    step = os.environ.get(variable)
    if step is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    get = sft.Plan.__getitem__

    def patched(plan, number):
        if number == int(step) - 1 and distributed.rank() == distributed.size() - 1:
            act()
        return get(plan, number)

    sft.Plan.__getitem__ = patched


def run_out_of_memory():
    """The next micro-batch raises as CUDA does."""
    accumulate = sft.accumulate

    def poor(*args, **options):
        sft.accumulate = accumulate
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    sft.accumulate = poor


def count_bytes():
    """Prints, on the first rank, the bytes that it sends in the first step, as a ring does: adding
    up 2 (N-1)/N of a tensor, gathering N-1 times its own share."""
    sent, all_reduce, sum_gradients = [0], dist.all_reduce, sft.sum_gradients
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    all_gather = getattr(dist, name)

    def reduce(tensor, *args, **options):
        sent[0] += 2 * tensor.nbytes * (distributed.size() - 1) // distributed.size()
        return all_reduce(tensor, *args, **options)

    def gather(output, share, *args, **options):
        sent[0] += share.nbytes * (distributed.size() - 1)
        return all_gather(output, share, *args, **options)

    def step(*args, **options):
        before = sent[0]
        result = sum_gradients(*args, **options)
        if distributed.is_first() and options["seed"][-1] == 1:
            print(f"bytes a step: {sent[0] - before:,}", file=sys.__stderr__)
        return result

    dist.all_reduce, sft.sum_gradients = reduce, step
    setattr(dist, name, gather)


def rank():
    at_step("STOP_AT", lambda: os.kill(os.getpid(), signal.SIGTERM))
    at_step("KILL_AT", lambda: os.kill(os.getpid(), signal.SIGKILL))
    at_step("MEMORY_AT", run_out_of_memory)
    count_bytes()
    for script, *argv in json.loads(sys.argv[2]):
        run_command(lambda: {"sft": sft, "dpo": dpo}[script].main(argv))


def main():
    if sys.argv[1:2] == ["rank"]:
        return rank()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--cases", default=",".join(CASES))
    args = parser.parse_args()
    cases, numbers = args.cases.split(","), [*map(int, args.ranks.split(","))]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["PLAINTUNE_CACHE"] = str(folder / "cache")
        compare(folder, cases, numbers)
        for path in ([4, 2, 1], [1, 3]):
            resume(folder, cases[0], path)
        disturb(folder, cases[0], "KILL_AT", "a rank of two is killed at step 3")
        disturb(folder, cases[0], "MEMORY_AT", "a rank of two is out of memory at step 3")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
