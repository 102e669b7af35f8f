"""The loop: a plan that never changes the maths, a resume that can't be seen, mistakes that cost
nothing."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, write_checkpoint
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sft
from lora import add_lora, lora_layers
from model import Segment, load_model
from support import checkpoints, planner, tracking
from support.card import write_card
from support.errors import UserError, run_command
from support.files import read_header, write_tensors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder):
    """A byte-level tokenizer of 259 ids with a ChatML template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {
        token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    )
    (folder / "chat_template.jinja").write_text(CHATML)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("base") / "model", vocab_size=259)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """31 questions of different lengths: the last step of an epoch is a partial one."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": "word " * (i % 7) + f"number {i}?"},
                {"role": "assistant", "content": f"It is {i}.\nAnswer: {'ABCD'[i % 4]}"},
            ]
        }
        for i in range(31)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def flags(base, rows, out, **settings):
    settings = {
        "model": base,
        "data": rows,
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "num_train_epochs": 2,
        "save_steps": 3,
        "logging_steps": 2,
        "eval_answers": 0,
        "merge": False,
        "report_to": "none",
        **settings,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def without_times(path):
    """log.jsonl's lines less what a clock or the process's memory says, and less the closing
    line."""
    timed = {"tokens_per_second", "examples_per_second", "peak_memory_gb", "train_runtime"}
    return [
        {k: v for k, v in line.items() if k not in timed}
        for line in tracking.read_log(path)
        if "train_runtime" not in line
    ]


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the questions before and after ---------------------------------------------------------------


def test_questions_take_no_longer_than_the_run(capsys):
    """Before and after together they generate at most the tokens that are trained, but those that
    are shown are always asked; a long run asks all. Nothing of it depends on a clock."""
    examples = fake_examples(100)
    rows = [(example, None) for example in examples]
    for steps, asked in ((1, 3), (40, 7), (4000, 64)):
        settings = config(max_steps=steps, max_new_tokens=128)
        plan = sft.Plan(examples, settings)
        assert sft.count_questions(plan, rows, settings) == asked
        assert (f"asking {asked} of 64" in capsys.readouterr().out) == (asked < 64)
        trained = sum(sft.count_tokens(example) for n in range(steps) for example in plan[n])
        assert asked == 3 or 2 * 128 * asked <= trained * 1.1
    for answers in (0, 2):
        settings = config(max_steps=1, eval_answers=answers)
        assert sft.count_questions(sft.Plan(examples, settings), rows, settings) == answers
    assert "asking" not in capsys.readouterr().out


def test_an_evaluation_longer_than_the_run_is_told(capsys):
    """Scoring a token takes a third of training on it; before and after, a set is scored twice."""
    examples = fake_examples(100)
    rows = [(example, None) for example in examples]
    own = sum(map(sft.count_tokens, examples))
    for strategy, steps in (("epoch", 1), ("epoch", 4000), ("no", 1)):
        settings = config(max_steps=steps, eval_strategy=strategy)
        plan = sft.Plan(examples, settings)
        sft.count_questions(plan, rows, settings)
        longer = 2 * own > 3 * sum(map(sft.count_tokens, plan[0])) * steps
        assert longer == (steps == 1)
        told = "evaluating 100 rows, before and after, takes longer" in capsys.readouterr().out
        assert told == (longer and strategy != "no")


# --- the plan -------------------------------------------------------------------------------------


def config(**settings):
    return sft.SFTConfig(model="m", data=["d"], **settings)


def fake_examples(n):
    return [[Segment(np.arange(5 + i % 3), np.arange(5 + i % 3))] for i in range(n)]


def test_every_epoch_is_a_permutation_of_its_own():
    """Each example once an epoch, in another order the next, the same for the same seed; the last
    step may be partial."""
    examples = fake_examples(31)
    plan, again = (
        sft.Plan(
            examples,
            config(
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                num_train_epochs=2,
            ),
        )
        for _ in "ab"
    )
    assert len(plan) == 8 and [len(plan[i]) for i in range(8)] == [8, 8, 8, 7, 8, 8, 8, 7]
    epochs = [[id(e) for i in part for e in plan[i]] for part in (range(4), range(4, 8))]
    assert (
        sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(id, examples))
        and epochs[0] != epochs[1]
    )
    assert all([id(e) for e in plan[i]] == [id(e) for e in again[i]] for i in range(8))
    other = sft.Plan(examples, config(per_device_train_batch_size=8, seed=1))
    assert [id(e) for e in other[0]] != epochs[0][:8]


def test_max_steps_goes_on_into_the_next_epoch():
    plan = sft.Plan(fake_examples(10), config(per_device_train_batch_size=4, max_steps=7))
    assert len(plan) == 7 and [len(plan[i]) for i in range(7)] == [4, 4, 2, 4, 4, 2, 4]
    assert str(plan) == "7 steps of 4 examples"


def test_a_plan_says_what_a_step_really_takes():
    """Not 256 examples where there are 64."""
    settings = config(per_device_train_batch_size=256, num_train_epochs=1)
    assert str(sft.Plan(fake_examples(64), settings)) == "1 step of 64 examples"
    assert str(sft.Plan(fake_examples(1), settings)) == "1 step of 1 example"


@pytest.mark.parametrize(
    "warmup", [dict(warmup_ratio=0.1), dict(warmup_steps=7), dict(warmup_ratio=0.0)]
)
@pytest.mark.parametrize(
    "name, options",
    [
        ("cosine", {}),
        ("cosine", {"num_cycles": 0.8}),
        ("linear", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr": 2e-5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.4}),
        ("polynomial", {}),
        ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 20}),
        ("warmup_stable_decay", {"num_decay_steps": 15}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 9, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
        ),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 9, "decay_type": "linear", "num_stable_steps": 4},
        ),
    ],
)
def test_schedules_are_those_of_transformers(name, options, warmup):
    from transformers import get_scheduler

    settings = config(
        lr_scheduler_type=name, lr_scheduler_kwargs=options, learning_rate=3e-4, **warmup
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    steps = warmup.get("warmup_steps", math.ceil(50 * warmup.get("warmup_ratio", 0)))
    reference = get_scheduler(name, optimizer, steps, 50, scheduler_specific_kwargs=options)
    for step in range(50):
        assert sft.learning_rate(step, 50, settings) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15
        )
        optimizer.step()
        reference.step()


def test_dft_and_neftune_are_their_references(base, rows, monkeypatch):
    """DFT: TRL's loss, its gradient against autograd over whole logits. NEFTune: the embeddings of
    transformers' hook from the same random state, one row at a time; none in evaluation."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = load_model(base).requires_grad_(True)
    (example, *others) = [*sft.load_examples([str(rows)], sft.Tokenizer(base))[0]][:4]
    batch = sft.Batch.pack([example])
    loss, _ = sft.dft_loss(model, batch)
    (ours,) = torch.autograd.grad(loss, model.model.embed_tokens.weight)
    logps = model.logits(model(batch)[batch.scored]).log_softmax(-1)
    logps = logps.gather(1, batch.targets[:, None])[:, 0]
    theirs = -(logps * logps.exp().detach()).sum()
    (expected,) = torch.autograd.grad(theirs, model.model.embed_tokens.weight)
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()

    embedding = model.model.embed_tokens
    plain = embedding(batch.tokens).detach()
    sft.add_embedding_noise(model, alpha=5.0)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    for mode in (True, False):
        torch.manual_seed(3)
        model.train(mode)(batch)
    torch.manual_seed(3)
    hook = SimpleNamespace(training=True, neftune_noise_alpha=5.0)
    reference = neftune_post_forward_hook(hook, None, plain[None])[0]
    assert (seen[0] - reference).abs().max() < 1e-6 < 0.01 < (seen[0] - plain).abs().max()
    assert torch.equal(seen[1], plain)
    together = sft.Batch.pack([example, *others])  # a row's noise goes by its own length
    model.train(True)(together)
    noise = (seen[2] - embedding.weight[together.tokens]).abs()
    for (start, stop, _), length in zip(together.segments, together.lengths):
        bound = 5.0 / (length * plain.shape[1]) ** 0.5
        assert 0.9 * bound < noise[start:stop].max() <= bound * 1.0001


def test_any_cut_into_micro_batches_gives_the_same_gradient(base, rows):
    """1×8 = 8×1 = any token budget: one division by the planned count, gradients to 1e-6 of their
    size."""
    model = load_model(base)
    add_lora(model, config(lora_r=4, bias="none", modules_to_save=["norm"]), seed=1)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    examples, _ = sft.load_examples([str(rows)], sft.Tokenizer(base))
    examples = examples[:8]
    count = sum(map(sft.count_scored, examples))
    found = []
    for budget in (1, 250, 400, 10**6):
        model.zero_grad()
        loss, _ = sft.accumulate(model, examples, count, sft.sft_loss, budget)
        found.append(
            (
                loss,
                {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad},
            )
        )
    sizes = [len(list(sft.split_by_tokens(examples, budget))) for budget in (1, 250, 400, 10**6)]
    assert sizes[0] == 8 > sizes[1] > sizes[2] > sizes[3] == 1
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for name, value in gradient.items():
            assert (value - found[0][1][name]).abs().max() <= 1e-6 * found[0][1][
                name
            ].abs().max() + 1e-9, name


