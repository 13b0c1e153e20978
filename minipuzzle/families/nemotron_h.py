"""Nemotron-H: Mamba-2, attention without positions, squared-ReLU FFN, one norm before each layer.

Source of the shapes: transformers' `nemotron_h`, and the Nemotron-H paper (arXiv 2504.03624).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipuzzle.architecture import Architecture, AttentionLayer, FFNLayer, Kind, Layer, MambaLayer
from minipuzzle.errors import UserError
from minipuzzle.families.config import integer, uniform
from minipuzzle.families.table import HIDDEN, ONE, Dim, Family, Probe, TensorLayout

INNER = ("heads", "head_dim")
BC = ("groups", "state")
QUERIES: Dim = (("query_heads", "head_dim"),)
KEYS: Dim = (("kv_heads", "head_dim"),)
WIDTH: Dim = (("width",),)
HEADS: Dim = (("heads",),)
CONV_CHANNELS: Dim = (INNER, BC, BC)  # x, B, C
IN_PROJ: Dim = (INNER, INNER, BC, BC, ("heads",))  # gate, x, B, C, dt

NORM = TensorLayout("norm.weight", (HIDDEN,), "norm")

MAMBA = (
    NORM,
    TensorLayout("mixer.in_proj.weight", (IN_PROJ, HIDDEN), "reads"),
    TensorLayout("mixer.in_proj.bias", (IN_PROJ,), "reads", bias_flag="mamba"),
    TensorLayout("mixer.conv1d.weight", (CONV_CHANNELS, ONE, (("conv",),)), "inner"),
    TensorLayout("mixer.conv1d.bias", (CONV_CHANNELS,), "inner", bias_flag="conv"),
    TensorLayout("mixer.A_log", (HEADS,), "inner"),
    TensorLayout("mixer.D", (HEADS,), "inner"),
    TensorLayout("mixer.dt_bias", (HEADS,), "inner"),
    TensorLayout("mixer.norm.weight", ((INNER,),), "inner_norm"),
    TensorLayout("mixer.out_proj.weight", (HIDDEN, (INNER,)), "writes"),
    TensorLayout("mixer.out_proj.bias", (HIDDEN,), "writes", bias_flag="mamba"),
)
ATTENTION = (
    NORM,
    TensorLayout("mixer.q_proj.weight", (QUERIES, HIDDEN), "reads"),
    TensorLayout("mixer.k_proj.weight", (KEYS, HIDDEN), "reads"),
    TensorLayout("mixer.v_proj.weight", (KEYS, HIDDEN), "reads"),
    TensorLayout("mixer.o_proj.weight", (HIDDEN, QUERIES), "writes"),
)
FFN = (
    NORM,
    TensorLayout("mixer.up_proj.weight", (WIDTH, HIDDEN), "reads"),
    TensorLayout("mixer.up_proj.bias", (WIDTH,), "reads", bias_flag="ffn"),
    TensorLayout("mixer.down_proj.weight", (HIDDEN, WIDTH), "writes"),
    TensorLayout("mixer.down_proj.bias", (HIDDEN,), "writes", bias_flag="ffn"),
)
VOCABULARY: Dim = (("vocabulary",),)
MODEL = (
    TensorLayout("backbone.embeddings.weight", (VOCABULARY, HIDDEN), "embedding"),
    TensorLayout("backbone.norm_f.weight", (HIDDEN,), "norm"),
    TensorLayout("lm_head.weight", (VOCABULARY, HIDDEN), "head", untied_only=True),
)

KIND_OF: dict[str, Kind] = {
    "M": "mamba",
    "*": "attention",
    "-": "ffn",
    "mamba": "mamba",
    "attention": "attention",
    "mlp": "ffn",
    "linear_attention": "mamba",
    "full_attention": "attention",
}
LETTER_OF: dict[Kind, str] = {"mamba": "M", "attention": "*", "ffn": "-"}
BIAS_KEYS = {
    "conv": ("use_conv_bias", True),
    "mamba": ("use_bias", False),
    "ffn": ("mlp_bias", False),
}
PATTERN_KEYS = ("hybrid_override_pattern", "layers_block_type", "layer_types")
# What transformers writes of its own accord into the config of a dense model; it misleads others.
EXPERT_WORDS = ("expert", "moe_", "topk_group", "n_group", "norm_topk_prob", "routed_scaling")


def _head_dim(config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is None and config.get("attention_head_dim") is None:
        return integer(config, "hidden_size") // integer(config, "num_attention_heads")
    return integer(config, "head_dim", "attention_head_dim")


def _layer(config: Mapping[str, Any], kind: Kind) -> Layer:
    if kind == "mamba":
        return MambaLayer(
            heads=integer(config, "mamba_num_heads"),
            head_dim=integer(config, "mamba_head_dim"),
            groups=integer(config, "n_groups"),
            state=integer(config, "ssm_state_size"),
            conv=integer(config, "conv_kernel"),
        )
    if kind == "attention":
        return AttentionLayer(
            query_heads=integer(config, "num_attention_heads"),
            kv_heads=integer(config, "num_key_value_heads"),
            head_dim=_head_dim(config),
        )
    return FFNLayer(width=integer(config, "intermediate_size"))


def _kinds(config: Mapping[str, Any]) -> list[Kind]:
    pattern = next((config[key] for key in PATTERN_KEYS if config.get(key)), None)
    if pattern is None:
        raise UserError(
            "config.json names no layers; it needs `hybrid_override_pattern` or `layers_block_type`"
        )
    kinds: list[Kind] = []
    for i, word in enumerate(pattern):
        if word in ("E", "moe"):
            raise UserError(
                f"layer {i} is an expert layer ({word!r}); minipuzzle handles M, * and -"
            )
        if word not in KIND_OF:
            raise UserError(f"layer {i} is of unknown type {word!r}; known: {', '.join(KIND_OF)}")
        kinds.append(KIND_OF[word])
    number = config.get("num_hidden_layers")
    if number is not None and number != len(kinds):
        raise UserError(
            f"config.json: `num_hidden_layers` is {number}, the pattern has {len(kinds)}"
        )
    return kinds


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json in any spelling of the family."""
    kinds = _kinds(config)
    layers = {kind: _layer(config, kind) for kind in sorted(set(kinds))}
    biases = {flag for flag, (key, default) in BIAS_KEYS.items() if config.get(key, default)}
    if config.get("tie_word_embeddings", False):
        raise UserError(
            "config.json: `tie_word_embeddings` is true, but transformers' Nemotron-H does not tie "
            "and would leave the head random; store the head too and set it to false"
        )
    return Architecture(
        hidden=integer(config, "hidden_size"),
        vocabulary=integer(config, "vocab_size"),
        tied=False,
        layers=tuple(layers[kind] for kind in kinds),
        biases=frozenset(biases),
    )


