"""Llama: attention with rotary positions and a gated FFN in every block, a norm before each.

Source of the shapes: transformers' `llama`. A block is two layers here, attention and FFN, that
can only be removed together: the stock class holds no half of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipuzzle.architecture import Architecture, AttentionLayer, FFNLayer, Kind, Layer
from minipuzzle.errors import UserError
from minipuzzle.families.config import integer, uniform
from minipuzzle.families.table import HIDDEN, Dim, Family, Probe, TensorLayout

QUERIES: Dim = (("query_heads", "head_dim"),)
KEYS: Dim = (("kv_heads", "head_dim"),)
WIDTH: Dim = (("width",),)
VOCABULARY: Dim = (("vocabulary",),)

ATTENTION = (
    TensorLayout("input_layernorm.weight", (HIDDEN,), "norm"),
    TensorLayout("self_attn.q_proj.weight", (QUERIES, HIDDEN), "reads"),
    TensorLayout("self_attn.q_proj.bias", (QUERIES,), "reads", bias_flag="attention"),
    TensorLayout("self_attn.k_proj.weight", (KEYS, HIDDEN), "reads"),
    TensorLayout("self_attn.k_proj.bias", (KEYS,), "reads", bias_flag="attention"),
    TensorLayout("self_attn.v_proj.weight", (KEYS, HIDDEN), "reads"),
    TensorLayout("self_attn.v_proj.bias", (KEYS,), "reads", bias_flag="attention"),
    TensorLayout("self_attn.o_proj.weight", (HIDDEN, QUERIES), "writes"),
    TensorLayout("self_attn.o_proj.bias", (HIDDEN,), "writes", bias_flag="attention"),
)
FFN = (
    TensorLayout("post_attention_layernorm.weight", (HIDDEN,), "norm"),
    TensorLayout("mlp.gate_proj.weight", (WIDTH, HIDDEN), "reads"),
    TensorLayout("mlp.gate_proj.bias", (WIDTH,), "reads", bias_flag="ffn"),
    TensorLayout("mlp.up_proj.weight", (WIDTH, HIDDEN), "reads"),
    TensorLayout("mlp.up_proj.bias", (WIDTH,), "reads", bias_flag="ffn"),
    TensorLayout("mlp.down_proj.weight", (HIDDEN, WIDTH), "writes"),
    TensorLayout("mlp.down_proj.bias", (HIDDEN,), "writes", bias_flag="ffn"),
)
MODEL = (
    TensorLayout("model.embed_tokens.weight", (VOCABULARY, HIDDEN), "embedding"),
    TensorLayout("model.norm.weight", (HIDDEN,), "norm"),
    TensorLayout("lm_head.weight", (VOCABULARY, HIDDEN), "head", untied_only=True),
)
BLOCK: tuple[Kind, ...] = ("attention", "ffn")
BIAS_KEYS = {"attention": "attention_bias", "ffn": "mlp_bias"}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Llama config.json."""
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    whole = config.get("num_key_value_heads") is None
    attention = AttentionLayer(
        query_heads=heads,
        kv_heads=heads if whole else integer(config, "num_key_value_heads"),
        head_dim=hidden // heads if config.get("head_dim") is None else integer(config, "head_dim"),
    )
    ffn = FFNLayer(width=integer(config, "intermediate_size"), gated=True)
    return Architecture(
        hidden=hidden,
        vocabulary=integer(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        layers=(attention, ffn) * integer(config, "num_hidden_layers"),
        biases=frozenset(flag for flag, key in BIAS_KEYS.items() if config.get(key, False)),
    )


def write_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """A config.json for the pruned model: the parent's, with what the cut changed.

    Raises:
        UserError: for half a block, layers of several shapes, or a number of heads that the stock
            class refuses.
    """
    kinds = tuple(layer.kind for layer in architecture.layers)
    blocks = len(kinds) // len(BLOCK)
    if kinds != BLOCK * blocks:
        raise UserError(
            f"a Llama block is an attention layer and an FFN, but the layers are "
            f"{architecture.pattern}; remove both layers of a block or neither"
        )
    attention: Layer | None = uniform(architecture, "attention")
    ffn: Layer | None = uniform(architecture, "ffn")
    assert isinstance(attention, AttentionLayer), "there is at least one block"
    assert isinstance(ffn, FFNLayer), "there is at least one block"
    _check_heads(architecture.hidden, attention)
    return dict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "hidden_size": architecture.hidden,
        "vocab_size": architecture.vocabulary,
        "tie_word_embeddings": architecture.tied,
        "num_attention_heads": attention.query_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": ffn.width,
    }


def _check_heads(hidden: int, attention: AttentionLayer) -> None:
    """UserError unless transformers' own check (hidden size by heads) lets the model load."""
    if hidden % attention.query_heads == 0:
        return
    allowed = [n for n in range(attention.kv_heads, hidden, attention.kv_heads) if hidden % n == 0]
    nearest = min(allowed, key=lambda n: abs(n - attention.query_heads), default=None)
    advice = f"the nearest number is {nearest}" if nearest else "choose another hidden size"
    raise UserError(
        f"transformers loads a Llama only if its hidden size ({hidden}) is a multiple of its query "
        f"heads ({attention.query_heads}); {advice}"
    )


LLAMA = Family(
    name="llama",
    layer_prefix="model.layers.{block}.",
    model_tensors=MODEL,
    layer_tensors={"attention": ATTENTION, "ffn": FFN},
    probes={
        "attention": (Probe("query_heads", "self_attn.o_proj", "input"),),
        "ffn": (Probe("width", "mlp.down_proj", "input"),),
    },
    memory_names=(),
    modules={
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "positions": "model.rotary_emb",
    },
    norms={"attention": "input_layernorm", "ffn": "post_attention_layernorm"},
    mixers={"attention": "self_attn", "ffn": "mlp"},
    read_config=read_config,
    write_config=write_config,
    block=BLOCK,
)
