"""The TopK sparse autoencoder: a hidden state as a sum of a few of many concept directions.

    python sae.py config/stdlib_sae.py        # train one on the hidden states of a concept model

"Scaling and evaluating sparse autoencoders", arXiv 2406.04093. With μ, σ a hidden state's mean and
unbiased standard deviation over its features:

    x = (h - μ) / (σ + 1e-5)
    c_pre = W_enc (x - b_pre) + b_lat             C concepts
    c = ReLU(TopK(c_pre))                         at most k of them nonzero, kept as a TopK
    ĥ = (W_dec c + b_pre) · σ + μ                 W_dec's directions have unit norm

Files have the layout of the published SAEs (openai/sparse_autoencoder): those load here, ours load
there. A run leaves sae.pt, sae.json (what it was trained on and how good it is), log.jsonl and
sae_ckpt.pt.
"""
import math
from dataclasses import dataclass

from support.runtime import Stop  # before torch

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import load_gpt
from support import published, runtime
from support.activations import check_layer, geometric_median
from support.cli import key, parse
from support.device import pick_device
from support.kernels import TopK, linear_topk, normalize, sparse_decode
from support.sae_run import SAERun

@dataclass(frozen=True)
class Config:
    concept_model: str = key("out/stdlib/gpt", "the GPT to encode: a run, GPT-2 weights, or gpt2")
    concept_layer: int = key(5, "encode the residual stream after this block (from 0)", low=0)
    dataset: str = key("stdlib", "a name under data/, or the path of a dataset")
    out_dir: str = key("out/sae", "folder for sae.pt, sae.json, log.jsonl and sae_ckpt.pt")
    n_concepts: int = key(32768, "C, latents of the SAE", low=1)
    k: int = key(32, "latents kept by TopK", low=1)
    k_aux: int = key(256, "dead latents in the auxiliary loss; 0 turns it off", low=0)
    aux_weight: float = key(1 / 32, "weight of the auxiliary loss", low=0)
    dead_tokens: int | None = key(None, "dead: silent for so many (none: 10M, at most 5%)", low=1)
    max_tokens: int = key(100_000_000, "tokens to train on", low=1)
    batch_size: int = key(131072, "tokens per optimizer step", low=2)
    buffer: int = key(8, "batches of hidden states shuffled together", low=1)
    block_size: int | None = key(None, "context length (none: the concept model's)", low=1)
    learning_rate: float = key(1e-4, "of Adam, constant", low=0)
    log_interval: int = key(10, "steps between two lines of the log", low=1)
    save_interval: int = key(500, "steps between two checkpoints", low=1)
    eval_tokens: int = key(65536, "val tokens for the final report", low=1)
    device: str = key("auto", "cpu, cuda, cuda:1 or mps; auto: the fastest available")
    seed: int = key(1337, "for initialisation and data order", low=0, high=2**32 - 1)
    resume: bool = key(False, "resume from out_dir's checkpoint, if there is one")
    overwrite: bool = key(False, "replace the SAE in out_dir")

class SAE(nn.Module):
    """n_concepts = C latents over hidden states of width d, k of them active."""
    def __init__(self, d, n_concepts, k):
        super().__init__()
        self.k = k
        self.pre_bias = nn.Parameter(torch.zeros(d))                            # b_pre
        self.latent_bias = nn.Parameter(torch.zeros(n_concepts))                # b_lat
        self.encoder = nn.Parameter(torch.randn(n_concepts, d) / math.sqrt(d))  # W_enc
        self.decoder = nn.Parameter(F.normalize(self.encoder.detach(), dim=1))  # W_dec.T
        self.register_buffer("since_active", torch.zeros(n_concepts, dtype=torch.long))  # tokens
        self.register_buffer("frequency", torch.zeros(n_concepts))    # share of tokens it fires on
        self.register_buffer("mean_square", torch.zeros(n_concepts))  # of its activation

    def encode(self, x):
        """Normalised hidden states (…, d) → active concepts, TopK (…, k), values ≥ 0."""
        top, _ = linear_topk(x - self.pre_bias, self.encoder, self.latent_bias, self.k)
        return TopK(top.values.relu(), top.indices)

    def preactivations(self, x):
        """c_pre: (…, d) → (…, C)."""
        return F.linear(x - self.pre_bias, self.encoder, self.latent_bias)

    def decode(self, top):
        """Concepts, TopK (…, k) → normalised hidden states (…, d)."""
        return sparse_decode(top, self.decoder) + self.pre_bias

    def forward(self, h):
        """Hidden states (…, d) → (reconstruction (…, d), active concepts)."""
        x, mean, std = normalize(h)
        top = self.encode(x)
        return self.decode(top) * std + mean, top

def load_sae(name, layer, d, device="cpu", gpt=None):
    """A frozen SAE for hidden states of width d: "openai" or "openai_128k" (published for GPT-2
    124M), a .pt file in the published layout, or the folder of a run of this script. UserError:
    missing, damaged, of another width or layer, or trained on another model than gpt."""
    state, k = published.load_sae(name, layer, d, gpt)
    sae = SAE(d, len(state["encoder"]), k)
    sae.load_state_dict(state)
    return sae.to(device).eval().requires_grad_(False)

