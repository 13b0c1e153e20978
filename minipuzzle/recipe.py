"""The recipe of a run: what to compress, to which budget, and the settings of every stage.

Frozen and complete: each stage gets the whole recipe. Unknown keys, wrong types and impossible
values are one line that names the key, the place and, for a misspelt key, the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from minipuzzle.errors import UserError
from minipuzzle.metrics import UNIT_METRICS, LayerMetric, UnitMetric
from minipuzzle.recipe_deployment import (
    DeploymentConfig,
    names_preset,
    preset_of,
    without_deployment,
)
from minipuzzle.recipe_fields import BudgetText, Section
from minipuzzle.recipe_io import (
    Place,
    anchored,
    explain,
    merged,
    override_mapping,
    portable_model,
    read_yaml,
)
from minipuzzle.recipe_search import AxesConfig, AxisRange, MaxRemoved, SearchConfig

__all__ = [
    "AxesConfig",
    "AxisRange",
    "DataConfig",
    "DeploymentConfig",
    "DistillConfig",
    "MaxRemoved",
    "Recipe",
    "SearchConfig",
    "SourceConfig",
    "demo_recipe",
]


class SourceConfig(Section):
    """Where text comes from."""

    source: str = Field(
        min_length=1,
        description="python-packages:NAME,..., a .txt, .jsonl or .parquet file, "
        "or a Hugging Face dataset name",
    )
    block: int = Field(default=512, ge=16, description="tokens per sequence")


class DataConfig(Section):
    """The four splits. Choices look at `search` only; `report` is for the final tables."""

    calibration: SourceConfig = Field(
        default=SourceConfig(source="python-packages:torch,transformers,sympy"),
        description="text that scores and repair are computed on",
    )
    distillation: SourceConfig = Field(
        default=SourceConfig(source="python-packages:torch,transformers,sympy"),
        description="text the student learns from",
    )
    search: SourceConfig = Field(
        default=SourceConfig(source="python-packages:optuna,mpmath"),
        description="text that every choice is made on",
    )
    report: SourceConfig = Field(
        default=SourceConfig(source="python-packages:networkx,sqlalchemy"),
        description="text of the final tables, seen by nothing else",
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_default_sources(cls, given: Any) -> Any:
        """A split that is given without a source keeps its default one."""
        if not isinstance(given, Mapping):
            return given
        return {
            name: {"source": cls.model_fields[name].default.source, **split}
            if isinstance(split, Mapping) and name in cls.model_fields
            else split
            for name, split in given.items()
        }


class ScoreConfig(Section):
    """Importance of layers, channels and heads."""

    blocks: int = Field(default=8, ge=1, description="sequences that layers are scored on")
    unit_blocks: int = Field(default=32, ge=1, description="sequences for channels and heads")
    metrics: tuple[LayerMetric, ...] = Field(
        default=("hidden_mse", "cosine"),
        strict=False,
        min_length=1,
        description="of layers: hidden_mse, logit_mse, kl, cosine",
    )
    unit_metrics: tuple[UnitMetric, ...] = Field(
        default=UNIT_METRICS,
        strict=False,
        description="of channels and heads: activation, flap, energy, surgeon",
    )
    iterative: Annotated[int, Field(ge=0)] | Literal["budget"] = Field(
        default=0,
        description="layers removed one by one, the rest scored again after each; "
        "`budget`: until the budget is met",
    )
    iterative_metric: LayerMetric = Field(
        default="logit_mse", description="which layer goes next in that"
    )
    residency: Literal["auto", "resident", "streamed"] = Field(
        default="auto",
        description="where models live in score and repair: on the device, or streamed from their "
        "checkpoints; auto: what fits",
    )


class PruneConfig(Section):
    """Which candidate of the search is cut out."""

    candidate: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="number of one in search/candidates; null: the best"
    )


class RepairConfig(Section):
    """Re-fitting of the projections that read and write the stream, in closed form."""

    blocks: int = Field(default=96, ge=1, description="sequences of calibration text")
    ridge: float = Field(
        default=1e-3, gt=0, description="pull towards the old weights, relative to the mean power"
    )
    reader_ridge: float = Field(
        default=1e-3, ge=0, description="the same for readers of the stream and head; 0: they stay"
    )
    steps: int = Field(
        default=0, ge=0, description="on the linearisation of narrowed layers, before the writer"
    )


class DistillConfig(Section):
    """Training of the student towards the teacher's distribution."""

    steps: int = Field(default=200, ge=0, description="optimiser steps")
    batch: int = Field(default=8, ge=1, description="sequences a step")
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=5e-4, description="peak of the schedule; `auto`: found by a few short trainings"
    )
    schedule: Literal["cosine", "wsd"] = Field(
        default="cosine", description="after the warm-up: a cosine, or stable and then a line down"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps that warm up")
    decay: float = Field(default=0.2, ge=0, le=1, description="share of the steps that wsd falls")
    temperature: float = Field(default=1.0, gt=0, description="of both distributions")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), strict=False, description="of AdamW")
    floor: float = Field(default=0.0, ge=0, le=1, description="last learning rate, of the peak")
    clip: float = Field(default=1.0, ge=0, description="bound on the gradient's norm; 0: none")
    micro: int = Field(default=0, ge=0, description="sequences in memory at once; 0: the batch")
    checkpoint_every: int = Field(default=20, ge=0, description="steps between resume points")
    evaluate_every: int = Field(default=0, ge=0, description="steps between held-out losses")
    patience: int = Field(
        default=0, ge=0, description="end after so many held-out losses without gain; 0: never"
    )
    teacher: Literal["online", "sampled", "topk"] = Field(
        default="online",
        description="run on every batch, or once into `<run>/teacher-cache`: ids drawn from it, "
        "or its likeliest ids",
    )
    cache_draws: int = Field(default=50, ge=1, le=2**15, description="ids drawn a token")
    cache_top: int = Field(default=64, ge=1, description="likeliest ids kept a token")


