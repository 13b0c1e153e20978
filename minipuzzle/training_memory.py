"""What a distillation needs in memory, item by item, from the two architectures alone.

Counted is what the trainer allocates (distill/trainer.py): parameters, gradients and AdamW's two
moments of the student, the teacher's weights and final states, what autograd keeps for the backward
pass, and the loss's buffers. Two ways of computing:

- `gpu`: autocast to bf16 over stock modules, the scan being `mamba_ssm`'s. Linear layers keep bf16
  copies of their inputs and weights, norms and gates their fp32 values.
- `cpu`: fp32 with the operators of minipuzzle/fastops.py and ssd.py, which keep their inputs only.

Letters: D hidden, V vocabulary, inner = heads x head_dim, N tokens of a micro-batch.
docs/budgets.md has the formulas; scripts/check_training_memory.py holds them against allocations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from minipuzzle.architecture import Architecture, AttentionLayer, FFNLayer, Layer, MambaLayer
from minipuzzle.errors import UserError
from minipuzzle.families import Family, parameter_count
from minipuzzle.memory import embedding_parameters

Engine = Literal["gpu", "cpu"]
LOSS_CHUNK = 512  # tokens whose logits exist at a time: distill/loss.py
CPU_SCAN_CHUNK = 32  # minipuzzle/ssd.py
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Training:
    """How it is trained: `micro` sequences of `tokens` tokens at a time on each of `processes`.

    `master` is the precision of weights, gradients and moments. `teacher_offload` keeps the
    teacher's weights in the host's memory, one block at a time on the device. `checkpointing` keeps
    the stream before each block only and computes a block again in the backward pass. `context`
    bytes are kept free.
    """

    micro: int = 1
    tokens: int = 4096
    master: Literal["fp32", "bf16"] = "fp32"
    processes: int = 1
    engine: Engine = "gpu"
    teacher_offload: bool = False
    checkpointing: bool = False
    chunk: int = LOSS_CHUNK
    reserve_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("micro", "tokens", "processes", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name} >= 1` must hold, but got {getattr(self, name)}")

    @property
    def master_bytes(self) -> int:
        """Bytes of a trained weight, and of each of its moments and its gradient."""
        return FP32 if self.master == "fp32" else BF16


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per item on one process at the peak: the loss of a second or later micro-batch.

    Gradients of the first are there then, and all that the forward pass keeps.
    """

    student: int
    gradients: int
    moments: int
    computed_copy: int
    teacher: int
    unsharded: int
    activations: int
    loss_chunk: int
    states: int
    reserve: int

    @property
    def total(self) -> int:
        """Sum of all items."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Items and total."""
        return asdict(self) | {"total": self.total}


def kept_bytes_per_token(layer: Layer, hidden: int, engine: Engine) -> int:
    """What autograd keeps of one token of one layer, its norm included, in bytes."""
    if engine == "cpu":
        return FP32 * (_kept_cpu(layer, hidden) + 1 + 2 * hidden)
    # The norm keeps the stream and the normed stream in fp32, and one scale.
    return FP32 * (2 * hidden + 1) + _kept_gpu(layer, hidden)


def _kept_cpu(layer: Layer, hidden: int) -> int:
    """fp32 values beside the stream, its normed copy and one scale."""
    if isinstance(layer, FFNLayer):
        # Up: relu(x) and its square. Gated: both projections, the activation, the product.
        return (4 if layer.gated else 2) * layer.width
    if isinstance(layer, AttentionLayer):
        query = layer.query_heads * layer.head_dim
        # q, k, v, the output and a log-sum-exp a head.
        return 2 * query + 2 * layer.kv_heads * layer.head_dim + layer.query_heads
    inner, maps = _inner(layer), layer.groups * layer.state
    projected = 2 * inner + 2 * maps + layer.heads
    # Scan: x, y without skip, B, C, dt, its sum and softplus's input, the states of all chunks.
    states = inner * layer.state // CPU_SCAN_CHUNK
    scan = 2 * inner + 2 * maps + 4 * layer.heads + states
    # Gate: its input (the other one is the projection), the gated norm's input, scales and output.
    return projected + scan + 3 * inner + layer.groups


