"""ModelLoader: weights go where they belong, whole or in shards, at a known price in memory; pool sizes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import FAMILIES, all_tensors, byte_tokenizer, edit_tensors, slots_for, tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from minillm import loader as loader_module
from minillm import memory as memory_module
from minillm.config import EngineConfig, ModelConfig
from minillm.errors import CheckpointError, ConfigError
from minillm.loader import ModelLoader, find_checkpoint, load_tokenizer
from minillm.memory import MemoryReport, num_pages_that_fit, pool_size, warm_up
from minillm.model import CausalLM
from minillm.weights import WeightSlot, load_weights, random_weights

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_size", ["1GB", 40_000], ids=["whole", "sharded"])
def test_every_weight_arrives(family: str, stored: str, max_shard_size: str | int, tmp_path: Path) -> None:
    tiny_checkpoint(family, tmp_path, dtype=stored, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size != "1GB")
    expected = all_tensors(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        slots = slots_for(tmp_path, dtype)
        ModelLoader(tmp_path).load_weights(slots)
        for name, slot in slots.items():
            assert torch.equal(slot.target, expected[name].to(dtype)), name


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 32, "num_key_value_heads": 1}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_a_slot_for_every_tensor_of_its_checkpoint(family: str, changes: dict, tmp_path: Path) -> None:
    loader = ModelLoader(tiny_checkpoint(family, tmp_path, **changes))
    on_meta = CausalLM(loader.config, device="meta")
    loader.check(on_meta.weight_slots(), CPU)
    model = CausalLM(loader.config)
    for slot in model.weight_slots().values():
        slot.target.fill_(torch.nan)
    loader.load_weights(model.weight_slots())
    targets = [slot.target for slot in model.weight_slots().values()]
    assert all(torch.isfinite(target).all() for target in targets)
    assert sum(target.numel() for target in targets) == loader.config.num_parameters


@pytest.mark.parametrize("shard_dim", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3, 64, 400])
def test_ranks_hold_the_parts_of_one_whole(shard_dim: int, world_size: int, tmp_path: Path) -> None:
    tiny_checkpoint("qwen2", tmp_path, vocab_size=100)
    expected = all_tensors(tmp_path)
    ranks = [slots_for(tmp_path, shard_dim=shard_dim, rank=rank, world_size=world_size) for rank in range(world_size)]
    for slots in ranks[:3] + ranks[-2:]:
        load_weights(tmp_path, slots)
        for name, slot in slots.items():
            assert torch.equal(slot.target, expected[name][slot.shard_slices()])
    name = "model.embed_tokens.weight"
    assert sum(slots[name].target.shape[shard_dim] for slots in ranks) == expected[name].shape[shard_dim]


def test_random_weights_depend_on_seed_and_name_but_not_on_ranks(tmp_path: Path) -> None:
    config = ModelLoader(tiny_checkpoint("qwen2", tmp_path, vocab_size=70_000)).config  # an embedding of two blocks
    whole, again, other = (slots_for(tmp_path) for _ in range(3))
    ModelLoader(config).load_weights(whole)
    random_weights(again, 0)
    ModelLoader(tmp_path).load_weights(other, seed=1)
    for name, slot in whole.items():
        assert torch.equal(slot.target, again[name].target)
        if name.endswith("norm.weight"):
            assert (slot.target == 1).all()
        else:
            assert not torch.equal(slot.target, other[name].target)
            assert 0.01 < slot.target.std() < 0.03
    up, gate = (whole[f"model.layers.0.mlp.{part}_proj.weight"].target for part in ("up", "gate"))
    assert not torch.equal(up, gate)
    for shard_dim in (0, 1):
        for rank in range(3):
            slots = slots_for(tmp_path, shard_dim=shard_dim, rank=rank, world_size=3)
            random_weights(slots, 0)
            for name, slot in slots.items():
                assert torch.equal(slot.target, whole[name].target[slot.shard_slices()])


def test_a_slot_checks_its_own_shape() -> None:
    WeightSlot(torch.empty(3, 4), (8, 4), 0, 0, 3)
    WeightSlot(torch.empty(2, 4), (8, 4), 0, 2, 3)
    for arguments in (((3, 4), (8, 4), 0, 2, 3), ((8, 4), (8, 4), 2), ((8, 4), (8, 4), 0, 1, 1), ((4, 8), (8, 4))):
        shape, *rest = arguments
        with pytest.raises(ValueError, match=r"shard|rank"):
            WeightSlot(torch.empty(shape), *rest)


def test_a_tied_checkpoint_may_carry_a_copy_of_its_head_and_old_ones_their_frequencies(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    slots = slots_for(tmp_path)
    assert "lm_head.weight" not in slots
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.arange(8)}
    edit_tensors(tmp_path, lm_head__weight=torch.zeros(320, 64), **frequencies)
    load_weights(tmp_path, slots)
    assert torch.equal(slots["model.norm.weight"].target, all_tensors(tmp_path)["model.norm.weight"])


def test_a_folder_of_links_loads_like_the_cache_of_the_hub(tmp_path: Path) -> None:
    real = tiny_checkpoint("llama", tmp_path / "blobs", max_shard_size=40_000)
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    slots = slots_for(real)
    ModelLoader(snapshot).load_weights(slots)
    assert all(torch.isfinite(slot.target).all() for slot in slots.values())


MEASURE = """
import resource, sys, torch
from pathlib import Path
from checkpoints import slots_for
from minillm.weights import WeightSlot, load_weights
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
slots = slots_for(Path(sys.argv[1]), torch.bfloat16)
before = peak()
load_weights(sys.argv[1], slots)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of a process's memory")
def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    num_shards, rows = 6, 12_000  # 6 shards of 47 MiB: 281 MiB
    weight = torch.ones(rows, 1024, dtype=torch.float32)
    weight_map = {}
    for i in range(num_shards):
        file = f"model-{i}.safetensors"
        save_file({f"layer.{i}.{half}": weight[: rows // 2].clone() for half in "ab"}, tmp_path / file)
        weight_map |= {f"layer.{i}.{half}": file for half in "ab"}
    (tmp_path / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True, env=env
    )
    assert float(done.stdout) < 1.5 * 47  # MiB; the whole checkpoint is 281


def test_names_resolve_to_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "model").mkdir(parents=True)
    for name in ("org/model", "./org/model", Path("org/model"), tmp_path / "org/model", "~/org/model"):
        assert find_checkpoint(name).resolve() == (tmp_path / "org/model").resolve()
    monkeypatch.setattr(loader_module, "BUNDLED_MODEL", tmp_path)
    with pytest.raises(CheckpointError, match="bundled"):
        find_checkpoint(None)
    (tmp_path / "config.json").touch()
    assert find_checkpoint(None) == tmp_path


def test_a_hub_name_downloads_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(name: str, **options: list[str]) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("Qwen/Qwen3-0.6B") == tmp_path
    ((name, options),) = asked
    assert name == "Qwen/Qwen3-0.6B"
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"]
    others = [
        "modeling.py",
        "pytorch_model.bin",
        "original/params.json",
        "onnx/model.safetensors",
        "consolidated.safetensors",
    ]
    assert list(filter_repo_objects(wanted + others, **options)) == wanted


def test_a_model_that_cannot_be_downloaded_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' is not an existing folder.*hub") as caught:
        ModelLoader("nobody/nothing")
    assert caught.value.__cause__ is not None


def test_tokenizers_load_and_their_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer("Once é")["input_ids"]) == "Once é"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.__cause__ is not None


def test_a_tokenizer_never_brings_its_own_code(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: ...\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", null]}}'
    )
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)
    assert not trap.exists()


