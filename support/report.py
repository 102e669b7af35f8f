"""Tables, sentences and figures for people."""

import json
import math
import re
from statistics import fmean

import numpy as np


def aligned_columns(*rows):
    """Rows of words as lines, the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [word.rjust(width) for word, width in zip(others, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def markdown_table(head, *rows):
    """Rows of strings, numbers and JSON values as a table in Markdown."""

    def cell(value):
        if isinstance(value, float):
            return f"{value:.4g}"
        return value if isinstance(value, str) else json.dumps(value)

    rows = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows)


def show_answers(before, after, num_samples):
    """Prints the first questions with the answer before and after training, and the share right.
    Returns the shares for the log: {} where no row has a gold answer."""
    for old, new in list(zip(before, after))[:num_samples]:
        cut = "…" if len(old["prompt"]) > 400 else ""
        print(f"\n{cut}{old['prompt'][-400:]}")
        print(f"  before: {old['output'][:200]!r}\n  after:  {new['output'][:200]!r}")
    gold = [n for n, row in enumerate(after) if row["gold"]]
    if not gold:
        return {}
    was = fmean(before[n]["answer"] == before[n]["gold"] for n in gold)
    now = fmean(after[n]["answer"] == after[n]["gold"] for n in gold)
    chance = fmean(1 / len(after[n]["choices"]) for n in gold)
    print(
        f"\nanswers right on {len(gold)} evaluation questions: {was:.1%} before, {now:.1%} after "
        f"(chance {chance:.0%})"
    )
    return {"eval_answers_before": was, "eval_answers": now}


FEWEST = 20  # rows: of fewer a standard error or an interval says little

# --- evaluations: results are {model: {set: summary}}, comparisons those of eval.compare_all ------


def metrics_of(summary):
    """The names of the metrics in a set's summary."""
    return [name for name in summary if not re.search(r"^n$|_n$|_stderr$", name)]


def spread(summary, name):
    """A metric's standard error; None where too few rows, or rows all alike, can't carry one."""
    error = summary.get(f"{name}_stderr")
    return error if error and summary[f"{name}_n"] >= FEWEST else None


def results_table(results):
    """A row per set and metric, a column per model, ± the standard error."""

    def cell(summary, name):
        error = spread(summary, name)
        error = f" ± {error:.4f}" if error else ""
        return f"{summary.get(name, math.nan):.4f}{error}"

    rows = []
    for task, summary in next(iter(results.values())).items():
        for name in metrics_of(summary):
            cells = [cell(sets[task], name) for sets in results.values()]
            rows.append([task, name, summary.get(f"{name}_n", summary["n"]), *cells])
    return markdown_table(["set", "metric", "n", *results], *rows)


VERDICTS = {
    "rose": "rose beyond noise",
    "fell": "fell beyond noise",
    "noise": "no more than noise",
    "too few": "too few rows differ for a verdict",
    None: "no interval for a score of the whole set",
}


def headlines(results, comparisons):
    """Of every two models: what each metric did, and whether the average hides what fell."""
    lines = []
    for a, b in dict.fromkeys((c["a"], c["b"]) for c in comparisons):
        pair = [c for c in comparisons if (c["a"], c["b"]) == (a, b)]
        names = {words: [] for words in VERDICTS.values()}
        for task, summary in results[a].items():
            verdicts = {c["metric"]: c["verdict"] for c in pair if c["task"] == task}
            for metric in metrics_of(summary):
                words = VERDICTS[verdicts.get(metric)]
                names[words].append(f"{task} {metric}")
        parts = [f"{words}: {', '.join(names[words])}" for words in names if names[words]]
        line = f"{a} → {b}: {'; '.join(parts)}."
        mains = [c for c in pair if c["main"] and c["n"] >= FEWEST]
        points = [100 * c["delta"] for c in mains if c["metric"] != "bits_per_byte"]
        if points:
            average = fmean(points)
            line += f" Main metrics on average: {average:+.2f} points (sets: {len(points)})."
            if average >= 0 and any(c["verdict"] == "fell" for c in mains):
                line += " The average hides what fell."
        lines.append(line)
    return lines


def comparison_report(results, comparisons, samples):
    """The comparison as Markdown: results, sentences, every difference, generated answers."""
    head = "from to set metric n difference interval p verdict".split()
    rows = []
    for c in comparisons:
        interval = "" if c["low"] is None else f"{c['low']:+.4f} to {c['high']:+.4f}"
        p = f"{c['mcnemar_p']:.3g}" if "mcnemar_p" in c else ""
        names = c["a"], c["b"], c["task"], c["metric"], c["n"]
        rows.append([*names, f"{c['delta']:+.4f}", interval, p, c["verdict"]])
    paragraphs = [
        "# Evaluation",
        results_table(results),
        *headlines(results, comparisons),
        "Two models answered the same questions, so intervals come from paired differences "
        "(bootstrap). Where an interval contains 0, or McNemar's p is 0.05 or more, the difference "
        "is no more than noise.",
        markdown_table(head, *rows),
    ]
    for task, own in next(iter(samples.values())).items():
        for n, row in enumerate(own[:20]):
            if "output" not in row:
                continue
            prompt = str(row.get("prompt") or row["prompts"][0])
            quoted = prompt[-600:].replace("\n", "\n> ")
            paragraphs += [f"## {task}, question {n + 1}", f"> {quoted}"]
            for name, sets in samples.items():
                paragraphs.append(f"**{name}:** {sets[task][n]['output']}")
    return "\n\n".join(paragraphs) + "\n"


def plot_comparison(results, mains, comparisons, file):
    """Bars of each set's main metric, mains[set], by model; below, the paired differences with
    their intervals."""
    from matplotlib.figure import Figure

    mains = {task: metric for task, metric in mains.items() if metric}
    comparisons = [c for c in comparisons if c["main"]][::-1]
    height = 0.25 * len(comparisons)
    figure = Figure(figsize=(max(7, 3 + 1.3 * len(mains)), 4 + height), layout="constrained")
    bars, intervals = figure.subplots(2, height_ratios=(4, 1 + height))
    width = 0.8 / len(results)
    for n, (name, sets) in enumerate(results.items()):
        offset = (n - (len(results) - 1) / 2) * width
        x = np.arange(len(mains)) + offset
        values = [sets[task][metric] for task, metric in mains.items()]
        errors = [spread(sets[task], metric) or 0 for task, metric in mains.items()]
        bars.bar(x, values, width, yerr=errors, label=name, capsize=2)
    labels = [f"{task}\n{metric}" for task, metric in mains.items()]
    bars.set_xticks(range(len(mains)), labels, fontsize=8)
    bars.legend()
    colours = {"rose": "tab:green", "fell": "tab:red", "noise": "tab:gray"}
    for n, c in enumerate(comparisons):
        colour = colours.get(c["verdict"], "lightgray")
        intervals.plot(c["delta"], n, "o", color=colour)
        if c["low"] is not None:
            intervals.plot([c["low"], c["high"]], [n, n], color=colour)
    labels = [f"{c['a']} → {c['b']}, {c['task']}" for c in comparisons]
    intervals.set_yticks(range(len(comparisons)), labels, fontsize=8)
    intervals.margins(y=0.3)
    intervals.set_xlabel("paired difference, 95 % interval; gray: no more than noise")
    intervals.axvline(0, color="black", linewidth=0.8)
    intervals.set_visible(bool(comparisons))
    figure.savefig(file, dpi=130)
