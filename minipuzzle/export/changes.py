"""What a cut took away, in words."""

from __future__ import annotations

from dataclasses import fields

from minipuzzle.architecture import KINDS, Architecture, Kind

WORDS: dict[Kind, str] = {"mamba": "Mamba-2", "attention": "attention", "ffn": "FFN"}
AXES = {
    "heads": "heads",
    "head_dim": "head dimension",
    "groups": "groups",
    "state": "state size",
    "query_heads": "query heads",
    "kv_heads": "KV heads",
    "width": "width",
}


def describe_cut(before: Architecture, after: Architecture) -> list[str]:
    """One phrase per change from `before` to `after`: layers first, then what was narrowed."""
    phrases = []
    if after.hidden != before.hidden:
        phrases.append(f"residual stream {before.hidden} to {after.hidden}")
    for kind in KINDS:
        had, has = before.counts()[kind], after.counts()[kind]
        if has != had:
            phrases.append(f"{had - has} of {had} {WORDS[kind]} layers removed")
    for kind in KINDS:
        phrases += _narrowed(kind, before, after)
    return phrases


def _narrowed(kind: Kind, before: Architecture, after: Architecture) -> list[str]:
    layers = [[layer for layer in a.layers if layer.kind == kind] for a in (before, after)]
    if not all(layers):
        return []
    names = [field.name for field in fields(layers[0][0]) if field.name in AXES]
    sizes = {name: [_sizes([getattr(x, name) for x in side]) for side in layers] for name in names}
    return [
        f"{WORDS[kind]} {AXES[name]} {had} to {has}"
        for name, (had, has) in sizes.items()
        if had != has
    ]


def _sizes(values: list[int]) -> str:
    """`672`, or `192-672` where layers differ."""
    least, most = min(values), max(values)
    return str(most) if least == most else f"{least}-{most}"
