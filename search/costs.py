"""What an architecture costs to serve, layer by layer, so that thousands can be looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from minipuzzle.architecture import Architecture, Layer
from minipuzzle.families.table import Family
from minipuzzle.memory import (
    Deployment,
    conv_state_elements,
    embedding_parameters,
    kv_elements_per_token,
    ssm_state_elements,
    stored_bytes,
)


class Latency(Protocol):
    """What `minipuzzle.latency.LatencyTable` knows."""

    def of(self, architecture: Architecture) -> float:
        """Seconds of one decoding step."""
        ...

    def layer(self, layer: Layer, hidden: int | None = None) -> float:
        """The part of one layer in it, in a stream of that width."""
        ...


@dataclass(frozen=True)
class Costs:
    """Of one architecture at a deployment: bytes, parameters, seconds of a decoding step.

    `latency` is None where no table was measured.
    """

    memory_bytes: int
    parameters: int
    latency: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A flat record."""
        return asdict(self)


@dataclass(frozen=True)
class Elements:
    """Numbers of elements of a part of a model; of states and caches for all sequences served."""

    weights: int = 0
    embeddings: int = 0
    kv: int = 0
    state: int = 0
    conv: int = 0

    def __add__(self, other: Elements) -> Elements:
        return Elements(
            self.weights + other.weights,
            self.embeddings + other.embeddings,
            self.kv + other.kv,
            self.state + other.state,
            self.conv + other.conv,
        )


class CostModel:
    """Costs of architectures that come from one model, the same as `memory.memory` counts.

    Elements are counted once per distinct layer; an architecture's are their sum.
    """

    def __init__(
        self,
        architecture: Architecture,
        family: Family,
        deployment: Deployment,
        latency: Latency | None = None,
    ) -> None:
        self.architecture, self.family, self.deployment = architecture, family, deployment
        self.latency = latency
        self._layers: dict[tuple[Layer, int], Elements] = {}
        self._bases: dict[int, Elements] = {}

    def layer(self, layer: Layer, hidden: int) -> Elements:
        """Elements of one layer in a stream of width `hidden`."""
        if (layer, hidden) not in self._layers:
            self._layers[layer, hidden] = self._count(layer, hidden)
        return self._layers[layer, hidden]

    def base(self, hidden: int) -> Elements:
        """Elements of what every architecture has: embedding, head, final norm."""
        if hidden not in self._bases:
            model = replace(self.architecture, hidden=hidden)
            specs = self.family.tensors(model)
            total = sum(spec.size for spec in specs if spec.layer is None)
            embeddings = embedding_parameters(model, self.family)
            self._bases[hidden] = Elements(total - embeddings, embeddings)
        return self._bases[hidden]

    def of(self, architecture: Architecture) -> Costs:
        """Costs of a whole architecture."""
        parts = [self.layer(layer, architecture.hidden) for layer in architecture.layers]
        elements = sum(parts, start=self.base(architecture.hidden))
        latency = None if self.latency is None else self.latency.of(architecture)
        return Costs(self.bytes(elements), elements.weights + elements.embeddings, latency)

    def bytes(self, elements: Elements) -> int:
        """Bytes at the deployment, the reserve included."""
        at = self.deployment
        assert at.embeddings is not None
        return at.reserve_bytes + sum(
            stored_bytes(count, precision)
            for count, precision in (
                (elements.weights, at.weights),
                (elements.embeddings, at.embeddings),
                (elements.kv, at.kv),
                (elements.state, at.state),
                (elements.conv, at.conv),
            )
        )

    def layer_bytes(self, layer: Layer, hidden: int) -> int:
        """Bytes of one layer alone: what its removal saves, but for rounding."""
        return self.bytes(self.layer(layer, hidden)) - self.deployment.reserve_bytes

    def _count(self, layer: Layer, hidden: int) -> Elements:
        model = replace(self.architecture, hidden=hidden, layers=(layer,))
        weights = sum(spec.size for spec in self.family.tensors(model) if spec.layer is not None)
        batch = self.deployment.batch
        return Elements(
            weights=weights,
            kv=batch * self.deployment.context * kv_elements_per_token(layer),
            state=batch * ssm_state_elements(layer),
            conv=batch * conv_state_elements(layer),
        )
