"""The val loss of token frequencies alone, next to those of models that read pause vectors.

    python results/stdlib-ablations/unigram.py data/stdlib data/books4096     # writes unigram.md

`make ablations` and `make books` prepare these datasets. Frequencies: each token's count in train,
plus one. Losses in nats per token; those of models are the last in their logs.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import UserError, run

import numpy as np

from support.curves import markdown, read_curves, spread
from support.log import read_log
from support.tokens import load_meta, load_tokens

HERE = Path(__file__).resolve().parent
ROWS = {"stdlib": [("Pause", HERE, "pause"), ("Pause + KD", HERE, "pause_kd")],
        "books4096": [("Pause", HERE.parent / "books-cpu", "pause")]}

def unigram_loss(dataset):
    size = load_meta(dataset)["vocab_size"]
    train, val = (np.bincount(load_tokens(dataset, split), minlength=size).astype(float)
                  for split in ("train", "val"))
    return -(val / val.sum() * np.log((train + 1) / (train + 1).sum())).sum()

def main(datasets):
    if [Path(dataset).name for dataset in datasets] != list(ROWS):
        raise UserError(f"name two datasets, {' and '.join(ROWS)}: data/stdlib data/books4096")
    rows = []
    for dataset in map(Path, datasets):
        rows.append([dataset.name, "token frequencies", "", f"{unigram_loss(dataset):.3f}"])
        for name, folder, log in ROWS[dataset.name]:
            curve = read_curves({p.stem: read_log(p) for p in folder.glob(f"{log}-*.jsonl")
                                 if p.stem.removeprefix(f"{log}-").isdigit()})[log]
            losses = curve.at(curve.tokens[-1]).values()
            rows.append([dataset.name, name, str(len(losses)), spread(losses)])
    text = markdown(["dataset", "model", "seeds", "val loss"], rows)
    (HERE / "unigram.md").write_text(text + "\n")
    print(text)

if __name__ == "__main__":
    run(main)