def write_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """A config.json for the pruned model: the parent's, with what the cut changed.

    Written by hand because `save_pretrained` drops the pattern and adds expert keys, which
    mislead vLLM and llama.cpp's converter.
    """
    kept = {
        key: value
        for key, value in config.items()
        if key not in PATTERN_KEYS and not key.startswith(EXPERT_WORDS) and "expert" not in key
    }
    shape: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "".join(LETTER_OF[layer.kind] for layer in architecture.layers),
        "num_hidden_layers": len(architecture.layers),
        "hidden_size": architecture.hidden,
        "vocab_size": architecture.vocabulary,
        "tie_word_embeddings": architecture.tied,
    }
    mamba, attention, ffn = (uniform(architecture, k) for k in ("mamba", "attention", "ffn"))
    if isinstance(mamba, MambaLayer):
        shape |= {
            "mamba_num_heads": mamba.heads,
            "mamba_head_dim": mamba.head_dim,
            "n_groups": mamba.groups,
            "ssm_state_size": mamba.state,
            "conv_kernel": mamba.conv,
        }
    if isinstance(attention, AttentionLayer):
        shape |= {
            "num_attention_heads": attention.query_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "attention_head_dim": attention.head_dim,
        }
    if isinstance(ffn, FFNLayer):
        shape["intermediate_size"] = ffn.width
    return kept | shape


NEMOTRON_H = Family(
    name="nemotron_h",
    layer_prefix="backbone.layers.{block}.",
    model_tensors=MODEL,
    layer_tensors={"mamba": MAMBA, "attention": ATTENTION, "ffn": FFN},
    probes={
        "mamba": (Probe("heads", "mixer.in_proj", "output", segment=1),),
        "attention": (Probe("query_heads", "mixer.o_proj", "input"),),
        "ffn": (Probe("width", "mixer.down_proj", "input"),),
    },
    memory_names=(("backbone.", "model."),),
    modules={
        "embed": "model.embeddings",
        "norm": "model.norm_f",
        "head": "lm_head",
    },
    norms=dict.fromkeys(("mamba", "attention", "ffn"), "norm"),
    mixers=dict.fromkeys(("mamba", "attention", "ffn"), "mixer"),
    operations={
        "NemotronHMamba2Mixer": "mamba2",
        "NemotronHRMSNorm": "rms_norm",
        "NemotronHRMSNormGated": "gated_rms_norm",
    },
    read_config=read_config,
    write_config=write_config,
)
