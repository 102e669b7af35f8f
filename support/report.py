"""Tables and figures for people."""

import json
from statistics import fmean


def aligned_columns(*rows):
    """Rows of words as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def markdown_table(head, *rows):
    """Rows as a table in Markdown."""
    told = lambda v: (
        f"{v:.4g}" if isinstance(v, float) else v if isinstance(v, str) else json.dumps(v)
    )
    return "\n".join(
        f"| {' | '.join(map(told, row))} |" for row in (head, ["---"] * len(head), *rows)
    )


def show_answers(before, after, num_samples):
    """Prints the first questions with the answer before and after training, and the share right.
    Returns the shares for the log: {} where no row has a gold answer."""
    for old, new in list(zip(before, after))[:num_samples]:
        print(f"\n{old['prompt'][-400:]}")
        print(f"  before: {old['output'][:200]!r}\n  after:  {new['output'][:200]!r}")
    gold = [n for n, row in enumerate(after) if row["gold"]]
    if not gold:
        return {}
    was, now = (
        fmean(rows[n]["answer"] == rows[n]["gold"] for n in gold) for rows in (before, after)
    )
    chance = fmean(1 / len(after[n]["choices"]) for n in gold)
    print(
        f"\nanswers right on {len(gold)} evaluation questions: {was:.1%} before, {now:.1%} after "
        f"(chance {chance:.0%})"
    )
    return {"eval_answers_before": was, "eval_answers": now}
