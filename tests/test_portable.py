"""Other systems, as far as they can be tried here: Windows, Macs, older GPUs."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TINY_SAE, run
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import concepts
import eval as evaluation
import sae
import sample
import train
from support import device

ROOT = Path(train.__file__).resolve().parent

def chain_commands(dataset, folder):
    """[script, *arguments] of a tiny demo in a folder."""
    labels = [f"--concept_model={folder / 'gpt'}", f"--sae={folder / 'sae'}"]
    data = f"--dataset={dataset}"
    return [
        ["train.py", *TINY, data, "--method=ntp", f"--out_dir={folder / 'gpt'}"],
        ["sae.py", *TINY_SAE, data, labels[0], "--max_tokens=1024", "--eval_tokens=500",
         f"--out_dir={folder / 'sae'}"],
        ["train.py", *TINY, data, "--method=cocomix_kd", *labels,
         f"--out_dir={folder / 'cocomix'}"],
        ["eval.py", str(folder / "cocomix"), "--tokens=500", "--device=cpu"],
        ["concepts.py", str(folder / "cocomix"), "--tokens=2000", "--device=cpu"],
        ["sample.py", str(folder / "cocomix"), "--steer", "--max_new_tokens=5", "--device=cpu"]]

# -- Windows ---------------------------------------------------------------------------------------

WITHOUT_POSIX = """
import ctypes, json, mmap, os, runpy, shutil, signal, sys
for name in ("fcntl", "resource", "termios", "grp", "pwd"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
delattr(mmap, "MADV_RANDOM")
import torch
load, open_number = ctypes.CDLL, os.open
def load_library(name, *more, **keys):
    if name is None:
        raise TypeError("a library must be named")
    return load(name, *more, **keys)
def open_file(path, *more, **keys):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_number(path, *more, **keys)
ctypes.CDLL, os.open, shutil._use_fd_functions = load_library, open_file, False
for script, *argv in json.loads(sys.argv[1]):
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise
"""

def test_the_scripts_run_without_what_windows_lacks(dataset, tmp_path):
    commands = json.dumps(chain_commands(dataset, tmp_path))
    process = subprocess.run([sys.executable, "-c", WITHOUT_POSIX, commands], cwd=ROOT, text=True,
                             capture_output=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "cocomix" / "concepts.html").is_file()

# -- Macs ------------------------------------------------------------------------------------------

class WithoutFloat64(TorchFunctionMode):
    """The CPU as a stand-in for MPS, which has no float64. A tensor is on the host if it was
    created without a device or brought there by .cpu(), or if it was computed from such a tensor;
    `.to(device)` brings it to the device."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        moved = func is torch.Tensor.to and any(isinstance(a, torch.device) for a in args)
        host = func is torch.Tensor.cpu or not moved and any(
            getattr(t, "on_host", False) or t.dtype == torch.float64 for t in inputs)
        host = host or not inputs and kwargs.get("device") is None
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            out = torch.ops.aten.alias(out)  # on the CPU they return the same tensor
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not func.__name__.startswith("__"):
                t.on_host = host
                if t.dtype == torch.float64 and not host:
                    raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return out

def test_the_chain_needs_no_float64_on_the_device(dataset, tmp_path):
    mains = {"train.py": train.main, "sae.py": sae.main, "eval.py": evaluation.main,
             "concepts.py": concepts.main, "sample.py": sample.main}
    for script, *argv in chain_commands(dataset, tmp_path):
        with WithoutFloat64():
            status, _, err = run(mains[script], *argv)
        assert status == 0, (script, err)

def test_the_stand_in_refuses_float64_on_the_device():
    cpu = torch.device("cpu")
    with WithoutFloat64():
        x = torch.ones(3).to(cpu)
        assert (x + 1).cpu().double().sum().item() == 6
        with pytest.raises(TypeError, match="MPS"):
            (x + 1).double()
        with pytest.raises(TypeError, match="MPS"):
            torch.ones(3, dtype=torch.float64).to(cpu)
        with pytest.raises(TypeError, match="MPS"):
            torch.zeros(3, dtype=torch.float64, device=cpu)

# -- GPUs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("capability, bf16, compiled", [
    ((6, 1), False, False), ((7, 0), False, True), ((7, 5), False, True), ((8, 0), True, True),
    ((9, 0), True, True), ((12, 0), True, True)])
def test_auto_follows_the_gpu(monkeypatch, capability, bf16, compiled):
    """GTX 1080, V100, T4, A100, H100, RTX 5090."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    gpu = torch.device("cuda", 0)
    assert not device.should_compile(SimpleNamespace(compile="auto"), gpu)  # Triton is missing
    monkeypatch.setattr(device, "find_spec", lambda name: name == "triton")
    for cfg, chosen in ((SimpleNamespace(dtype="auto", compile="auto"), (bf16, compiled)),
                        (SimpleNamespace(dtype="bfloat16", compile=True), (True, True)),
                        (SimpleNamespace(dtype="float32", compile=False), (False, False))):
        assert device.uses_bf16(cfg.dtype, gpu) == chosen[0]
        assert device.should_compile(cfg, gpu) == chosen[1]

def test_auto_is_float32_and_uncompiled_elsewhere():
    for name in ("cpu", "mps"):
        assert not device.uses_bf16("auto", torch.device(name))
        assert not device.should_compile(SimpleNamespace(compile="auto"), torch.device(name))