GIB = 2**30
CUDA = MemoryReport("cuda:0", 80 * GIB, 60 * GIB, 16 * GIB, 2 * GIB)
HOST = MemoryReport("cpu", 16 * GIB, 8 * GIB, GIB, 0)
MODEL = ModelConfig("llama", 100, 64, 96, 2, 4, 2, 16, 4096)


@given(
    page_bytes=st.integers(1, 2**24),
    total_bytes=st.integers(1, 2**38),
    free_share=st.floats(0, 1),
    activation_bytes=st.integers(0, 2**34),
    memory_fraction=st.floats(0.01, 1),
)
def test_the_pages_that_fit_fit_and_one_more_would_not(
    page_bytes: int, total_bytes: int, free_share: float, activation_bytes: int, memory_fraction: float
) -> None:
    free_bytes = int(total_bytes * free_share)
    sizes = {"total_bytes": total_bytes, "free_bytes": free_bytes, "activation_bytes": activation_bytes}
    budget = int(total_bytes * memory_fraction) - (total_bytes - free_bytes) - activation_bytes
    try:
        num_pages = num_pages_that_fit(page_bytes=page_bytes, memory_fraction=memory_fraction, **sizes)
    except ConfigError as error:
        assert "memory_fraction" in str(error)
        assert budget < 2 * page_bytes
    else:
        assert num_pages >= 1
        assert (num_pages + 1) * page_bytes <= budget < (num_pages + 2) * page_bytes  # one page more is for padding