def test_the_logged_loss_is_the_mean_over_scored_tokens(base, rows, tmp_path):
    """The first line of the log equals transformers' cross entropy over the same rows, before
    anything was learned."""
    from transformers import AutoModelForCausalLM

    sft.main(
        flags(
            base,
            rows,
            tmp_path / "run",
            per_device_train_batch_size=31,
            gradient_accumulation_steps=1,
            max_steps=1,
            logging_steps=1,
        )
    )
    examples, _ = sft.load_examples([str(rows)], sft.Tokenizer(base))
    reference, total, count = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        0.0,
        0,
    )
    for (segment,) in examples:
        logits = reference(torch.tensor(segment.ids[None], dtype=torch.long)).logits[0, :-1]
        labels = torch.tensor(segment.labels[1:], dtype=torch.long)
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    line = tracking.read_log(tmp_path / "run" / "log.jsonl")[0]
    assert line["scored_tokens"] == count and line["loss"] == pytest.approx(
        total / count, rel=1e-5
    )


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(lora_r=0, learning_rate=1e-3),
        dict(modules_to_save="norm", use_rslora=True),
        dict(gradient_checkpointing=True),
        dict(optim="adafactor", neftune_noise_alpha=5, modules_to_save="norm"),
        dict(optim="lion_8bit", lora_r=64, loss_type="dft", lr_scheduler_type="polynomial"),
    ],
    ids=str,
)
def test_two_halves_are_the_whole_bit_for_bit(base, rows, tmp_path, settings):
    """8 steps, against 8 steps of which the last 5 were done again from the checkpoint in
    mid-epoch: adapter, optimizer and log are equal to the last bit, dropout on."""
    sft.main(flags(base, rows, tmp_path / "whole", **settings))
    sft.main(flags(base, rows, tmp_path / "halves", **settings))
    for path in (tmp_path / "halves").iterdir():
        if path.name in ("checkpoint-000006", "checkpoint-000008", "adapter", "merged"):
            subprocess.run(["rm", "-r", path], check=True)
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "halves")] == ["checkpoint-000003"]
    log = (tmp_path / "halves" / "log.jsonl").read_text().splitlines()
    (tmp_path / "halves" / "log.jsonl").write_text(
        "\n".join(log[:3]) + '\n{"step": 6, "half a li'
    )  # what a kill leaves
    sft.main(flags(base, rows, tmp_path / "halves", **settings))
    names = [
        "optimizer.safetensors",
        "model.safetensors" if settings.get("lora_r") == 0 else "adapter_model.safetensors",
    ]
    for name in names:
        assert same_tensors(
            *(tmp_path / run / "checkpoint-000008" / name for run in ("whole", "halves"))
        ), name
    assert without_times(tmp_path / "whole" / "log.jsonl") == without_times(
        tmp_path / "halves" / "log.jsonl"
    )


def test_a_resumed_optimizer_has_all_of_its_state_where_its_parameter_is(undisturbed):
    """Also the count of steps, which fused AdamW on a GPU reads there; `meta` stands for a GPU."""
    checkpoint = undisturbed[1] / "checkpoint-000008"
    parameters, state = {}, checkpoints.read_state(checkpoint)
    for key, (_, shape, _) in read_header(checkpoint / "optimizer.safetensors").items():
        if key.endswith(":exp_avg"):
            tensor = torch.empty(shape, device="meta")
            parameters[key.removesuffix(":exp_avg")] = torch.nn.Parameter(tensor)
    settings = config(resume=str(checkpoint))
    optimizer = torch.optim.AdamW(parameters.values())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    plan = sft.Plan(fake_examples(1), settings)
    plan.fingerprint = state.data
    checkpoints.resume(settings, {}, parameters, optimizer, scaler, plan, state.origin)
    states = [optimizer.state[p] for p in parameters.values()]
    devices = {value.device.type for slots in states for value in slots.values()}
    assert devices == {"meta"} and all("step" in slots for slots in states)


@pytest.mark.parametrize("optim", sft.OPTIMIZERS)
def test_every_optimizer_resumes_bit_for_bit(optim, tmp_path):
    """5 steps, against 3 whose states went through a checkpoint, then 2: a matrix, a vector."""
    generator, runs = torch.Generator().manual_seed(0), []
    start = {
        "m": torch.randn(90, 70, generator=generator),
        "v": torch.randn(7, generator=generator),
    }
    gradients = [
        {n: torch.randn(p.shape, generator=generator) for n, p in start.items()} for _ in range(5)
    ]
    settings = config(optim=optim, output_dir=str(tmp_path))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    plan = sft.Plan(fake_examples(8), settings)

    def begin(values):
        parameters = {n: torch.nn.Parameter(p.clone()) for n, p in values.items()}
        return parameters, sft.make_optimizer(parameters, settings)

    def advance(parameters, optimizer, gradients):
        for values in gradients:
            for n, p in parameters.items():
                p.grad = values[n].clone()
            optimizer.step()

    for stop in (5, 3):
        parameters, optimizer = begin(start)
        advance(parameters, optimizer, gradients[:stop])
        if stop == 3:
            state = checkpoints.RunState(plan.fingerprint, {}, step=3)
            log = type("Log", (), {"sync": lambda self: 0})()
            write = partial(save_parameters, parameters)
            sft.save_checkpoint(state, parameters, optimizer, scaler, log, settings, write)
            parameters, optimizer = begin(start)
            resumed = sft.resume(settings, parameters, parameters, optimizer, scaler, plan, {})
            assert resumed.step == 3
            advance(parameters, optimizer, gradients[3:])
        runs.append(parameters)
    for name, p in start.items():
        assert torch.equal(runs[0][name], runs[1][name]) and not torch.equal(runs[0][name], p)


def save_parameters(parameters, folder):
    write_tensors({n: p.detach() for n, p in parameters.items()}, folder / "model.safetensors")


def test_sigterm_saves_and_the_same_command_goes_on(base, rows, tmp_path):
    """A stopped run exits 143 with a checkpoint; run again it ends where an undisturbed run
    ends."""
    argv = flags(base, rows, tmp_path / "stopped", num_train_epochs=20, save_steps=1000)
    one_thread = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as here: another number of threads adds up in another order
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "sft.py"), *argv],
        env=one_thread,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = tmp_path / "stopped" / "log.jsonl"
    deadline = time.time() + 120
    while (
        not (log.exists() and len(log.read_text().splitlines()) >= 2)
        and time.time() < deadline
        and run.poll() is None
    ):
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output and "stopped after step" in output
    (stopped,) = checkpoints.checkpoints(tmp_path / "stopped")
    assert 0 < int(stopped.name[-6:]) < 80
    sft.main(argv)
    sft.main(flags(base, rows, tmp_path / "whole", num_train_epochs=20, save_steps=1000))
    assert same_tensors(
        *(
            tmp_path / run / "checkpoint-000080" / "adapter_model.safetensors"
            for run in ("stopped", "whole")
        )
    )
    assert without_times(log) == without_times(tmp_path / "whole" / "log.jsonl")


def test_a_run_killed_anywhere_ends_as_if_it_had_not_been():
    """benchmarks/resume.py, a few of its kills: SIGKILL at random moments, then byte equality."""
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "resume.py"),
            "--kills",
            "3",
            "--cases",
            "lora",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "3 kills, 1 cases, 0 of them not equal" in run.stdout, (
        run.stdout + run.stderr
    )


def test_a_damaged_checkpoint_is_left_out_and_named(base, rows, tmp_path, capsys):
    """A byte changed, a file cut short, one gone, a manifest that is none: the newest whole one is
    gone on from, to the same end; --resume of a damaged one is refused."""
    sft.main(flags(base, rows, tmp_path / "whole", save_steps=1))
    run = tmp_path / "run"
    sft.main(flags(base, rows, run, save_steps=1))
    last, *others = checkpoints.checkpoints(run)[::-1]
    flipped = bytearray((last / "adapter_model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (last / "adapter_model.safetensors").write_bytes(flipped)
    os.truncate(others[0] / "optimizer.safetensors", 100)
    (others[1] / "state.json").unlink()
    (others[2] / "manifest.json").write_text("{")
    (others[3] / "manifest.json").write_text("{}")
    os.truncate(
        run / "log.jsonl", (run / "log.jsonl").read_text().rindex("\n", 0, -1) + 1
    )  # as if it had not finished
    error = refuse(flags(base, rows, run, save_steps=1, resume=last), capsys)
    assert (
        last.name in error
        and "damaged (adapter_model.safetensors is not the file written)" in error
    )
    sft.main(flags(base, rows, run, save_steps=1))
    told = capsys.readouterr().out
    assert (
        f"{last} is damaged and skipped: adapter_model.safetensors is not the file written"
        in told
    )
    assert "state.json is missing" in told and "manifest.json: not valid JSON" in told
    assert f"resuming from {others[4]}" in told
    assert same_tensors(
        *(tmp_path / r / last.name / "adapter_model.safetensors" for r in ("whole", "run"))
    )
    assert without_times(tmp_path / "whole" / "log.jsonl") == without_times(run / "log.jsonl")


def test_only_a_number_makes_a_checkpoint_a_runs_own(base, rows, tmp_path):
    """The user's copies, links and files are never deleted nor the newest; the others go by
    number, not by name."""
    own = ["checkpoint-000003", "checkpoint-20", "checkpoint-1000000"]
    odd = ["-best", "-9-copy", "-", "-٣", "-+4", "-000008.bak", "-1e3", "_5"]
    for name in [*own, *(f"checkpoint{end}" for end in odd)]:
        (tmp_path / "names" / name).mkdir(parents=True)
    (tmp_path / "names" / "checkpoint-000007").symlink_to(tmp_path)
    (tmp_path / "names" / "checkpoint-000009").write_text("")
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "names")] == own

    run = tmp_path / "run"
    argv = flags(base, rows, run, save_total_limit=1)
    sft.main(argv)
    (run / "checkpoint-000008").rename(run / "checkpoint-best")
    (run / "checkpoint-100").symlink_to(run / "checkpoint-best")
    files = {path.name: path.read_bytes() for path in (run / "checkpoint-best").iterdir()}
    subprocess.run(["sed", "-i", "$d", run / "log.jsonl"], check=True)
    (run / ".checkpoint-000005.old").mkdir()
    sft.main(argv)
    names = ["checkpoint-000008", "checkpoint-100", "checkpoint-best"]
    assert sorted(path.name for path in run.glob("*checkpoint*")) == names
    for path in (run / "checkpoint-best").iterdir():
        assert files[path.name] == path.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(base, rows, tmp_path_factory):
    """(the flags of a run that evaluates, logs and saves at other steps; its folder)."""
    settings = dict(
        eval_data=rows,
        max_eval_samples=5,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=100,
        micro_batch_tokens=200,
        metric_for_best_model="loss",
        early_stopping_patience=6,
    )
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    sft.main(flags(base, rows, folder, **settings))
    return settings, folder


def ends_like(undisturbed, run):
    """Whether a run has the last checkpoint, the adapter and the log of the undisturbed one."""
    _, whole = undisturbed
    names = [
        f"checkpoint-000008/{name}.safetensors" for name in ("adapter_model", "optimizer")
    ] + ["adapter/adapter_model.safetensors"]
    return all(same_tensors(whole / name, run / name) for name in names) and without_times(
        whole / "log.jsonl"
    ) == without_times(run / "log.jsonl")


