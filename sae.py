"""The TopK sparse autoencoder: a hidden state as a sum of a few of many concept directions.

    python sae.py config/stdlib_sae.py        # train one on the hidden states of a concept model

"Scaling and evaluating sparse autoencoders", arXiv 2406.04093. With μ, σ a hidden state's mean and unbiased
standard deviation over its features:

    x = (h − μ) / (σ + 1e-5)
    c = ReLU(TopK(W_enc (x − b_pre) + b_lat))          concepts, (…, C), k of them not zero: kept as a TopK
    ĥ = (W_dec c + b_pre) · σ + μ                      W_dec's directions at unit norm

Files are in the layout of the published SAEs (openai/sparse_autoencoder): those load here, ours load there.
Beside sae.pt a run leaves sae.json (what it was trained on, and how well it does), log.jsonl and sae_ckpt.pt.
"""
import base64
import hashlib
import http.client
import json
import math
import os
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from config import UserError, key
from model import (TopK, linear_cross_entropy, linear_topk, load_checkpoint, load_gpt, load_optimizer, normalize, pick_device, read_tensors, save_checkpoint, sparse_decode)

PUBLISHED = "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/resid_post_mlp_v5_{size}/autoencoders/{layer}.pt"
SIZES = {"openai": ("32k", 32768), "openai_128k": ("128k", 131072)}  # as its address says it, n_concepts; for GPT-2 124M, 12 layers of width 768


class SAE(nn.Module):
    """n_concepts = C latents over hidden states of width d, k of them active. See the top of the file."""
    def __init__(self, d, n_concepts, k):
        super().__init__()
        self.k = k
        self.pre_bias = nn.Parameter(torch.zeros(d))              # b_pre
        self.latent_bias = nn.Parameter(torch.zeros(n_concepts))  # b_lat
        self.encoder = nn.Parameter(torch.randn(n_concepts, d) / math.sqrt(d))  # W_enc
        self.decoder = nn.Parameter(F.normalize(self.encoder.detach(), dim=1))  # W_dec transposed: a row a direction
        self.register_buffer("since_active", torch.zeros(n_concepts, dtype=torch.long))  # tokens since it last fired
        self.register_buffer("frequency", torch.zeros(n_concepts))    # share of tokens on which it fires
        self.register_buffer("mean_square", torch.zeros(n_concepts))  # of its activation

    def encode(self, x):
        """Normalised hidden states (…, d) → the active concepts, TopK (…, k); values ≥ 0."""
        top, _ = linear_topk(x - self.pre_bias, self.encoder, self.latent_bias, self.k)
        return TopK(top.values.relu(), top.indices)

    def preactivations(self, x):
        """c_pre of all C concepts, before TopK: (…, d) → (…, C)."""
        return F.linear(x - self.pre_bias, self.encoder, self.latent_bias)

    def decode(self, top):
        """Concepts → normalised hidden states, TopK (…, k) → (…, d)."""
        return sparse_decode(top, self.decoder) + self.pre_bias

    def forward(self, h):
        """Hidden states (…, d) → their reconstruction (…, d) and the active concepts."""
        x, mean, std = normalize(h)
        top = self.encode(x)
        return self.decode(top) * std + mean, top

    def flops_per_token(self):
        """Operations to encode a token: the encoder's product; the rest is smaller by C / k."""
        return 2 * self.encoder.numel()

    # -- files ----------------------------------------------------------------------------------------

    def published(self):
        """The state dict of the published layout."""
        return {"pre_bias": self.pre_bias.detach(), "encoder.weight": self.encoder.detach(), "latent_bias": self.latent_bias.detach(),
                "decoder.weight": self.decoder.detach().T.contiguous(), "stats_last_nonzero": self.since_active,
                "latents_activation_frequency": self.frequency, "latents_mean_square": self.mean_square,
                "activation": "TopK", "activation_state_dict": {"k": self.k, "postact_fn": "ReLU"}}

    @staticmethod
    def from_published(state, path="the file"):
        """An SAE from a state dict of the published layout. UserError: not one, or of a kind not supported here."""
        if not isinstance(state, dict):
            raise UserError(f"{path} is not an SAE in the published layout (a {type(state).__name__})")
        try:
            activation, settings = state["activation"], dict(state.get("activation_state_dict", {}))
            (n_concepts, d), k = state["encoder.weight"].shape, int(settings.get("k", 0))
            if activation != "TopK" or settings.get("postact_fn", "ReLU") != "ReLU":
                raise UserError(f"{path} holds a {activation} autoencoder with {settings.get('postact_fn')}; only TopK with ReLU is supported")
            sae = SAE(d, n_concepts, k)
            sae.load_state_dict({"pre_bias": state["pre_bias"], "latent_bias": state["latent_bias"], "encoder": state["encoder.weight"],
                                 "decoder": state["decoder.weight"].T, "since_active": state["stats_last_nonzero"],
                                 "frequency": state["latents_activation_frequency"], "mean_square": state["latents_mean_square"]})
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise UserError(f"{path} is not an SAE in the published layout ({type(e).__name__}: {str(e).splitlines()[0]})") from e
        if not 1 <= k <= n_concepts:
            raise UserError(f"{path}: k={k} of {n_concepts} concepts can't be")
        if not all(p.isfinite().all() for p in sae.parameters()):
            raise UserError(f"{path} holds weights that are not finite; fetch or train it again")
        return sae


