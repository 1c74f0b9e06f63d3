"""Small datasets, models and runs that the tests share. Everything is made here; nothing is downloaded."""
import contextlib
import io
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

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


def make_dataset(folder, train_tokens=20_000, val_tokens=4_000, vocab_size=97, tokenizer="stdlib", seed=0):
    """A dataset of tokens with structure to learn: each follows from the last two, most of the time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, n in (("train", train_tokens), ("val", val_tokens)):
        noise, ids = rng.random(n), np.zeros(n, dtype=np.int64)
        draws = rng.integers(vocab_size, size=n)
        for i in range(2, n):
            ids[i] = (3 * ids[i - 1] + ids[i - 2] + 1) % vocab_size if noise[i] < 0.9 else draws[i]
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    tok = data.load_tokenizer("stdlib")
    data.write_meta(folder, tokenizer, type("T", (), dict(n_vocab=vocab_size, name=tok.name)), dict(train=train_tokens, val=val_tokens))
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
    commands = [(train.main, "gpt", ["--method=ntp"]),
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
    defaults = dict(block_size=16, vocab_size=61, n_layer=3, n_head=2, n_embd=24, insert_layer=1, n_concepts=40, concept_k=5)
    model = GPT(ModelConfig(**{**defaults, **settings})).to(dtype)
    for p in model.parameters():  # nothing at its neutral initial value: every term counts
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 and p.shape[0] == 24 and p.requires_grad and bool((p == 1).all()) else 0.0, std=0.15)
    return model
