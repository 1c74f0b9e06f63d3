"""The concept model: a frozen GPT and a sparse autoencoder that name the concepts that matter at each position.

    python concepts.py out/stdlib/cocomix                            # the concepts a run was trained with: how often, on what
    python concepts.py out/stdlib/cocomix --weights                  # how much the model uses each concept it predicts
    python concepts.py config/stdlib_cocomix.py --write_labels       # make the labels of all train tokens once, for train.py --labels=disk
    python concepts.py --download                                    # fetch GPT-2 and its published SAE ahead of a training

For tokens and their targets, with h the hidden state after block concept_layer:

    c = SAE's active concepts of h                              sparse, k of C
    g = ∂(mean next-token loss) / ∂h                            h left as it is, weights frozen
    a_i = c_i · ⟨W_dec,i, g⟩                                    attribution, at the active i
    labels = the attr_k largest a_i                             concepts whose growth would raise the loss

The lower blocks run without gradients, the upper ones with the gradient for h alone.
"""
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import config  # before torch: from here on Ctrl-C ends without a traceback
import numpy as np
import torch

import data
from config import UserError, key
from model import RUN, Teacher, TopK, fetch_gpt2, gathered_dot, linear_cross_entropy, load_checkpoint, load_gpt, load_model, pick_device
from sae import SIZES, check_layer, fetch_sae, hidden_states, load_sae, model_hash, normalize


@dataclass(frozen=True)
class LabelKeys:
    """The keys on which labels depend; train.py has them too."""
    dataset: str = key("openwebtext", "a name under data/ or a folder with train.bin, val.bin, meta.json")
    block_size: int = key(1024, "tokens of context", low=1)
    concept_model: str = key("gpt2", "names the concepts: a run, GPT-2 weights, or gpt2")
    sae: str = key("openai", "its SAE: a run of sae.py, a file in the published layout, openai or openai_128k")
    concept_layer: int = key(5, "the SAE reads the hidden state after this block", low=0)
    attr_k: int = key(4, "label concepts a position", low=1)
    select: Literal["attribution", "activation"] = key("attribution", "how labels are chosen")
    attribution: Literal["code", "paper"] = key("code", "among the active concepts, or among all by their values before TopK")
    attribution_sign: Literal["raise", "lower", "abs"] = key("raise", "concepts whose growth raises the loss, lowers it, or either")
    device: str = key("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is")
    dtype: Literal["auto", "float32", "bfloat16"] = key("auto", "of matrix products; auto: bfloat16 on CUDA, else float32")


class Guidance(NamedTuple):
    """What the concept model says of a batch; None where it was not asked."""
    labels: torch.Tensor | None = None  # (B, T, attr_k) int64, the concepts to predict; or (B, T, d) the normalised hidden state itself
    teacher: Teacher | None = None      # its next-token distribution (KD)


