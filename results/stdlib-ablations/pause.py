"""What the inserted positions look at: attention of the last seed's runs on val, after `make ablations` (writes pause.md).

    python results/stdlib-ablations/pause.py

For each block above the insertion, the attention from the inserted position of token t to h_t, to itself, and to all else,
mean over heads, positions 32 to 255 and 16 blocks of val. An even look at all would give each 1 / (2t + 2): the first row.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import torch

import data
from model import load_checkpoint, load_model

RUNS = {"Pause": "pause", "Pause, residual": "pause_residual", "CoCoMix": "cocomix", "CoCoMix, residual": "cocomix_residual"}


@torch.no_grad()
def looks(model, x):
    """[(block, share of h_t, of itself)] for tokens x (B, T)."""
    c, found = model.config, []

    def hook(i):
        def f(attn, args):
            h = args[0]
            q, k, _ = attn.c_attn(h).split(c.n_embd, dim=-1)
            q, k = (t.view(*t.shape[:2], c.n_head, -1).transpose(1, 2) for t in (q, k))
            scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(torch.ones(h.shape[1], h.shape[1]).triu(1).bool(), -torch.inf)
            weight, at = scores.softmax(-1), torch.arange(65, h.shape[1], 2)  # the inserted positions from t = 32 on
            found.append((i, weight[:, :, at, at - 1].mean().item(), weight[:, :, at, at].mean().item()))
        return f
    hooks = [model.h[i].attn.register_forward_pre_hook(hook(i)) for i in range(c.insert_layer, c.n_layer)]
    model(x)
    for h in hooks:
        h.remove()
    return found


def main():
    lines = ["| run | block | at its own h | at itself | at all else |", "| --- | ---: | ---: | ---: | ---: |"]
    even = torch.tensor([1 / (2 * t + 2) for t in range(32, 256)]).mean().item()
    lines.append(f"| an even look | | {even:.1%} | {even:.1%} | {1 - 2 * even:.1%} |")
    for name, folder in RUNS.items():
        content = load_checkpoint(HERE.parents[1] / "out" / "ablations" / f"{folder}-1")
        model = load_model(content)
        val = data.Batches(data.tokens_of_run(content, "val"), model.config.block_size, 16, model.config.vocab_size, shift=False)
        for block, own, itself in looks(model, val[0][0]):
            lines.append(f"| {name} | {block} | {own:.1%} | {itself:.1%} | {1 - own - itself:.1%} |")
    (HERE / "pause.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
