"""The measured figures of the search, as the tables at the end of docs/how-the-search-works.md.

    python scripts/search_figures.py

From docs/results: search.json, proxy_correlation.json and bench_search.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "how-the-search-works.md"
RESULTS = ROOT / "docs" / "results"
FIGURES = RESULTS / "search.json"

QUESTIONS: dict[str, tuple[str, ...]] = {
    "how soon a candidate of the best percent is found, without seeds": (
        "enumerated_candidates",
        "seeds_of_10_in_best_percent",
        "evaluations_share",
    ),
    "what shared beginnings save": (
        "trie_share_of_bound_cpu",
        "trie_speedup_cpu",
        "trie_speedup_gpu_8b",
    ),
    "what screens save": ("study_speedup",),
    "whether proxies rank like the models they become": (
        "rank_correlation_before_repair",
        "rank_correlation_after_repair",
    ),
    "whether the tournament's winner beats the proxy's first choice": (
        "finalists",
        "winner_minus_proxy_first_bits_per_byte",
    ),
    "how far predictions are from measurements": (
        "memory_model_error_percent",
        "latency_model_error_percent",
        "latency_model_error_percent_gpu_8b",
    ),
    "how many candidates the paper's grid has": (
        "grid_feasible",
        "grid_feasible_without_reserve",
    ),
}


def main() -> None:
    """Write the tables between their markers."""
    page = PAGE.read_text(encoding="utf-8")
    for name, rows in (
        ("figures", table()),
        ("proxies", proxies()),
        ("interactions", interactions()),
        ("studies", studies()),
    ):
        page = filled(page, name, "\n".join(rows))
    PAGE.write_text(page, encoding="utf-8")


def filled(page: str, name: str, rows: str) -> str:
    """The page with these rows between the markers of that name."""
    begin, end = f"<!-- {name}: scripts/search_figures.py -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    assert rest and after, f"{PAGE} has lost its markers of {name}"
    return f"{before}{begin}\n{rows}\n{end}{after}"


def read(name: str) -> dict[str, Any]:
    """A results file."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def proxies() -> Iterator[str]:
    """Rank correlation of each proxy with what candidates are worth in the end."""
    known = read("proxy_correlation.json")
    better = known["correlations_of_the_better_half"]
    yield f"| proxy | Spearman, {len(known['candidates'])} candidates | 95 % | the better half |"
    yield "|---|---|---|---|"
    for name, entry in known["correlations"].items():
        span = f"{entry['low']:.2f} to {entry['high']:.2f}"
        yield f"| {name} | {entry['rho']:.3f} | {span} | {better[name]['rho']:.3f} |"


def interactions() -> Iterator[str]:
    """KL over the sum of prices, by the number of layers gone, for both proxies."""
    known = read("bench_search.json")
    cut, repaired = (known[proxy]["additive"] for proxy in ("cut", "repaired"))
    yield (
        "| layers gone | candidates | KL / sum of prices, as cut | ranks agree "
        "| with the quick repair | ranks agree |"
    )
    yield "|---|---|---|---|---|---|"
    for a, b in zip(cut["by_layers_gone"], repaired["by_layers_gone"], strict=True):
        yield (
            f"| {a['layers_gone']} | {a['candidates']} | {a['ratio']:.2f} "
            f"| {a['rank_correlation']:.2f} | {b['ratio']:.2f} | {b['rank_correlation']:.2f} |"
        )
    yield (
        f"| all | {cut['candidates']} | | {cut['rank_correlation']:.2f} | "
        f"| {repaired['rank_correlation']:.2f} |"
    )
    yield (
        f"| rank of the additive best | | {cut['rank_of_best'] + 1} | "
        f"| {repaired['rank_of_best'] + 1} | |"
    )


def studies() -> Iterator[str]:
    """How soon each sampler finds one of the best percent."""
    known = read("bench_search.json")
    yield "| proxy | begins with | proposed by | found | median evaluations | most |"
    yield "|---|---|---|---|---|---|"
    for proxy, entry in sorted(known.items(), reverse=True):
        for row in entry["studies"]:
            begin = "additive solutions" if row["seeded"] else "nothing"
            yield (
                f"| {proxy} | {begin} | {row['sampler']} | {row['found']} of {row['seeds']} "
                f"| {row['median_evaluations']:g} | {row['most_evaluations']} |"
            )


def table() -> Iterator[str]:
    """A row for each figure that was measured."""
    known = json.loads(FIGURES.read_text(encoding="utf-8"))
    yield "| question | figure | value | unit | measured on |"
    yield "|---|---|---|---|---|"
    for question, names in QUESTIONS.items():
        for name in (name for name in names if name in known):
            entry = known[name]
            yield (
                f"| {question} | `{name}` | {entry['value']:,} | {entry['unit']} "
                f"| {entry['device']} |"
            )
            question = ""


if __name__ == "__main__":
    main()
