"""sae.py next to EleutherAI's eai-sparsify: the same hidden states in the same order, on a CPU.

    SPARSIFY_DISABLE_TRITON=1 python results/speed-cpu/sae_training.py out/stdlib/gpt

Needs eai-sparsify; writes sae_training.md. Six trainers alternate at each batch, in one process:

    ours      as in sae.py, with AuxK; without AuxK; without AuxK at six times the learning rate
              (tried at the demo's width), at which more latents die
    theirs    by default (SparseCoder with its signed, schedule-free optimizer at its own learning
              rate, no AuxK); with Adam at our learning rate; with that and its AuxK (at our weight;
              theirs revives d/2 latents at once, ours k_aux, and trains only their decoder)

Their step is their Trainer's, in its order, including its record of the latents that fire, but at a
constant rate; Adam is torch's fused one in both. All keep freed memory
(support.device.keep_freed_memory). FVU is measured on held-out states after the same tokens; dead
is the share of latents that fire on none of them. The time is relative to ours with AuxK where
theirs has it, else to ours without.
"""
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

import sae
from model import load_gpt
from support.activations import HiddenStates
from support.device import keep_freed_memory
from support.kernels import normalize
from support.tokens import Batches, load_tokens

HERE = Path(__file__).resolve().parent
HELD_OUT = 16384

class Ours:
    def __init__(self, cfg, x, steps):
        torch.manual_seed(0)
        self.cfg, self.steps, self.n = cfg, steps, 0
        self.sae = sae.SAE(x.shape[1], cfg.n_concepts, cfg.k)
        sae.initialize(self.sae, x, torch.Generator().manual_seed(0))
        self.optimizer = sae.make_optimizer(self.sae, cfg.learning_rate)

    def step(self, x):
        dead_tokens = self.steps * len(x) // 20
        sae.train_step(self.sae, self.optimizer, x, self.cfg, dead_tokens, self.n)
        self.n += 1

    def reconstruct(self, x):
        """(reconstruction, ids of the latents that fire)."""
        top = self.sae.encode(x)
        return self.sae.decode(top), top.indices[top.values > 0]

class Theirs:
    def __init__(self, cfg, x, adam=True, aux_weight=0.0, dead_tokens=0):
        torch.manual_seed(0)
        self.aux_weight, self.dead_tokens = aux_weight, dead_tokens
        self.since_fired = torch.zeros(cfg.n_concepts, dtype=torch.long)
        self.sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=cfg.n_concepts, k=cfg.k))
        self.sae.b_dec.data = x.mean(0)
        parameters = self.sae.parameters()
        if adam:
            self.optimizer = torch.optim.Adam(parameters, lr=cfg.learning_rate, fused=True)
        else:
            lr = 5e-3 / (cfg.n_concepts / 2 ** 14) ** 0.5
            signed = SignSGD([dict(params=parameters, lr=lr)])
            self.optimizer = ScheduleFreeWrapper(signed, momentum=0.95)
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

    def reconstruct(self, x):
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x)
        return out.sae_out, out.latent_indices[out.latent_acts > 0]

def of_a_model(path, cfg):
    """Batches of the hidden states of a concept model: f(step) → (N, d)."""
    gpt, _ = load_gpt(path)
    T, tokens = gpt.config.block_size, load_tokens("stdlib", "train")
    batches = Batches(tokens, T, 8192 // T, gpt.config.vocab_size, 0)
    cfg = replace(cfg, concept_layer=1, buffer=8, seed=0)
    return HiddenStates(gpt, cfg, batches, torch.device("cpu")).__getitem__

def made_up(d, cfg):
    """Normalised sums of 32 of n_concepts random directions, with Zipf's frequencies."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(cfg.n_concepts, d, generator=generator), dim=1)
    often = 1 / torch.arange(10, cfg.n_concepts + 10)

    def states(step):
        g = torch.Generator().manual_seed(step)
        which = torch.multinomial(often.expand(cfg.batch_size, -1), 32, generator=g)
        weights = torch.rand(which.shape, generator=g).add(0.2)
        return normalize(F.embedding_bag(which, directions, per_sample_weights=weights,
                                         mode="sum"))[0]
    return states

def quality(trainer, held_out, n_concepts):
    """(FVU, share of dead latents) on held-out states."""
    error, fires = 0, torch.zeros(n_concepts, dtype=torch.bool)
    with torch.no_grad():
        for x in held_out.split(2048):
            reconstruction, fired = trainer.reconstruct(x)
            error, fires[fired] = error + (x - reconstruction).pow(2).sum(), True
    return error / (held_out - held_out.mean(0)).pow(2).sum(), 1 - fires.float().mean()

def measure(name, states, cfg):
    steps = cfg.max_tokens // cfg.batch_size
    tokens = steps * cfg.batch_size
    first = torch.cat([states(i) for i in range(-(-4096 // cfg.batch_size))])
    no_aux = replace(cfg, k_aux=0)
    aux = dict(aux_weight=cfg.aux_weight, dead_tokens=tokens // 20)
    trainers = {
        "ours": Ours(cfg, first, steps),
        "ours, no AuxK": Ours(no_aux, first, steps),
        "ours, no AuxK, rate × 6": Ours(replace(no_aux, learning_rate=6 * cfg.learning_rate), first,
                                        steps),
        "eai-sparsify, as it comes": Theirs(cfg, first, adam=False),
        "eai-sparsify, Adam": Theirs(cfg, first),
        "eai-sparsify, Adam, AuxK": Theirs(cfg, first, **aux)}
    seconds = {key: [] for key in trainers}
    for step in range(steps):
        x = states(step)
        for key, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(x)
            seconds[key].append(time.perf_counter() - start)
    after = range(steps + 1000, steps + 1000 - (-HELD_OUT // cfg.batch_size))
    held_out = torch.cat([states(i) for i in after])
    for key, trainer in trainers.items():
        fvu, dead = quality(trainer, held_out, cfg.n_concepts)
        baseline = key
        if key.startswith("eai"):
            baseline = "ours" if key.endswith("AuxK") else "ours, no AuxK"
        pairs = zip(seconds[key], seconds[baseline], strict=True)
        ratio, speed = statistics.median(a / b for a, b in pairs), statistics.median(seconds[key])
        yield (f"| {name} | {key} | {cfg.batch_size / speed:,.0f} | {ratio:.2f} | {fvu:.3f} "
               f"| {dead:.1%} | {tokens:,} |")

def main(path):
    keep_freed_memory()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [machine, "",
             "| width → latents, k | trainer | tokens/s | its time ÷ ours | FVU | dead | tokens |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    small = sae.Config(n_concepts=2048, k=16, k_aux=64, max_tokens=500_000, batch_size=1024,
                       learning_rate=2e-3)
    large = sae.Config(n_concepts=32768, k=32, k_aux=256, max_tokens=60_000, batch_size=2048,
                       learning_rate=1e-3)
    lines += measure("160 → 2 048, 16: the demo's", of_a_model(path, small), small)
    lines += measure("768 → 32 768, 32: made-up states", made_up(768, large), large)
    (HERE / "sae_training.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

if __name__ == "__main__":
    main(*sys.argv[1:])
