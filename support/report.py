"""Tables and figures for people."""

import json


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
