"""Several ranks beside one process: the same numbers, whatever trains and however it is divided.

Every case trains the embedded model in one process and on 2 and 4 ranks over gloo, with the same
command and without dropout. Compared: every logged loss, metric and gradient norm (the largest
difference, relative to the number where that is above 1), and the tensors of the last checkpoint
(absolute). One process with micro-batches of half the tokens shows what rounding alone does. Then
a run is stopped and goes on with another number of ranks; a rank is killed with
SIGKILL under `torchrun --max-restarts 1`; and one of the ranks runs out of memory.

    python benchmarks/distributed.py [--ranks 2,4] [--cases sft-lora,dpo-4bit-base]
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import dpo  # noqa: E402
import sft  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from support import distributed  # noqa: E402
from support.errors import run_command  # noqa: E402
from support.files import write_stream  # noqa: E402

DATA = ROOT / "examples" / "mcqa"
COMMON = """
    --max_samples 45 --max_eval_samples 16 --eval_answers 2 --max_new_tokens 8 --logging_steps 1
    --per_device_train_batch_size 8 --num_train_epochs 1 --save_steps 2 --lora_r 8 --merge false
    --micro_batch_tokens 512 --report_to none --adam_epsilon 1e-5 --learning_rate 1e-3
"""
TRAINED = {"lora": "", "4bit": "--load_in_4bit true", "full": "--lora_r 0"}
MODES = {
    "replicas": "",
    "base": "--sharding base --gradient_checkpointing true",
    "grad_op": "--sharding grad_op --gradient_checkpointing true",
    "full": "--sharding full --gradient_checkpointing true",
}
RANKS = re.compile(r"^(no|base|grad_op|full) +([\d.]+) +([\d.]+)$", re.MULTILINE)
CASES = {
    f"{script}-{trained}-{mode}": (script, f"{TRAINED[trained]} {MODES[mode]}")
    for script in ("sft", "dpo")
    for trained in TRAINED
    for mode in MODES
    if mode == "replicas" or (trained == "full") == (mode != "base")
}


def command(case, out, *more):
    script, settings = CASES[case]
    pairs = "_pairs" if script == "dpo" else ""
    flags = ["--model", ROOT / "examples" / "tiny-qwen3", "--output_dir", out]
    flags += ["--data", DATA / f"train{pairs}.jsonl"]
    flags += ["--eval_data", DATA / f"validation{pairs}.jsonl"]
    if pairs:
        flags += ["--ref_cache", f"{out}-reference"]
    return [script, *map(str, flags), *COMMON.split(), *settings.split(), *more]


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
    half = "--micro_batch_tokens", "256"
    check(start([command(case, folder / case / "half", *half) for case in cases], 1))
    for n, case in enumerate(cases):
        row = [case, differences(folder / case / "1", folder / case / "half")]
        for ranks in numbers:
            row += [differences(folder / case / "1", folder / case / str(ranks)), sent[ranks][n]]
        print(f"| {' | '.join(row)} |", flush=True)


def resume(folder, case, numbers):
    """Stops the run after step 2 with the first number of ranks, after 4 with the second, and ends
    it with the last."""
    alone, out = folder / case / "1", folder / f"{case}-{'-'.join(map(str, numbers))}"
    for n, ranks in enumerate(numbers):
        last = n == len(numbers) - 1
        env = {} if last else {"STOP_AT": str(2 * n + 2)}
        ended = start([command(case, out)], ranks, **env)
        check(ended, 0 if last else 143 if ranks == 1 else 1)  # torchrun's own status
    name = " → ".join(map(str, numbers))
    print(f"| {case}, {name} ranks | {differences(alone, out)} |", flush=True)


def measure_memory(folder, model, kinds):
    """Memory of the first of two ranks beside what --dry_run --nproc 2 foresees: peak resident set
    in GB while loading and in the steps."""
    print("| run | loading | steps | foreseen | bytes sent in a step, foreseen |")
    for trained in kinds:
        plan = None
        for mode, settings in MODES.items():
            case = f"sft-{trained}-{mode}"
            if case not in CASES:
                continue
            more = (
                f"--gradient_checkpointing true --model {model} --eval_strategy no --max_steps 3"
            )
            more = [*more.split(), *"--eval_answers 0 --save_strategy no".split()]
            out = folder / case
            if plan is None:
                dry = start([command(case, out, *more, "--dry_run", "--nproc", "2")], 1)
                check(dry)
                plan = {mode: numbers for mode, *numbers in RANKS.findall(dry.stdout)}
            ended = start([command(case, out, *more)], 2)
            check(ended)
            loading = re.search(r"loading +[\d.]+ +([\d.]+)", ended.stdout)[1]
            steps = re.search(r"peak memory of the steps: ([\d.]+)", ended.stdout)[1]
            memory, sent = plan["no" if mode == "replicas" else mode]
            print(f"| {case} | {loading} | {steps} | {memory} | {sent} GB |", flush=True)
            shutil.rmtree(out)


# layers, hidden and intermediate size, heads, vocabulary, whether the head is tied; 8 key heads
SHAPES = {
    "Qwen3-4B": (36, 2560, 9728, 32, 151936, True),
    "Qwen3-8B": (36, 4096, 12288, 32, 151936, False),
    "Qwen3-32B": (64, 5120, 25600, 64, 151936, False),
    "Llama-3.3-70B": (80, 8192, 28672, 64, 128256, False),
}
KEYS = """num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size
    tie_word_embeddings""".split()


def write_shape(name, folder):
    """A checkpoint of a real shape in bf16, of which the weights are a hole in the file."""
    shutil.copytree(ROOT / "examples" / "tiny-qwen3", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(zip(KEYS, SHAPES[name]))
    config |= {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192}
    if name.startswith("Llama"):
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        tensors = Transformer(ModelConfig.read(folder)).bfloat16().state_dict()
    (folder / "model.safetensors").unlink()
    files = {}
    for number, (key, tensor) in enumerate(tensors.items()):  # no file is larger than the memory
        files[key] = f"{number}.safetensors"
        write_stream([], folder / files[key], {key: tensor})
        os.truncate(folder / files[key], os.path.getsize(folder / files[key]) + tensor.nbytes)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def print_table(folder, numbers):
    """What --dry_run --nproc foresees of a rank: GB of memory, and GB that it sends in a step."""
    rows = folder / "rows.jsonl"
    rows.write_text((json.dumps({"text": "the " * 4080}) + "\n") * 64)
    common = f"--data {rows} --output_dir {folder / 'run'} --dry_run true --dtype bfloat16"
    common += " --max_length 4096 --micro_batch_tokens 16384 --per_device_train_batch_size 64"
    print(f"| model | trains | --sharding | {' | '.join(f'{n} GPUs' for n in numbers)} |")
    for name in SHAPES:
        write_shape(name, folder / name)
        for trained, settings in TRAINED.items():
            flags = f"{common} --model {folder / name} --gradient_checkpointing true {settings}"
            table = {}
            for ranks in numbers:
                with redirect_stdout(StringIO()) as out:
                    sft.main([*flags.split(), "--nproc", str(ranks)])
                for mode, memory, sent in RANKS.findall(out.getvalue()):
                    table.setdefault(mode, []).append(f"{float(memory):.0f} / {float(sent):.3g}")
            for mode, cells in table.items():
                print(f"| {name} | {trained} | {mode} | {' | '.join(cells)} |", flush=True)


def disturb(folder, case, what, label):
    alone, out = folder / case / "1", folder / f"{case}-{what}"
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
    """The next micro-batch raises as CUDA does, in the first block's backward pass."""
    accumulate = sft.accumulate

    def poor(model, *args, **options):
        def fail(*_):
            hook.remove()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        sft.accumulate = accumulate
        hook = model.model.layers[0].mlp.register_full_backward_hook(fail)
        return accumulate(model, *args, **options)

    sft.accumulate = poor


