"""Small datasets, models and runs that the tests share, built here without any download."""
import contextlib
import gc
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.runtime import run as run_command

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sae
import train
from model import GPT, ModelConfig
from support.bpe import save_bpe
from support.log import Log
from support.prepare import write_meta
from support.tokens import load_tokenizer

torch.set_num_threads(1)  # faster for models this small
os.environ["OMP_NUM_THREADS"] = "1"
OURS = "support|model|sae|concepts|train|sample|eval|bench"

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only in make test-all")
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", f"ignore::DeprecationWarning:(?!{OURS})")

def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords:
            # a GPU's libraries warn about code that is not ours
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))

def pytest_collection_finish():
    gc.freeze()  # otherwise each tiny run searches all of torch for garbage

@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)

def make_dataset(folder, train_tokens=20_000, val_tokens=4_000, seed=0):
    """A dataset with something to learn: letters, each determined by the one before it nine times
    out of ten. Tokens are bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bytes.tiktoken"
    save_bpe({bytes([b]): b for b in range(256)}, path)
    rng = np.random.default_rng(seed)
    successor = np.random.default_rng(1).permutation(26)
    counts = dict(train=train_tokens, val=val_tokens)
    for split, n in counts.items():
        follows, draws = rng.random(n) < 0.9, rng.integers(8, size=n)
        ids = np.zeros(n, dtype=np.int64)
        for i in range(1, n):
            ids[i] = successor[ids[i - 1]] if follows[i] else draws[i]
        (97 + ids).astype("<u2").tofile(folder / f"{split}.bin")
    write_meta(folder, str(path), load_tokenizer(str(path)), counts)
    return str(folder)

@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))

TINY = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4",
        "--max_iters=8", "--eval_interval=4", "--eval_iters=2", "--log_interval=1", "--device=cpu",
        "--learning_rate=1e-3", "--insert_layer=1", "--concept_k=4", "--concept_layer=1"]
TINY_SAE = ["--n_concepts=48", "--k=6", "--concept_layer=1", "--batch_size=256", "--k_aux=8",
            "--device=cpu"]

def run(main, *argv):
    """A command in this process: (its exit status, what it wrote to stdout, to stderr)."""
    out, err, argv_before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["command", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(main)
    except SystemExit as e:
        if isinstance(e.code, str):
            err.write(e.code + "\n")
        status = 1 if isinstance(e.code, str) else e.code or 0
    finally:
        sys.argv = argv_before
    return status, out.getvalue(), err.getvalue()

@pytest.fixture(scope="session")
def chain(tmp_path_factory, dataset):
    """A concept model, its SAE, an NTP and a CoCoMix run, all tiny: {name: folder}."""
    root = tmp_path_factory.mktemp("chain")
    labels_from = [f"--concept_model={root / 'gpt'}", f"--sae={root / 'sae'}"]
    commands = dict(
        gpt=(train.main, *TINY, "--method=ntp", "--max_iters=100", "--eval_interval=50",
             "--learning_rate=1e-2"),
        sae=(sae.main, *TINY_SAE, labels_from[0], "--max_tokens=8192", "--learning_rate=3e-3",
             "--eval_tokens=1000"),
        ntp=(train.main, *TINY, "--method=ntp", "--seed=1"),
        cocomix=(train.main, *TINY, "--method=cocomix", *labels_from, "--seed=1"))
    for name, command in commands.items():
        status, _, err = run(*command, f"--dataset={dataset}", f"--out_dir={root / name}")
        assert status == 0, err
    return {name: str(root / name) for name in commands} | {"root": str(root)}

class StopAt:
    """`with StopAt(5)`: a run of train.py or sae.py is interrupted, as by a crash, once it has
    written the losses of step 5 to its log."""
    def __init__(self, step):
        self.step, self.write = step, Log.write

    def __enter__(self):
        def write(log, values):
            self.write(log, values)
            if values["step"] == self.step and ("loss" in values or "fvu" in values):
                raise KeyboardInterrupt
        Log.write = write

    def __exit__(self, *_):
        Log.write = self.write

def tiny_gpt(dtype=torch.float64, **settings):
    """A GPT in which nothing has its neutral initial value, so that every term counts."""
    defaults = dict(block_size=16, vocab_size=61, n_layer=3, n_head=2, n_embd=24, insert_layer=1,
                    n_concepts=40, concept_k=5, hidden_size=20)
    model = GPT(ModelConfig(**defaults | settings)).to(dtype)
    for p in model.parameters():
        gain = p.shape == (24,) and bool((p == 1).all())
        torch.nn.init.normal_(p, mean=1.0 if gain else 0.0, std=0.15)
    return model

class CountProducts(TorchDispatchMode):
    """`with CountProducts() as counter`: counter.flops of the matrix products that run; attention
    is not counted."""
    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        assert name not in ("bmm", "baddbmm", "matmul"), name
        return func(*args, **(kwargs or {}))
