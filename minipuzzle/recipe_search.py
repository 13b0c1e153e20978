"""The recipe's `search`: the space, the study, the tournament."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minipuzzle.metrics import LayerMetric
from minipuzzle.recipe_fields import LatencyText, ParametersText, Section

Objective = Literal["kl", "memory", "latency"]


class MaxRemoved(Section):
    """How many layers of each kind a candidate may lose."""

    mamba: int = Field(default=2, ge=0, description="Mamba layers")
    attention: int = Field(default=1, ge=0, description="attention layers")
    ffn: int = Field(default=3, ge=0, description="FFN layers")


class AxisRange(Section):
    """How far an axis may be narrowed. Only sizes that can be served are tried."""

    min: float = Field(
        default=1.0, gt=0, le=1, description="least share of its units that stays; 1: never cut"
    )
    step: int = Field(default=1, ge=1, description="sizes are this many units apart")


class AxesConfig(Section):
    """What of a layer may go: ranges of the axes."""

    width: AxisRange = Field(default=AxisRange(min=0.25, step=16), description="FFN channels")
    heads: AxisRange = Field(default=AxisRange(step=8), description="Mamba heads")
    head_dim: AxisRange = Field(default=AxisRange(step=8), description="channels of a Mamba head")
    query_heads: AxisRange = Field(default=AxisRange(), description="query heads")
    kv_heads: AxisRange = Field(default=AxisRange(), description="KV heads with their query heads")
    hidden: AxisRange = Field(default=AxisRange(step=64), description="channels of the stream")

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, given: Any) -> Any:
        """An axis that is given in part keeps the rest of its own default."""
        if not isinstance(given, Mapping):
            return given
        return {
            name: {**cls.model_fields[name].default.model_dump(), **part}
            if isinstance(part, Mapping) and name in cls.model_fields
            else part
            for name, part in given.items()
        }


class LimitsConfig(Section):
    """Limits beside the memory budget."""

    parameters: ParametersText | None = Field(
        default=None, description='parameters: "4B", or a share of the teacher\'s; null: any number'
    )
    latency: LatencyText | None = Field(
        default=None,
        description='time of one decoding step at the deployment: "12ms", or a share of the '
        "teacher's; null: any",
    )


class RungConfig(Section):
    """One round of the tournament."""

    steps: int = Field(default=8, ge=0, description="distillation steps up to the end of it")
    keep: int = Field(default=1, ge=1, description="finalists that go on to the next one")


class TournamentConfig(Section):
    """Finalists are repaired, distilled for a little and compared by tasks."""

    finalists: int = Field(
        default=3, ge=1, description="candidates that take part; 1: none is held"
    )
    blocks: int = Field(default=32, ge=1, description="calibration sequences of their repair")
    rungs: tuple[RungConfig, ...] = Field(
        default=(RungConfig(),), strict=False, min_length=1, description="rounds, shortest first"
    )
    tasks: tuple[str, ...] = Field(
        default=(), strict=False, description="lm-eval tasks that rank the last; (): by KL"
    )
    limit: int | None = Field(default=100, ge=1, description="questions per task; null: all")


class SearchConfig(Section):
    """Architectures under the budget, and the best of them."""

    trials: int = Field(default=40, ge=1, description="candidates evaluated in the teacher")
    timeout: float | None = Field(
        default=None, gt=0, description="seconds after which none is begun; null: no limit"
    )
    blocks: int = Field(default=8, ge=1, description="sequences of search text per candidate")
    batch: int = Field(default=8, ge=1, description="candidates evaluated together")
    screen: bool = Field(
        default=True, description="give up candidates that few sequences show to be worse"
    )
    proxy: Literal["cut", "repaired"] = Field(
        default="repaired", description="judge candidates with a quick repair, or as they are cut"
    )
    proxy_blocks: int = Field(
        default=16, ge=1, description="calibration sequences of that quick repair"
    )
    objectives: tuple[Objective, ...] = Field(
        default=("kl",),
        strict=False,
        min_length=1,
        description="kl: the best under the budget; with memory or latency: the Pareto front",
    )
    sampler: Literal["auto", "gp", "tpe", "random"] = Field(
        default="auto", description="how Optuna proposes: Gaussian process, TPE or at random"
    )
    seeded: bool = Field(
        default=True, description="begin with the exact additive solutions and the greedy ones"
    )
    storage: str | None = Field(
        default=None,
        min_length=1,
        description="Optuna storage URL that several workers share; null: SQLite in the run folder",
    )
    heartbeat: int = Field(
        default=60,
        ge=1,
        description="seconds between signs of life of workers that share a storage",
    )
    layers: Literal["importance", "free"] = Field(
        default="importance",
        description="layers go in the order of their scores, kind by kind; free: any set of them",
    )
    layer_metric: LayerMetric | Literal["removal_order"] = Field(
        default="hidden_mse", description="that order: a metric, or as iterative removal took them"
    )
    max_removed: MaxRemoved = Field(default=MaxRemoved(), description="layers that may go")
    protect: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), strict=False, description="positions of layers that stay"
    )
    drop: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), strict=False, description="positions of layers that go in any case"
    )
    widths: Literal["uniform", "per_layer"] = Field(
        default="uniform", description="one FFN width for all layers, or one for each"
    )
    axes: AxesConfig = Field(default=AxesConfig(), description="how narrow layers may become")
    limits: LimitsConfig = Field(default=LimitsConfig(), description="beside the budget")
    tournament: TournamentConfig = Field(
        default=TournamentConfig(), description="finalists and what decides between them"
    )
