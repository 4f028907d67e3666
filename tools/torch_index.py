"""Print the pip options that fetch the build of PyTorch which suits this machine; nothing where pip's default does.

PyPI's torch for Linux is the CUDA build, several gigabytes that a laptop without an NVIDIA GPU cannot use. So on Linux
without a GPU this asks PyTorch's own index of CPU builds for an answer, waits at most three seconds, and names it to
pip if one came.

    python tools/torch_index.py auto      # decide as above
    python tools/torch_index.py none      # always pip's own index
    python tools/torch_index.py URL       # always this index
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS = 3.0


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi` is there and finds a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def answers(url: str, seconds: float) -> bool:
    """Whether `url` answers within `seconds`. A thread, since no socket time-out covers the look-up of the name."""
    ok = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url}/torch/", timeout=seconds) as reply:
                if reply.status == 200:
                    ok.set()
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return ok.is_set()


def pip_options(choice: str) -> tuple[list[str], str]:
    """The options for pip, and one line that says why."""
    if choice == "none":
        return [], "torch from pip's own index"
    if choice != "auto":
        return ["--extra-index-url", choice], f"torch from {choice}"
    if sys.platform != "linux":
        return [], "torch from pip's own index (the CPU build, outside Linux)"
    if has_nvidia_gpu():
        return [], "torch from pip's own index (an NVIDIA GPU is here: the CUDA build)"
    if answers(CPU_INDEX, SECONDS):
        return ["--extra-index-url", CPU_INDEX], f"torch from {CPU_INDEX} (no NVIDIA GPU here: the CPU build)"
    return [], f"torch from pip's own index ({CPU_INDEX} does not answer)"


def main() -> None:
    options, why = pip_options(sys.argv[1] if len(sys.argv) > 1 else "auto")
    print(" ".join(options), flush=True)
    print(f"minillm: {why}", file=sys.stderr, flush=True)
    os._exit(0)  # a name look-up that still hangs must not keep us


if __name__ == "__main__":
    main()