def count_bytes():
    """Prints, on the first rank, the bytes that it sends in the first step, as a ring does: adding
    up 2 (N-1)/N of a tensor, gathering N-1 times its own share, scattering sums (N-1)/N."""
    sent, all_reduce, sum_gradients = [0], dist.all_reduce, sft.sum_gradients
    all_gather, reduce_scatter = dist.all_gather_single, dist.reduce_scatter_single

    def reduce(tensor, *args, **options):
        sent[0] += 2 * tensor.nbytes * (distributed.size() - 1) // distributed.size()
        return all_reduce(tensor, *args, **options)

    def gather(output, share, *args, **options):
        sent[0] += share.nbytes * (distributed.size() - 1)
        return all_gather(output, share, *args, **options)

    def scatter(output, input, *args, **options):
        sent[0] += output.nbytes * (distributed.size() - 1)
        return reduce_scatter(output, input, *args, **options)

    def step(*args, **options):
        before = sent[0]
        result = sum_gradients(*args, **options)
        if distributed.is_first() and options["seed"][-1] == 1:
            print(f"bytes a step: {sent[0] - before:,}", file=sys.__stderr__)
        return result

    dist.all_reduce, sft.sum_gradients = reduce, step
    dist.all_gather_single, dist.reduce_scatter_single = gather, scatter


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
    parser.add_argument("--disturbed", default="sft-lora-replicas,sft-lora-base,sft-full-full")
    parser.add_argument("--table", action="store_true", help="print what is foreseen instead")
    parser.add_argument("--memory", metavar="MODEL", help="measure memory instead, of this model")
    parser.add_argument("--trained", default=",".join(TRAINED), help="of --memory")
    args = parser.parse_args()
    cases, numbers = args.cases.split(","), [*map(int, args.ranks.split(","))]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["PLAINTUNE_CACHE"] = str(folder / "cache")
        if args.table:
            return print_table(folder, numbers)
        if args.memory:
            return measure_memory(folder, Path(args.memory).resolve(), args.trained.split(","))
        compare(folder, cases, numbers)
        for case in args.disturbed.split(","):
            for path in ([4, 2, 1], [1, 3]):
                resume(folder, case, path)
            disturb(folder, case, "KILL_AT", "a rank of two is killed at step 3")
            disturb(folder, case, "MEMORY_AT", "a rank of two is out of memory at step 3")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
