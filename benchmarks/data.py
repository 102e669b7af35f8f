"""Rendering and tokenising beside `datasets.map`, and the memory of large data sets.

speed: the rows of each set to ids and labels on disk (plaintune's cache, datasets' Arrow file, both
empty at the start). Every run is a fresh process, the two sides take turns, and the clock starts
when modules and tokenizer are loaded. datasets.map does what TRL's SFTTrainer does for masked
training: it applies the chat template and takes the assistant mask from TRL's training template
(batched, one process, the default of both libraries).

memory: text rows of about 20 tokens, generated here. Every start is a fresh process whose peak is
ru_maxrss; it loads the examples and reads 50 steps of 20 scattered examples, as a training plan
does.

    python benchmarks/data.py speed [--shared ../shared] [--repeats 5]  # rows per second, medians
    python benchmarks/data.py memory [--rows 1000,100000,1000000]      # peak MB, two starts
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
SETS = {"chat": "chat/identity_500.jsonl", "gsm8k": "gsm8k/train.jsonl"}

PLAINTUNE = """
from time import perf_counter
from data import Tokenizer, load_examples

tokenizer = Tokenizer(sys.argv[1])
tokenizer.end_ids  # computed on first use: not part of what is timed
start = perf_counter()
examples, ledger = load_examples(sys.argv[2], tokenizer)
seconds = perf_counter() - start
print(json.dumps([len(examples) / seconds, ledger.tokens, ledger.scored]))
"""
DATASETS = """
from pathlib import Path
from time import perf_counter
import datasets, trl
from transformers import AutoTokenizer

datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
template = (Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja").read_text()

def render(batch):
    rendered = tokenizer.apply_chat_template(
        batch["messages"],
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return {key: rendered[key] for key in ("input_ids", "assistant_masks")}

start = perf_counter()
rows = datasets.Dataset.from_json(sys.argv[2], cache_dir=sys.argv[3])
rows = rows.map(render, batched=True, remove_columns=rows.column_names)
seconds = perf_counter() - start
tokens = sum(map(len, rows["input_ids"]))
print(json.dumps([len(rows) / seconds, tokens, sum(map(sum, rows["assistant_masks"]))]))
"""
START = """
import resource
from time import perf_counter
from data import Tokenizer, load_examples

start = perf_counter()
examples, ledger = load_examples(sys.argv[2], Tokenizer(sys.argv[1]))
seconds = perf_counter() - start
for step in range(50):
    epoch = examples.epoch(0)
    for i in range(step * 20, step * 20 + 20):
        assert len(epoch[i * 7919 % len(epoch)][0].ids)
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def run_code(code, *args, **env):
    """Runs `code` in a fresh process; returns the JSON value of its last line."""
    code = f"import sys, json; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def chat_row(row):
    """A conversation; a question with its answer becomes one."""
    if "question" not in row:
        return row
    user = {"role": "user", "content": row["question"]}
    return {"messages": [user, {"role": "assistant", "content": row["answer"]}]}


def speed(shared, repeats):
    tokenizer = shared / "tokenizers" / "qwen3"
    for name, file in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            with open(shared / "data" / file, encoding="utf-8") as lines:
                rows = [chat_row(json.loads(line)) for line in lines]
            path = Path(folder, "rows.jsonl")
            path.write_text("\n".join(map(json.dumps, rows)))
            ours, theirs = [], []
            for n in range(repeats):
                cache = f"{folder}/theirs{n}"
                ours.append(run_code(PLAINTUNE, tokenizer, path, PLAINTUNE_CACHE=f"{folder}/{n}"))
                theirs.append(run_code(DATASETS, tokenizer, path, cache, HF_HUB_OFFLINE="1"))
            a = median(rows_per_second for rows_per_second, *_ in ours)
            b = median(rows_per_second for rows_per_second, *_ in theirs)
            print(
                f"{name}, {len(rows)} rows: plaintune {a:,.0f} rows/s, datasets.map {b:,.0f} "
                f"({a / b:.2f} times); tokens {ours[0][1]:,} and {theirs[0][1]:,}, "
                f"scored {ours[0][2]:,} and {theirs[0][2]:,}",
                flush=True,
            )


def memory(shared, sizes):
    tokenizer = shared / "tokenizers" / "qwen3"
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            with open(path, "w") as file:
                for n in range(size):
                    text = f"Row {n}: {n} plus {n % 97} is {n + n % 97}, as anybody can see."
                    file.write(json.dumps({"text": text}) + "\n")
            results = []
            for start in ("first", "second"):
                seconds, peak = run_code(START, tokenizer, path, PLAINTUNE_CACHE=folder)
                results.append(f"{start} start {peak:,.0f} MB, {seconds:.1f} s")
            print(f"{size:,} rows: {'; '.join(results)}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="1000,100000,1000000")
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.shared, args.repeats)
    else:
        memory(args.shared, [int(size) for size in args.rows.split(",")])


if __name__ == "__main__":
    main()