@pytest.mark.parametrize(
    "where, error, step",
    [
        ("backward", RuntimeError("no such kernel"), 4),
        ("backward", KeyboardInterrupt(), 4),
        ("data", KeyError("row"), 4),
        ("evaluation", ZeroDivisionError(), 4),
        ("evaluation", SystemExit(3), 4),
        ("log", OSError(28, "No space left on device"), 4),
        ("tracker", KeyboardInterrupt(), 6),
    ],
)
def test_any_error_saves_the_last_whole_step(
    where, error, step, undisturbed, base, rows, tmp_path, monkeypatch
):
    """In the middle of a backward pass, in an evaluation, behind half a line of the log: what is
    saved is a whole step, and the same command ends where an undisturbed run ends, each line and
    evaluation once."""
    argv = flags(base, rows, tmp_path / "run", **undisturbed[0])
    calls = []

    def after(count, function, *args, **options):
        """`function`, which raises at its call number `count`, when it is half done."""
        calls.append(0)
        result = function(*args, **options)
        if len(calls) == count:
            raise error
        return result

    with monkeypatch.context() as patch:
        if where == "backward":  # the second micro-batch of step 5
            backward = torch.Tensor.backward
            steps = []
            loaded = sft.accumulate

            def accumulate(*args, **options):
                steps.append(torch.is_grad_enabled())
                if sum(steps) == 5 and steps[-1]:
                    calls.clear()
                    patch.setattr(torch.Tensor, "backward", lambda t: after(2, backward, t))
                return loaded(*args, **options)

            patch.setattr(sft, "accumulate", accumulate)
        elif where == "data":
            get = sft.Plan.__getitem__  # the first call is of `count_questions`
            patch.setattr(sft.Plan, "__getitem__", lambda *args: after(6, get, *args))
        elif where == "evaluation":  # at the steps 0, 2, 4
            loaded = sft.evaluate_loss
            patch.setattr(sft, "evaluate_loss", lambda *args: after(3, loaded, *args))
        else:
            write = tracking.Log.write

            def half(log, line):
                if line["step"] == step and ("loss" in line) == (where == "log"):
                    log.file.write('{"step": 4, "lo')
                    log.file.flush()
                    raise error
                return write(log, line)

            patch.setattr(tracking.Log, "write", half)
        with pytest.raises(type(error)):
            sft.main(argv)
    (saved,) = checkpoints.checkpoints(tmp_path / "run")
    assert saved.name == f"checkpoint-{step:06d}" and not checkpoints.damage(saved)
    sft.main(argv)
    assert ends_like(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("terminal", ["closed pipe", "full disk"])
def test_a_run_outlives_its_terminal(terminal, undisturbed, base, rows, tmp_path):
    argv = flags(base, rows, tmp_path / "run", **undisturbed[0])
    argv = [sys.executable, str(ROOT / "sft.py"), *argv]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    if terminal == "full disk":
        with open("/dev/full", "w") as full:
            run = subprocess.run(argv, env=one_thread, stdout=full, stderr=full)
    else:
        run = subprocess.Popen(argv, env=one_thread, stdout=-1, stderr=subprocess.STDOUT)
        run.stdout.readline()
        run.stdout.close()
        run.wait(200)
    assert run.returncode == 0 and ends_like(undisturbed, tmp_path / "run")
    assert "saved in" in (tmp_path / "run" / "run.log").read_text()


def test_a_run_outlives_its_cache(undisturbed, base, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    loaded = sft.load_to_train

    def load(*args):
        assert any((tmp_path / "cache").iterdir())
        subprocess.run(["rm", "-r", tmp_path / "cache"], check=True)
        return loaded(*args)

    monkeypatch.setattr(sft, "load_to_train", load)
    sft.main(flags(base, rows, tmp_path / "run", **undisturbed[0]))
    assert ends_like(undisturbed, tmp_path / "run")


@pytest.mark.parametrize(
    "file", ["data.bin", "index.bin", "ledger.json", "cut", "gone", "list", "other"]
)
def test_a_damaged_cache_is_made_anew(file, base, rows, tmp_path, monkeypatch):
    """A bit, the end, a file; a ledger that is a list or another's: the same examples again."""
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path))
    tokenizer = sft.Tokenizer(base)

    def load():
        examples, ledger = sft.load_examples([str(rows)], tokenizer)
        ids = [[segment.ids.tolist() for segment in example] for example in examples]
        return (
            ids,
            [examples.row(n) for n in range(len(ids))],
            examples.fingerprint,
            str(ledger),
        )

    before = load()
    (cache,) = tmp_path.iterdir()
    content = {path.name: path.read_bytes() for path in cache.iterdir()}
    if file in content:
        damaged = bytearray(content[file])
        damaged[len(damaged) // 2] ^= 1
        (cache / file).write_bytes(damaged)
    elif file == "cut":
        os.truncate(cache / "data.bin", 1000)
    elif file == "gone":
        (cache / "index.bin").unlink()
    else:
        (cache / "ledger.json").write_text("[]" if file == "list" else '{"shape": 3}')
    assert load() == before
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == content


def test_left_over_folders_of_the_cache_go_unless_somebody_writes_them(
    base, rows, tmp_path, monkeypatch
):
    from support.files import locked_folder

    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path))
    for name in ("tmp1.partial", "tmp2.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.bin").write_bytes(b"half")
    with locked_folder(tmp_path / "tmp2.partial"):
        _, ledger = sft.load_examples([str(rows)], sft.Tokenizer(base))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[1] == "tmp2.partial" and ledger.examples == 31


@pytest.mark.parametrize("place", ["", "~", "~no-such-user/cache", "/dev/null/cache"])
def test_where_the_cache_is(place, base, rows, tmp_path, monkeypatch):
    """Empty means the default, never the working directory; no place is told with its variable."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLAINTUNE_CACHE", place)
    monkeypatch.chdir(tmp_path)
    expected = nullcontext()
    if len(place) > 1:
        expected = pytest.raises(UserError, match="PLAINTUNE_CACHE: no folder")
    with expected:
        sft.load_examples([str(rows)], sft.Tokenizer(base))
        default = ".cache/plaintune" if not place else "."
        assert len(list((tmp_path / "home" / default).iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


ORIGINS = {
    "smaller rank": (dict(lora_r=2), "lora_r (4 there, 2 now)"),
    "rank of a layer": (dict(rank_pattern='{"q_proj": 2}'), "rank_pattern"),
    "targets": (dict(target_modules="q_proj"), "target_modules"),
    "layers": (dict(layers_to_transform="1"), "layers_to_transform"),
    "alpha": (dict(lora_alpha=8), "lora_alpha (32 there, 8.0 now)"),
    "scale": (dict(use_rslora="true"), "use_rslora"),
    "another kind": (dict(use_dora="true"), "use_dora"),
    "a start in the base": (dict(init_lora_weights="pissa"), "init_lora_weights"),
    "all weights": (dict(lora_r=0), "lora_r (4 there, 0 now)"),
    "optimizer": (dict(optim="adamw_8bit"), 'optimizer ("AdamW" there, "AdamW8bit" now)'),
    "another base": (dict(model="other"), "weights of --model"),
    "a longer base": (dict(model="longer"), "weights of --model"),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_a_checkpoint_of_another_start_is_refused(
    case, undisturbed, base, rows, tmp_path, capsys
):
    """--resume names a checkpoint; what differs is named, and nothing is trained."""
    settings, name = ORIGINS[case]
    if "model" in settings:
        layers = 3 if case == "a longer base" else 2
        settings = {"model": tmp_path / "model"}
        write_checkpoint(settings["model"], seed=1, vocab_size=259, num_hidden_layers=layers)
        write_tokenizer(settings["model"])
    settings = {
        **undisturbed[0],
        "resume": undisturbed[1] / "checkpoint-000008",
        **settings,
    }
    error = refuse(flags(base, rows, tmp_path / "run", **settings), capsys)
    assert name in error and "checkpoint-000008: was trained with" in error


def test_other_weights_in_the_base_are_refused(base, rows, tmp_path, capsys):
    """The base's file is another one of the same size; so is the adapter's that training began
    from. Another name for the same optimizer, and another dropout of a named checkpoint, go on."""
    import shutil

    from safetensors.torch import save_file

    model, first, run = (tmp_path / name for name in ("model", "first", "run"))
    shutil.copytree(base, model)
    sft.main(flags(model, rows, first, num_train_epochs=1))
    argv = flags(model, rows, run, adapter=first)
    sft.main(argv)
    subprocess.run(["sed", "-i", "$d", run / "log.jsonl"], check=True)
    for file, name in (
        (model / "model.safetensors", "weights of --model"),
        (first / "adapter" / "adapter_model.safetensors", "weights of --adapter"),
    ):
        old = file.read_bytes()
        save_file({name: t * 1.01 for name, t in load_file(file).items()}, file, {"format": "pt"})
        error = refuse(argv, capsys)
        assert name in error and "there" in error
        file.write_bytes(old)
    settings = dict(resume=run / "checkpoint-000006", lora_dropout=0, optim="adamw_torch")
    sft.main(flags(model, rows, tmp_path / "next", adapter=first, **settings))
    assert (tmp_path / "next" / "checkpoint-000008").is_dir()


@pytest.mark.parametrize(
    "values",
    [
        {"step": "8"},
        {"step": 8.0},
        {"step": -1},
        {"step": True},
        {"window": None},
        {"window": {"loss": "low"}},
        {"best": []},
        {"origin": "x"},
        {"data": 31},
        {"colour": "red"},
        {"scaler": ...},
    ],
)
def test_an_odd_state_is_damage(values, undisturbed, tmp_path):
    """Though its manifest says that it is the file written."""
    import shutil

    checkpoint = shutil.copytree(undisturbed[1] / "checkpoint-000008", tmp_path / "c")
    state = json.loads((checkpoint / "state.json").read_text()) | values
    state = {name: value for name, value in state.items() if value is not ...}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(checkpoints.hash_files(checkpoint)))
    (checkpoint / "notes").mkdir()
    assert "state.json" in checkpoints.damage(checkpoint)
    shutil.copy(undisturbed[1] / "checkpoint-000008" / "state.json", checkpoint)
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(checkpoints.hash_files(checkpoint)))
    assert not checkpoints.damage(checkpoint)


@pytest.mark.parametrize(
    "end",
    [
        b'{"step": 8, "lo',
        b"{]\n",
        b"3\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b"\0" * 64,
        b'{"loss": 1}\n',
    ]
    + [b'{"step": "x", "train_runtime": 1}\n', b"[" * 99999 + b"\n"],
)
def test_a_damaged_line_of_the_log_is_left_out(end, tmp_path):
    """The last one, and one in the middle once the run has gone on behind it."""
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    file = tmp_path / "log.jsonl"
    file.write_bytes("".join(f"{json.dumps(line)}\n" for line in good).encode() + end)
    assert tracking.read_log(file) == good
    log = tracking.Log(tmp_path, size=10**6)
    log.write({"step": 3, "loss": 1.0})
    assert tracking.read_log(file) == [*good, {"step": 3, "loss": 1.0}]
    assert log.sync() == file.stat().st_size


def test_two_runs_do_not_work_in_one_folder(base, rows, tmp_path, capsys):
    """The second says so and leaves all as it is; the lock goes with the process that had it, even
    one killed."""
    holder = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from support.files import locked_folder\n"
        "with locked_folder(sys.argv[1]):"
    )
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{holder} print('held', flush=True); time.sleep(60)",
            str(tmp_path / "run"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout.readline() == "held\n"
    argv = flags(base, rows, tmp_path / "run", num_train_epochs=1)
    for extra in ([], ["--overwrite_output_dir"]):
        assert "another run is using this folder" in refuse([*argv, *extra], capsys)
    held.kill()
    held.wait()
    sft.main(argv)
    assert (tmp_path / "run" / "adapter").exists()


# --- what goes wrong in a step --------------------------------------------------------------------


class GivesOut(torch.autograd.Function):
    """Its backward finds no memory, after that of what lies behind it in the graph has run."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def gradient(model, examples, loss_fn, micro_batch_tokens, dropout_seed=3):
    settings = config(micro_batch_tokens=micro_batch_tokens)
    model.zero_grad()
    found = sft.compute_gradient(
        model, examples, 100, loss_fn, settings, dropout_seed, lambda loss: loss
    )
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return *found, grads, settings.micro_batch_tokens


