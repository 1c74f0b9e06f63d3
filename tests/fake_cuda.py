"""Runs code on a fake GPU: tensors with shapes, dtypes and devices, but without data.

    LD_PRELOAD=fake_cuda.so python tests/fake_cuda.py steps | compiled | inference | memory

test_fake_cuda.py compiles fake_cuda.cpp and runs this program. Mixing devices or dtypes raises, and
so does attention that only PyTorch's slow math kernel could compute.
"""
import itertools
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.cli import parse  # noqa: E402, I001

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import bench  # noqa: E402
import sae  # noqa: E402
import train  # noqa: E402
from concepts import steerable  # noqa: E402
from model import ModelConfig  # noqa: E402
from support import engine  # noqa: E402
from support.accounting import micro_batch, step_bytes  # noqa: E402

CUDA = torch.device("cuda", 0)
TINY = ["--n_layer=4", "--n_head=4", "--n_embd=40", "--block_size=24", "--batch_size=4",
        "--micro_batch_size=2", "--insert_layer=1", "--concept_k=4", "--concept_layer=1",
        "--memory=false"]
flash = torch.ops.aten._scaled_dot_product_flash_attention
efficient = torch.ops.aten._scaled_dot_product_efficient_attention

def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """F.scaled_dot_product_attention as a GPU computes it: with flash attention, which pads heads
    itself, or the memory-efficient kernel for float32 and masks, which needs aligned ones."""
    width, low = q.shape[-1], q.dtype == torch.bfloat16
    if attn_mask is None and low:
        q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))
        return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0][..., :width]
    assert width % (8 if low else 4) == 0, f"heads {width} wide in {q.dtype} need the math kernel"
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

def pretend():
    """Let PyTorch take the fake GPU for one that can do bfloat16."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.memory_allocated = lambda *_: 0
    torch.cuda.mem_get_info = lambda *_: (79 << 30, 80 << 30)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.nn.Module.to = lambda module, *_: module  # it is there already; to() fails on fakes
    F.scaled_dot_product_attention = fused_attention
    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=True)

def small_concept_model():
    """Let bench.py, which takes GPT-2's shapes for the concept model, take smaller ones."""
    bench.ModelConfig = partial(ModelConfig, n_layer=3, n_head=2, n_embd=48, block_size=24)
    bench.SAE = lambda *_: sae.SAE(48, 2048, 8)

def configs():
    """{name: keys} of all methods with all mixes and targets."""
    mixes, found = ("interleave", "interleave_residual", "add", "none"), {}
    for method, mix in itertools.product(("cocomix", "cocomix_kd"), mixes):
        for target in ("concept", "l1", "l2", "cos"):
            found[f"{method}, {mix}, {target}"] = dict(method=method, mix=mix, target=target)
    for method, mix in itertools.product(("pause", "pause_kd"), mixes[:3]):
        found[f"{method}, {mix}"] = dict(method=method, mix=mix)
    more = dict(method="cocomix", select="activation"), dict(method="cocomix", attribution="paper")
    also = *more, dict(method="cocomix", checkpoint_blocks=True), dict(method="ntp", dropout=0.1)
    for keys in (dict(method="ntp"), dict(method="kd"), *also):
        found[", ".join(map(str, keys.values()))] = keys
    return found

def row_of(keys, **more):
    """A bench.Row: it builds the models as train.py does and has taken two training steps."""
    cfg, _ = parse(bench.Config, [*TINY, "--compile=false"], most=0)
    return bench.Row("row", replace(cfg, **keys, **more), CUDA)

def check_steps(compiled):
    for name, keys in configs().items():
        for dtype in ("bfloat16", "float32"):
            if compiled and dtype == "float32":
                continue  # differs little
            if compiled and "checkpoint_blocks" in keys:
                continue  # compiling random operations again needs a real GPU's generator
            torch._dynamo.reset()
            row = row_of(keys, dtype=dtype, compile=compiled)
            means = train.accumulate(row, row.concept_model, row.x, row.y, row.labels)
            assert all(t.device == CUDA and t.dtype == torch.float32 for t in means.values()), name
            for weight, p in row.model.named_parameters():
                assert p.device == CUDA and p.dtype == torch.float32, (name, weight)
                assert p.grad is not None or not p.requires_grad, (name, weight)
        print("ok", name, flush=True)