class SpeedConfig(Section):
    """How speed is measured."""

    prompt: int = Field(default=64, ge=1, description="tokens of the prompt")
    tokens: int = Field(default=64, ge=1, description="tokens decoded")
    batch: int = Field(default=1, ge=1, description="sequences at once")
    repeats: int = Field(default=3, ge=1, description="repetitions; the median counts")


class EvalConfig(Section):
    """The final comparison of teacher, pruned, repaired and student."""

    blocks: int = Field(default=64, ge=1, description="sequences of report text")
    tasks: tuple[str, ...] = Field(default=("demo",), strict=False, description="lm-eval tasks")
    limit: int | None = Field(default=None, ge=1, description="questions per task; null: all")
    speed: SpeedConfig = Field(default=SpeedConfig(), description="the speed measurement")


class ExportConfig(Section):
    """The folder that is served (nothing to choose yet)."""


class ReportConfig(Section):
    """The HTML report."""

    title: str = Field(default="Compression report", min_length=1, description="its heading")


class Recipe(Section):
    """All settings of one run."""

    model: str = Field(
        min_length=1,
        description="model folder (relative to the recipe), hub id, or `demo` for the bundled one",
    )
    revision: str | None = Field(default=None, description="revision of a hub model")
    seed: int = Field(default=0, ge=0, lt=2**32, description="drives everything random")
    budget: BudgetText = Field(
        default="83%",
        description='memory of the student: "31.7GiB", or a share of the teacher\'s; '
        "where it is not given and `deployment.preset` is, that preset's",
    )
    deployment: DeploymentConfig = Field(
        default=DeploymentConfig(), description="what the memory is counted for"
    )
    data: DataConfig = Field(default=DataConfig(), description="the texts")
    score: ScoreConfig = Field(default=ScoreConfig(), description="stage score")
    search: SearchConfig = Field(default=SearchConfig(), description="stage search")
    prune: PruneConfig = Field(default=PruneConfig(), description="stage prune")
    repair: RepairConfig = Field(default=RepairConfig(), description="stage repair")
    distill: DistillConfig = Field(default=DistillConfig(), description="stage distill")
    eval: EvalConfig = Field(default=EvalConfig(), description="stage eval")
    export: ExportConfig = Field(default=ExportConfig(), description="stage export")
    report: ReportConfig = Field(default=ReportConfig(), description="stage report")

    @model_validator(mode="before")
    @classmethod
    def _fill_budget_from_preset(cls, given: Any) -> Any:
        """A budget that is not given is the preset's, if one is named."""
        preset = preset_of(given.get("deployment")) if isinstance(given, Mapping) else None
        return given if preset is None else {"budget": preset.budget, **given}

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML recipe; ``overrides`` are "a.b=c" as given to --set.

        Relative model folders and text files are taken from the recipe's folder, those in
        ``overrides`` from the current one. UserError for anything wrong in either.
        """
        path = Path(path)
        return cls.from_mapping(read_yaml(path), overrides, source=str(path), base=path.parent)

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, Any],
        overrides: Sequence[str] = (),
        *,
        source: str = "recipe",
        base: Path | None = None,
    ) -> Self:
        """Check a recipe given as a mapping; ``source`` names it in messages.

        Model folders and text files in it are relative to ``base`` (the current folder).
        """
        given = override_mapping(overrides)
        if names_preset(given):
            mapping = without_deployment(mapping)
        both = merged(anchored(mapping, base or Path()), anchored(given, Path()))
        try:
            return cls.model_validate(both)
        except ValidationError as error:
            raise UserError(explain(error, cls, Place(source, given))) from None

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as JSON-able values; the bundled model is called `demo` again."""
        mapping = self.model_dump(mode="json")
        mapping["model"] = portable_model(self.model)
        return mapping

    def dump(self) -> str:
        """The whole recipe as YAML, every default written out; `load` gives it back."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True, width=100)


def demo_recipe() -> Path:
    """The recipe of the demo, which comes with the package."""
    return Path(str(files("minipuzzle.demo"))) / "demo.yaml"