@pytest.mark.parametrize("where", ["forward", "backward", "cpu"])
@pytest.mark.parametrize(
    "settings", [dict(lora_dropout=0.2), dict(lora_r=0)], ids=["lora", "full"]
)
def test_out_of_memory_splits_the_micro_batch_and_the_gradient_stays(
    base, rows, settings, where, capsys
):
    """Bit-equal to the gradient at the smaller budget from the start, dropout and all, also when
    backward had got halfway; without dropout equal to the unsplit one."""
    model = load_model(base)
    add_lora(model, config(**settings), seed=1)
    examples = [*sft.load_examples([str(rows)], sft.Tokenizer(base))[0]]
    total = sum(map(sft.count_tokens, examples))
    seen = []

    def poor(model, batch):
        seen.append(len(batch.tokens))
        if len(batch.tokens) <= total // 3:
            return sft.sft_loss(model, batch)
        if where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if where == "cpu":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        hook = model.model.layers[0].register_forward_hook(lambda m, i, out: GivesOut.apply(out))
        try:
            return -model.logps(batch).sum(), {}
        finally:
            hook.remove()

    model.train()
    loss, _, found, budget = gradient(model, examples, poor, total)
    told = capsys.readouterr().out
    assert budget == total // 4 and max(seen) == total and told.count("out of memory at") == 2, (
        budget,
        told,
    )
    same_loss, _, same, _ = gradient(model, examples, sft.sft_loss, budget)
    assert loss == same_loss and found.keys() == same.keys()
    assert all(torch.equal(found[name], same[name]) for name in same)
    model.eval()
    split, unsplit = (gradient(model, examples, f, total)[2] for f in (poor, sft.sft_loss))
    for name, grad in unsplit.items():
        assert (split[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-9, name


def test_memory_that_suffices_for_no_example_ends_the_run_and_keeps_it(
    base, rows, tmp_path, capsys, monkeypatch
):
    """From some step on nothing fits: the message names ways out, what was trained until then is
    kept, and with one of them the same command goes on to the end of an undisturbed run. Other
    errors are not taken for it."""
    sft.main(flags(base, rows, tmp_path / "whole", save_steps=100, micro_batch_tokens=4096))
    steps, loaded = [], sft.sft_loss

    def poor(model, batch):
        steps.extend(
            [len(batch.tokens)] * (type(batch.tokens) is torch.Tensor)
        )  # the planner's are fake
        if len(steps) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loaded(model, batch)

    argv = flags(base, rows, tmp_path / "run", save_steps=100, micro_batch_tokens=4096)
    monkeypatch.setattr(sft, "sft_loss", poor)
    error = refuse(argv, capsys)
    assert "out of memory" in error and "--gradient_checkpointing" in error
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-000005"]
    monkeypatch.setattr(sft, "sft_loss", loaded)
    sft.main([*argv, "--gradient_checkpointing"])
    assert same_tensors(
        *(
            tmp_path / r / "checkpoint-000008" / "adapter_model.safetensors"
            for r in ("whole", "run")
        )
    )
    monkeypatch.setattr(sft, "sft_loss", lambda model, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sft.main(flags(base, rows, tmp_path / "other"))


def test_a_lowered_budget_outlives_a_resume(base, rows, tmp_path, monkeypatch):
    """Memory gives out in step 5; stopped after step 6 and gone on, the run is the one that was
    never stopped, down to how its micro-batches are cut."""
    for run in ("whole", "halves"):
        sizes, loaded = [], sft.sft_loss

        def poor(model, batch, sizes=sizes, loaded=loaded):
            sizes.extend(
                [len(batch.tokens)] * (type(batch.tokens) is torch.Tensor)
            )  # the planner's are fake
            if len(sizes) > 4 and len(batch.tokens) > 260:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loaded(model, batch)

        with monkeypatch.context() as patch:
            patch.setattr(sft, "sft_loss", poor)
            sft.main(flags(base, rows, tmp_path / run, micro_batch_tokens=4096))
        if run == "halves":
            state = json.loads((tmp_path / run / "checkpoint-000006" / "state.json").read_text())
            assert 0 < state["lowered"] <= 260
            subprocess.run(
                [
                    "rm",
                    "-r",
                    tmp_path / run / "checkpoint-000008",
                    tmp_path / run / "adapter",
                ],
                check=True,
            )
            log = (tmp_path / run / "log.jsonl").read_text().splitlines()
            (tmp_path / run / "log.jsonl").write_text("\n".join(log[:-1]) + "\n")
            sft.main(flags(base, rows, tmp_path / run, micro_batch_tokens=4096))
    assert same_tensors(
        *(
            tmp_path / r / "checkpoint-000008" / "optimizer.safetensors"
            for r in ("whole", "halves")
        )
    )


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_with_its_rows_in_the_log(
    base, rows, tmp_path, monkeypatch, spoilt
):
    """The row that makes it so is among those named, the step leaves the weights alone, and the run
    goes on."""
    bad = sft.Plan(
        sft.load_examples([str(rows)], sft.Tokenizer(base))[0],
        config(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1),
    )
    target = bad[1][3][0].ids
    loaded = sft.sft_loss

    def spoil(model, batch):
        loss, metrics = loaded(model, batch)
        if any(np.array_equal(batch.tokens[a:b].numpy(), target) for a, b, _ in batch.segments):
            factor = torch.tensor(float("nan")) if spoilt == "loss" else torch.tensor(0.0)
            loss = (
                loss * factor
                if spoilt == "loss"
                else loss + 0 * (model.logps(batch).sum() * factor).sqrt()
            )
        return loss, metrics

    monkeypatch.setattr(sft, "sft_loss", spoil)
    argv = flags(base, rows, tmp_path / "run", num_train_epochs=1, save_steps=1, logging_steps=1)
    sft.main(argv)
    lines = tracking.read_log(tmp_path / "run" / "log.jsonl")
    (line,) = [line for line in lines if "skipped" in line]
    place = bad.rows(1)[3]
    assert (
        line["step"] == 2
        and place in line["rows"]
        and len(line["rows"]) == 8
        and place.startswith(str(rows))
    )
    row = json.loads(rows.read_text().splitlines()[int(place.rpartition(":")[2]) - 1])[
        "messages"
    ][0]["content"]
    assert row in sft.Tokenizer(base).decode(target)
    assert [line["step"] for line in lines if "loss" in line] == [
        1,
        3,
        4,
    ] and "nan" in line["skipped"]
    one, two, three = (
        load_file(tmp_path / "run" / f"checkpoint-00000{n}" / "adapter_model.safetensors")
        for n in (1, 2, 3)
    )
    assert all(torch.equal(one[k], two[k]) for k in one) and not all(
        torch.equal(one[k], three[k]) for k in one
    )


def test_steps_that_stay_not_finite_stop_the_run_with_the_last_good_one_kept(
    base, rows, tmp_path, capsys, monkeypatch
):
    loaded, steps = sft.sft_loss, []

    def spoil(model, batch):
        steps.extend(
            [len(batch.tokens)] * (type(batch.tokens) is torch.Tensor)
        )  # the planner's are fake
        loss, metrics = loaded(model, batch)
        return loss * (math.inf if len(steps) > 4 else 1), metrics

    monkeypatch.setattr(sft, "sft_loss", spoil)
    argv = flags(
        base,
        rows,
        tmp_path / "run",
        save_steps=100,
        micro_batch_tokens=4096,
        max_skipped_steps=2,
    )
    error = refuse(argv, capsys)
    assert "2 steps in a row, up to 6, had no finite loss" in error and "log.jsonl" in error
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-000004"]
    monkeypatch.setattr(sft, "sft_loss", loaded)
    sft.main(argv)
    sft.main(
        flags(
            base,
            rows,
            tmp_path / "whole",
            save_steps=100,
            micro_batch_tokens=4096,
            max_skipped_steps=2,
        )
    )
    assert same_tensors(
        *(
            tmp_path / r / "checkpoint-000008" / "adapter_model.safetensors"
            for r in ("whole", "run")
        )
    )
    assert without_times(tmp_path / "whole" / "log.jsonl") == without_times(
        tmp_path / "run" / "log.jsonl"
    )


# --- the run folder -------------------------------------------------------------------------------


def test_a_run_folder_holds_all_that_was_promised(base, rows, tmp_path):
    """config, report, log, curve, checkpoints, adapter with tokenizer, merged; transformers gets
    the adapter's logits from merged."""
    from transformers import AutoModelForCausalLM

    from lora import load_adapter
    from model import Batch, Segment

    sft.main(
        flags(
            base,
            rows,
            tmp_path / "run",
            val_size=6,
            eval_answers=4,
            max_new_tokens=8,
            merge=True,
            save_total_limit=2,
            report_to="tensorboard",
        )
    )
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "README.md",
        "adapter",
        "checkpoint-000006",
        "checkpoint-000008",
        "config.json",
        "data_report.json",
        "log.jsonl",
        "merged",
        "run.log",
        "runs",
        "training_loss.png",
    ]
    assert (run / "adapter" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    assert json.loads((run / "config.json").read_text())["lora_r"] == 4
    lines = tracking.read_log(run / "log.jsonl")
    assert (
        lines[0]["step"] == 0
        and lines[0]["eval_loss"] > 0
        and "eval_answers" in lines[-1]
        and "train_runtime" in lines[-1]
    )
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] and {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "scored_tokens",
        "tokens_per_second",
        "examples_per_second",
        "peak_memory_gb",
    } <= set(lines[1])
    ids = np.arange(3, 40)
    model = load_model(base)
    load_adapter(model, run / "adapter")
    ours = model.logits(model(Batch.pack([[Segment(ids, ids)]])))
    theirs = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)(
        torch.tensor(ids[None])
    ).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (run / "training_loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_says_so_and_another_configuration_is_refused(
    base, rows, tmp_path, capsys
):
    argv = flags(base, rows, tmp_path / "run", num_train_epochs=1)
    sft.main(argv)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    sft.main(argv)
    assert "finished" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"learning_rate \(0.01 there, 0.5 now\).*--overwrite_output_dir"
    ):
        sft.main([*argv, "--learning_rate", "0.5"])
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    sft.main([*argv, "--learning_rate", "0.5", "--overwrite_output_dir"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learning_rate"] == 0.5


def test_a_run_goes_on_from_the_adapter_of_another(base, rows, tmp_path, capsys):
    """--adapter, here a run folder: its loss is where the other's ended, its rank stays, and it
    trains."""
    held = dict(eval_data=rows, num_train_epochs=1)
    sft.main(flags(base, rows, tmp_path / "first", **held))
    sft.main(
        flags(
            base,
            rows,
            tmp_path / "second",
            **{**held, "lora_r": 2},
            adapter=tmp_path / "first",
        )
    )
    first, second = (
        [
            line["eval_loss"]
            for line in tracking.read_log(tmp_path / run / "log.jsonl")
            if "eval_loss" in line
        ]
        for run in ("first", "second")
    )
    assert (
        second[0] == first[-1]
        and second[-1] < 0.9 * second[0]
        and "r 4, alpha 32" in capsys.readouterr().out
    )
    files = [
        tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("first", "second")
    ]
    assert {k: v.shape for k, v in load_file(files[0]).items()} == {
        k: v.shape for k, v in load_file(files[1]).items()
    }


def test_base_weights_stay_as_they_were(base, rows, tmp_path):
    """What is frozen is equal to the last bit after training; what trains is not."""
    before = load_file(base / "model.safetensors")
    sft.main(
        flags(
            base,
            rows,
            tmp_path / "run",
            num_train_epochs=1,
            target_modules="q_proj",
            merge=True,
        )
    )
    after = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) == ("q_proj" not in k) for k in before)