def model_hash(gpt):
    """A short hash of a model's weights: an SAE belongs to the model it was trained on."""
    return data.fingerprint(*(p.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes() for p in gpt.parameters()))


def load_sae(name, layer, d, device="cpu", gpt=None):
    """A frozen SAE: "openai" (published for GPT-2 124M, 32 768 concepts, the given layer), "openai_128k", the path of
    a .pt in the published layout, or the folder of a run of this script.

    d: the width its hidden states must have. UserError: missing, damaged, of another width or another layer, or one
    of ours that was trained on another model than gpt.
    """
    if name in SIZES:
        path = fetch_sae(name, layer)
    else:
        path = Path(name) / "sae.pt" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise UserError(f"no SAE at {path}; train one: python sae.py config/stdlib_sae.py, or use --sae=openai for GPT-2")
        info = read_info(path)
        if info.get("concept_layer", layer) != layer:
            raise UserError(f"{path} was trained on layer {info['concept_layer']}, not on concept_layer={layer}; set --concept_layer={info['concept_layer']}")
        if info and gpt is not None and info.get("concept_model_hash") not in (None, model_hash(gpt)):
            raise UserError(f"{path} was trained on another concept model (as {info['concept_model']} was then); train it again: python sae.py --concept_model=…")
    state = read_tensors(path, "an SAE")
    sae = SAE.from_published(state, path)
    if sae.encoder.shape[1] != d:
        raise UserError(f"{path} is for hidden states of width {sae.encoder.shape[1]}, but the concept model's have {d}; train one: python sae.py --concept_model=…")
    return sae.to(device).eval().requires_grad_(False)


