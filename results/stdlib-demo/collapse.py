"""What dominates the hidden state that a degenerate SAE reconstructs almost perfectly.

    python train.py config/stdlib_gpt.py --init_std=0.02 --beta2=0.95 --warmup_iters=40 \
        --out_dir=out/collapse/gpt          # the old settings, default seed, two threads
    python sae.py config/stdlib_sae.py --concept_model=out/collapse/gpt --out_dir=out/collapse/sae
    python results/stdlib-demo/collapse.py out/collapse out/spread/1-2      # writes collapse.md
    python train.py config/stdlib_cocomix.py --concept_model=out/collapse/gpt \
        --sae=out/collapse/sae --seed=1 --out_dir=out/collapse/cocomix      # new settings
    python eval.py out/collapse/cocomix out/spread/1-2/cocomix out/spread/1-2/ntp   # collapse.txt

Each argument is a folder with a concept model, gpt, and its SAE, sae. Measured on 32 blocks of val,
on the normalised hidden states that the SAE reads.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from model import load_gpt
from sae import load_sae
from support.activations import hidden_states
from support.kernels import normalize
from support.tokens import Batches, load_tokens

LAYER = 1

def explained(x, groups):
    """Share of the variance of x (N, d), centred, that lies between groups (N,)."""
    counts = torch.bincount(groups).clamp_min(1)
    means = torch.zeros(len(counts), x.shape[1]).index_add_(0, groups, x) / counts[:, None]
    return (means[groups].pow(2).sum() / x.pow(2).sum()).item()

def share_of_largest(counts, n=16):
    return (counts.topk(n).values.sum() / counts.sum()).item()

@torch.no_grad()
def measure(folder, blocks=32):
    """{what: value as text} of one concept model and its SAE."""
    gpt, _ = load_gpt(str(folder / "gpt"), "cpu")
    sae = load_sae(folder / "sae", LAYER, gpt.config.n_embd)
    batches = Batches(load_tokens("stdlib", "val"), gpt.config.block_size, blocks,
                      gpt.config.vocab_size, shift=False)
    idx, _ = batches[0]
    h = hidden_states(gpt, idx, LAYER)
    normal, mean, std = normalize(h)
    reconstructed, top = sae(h)
    error = (normal - (reconstructed - mean) / std).flatten(0, 1)
    x = normal.flatten(0, 1)
    x = x - x.mean(0)
    variance, directions = torch.linalg.eigh(x.T @ x)
    variance, rest = variance.flip(0) / variance.sum(), directions.flip(1)[:, 16:]
    active = torch.bincount(top.indices[top.values > 0], minlength=len(sae.encoder))
    labels = torch.bincount(top.indices[..., :4].flatten(), minlength=len(sae.encoder))
    fvu = error.pow(2).sum() / x.pow(2).sum()
    fvu_rest = (error @ rest).pow(2).sum() / (x @ rest).pow(2).sum()
    features = x.pow(2).mean(0)
    return {
        "norm of the hidden state": f"{h.norm(dim=-1).mean():.0f}",
        "largest feature's share of the variance": f"{features.max() / features.sum():.1%}",
        "first 4 principal directions' share": f"{variance[:4].sum():.1%}",
        "first 16 principal directions' share": f"{variance[:16].sum():.2%}",
        "effective number of directions": f"{1 / variance.pow(2).sum():.1f}",
        "variance explained by the current token": f"{explained(x, idx.flatten()):.1%}",
        "FVU": f"{fvu:.3f}",
        "FVU outside the first 16 directions": f"{fvu_rest:.3f}",
        "latents that are ever active": f"{(active > 0).sum()}",
        "16 most frequent latents' share of the activations": f"{share_of_largest(active):.1%}",
        "concepts that are labels by activation (4 per position)": f"{(labels > 0).sum()}",
        "16 most frequent concepts' share of these labels": f"{share_of_largest(labels):.1%}",
    }

def main():
    folders = [Path(arg) for arg in sys.argv[1:]]
    found = {str(folder): measure(folder) for folder in folders}
    lines = ["| | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    for what in next(iter(found.values())):
        lines.append(f"| {what} | " + " | ".join(values[what] for values in found.values()) + " |")
    Path(__file__).with_name("collapse.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

if __name__ == "__main__":
    main()
