"""Small datasets, models and runs that the tests share. Everything is made here; nothing is downloaded."""
import contextlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import data
import train
from model import GPT, ModelConfig

torch.set_num_threads(1)  # faster for models this small
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left to make test-all")
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:(?!config|data|model|sae|concepts|train|sample|eval)")


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.filterwarnings("default"))  # a GPU's libraries warn of what is not ours
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


def make_dataset(folder, train_tokens=20_000, val_tokens=4_000, seed=0):
    """A dataset with something to learn: letters, each following from the one before, nine times of ten. Tokens are bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bytes.tiktoken"
    data.save_bpe({bytes([b]): b for b in range(256)}, path)
    rng = np.random.default_rng(seed)
    successor = np.random.default_rng(1).permutation(26)
    for split, n in (("train", train_tokens), ("val", val_tokens)):
        follows, draws, ids = rng.random(n) < 0.9, rng.integers(8, size=n), np.zeros(n, dtype=np.int64)
        for i in range(1, n):
            ids[i] = successor[ids[i - 1]] if follows[i] else draws[i]
        (97 + ids).astype("<u2").tofile(folder / f"{split}.bin")
    data.write_meta(folder, str(path), data.load_tokenizer(str(path)), dict(train=train_tokens, val=val_tokens))
    return str(folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


TINY = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4", "--max_iters=8", "--eval_interval=4", "--eval_iters=2",
        "--log_interval=1", "--device=cpu", "--learning_rate=1e-3", "--insert_layer=1", "--concept_k=4", "--concept_layer=1"]


def run(main, *argv):
    """A command in this process: its exit status and what it wrote to stdout and stderr."""
    out, err, argv_before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["command", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config.run(main)
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
    import sae
    root = tmp_path_factory.mktemp("chain")
    commands = [(train.main, "gpt", ["--method=ntp", "--max_iters=100", "--eval_interval=50", "--learning_rate=1e-2"]),
                (sae.main, "sae", ["--n_concepts=48", "--k=6", "--concept_layer=1", "--batch_size=256", "--max_tokens=8192", "--k_aux=8", "--learning_rate=3e-3",
                                   "--device=cpu", "--eval_tokens=1000", f"--concept_model={root / 'gpt'}"]),
                (train.main, "ntp", ["--method=ntp", "--seed=1"]),
                (train.main, "cocomix", ["--method=cocomix", f"--concept_model={root / 'gpt'}", f"--sae={root / 'sae'}", "--seed=1"])]
    for main, name, argv in commands:
        tiny = TINY if main is train.main else []
        status, out, err = run(main, *tiny, f"--dataset={dataset}", f"--out_dir={root / name}", *argv)
        assert status == 0, err
    return {name: str(root / name) for _, name, _ in commands} | {"root": str(root)}


def tiny_gpt(dtype=torch.float64, **settings):
    defaults = dict(block_size=16, vocab_size=61, n_layer=3, n_head=2, n_embd=24, insert_layer=1, n_concepts=40, concept_k=5, hidden_size=20)
    model = GPT(ModelConfig(**{**defaults, **settings})).to(dtype)
    for p in model.parameters():  # nothing at its neutral initial value: every term counts
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 and p.shape[0] == 24 and p.requires_grad and bool((p == 1).all()) else 0.0, std=0.15)
    return model


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """`with CountProducts() as counter`: counter.flops of the matrix products that run, attention's not among them."""
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
