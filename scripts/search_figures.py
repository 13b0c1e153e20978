"""The measured figures of the search, as the table at the end of docs/how-the-search-works.md.

python scripts/search_figures.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "how-the-search-works.md"
FIGURES = ROOT / "docs" / "results" / "search.json"
BEGIN, END = "<!-- figures: scripts/search_figures.py -->", "<!-- end of figures -->"

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
    """Write the table between its markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"{PAGE} has lost its markers"
    rows = "\n".join(table())
    PAGE.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}", encoding="utf-8")


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