# --- the planner ----------------------------------------------------------------------------------


def plan_of(base, rows, **settings):
    """(config, examples, Plan, Forecast) of a run on a CPU."""
    settings = sft.SFTConfig(
        model=str(base),
        data=[str(rows)],
        **{"lora_r": 4, "micro_batch_tokens": 400, **settings},
    )
    examples, _ = sft.load_examples([str(rows)], sft.Tokenizer(base))
    steps = sft.Plan(examples, settings)
    return (
        settings,
        examples,
        steps,
        sft.plan_memory(settings, base, steps, sft.sft_loss, torch.device("cpu"), "float32"),
    )


KINDS = {
    "lora": dict(),
    "checkpointing": dict(gradient_checkpointing=True),
    "selective": dict(selective_checkpointing=True),
    "full": dict(lora_r=0),
    "dora": dict(use_dora=True),
    "dropout": dict(lora_dropout=0.1),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
    "whole modules": dict(modules_to_save=["embed_tokens", "norm"]),
    "4 bit": dict(load_in_4bit=True),
    "4 bit, single scales": dict(load_in_4bit=True, bnb_4bit_use_double_quant=False),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_is_foreseen_is_what_a_step_holds(case, base, rows):
    """The same micro-batch on the loaded model, what lives counted by the same meter and what stays
    by hand: equal to the byte (but for the description of 4-bit weights, which is no tensor before
    they are quantised)."""
    settings, _, steps, (modules, memory, flops, largest, _) = plan_of(base, rows, **KINDS[case])
    model = sft.load_4bit(base, settings)
    sft.attach_adapter(model, settings)
    model.train()
    fixed = [t for name, t in model.state_dict().items() if "quant_state" not in name]
    layers = lora_layers(model).values()
    kept = [*fixed, *(t for layer in layers for t in layer.start or ())]
    with planner.Meter(model.config.vocab_size) as meter:
        for tensor in kept:
            meter.note(tensor, "weights")
        for p in model.parameters():
            if p.requires_grad and len(list(sft.split_by_tokens(steps[0], 400))) > 1:
                p.grad = torch.zeros_like(p)
        sft.sft_loss(model, sft.Batch.pack(largest))[0].backward()
    apart = "optimizer", "process", "kernels and holes"
    held = {part: round(n * 1e9) for part, n in memory.items() if part not in apart}
    if held["activations"]:  # else the optimizer's moment is the largest
        assert sum(held.values()) == meter.peak.total()
    assert held["weights"] + held.get("adapter", 0) == sum(t.nbytes for t in fixed)
    assert meter.flops == pytest.approx(flops)
    assert tuple(map(sum, zip(*modules.values()))) == sft.count_parameters(model)


def test_the_meter_counts_what_is_saved_for_backward():
    """By hand: exp keeps its 4 MB and nothing else, x is not counted, the product of 10 columns is
    that of a vocabulary of 10; 2mnk FLOPs; what nobody needs any more is gone."""
    x, w = torch.ones(1000, 1000, requires_grad=True), torch.ones(1000, 10)
    with planner.Meter(vocab_size=10) as meter:
        y = x.exp()
        assert meter.live == {"activations": 4_000_000}
        z = y @ w
        assert (
            meter.live == {"activations": 4_000_000, "logits": 40_000}
            and meter.flops == 2 * 1000 * 1000 * 10
        )
        more = (x * 2).exp()  # twice x dies with the line
        assert meter.live["activations"] == 8_000_000 and meter.peak.total() == 12_040_000
        del y, z, more
        assert meter.live.total() == 0


@pytest.mark.parametrize("name, options, message", [
    ("cosine", {"min_lr": 1e-5}, "lr_scheduler_kwargs: .*unexpected keyword argument 'min_lr'"),
    ("warmup_stable_decay", {}, "lr_scheduler_kwargs: .*missing .*num_decay_steps"),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "x"}, "lr_scheduler_kwargs: 'x'"),
])  # fmt: skip
def test_a_schedule_takes_its_own_options_alone(name, options, message):
    with pytest.raises(UserError, match=message):
        config(lr_scheduler_type=name, lr_scheduler_kwargs=options)


def test_adafactor_is_transformers():
    """10 steps with weight decay and a vector, at a changing learning rate."""
    from transformers import Adafactor

    generator, runs = torch.Generator().manual_seed(0), []
    start = [torch.randn(shape, generator=generator) / 2 for shape in ((30, 20), (9,))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(10)]
    for ours in (True, False):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        if ours:
            names = {f"p{n}": p for n, p in enumerate(parameters)}
            optimizer = sft.make_optimizer(names, config(optim="adafactor", weight_decay=0.1))
        else:
            options = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.1}
            optimizer = Adafactor(parameters, lr=1e-3, **options)
        for step, values in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            for p, gradient in zip(parameters, values):
                p.grad = gradient.clone()
            optimizer.step()
        runs.append(parameters)
    for ours, theirs, before in zip(*runs, start):
        assert (ours - theirs).abs().max() < 1e-6 < 1e-3 < (ours - before).abs().max()


@pytest.mark.parametrize("optim", sft.OPTIMIZERS)
def test_optimizer_bytes_are_those_of_its_state(optim):
    shapes = [(5,), (63, 64), (64, 64), (65, 66), (300, 1000)]
    parameters = {
        f"p{n}": torch.nn.Parameter(torch.randn(shape)) for n, shape in enumerate(shapes)
    }
    settings = config(optim=optim)
    optimizer = sft.make_optimizer(parameters, settings)
    sum(p.square().sum() for p in parameters.values()).backward()
    optimizer.step()
    for p in parameters.values():
        state = [
            v
            for k, v in optimizer.state[p].items()
            if torch.is_tensor(v) and not k.startswith(("qmap", "step"))
        ]
        assert planner.optimizer_bytes(p, settings) == sum(v.nbytes for v in state), p.shape


def test_checkpointing_and_smaller_micro_batches_are_foreseen_to_need_less(base, rows):
    need = [
        plan_of(base, rows, **settings)[3][1]
        for settings in (
            dict(),
            dict(gradient_checkpointing=True),
            dict(micro_batch_tokens=100),
            dict(lora_r=0),
        )
    ]
    busy = [memory["activations"] for memory in need]
    assert busy[1] < 0.8 * busy[0] and busy[2] < 0.5 * busy[0]
    assert need[3]["optimizer"] == 2 * need[3]["weights"] > 5 * need[0]["optimizer"]


