"""What a deployment needs in memory, item by item, from the architecture alone.

One short function per quantity, the unit in its name. Recurrent and convolution states are counted
as transformers' `generate` allocates them (scripts/check_memory.py and tests/test_plan.py hold them
against a real one).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Literal, get_args

from minipuzzle.architecture import Architecture, AttentionLayer, Layer, MambaLayer
from minipuzzle.errors import UserError
from minipuzzle.families.table import Family

Precision = Literal["nvfp4", "int4", "fp8", "bf16", "fp32"]
# nvfp4: 4-bit values plus one 8-bit scale per block of 16 (facts of the format, NVIDIA's docs).
BITS: dict[str, float] = {"nvfp4": 4.5, "int4": 4.0, "fp8": 8.0, "bf16": 16.0, "fp32": 32.0}


@dataclass(frozen=True)
class Deployment:
    """Where the model will be served: tokens of context per sequence, batch, precision per item.

    `embeddings` is the precision of the embedding and the head; `reserve_bytes` is kept free.
    """

    context: int = 2048
    batch: int = 1
    weights: Precision = "bf16"
    embeddings: Precision | None = None
    kv: Precision = "bf16"
    state: Precision = "fp32"
    conv: Precision = "bf16"
    reserve_bytes: int = 0

    def __post_init__(self) -> None:
        if self.embeddings is None:
            object.__setattr__(self, "embeddings", self.weights)
        for name in ("weights", "embeddings", "kv", "state", "conv"):
            if getattr(self, name) not in BITS:
                known = ", ".join(get_args(Precision))
                raise UserError(f"--{name} {getattr(self, name)!r} is unknown; choose {known}")
        for name, least in (("context", 1), ("batch", 1), ("reserve_bytes", 0)):
            if getattr(self, name) < least:
                raise UserError(f"`{name} >= {least}` must hold, but got {getattr(self, name)}")


@dataclass(frozen=True)
class Memory:
    """Bytes per item of a deployment."""

    weights: int
    embeddings: int
    kv_cache: int
    ssm_state: int
    conv_state: int
    reserve: int

    @property
    def total(self) -> int:
        """Sum of all items."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Items and total."""
        return asdict(self) | {"total": self.total}


def stored_bytes(elements: int, precision: str) -> int:
    """Bytes of a number of elements, rounded up."""
    return ceil(elements * BITS[precision] / 8)


def embedding_parameters(architecture: Architecture, family: Family) -> int:
    """Elements of the embedding and the head (one matrix when tied)."""
    specs = family.tensors(architecture)
    return sum(spec.size for spec in specs if spec.role in ("embedding", "head"))


def layer_parameters(architecture: Architecture, family: Family) -> int:
    """Elements of everything but the embedding and the head."""
    specs = family.tensors(architecture)
    return sum(spec.size for spec in specs if spec.role not in ("embedding", "head"))


def kv_elements_per_token(layer: Layer) -> int:
    """Keys and values that one token leaves behind in one layer."""
    return 2 * layer.kv_heads * layer.head_dim if isinstance(layer, AttentionLayer) else 0


def ssm_state_elements(layer: Layer) -> int:
    """Recurrent state of one sequence in one layer: heads x head_dim x state (arXiv 2405.21060)."""
    return layer.heads * layer.head_dim * layer.state if isinstance(layer, MambaLayer) else 0


def conv_state_elements(layer: Layer) -> int:
    """Convolution window of one sequence in one layer: (inner + 2 x groups x state) x kernel."""
    if not isinstance(layer, MambaLayer):
        return 0
    return (layer.heads * layer.head_dim + 2 * layer.groups * layer.state) * layer.conv


def memory(architecture: Architecture, family: Family, deployment: Deployment) -> Memory:
    """Itemised bytes of serving `architecture` at `deployment`."""
    assert deployment.embeddings is not None
    layers, batch = architecture.layers, deployment.batch
    tokens = batch * deployment.context
    return Memory(
        weights=stored_bytes(layer_parameters(architecture, family), deployment.weights),
        embeddings=stored_bytes(embedding_parameters(architecture, family), deployment.embeddings),
        kv_cache=stored_bytes(tokens * sum(map(kv_elements_per_token, layers)), deployment.kv),
        ssm_state=stored_bytes(batch * sum(map(ssm_state_elements, layers)), deployment.state),
        conv_state=stored_bytes(batch * sum(map(conv_state_elements, layers)), deployment.conv),
        reserve=deployment.reserve_bytes,
    )
