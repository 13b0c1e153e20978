"""Decoding steps of stock models with random weights, timed turn by turn.

Time depends on shapes, not on values, so models of any shape are made from a pool of random
tensors that those of equal parts share. A step is what `generate` does for one token of every
sequence: the stock model's forward pass with its cache, at the deployment's context.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minipuzzle.architecture import Architecture, AttentionLayer
from minipuzzle.errors import UserError
from minipuzzle.families import Family, TensorSpec
from minipuzzle.memory import Deployment, kv_elements_per_token, ssm_state_elements
from minipuzzle.model import transformers_config
from minipuzzle.residency import SHARE, free_bytes
from minipuzzle.units import format_bytes

PROMPT_TOKENS = 2
WARM_UP_STEPS = 1  # of every turn: they bring the weights back into the caches
STEPS = 3
QUIET = 0.1  # quantile over all steps

Key = tuple[str, tuple[int, ...], int]
"""Name inside a layer, shape, how many of them stand before it in the model."""


class Pool:
    """Random tensors on a device, made when first asked for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)
        self._tensors: dict[Key, Tensor] = {}

    def tensor(self, key: Key, scale: float, mean: float = 0.0) -> Tensor:
        """The tensor of a key: normal, of mean `mean` and deviation `scale`."""
        if key not in self._tensors:
            noise = torch.empty(key[1], device=self.device, dtype=self.dtype)
            self._tensors[key] = noise.normal_(mean, scale, generator=self._generator)
        return self._tensors[key]

    def weight(self, key: Key, spec: TensorSpec) -> Tensor:
        """A weight of a size that neither vanishes nor overflows in any number of layers."""
        if spec.role in ("norm", "inner_norm"):
            return self.tensor(key, 0.1, 1.0)
        if spec.role == "embedding":
            return self.tensor(key, 1.0)
        return self.tensor(key, spec.shape[1] ** -0.5 if len(spec.shape) == 2 else 0.3)


def _weights(architecture: Architecture, family: Family) -> Iterator[tuple[Key, TensorSpec]]:
    """The tensors of a model with their keys in the pool."""
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for spec in family.tensors(architecture):
        place = (spec.layout.name, spec.shape)
        yield (*place, seen[place]), spec
        seen[place] += 1


def _cached(architecture: Architecture, deployment: Deployment) -> Iterator[Key]:
    """Keys of the cached keys and values of the attention layers, in order."""
    tokens = max(1, deployment.context - 1)  # the step adds one
    seen: Counter[tuple[int, ...]] = Counter()
    for layer in architecture.layers:
        if isinstance(layer, AttentionLayer):
            shape = (deployment.batch, layer.kv_heads, tokens, layer.head_dim)
            for name in ("keys", "values"):
                yield name, shape, seen[shape]
            seen[shape] += 1


def needed_bytes(
    architectures: Sequence[Architecture],
    family: Family,
    deployment: Deployment,
    dtype: torch.dtype,
) -> int:
    """Memory of decoders of all these architectures at once, shared tensors counted once."""
    shapes = {key for each in architectures for key, _ in _weights(each, family)}
    shapes |= {key for each in architectures for key in _cached(each, deployment)}
    elements = sum(torch.Size(key[1]).numel() for key in shapes)
    layers = [layer for each in architectures for layer in each.layers]
    states = deployment.batch * sum(map(ssm_state_elements, layers))
    largest = max(map(kv_elements_per_token, layers)) * deployment.batch * deployment.context
    return (elements + states + 2 * largest) * dtype.itemsize


@contextmanager
def memory_is_a_user_error(needed: int, device: torch.device, what: str) -> Iterator[None]:
    """UserError unless the device has so many bytes to spare, or when they run out inside."""
    free = free_bytes(device)
    message = (
        f"{what} needs {format_bytes(needed)} on {device}, and {format_bytes(free)} are free; use "
        "a device with more memory, or a smaller deployment.context or deployment.batch"
    )
    if needed > SHARE * free:
        raise UserError(message)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(message) from None


def stock_model(
    architecture: Architecture, family: Family, config: Mapping[str, Any], pool: Pool
) -> nn.Module:
    """The stock class in a shape, in eval mode, with weights of the pool."""
    from transformers import AutoModelForCausalLM

    stock = transformers_config(family, dict(config), architecture)
    with torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(stock, dtype=pool.dtype)
    state = {
        family.memory_name(spec.name): pool.weight(key, spec)
        for key, spec in _weights(architecture, family)
    }
    absent, unknown = module.load_state_dict(state, strict=False, assign=True)
    assert not unknown and (architecture.tied or not absent), (absent, unknown)
    if architecture.tied:
        module.tie_weights()  # type: ignore[operator]  # a method of transformers' class
    if "positions" in family.modules:  # has buffers that are no parameters
        parent, _, name = family.modules["positions"].rpartition(".")
        skeleton = module.get_submodule(family.modules["positions"])
        setattr(module.get_submodule(parent), name, type(skeleton)(stock).to(pool.device))
    return module.eval().requires_grad_(False)


class Decoder:
    """A stock model that decodes one token at a time, always at the deployment's context."""

    @torch.inference_mode()
    def __init__(
        self,
        architecture: Architecture,
        family: Family,
        config: Mapping[str, Any],
        deployment: Deployment,
        pool: Pool,
    ) -> None:
        self.device = pool.device
        self._module: Any = stock_model(architecture, family, config, pool)
        prompt = torch.zeros(deployment.batch, PROMPT_TOKENS, dtype=torch.int64, device=self.device)
        self._cache = self._module(input_ids=prompt, use_cache=True).past_key_values
        self._ids = prompt[:, :1]
        holders = [x for x in self._cache.layers if isinstance(getattr(x, "keys", None), Tensor)]
        tensors = [pool.tensor(key, 1.0) for key in _cached(architecture, deployment)]
        self._filled = list(zip(holders, tensors[::2], tensors[1::2], strict=True))

    @torch.inference_mode()
    def step(self) -> float:
        """Seconds of one token of every sequence."""
        for holder, keys, values in self._filled:
            holder.keys, holder.values = keys, values
        start = self._now()
        out = self._module(input_ids=self._ids, past_key_values=self._cache, use_cache=True)
        out.logits[:, -1:].argmax(-1)
        return self._now() - start

    def _now(self) -> float:
        """The clock, once the device has done what it was given.

        With a single thread it is the process's own, which stands still while others have the
        processor.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()


def step_seconds(
    decoders: Mapping[str, Decoder],
    *,
    rounds: int,
    limit: float,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Seconds of a step of each of several models on a quiet machine, also on one that is not.

    Every round lets all of them decode a few tokens, so that a slow minute slows all alike, and a
    low quantile over the rounds leaves the slow ones out. (The minimum of few rounds is worse:
    seldom is every model lucky.)

    Args:
        decoders: name -> model.
        rounds: how many, at most.
        limit: seconds after which none is begun.
        advance: called after every round.

    Returns:
        name -> seconds.
    """
    assert rounds >= 1, rounds
    times: dict[str, list[float]] = {name: [] for name in decoders}
    started = time.perf_counter()
    for i in range(rounds):
        if i and time.perf_counter() - started > limit:
            break
        for name, decoder in decoders.items():
            turn = [decoder.step() for _ in range(WARM_UP_STEPS + STEPS)]
            times[name] += turn[WARM_UP_STEPS:]
        advance()
    return {name: float(np.quantile(all_, QUIET)) for name, all_ in times.items()}
