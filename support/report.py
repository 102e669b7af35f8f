"""Tables, sentences and figures for people."""

import json
import math
import re
from itertools import groupby
from operator import itemgetter
from statistics import fmean

import numpy as np

from support.files import write_text


def aligned_columns(*rows):
    """Rows of words as lines, the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        for word, width in zip(others, widths[1:]):
            cells.append(word.rjust(width))
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

    def share_right(rows):
        return fmean(rows[n]["answer"] == rows[n]["gold"] for n in gold)

    was = share_right(before)
    now = share_right(after)
    chance = fmean(1 / len(after[n]["choices"]) for n in gold)
    print(
        f"\nanswers right on {len(gold)} evaluation questions: {was:.1%} before, {now:.1%} after "
        f"(chance {chance:.0%})"
    )
    return {"eval_answers_before": was, "eval_answers": now}


# --- data: what became of the rows (a Ledger), and their lengths ----------------------------------


def drop_reasons(ledger):
    return "".join(
        f"; {why}: {reason['rows']:,}, first {reason['where'][0]}"
        for why, reason in ledger.reasons.items()
    )


def ledger_text(ledger):
    """Rows and tokens in a few lines."""
    text = f"{ledger.rows:,} rows: {ledger.examples:,} examples"
    if ledger.rows_truncated:
        text += f", {ledger.rows_truncated:,} cut to max_length"
    if ledger.rows_dropped:
        text += f", {ledger.rows_dropped:,} dropped{drop_reasons(ledger)}"
    if ledger.rows_not_sampled:
        text += f", {ledger.rows_not_sampled:,} not sampled"
    for note, count in ledger.notes.items():
        text += f"\n{count:,} {note}"
    if len(ledger.sources) > 1:
        shares = [
            f"{s['share']:.1%} from {s['name']} ({s['examples']:,})" for s in ledger.sources
        ]
        text += f"\nof the rows seen {' · '.join(shares)}"
    counts = []
    for name in ("scored", "masked", "truncated", "dropped"):
        if count := getattr(ledger, name):
            counts.append(f"{count:,} {name} ({count / ledger.tokens:.1%})")
    return f"{text}\n{ledger.tokens:,} tokens: {' · '.join(counts)}"


def print_lengths(unit, rows):
    """rows: {name: lengths}."""
    percents = 50, 90, 95, 99, 100
    table = [[unit, "min", "mean", "max", *(f"p{percent}" for percent in percents)]]
    for name, values in rows.items():
        numbers = [min(values), np.mean(values), max(values)]
        numbers += [*np.percentile(values, percents)]
        table.append([name, *(f"{number:.1f}" for number in numbers)])
    print(aligned_columns(*table))


def plot_lengths(unit, lengths, file):
    """A histogram of one or two lists of lengths: of the training and the evaluation rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{unit} of an example", ylabel="examples")
    labels = ["data", "eval_data"]
    axes.hist(lengths, bins=60, label=labels[: len(lengths)])
    axes.legend()
    figure.savefig(file, dpi=130)


# --- evaluations: results are {model: {set: summary}}, comparisons those of eval.compare_all ------

FEWEST = 20  # rows: of fewer a standard error or an interval says little


def metrics_of(summary):
    """The names of the metrics in a set's summary."""
    return [name for name in summary if not re.search(r"^n$|_n$|_stderr$", name)]


# the first of these that a set has represents it
MAIN = "acc_norm", "acc", "exact_match_flexible", "accuracy", "exact_match", "bits_per_byte"