def _kept_gpu(layer: Layer, hidden: int) -> int:
    """Bytes beside the norm's, under autocast to bf16."""
    if isinstance(layer, FFNLayer):
        # Up's input and result; the square's fp32 input; down's input. Gated: gate, up, silu, both.
        return (
            BF16 * hidden
            + layer.width * (2 * BF16 + FP32)
            + (BF16 * (hidden + 2 * layer.width) - FP32 * layer.width if layer.gated else 0)
        )
    if isinstance(layer, AttentionLayer):
        query, keys = layer.query_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        # Each of three projections keeps a copy of its input; q, k, v, the output, log-sum-exp.
        return BF16 * (3 * hidden + 2 * query + 2 * keys) + FP32 * layer.query_heads
    inner, maps = _inner(layer), layer.groups * layer.state
    mixed = inner + 2 * maps
    projected = BF16 * (inner + mixed + layer.heads)
    convolution = BF16 * 2 * mixed  # the input of the convolution, and of its silu
    scan = BF16 * (mixed + inner) + FP32 * layer.heads  # x, B, C, y; the sum of dt
    gated_norm = FP32 * (4 * inner + layer.groups) + BF16 * inner
    return BF16 * hidden + projected + convolution + scan + gated_norm + BF16 * inner


def _inner(layer: MambaLayer) -> int:
    return layer.heads * layer.head_dim


def activation_bytes(architecture: Architecture, training: Training) -> int:
    """What one micro-batch leaves for the backward pass.

    Checkpointed: the fp32 stream before each block, and one block's inside: the largest.
    """
    tokens, hidden = training.micro * training.tokens, architecture.hidden
    kept = [kept_bytes_per_token(layer, hidden, training.engine) for layer in architecture.layers]
    final = FP32 * (2 * hidden + 1)  # the last norm's input, its output: the head's input
    if training.checkpointing:
        return tokens * (len(kept) * FP32 * hidden + max(kept) + final)
    return tokens * (sum(kept) + final)


def loss_bytes(student: Architecture, training: Training) -> int:
    """The sweep's buffers at their peak.

    Gradients of head and hidden states, and beside them a chunk's logits and log-probabilities of
    both models (three arrays) or, later, the scaled copies of both gradients.
    """
    tokens = training.micro * training.tokens
    logits = 3 * FP32 * min(training.chunk, tokens) * student.vocabulary
    head, hidden = (FP32 * student.hidden * n for n in (student.vocabulary, tokens))
    return head + hidden + max(logits, head + hidden)


def training_memory(
    student: Architecture,
    teacher: Architecture,
    family: Family,
    training: Training,
) -> TrainingMemory:
    """Itemised bytes of distilling `teacher` into `student`, on one of `training.processes`."""
    own, theirs = parameter_count(student, family), parameter_count(teacher, family)
    width, share = training.master_bytes, training.processes
    fixed = FP32 if training.engine == "cpu" else BF16
    blocks, taught = block_parameters(student, family), block_parameters(teacher, family)
    copies = training.engine == "gpu" and training.master == "fp32"
    tokens = training.micro * training.tokens
    held = max(taught) if training.teacher_offload else -(-theirs // share)
    whole = 0
    if share > 1:  # root and head are gathered whole, a block computes while the next one comes
        whole = (width * (2 * max(blocks) + embedding_parameters(student, family))) + (
            fixed * embedding_parameters(teacher, family)
        )
    return TrainingMemory(
        student=width * -(-own // share),
        gradients=width * -(-own // share),
        moments=2 * width * -(-own // share),
        computed_copy=BF16 * (max(blocks) if training.checkpointing else sum(blocks)) * copies,
        teacher=fixed * held,
        unsharded=whole,
        activations=activation_bytes(student, training),
        loss_chunk=loss_bytes(student, training),
        states=tokens * teacher.hidden * fixed,
        reserve=training.reserve_bytes,
    )


def block_parameters(architecture: Architecture, family: Family) -> list[int]:
    """Elements of each layer."""
    sizes = [0] * len(architecture.layers)
    for spec in family.tensors(architecture):
        if spec.layer is not None:
            sizes[spec.layer] += spec.size
    return sizes


def largest_micro(
    student: Architecture, teacher: Architecture, family: Family, training: Training, limit: int
) -> int:
    """The largest micro-batch that stays within `limit` bytes; 0 where not even one does."""

    def total(micro: int) -> int:
        return training_memory(student, teacher, family, replace(training, micro=micro)).total

    if total(1) > limit:
        return 0
    low, high = 1, 2
    while total(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= limit else (low, middle)
    return low
