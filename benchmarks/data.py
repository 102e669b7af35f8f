"""Rendering and tokenising beside `datasets.map` with transformers' tokenizer, and the memory that big sets take.

    python benchmarks/data.py speed [--shared ../shared] [--repeats 5]   # rows per second, medians of alternating runs
    python benchmarks/data.py memory [--rows 1000,100000,1000000]           # peak memory, first and second start

speed: each set's rows to ids and labels on disk (plaintune's cache, datasets' Arrow file, both new every time), each
run a fresh process, taking turns; the clock starts when modules and tokenizer are loaded. datasets.map does what TRL's
SFTTrainer asks of it for masked training: the chat template, and the assistant's mask from TRL's training template
(batched, one process, as both libraries' default). memory: text rows of about 20 tokens written on the spot, each start
a fresh process whose peak is ru_maxrss; a start loads the examples and reads 50 steps of 20, scattered, as a plan does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
SETS = {"chat": "chat/identity_500.jsonl", "gsm8k": "gsm8k/train.jsonl"}


def run(code, *args, **env):
    """What a fresh process prints as JSON."""
    command = [
        sys.executable,
        "-c",
        f"import sys, json; sys.path.insert(0, {str(HERE.parent)!r})\n{code}",
        *map(str, args),
    ]
    found = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


PLAINTUNE = """
from time import perf_counter
from data import Tokenizer, load_examples
tokenizer = Tokenizer(sys.argv[1])
tokenizer.end_ids
began = perf_counter()
examples, _, ledger = load_examples(sys.argv[2], tokenizer)
print(json.dumps([len(examples) / (perf_counter() - began), ledger.tokens, ledger.scored]))
"""
DATASETS = """
from time import perf_counter
from pathlib import Path
import datasets, trl
from transformers import AutoTokenizer
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
training = (Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja").read_text()
began = perf_counter()
rows = datasets.Dataset.from_json(sys.argv[2], cache_dir=sys.argv[3])
def render(batch):
    found = tokenizer.apply_chat_template(batch["messages"], chat_template=training, return_dict=True,
                                          return_assistant_tokens_mask=True)
    return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}
rows = rows.map(render, batched=True, remove_columns=rows.column_names)
seconds = perf_counter() - began
print(json.dumps([len(rows) / seconds, sum(map(len, rows["input_ids"])), sum(map(sum, rows["assistant_masks"]))]))
"""
START = """
import resource
from time import perf_counter
from data import Tokenizer, load_examples
began = perf_counter()
examples, _, ledger = load_examples(sys.argv[2], Tokenizer(sys.argv[1]))
seconds = perf_counter() - began
for step in range(50):
    part = examples.epoch(0)
    assert all(len(part[i * 7919 % len(part)][0].ids) for i in range(step * 20, step * 20 + 20))
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def speed(shared, repeats):
    tokenizer = shared / "tokenizers" / "qwen3"
    for name, file in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = [json.loads(line) for line in open(shared / "data" / file, encoding="utf-8")]
            if "question" in rows[0]:
                turns = [(("user", row["question"]), ("assistant", row["answer"])) for row in rows]
                rows = [
                    {"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns
                ]
            path = Path(folder, "rows.jsonl")
            path.write_text("\n".join(map(json.dumps, rows)))
            ours, theirs = [], []
            for n in range(repeats):
                ours.append(run(PLAINTUNE, tokenizer, path, PLAINTUNE_CACHE=f"{folder}/ours{n}"))
                theirs.append(
                    run(DATASETS, tokenizer, path, f"{folder}/theirs{n}", HF_HUB_OFFLINE="1")
                )
            a, b = (median(speed for speed, *_ in side) for side in (ours, theirs))
            print(
                f"{name}, {len(rows)} rows: plaintune {a:,.0f} rows/s, datasets.map {b:,.0f} ({a / b:.2f} times); "
                f"tokens {ours[0][1]:,} and {theirs[0][1]:,}, scored {ours[0][2]:,} and {theirs[0][2]:,}",
                flush=True,
            )


def memory(shared, sizes):
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            with open(path, "w") as file:
                for n in range(rows):
                    file.write(
                        json.dumps(
                            {
                                "text": f"Row {n}: {n} plus {n % 97} is {n + n % 97}, as anybody can see."
                            }
                        )
                        + "\n"
                    )
            starts = [
                run(START, shared / "tokenizers" / "qwen3", path, PLAINTUNE_CACHE=folder)
                for _ in "12"
            ]
            shown = "; ".join(
                f"{name} start {peak:,.0f} MB, {seconds:.1f} s"
                for name, (seconds, peak) in zip(("first", "second"), starts)
            )
            print(f"{rows:,} rows: {shown}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="1000,100000,1000000")
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.shared, args.repeats)
    else:
        memory(args.shared, [int(n) for n in args.rows.split(",")])
