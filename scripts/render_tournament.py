"""docs/results/tournament.json as Markdown: ranks of the finalists, worth of the winner."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

Record = Mapping[str, Any]


def tournaments(results: Record) -> str:
    """A part for every model that a tournament was held for."""
    return "\n\n".join(part(name, record) for name, record in results.items())


def part(name: str, record: Record) -> str:
    """The table of ranks and the comparison on the report split."""
    columns = max((list(row["ranks"]) for row in record["ranks"]), key=len)
    lines = [
        f"`{name}`: {record['parameters'] / 1e6:.2f} M parameters, {record['trials']} candidates, "
        f"{record['finalists']} finalists; {record['tokens']:,} tokens of distillation up to the "
        f"last rung, KL on {record['search_tokens']:,} tokens of search text. {record['device']}.",
        "",
        f"| finalist | {' | '.join(columns)} | last KL | tasks, % |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for row in record["ranks"]:
        places = [str(row["ranks"].get(column, "")) for column in columns]
        last = list(row["kl"].values())[-1]
        accuracy = f"{100 * fmean(row['tasks'].values()):.1f}" if row.get("tasks") else ""
        lines.append(f"| {shape(row['point'])} | {' | '.join(places)} | {last:.4f} | {accuracy} |")
    return "\n".join([*lines, "", comparison(record["report"])])


def shape(point: Mapping[str, int]) -> str:
    """The decisions of a point that cut something, as they are called in the space."""
    return ", ".join(f"{name} {value}" for name, value in point.items() if value or "." not in name)


def comparison(report: Record) -> str:
    """Bits per byte of winner, proxy's first choice and teacher on text that chose nothing."""
    losses, gap = report["bits_per_byte"], report["winner_minus_proxy_first"]
    if report["numbers"]["winner"] == report["numbers"]["proxy_first"]:
        return "The winner is the proxy's first choice."
    late = (
        "dropped on the way and trained to the end for this comparison"
        if report["proxy_first_was_dropped"]
        else "which came to the end too"
    )
    return (
        f"On {report['tokens']:,} tokens of report text after the same training: winner "
        f"{losses['winner']:.4f}, the proxy's first choice {losses['proxy_first']:.4f} bits per "
        f"byte ({late}), best by KL {losses['best_by_kl']:.4f}, teacher {losses['teacher']:.4f}. "
        f"Winner minus the proxy's first choice: {gap['difference']:+.4f} ± "
        f"{gap['standard_error']:.4f} (standard error over pieces of the text)."
    )
