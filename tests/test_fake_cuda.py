"""The CUDA path on a fake GPU (fake_cuda.py): shapes, dtypes, devices, kernels, memory."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER, TORCH = Path(__file__).parent, Path(torch.__file__).parent
CONFIGS = sorted(p.stem for p in (FOLDER.parent / "config").glob("*.py") if "sae" not in p.stem)

@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("g++") or not (TORCH / "include/c10").is_dir() or torch.version.cuda:
        pytest.skip("needs g++, PyTorch's headers and a PyTorch without CUDA")
    path = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    built = subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include", FOLDER / "fake_cuda.cpp",
         "-o", path, f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH}/lib"],
        capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"fake_cuda.cpp does not compile here: {built.stderr.splitlines()[0]}")
    return path

@pytest.mark.slow
@pytest.mark.parametrize("what", ["steps", "compiled", "inference", "memory"])
def test_all_methods_run_on_a_fake_gpu(what, library):
    names = CONFIGS if what == "memory" else []
    done = subprocess.run([sys.executable, FOLDER / "fake_cuda.py", what, *names],
                          env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