def check_inference():
    for name, keys in configs().items():
        row = row_of(keys)
        model = row.model.eval()
        n_concepts = model.config.n_concepts
        idx = torch.zeros(2, 20, dtype=torch.long, device=CUDA)
        scales = [torch.ones(3, 1, n_concepts, device=CUDA)] if n_concepts else []
        for scale in (None, *scales):  # past block_size, with a cache and without
            for use_cache in (True, False):
                out = engine.generate(model, idx, 8, 0.8, 5, scale, use_cache=use_cache)
                assert out.shape == ((2, 6)[scale is not None], 28) and out.device == CUDA, name
        torch.Tensor.item = lambda t: 1.0  # a fake tensor has no value
        run = SimpleNamespace(model=model, compiled=model, cfg=row.cfg, ranks=row.ranks,
                              autocast=row.autocast)
        asked = row.concept_model if train.predicts(row.cfg) else None
        labels = asked.labels(row.x, row.y) if asked else None
        batches = bench_batches([(row.x, row.y, labels)], asked is not None)
        with torch.no_grad():
            train.evaluate(run, batches)
            seen = torch.ones(2, 24, 24, dtype=torch.bool, device=CUDA).tril()
            lower = model.embed(idx, positions=idx)
            model.forward_blocks(lower, 0, model.config.insert_at, mask=seen[:, :20, :20])
        if asked and asked.sae is not None:
            scale = torch.ones(2048, device=CUDA)
            engine.generate(steerable(asked), idx, 2, 0, scale=scale)
        print("ok", name, flush=True)

class bench_batches(list):
    def __init__(self, batches, predicts):
        super().__init__(batches)
        self.predicts = predicts

def check_sae():
    with CUDA:
        model = sae.SAE(48, 2048, 8)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for dead, k_aux in ((100, 64), (1000, 4)):  # dense products, and sparse ones
        where = torch.zeros(dead, 1, dtype=torch.long, device=CUDA)
        torch.Tensor.nonzero = lambda t, where=where: where
        x = torch.randn(512, 48, device=CUDA)
        fvu, aux, _ = sae.train_step(model, optimizer, x, sae.Config(k_aux=k_aux), 10, 0)
        assert fvu.device == aux.device == CUDA
    print("ok SAE", flush=True)

class Memory(TorchDispatchMode):
    """Counts the bytes that live tensors hold on the GPU, now and at most."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.held = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cuda":
                storage = t.untyped_storage()
                if storage._cdata not in self.held:
                    self.held.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key, n):
        self.held.remove(key)
        self.now -= n

def check_memory(paths):
    """The peak of a step on as many rows as micro_batch_size=auto would choose on 80 GB."""
    for path in paths:
        cfg, _ = parse(bench.Config, [str(path), "--memory=false", "--compile=false"], most=0)
        cfg = replace(cfg, concept_model="gpt2", labels="fly", dataset="openwebtext")
        model, concept_model = bench.make_models(cfg, torch.device("meta"))
        rows = micro_batch(cfg, cfg.batch_size, model, concept_model, CUDA)
        estimate = step_bytes(model, concept_model, rows * cfg.block_size)
        weights = [*model.parameters()]
        if concept_model is not None:
            weights += [*concept_model.gpt.parameters()]
            weights += concept_model.sae.state_dict().values() if concept_model.sae else []
        weights = sum(p.nbytes for p in weights)
        with Memory() as memory:
            bench.Row(path.stem, replace(cfg, batch_size=rows), CUDA)
        peak = memory.peak - weights
        print(f"{path.stem}: {rows} rows, peak {peak / 2**30:.1f} GiB, estimate "
              f"{estimate / 2**30:.1f}", flush=True)
        yield path.stem, peak, estimate

def main(what, *names):
    pretend()
    with FakeTensorMode():
        if what == "memory":
            paths = [ROOT / f"config/{name}.py" for name in names]
            for name, peak, estimate in check_memory(paths):
                assert peak < estimate < 2 * peak + (2 << 30), name
            return
        small_concept_model()
        if what == "inference":
            check_sae()
            check_inference()
        else:
            check_steps(compiled=what == "compiled")

if __name__ == "__main__":
    main(*sys.argv[1:])
