"""sae.py beside EleutherAI's eai-sparsify: the same hidden states in the same order, the same width, no GPU.

    SPARSIFY_DISABLE_TRITON=1 python results/speed-cpu/sae_training.py out/stdlib/gpt      # writes sae_training.md; needs eai-sparsify

Six trainers take turns at each batch, in one process: ours as sae.py runs it, AuxK included, without AuxK, and without it at six
times the learning rate (tried at the demo's width), with which more latents die; theirs as it comes (SparseCoder with its signed,
schedule-free optimizer at its own learning rate, no AuxK), with Adam at our learning rate, and that with its AuxK switched on (our
weight; theirs revives d/2 latents at once, ours k_aux, and trains their decoder alone). Their step is their Trainer's, in its order,
what it keeps of the latents that fire included, but at a constant rate; Adam is torch's fused one in both. All keep the memory that
is freed (model.keep_freed_memory). FVU is that of held-out states after the same tokens, dead the share of latents that fire on none
of them; the time is set against the one of ours that has AuxK where theirs has it.
"""
import platform
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import torch

import config
import data
import sae
from model import keep_freed_memory, load_gpt
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

HELD_OUT = 16384


class Ours:
    def __init__(self, cfg, x, steps):
        torch.manual_seed(0)
        self.cfg, self.steps, self.n = cfg, steps, 0
        self.sae = sae.SAE(x.shape[1], cfg.n_concepts, cfg.k)
        sae.initialize(self.sae, x, torch.Generator().manual_seed(0))
        self.optimizer = sae.make_optimizer(self.sae, cfg.learning_rate)

    def step(self, x):
        sae.train_step(self.sae, self.optimizer, x, self.cfg, self.steps * len(x) // 20, self.n)
        self.n += 1

    def rebuilt(self, x):
        """(x rebuilt, the latents that fire)."""
        top = self.sae.encode(x)
        return self.sae.decode(top), top.indices[top.values > 0]


class Theirs:
    def __init__(self, cfg, x, adam=True, aux_weight=0.0, dead_tokens=0):
        torch.manual_seed(0)
        self.aux_weight, self.dead_tokens, self.since_fired = aux_weight, dead_tokens, torch.zeros(cfg.n_concepts, dtype=torch.long)
        self.sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=cfg.n_concepts, k=cfg.k))
        self.sae.b_dec.data = x.mean(0)
        if adam:
            self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=cfg.learning_rate, fused=True)
        else:
            self.optimizer = ScheduleFreeWrapper(SignSGD([dict(params=self.sae.parameters(), lr=5e-3 / (cfg.n_concepts / 2 ** 14) ** 0.5)]), momentum=0.95)
            self.optimizer.train()

    def step(self, x):
        self.sae.set_decoder_norm_to_unit_norm()
        dead = self.since_fired > self.dead_tokens if self.aux_weight else None
        out = self.sae(x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        fired = torch.zeros(len(self.since_fired), dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + self.aux_weight * out.auxk_loss).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += len(x)
        self.since_fired[fired] = 0

    def rebuilt(self, x):
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x)
        return out.sae_out, out.latent_indices[out.latent_acts > 0]


def of_a_model(path, cfg):
    """Batches of the hidden states of a concept model: f(step) → (N, d)."""
    gpt, _ = load_gpt(path)
    batches = data.Batches(data.load_tokens("stdlib", "train"), gpt.config.block_size, 8192 // gpt.config.block_size, gpt.config.vocab_size, 0)
    return sae.HiddenStates(gpt, 1, batches, cfg.batch_size, 8, 0, torch.device("cpu")).__getitem__


def made_up(d, cfg):
    """Sums of 32 of as many random directions as there are latents, their frequencies Zipf's, normalised."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(cfg.n_concepts, d, generator=generator), dim=1)
    often = 1 / torch.arange(10, cfg.n_concepts + 10)

    def states(step):
        g = torch.Generator().manual_seed(step)
        which = torch.multinomial(often.expand(cfg.batch_size, -1), 32, generator=g)
        return sae.normalize(torch.nn.functional.embedding_bag(which, directions, per_sample_weights=torch.rand(which.shape, generator=g).add(0.2), mode="sum"))[0]
    return states


def measure(name, states, cfg):
    steps = cfg.max_tokens // cfg.batch_size
    first = torch.cat([states(i) for i in range(-(-4096 // cfg.batch_size))])
    dead_tokens = steps * cfg.batch_size // 20
    trainers = {"ours": Ours(cfg, first, steps), "ours, no AuxK": Ours(config.replace(cfg, k_aux=0), first, steps),
                "ours, no AuxK, rate × 6": Ours(config.replace(cfg, k_aux=0, learning_rate=6 * cfg.learning_rate), first, steps), "eai-sparsify, as it comes": Theirs(cfg, first, adam=False),
                "eai-sparsify, Adam": Theirs(cfg, first), "eai-sparsify, Adam, AuxK": Theirs(cfg, first, aux_weight=cfg.aux_weight, dead_tokens=dead_tokens)}
    seconds = {trainer: [] for trainer in trainers}
    for step in range(steps):
        x = states(step)
        for trainer, it in trainers.items():
            start = time.perf_counter()
            it.step(x)
            seconds[trainer].append(time.perf_counter() - start)
    held_out = torch.cat([states(steps + 1000 + i) for i in range(-(-HELD_OUT // cfg.batch_size))])
    for trainer, it in trainers.items():
        error, fires = 0, torch.zeros(cfg.n_concepts, dtype=torch.bool)
        with torch.no_grad():
            for x in held_out.split(2048):
                rebuilt, fired = it.rebuilt(x)
                error, fires[fired] = error + (x - rebuilt).pow(2).sum(), True
        fvu, dead = error / (held_out - held_out.mean(0)).pow(2).sum(), 1 - fires.float().mean()
        speed = cfg.batch_size / statistics.median(seconds[trainer])
        like = "ours" if trainer.endswith("Adam, AuxK") else "ours, no AuxK"  # of ours, the one that does the same
        ratio = statistics.median(a / b for a, b in zip(seconds[trainer], seconds[like if trainer.startswith("eai") else trainer]))
        yield f"| {name} | {trainer} | {speed:,.0f} | {ratio:.2f} | {fvu:.3f} | {dead:.1%} | {steps * cfg.batch_size:,} |"


def main(path):
    keep_freed_memory()
    lines = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", "",
             "| width → latents, k | trainer | tokens/s | its time ÷ ours | FVU | dead | tokens |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    small = sae.Config(n_concepts=2048, k=16, k_aux=64, max_tokens=500_000, batch_size=1024, learning_rate=2e-3)
    large = sae.Config(n_concepts=32768, k=32, k_aux=256, max_tokens=60_000, batch_size=2048, learning_rate=1e-3)
    lines += measure("160 → 2 048, 16: the demo's", of_a_model(path, small), small)
    lines += measure("768 → 32 768, 32: made-up states", made_up(768, large), large)
    (HERE / "sae_training.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
