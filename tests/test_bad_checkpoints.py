"""Broken checkpoints and wrong configs: each is one clear error that names what is wrong, at once, at no cost."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, TINY, edit_config, edit_tensors, tiny_checkpoint, write_raw

from minillm.config import EngineConfig, ModelConfig, RopeConfig
from minillm.errors import CheckpointError, ConfigError
from minillm.loader import ModelLoader
from minillm.model import CausalLM

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whole checkpoint of each family, and a sharded one."""
    folders = {family: tiny_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
    sharded = tiny_checkpoint("llama", tmp_path_factory.mktemp("sharded"), max_shard_size=100_000)
    return folders | {"sharded": sharded}


def open_checkpoint(folder: Path) -> ModelLoader:
    """What an engine does before it takes memory for the weights."""
    loader = ModelLoader(folder)
    slots = CausalLM(loader.config, device="meta", num_positions=1).weight_slots()
    loader.check(slots, torch.device("cpu"))
    return loader


def refused(folder: Path, *words: str) -> CheckpointError:
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert time.process_time() - started < 2
    message = str(caught.value)
    assert len(message) < 900
    for word in words:
        assert word in message, message
    return caught.value


CONFIGS: list[tuple[str, dict[str, Any], str]] = [  # family, changes to config.json, what the message names
    ("llama", {"model_type": "gpt2"}, "model_type"),
    ("llama", {"model_type": "mixtral"}, "model_type"),
    ("llama", {"model_type": None}, "model_type"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama", {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
    ("llama", {"hidden_size": None}, "hidden_size"),
    ("llama", {"hidden_size": 10**9}, "hidden_size"),
    ("llama", {"hidden_size": "64"}, "hidden_size"),
    ("llama", {"hidden_size": 64.0}, "hidden_size"),
    ("llama", {"hidden_size": True}, "hidden_size"),
    ("llama", {"hidden_size": 66, "head_dim": None}, "hidden_size"),
    ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": -2}, "num_hidden_layers"),
    ("llama", {"num_attention_heads": []}, "num_attention_heads"),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads 3"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
    ("llama", {"num_key_value_heads": 8}, "num_key_value_heads"),
    ("llama", {"head_dim": 15}, "head_dim"),
    ("llama", {"vocab_size": 0}, "vocab_size"),
    ("llama", {"vocab_size": 10**30}, "vocab_size"),
    ("llama", {"intermediate_size": None}, "intermediate_size"),
    ("llama", {"max_position_embeddings": 2**40}, "max_position_embeddings"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("llama", {"attention_bias": "yes"}, "attention_bias"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype"),
    ("llama", {"dtype": "float64"}, "dtype"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"eos_token_id": 320}, "eos_token_id"),
    ("llama", {"eos_token_id": ["2"]}, "eos_token_id"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("llama", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta": 3}}, "'beta'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters"),
    ("llama", {"rope_parameters": None, "rope_theta": 0}, "theta"),
    ("mistral", {"sliding_window": 128}, "sliding_window=128"),
    ("mistral", {"sliding_window": -1}, "sliding_window"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None},
        "sliding",
    ),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": 3}, "layer_types"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("qwen3", {"num_experts": 128}, "num_experts"),
    ("qwen3", {"compression_config": {"format": "int8"}}, "compression_config"),
    # These read well, but are not what the weights are.
    ("llama", {"num_hidden_layers": 3}, "model.layers.2."),
    ("llama", {"num_hidden_layers": 1}, "model.layers.1."),
    ("llama", {"vocab_size": 384}, "embed_tokens"),
    ("llama", {"intermediate_size": 128}, "mlp"),
    ("llama", {"attention_bias": True}, "k_proj.bias"),
    ("llama", {"model_type": "qwen3", "architectures": None}, "k_norm"),
    ("qwen3", {"model_type": "llama", "architectures": None}, "k_norm"),
    (
        "qwen2",
        {"hidden_size": 2**17, "num_hidden_layers": 1000, "max_window_layers": 1000, "layer_types": None},
        "layers",
    ),
]


@pytest.mark.parametrize(
    ("family", "changes", "name"), CONFIGS, ids=[f"{family}-{json.dumps(c)[1:50]}" for family, c, _ in CONFIGS]
)
def test_a_wrong_config(family: str, changes: dict[str, Any], name: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good[family], tmp_path / "copy")
    open_checkpoint(folder)
    edit_config(folder, **changes)
    refused(folder, name, str(folder))


def one_tensor(**entry: Any) -> dict[str, Any]:
    return {NORM: {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]} | entry}


def whole(change: Callable[[Path], None], *words: str) -> tuple[str, Callable[[Path], None], tuple[str, ...]]:
    return "llama", change, words


def sharded(change: Callable[[Path], None], *words: str) -> tuple[str, Callable[[Path], None], tuple[str, ...]]:
    return "sharded", change, words


def map_all_to(name: Any) -> Callable[[Path], None]:
    """An index that names a file for one tensor, and is otherwise as it was."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][NORM] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def raw(header: Any, data: bytes = b"", size: int | None = None) -> Callable[[Path], None]:
    return lambda folder: write_raw(folder / "model.safetensors", header, data, size)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def duplicate(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    write_raw(folder / "again.safetensors", one_tensor(), bytes(256))
    index["elsewhere"] = "again.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def remove_first_shard(folder: Path) -> None:
    next(folder.glob("model-00001-*")).unlink()


def empty_first_shard(folder: Path) -> None:
    next(folder.glob("model-00001-*")).write_bytes(b"")


def shard_is_a_folder(folder: Path) -> None:
    shard = next(folder.glob("model-00001-*"))
    shard.unlink()
    shard.mkdir()


def drop_from_a_shard(folder: Path) -> None:
    write_raw(next(folder.glob("model-00001-*")), {})


F8 = {name: torch.ones(64).to(torch.float8_e4m3fn) for name in ("model__norm__weight",)}
FILES = {
    "no config": whole(lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is a folder": whole(
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()) and None, "config.json"
    ),
    "no weights": whole(lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "only pickles": whole(only_pickles, "pytorch_model.bin", "pickle"),
    "a link to nowhere": whole(
        lambda folder: (
            (
                (folder / "model.safetensors").unlink(),
                (folder / "model.safetensors").symlink_to("nowhere"),
            )
            and None
        ),
        "model.safetensors",
    ),
    "empty file": whole(write("model.safetensors", b""), "model.safetensors"),
    "garbage": whole(write("model.safetensors", b"\x80\x04 not what it seems" * 9), "model.safetensors"),
    "html": whole(write("model.safetensors", b"<!DOCTYPE html><title>404</title>"), "model.safetensors"),
    "a pointer of Git LFS": whole(
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "model.safe"
    ),
    "cut off in its header": whole(truncate("model.safetensors", 100), "model.safetensors"),
    "cut off in its data": whole(truncate("model.safetensors", 50_000), "model.safetensors"),
    "huge header": whole(raw({}, size=2**40), "model.safetensors"),
    "header is no JSON": whole(raw(b"{{{{"), "model.safetensors"),
    "header is a list": whole(raw(b"[1, 2]"), "model.safetensors"),
    "offsets beyond the file": whole(raw(one_tensor(data_offsets=[0, 2**50])), "model.safetensors"),
    "offsets backwards": whole(raw(one_tensor(data_offsets=[256, 0]), bytes(256)), "model.safetensors"),
    "shape beyond the data": whole(raw(one_tensor(shape=[2**40]), bytes(256)), "model.safetensors"),
    "shape overflows": whole(raw(one_tensor(shape=[2**40, 2**40]), bytes(256)), "model.safetensors"),
    "negative shape": whole(raw(one_tensor(shape=[-64]), bytes(256)), "model.safetensors"),
    "unknown dtype": whole(raw(one_tensor(dtype="F13"), bytes(256)), "model.safetensors"),
    "tensors overlap": whole(raw(one_tensor() | {"other": one_tensor()[NORM]}, bytes(256)), "model.safetensors"),
    "no tensors": whole(raw({}), "lacks", "embed_tokens", "in all"),
    "one missing": whole(lambda folder: edit_tensors(folder, NORM), "lacks", NORM),
    "one surplus": whole(lambda folder: edit_tensors(folder, lora__A=torch.zeros(2)), "no place", "lora.A"),
    "wrong shape": whole(
        lambda folder: edit_tensors(folder, model__norm__weight=torch.zeros(63)), NORM, "[63]", "[64]"
    ),
    "transposed": whole(
        lambda folder: edit_tensors(folder, model__embed_tokens__weight=torch.zeros(64, 320)),
        "embed_tokens",
        "[64, 320]",
    ),
    "int8": whole(lambda folder: edit_tensors(folder, model__norm__weight=torch.ones(64).char()), NORM, "I8"),
    "int64": whole(lambda folder: edit_tensors(folder, model__norm__weight=torch.ones(64).long()), NORM, "I64"),
    "float64": whole(lambda folder: edit_tensors(folder, model__norm__weight=torch.ones(64).double()), NORM, "F64"),
    "float8": whole(lambda folder: edit_tensors(folder, **F8), NORM, "F8_E4M3"),
    "base model only": whole(lambda folder: edit_tensors(folder, "lm_head.weight"), "lm_head.weight"),
    "shard missing": sharded(remove_first_shard, "model-00001-"),
    "shard empty": sharded(empty_first_shard, "model-00001-"),
    "shard is a folder": sharded(shard_is_a_folder, "model-00001-"),
    "shard lacks its tensors": sharded(drop_from_a_shard, "model-00001-", "promises"),
    "tensor in two shards": sharded(duplicate, NORM, "two files", "again.safetensors"),
    "index is garbage": sharded(write(INDEX, b"\xff{"), INDEX),
    "index is a list": sharded(write(INDEX, b"[]"), INDEX),
    "index is empty": sharded(write(INDEX, b"{}"), INDEX, "weight_map"),
    "index maps to a list": sharded(write(INDEX, b'{"weight_map": []}'), INDEX, "weight_map"),
    "index names a parent": sharded(map_all_to("../model.safetensors"), INDEX, "../model.safetensors"),
    "index names an absolute path": sharded(map_all_to("/etc/passwd.safetensors"), INDEX, "/etc/passwd"),
    "index names a subfolder": sharded(map_all_to("sub/../../x.safetensors"), INDEX, "sub/"),
    "index names a Windows path": sharded(map_all_to("..\\x.safetensors"), INDEX, "own folder"),
    "index names a pickle": sharded(map_all_to("pytorch_model.bin"), INDEX, "pytorch_model.bin"),
    "index names a dot": sharded(map_all_to(".."), INDEX, "'..'"),
    "index names a NUL": sharded(map_all_to("x\0.safetensors"), "safetensors"),
    "index names a number": sharded(map_all_to(3), INDEX, NORM),
    "index names a list": sharded(map_all_to(["x.safetensors"]), INDEX, NORM),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files(case: str, good: dict[str, Path], tmp_path: Path) -> None:
    kind, change, words = FILES[case]
    folder = shutil.copytree(good[kind], tmp_path / "copy")
    open_checkpoint(folder)
    change(folder)
    refused(folder, *words)


def test_the_first_cause_is_kept(good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["llama"], tmp_path / "copy")
    truncate("model.safetensors", 50_000)(folder)
    assert type(refused(folder).__cause__).__name__ == "SafetensorError"


def test_nothing_is_written_when_a_late_shard_is_bad(good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["sharded"], tmp_path / "copy")
    os.truncate(max(folder.glob("*.safetensors")), 1000)
    slots = CausalLM(ModelLoader(folder).config).weight_slots()
    for slot in slots.values():
        slot.target.fill_(torch.nan)
    with pytest.raises(CheckpointError):
        ModelLoader(folder).load_weights(slots)
    assert all(slot.target.isnan().all() for slot in slots.values())


def test_a_huge_header_costs_no_memory(tmp_path: Path) -> None:
    """A sparse file of 8 TiB, whose header claims all of it."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    path = tmp_path / "model.safetensors"
    write_raw(path, {}, header_size=2**43 - 8)
    try:
        os.truncate(path, 2**43)
    except OSError:
        os.truncate(path, 2**40)
    refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./no/such/folder", "no/such/folder"),
        ("/no/such/folder", "not an existing folder"),
        ("no/such/folder", "not an existing folder"),
        ("../x", "not an existing folder"),
        ("~/no-such-folder-here", "not an existing folder"),
        ("~no-such-user/here", "not an existing folder"),
        ("C:\\models\\llama", "not an existing folder"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "not an existing folder"),
        ("", "not an existing folder"),
        ("a b", "not an existing folder"),
        ("x\0y", "not an existing folder"),
        ("ü" * 5000, "not an existing folder"),
        (Path("no-such-folder"), "not an existing folder"),
        (__file__, "is a file"),
        (3, "int"),
        (b"folder", "bytes"),
        (["folder"], "list"),
    ],
)
def test_a_wrong_name(model: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="model") as caught:
        ModelLoader(model)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


MODEL = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2}
MODEL |= {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        *(
            (ModelConfig, {name: value})
            for name in MODEL
            for value in (None, True, 2.5, "x", 0, -1, 10**12, float("nan"))
        ),
        (ModelConfig, {"num_kv_heads": 3}),
        (ModelConfig, {"head_dim": 7}),
        (ModelConfig, {"rope": None}),
        (ModelConfig, {"rope": {"theta": 1.0}}),
        (ModelConfig, {"qkv_bias": 1}),
        (ModelConfig, {"dtype": "int8"}),
        (ModelConfig, {"dtype": torch.int8}),
        (ModelConfig, {"eos_token_ids": 2}),
        (ModelConfig, {"eos_token_ids": (True,)}),
        (ModelConfig, {"eos_token_ids": (320,)}),
        (RopeConfig, {"rope_type": "ntk"}),
        (RopeConfig, {"theta": float("nan")}),
        (RopeConfig, {"theta": 1}),
        (RopeConfig, {"factor": True}),
        (RopeConfig, {"factor": -1.0}),
        (RopeConfig, {"truncate": None}),
        (RopeConfig, {"original_max_position_embeddings": None, "rope_type": "yarn", "factor": 2.0}),
        (EngineConfig, {"device": "gpu"}),
        (EngineConfig, {"device": "cuda:-1"}),
        (EngineConfig, {"device": "cuda:0\n"}),
        (EngineConfig, {"device": None}),
        (EngineConfig, {"device": torch.device("meta")}),
        (EngineConfig, {"dtype": "int8"}),
        (EngineConfig, {"dtype": torch.float64}),
        (EngineConfig, {"dtype": None}),
        (EngineConfig, {"kernels": "triton"}),
        (EngineConfig, {"page_size": 65}),
        (EngineConfig, {"page_size": 0}),
        (EngineConfig, {"page_size": True}),
        (EngineConfig, {"page_size": None}),
        (EngineConfig, {"num_pages": 0}),
        (EngineConfig, {"num_pages": 10**12}),
        (EngineConfig, {"num_pages": 10**5000}),
        (EngineConfig, {"memory_fraction": 0}),
        (EngineConfig, {"memory_fraction": 1.01}),
        (EngineConfig, {"memory_fraction": float("nan")}),
        (EngineConfig, {"memory_fraction": True}),
        (EngineConfig, {"memory_fraction": "0.9"}),
        (EngineConfig, {"max_running": 0}),
        (EngineConfig, {"max_running": 2.0}),
        (EngineConfig, {"max_batch_tokens": 63}),
        (EngineConfig, {"max_batch_tokens": "2048"}),
        (EngineConfig, {"max_model_len": 1}),
        (EngineConfig, {"max_model_len": False}),
        (EngineConfig, {"prefix_caching": 1}),
        (EngineConfig, {"prefix_caching": None}),
        (EngineConfig, {"tensor_parallel_size": 0}),
        (EngineConfig, {"tensor_parallel_size": 10**4}),
        (EngineConfig, {"seed": -1}),
        (EngineConfig, {"seed": 0.5}),
        (EngineConfig, {"seed": 2**63}),
    ],
    ids=lambda value: (
        value.__name__ if isinstance(value, type) else str(value)[:40] if 10**5000 not in value.values() else "huge"
    ),
)
def test_a_wrong_option_is_a_config_error_that_names_it(config: type, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))) as caught:
        config(**(MODEL | options if config is ModelConfig else options))
    assert len(str(caught.value)) < 300
