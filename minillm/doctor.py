"""What this machine can run: checks that return data, for `python -m minillm doctor` and for the engine's own errors.

No check raises, and none changes anything. torch is imported only by the checks that ask it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from minillm.errors import KernelsUnavailableError

FLASHINFER_VERSION = "0.7.2.post1"
MIN_COMPUTE_CAPABILITY = (7, 5)  # FlashInfer refuses older GPUs
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        ok: whether it is as it should be.
        detail: what was found, in a few words.
        advice: what to do about it; empty where nothing needs doing.
    """

    name: str
    ok: bool
    detail: str
    advice: str = ""


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _torch() -> ModuleType | None:
    """torch, or None where it cannot be imported (check_torch says why)."""
    try:
        return importlib.import_module("torch")
    except Exception:
        return None


def _run(*command: str) -> str | None:
    """The output of a command, or None if it is not there, fails, or takes longer than 20 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# --- what everything needs


def check_python() -> Check:
    ok = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    return Check("Python", ok, detail, "" if ok else "minillm needs Python 3.11 or newer: make an environment with it")


def check_torch() -> Check:
    if installed_version("torch") is None:
        return Check("torch", False, "not installed", "python -m pip install -c constraints.txt -e .")
    try:
        torch = importlib.import_module("torch")
        works = bool(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum() == 8)
    except Exception as error:
        return Check("torch", False, f"cannot be used: {_first_line(error)}", "install it again, in a new environment")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    detail = f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)"
    if not works or _numbers(torch.__version__) < (2, 11):
        return Check("torch", False, detail, "minillm needs torch 2.11 or newer: pip install torch==2.13.0")
    return Check("torch", True, detail)


def check_packages() -> Check:
    """transformers, safetensors and numpy, by their metadata alone."""
    versions = {name: installed_version(name) for name in ("transformers", "safetensors", "numpy")}
    missing = [name for name, version in versions.items() if version is None]
    detail = ", ".join(f"{name} {version or 'is missing'}" for name, version in versions.items())
    if missing:
        return Check("packages", False, detail, "python -m pip install -c constraints.txt -e .")
    if _numbers(versions["transformers"] or "0")[0] != 5:
        return Check("packages", False, detail, "minillm needs transformers 5: pip install 'transformers>=5,<6'")
    return Check("packages", True, detail)


def check_bundled_model() -> Check:
    found = sorted((Path(__file__).parent / "assets").rglob("*.safetensors"))
    if not found:
        return Check("story model", False, "not in this copy of minillm", "install minillm again, assets included")
    size = sum(path.stat().st_size for path in found)
    return Check("story model", True, f"bundled, {size / 1e6:.1f} MB")


def total_memory() -> int | None:
    """Bytes of main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def check_memory() -> Check:
    total = total_memory()
    if total is None:
        return Check("memory", True, "size unknown")
    ok = total >= 2 * GIB
    advice = "" if ok else "the story model needs about 1 GiB: close other programs, or lower num_pages"
    return Check("memory", ok, f"{total / GIB:.1f} GiB", advice)


def check_disk() -> Check:
    """Room in the home folder, where model downloads and compiled kernels are kept."""
    try:
        free = shutil.disk_usage(Path.home()).free
    except (OSError, RuntimeError) as error:
        return Check("disk", False, _first_line(error), "set HOME to a folder that exists")
    ok = free >= GIB
    return Check("disk", ok, f"{free / GIB:.1f} GiB free at home", "" if ok else "downloads and kernels need room")


# --- what an NVIDIA GPU needs


def has_nvidia_driver() -> bool:
    """Whether a driver is installed and sees a GPU, whatever torch thinks of it."""
    listing = _run("nvidia-smi", "-L") if shutil.which("nvidia-smi") else None
    return bool(listing and "GPU" in listing)


def check_gpu() -> Check:
    torch = _torch()
    if torch is None:
        return Check("GPU", False, "unknown: torch cannot be imported", "mend torch first")
    if not torch.cuda.is_available():
        if not has_nvidia_driver():
            return Check("GPU", False, "no NVIDIA GPU found", "none needed: everything runs on the CPU, too")
        if torch.version.cuda is None:
            return Check("GPU", False, "there is one, but this torch is the CPU build", "make gpu")
        advice = f"the driver must be new enough for CUDA {torch.version.cuda}: see nvidia-smi"
        return Check("GPU", False, "there is one, but torch cannot use it", advice)
    try:
        name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        free, total = torch.cuda.mem_get_info(0)
    except Exception as error:
        return Check("GPU", False, f"does not answer: {_first_line(error)}", "see what nvidia-smi says")
    count = torch.cuda.device_count()
    detail = f"{f'{count} x ' if count > 1 else ''}{name}, {total / GIB:.0f} GiB ({free / GIB:.0f} free)"
    if capability < MIN_COMPUTE_CAPABILITY:
        return Check("GPU", False, f"{detail}, too old for FlashInfer", 'run with kernels="reference"')
    return Check("GPU", True, detail)


