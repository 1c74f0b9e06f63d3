"""Where a command computes: the device, bfloat16, torch.compile, and memory on the CPU."""
import ctypes
from contextlib import suppress
from importlib.util import find_spec

from support.runtime import LOCAL_RANK, UserError

import torch

from support.kernels import gathered_dot

def pick_device(name="auto"):
    """The torch.device of a name; "cuda" is this process's GPU. auto: CUDA, or MPS if it has the
    sparse products, or the CPU. UserError: not available."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() and _mps_works() else "cpu"
    try:
        device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
        torch.empty(1, device=device)
        if device.type == "mps" and not _mps_works():
            raise RuntimeError("this PyTorch lacks the sparse products on it")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32 for products in float32
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        if LOCAL_RANK:
            reason += f"; process {LOCAL_RANK} needs a GPU of its own: lower --nproc_per_node"
        raise UserError(f"device={name!r} is not available here ({reason})") from e
    if device.type == "cpu":
        keep_freed_memory()
    return device

def _mps_works():
    try:
        one = torch.ones(1, 1, device="mps")
        gathered_dot(torch.zeros(1, 1, dtype=torch.long, device="mps"), one, one)
        return True
    except (NotImplementedError, RuntimeError):
        return False

def keep_freed_memory():
    """Make glibc keep freed memory. By default it returns large blocks to the kernel, which zeroes
    them again page by page: a tenth of a training step or more at the 69M shapes. In exchange,
    resident memory stays at its peak."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)   # M_MMAP_MAX: take large blocks from the heap, too …
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: … and never shrink it

def uses_bf16(dtype, device):
    """Does the key dtype mean bfloat16 on this device? auto: on GPUs that compute in it (A100 and
    newer); older ones emulate it, which is slower than float32."""
    return dtype == "bfloat16" or dtype == "auto" and _cuda_capability(device) >= (8, 0)

def should_compile(cfg, device):
    """auto: on GPUs that Triton supports, if it is installed."""
    supported = _cuda_capability(device) >= (7, 0) and find_spec("triton") is not None
    return cfg.compile is True or cfg.compile == "auto" and supported

def _cuda_capability(device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)

def compile_model(model):
    """torch.compile for fixed shapes."""
    # it would split the graph at DDP's buckets, which fails inside our autograd functions
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 64  # bench.py compiles several models of a class
    return torch.compile(model, dynamic=False)
