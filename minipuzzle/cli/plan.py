"""`minipuzzle plan`: memory of a deployment, and what a budget leaves to remove."""

from __future__ import annotations

import json
from typing import Any

import click
from click.core import ParameterSource

from minipuzzle.units import parse_bytes, parse_tokens

NAMES = ["nvfp4", "int4", "fp8", "bf16", "fp32"]
PRECISION: dict[str, Any] = {"type": click.Choice(NAMES), "metavar": "PRECISION"}


def _list_presets(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """`--preset list` needs no model: print and leave."""
    if value == "list":
        from minipuzzle.deployments import listing

        click.echo(listing())
        context.exit()
    return value


@click.command()
@click.argument("model")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit of a hub model.")
@click.option(
    "--preset",
    metavar="NAME",
    is_eager=True,
    callback=_list_presets,
    help="Deployment and budget by name; `list` shows them. Other options change it.",
)
@click.option("--budget", metavar="SIZE", help='Memory it may take: "31.7GiB", or "83%" of it.')
@click.option(
    "--context", default="2k", show_default=True, metavar="TOKENS", help="k = 2^10, M = 2^20."
)
@click.option(
    "--batch",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Sequences served at once.",
)
@click.option("--weights", default="bf16", show_default=True, **PRECISION, help="Weights.")
@click.option("--embeddings", **PRECISION, help="Embeddings and head. [default: that of --weights]")
@click.option("--kv", default="bf16", show_default=True, **PRECISION, help="KV cache.")
@click.option("--state", default="fp32", show_default=True, **PRECISION, help="Mamba states.")
@click.option("--conv", default="bf16", show_default=True, **PRECISION, help="Convolution states.")
@click.option(
    "--reserve", default="0GiB", show_default=True, metavar="SIZE", help="Kept for other things."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    revision: str | None,
    preset: str | None,
    budget: str | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Show what a deployment needs in memory, and what a budget removes.

    MODEL is a folder, a hub id, or `demo` for the bundled model; only its config.json is read.
    A PRECISION is nvfp4 (4.5 bits), int4, fp8, bf16 or fp32.

    \b
    Examples:
      minipuzzle plan MODEL --preset rtx4090-32k --context 128k
      minipuzzle plan MODEL --budget 31.7GiB --context 1M --weights nvfp4 --kv nvfp4
    """
    from minipuzzle import deployments
    from minipuzzle.plan import plan, render

    if preset is not None:
        fields = {name: value for name, value in fields.items() if _given(name)}
        budget = budget or deployments.find(preset).budget
    if "context" in fields:
        fields["context"] = parse_tokens(fields["context"])
    if "reserve" in fields:
        fields["reserve_bytes"] = parse_bytes(fields.pop("reserve"))
    deployment = deployments.deployment(preset, fields)
    made = plan(model, revision=revision, budget=budget, deployment=deployment)
    click.echo(json.dumps(made.to_json(), indent=2) if as_json else render(made))


def _given(option: str) -> bool:
    """Whether an option stands on the command line."""
    source = click.get_current_context().get_parameter_source(option)
    return source is not ParameterSource.DEFAULT