@torch.no_grad()
def initialize(sae, x, generator):
    """b_pre: the geometric median of a sample x (N, d). Decoder: the encoder's directions at unit
    norm. Encoder: rescaled so that random unit vectors are reconstructed with norm 1."""
    d = x.shape[1]
    sae.pre_bias.copy_(geometric_median(x))
    sae.encoder.copy_(torch.randn(sae.encoder.shape, generator=generator) / math.sqrt(d))
    sae.decoder.copy_(F.normalize(sae.encoder, dim=1))
    unit = F.normalize(torch.randn(256, d, generator=generator), dim=1).to(x.device)
    back = sae.decode(sae.encode(unit + sae.pre_bias)) - sae.pre_bias
    sae.encoder.div_(back.norm(dim=1).mean())

def variance_share(error, x):
    """Mean squared error over the variance of x, both (N, d): FVU."""
    return error.pow(2).mean() / (x - x.mean(0)).pow(2).mean()

def losses(sae, x, dead, k_aux):
    """(FVU of x, AuxK, the concepts of x). x (N, d) normalised; dead (C,) bool.

    AuxK: the residual reconstructed from the k_aux largest dead latents, squared error over the
    residual's variance; 0 where nothing is dead.
    """
    top = sae.encode(x)
    residual = x - sae.decode(top)
    fvu, aux = variance_share(residual, x), x.new_zeros(())
    where = dead.nonzero()[:, 0]
    if k_aux and len(where):
        inputs = x - sae.pre_bias, sae.encoder[where], sae.latent_bias[where]
        k = min(k_aux, len(where))
        if len(where) <= 16 * k:  # a large share is kept: dense products are faster
            values, indices = F.linear(*inputs).topk(k, sorted=False)
            latents = x.new_zeros(len(x), len(where)).scatter(-1, indices, values.relu())
            rebuilt = latents @ sae.decoder[where]
        else:
            kept, _ = linear_topk(*inputs, k)
            rebuilt = sparse_decode(TopK(kept.values.relu(), where[kept.indices]), sae.decoder)
        rebuilt = rebuilt + sae.pre_bias  # as in openai's code: a constant only in the target
        target = residual.detach() + sae.pre_bias.detach()
        aux = variance_share(target - rebuilt, target).nan_to_num(0.0, posinf=0.0)
    return fvu, aux, top

def train_step(sae, optimizer, x, cfg, dead_tokens, step):
    """Optimizer step `step` (from 0) on normalised hidden states x (N, d) → as `losses`.
    Decoder directions stay at unit norm; the statistics of the latents are updated."""
    fvu, aux, top = losses(sae, x, sae.since_active >= dead_tokens, cfg.k_aux)
    optimizer.zero_grad(set_to_none=True)
    (fvu + cfg.aux_weight * aux).backward()
    with torch.no_grad():  # remove the part of the gradient that only changes a direction's length
        g, w = sae.decoder.grad, sae.decoder
        g.sub_((g * w).sum(1, keepdim=True) * w)
    optimizer.step()
    with torch.no_grad():
        sae.decoder.div_(sae.decoder.norm(dim=1, keepdim=True))
        value, index = top.values.flatten(), top.indices.flatten()
        zeros = torch.zeros_like(sae.frequency)
        fired = zeros.index_add(0, index, (value > 1e-3).to(value.dtype))
        sae.since_active.add_(len(x)).masked_fill_(fired > 0, 0)
        rate = max(0.01, 1 / (step + 1))  # running means over about the last hundred steps
        sae.frequency.lerp_(fired / len(x), rate)
        sae.mean_square.lerp_(zeros.index_add(0, index, value ** 2) / len(x), rate)
    return fvu.detach(), aux.detach(), top

def main(argv):
    cfg, _ = parse(Config, argv, __doc__, most=0)
    device = pick_device(cfg.device)
    gpt, tokenizer = load_gpt(cfg.concept_model, device)
    check_layer(gpt, cfg.concept_layer)
    run = SAERun(cfg, gpt, tokenizer, device)
    sae = SAE(gpt.config.n_embd, cfg.n_concepts, cfg.k).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=cfg.learning_rate, eps=6.25e-10,
                                 fused=device.type in ("cpu", "cuda"))
    run.attach(sae, optimizer)
    if run.finished:
        return
    if run.step == 0:
        initialize(sae, run.states[0][:32768], torch.Generator().manual_seed(cfg.seed))
    with Stop() as stop, run.start():
        while run.step < run.steps:
            x = run.states[run.step]
            fvu, aux, top = train_step(sae, optimizer, x, cfg, run.dead_tokens, run.step)
            stopping = stop.signal  # read once: a later signal is for the next step
            run.advance(fvu, aux, top, stopping)
            if stopping:
                return stop.leave(stopping, run.checkpoint, run.step)
    run.end()

if __name__ == "__main__":
    runtime.run(main)
