"""bench.py's official row on what the official code stands on: transformers' GPT-2 blocks, with GPT-2's dropout in the trained model.

    python results/speed-cpu/official.py            # needs transformers; writes official.md

The recipe is bench.py's (`official_losses`); its blocks, the concept model's and the student's, are exchanged for GPT2Block
with the same weights, and held to the same output. The official code's configs say no dropout, but it never reaches the model:
it trains with GPT-2's 0.1, and so does this. Everything else, ours and the turns, is as in bench.py.
"""
import io
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import bench
import config
import torch

ARGV = ["config/ntp_69m.py", "config/cocomix_69m.py", "--disk", "--official", "--batch_size=2", "--block_size=256", "--rounds=7"]
DROPOUT = 0.1


class TheirBlock(torch.nn.Module):
    """A Block of ours as transformers' GPT2Block, called as ours is."""
    def __init__(self, block, c, dropout):
        super().__init__()
        from transformers import GPT2Config  # here, since what it takes to import counts to no other row
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block
        settings = GPT2Config(n_embd=c.n_embd, n_head=c.n_head, n_layer=c.n_layer, n_positions=2 * c.block_size, resid_pdrop=dropout, attn_pdrop=dropout, attn_implementation="sdpa")
        self.block = GPT2Block(settings)
        self.block.load_state_dict({name: t.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else t for name, t in block.state_dict().items()}, strict=False)

    def forward(self, x, queries=None, cache=None, mask=None):
        out = self.block(x)
        out = out[0] if isinstance(out, tuple) else out
        return out if queries is None else out[:, queries]


def on_transformers(model, dropout):
    """The model with its blocks exchanged, after a look at what they give; they train with this dropout."""
    x = torch.randn(1, 16, model.config.n_embd)
    with torch.no_grad():
        before = [block(x) for block in model.h]
        for i, block in enumerate(model.h):
            model.h[i] = TheirBlock(block, model.config, dropout).eval()
            torch.testing.assert_close(model.h[i](x), before[i], atol=1e-4, rtol=1e-4)
    model.drop.p = dropout
    return model.train(model.training)


class Row(bench.Row):
    def __init__(self, name, cfg, device, kind="", process=None):
        bench.make_models = make_theirs if kind == "official" else make_ours
        super().__init__(name, cfg, device, kind, process)


make_ours = bench.make_models


def make_theirs(cfg, device):
    model, concept_model = make_ours(cfg, device)
    on_transformers(concept_model.gpt, 0.0), on_transformers(model, DROPOUT)
    return model, concept_model


def main(argv):
    bench.Row, bench.__file__ = Row, __file__  # the processes that it starts are this script
    if argv:
        return bench.main(argv)
    with redirect_stdout(io.StringIO()) as printed:
        bench.main(ARGV)
    text = f"The official row: on transformers {version('transformers')}, dropout {DROPOUT}\n\n{printed.getvalue()}"
    (HERE / "official.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    config.run(main)
