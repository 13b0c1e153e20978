"""Deployments by name: a card, a context, precisions and the memory that the card leaves.

Where a number of a card comes from stands beside it. "reports" is the total that CUDA gives out
(`torch.cuda.mem_get_info`, the "total capacity" of PyTorch's out-of-memory message), which is less
than what is printed on the box: the driver keeps a part. Of it, 5 % are kept free for the context
of CUDA, kernels, activations and fragmentation: the share that Nemotron Nano 2 keeps on its A10G
(arXiv 2508.14444, section 4).
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from typing import Any

from minipuzzle.errors import UserError
from minipuzzle.memory import Deployment, Precision
from minipuzzle.units import parse_bytes, parse_tokens

RESERVED_SHARE = 0.05


@dataclass(frozen=True)
class Preset:
    """A deployment and the memory it may take, written as in a recipe.

    `about` is what it is for, `source` where its numbers come from.
    """

    about: str
    source: str
    budget: str
    context: str
    reserve: str = "0GiB"
    batch: int = 1
    weights: Precision = "bf16"
    embeddings: Precision = "bf16"
    kv: Precision = "bf16"
    state: Precision = "bf16"
    conv: Precision = "bf16"

    def settings(self) -> dict[str, Any]:
        """The keys of a recipe's `deployment`."""
        return {k: v for k, v in asdict(self).items() if k not in ("about", "source", "budget")}

    def build(self) -> Deployment:
        """The deployment that `minipuzzle.memory.memory` counts for."""
        given = self.settings()
        context, reserve = given.pop("context"), given.pop("reserve")
        return Deployment(
            context=parse_tokens(context), reserve_bytes=parse_bytes(reserve), **given
        )


def _card(about: str, reports: float, context: str, source: str) -> Preset:
    """A card that reports so many GiB: bf16, fp32 Mamba states as transformers keeps them."""
    return Preset(
        about=about,
        source=f"reports {reports} GiB ({source})",
        budget=f"{reports}GiB",
        context=context,
        reserve=f"{RESERVED_SHARE * reports:.2f}GiB",
        state="fp32",
    )


PRESETS: dict[str, Preset] = {
    # The paper gives the budget, "FP4" and 1M tokens; the rest is read out of it. 56.32 B
    # parameters are its 29.5 GiB at 4.5 bits, embeddings included. 8-bit keys and values of five
    # layers would overshoot, so they were counted at 4. Its buffer is not printed: with 2^20 tokens
    # and bf16 states the items of the candidates circled in figure 10 (44 Mamba, 49 FFN and 5
    # attention layers of width 30720; twice 46, 48, 4 of width 32768) add up to 29.90, 29.87 and
    # 29.87 GiB, and the figure shows them at 31.52 and 31.56 (docs/the-paper-case.md), 1.63 to 1.68
    # GiB more. The 47B that was released (45, 48, 5 of width 30720) then needs 31.55 GiB.
    "rtx5090-1m": Preset(
        about="RTX 5090, 1M tokens in 4 bits: the case of Nemotron-H 47B",
        source="budget: arXiv 2504.03624, section 3.3; reserve: fitted to its figure 10",
        budget="31.7GiB",
        context="1M",
        reserve="1.68GiB",
        weights="nvfp4",
        embeddings="nvfp4",
        kv="int4",
    ),
    # 22.06 GiB less 5 % and 1.3 GiB for a vision encoder: what is kept free is off the budget.
    "a10g-128k": Preset(
        about="A10G, 128k tokens in bf16: the case of Nemotron Nano 2",
        source="arXiv 2508.14444, section 4: 22.06 GiB less 5 % and 1.3 GiB for a vision encoder",
        budget="19.66GiB",
        context="128k",
    ),
    "rtx3060-8k": _card("RTX 3060 12 GB", 11.76, "8k", "TencentARC/PhotoMaker issue 47"),
    "rtx3090-32k": _card("RTX 3090 24 GB", 23.70, "32k", "Lightning-AI/lit-llama issue 137"),
    "rtx4090-32k": _card("RTX 4090 24 GB", 23.64, "32k", "ali-vilab/VGen issue 104"),
    "l40s-64k": _card("L40S 48 GB", 44.42, "64k", "stepfun-ai/Step-Video-T2V issue 8"),
    "a100-80gb-128k": _card("A100 80 GB", 79.25, "128k", "levihsu/OOTDiffusion issue 235"),
    "h100-80gb-128k": _card("H100 80 GB", 79.11, "128k", "vllm-project/vllm issue 27508"),
    "h200-128k": _card("H200 141 GB", 139.80, "128k", "PyTorch's messages on machines with 8 H200"),
}


def find(name: str) -> Preset:
    """The preset of that name; UserError with the nearest one where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
    raise UserError(f"there is no preset {name!r}; {hint}")


def deployment(preset: str | None, changes: dict[str, Any]) -> Deployment:
    """The deployment of a preset (None: the default one) with some fields changed."""
    return Deployment(**changes) if preset is None else replace(find(preset).build(), **changes)


def listing() -> str:
    """All presets, one per line of at most 80 columns."""
    lines = [
        f"{'preset':<16}{'budget':>9}{'reserve':>9}{'context':>9}  {'weights':<9}{'KV':<6}state",
        f"{'':<16}{'GiB':>9}{'GiB':>9}{'tokens':>9}",
    ]
    for name, preset in PRESETS.items():
        sizes = "".join(f"{parse_bytes(x) / 2**30:>9.2f}" for x in (preset.budget, preset.reserve))
        bits = f"{preset.weights:<9}{preset.kv:<6}{preset.state:<7}"
        lines.append(f"{name:<16}{sizes}{preset.context:>9}  {bits}")
    return "\n".join(line.rstrip() for line in lines)