class ConceptModel:
    """A frozen GPT and its SAE (None where no concepts are asked for).

    target        concept: labels (B, T, attr_k); hidden: the hidden state as the SAE reads it; none
    select        attribution, or activation: the attr_k strongest concepts
    attribution   code: a_i over the active concepts, as above; paper: over all C, with the values before TopK (eq. 1)
    sign          raise: the largest a_i (paper and code); lower: the largest -a_i; abs: the largest |a_i|
    teaches       whether its next-token distribution is asked for too
    bf16          the GPT's matrix products in bfloat16 (the SAE's stay in float32)
    compile       torch.compile what lies around autograd.grad, which it can't trace
    """
    def __init__(self, gpt, sae, layer, attr_k=4, select="attribution", attribution="code", sign="raise", target="concept", teaches=False, bf16=False, compile=False):
        check_layer(gpt, layer)
        if target == "concept":
            among = sae.k if select == "activation" or attribution == "code" else len(sae.encoder)
            if attr_k > among:
                raise UserError(f"attr_k={attr_k} labels can't be chosen among {among} concepts")
        self.gpt, self.sae, self.layer, self.bf16, self.compile = gpt, sae, layer, bf16, compile
        self.attr_k, self.select, self.attribution, self.sign = attr_k, select, attribution, sign
        self.target, self.teaches = target, teaches
        if compile:
            self._lower, self._upper, self._choose = (torch.compile(f, dynamic=False) for f in (self._lower, self._upper, self._choose))

    @torch.no_grad()
    def guide(self, idx, targets, teaches=None):
        """Tokens and their targets (B, T) → Guidance, from one forward pass. teaches: other than the model's."""
        teaches = self.teaches if teaches is None else teaches
        with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=False):  # the same precision wherever this is called from
            h, x, active = self._lower(idx)
            labels = end = None
            if self.target == "hidden":
                labels = x
            elif self.target == "concept" and self.select == "activation":
                labels = active.indices[..., :self.attr_k]
            elif self.target == "concept":
                grad, end = self.loss_gradient(h, targets)
                labels = self._choose(x, active, grad)
            if teaches and end is None:
                end, _ = self._upper(h)
            return Guidance(labels, Teacher(end, self.gpt.wte.weight) if teaches else None)

    def labels(self, idx, targets):
        """What to predict at each position: (B, T, attr_k) int64 concepts, best first; or the hidden states (B, T, d)."""
        return self.guide(idx, targets, teaches=False).labels

    def without_concepts(self):
        """The same model, asked for its next-token distribution alone: labels are known already."""
        return ConceptModel(self.gpt, None, self.layer, target="none", teaches=True, bf16=self.bf16, compile=self.compile)

    def _lower(self, idx):
        """Tokens (B, T) → (h after block `layer` (B, T, d), the same as the SAE reads it, its active concepts or None)."""
        h = hidden_states(self.gpt, idx, self.layer, self.bf16)
        x = normalize(h)[0].to(self.gpt.wte.weight.dtype)
        return h, x, self.sae.encode(x) if self.target == "concept" else None

    def _upper(self, h, targets=None):
        """h after block `layer` (B, T, d) → (the final state (B, T, d), of which the head makes logits; the mean loss if there are targets)."""
        with torch.autocast(h.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            end = self.gpt.ln_f(self.gpt.blocks(h, self.layer + 1, self.gpt.config.n_layer)[0])
            return end.detach(), None if targets is None else linear_cross_entropy(end, self.gpt.wte.weight, targets, self.gpt.config.vocab_size)[0]

    def loss_gradient(self, h, targets):
        """(∂(mean next-token loss) / ∂h, the final state) for hidden states h after block `layer`, each (B, T, d)."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            end, loss = self._upper(h, targets)
        return torch.autograd.grad(loss, h)[0].to(self.gpt.wte.weight.dtype), end

    def _choose(self, x, active, grad):
        """Label concepts (B, T, attr_k) by attribution, best first.

        In the code's form they are among the concepts above 0; where fewer than attr_k are, the best stands again.
        """
        if self.attribution == "paper":  # eq. 1: c_pre in place of c, all C concepts; one sequence (T, C) at a time
            return torch.stack([self._signed(self.sae.preactivations(x_row) * (g_row @ self.sae.decoder.T)).topk(self.attr_k).indices for x_row, g_row in zip(x, grad)])
        scores = self._signed(self.attributions(active, grad).values).masked_fill(active.values <= 0, -torch.inf)
        best = scores.topk(self.attr_k)
        labels = active.indices.gather(-1, best.indices)
        return torch.where(best.values == -torch.inf, labels[..., :1], labels)

    def attributions(self, active, grad):
        """a_i = c_i · ⟨W_dec,i, g⟩ at the active concepts: TopK (B, T, k), g (B, T, d) → the same with a for c."""
        dots = gathered_dot(active.indices.flatten(0, -2), self.sae.decoder, grad.flatten(0, -2))
        return TopK(active.values * dots.view(active.values.shape), active.indices)

    def _signed(self, a):
        return {"raise": a, "lower": -a, "abs": a.abs()}[self.sign]

    def flops_per_token(self, block_size=None):
        """Operations a token costs at the least, in a context of block_size tokens: the blocks up to `layer`; the SAE's encoder
        for concepts; the upper blocks and the head for attribution or a teacher, and their gradient for attribution."""
        d, block_size = self.gpt.config.n_embd, block_size or self.gpt.config.block_size
        forward = self.gpt.flops_per_token(backward=False, block_size=block_size)
        lower = (self.layer + 1) * (24 * d ** 2 + 2 * d * block_size)
        attributes = self.target == "concept" and self.select == "attribution"
        return lower + (forward - lower) * ((attributes or self.teaches) + attributes) + (self.sae.flops_per_token() if self.target == "concept" else 0)


def uses_bf16(dtype, device):
    """Whether the key dtype means bfloat16 on this device."""
    return dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"


def load_concept_model(keys, device, target="concept", teaches=False, compile=False):
    """(ConceptModel, its tokenizer's hash) from LabelKeys."""
    gpt, tokenizer = load_gpt(keys.concept_model, device)
    check_layer(gpt, keys.concept_layer)  # before an SAE is looked for there
    sae = load_sae(keys.sae, keys.concept_layer, gpt.config.n_embd, device, gpt) if target == "concept" else None
    return ConceptModel(gpt, sae, keys.concept_layer, keys.attr_k, keys.select, keys.attribution, keys.attribution_sign, target, teaches,
                        uses_bf16(keys.dtype, device), compile), tokenizer


def check_tokenizer(keys, meta, tokenizer, gpt):
    """UserError if the dataset is in tokens of another tokenizer than the concept model's, or its blocks are too long for it."""
    if tokenizer != meta["tokenizer_hash"]:
        raise UserError(f"dataset {keys.dataset!r} is in tokens of {meta['tokenizer']!r}; the concept model {keys.concept_model} was trained on another tokenizer's")
    if keys.block_size > gpt.config.block_size:
        raise UserError(f"block_size={keys.block_size} is over the concept model's {gpt.config.block_size}")


def of_run(content, device):
    """The ConceptModel whose concepts (or hidden states) a checkpoint's run learned to predict; None if it did not."""
    target = content["model_config"]["insert"]
    if target not in ("concept", "hidden"):
        return None
    known = {f.name for f in fields(LabelKeys)}
    return load_concept_model(LabelKeys(**{k: v for k, v in content["train_config"].items() if k in known}), device, target)[0]


# ---------------------------------------------------------------------------------------------------
# Labels on disk: all blocks of train.bin, unshifted, (blocks, block_size, attr_k), after a header of JSON

HEADER = 4096  # bytes


def labels_header(concept_model, keys, tokens):
    """What labels depend on: they are reused only where all of it is the same."""
    c = concept_model
    name = f"labels_{c.select}" + (f"_{c.attribution}_{c.sign}" if c.select == "attribution" else "") + f"_layer{c.layer}_k{c.attr_k}_block{keys.block_size}"
    n_concepts = len(c.sae.encoder)
    return dict(name=name, concept_model=model_hash(c.gpt), sae=model_hash(c.sae), bf16=c.bf16, n_concepts=n_concepts, dtype="<u2" if n_concepts <= 1 << 16 else "<u4",
                tokens=data.fingerprint(tokens[:1 << 20].tobytes(), tokens[-1 << 20:].tobytes()), shape=[(len(tokens) - 1) // keys.block_size, keys.block_size, c.attr_k])


def labels_path(dataset, header):
    return data.dataset_dir(dataset) / (header["name"] + ".bin")


def read_header(path):
    """The header of a file of labels; None if it has none."""
    with open(path, "rb") as file:
        try:
            return json.loads(file.read(HEADER))
        except ValueError:
            return None


def open_labels(concept_model, keys):
    """Labels that write_labels wrote, memory-mapped: (blocks, block_size, attr_k). UserError: none there, cut short, or
    those of another concept model, SAE or dataset."""
    header = labels_header(concept_model, keys, data.load_tokens(keys.dataset, "train"))
    path, remedy = labels_path(keys.dataset, header), "write them: python concepts.py CONFIG --write_labels (with the keys of this run)"
    if not path.is_file():
        raise UserError(f"no labels at {path}; {remedy}")
    found, size = read_header(path), HEADER + math.prod(header["shape"]) * np.dtype(header["dtype"]).itemsize
    if found is None or path.stat().st_size != size and found == header:
        raise UserError(f"{path} is damaged or cut short; remove it and {remedy}")
    if found != header:
        other = ", ".join(name for name in header if found.get(name) != header[name])
        raise UserError(f"{path} holds the labels of another {other}; remove it and {remedy}")
    return data.mapped(path, header["dtype"], HEADER).reshape(header["shape"])


def write_labels(concept_model, keys, vocab_size, device):
    """Write the labels of all train tokens beside them; returns the path. Broken off, a second call goes on."""
    tokens = data.load_tokens(keys.dataset, "train")
    header = labels_header(concept_model, keys, tokens)
    path = labels_path(keys.dataset, header)
    if path.is_file() and read_header(path) == header:
        return path
    (blocks, block_size, _), part, row = header["shape"], path.with_suffix(".part"), math.prod(header["shape"][1:]) * np.dtype(header["dtype"]).itemsize
    try:
        done = (part.stat().st_size - HEADER) // row if part.is_file() and read_header(part) == header else 0
        with open(part, "r+b" if done else "wb") as file:
            file.truncate(HEADER + done * row)
            if not done:
                file.write(json.dumps(header).encode().ljust(HEADER))
            file.seek(HEADER + done * row)
            with config.progress(blocks * block_size, "labels", "tok", initial=done * block_size, unit_scale=True) as bar:
                for x, y in data.sequential(tokens[done * block_size:blocks * block_size + 1], block_size, max(1, 8192 // block_size), vocab_size):
                    file.write(concept_model.labels(x.to(device), y.to(device)).cpu().numpy().astype(header["dtype"]).tobytes())
                    bar.update(x.numel())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{part} can't be written ({e.strerror or e}); free some space; the same command goes on from there") from e
    return path


# ---------------------------------------------------------------------------------------------------
# The report

@dataclass(frozen=True)
class Config(LabelKeys):
    tokens: int = key(65536, "tokens of val to look at", low=1)
    top: int = key(20, "concepts to print", low=1)
    weights: bool = key(False, "the lengths of the compress matrix's columns (Figure 6c)")
    plot: str | None = key(None, "--weights: draw them into this .png, .svg or .pdf")
    write_labels: bool = key(False, "make the labels of all train tokens, as a config file of train.py (and keys over it) says")
    download: bool = key(False, "fetch GPT-2 and the published SAE of --concept_layer, and say where they lie")


def use(concept_model, content, tokens, device):
    """How the label concepts are used on `tokens` tokens of val: (Counter of labels, {concept: Counter of the tokens it is
    a label at}, {concept: Counter of the tokens that follow})."""
    count, at, then, shape = Counter(), {}, {}, content["model_config"]
    for x, y in data.sequential(data.tokens_of_run(content, "val")[:tokens + 1], shape["block_size"], 8, shape["vocab_size"]):
        x, y = x.to(device), y.to(device)
        labels = concept_model.labels(x, y)
        for concepts, here, following in zip(labels.flatten(0, 1).tolist(), x.flatten().tolist(), y.flatten().tolist()):
            for concept in concepts:
                count[concept] += 1
                at.setdefault(concept, Counter())[here] += 1
                then.setdefault(concept, Counter())[following] += 1
    return count, at, then


def column_norms(model):
    """‖W_:,i‖ of the C concepts of a model's compress matrix: how far a unit of each moves ĉ."""
    return model.inserted.compress.detach().float().norm(dim=1).cpu().numpy()


def show_weights(norms, plot=None, bins=20, unused=1e-2):
    """Print, and draw into the file plot, the histogram of the column norms (C,) (the paper's Figure 6c)."""
    counts, edges = np.histogram(norms, bins=bins, range=(0, norms.max() or 1.0))
    for n, low, high in zip(counts, edges, edges[1:]):
        print(f"{low:8.3f} to {high:6.3f} {n:7,}  {'█' * round(50 * n / counts.max())}")
    print(f"{(norms < unused).mean():.1%} of {len(norms):,} columns are shorter than {unused}; median {np.median(norms):.3f}")
    if plot:
        plt = config.pyplot()
        figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
        axis.hist(norms, bins=50, range=(0, edges[-1]))
        axis.set(xlabel="length of a concept's column of W", ylabel="concepts")
        config.save_figure(figure, plot)
        plt.close(figure)


def main(argv):
    cfg, rest = config.parse(Config, argv, __doc__, most=1, files="shared")
    config.picture_path(cfg.plot)
    if cfg.download:
        if cfg.sae not in SIZES:
            raise UserError(f"sae={cfg.sae!r} is not fetched: expected {' or '.join(SIZES)}")
        print(f"GPT-2: {fetch_gpt2()}")
        print(f"its SAE: {fetch_sae(cfg.sae, cfg.concept_layer)}")
        return
    device = pick_device(cfg.device)
    if cfg.write_labels:
        if rest:
            raise UserError(f"--write_labels takes a config file of train.py, not {rest[0]!r}")
        meta = data.load_meta(cfg.dataset)
        concept_model, tokenizer = load_concept_model(cfg, device)
        check_tokenizer(cfg, meta, tokenizer, concept_model.gpt)
        print(f"labels: {write_labels(concept_model, cfg, meta['vocab_size'], device)}")
        return
    if given := [f.name for f in fields(LabelKeys) if f.name != "device" and getattr(cfg, f.name) != f.default]:
        raise UserError(f"--{given[0]} is for --write_labels; the report is of a run, with the run's own")
    content = load_checkpoint(rest[0] if rest else None, RUN)
    insert, mix = content["model_config"]["insert"], content["model_config"]["mix"]
    if insert != "concept" or cfg.weights and mix == "none":
        raise UserError(f"a run of method={content['train_config']['method']!r}, mix={mix!r} has no {'compress matrix' if insert == 'concept' else 'concepts'}; name a cocomix run")
    if cfg.weights:
        return show_weights(column_norms(load_model(content)), cfg.plot)
    concept_model, tokenizer = of_run(content, device), data.load_tokenizer(content["tokenizer"])
    count, at, then = use(concept_model, content, cfg.tokens, device)
    total = count.total() / concept_model.attr_k
    show = lambda counter: "  ".join(repr(tokenizer.decode([t])) for t, _ in counter.most_common(6))
    print(f"{len(count):,} of {len(concept_model.sae.encoder):,} concepts were labels on {total:,.0f} tokens of val\n")
    print(f"{'concept':>8} {'label at':>9}  at the tokens (most first) → before the tokens")
    for concept, n in count.most_common(cfg.top):
        print(f"{concept:8} {n / total:9.2%}  {show(at[concept])}  →  {show(then[concept])}")


if __name__ == "__main__":
    config.run(main)
