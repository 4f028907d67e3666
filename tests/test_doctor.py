"""The doctor's checks: data about this machine, and the error that the engine raises from them."""

from __future__ import annotations

import importlib.metadata
import os
import stat
import sys
import tomllib
from pathlib import Path

import pytest

from minillm import doctor
from minillm.errors import KernelsUnavailableError

ROOT = Path(__file__).resolve().parents[1]


def executable(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with nothing on PATH and no CUDA toolkit."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("FLASHINFER_NVCC", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_every_check_answers():
    for check in doctor.run_checks(doctor.EVERYTHING + doctor.GPU):
        assert check.name and check.detail
        assert check.ok or check.advice, f"{check.name} says what is wrong, but not what to do"


def test_what_this_environment_needs_is_here():
    by_name = {check.name: check for check in doctor.run_checks(doctor.EVERYTHING)}
    assert by_name["Python"].ok and by_name["torch"].ok and by_name["packages"].ok


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "safetensors" else "5.1.0")
    check = doctor.check_packages()
    assert not check.ok and "safetensors is missing" in check.detail


def test_another_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: "4.57.1")
    assert not doctor.check_packages().ok
    assert "transformers 5" in doctor.check_packages().advice


def test_a_torch_that_does_not_import_is_reported(monkeypatch):
    def fail(name):
        raise OSError("libtorch.so: cannot open shared object file\nmore lines")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    check = doctor.check_torch()
    assert not check.ok and "libtorch.so" in check.detail and "\n" not in check.detail
    assert not doctor.check_gpu().ok


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts stand in for the tools")
class TestTools:
    def test_nvcc_is_looked_for_where_flashinfer_looks(self, bare, monkeypatch):
        on_path = executable(bare / "bin" / "nvcc")
        assert doctor.find_nvcc() == on_path
        at_home = executable(bare / "cuda" / "bin" / "nvcc")
        monkeypatch.setenv("CUDA_HOME", str(bare / "cuda"))
        assert doctor.find_nvcc() == at_home
        monkeypatch.setenv("CUDA_HOME", str(bare / "nowhere"))  # FlashInfer would not look further either
        assert doctor.find_nvcc() is None

    def test_nvcc_of_another_cuda_is_reported(self, bare, monkeypatch):
        executable(bare / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
        monkeypatch.setattr("torch.version.cuda", "13.0")
        check = doctor.check_nvcc()
        assert not check.ok and check.detail.startswith("11.8") and "13.0" in check.advice
        monkeypatch.setattr("torch.version.cuda", "11.8")
        assert doctor.check_nvcc().ok

    def test_nvcc_that_does_not_run_is_reported(self, bare):
        executable(bare / "bin" / "nvcc", "exit 1")
        assert "does not run" in doctor.check_nvcc().detail

    def test_no_nvcc_is_no_matter_where_kernels_come_compiled(self, bare, monkeypatch):
        monkeypatch.setenv("CUDA_HOME", str(bare / "nowhere"))
        assert not doctor.check_nvcc().ok
        monkeypatch.setattr(doctor, "installed_version", lambda name: "0.7.2")
        assert doctor.check_nvcc().ok

    def test_ninja_beside_python_but_off_path_is_told_apart(self, bare, monkeypatch):
        assert doctor.check_ninja().detail == "not found" or "not on PATH" in doctor.check_ninja().detail
        executable(bare / "venv" / "ninja")
        monkeypatch.setattr(sys, "executable", str(bare / "venv" / "python"))
        assert "not on PATH" in doctor.check_ninja().detail
        assert doctor.check_ninja().advice == f'export PATH="{bare / "venv"}:$PATH"'
        executable(bare / "bin" / "ninja")
        assert doctor.check_ninja().ok

    def test_the_compiler_is_found(self, bare):
        assert not doctor.check_compiler().ok
        executable(bare / "bin" / "g++")
        assert doctor.check_compiler().ok

    def test_a_driver_that_sees_no_gpu_is_no_driver(self, bare):
        assert not doctor.has_nvidia_driver()
        executable(bare / "bin" / "nvidia-smi", "echo 'No devices were found'")
        assert not doctor.has_nvidia_driver()
        executable(bare / "bin" / "nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: x)'")
        assert doctor.has_nvidia_driver()

    def test_a_gpu_under_a_cpu_build_is_told_apart(self, bare, monkeypatch):
        executable(bare / "bin" / "nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: x)'")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.version.cuda", None)
        assert "CPU build" in doctor.check_gpu().detail
        monkeypatch.setattr("torch.version.cuda", "13.0")
        assert "driver" in doctor.check_gpu().advice


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (8 * doctor.GIB, 16 * doctor.GIB))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check = doctor.check_gpu()
    assert not check.ok and check.detail.startswith("2 x Tesla V100, 16 GiB") and "reference" in check.advice


def test_another_flashinfer_is_refused(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.6.0")
    assert not doctor.check_flashinfer().ok
    monkeypatch.setattr(doctor, "installed_version", lambda name: doctor.FLASHINFER_VERSION)
    assert doctor.check_flashinfer().ok


def test_the_error_names_all_that_is_missing(monkeypatch):
    missing = doctor.Check("nvcc", False, "not found", "install it")
    other = doctor.Check("ninja", False, "not on PATH", "add it")
    monkeypatch.setattr(doctor, "GPU", (lambda: missing, lambda: other))
    with pytest.raises(KernelsUnavailableError, match=r"nvcc: not found \(install it\); ninja: not on PATH \(add it\)"):
        doctor.require_flashinfer()
    monkeypatch.setattr(doctor, "GPU", (lambda: doctor.Check("nvcc", True, "13.0"),))
    doctor.require_flashinfer()


def test_the_flashinfer_version_is_written_the_same_everywhere():
    pin = f"flashinfer-python=={doctor.FLASHINFER_VERSION}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pin in project["project"]["optional-dependencies"]["gpu"]
    assert pin in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_the_torch_pin_is_written_the_same_everywhere():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in pins if line.startswith("torch==")]
    assert f"- {pin}\n" in (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert f"TORCH       ?= {pin}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.skipif(not os.environ.get("CI"), reason="only CI's environment is made from the pins")
def test_the_pins_are_what_runs():
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if version and doctor.installed_version(name):
            assert importlib.metadata.version(name).split("+")[0] == version
