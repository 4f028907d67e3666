"""ModelConfig, RopeConfig and EngineConfig: equal to what transformers reads; wrong values are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, TINY, edit_config, tiny_checkpoint, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minillm.config import EngineConfig, ModelConfig, RopeConfig
from minillm.errors import CheckpointError, ConfigError

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("llama", {"eos_token_id": [2, 5, 7]}),
    ("mistral", {"sliding_window": 256}),  # as long as the context: never in effect
    ("mistral", {"head_dim": 32, "num_key_value_heads": 1}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),  # no layer left for it
    ("qwen3", {"attention_bias": True, "num_key_value_heads": 4, "eos_token_id": None}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 1000000},
    {"rope_type": "linear", "factor": 4},
    {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    {**LLAMA3, "original_max_position_embeddings": 64, "factor": 32.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048, "mscale": 0.5, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},  # the old context is the new one
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096, "beta_fast": 0},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 10},  # the ramp starts below dimension 0
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_reads_what_transformers_wrote(family: str, changes: dict, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = ModelConfig.from_hf(tiny_checkpoint(family, tmp_path, dtype="bfloat16", **changes))
    theirs = AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(theirs)
    weights = dict(model.named_parameters())
    layer = "model.layers.0."

    assert config.model_type == family and config.dtype == "bfloat16"
    assert config.num_parameters == sum(p.numel() for p in weights.values())
    assert config.num_bytes() == 2 * config.num_parameters == config.num_bytes(torch.float16)
    assert config.num_bytes("float32") == 4 * config.num_parameters
    assert config.num_qo_heads * config.head_dim == weights[layer + "self_attn.q_proj.weight"].shape[0]
    assert config.num_kv_heads * config.head_dim == weights[layer + "self_attn.k_proj.weight"].shape[0]
    assert config.qkv_bias == (layer + "self_attn.v_proj.bias" in weights)
    assert config.o_bias == (layer + "self_attn.o_proj.bias" in weights)
    assert config.mlp_bias == (layer + "mlp.down_proj.bias" in weights)
    assert config.qk_norm == (layer + "self_attn.k_norm.weight" in weights)
    assert config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    eos = theirs.eos_token_id
    assert config.eos_token_ids == (() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_transformers(family: str) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 32, "sliding_window": None}
    theirs = AutoConfig.for_model(
        family, **{k: v for k, v in sizes.items() if k != "sliding_window" or family != "llama"}
    )
    ours = ModelConfig.from_dict({"model_type": family, **sizes})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.dtype == "float32"


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(str(value) for value in rope.values()))
def test_rope_frequencies_equal_those_of_transformers(rope: dict, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=65536, rope_parameters=dict(rope))
    init = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    if rope.get("factor", 1) is None:
        config.rope_parameters["factor"] = None
    expected, expected_scale = init(config)
    inv_freq, scale = RopeConfig.from_dict({"max_position_embeddings": 65536, "rope_parameters": rope}).inv_freq(
        head_dim
    )
    assert inv_freq.dtype == np.float32 and inv_freq.shape == (head_dim // 2,)
    np.testing.assert_allclose(inv_freq, expected.numpy(), rtol=5e-7)  # a few units of the last place
    assert scale == pytest.approx(expected_scale, rel=1e-12)


def test_old_and_new_spellings_of_rope_are_one() -> None:
    new = {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 128}
    scaling = {name: value for name, value in new.items() if name != "rope_theta"}
    older = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    expected = RopeConfig("llama3", 5e5, 8.0, 128, 1.0, 4.0)
    for config in (
        {"rope_parameters": new},
        {"rope_theta": 5e5, "rope_scaling": scaling},
        {"rope_theta": 5e5, "rope_scaling": older},
        {"rope_theta": 5e5, "rope_parameters": scaling},
        {"rope_theta": 5e5, "rope_scaling": scaling | {"original_max_position_embeddings": 64}}
        | {"original_max_position_embeddings": 128},
        {"rope_scaling": None, "rope_parameters": new, "partial_rotary_factor": 1.0},
    ):
        assert RopeConfig.from_dict(config) == expected
    assert RopeConfig.from_dict({"rope_scaling": None, "rope_theta": 10000}) == RopeConfig()


def test_dtype_and_eos_from_either_place(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path)
    edit_config(tmp_path, dtype=None, torch_dtype="float16", eos_token_id=[3, 4])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 3]}))
    config = ModelConfig.from_hf(tmp_path)
    assert config.dtype == "float16"
    assert config.eos_token_ids == (9, 3, 4)
    edit_config(tmp_path, dtype="bfloat16")
    (tmp_path / "generation_config.json").unlink()
    assert ModelConfig.from_hf(str(tmp_path)).dtype == "bfloat16"


def test_configs_are_values() -> None:
    config = ModelConfig.from_dict(TINY | {"model_type": "qwen3"})
    assert config == ModelConfig.from_dict(TINY | {"model_type": "qwen3"})
    assert hash(config) == hash(ModelConfig.from_dict(TINY | {"model_type": "qwen3"}))
    with pytest.raises(AttributeError):
        config.vocab_size = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        EngineConfig().page_size = 3  # type: ignore[misc]


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, 64, 1e-6]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ROPE_NAMES = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "truncate",
    "low_freq_factor",
)
NAMES = (
    *TINY,
    *(
        "model_type",
        "architectures",
        "rms_norm_eps",
        "hidden_act",
        "dtype",
        "torch_dtype",
        "attention_bias",
        "mlp_bias",
    ),
    *("tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "use_sliding_window"),
    *("max_window_layers", "quantization_config", "pretraining_tp", "num_experts", "partial_rotary_factor"),
    "original_max_position_embeddings",
)


@given(
    st.sampled_from(FAMILIES),
    st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, max_size=4),
    st.none()
    | st.dictionaries(st.sampled_from(ROPE_NAMES), JSON_VALUES | st.sampled_from(["yarn", "llama3"]), max_size=4),
)
def test_any_config_is_read_or_refused_with_a_config_error(family: str, changes: dict, rope: dict | None) -> None:
    config = TINY | {"model_type": family} | ({"rope_parameters": rope} if rope else {}) | changes
    try:
        read = ModelConfig.from_dict(config)
    except ConfigError as error:
        assert len(str(error)) < 600
    else:
        inv_freq, scale = read.rope.inv_freq(read.head_dim)
        assert np.isfinite(inv_freq).all() and np.isfinite(scale)
        assert read.num_parameters > 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{\x00}\x00",
        b'{"model_type": "\xe9"}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut off", "list", "null", "utf-16", "latin-1", "deep", "long number"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_no_config(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    ModelConfig.from_hf(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        ModelConfig.from_hf(tmp_path)


def test_a_huge_or_missing_config_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path / "nowhere")
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**34)  # takes no room on disk
    with pytest.raises(CheckpointError, match="more than"):
        ModelConfig.from_hf(tmp_path)


def test_large_real_models_are_counted_right() -> None:
    llama = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    llama |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert ModelConfig.from_dict(llama).num_parameters == 8_030_261_248  # Llama 3.1 8B
    qwen = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
    qwen |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
    assert ModelConfig.from_dict(qwen).num_parameters == 596_049_920  # Qwen3 0.6B


def test_engine_config_takes_the_usual_spellings() -> None:
    config = EngineConfig(device=torch.device("cuda", 1), dtype=torch.float16, page_size=np.int64(8), memory_fraction=1)
    assert (config.device, config.dtype, config.page_size, config.memory_fraction) == ("cuda:1", "float16", 8, 1.0)
    assert type(config.page_size) is int and type(config.memory_fraction) is float
    assert EngineConfig.from_options(max_running=8, seed=3) == EngineConfig(max_running=8, seed=3)
    assert EngineConfig.field_names()[:4] == ("device", "dtype", "kernels", "page_size")
    assert set(EngineConfig.field_names()) <= set(EngineConfig.__doc__.replace(":", "").split())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("page_sise", "page_size"), ("cuda_graph", "cuda_graphs"), ("max_num_running", "max_running"), ("zzz", None)],
)
def test_an_unknown_option_is_a_type_error_that_names_the_nearest(name: str, hint: str | None) -> None:
    with pytest.raises(TypeError) as caught:
        EngineConfig.from_options(extra_names=("cuda_graphs", "observers"), **{name: 1})
    assert repr(name) in str(caught.value)
    assert ("did you mean" in str(caught.value)) == (hint is not None)
    assert hint is None or repr(hint) in str(caught.value)


def test_reading_a_config_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    code = (
        "import sys; from minillm.config import ModelConfig; ModelConfig.from_hf(sys.argv[1]).rope.inv_freq(64); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'safetensors')))"
    )
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )


def test_the_tiny_models_have_no_weight_at_its_default() -> None:
    weights = dict(tiny_model("qwen3", attention_bias=True).named_parameters())
    assert all(weight.std() > 0.05 for weight in weights.values())
