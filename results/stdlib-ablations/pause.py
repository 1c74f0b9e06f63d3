"""What the inserted positions attend to, on val.

    python results/stdlib-ablations/pause.py       # after make ablations; writes pause.md

For each upper block, the attention from the inserted position of token t to h_t, to itself, and to
everything else: the mean over heads, positions 32 to 255, 16 blocks of val and seeds 1
and 2. Uniform attention gives each 1 / (2t + 2): the first row.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from model import load_model
from support.checkpoint import load_checkpoint
from support.tokens import Batches, tokens_of_run

HERE = Path(__file__).resolve().parent
RUNS = {"Pause": "pause", "Pause, residual": "pause_residual", "CoCoMix": "cocomix",
        "CoCoMix, residual": "cocomix_residual"}
SEEDS = (1, 2)

@torch.no_grad()
def attention_shares(model, x):
    """{block: (share of h_t, share of itself)} for tokens x (B, T)."""
    c, found = model.config, {}

    def record(i):
        def hook(attn, args):
            q, k, _ = attn.c_attn(args[0]).split(c.n_embd, dim=-1)
            q, k = (t.view(*t.shape[:2], c.n_head, -1).transpose(1, 2) for t in (q, k))
            positions = q.shape[2]
            future = torch.ones(positions, positions).triu(1).bool()
            scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
            weight, at = scores.softmax(-1), torch.arange(65, positions, 2)  # inserted, from t = 32
            found[i] = weight[:, :, at, at - 1].mean().item(), weight[:, :, at, at].mean().item()
        return hook

    hooks = [model.h[i].attn.register_forward_pre_hook(record(i))
             for i in range(c.insert_at, c.n_layer)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found

def shares_of_run(name):
    content = load_checkpoint(HERE.parents[1] / "out" / "ablations" / name)
    model = load_model(content)
    c, tokens = model.config, tokens_of_run(content, "val")
    idx, _ = Batches(tokens, c.block_size, 16, c.vocab_size, shift=False)[0]
    return attention_shares(model, idx)

def main():
    lines = ["| run | block | at its own h | at itself | at all else |",
             "| --- | ---: | ---: | ---: | ---: |"]
    even = torch.tensor([1 / (2 * t + 2) for t in range(32, 256)]).mean().item()
    lines.append(f"| uniform attention | | {even:.1%} | {even:.1%} | {1 - 2 * even:.1%} |")
    for name, folder in RUNS.items():
        runs = [shares_of_run(f"{folder}-{seed}") for seed in SEEDS]
        for block in runs[0]:
            own, itself = (statistics.fmean(run[block][i] for run in runs) for i in (0, 1))
            rest = 1 - own - itself
            lines.append(f"| {name} | {block} | {own:.1%} | {itself:.1%} | {rest:.1%} |")
    (HERE / "pause.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

if __name__ == "__main__":
    main()
