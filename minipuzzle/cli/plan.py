"""`minipuzzle plan`: memory of a deployment, and what a budget leaves to remove."""

from __future__ import annotations

import json
from typing import Any

import click
from click.core import ParameterSource

from minipuzzle.units import parse_bytes, parse_tokens

NAMES = ["nvfp4", "int4", "fp8", "bf16", "fp32"]
TRAINING = (
    *("train", "student", "micro", "tokens", "master"),
    *("processes", "teacher_offload", "memory", "engine"),
)
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
@click.option("--train", is_flag=True, help="Memory of the distillation instead.")
@click.option(
    "--student",
    metavar="STUDENT",
    default="83%",
    show_default=True,
    help="Its folder, or its share of the teacher's parameters (FFN narrowed).",
)
@click.option("--micro", type=click.IntRange(min=1), default=1, help="Sequences trained at once.")
@click.option("--tokens", default="4k", metavar="TOKENS", help="Of a trained sequence.")
@click.option("--master", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Its weights.")
@click.option("--processes", type=click.IntRange(min=1), default=1, help="Sharing all (FSDP2).")
@click.option("--teacher-offload", is_flag=True, help="Teacher's weights in the host's memory.")
@click.option("--memory", metavar="SIZE", help="Of the card. [default: the preset's]")
@click.option(
    "--engine", type=click.Choice(["gpu", "cpu"]), default="gpu", help="bf16 autocast, or fp32."
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
      minipuzzle plan MODEL --train --student 83% --memory 80GiB --processes 8
    """
    training = {name: fields.pop(name) for name in TRAINING}
    if training.pop("train"):
        _train(model, revision, preset, as_json, training)
        return
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


def _train(
    model: str, revision: str | None, preset: str | None, as_json: bool, fields: dict[str, Any]
) -> None:
    from minipuzzle.trainplan import plan_training, render

    made = plan_training(
        model,
        revision=revision,
        student=fields.pop("student"),
        card=_card(preset, fields.pop("memory")),
        tokens=parse_tokens(fields.pop("tokens")),
        **fields,
    )
    click.echo(json.dumps(made.to_json(), indent=2) if as_json else render(made))


def _card(preset: str | None, memory: str | None) -> tuple[int | None, int]:
    """Bytes that the card has, and those of them that are kept free."""
    from minipuzzle import deployments

    reserve = 0 if preset is None else deployments.find(preset).build().reserve_bytes
    if memory is not None:
        return parse_bytes(memory), reserve
    return (None if preset is None else parse_bytes(deployments.find(preset).budget)), reserve


def _given(option: str) -> bool:
    """Whether an option stands on the command line."""
    source = click.get_current_context().get_parameter_source(option)
    return source is not ParameterSource.DEFAULT
