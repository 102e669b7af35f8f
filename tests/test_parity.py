"""The parity report: what it prints, and that it can fail."""

import parity
import pytest
import torch

import data
import eval as evaluation

QUICK = "logits, Qwen3", "gradients, Llama", "generation", "LoRA", "NF4, logits"


def report(capsys, *words):
    """(status, {quantity: its line}) of `python tests/parity.py`."""
    with pytest.raises(SystemExit) as ended:
        parity.main([*words])
    lines = capsys.readouterr().out.splitlines()
    return ended.value.code, {line[:28].strip(): line for line in lines[1:-1]}


def test_every_check_passes_and_one_that_is_perturbed_fails(capsys, monkeypatch):
    """One weight of ours that is moved fails what is loaded so: all but the 4-bit check."""
    status, lines = report(capsys, "--only", *QUICK)
    assert status == 0 and len(lines) == 5
    assert all(line.endswith("  ok") for line in lines.values()), lines
    load = parity.ours

    def perturbed(folder, place):
        net = load(folder, place)
        with torch.no_grad():
            net.model.layers[1].mlp.down_proj.weight[0, 0] += 0.5
        return net

    monkeypatch.setattr(parity, "ours", perturbed)
    status, lines = report(capsys, "--only", *QUICK)
    assert status == 1
    for name, line in lines.items():
        assert line.endswith("FAILS" if "NF4" not in name else "ok"), line


def test_masks_and_metrics_can_fail(capsys, monkeypatch):
    """A prompt's first token that is scored, and choices ranked the wrong way round."""
    join, grade = data.join_pieces, evaluation.grade_choices

    def score_one_more(side, encoded):
        ids, scored = join(side, encoded)
        scored[1:2] = True
        return ids, scored

    def rank_backwards(item, metrics, sums):
        return grade(item, metrics, [-value for value in sums])

    monkeypatch.setattr(data, "join_pieces", score_one_more)
    monkeypatch.setattr(evaluation, "grade_choices", rank_backwards)
    status, lines = report(capsys, "--only", "assistant masks", "benchmark metrics")
    assert status == 1 and len(lines) == 2
    assert all(line.endswith("  FAILS") for line in lines.values()), lines


def test_what_is_not_there_or_breaks_is_told(capsys, monkeypatch):
    def broken(place):
        raise ValueError("no such thing\nat all")

    checks = {
        "absent": parity.Check("no_such_library", 0, broken),
        "broken": parity.Check("torch", 0, broken),
    }
    monkeypatch.setattr(parity, "CHECKS", checks)
    status, lines = report(capsys)
    assert status == 1 and lines["absent"].endswith("  not installed")
    assert lines["broken"].endswith("FAILS: ValueError: no such thing")
