"""The recipe's `deployment`: keys, and what a preset's name does to them and to the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from minipuzzle import deployments, units
from minipuzzle.memory import Deployment, Precision
from minipuzzle.recipe_fields import PresetName, Section, Size, Tokens


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
        preset = preset_of(given)
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


def preset_of(deployment: Any) -> deployments.Preset | None:
    """The preset that a mapping names, None without one or for a name that does not exist."""
    name = deployment.get("preset") if isinstance(deployment, Mapping) else None
    return deployments.PRESETS.get(name) if isinstance(name, str) else None


def names_preset(given: Mapping[str, Any]) -> bool:
    """Whether a mapping of recipe keys, as given to --set, names a preset."""
    deployment = given.get("deployment")
    return isinstance(deployment, Mapping) and deployment.get("preset") is not None


def without_deployment(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for which a preset is named by --set: its deployment gives way as a whole.

    Keys written for another place would win over the new preset's otherwise. So does its budget,
    if it is the one that came with the preset it names itself.
    """
    old = preset_of(mapping.get("deployment"))
    stale = {"deployment"} | ({"budget"} if old and mapping.get("budget") == old.budget else set())
    return {key: value for key, value in mapping.items() if key not in stale}