def check_flashinfer() -> Check:
    version = installed_version("flashinfer-python")
    if version is None:
        return Check("FlashInfer", False, "not installed", "make gpu (or, in the checkout, pip install -e '.[gpu]')")
    if version != FLASHINFER_VERSION:
        advice = f"minillm is tested with exactly one version: pip install flashinfer-python=={FLASHINFER_VERSION}"
        return Check("FlashInfer", False, f"{version}, where {FLASHINFER_VERSION} is wanted", advice)
    return Check("FlashInfer", True, version)


def find_nvcc() -> Path | None:
    """The CUDA compiler that FlashInfer would call: FLASHINFER_NVCC, or by CUDA_HOME, CUDA_PATH, PATH, /usr/local."""
    named = os.environ.get("FLASHINFER_NVCC")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if named:
        found = Path(named)
    elif home:
        found = Path(home) / "bin" / "nvcc"
    elif on_path:
        found = Path(on_path)
    else:
        found = Path("/usr/local/cuda/bin/nvcc")
    return found if found.is_file() else None


def check_nvcc() -> Check:
    """FlashInfer compiles its kernels on first use; `flashinfer-jit-cache` brings them compiled."""
    nvcc = find_nvcc()
    if nvcc is None:
        if installed_version("flashinfer-jit-cache"):
            return Check("nvcc", True, "not found, nor needed: flashinfer-jit-cache is installed")
        advice = "install the CUDA toolkit of torch's CUDA version, and put its bin folder on PATH or set CUDA_HOME"
        return Check("nvcc", False, "not found (PATH, CUDA_HOME, /usr/local/cuda)", advice)
    release = re.search(r"release (\d+)\.(\d+)", _run(str(nvcc), "--version") or "")
    if release is None:
        return Check("nvcc", False, f"{nvcc} does not run", "install the CUDA toolkit again")
    torch = _torch()
    wanted = torch.version.cuda if torch is not None else None
    detail = f"{release[1]}.{release[2]} ({nvcc})"
    if wanted and wanted.split(".")[0] != release[1]:
        advice = f"torch is built for CUDA {wanted}: install that toolkit, or point CUDA_HOME at it"
        return Check("nvcc", False, detail, advice)
    return Check("nvcc", True, detail)


def check_ninja() -> Check:
    """FlashInfer calls `ninja` by name, so it must be on PATH: being installed beside this Python is not enough."""
    found = shutil.which("ninja")
    if found:
        return Check("ninja", True, found)
    folder = Path(sys.executable).parent
    if any((folder / name).is_file() for name in ("ninja", "ninja.exe")):
        return Check("ninja", False, f"in {folder}, which is not on PATH", f'export PATH="{folder}:$PATH"')
    return Check("ninja", False, "not found", "pip install ninja")


def check_compiler() -> Check:
    name = os.environ.get("CXX") or "c++"
    found = shutil.which(name) or shutil.which("g++")
    if found:
        return Check("C++ compiler", True, found)
    return Check("C++ compiler", False, f"{name} not found", "install g++ (Debian, Ubuntu: apt install g++)")


EVERYTHING: tuple[Callable[[], Check], ...] = (
    check_python,
    check_torch,
    check_packages,
    check_bundled_model,
    check_memory,
    check_disk,
)
GPU: tuple[Callable[[], Check], ...] = (check_gpu, check_flashinfer, check_nvcc, check_ninja, check_compiler)


def run_checks(checks: tuple[Callable[[], Check], ...]) -> list[Check]:
    """Each check's finding, in order."""
    return [check() for check in checks]


def require_flashinfer() -> None:
    """Return if FlashInfer can compile and run its kernels here.

    Raises:
        KernelsUnavailableError: something is missing; the message names all of it, and what to do.
    """
    missing = [check for check in run_checks(GPU) if not check.ok]
    if missing:
        reasons = "; ".join(f"{check.name}: {check.detail} ({check.advice})" for check in missing)
        raise KernelsUnavailableError(f'kernels="flashinfer" cannot run here. {reasons}')
