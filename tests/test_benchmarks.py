"""Benchmarks that must work the first time their machine is there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "cuda.py"


def test_what_a_gpu_must_show_runs_on_a_cpu(tmp_path):
    """Every section has rows, every row has a result, in the table and in the file."""
    output = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(output.read_text())["rows"]
    by_section = {}
    for row in rows:
        by_section.setdefault(row["section"], {})[row["case"]] = row
        assert f"  {row['case']} " in result.stdout
    assert list(by_section) == ["correctness", "memory", "speed", "options"]
    exact = by_section["correctness"]["sdpa, float32"]
    rounded = by_section["correctness"]["sdpa, bfloat16"]
    assert 0 < exact["distance"] < 1e-5 < rounded["distance"]
    split = by_section["memory"]["split after out of memory"]
    assert split["split_to"] < split["asked"]
    lora, peer = (by_section["speed"][f"tiny, 2 x 64: {side}"] for side in SIDES)
    assert lora["tokens"] == peer["tokens"] and lora["planned_gb"] > 0 < peer["of_roof"]


SIDES = "LoRA", "transformers + PEFT, LoRA"


def test_a_row_or_a_section_that_fails_loses_no_other(capsys):
    """An error is its row's result; a process that ends or takes too long is one more row."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def fails():
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    def section(device):
        yield "first", fails
        yield "second", lambda: script.checked(0.5, 0.1)
        yield "third", lambda: script.checked(0.1, 0.5)

    script.section = section
    script.run_section("section", "cpu")
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    reason = "RuntimeError: CUDA error: an illegal memory access"
    assert script.describe(first) == f"FAILED: {reason}"
    assert script.describe(second).startswith("FAILED: beyond its bound, distance 0.5")
    assert third["ok"] and script.describe(third) == "distance 0.1, bound 0.5"
    assert (
        script.describe(*script.run_child("memory", "cpu", 0.1)) == "FAILED: stopped after 0.1 s"
    )
    assert script.describe(*script.run_child("none", "cpu", 60)) == "FAILED: KeyError: 'none'"