def test_pool_sizes() -> None:
    page_bytes = 2**20
    # CUDA: 80 * 0.9 - 20 in use - 2 for activations = 50 GiB
    assert pool_size(EngineConfig(), MODEL, page_bytes, CUDA) == (50 * 1024 - 1, 4096)
    assert pool_size(EngineConfig(num_pages=10), MODEL, page_bytes, CUDA) == (10, 160)
    # CPU: up to 512 MiB; less if it is not needed; more if one request needs it and was asked for
    assert pool_size(EngineConfig(), MODEL, page_bytes, HOST) == (511, 4096)
    assert pool_size(EngineConfig(), replace(MODEL, max_position_embeddings=2**20), page_bytes, HOST) == (511, 511 * 16)
    assert pool_size(EngineConfig(max_running=3, max_model_len=100), MODEL, page_bytes, HOST) == (21, 100)
    assert pool_size(EngineConfig(max_model_len=4096, page_size=4), MODEL, page_bytes, HOST) == (1024, 4096)
    assert pool_size(EngineConfig(num_pages=4, max_model_len=4000), MODEL, page_bytes, HOST) == (4, 64)
    assert pool_size(EngineConfig(), MODEL, GIB, HOST) == (1, 16)
    for config, memory in (
        (EngineConfig(num_pages=2**31 - 2), HOST),
        (EngineConfig(num_pages=2**31 - 2), CUDA),
        (EngineConfig(max_model_len=4096, page_size=1), replace(HOST, free_bytes=GIB)),
    ):
        with pytest.raises(ConfigError, match=r"num_pages \d+ .* free"):
            pool_size(config, MODEL, page_bytes, memory)
    with pytest.raises(ConfigError, match="max_model_len 4097"):
        pool_size(EngineConfig(max_model_len=4097), MODEL, page_bytes, HOST)
    with pytest.raises(ConfigError, match="memory_fraction"):
        pool_size(EngineConfig(memory_fraction=0.2), MODEL, page_bytes, CUDA)


def test_warm_up_runs_the_largest_step_and_reports_every_byte_once() -> None:
    steps: list[int] = []
    report = warm_up(steps.append, 128, CPU, weights_bytes=1000)
    assert steps == [1, 128]
    assert (report.device, report.weights_bytes, report.kv_bytes) == ("cpu", 1000, 0)
    assert report.activation_bytes >= 0
    assert report.total_bytes == report.free_bytes + report.weights_bytes + report.other_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak, others do not")
def test_warm_up_measures_what_a_step_takes_and_gives_back() -> None:
    torch.ones(2**29, dtype=torch.uint8)  # an earlier, higher peak does not matter
    assert warm_up(lambda _: None, 1, CPU, 0).activation_bytes < 2**24
    report = warm_up(lambda num_tokens: torch.ones(num_tokens, 2**20, dtype=torch.uint8), 200, CPU, 0)
    assert 190 * 2**20 < report.activation_bytes < 260 * 2**20


def test_a_model_larger_than_the_device_is_refused_before_it_is_made() -> None:
    config = replace(MODEL, hidden_size=2**17, intermediate_size=2**19, num_layers=1000)
    target = torch.empty(2**17, 2**19, device="meta")
    slots = {f"{i}": WeightSlot(target, tuple(target.shape)) for i in range(3 * config.num_layers)}
    with pytest.raises(ConfigError, match=r"weights take .* GiB, but cpu has"):
        ModelLoader(config).check(slots, CPU)


def test_a_machine_that_tells_nothing_of_its_memory_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    free, total = memory_module.device_memory(CPU)
    assert 0 < free <= total
    monkeypatch.setattr(memory_module, "os", SimpleNamespace(sysconf=unknown))
    assert memory_module.device_memory(CPU) == (2**62, 2**62)
