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
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from minipuzzle import deployments, units
from minipuzzle.errors import UserError
from minipuzzle.memory import Deployment, Precision
from minipuzzle.metrics import UNIT_METRICS, LayerMetric, UnitMetric
from minipuzzle.recipe_io import (
    Place,
    anchored,
    explain,
    merged,
    override_mapping,
    portable_model,
    read_yaml,
)


def _checked_tokens(text: str) -> str:
    return _valid(text, units.parse_tokens)


def _checked_bytes(text: str) -> str:
    return _valid(text, units.parse_bytes)


def _checked_budget(text: str) -> str:
    return _valid(text, units.parse_budget)


def _checked_parameters(text: str) -> str:
    return _valid(text, units.parse_parameters)


def _checked_latency(text: str) -> str:
    return _valid(text, units.parse_latency)


def _checked_preset(text: str) -> str:
    return _valid(text, deployments.find)


def _valid(text: str, parse: Any) -> str:
    """``text`` if ``parse`` takes it; ValueError (which pydantic collects) otherwise."""
    try:
        parse(text)
    except UserError as error:
        raise ValueError(str(error)) from None
    return text


def _text_of_number(value: Any) -> Any:
    """YAML reads 2048 as a number and 2k as text; both are text here."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Text = Annotated[str, BeforeValidator(_text_of_number)]
Tokens = Annotated[_Text, AfterValidator(_checked_tokens)]
Size = Annotated[_Text, AfterValidator(_checked_bytes)]
BudgetText = Annotated[_Text, AfterValidator(_checked_budget)]
ParametersText = Annotated[_Text, AfterValidator(_checked_parameters)]
LatencyText = Annotated[str, AfterValidator(_checked_latency)]
PresetName = Annotated[str, AfterValidator(_checked_preset)]
Objective = Literal["kl", "memory", "latency"]


class Section(BaseModel):
    """A part of a recipe: frozen, strict about types, refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


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


class DeploymentConfig(Section):
    """Where the model is to run: what its memory is counted for."""

    preset: PresetName | None = Field(
        default=None,
        description="a deployment by name, listed by `minipuzzle plan --preset list`; "
        "the keys below change it",
    )
    context: Tokens = Field(default="2k", description="tokens of context (k = 2^10, M = 2^20)")
    batch: int = Field(default=1, ge=1, description="sequences served at once")
    weights: Precision = Field(default="bf16", description="precision of the weights")
    embeddings: Precision | None = Field(
        default=None, description="precision of embeddings and head; null: that of the weights"
    )
    kv: Precision = Field(default="bf16", description="precision of the KV cache")
    state: Precision = Field(default="fp32", description="precision of the Mamba states")
    conv: Precision = Field(default="bf16", description="precision of the convolution states")
    reserve: Size = Field(default="0GiB", description="memory kept for other things")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """Keys that are not given come from the preset, if one is named."""
        preset = _preset_of(given)
        return given if preset is None else {**preset.settings(), **given}

    def build(self) -> Deployment:
        """The deployment that `minipuzzle.memory.memory` counts for."""
        return Deployment(
            context=self.context_tokens,
            batch=self.batch,
            weights=self.weights,
            embeddings=self.embeddings_precision,
            kv=self.kv,
            state=self.state,
            conv=self.conv,
            reserve_bytes=self.reserve_bytes,
        )

    def options(self) -> dict[str, Any]:
        """The exact options of `minipuzzle plan`, nothing left to a default."""
        written = self.model_dump(mode="json", exclude={"preset"})
        return {**written, "embeddings": self.embeddings_precision}

    @property
    def context_tokens(self) -> int:
        """The context in tokens."""
        return units.parse_tokens(self.context)

    @property
    def embeddings_precision(self) -> Precision:
        """The precision of the embeddings, which follows the weights unless given."""
        return self.embeddings or self.weights

    @property
    def reserve_bytes(self) -> int:
        """The reserve in bytes."""
        return units.parse_bytes(self.reserve)


def _preset_of(deployment: Any) -> deployments.Preset | None:
    """The preset that a mapping names, None without one or for a name that does not exist."""
    name = deployment.get("preset") if isinstance(deployment, Mapping) else None
    return deployments.PRESETS.get(name) if isinstance(name, str) else None


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
    keep: int = Field(default=1, ge=1, description="finalists that go on after it")


class TournamentConfig(Section):
    """Finalists are repaired, distilled for a little and compared by tasks."""

    finalists: int = Field(default=3, ge=1, description="candidates that take part; 1: none is held")
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
        default="cut", description="judge candidates as they are cut, or with a quick repair"
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
        default=60, ge=1, description="seconds between signs of life of workers that share a storage"
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
    learning_rate: float = Field(default=5e-4, gt=0, description="peak of the cosine schedule")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps that warm up")
    temperature: float = Field(default=1.0, gt=0, description="of both distributions")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), strict=False, description="of AdamW")
    floor: float = Field(default=0.0, ge=0, le=1, description="last learning rate, of the peak")
    clip: float = Field(default=1.0, ge=0, description="bound on the gradient's norm; 0: none")
    micro: int = Field(default=0, ge=0, description="sequences in memory at once; 0: the batch")
    checkpoint_every: int = Field(default=20, ge=0, description="steps between resume points")
    evaluate_every: int = Field(default=0, ge=0, description="steps between held-out losses")


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
        preset = _preset_of(given.get("deployment")) if isinstance(given, Mapping) else None
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
        if _names_preset(given):
            mapping = _without_deployment(mapping)
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


def _names_preset(given: Mapping[str, Any]) -> bool:
    deployment = given.get("deployment")
    return isinstance(deployment, Mapping) and deployment.get("preset") is not None


def _without_deployment(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for which a preset is named by --set: its deployment gives way as a whole.

    Keys written for another place would win over the new preset's otherwise. So does its budget,
    if it is the one that came with the preset it names itself.
    """
    old = _preset_of(mapping.get("deployment"))
    stale = {"deployment"} | ({"budget"} if old and mapping.get("budget") == old.budget else set())
    return {key: value for key, value in mapping.items() if key not in stale}


def demo_recipe() -> Path:
    """The recipe of the demo, which comes with the package."""
    return Path(str(files("minipuzzle.demo"))) / "demo.yaml"