def read_info(path):
    """The sae.json beside an SAE of ours as a dict; {} where there is none (a published file)."""
    path = Path(path).with_suffix(".json")
    try:
        return dict(**json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged; train the SAE again") from e


def fetch_sae(name, layer):
    """The path of a published SAE in the cache folder ($COCOMIX_CACHE, else ~/.cache/cocomix), fetched unless it is there.

    It lands whole and of the right shape, or not at all. UserError: no such layer; no network, with the place to put
    the file by hand; something else came.
    """
    if not 0 <= layer < 12:
        raise UserError(f"sae={name!r} is published for the 12 layers of GPT-2 124M: concept_layer={layer} is not from 0 to 11")
    size, n_concepts = SIZES[name]
    url, path = PUBLISHED.format(size=size, layer=layer), Path(os.environ.get("COCOMIX_CACHE", Path.home() / ".cache" / "cocomix")) / f"sae-{name}-layer{layer}.pt"
    if path.is_file():
        return path
    remedy = f"run python concepts.py --download where there is a network, or bring {url} here by hand as {path}"
    with data.replacing(path) as file:
        for piece in download(url, path.stem, remedy):
            file.write(piece)
        file.flush()
        shape = tuple(SAE.from_published(read_tensors(file.name, f"the SAE of {url}"), url).encoder.shape)
        if shape != (n_concepts, 768):
            raise UserError(f"{url} gave an SAE of shape {shape}; ({n_concepts}, 768) was expected; {remedy}")
    return path


def download(url, name, remedy):
    """Yield what is behind url a megabyte at a time. UserError: no network, nothing there, cut short, or of another size or MD5
    than the server says; the remedy is said."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            length, count, digest = int(answer.headers.get("Content-Length") or 0), 0, hashlib.md5(usedforsecurity=False)
            with config.progress(length or None, name, "B", unit_scale=True) as bar:
                while piece := answer.read(1 << 20):
                    yield piece
                    count += len(piece)
                    digest.update(piece)
                    bar.update(len(piece))
            if length and count != length:
                raise OSError(f"{count} of {length} bytes came")
            if answer.headers.get("Content-MD5", expected := base64.b64encode(digest.digest()).decode()) != expected:
                raise OSError("what came has another MD5 than the server says")
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise UserError(f"the SAE can't be fetched ({type(e).__name__}: {e}); {remedy}") from e


# ---------------------------------------------------------------------------------------------------
# Training

@dataclass(frozen=True)
class Config:
    concept_model: str = key("out/stdlib/gpt", "the GPT whose hidden states are encoded: a run, GPT-2 weights, or gpt2")
    concept_layer: int = key(5, "after this block (from 0)", low=0)
    dataset: str = key("stdlib", "a name under data/ or a folder with train.bin, val.bin, meta.json")
    out_dir: str = key("out/sae", "where sae.pt, sae.json, log.jsonl and sae_ckpt.pt go")
    n_concepts: int = key(32768, "C, latents of the SAE", low=1)
    k: int = key(32, "latents kept by TopK", low=1)
    k_aux: int = key(256, "dead latents that the auxiliary loss revives at once; 0 turns it off", low=0)
    aux_weight: float = key(1 / 32, "weight of the auxiliary loss", low=0)
    dead_tokens: int | None = key(None, "a latent is dead after so many tokens without firing (none: 10M, or 5% of a shorter run)", low=1)
    max_tokens: int = key(100_000_000, "tokens to train on", low=1)
    batch_size: int = key(131072, "tokens an optimizer step", low=2)
    buffer: int = key(8, "batches of hidden states that are shuffled together", low=1)
    block_size: int | None = key(None, "context of the concept model (none: its block_size)", low=1)
    learning_rate: float = key(1e-4, "of Adam, constant", low=0)
    log_interval: int = key(10, "steps between two lines of the log", low=1)
    save_interval: int = key(500, "steps between two checkpoints", low=1)
    eval_tokens: int = key(65536, "tokens of val for the report at the end", low=1)
    device: str = key("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is")
    seed: int = key(1337, "of the initialisation and the data order", low=0, high=2**32 - 1)
    resume: bool = key(False, "go on from out_dir's checkpoint, if there is one")


class HiddenStates:
    """Shuffled, normalised hidden states of a concept model, a pure function of (seed, step).

    Blocks of tokens are drawn as in training; the states of `buffer` batches are shuffled together.
    """
    def __init__(self, gpt, layer, batches, batch_size, buffer, seed, device):
        self.gpt, self.layer, self.batches, self.batch_size, self.buffer, self.seed, self.device = gpt, layer, batches, batch_size, buffer, seed, device
        self._round = None

    def __getitem__(self, step):
        number = step // self.buffer
        if self._round != number:
            tokens_at_once = self.batches.batch_size * self.batches.block_size  # through the concept model
            per_round = -(-self.buffer * self.batch_size // tokens_at_once)
            states = []
            for i in range(number * per_round, (number + 1) * per_round):
                h = hidden_states(self.gpt, self.batches[i][0].to(self.device), self.layer, self.device.type == "cuda")
                states.append(normalize(h)[0].flatten(0, 1).float())
            states = torch.cat(states)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._states = states[torch.randperm(len(states), generator=generator).to(self.device)]
            self._round = number
        first = step % self.buffer * self.batch_size
        return self._states[first:first + self.batch_size]


@torch.no_grad()
def hidden_states(gpt, idx, layer, bf16=False):
    """The residual stream after block `layer`: tokens (B, T) → (B, T, d)."""
    with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=bf16):
        return gpt.blocks(gpt.embed(idx), 0, layer + 1)[0]


def geometric_median(x, steps=100):
    """The point with the least summed distance to the rows of x (N, d), by Weiszfeld's iteration → (d,)."""
    point = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-8)
        new = (weight[:, None] * x).sum(0) / weight.sum()
        if (new - point).norm() < 1e-6 * (1 + point.norm()):
            return new
        point = new
    return point