def test_a_dry_run_tells_what_the_run_then_does_and_leaves_nothing(base, rows, tmp_path, capsys):
    """Steps and scored tokens are those of the log; no folder is made; the run ends with its
    measured peak, and its parts' seconds add up."""
    argv = flags(base, rows, tmp_path / "run", logging_steps=1)
    sft.main([*argv, "--dry_run"])
    told = capsys.readouterr().out
    assert (
        not list(tmp_path.iterdir()) and "tokens/s" in told and "of what plain products" in told
    )
    sft.main(argv)
    lines = tracking.read_log(tmp_path / "run" / "log.jsonl")
    scored = sum(line["scored_tokens"] for line in lines if "scored_tokens" in line)
    assert (
        f"{lines[-1]['step']} steps of 8 examples" in told
        and f"{scored:,} of them scored" in told
    )
    told, peak = capsys.readouterr().out, lines[-1]["peak_memory_gb"]
    (printed,) = re.findall(r"peak memory of the steps: ([0-9.]+) GB", told)
    assert peak > 0 and float(printed) == pytest.approx(peak, abs=0.006)  # both are rounded
    assert {"data", "loading", "answers"} <= lines[-1]["seconds"].keys()
    steps = ("forward and backward", "optimizer", "evaluation", "log", "checkpoints")
    assert sum(lines[-1]["seconds"][part] for part in steps) == pytest.approx(
        lines[-1]["train_runtime"], abs=1
    )


def test_a_dry_run_of_many_steps_looks_at_some(base, rows, tmp_path, capsys, monkeypatch):
    """300,000 steps of 31 rows: the tokens are those of the rows' mean to a percent."""
    steps, loaded = [], sft.Plan.__getitem__
    monkeypatch.setattr(
        sft.Plan, "__getitem__", lambda *args: steps.append(args[1]) or loaded(*args)
    )
    argv = flags(base, rows, tmp_path / "run", gradient_accumulation_steps=1)
    sft.main([*argv, "--max_steps", "300000", "--dry_run"])
    examples, _ = sft.load_examples([str(rows)], sft.Tokenizer(base))
    tokens = sum(map(sft.count_tokens, examples)) * 300_000 / 8
    shown = re.search(r"300000 steps of 4 examples: ([\d,]+) tokens", capsys.readouterr().out)
    assert int(shown[1].replace(",", "")) == pytest.approx(tokens, rel=0.01)
    assert len(steps) < 3000


def test_what_does_not_fit_is_told_with_what_helps(base, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planner, "free_memory_gb", lambda device: -1.0)
    sft.main([*flags(base, rows, tmp_path / "run", micro_batch_tokens=400), "--dry_run"])
    told = capsys.readouterr().out
    assert "does not fit and is not tried" in told
    assert "--gradient_checkpointing true" in told and "--max_length" in told
    assert "tokens/s" not in told and not list(tmp_path.iterdir())


def test_what_cannot_be_estimated_does_not_stop_a_dry_run(
    base, rows, tmp_path, capsys, monkeypatch
):
    """A loss that looks at a value, which tensors without content have not."""
    loaded = sft.sft_loss
    monkeypatch.setattr(
        sft,
        "sft_loss",
        lambda model, batch: (found := loaded(model, batch), float(found[0]))[0],
    )
    sft.main([*flags(base, rows, tmp_path / "run", num_train_epochs=1), "--dry_run"])
    told = capsys.readouterr().out
    assert told.count("can't be estimated here") == 1 and "tokens/s" in told


# --- mistakes -------------------------------------------------------------------------------------


def refuse(argv, capsys):
    """Runs the command as a user does; returns what stands on stderr after checking exit 2, at most
    two lines, no traceback."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: sft.main(argv))
    error = capsys.readouterr().err.strip()
    assert (
        stopped.value.code == 2
        and error.startswith("error: ")
        and len(error.splitlines()) <= 2
        and "Traceback" not in error
    )
    return error


MISTAKES = {
    "unknown flag": (dict(learning_rat=1), ["--learning_rat", "learning_rate"]),
    "wrong type": (dict(learning_rate="fast"), ["learning_rate", "fast"]),
    "wrong choice": (dict(lr_scheduler_type="cosin"), ["lr_scheduler_type", "cosine"]),
    "negative": (dict(learning_rate=-1), ["learning_rate"]),
    "negative ratio": (dict(loraplus_lr_ratio=-3), ["loraplus_lr_ratio"]),
    "negative seed": (dict(seed=-1), ["seed"]),
    "negative limit": (dict(save_total_limit=-1), ["save_total_limit"]),
    "beta": (dict(adam_beta1=2), ["adam_beta1"]),
    "zero batch": (dict(per_device_train_batch_size=0), ["per_device_train_batch_size"]),
    "no such file": (dict(data="nowhere.jsonl"), ["nowhere.jsonl"]),
    "no such model": (dict(model="nowhere/at/all"), ["nowhere/at/all"]),
    "unknown target": (dict(target_modules="q_porj"), ["q_porj", "q_proj"]),
    "layer norms by wrong names": (
        dict(target_modules="layer_norm1"),
        ["layer_norm1", "input_layernorm"],
    ),
    "unknown module": (dict(modules_to_save="lm_haed"), ["lm_haed"]),
    "bias": (dict(bias="some"), ["bias", "some"]),
    "dropout": (dict(lora_dropout=1.5), ["lora_dropout"]),
    "device": (dict(device="warp"), ["device", "warp"]),
    "dtype": (dict(dtype="float8"), ["dtype", "float8"]),
    "attention": (dict(attn_implementation="flsh"), ["attn_implementation", "flsh"]),
    "hold out all": (dict(val_size=31), ["31"]),
    "answers too long": (dict(max_length=3), ["max_length"]),
    "resume path": (dict(resume="checkpoint-9"), ["resume", "checkpoint-9"]),
    "no epoch": (dict(num_train_epochs=0), ["num_train_epochs: 0 trains nothing"]),
    "no epoch, no step": (
        dict(num_train_epochs=0, max_steps=0),
        ["num_train_epochs: 0 trains nothing"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_and_costs_nothing(case, base, rows, tmp_path, capsys):
    """One or two lines naming the flag or file and the way out, exit 2, no run folder begun: the
    right command then works there."""
    settings, names = MISTAKES[case]
    error = refuse(flags(base, rows, tmp_path / "run", **settings), capsys)
    assert all(name in error for name in names), error
    assert not list((tmp_path / "run").glob("*"))


FILES = {
    "broken json": ('{"text": "a"}\n{"text": \n', ["rows.jsonl:2"]),
    "wrong field": ('{"text": "a"}\n{"txet": "b"}\n', ["rows.jsonl:2", "txet"]),
    "not an object": ("[1, 2]\n", ["rows.jsonl:1"]),
    "empty": ("", ["rows.jsonl"]),
    "wrong type": ('{"messages": "hello"}\n', ["rows.jsonl:1", "messages"]),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        ["nothing to train on"],
    ),
    "weights of 0": (
        '{"text": "a", "weight": 0}\n{"text": "b", "weight": 0.0}\n',
        ["nothing to train on", "weight 0: 2", "rows.jsonl:1"],
    ),
    "wrong role": ('{"messages": [{"role": "usr", "content": 3}]}\n', ["rows.jsonl:1"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_row_is_named_by_file_and_line(case, base, tmp_path, capsys):
    text, names = FILES[case]
    (tmp_path / "rows.jsonl").write_text(text)
    error = refuse(flags(base, tmp_path / "rows.jsonl", tmp_path / "run"), capsys)
    assert all(name in error for name in names), error


def test_overwriting_deletes_links_and_not_what_is_behind_them(base, rows, tmp_path, capsys):
    """A link in the run folder to a folder, one to a file, one to nothing; the run folder as a
    link is refused and named."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    (disk / "kept.txt").write_text("kept")
    argv = flags(base, rows, run, num_train_epochs=1, save_strategy="no")
    sft.main(argv)
    for name, target in (
        ("merged", disk),
        ("file", disk / "kept.txt"),
        ("none", "nowhere"),
    ):
        (run / name).symlink_to(target)
    sft.main([*argv, "--overwrite_output_dir"])
    assert (disk / "kept.txt").read_text() == "kept" and (run / "adapter").is_dir()
    assert not any(path.is_symlink() for path in run.iterdir())
    (tmp_path / "link").symlink_to(run)
    argv = flags(base, rows, tmp_path / "link", num_train_epochs=1, save_strategy="no")
    assert "a link" in refuse([*argv, "--overwrite_output_dir"], capsys)
    assert (run / "adapter").is_dir()