def main_metric(metrics):
    return next((name for name in MAIN if name in metrics), None)


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
    first, *_ = results.values()
    for task, summary in first.items():
        for name in metrics_of(summary):
            cells = [cell(sets[task], name) for sets in results.values()]
            count = summary.get(f"{name}_n", summary["n"])
            rows.append([task, name, count, *cells])
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
    for (a, b), pair in groupby(comparisons, itemgetter("a", "b")):
        pair = list(pair)
        names = {words: [] for words in VERDICTS.values()}
        for task, summary in results[a].items():
            verdicts = {c["metric"]: c["verdict"] for c in pair if c["task"] == task}
            for metric in metrics_of(summary):
                words = VERDICTS[verdicts.get(metric)]
                names[words].append(f"{task} {metric}")
        parts = [f"{words}: {', '.join(names[words])}" for words in names if names[words]]
        line = f"{a} → {b}: {'; '.join(parts)}."
        mains = [c for c in pair if c["main"] and c["n"] >= FEWEST]
        scores = [c for c in mains if c["metric"] != "bits_per_byte"]
        points = [100 * c["delta"] for c in scores]
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
        difference = f"{c['delta']:+.4f}"
        rows.append([*names, difference, interval, p, c["verdict"]])
    paragraphs = [
        "# Evaluation",
        results_table(results),
        *headlines(results, comparisons),
        "Two models answered the same questions, so intervals come from paired differences "
        "(bootstrap). Where an interval contains 0, or McNemar's p is 0.05 or more, the difference "
        "is no more than noise.",
        markdown_table(head, *rows),
    ]
    first, *_ = samples.values()
    for task, own in first.items():
        for n, row in enumerate(own[:20]):
            if "output" not in row:
                continue
            prompt = str(row.get("prompt") or row["prompts"][0])
            quoted = prompt[-600:].replace("\n", "\n> ")
            paragraphs += [f"## {task}, question {n + 1}", f"> {quoted}"]
            for name, sets in samples.items():
                paragraphs.append(f"**{name}:** {sets[task][n]['output']}")
    return "\n\n".join(paragraphs) + "\n"


def plot_comparison(results, comparisons, file):
    """Bars of each set's main metric, by model; below, the paired differences with
    their intervals."""
    from matplotlib.figure import Figure

    mains, (sets, *_) = {}, results.values()
    for task, summary in sets.items():
        if metric := main_metric(summary):
            mains[task] = metric
    comparisons = [c for c in comparisons if c["main"]][::-1]
    height = 0.25 * len(comparisons)
    size = max(7, 3 + 1.3 * len(mains)), 4 + height
    figure = Figure(figsize=size, layout="constrained")
    bars, intervals = figure.subplots(2, height_ratios=(4, 1 + height))
    width = 0.8 / len(results)
    for n, (name, sets) in enumerate(results.items()):
        offset = (n - (len(results) - 1) / 2) * width
        x = np.arange(len(mains)) + offset
        values, errors = [], []
        for task, metric in mains.items():
            values.append(sets[task][metric])
            errors.append(spread(sets[task], metric) or 0)
        bars.bar(x, values, width, yerr=errors, label=name, capsize=2)
    labels = [f"{task}\n{metric}" for task, metric in mains.items()]
    bars.set_xticks(range(len(mains)), labels, fontsize=8)
    bars.legend()
    colours = {"rose": "tab:green", "fell": "tab:red", "noise": "tab:gray"}
    for n, c in enumerate(comparisons):
        colour = colours.get(c["verdict"], "lightgray")
        intervals.plot(c["delta"], n, "o", color=colour)
        if c["low"] is not None:
            ends = c["low"], c["high"]
            intervals.plot(ends, [n, n], color=colour)
    labels = [f"{c['a']} → {c['b']}, {c['task']}" for c in comparisons]
    intervals.set_yticks(range(len(comparisons)), labels, fontsize=8)
    intervals.margins(y=0.3)
    intervals.set_xlabel("paired difference, 95 % interval; gray: no more than noise")
    intervals.axvline(0, color="black", linewidth=0.8)
    intervals.set_visible(bool(comparisons))
    figure.savefig(file, dpi=130)


def write_comparison(folder, results, comparisons, samples, failed):
    """results.json, report.md and results.png; prints the table and the sentences."""
    content = {"models": results, "pairs": comparisons, "failed": failed}
    write_text(folder / "results.json", json.dumps(content, indent=2))
    write_text(folder / "report.md", comparison_report(results, comparisons, samples))
    plot_comparison(results, comparisons, folder / "results.png")
    print(results_table(results), *headlines(results, comparisons), sep="\n")