def initialize(sae, x, generator):
    """b_pre at the geometric median of a sample x (N, d); decoder = encoder's directions at unit norm; the encoder
    rescaled so that random unit vectors come back with norm 1."""
    with torch.no_grad():
        sae.pre_bias.copy_(geometric_median(x))
        sae.encoder.copy_(torch.randn(sae.encoder.shape, generator=generator) / math.sqrt(x.shape[1]))
        sae.decoder.copy_(F.normalize(sae.encoder, dim=1))
        unit = F.normalize(torch.randn(256, x.shape[1], generator=generator), dim=1).to(x.device)
        back = sae.decode(sae.encode(unit + sae.pre_bias)) - sae.pre_bias
        sae.encoder.div_(back.norm(dim=1).mean())


def variance_share(error, x):
    """Mean squared error over the variance of x, both (N, d): FVU, the fraction of variance unexplained."""
    return error.pow(2).mean() / (x - x.mean(0)).pow(2).mean()


FEW = 16  # times k_aux: up to so many dead latents AuxK is computed densely


def losses(sae, x, dead, k_aux):
    """(FVU of x, AuxK, the concepts of x). x (N, d) normalised; dead (C,) bool.

    AuxK: the residual rebuilt from the k_aux largest dead latents, its squared error over the residual's
    variance; 0 where nothing is dead (arXiv 2406.04093).
    """
    top = sae.encode(x)
    residual = x - sae.decode(top)
    fvu, aux = variance_share(residual, x), x.new_zeros(())
    where = dead.nonzero()[:, 0]
    if k_aux and len(where):
        weights, k = (x - sae.pre_bias, sae.encoder[where], sae.latent_bias[where]), min(k_aux, len(where))
        if len(where) <= FEW * k:  # so many of the few are kept that dense products are faster than sparse ones
            values, indices = F.linear(*weights).topk(k, sorted=False)
            rebuilt = x.new_zeros(len(x), len(where)).scatter(-1, indices, values.relu()) @ sae.decoder[where]
        else:
            revived, _ = linear_topk(*weights, k)
            rebuilt = sparse_decode(TopK(revived.values.relu(), where[revived.indices]), sae.decoder)
        target = residual.detach()
        aux = variance_share(target - rebuilt, target).nan_to_num(0.0, posinf=0.0)
    return fvu, aux, top


@torch.no_grad()
def project_gradient_(sae):
    """Remove the part of the decoder's gradient that would only change a direction's length."""
    g, w = sae.decoder.grad, sae.decoder
    g.sub_((g * w).sum(1, keepdim=True) * w)


def train_step(sae, optimizer, x, cfg, dead_tokens, step):
    """Step `step` (from 0) on normalised hidden states x (N, d) → what `losses` gives. Directions stay at unit norm; the
    latents' statistics are kept."""
    fvu, aux, top = losses(sae, x, sae.since_active >= dead_tokens, cfg.k_aux)
    optimizer.zero_grad(set_to_none=True)
    (fvu + cfg.aux_weight * aux).backward()
    project_gradient_(sae)
    optimizer.step()
    with torch.no_grad():
        sae.decoder.div_(sae.decoder.norm(dim=1, keepdim=True))
        value, index = top.values.flatten(), top.indices.flatten()
        fired = torch.zeros_like(sae.frequency).index_add_(0, index, (value > 1e-3).float())
        sae.since_active.add_(len(x)).masked_fill_(fired > 0, 0)
        rate = max(0.01, 1 / (step + 1))  # running means over about the last hundred steps
        sae.frequency.lerp_(fired / len(x), rate)
        sae.mean_square.lerp_(torch.zeros_like(fired).index_add_(0, index, value ** 2) / len(x), rate)
    return fvu.detach(), aux.detach(), top


def make_optimizer(sae, learning_rate):
    """Adam with eps and betas as published; its fused kernel where there is one."""
    return torch.optim.Adam(sae.parameters(), lr=learning_rate, eps=6.25e-10, fused=sae.encoder.device.type in ("cpu", "cuda"))