def test_a_folder_of_other_files_is_left_alone(base, rows, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite_output_dir"]):
        assert "thesis.txt" not in refuse([*flags(base, rows, tmp_path / "home"), *extra], capsys)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    subprocess.run(
        ["cp", "-r", base, tmp_path / "model"], check=True
    )  # its config.json is no run's
    for extra in ([], ["--overwrite_output_dir"]):
        assert "not a run's" in refuse([*flags(base, rows, tmp_path / "model"), *extra], capsys)
    assert same_tensors(base / "model.safetensors", tmp_path / "model" / "model.safetensors")


def test_what_a_kill_leaves_is_no_obstacle(base, rows, tmp_path):
    """Killed before config.json had its name, and while a checkpoint was written."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json").write_text("{")
    sft.main(flags(base, rows, run, num_train_epochs=1, merge=False))
    log = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join(log[:-1]) + "\n")
    (run / ".checkpoint-000002.partial").mkdir()
    sft.main(flags(base, rows, run, num_train_epochs=1, merge=False))
    assert (
        not list(run.glob(".*.partial"))
        and "train_runtime" in tracking.read_log(run / "log.jsonl")[-1]
    )


def test_output_that_cannot_be_written(base, rows, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refuse(flags(base, rows, tmp_path / "file" / "run"), capsys)
    assert str(tmp_path / "file") in refuse(flags(base, rows, tmp_path / "file"), capsys)


def test_other_data_under_a_resumed_run_is_refused(base, rows, tmp_path, capsys):
    """The file of the same name with other rows in it: the checkpoint knows what it was trained
    on."""
    file = tmp_path / "rows.jsonl"
    lines = rows.read_text().splitlines()
    file.write_text("\n".join(lines))
    argv = flags(base, file, tmp_path / "run", num_train_epochs=1)
    sft.main(argv)
    subprocess.run(
        ["sed", "-i", "$d", tmp_path / "run" / "log.jsonl"], check=True
    )  # as if it had not finished
    file.write_text("\n".join(lines[1:] + lines[:1]))
    assert "other data" in refuse(argv, capsys)


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_trained(base, rows, tmp_path):
    """On a file system of 1.5 MB the run stops with the disk's own words, and the checkpoints
    before it are whole."""
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", tmp_path],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        run = subprocess.run(
            [
                sys.executable,
                str(ROOT / "sft.py"),
                *flags(base, rows, tmp_path / "run", lora_r=16, save_steps=1),
            ],
            capture_output=True,
            text=True,
            timeout=200,
        )
        error = run.stderr.strip().splitlines()
        assert (
            run.returncode == 2
            and error[-1].startswith("error: ")
            and "Traceback" not in run.stderr
        ), run.stderr
        assert "space" in error[-1]
        kept = checkpoints.checkpoints(tmp_path / "run")
        assert kept and all(
            load_file(p / "adapter_model.safetensors") and load_file(p / "optimizer.safetensors")
            for p in kept
        )
        assert not list((tmp_path / "run").glob(".checkpoint*"))
    finally:
        subprocess.run(["umount", tmp_path])


def test_a_folder_gone_read_only_ends_in_one_line_and_the_run_goes_on_later(base, rows, tmp_path):
    """The run folder becomes read-only under a running run: one line, what was kept is whole, and
    once it can be written again the same command ends where an undisturbed run ends."""
    run = tmp_path / "run"
    argv = flags(base, rows, run, num_train_epochs=20, save_steps=1)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sft.py"), *argv],
        env=one_thread,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not checkpoints.checkpoints(run) and process.poll() is None:
        time.sleep(0.01)
    if any(
        subprocess.run(["mount", *words.split(), run], capture_output=True).returncode
        for words in (f"--bind {run}", "-o remount,ro,bind")
    ):
        process.kill()
        pytest.skip("mounting needs root")
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        subprocess.run(["umount", run])
    last = output.strip().splitlines()[-1]
    assert (
        process.returncode == 2
        and last.startswith("error: ")
        and "Read-only" in last
        and str(run) in last
    ), output
    assert "Traceback" not in output and 0 < len(checkpoints.checkpoints(run)) < 80
    assert not any(map(checkpoints.damage, checkpoints.checkpoints(run)))
    sft.main(argv)
    sft.main(flags(base, rows, tmp_path / "whole", num_train_epochs=20, save_steps=1000))
    assert same_tensors(
        *(tmp_path / r / "checkpoint-000080" / "optimizer.safetensors" for r in ("run", "whole"))
    )
    assert without_times(tmp_path / "whole" / "log.jsonl") == without_times(run / "log.jsonl")


def test_help_explains_every_flag(capsys):
    """One line per field, with its comment and default."""
    with pytest.raises(SystemExit):
        sft.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    from dataclasses import fields

    assert all(f"--{field.name}" in text for field in fields(sft.SFTConfig))
    assert "peak learning rate (default: 0.0002)" in text


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({}, ""),
        ({"target_modules": "q_proj,input_layernorm"}, "modules_to_save"),
        ({"use_dora": True, "rank_pattern": '{"q_proj": 2}'}, "use_dora, rank_pattern"),
    ],
    ids=["plain", "norms", "dora"],
)
def test_what_vllm_refuses_is_told_with_the_adapter(
    settings, refused, base, rows, tmp_path, capsys
):
    sft.main(flags(base, rows, tmp_path / "run", max_steps=1, eval_strategy="no", **settings))
    notice = f"{tmp_path / 'run' / 'adapter'}: vLLM takes no adapter with {refused}: serve the"
    output = capsys.readouterr().out
    assert (notice in output) == bool(refused) and (refused or "vLLM" not in output)


# --- trackers and the log file --------------------------------------------------------------------


def halved(argv, run):
    """Runs a command to its end, then puts the folder back to what a kill after step 7 leaves: a
    checkpoint at step 3, and lines of the log and of the trackers behind it."""
    sft.main(argv)
    for path in run.iterdir():
        if path.name in ("checkpoint-000006", "checkpoint-000008", "adapter", "README.md"):
            subprocess.run(["rm", "-r", path], check=True)
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:-2]))


def scalars(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


def test_tensorboard_has_each_step_of_the_log_once(base, rows, tmp_path):
    """Also after a kill: what was told of the steps done again counts no more."""
    run = tmp_path / "run"
    argv = flags(
        base,
        rows,
        run,
        eval_data=rows,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
    )
    argv = (
        argv[: argv.index("--report_to")] + argv[argv.index("--report_to") + 2 :]
    )  # it is the default
    halved(argv, run)
    assert len(list((run / "runs").iterdir())) == 1
    sft.main(argv)
    log, told = tracking.read_log(run / "log.jsonl"), scalars(run / "runs")
    for tag, key in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("eval/loss", "eval_loss"),
    ):
        assert told[tag] == [
            (line["step"], pytest.approx(line[key], rel=1e-6)) for line in log if key in line
        ], tag
    assert len(told["train/loss"]) == 8 and [step for step, _ in told["eval/loss"]] == [
        0,
        2,
        4,
        6,
        8,
    ]
    assert all(len({step for step, _ in points}) == len(points) for points in told.values())
    assert [step for step, _ in told["train/train_runtime"]] == [8]


class Dashboard:
    """What wandb and trackio have in common, kept in a dict; trackio's runs count on from what
    they hold."""

    def __init__(self, monkeypatch, name):
        self.runs, self.began, self.broken, self.finished = {}, [], None, 0
        self.counts = name == "trackio"
        module = SimpleNamespace(init=self.init, __spec__="installed")
        monkeypatch.setitem(sys.modules, name, module)

    def init(self, **options):
        self.began.append(options)
        lines = self.runs.setdefault(options.get("id", options["name"]), [])

        def log(numbers, step):
            if self.broken is not None and step >= self.broken:
                raise ConnectionError("gone")
            lines.append((step, numbers))

        def finish():
            self.finished += 1

        counter = (
            {"_next_step": max((step for step, _ in lines), default=-1) + 1}
            if self.counts
            else {}
        )
        return SimpleNamespace(log=log, finish=finish, **counter)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_dashboard_has_one_run_through_a_resume(name, base, rows, tmp_path, monkeypatch):
    """The second process names the same run, "allow"s it to go on, and trackio is not told again
    what it holds."""
    there, run = Dashboard(monkeypatch, name), tmp_path / "run"
    argv = flags(base, rows, run, logging_steps=1, report_to=name)
    halved(argv, run)
    sft.main(argv)
    (lines,), (first, second) = there.runs.values(), there.began
    assert (
        first["name"] == second["name"]
        and first["resume"] == "allow"
        and first["config"]["lora_r"] == 4
    )
    assert there.finished == 2 and not (run / "runs").exists()
    steps = [step for step, numbers in lines if "train/loss" in numbers]
    assert (steps if name == "trackio" else steps[:8]) == [
        *range(1, 9)
    ]  # wandb's server passes over doubles
    losses = dict(
        (step, numbers["train/loss"]) for step, numbers in lines if "train/loss" in numbers
    )
    assert list(losses.values()) == [
        line["loss"] for line in tracking.read_log(run / "log.jsonl") if "loss" in line
    ]


def test_a_tracker_that_breaks_costs_a_line(base, rows, tmp_path, monkeypatch, capsys):
    there = Dashboard(monkeypatch, "wandb")
    there.broken = 4
    sft.main(flags(base, rows, tmp_path / "run", report_to="wandb,tensorboard", logging_steps=1))
    assert (
        capsys.readouterr().err.count("the run goes on without wandb (ConnectionError: 'gone')")
        == 1
    )
    assert len(scalars(tmp_path / "run" / "runs")["train/loss"]) == 8


@pytest.mark.parametrize(
    "wanted, there, found",
    [
        (["all"], ["wandb"], ["tensorboard", "wandb"]),
        (["none"], [], []),
        (["tensorboard", "trackio"], ["trackio"], ["tensorboard", "trackio"]),
        (["all"], [], ["tensorboard"]),
    ],
)
def test_what_report_to_means(wanted, there, found, monkeypatch):
    for name in ("wandb", "trackio"):
        module = SimpleNamespace(__spec__="installed") if name in there else None
        monkeypatch.setitem(sys.modules, name, module)
    assert tracking.find_trackers(config(report_to=wanted)) == found


def test_trackers_that_can_not_be_had_are_told_first(base, rows, tmp_path, monkeypatch, capsys):
    """A name that is none, one that is not installed, one that does not start; before the model is
    loaded but for the last."""
    assert "wandbb" in refuse(flags(base, rows, tmp_path / "run", report_to="wandbb"), capsys)
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = refuse(flags("not/loaded", "nor.jsonl", tmp_path / "run", report_to="wandb"), capsys)
    assert "report_to: wandb is not installed; pip install wandb" in error and not list(
        (tmp_path / "run").glob("*")
    )

    def init(**_):
        raise ValueError("no key")

    module = SimpleNamespace(init=init, __spec__="installed")
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert "wandb does not start" in refuse(
        flags(base, rows, tmp_path / "run", report_to="wandb"), capsys
    )


def test_the_log_file_has_what_the_terminal_had(base, rows, tmp_path, monkeypatch, capsys):
    """Line by line behind its time, warnings on stderr too and the error that ended a start; a
    resume appends, a refused command and one that finds the run finished leave it alone; streams
    are themselves again afterwards."""

    def breaking(*_):
        print("half a line, ", end="")
        print("\r 7%|#   |\r", end="", file=sys.stderr)
        print("the rest")
        print("a warning", file=sys.stderr)
        raise ZeroDivisionError

    run, streams = tmp_path / "run", (sys.stdout, sys.stderr)
    argv = flags(base, rows, run, logging_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "export", breaking)
        with pytest.raises(ZeroDivisionError):
            sft.main(argv)
    shown = capsys.readouterr()
    first = (run / "run.log").read_text().splitlines()
    told = [line[20:] for line in first]
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)
        for line in first[: len(shown.out.splitlines())]
    )
    at = told.index("Traceback (most recent call last):")
    assert [line for line in told[:at] if line != "a warning"] == shown.out.splitlines()
    assert {"a warning", "half a line, the rest"} <= {*told} and "ZeroDivisionError" in "".join(
        first[at:]
    )
    sft.main(argv)
    again = (run / "run.log").read_text().splitlines()
    assert again[: len(first)] == first
    assert [line[20:] for line in again[len(first) :]] == capsys.readouterr().out.splitlines()
    for more in ([], ["--learning_rate", "0.5"]):
        with pytest.raises(UserError) if more else nullcontext():
            sft.main([*argv, *more])
    assert (run / "run.log").read_text().splitlines() == again
    assert (sys.stdout, sys.stderr) == streams and "write" not in vars(sys.stdout)


def test_a_figure_that_can_not_be_drawn_costs_a_line(base, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sft.main(flags(base, rows, tmp_path / "run"))
    assert (
        "training_loss.png is not drawn" in capsys.readouterr().err
        and (tmp_path / "run" / "README.md").exists()
    )


def test_a_notebook_has_one_figure_redrawn_in_place(base, rows, tmp_path, monkeypatch):
    shown = []

    class Handle:
        def update(self, image):
            shown.append(("update", image))

    def display(image, display_id):
        shown.append(("display", image))
        return Handle()

    shell = SimpleNamespace(kernel=1)
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, version_info=(9,))
    )
    monkeypatch.setitem(
        sys.modules,
        "IPython.display",
        SimpleNamespace(display=display, Image=lambda filename: Path(filename).read_bytes()[:4]),
    )
    sft.main(flags(base, rows, tmp_path / "run"))
    assert [how for how, _ in shown] == ["display"] + [
        "update"
    ] * 4  # four lines of the log, and the closing one
    assert {image for _, image in shown} == {b"\x89PNG"}
    del shell.kernel
    sft.main(flags(base, rows, tmp_path / "terminal"))
    assert len(shown) == 5


NOTEBOOK = """
import io, json, sys
from types import SimpleNamespace

shown = []
display = SimpleNamespace(
    display=lambda image, display_id: SimpleNamespace(update=shown.append),
    Image=lambda filename: open(filename, "rb").read(4),
)
shell = SimpleNamespace(kernel=1)
IPython = SimpleNamespace(get_ipython=lambda: shell, display=display, version_info=(9,))
sys.modules |= {"IPython": IPython, "IPython.display": display}
cells, names = json.load(open("examples/train.ipynb"))["cells"], {}
for cell in cells:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]).replace("steps = 150", "steps = 3"), names)
assert set(shown) == {b"\\x89PNG"} and len(shown) > 3
assert eval("".join(cells[-3]["source"]).splitlines()[-1], names) == b"\\x89PNG"
"""


def test_the_notebook_in_examples_runs_from_its_data_to_the_merged_model(tmp_path):
    """Its code in one namespace, with three steps for 150, in an empty folder."""
    notebook = json.loads((ROOT / "examples" / "train.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for file in [*ROOT.glob("*.py"), ROOT / "support", ROOT / "examples"]:
        (tmp_path / file.name).symlink_to(file)
    ran = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for part in (
        "⟦",
        "[base] ",
        "[sft] ",
        "at step 0: margin 0.000",
        "| accuracy | 3 |",
        "[merged] ",
    ):
        assert part in ran.stdout, part
    assert "damaged" not in ran.stdout


# --- the card and the hub -------------------------------------------------------------------------


def test_cards_say_what_a_model_is_and_name_no_place(base, rows, tmp_path):
    """Front matter of each kind, results before and after, the ledger's numbers, settings, the
    curve beside it; of the base's folder and the rows' file the name alone."""
    run = tmp_path / "run"
    sft.main(
        flags(
            base,
            rows,
            run,
            eval_data=rows,
            merge=True,
            hub_model_id="me/mine",
            load_best_model_at_end="true",
        )
    )
    kinds = {
        "adapter": ("peft", "adapter", "me/mine"),
        "merged": ("transformers", "finetune", "me/mine-merged"),
    }
    for part, (library, relation, name) in kinds.items():
        card = (run / part / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front == {
            "base_model": "model",
            "base_model_relation": relation,
            "library_name": library,
            "pipeline_tag": "text-generation",
            "tags": ["plaintune", "sft"],
        }
        assert (
            f'from_pretrained("{name}")' in card and (run / part / "training_loss.png").exists()
        )
        assert (
            str(tmp_path) not in card and str(base.parent) not in card and "`rows.jsonl`" in card
        )
        log = tracking.read_log(run / "log.jsonl")
        best = min(
            (line for line in log[1:] if "eval_loss" in line),
            key=lambda line: line["eval_loss"],
        )
        assert f"| eval_loss | {log[0]['eval_loss']:.4g} | {best['eval_loss']:.4g} |" in card
        assert (
            "31 rows: 31 examples" in card
            and "| lora_r | 4 |" in card
            and "| seed | 42 |" in card
        )
        assert "hub_model_id" not in card and "![the loss" in card
    assert (run / "README.md").read_text() == (run / "adapter" / "README.md").read_text()


def test_cards_of_hub_names(base, rows, tmp_path, monkeypatch):
    """A hub id stays one, its data sets go into the front matter; after full fine-tuning there is
    the model alone; an adapter that was gone on with has its own rank, so the config's is not
    told; results are the best step's."""
    folder = tmp_path / "run"
    (folder / "merged").mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 3, "loss": 0.5}\n{"step": 4, "loss": 0.25}\n')
    monkeypatch.chdir(rows.parent.parent)
    data = ["org/rows#v1:train@2", str(rows), f"{rows.parent.name}/rows.jsonl@2"]
    full = sft.SFTConfig(model="org/base", data=data, output_dir=str(folder), lora_r=0)
    write_card(full, f"3 rows, as {rows}:1; /a", {"step": 4, "best_step": 3}, {})
    card = (folder / "merged" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (
        front["base_model"] == "org/base"
        and front["datasets"] == ["org/rows"]
        and "# run\n" in card
    )
    assert front["base_model_relation"] == "finetune" and "3 rows, as rows.jsonl:1; /a" in card
    assert card == (folder / "README.md").read_text() and "| loss |  | 0.5 |" in card
    write_card(
        sft.SFTConfig(
            model="org/base", data=["org/rows"], output_dir=str(folder), adapter="output/a"
        ),
        "",
        {"step": 3},
        {},
        hidden=vars(sft.LoRAConfig()),
    )
    card = (folder / "README.md").read_text()
    assert "| adapter | output/a |" in card and "lora_r" not in card


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_pushed_and_its_push_taken_up_again(
    base, rows, tmp_path, hub, monkeypatch, capsys
):
    """A hub that fails after training costs nothing of the run: exit 2 and what to do; the same
    command then pushes. The token is in no file and was not printed."""
    monkeypatch.setattr("support.hub.WAITS", (0,))
    run, argv = (
        tmp_path / "run",
        flags(base, rows, tmp_path / "run", merge=True, num_train_epochs=1),
    )
    argv += [
        "--push_to_hub",
        "--hub_model_id",
        "me/mine",
        "--hub_commit_message",
        "first words",
    ]
    hub.faults += [503] * 4
    error = refuse(argv, capsys)
    assert f"`python lora.py push {run}` goes on from here" in error and not hub.commits
    assert (run / "README.md").exists() and "train_runtime" in tracking.read_log(
        run / "log.jsonl"
    )[-1]
    assert "push to me/mine" in (run / "run.log").read_text()
    hub.faults.clear()
    sft.main(argv)
    assert hub.commits == [("me/mine", "first words"), ("me/mine-merged", "first words")]
    assert hub.files == {
        "me/mine": files_of(run / "adapter"),
        "me/mine-merged": files_of(run / "merged"),
    }
    assert "pushed merged/ to me/mine-merged" in capsys.readouterr().out
    assert not [p for p in run.rglob("*") if p.is_file() and hub.token.encode() in p.read_bytes()]


def test_every_save_is_pushed_and_one_that_fails_is_told(base, rows, tmp_path, hub, capsys):
    """Also: the first step's line, TensorBoard's folder, checkpoints without optimizer states,
    which can't be resumed from, and one at each new best."""
    run = tmp_path / "run"
    settings = dict(push_to_hub="true", hub_model_id="me/mine", hub_strategy="every_save")
    settings |= dict(save_only_model="true", save_strategy="best", eval_data=rows, eval_steps=3)
    settings |= dict(eval_strategy="steps", logging_first_step="true", logging_steps=4)
    settings |= dict(logging_dir=tmp_path / "logs", report_to="tensorboard", learning_rate=1e-3)
    hub.faults.append(503)
    sft.main(flags(base, rows, run, **settings))
    assert hub.commits == [("me/mine", f"checkpoint-{n:06d}") for n in (6, 8)] + [
        ("me/mine", "Trained with plaintune")
    ]
    assert "checkpoint-000003 is not pushed" in capsys.readouterr().err
    assert hub.files == {"me/mine": files_of(run / "adapter")}
    lines = tracking.read_log(run / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 4, 8]
    assert list((tmp_path / "logs").iterdir()) and not (run / "runs").exists()
    (run / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="save_only_model left out what a resume needs"):
        sft.main(flags(base, rows, run, **settings))


def test_a_hub_that_refuses_is_told_before_anything_is_loaded(tmp_path, hub, monkeypatch, capsys):
    """Neither the model nor the rows exist, yet the token is what is told; and it is not shown,
    though the hub says it."""
    argv = flags(
        "not/loaded",
        "nor.jsonl",
        tmp_path / "run",
        push_to_hub="true",
        hub_model_id="me/mine",
    )
    hub.closed.add("me/mine")
    error = refuse(argv, capsys)
    assert (
        "push_to_hub: 403" in error
        and "Bearer *** may read here" in error
        and hub.token not in error
    )
    monkeypatch.setenv("HF_TOKEN", "hf_WrongSecret")
    error = refuse(argv, capsys)
    assert "push_to_hub: " in error and "hf_WrongSecret" not in error and "oken" in error
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token; set HF_TOKEN" in refuse(argv, capsys)
    assert not list((tmp_path / "run").glob("*")) and not hub.commits