@torch.no_grad()
def report(sae, gpt, layer, tokens, block_size, device, dead_tokens):
    """How well the SAE does on held-out tokens: FVU and L0 (active concepts per token), the share of dead latents, the share of
    activations that belong to the k most frequent concepts (1: the same k everywhere), and the model's loss plain, with the
    reconstruction spliced in, and with zeros instead (nats)."""
    sums, count, error = dict(plain=0.0, spliced=0.0, zeros=0.0), 0, 0.0
    active = torch.zeros(len(sae.encoder), dtype=torch.long, device=device)  # how often each concept is
    first = second = 0.0
    for x, y in data.sequential(tokens, block_size, 8, gpt.config.vocab_size):
        x, y = x.to(device), y.to(device)
        h = hidden_states(gpt, x, layer).float()
        back, top = sae(h)
        normal, mean, std = normalize(h)
        error += ((normal - (back - mean) / std).double() ** 2).sum()
        first, second = first + normal.double().sum((0, 1)), second + (normal.double() ** 2).sum()
        active += torch.bincount(top.indices[top.values > 0], minlength=len(active))
        for name, state in (("plain", h), ("spliced", back), ("zeros", torch.zeros_like(h))):
            end = gpt.blocks(state, layer + 1, gpt.config.n_layer)[0]
            sums[name] += linear_cross_entropy(gpt.ln_f(end), gpt.wte.weight, y, gpt.config.vocab_size)[0].item() * y.numel()
        count += y.numel()
    loss = {name: total / count for name, total in sums.items()}
    return dict(fvu=(error / (second - (first ** 2).sum() / count)).item(), l0=(active.sum() / count).item(),
                commonest_share=(active.topk(sae.k).values.sum() / active.sum()).item(), dead_share=(sae.since_active >= dead_tokens).double().mean().item(),
                **{f"loss_{name}": value for name, value in loss.items()},
                loss_recovered=(loss["zeros"] - loss["spliced"]) / (loss["zeros"] - loss["plain"]))


def main(argv):
    cfg, _ = config.parse(Config, argv, __doc__, most=0)
    if not cfg.out_dir.strip():
        raise UserError("out_dir is empty: name a folder, such as --out_dir=out/sae")
    device, out = pick_device(cfg.device), Path(cfg.out_dir)
    if cfg.k > cfg.n_concepts:
        raise UserError(f"k={cfg.k} latents can't be kept of n_concepts={cfg.n_concepts}")
    gpt, tokenizer = load_gpt(cfg.concept_model, device)
    check_layer(gpt, cfg.concept_layer)
    meta = data.load_meta(cfg.dataset)
    if meta["tokenizer_hash"] != tokenizer:
        raise UserError(f"dataset {cfg.dataset!r} is in tokens of {meta['tokenizer']!r}; the concept model {cfg.concept_model} was trained on another tokenizer's")
    block_size = cfg.block_size or gpt.config.block_size
    if block_size > gpt.config.block_size:
        raise UserError(f"block_size={block_size} is over the concept model's {gpt.config.block_size}")
    batches = data.Batches(data.load_tokens(cfg.dataset, "train"), block_size, max(1, 8192 // block_size), gpt.config.vocab_size, cfg.seed)
    steps = max(1, cfg.max_tokens // cfg.batch_size)
    dead_tokens = cfg.dead_tokens or min(10_000_000, steps * cfg.batch_size // 20)
    states = HiddenStates(gpt, cfg.concept_layer, batches, cfg.batch_size, cfg.buffer, cfg.seed, device)

    d = gpt.config.n_embd
    sae, step, seconds = SAE(d, cfg.n_concepts, cfg.k).to(device), 0, 0.0
    optimizer = make_optimizer(sae, cfg.learning_rate)
    checkpoint, log_path = out / "sae_ckpt.pt", out / "log.jsonl"
    if checkpoint.is_file() and not cfg.resume:
        raise UserError(f"{out} holds an SAE run already; --resume goes on with it, --out_dir=… starts another")
    if checkpoint.is_file():
        content = load_checkpoint(checkpoint, ("sae_config", "sae", "optimizer", "step", "seconds"))
        config.check_same(content["sae_config"], asdict(cfg), checkpoint, free=("out_dir", "log_interval", "save_interval", "device", "resume"))
        sae.load_state_dict(content["sae"])
        load_optimizer(optimizer, content, checkpoint)
        step, seconds = content["step"], content["seconds"]
        if step >= steps and (out / "sae.pt").is_file():
            print(f"{out}: already trained ({step} steps); {summary(read_info(out / 'sae.pt'))}")
            return
    else:
        initialize(sae, states[0][:32768], torch.Generator().manual_seed(cfg.seed))
    log = config.Log(log_path, step)

    def save():
        save_checkpoint(checkpoint, sae_config=asdict(cfg), sae=sae.state_dict(), optimizer=optimizer.state_dict(), step=step, seconds=seconds)

    with config.Stop() as stop, config.progress(steps * cfg.batch_size, "SAE", "tok", initial=step * cfg.batch_size, unit_scale=True) as bar:
        if step == 0:
            save()
            log.begin()
        started, unseen, spikes = time.perf_counter() - seconds, [], config.Spikes()
        while step < steps:
            x = states[step]
            fvu, aux, top = train_step(sae, optimizer, x, cfg, dead_tokens, step)
            unseen.append(fvu + aux)
            step += 1
            bar.update(len(x))
            stopping = stop.signal  # read once: a signal in what follows belongs to the next step
            saving = step % cfg.save_interval == 0 or step == steps or stopping
            if step % cfg.log_interval == 0 or saving:
                seconds = time.perf_counter() - started
                line = dict(step=step, tokens=step * cfg.batch_size, fvu=fvu.item(), aux=aux.item(), l0=(top.values > 0).float().sum(-1).mean().item(),
                            dead_share=(sae.since_active >= dead_tokens).float().mean().item(), seconds=seconds)
                remedy = f"a learning_rate below {cfg.learning_rate} may help"
                for at, loss in enumerate(torch.stack(unseen).tolist(), step - len(unseen) + 1):
                    if not math.isfinite(loss):
                        raise UserError(f"the SAE's loss is {loss} at step {at}: not finite; the last good checkpoint is {checkpoint}; {remedy}")
                if not all(p.isfinite().all() for p in sae.parameters()):
                    raise UserError(f"a weight of the SAE is not finite at step {step}; the last good checkpoint is {checkpoint}; {remedy}")
                spikes.see("FVU", line["fvu"], step, remedy)
                unseen = []
                if step % cfg.log_interval == 0 or step == steps:
                    log.write(line)
                bar.set_postfix_str(f"FVU {line['fvu']:.3f} dead {line['dead_share']:.1%}")
            if saving:
                save()
            if stopping:
                return stop.leave(stopping, checkpoint, step)
    val = data.load_tokens(cfg.dataset, "val")[:cfg.eval_tokens + 1]
    info = dict(concept_model=cfg.concept_model, concept_model_hash=model_hash(gpt), concept_layer=cfg.concept_layer, dataset=cfg.dataset, n_concepts=cfg.n_concepts, k=cfg.k,
                tokens=steps * cfg.batch_size, seconds=round(seconds, 1), dead_tokens=dead_tokens,
                **report(sae, gpt, cfg.concept_layer, val, block_size, device, dead_tokens))
    with data.replacing(out / "sae.json") as file:
        file.write(json.dumps(info, indent=1).encode() + b"\n")
    with data.replacing(out / "sae.pt") as file:  # the last: where it is, all is done
        torch.save({k: v.cpu() if torch.is_tensor(v) else v for k, v in sae.published().items()}, file)
    print(f"{out}: {summary(info)}")
    if problem := degenerate(info):
        print(f"warning: this SAE is degenerate: {problem}. Its FVU of {info['fvu']:.3f} hides that. Labels from it say little; look at the concept model's training log for spikes of grad_norm", file=sys.stderr)


def check_layer(gpt, layer):
    """UserError if the residual stream after block `layer` can't be read as one state a token."""
    if not 0 <= layer < gpt.config.n_layer - 1:
        raise UserError(f"concept_layer={layer} must leave a block above it: the concept model has {gpt.config.n_layer} blocks (0 to {gpt.config.n_layer - 2} will do)")
    if gpt.config.interleaved and layer >= gpt.config.insert_layer:
        raise UserError(f"concept_layer={layer} lies above the insertion (insert_layer={gpt.config.insert_layer}), where a token has two states")


def degenerate(info):
    """What is wrong with an SAE by its report, in words; "" if nothing is."""
    problems = [f"{info['dead_share']:.0%} of the latents are dead"] if info["dead_share"] > 0.5 else []
    if info["commonest_share"] > 0.5:
        problems.append(f"{info['k']} of {info['n_concepts']:,} concepts have {info['commonest_share']:.0%} of the activations")
    return " and ".join(problems)


def summary(info):
    return (f"FVU {info['fvu']:.3f}, L0 {info['l0']:.1f}, dead {info['dead_share']:.1%}; loss {info['loss_plain']:.3f} plain, "
            f"{info['loss_spliced']:.3f} spliced, {info['loss_zeros']:.3f} with zeros: {info['loss_recovered']:.1%} recovered")


if __name__ == "__main__":
    config.run(main)
