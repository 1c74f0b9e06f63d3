"""The concept model: a frozen GPT and a sparse autoencoder that name the concepts that matter at each position.

    python concepts.py out/stdlib/cocomix                            # what each concept is: a table, and concepts.html to open in a browser
    python concepts.py out/stdlib/cocomix --find "raise error"       # the concepts that go best with these words
    python concepts.py out/stdlib/cocomix --weights                  # how much the model uses each concept it predicts
    python concepts.py config/stdlib_cocomix.py --write_labels       # make the labels of all train tokens once, for train.py --labels=disk
    python concepts.py --download                                    # fetch GPT-2 and its published SAE ahead of a training

For tokens and their targets, with h the hidden state after block concept_layer:

    c = SAE's active concepts of h                              sparse, k of C
    g = ∂(mean next-token loss) / ∂h                            h left as it is, weights frozen
    a_i = c_i · ⟨W_dec,i, g⟩                                    attribution, at the active i
    labels = the attr_k largest a_i                             concepts whose growth would raise the loss

The lower blocks run without gradients, the upper ones with the gradient for h alone.

What a concept is called, and which tokens are its own, stands in one place: the dictionary (`Dictionary`), made in
one pass over training tokens, kept beside the run as concepts.pt, and used by the report, sample.py and eval.py.
"""
import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import config  # before torch: from here on Ctrl-C ends without a traceback
import numpy as np
import torch
import torch.nn as nn

import data
from config import UserError, key
from model import (GPT, RUN, Teacher, TopK, fetch_gpt2, find_checkpoint, gathered_dot, linear_cross_entropy, load_checkpoint, load_gpt, load_model, pick_device,
                   read_tensors, topk)
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
            elif self.target == "concept":
                labels, end = self._label(h, x, active, targets)
            if teaches and end is None:
                end, _ = self._upper(h)
            return Guidance(labels, Teacher(end, self.gpt.wte.weight) if teaches else None)

    def labels(self, idx, targets):
        """What to predict at each position: (B, T, attr_k) int64 concepts, best first; or the hidden states (B, T, d)."""
        return self.guide(idx, targets, teaches=False).labels

    @torch.no_grad()
    def read(self, idx, targets):
        """(active concepts, TopK (B, T, k); labels (B, T, attr_k)) of tokens and targets (B, T)."""
        with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=False):
            h, x, active = self._lower(idx)
            return active, self._label(h, x, active, targets)[0]

    def without_concepts(self):
        """The same model, asked for its next-token distribution alone: labels are known already."""
        return ConceptModel(self.gpt, None, self.layer, target="none", teaches=True, bf16=self.bf16, compile=self.compile)

    def _lower(self, idx):
        """Tokens (B, T) → (h after block `layer` (B, T, d), the same as the SAE reads it, its active concepts or None)."""
        h = hidden_states(self.gpt, idx, self.layer, self.bf16)
        x = normalize(h)[0].to(self.gpt.wte.weight.dtype)
        return h, x, self.sae.encode(x) if self.target == "concept" else None

    def _label(self, h, x, active, targets):
        """What `_lower` gave, and targets → (label concepts (B, T, attr_k), the final state or None if it wasn't needed)."""
        if self.select == "activation":
            return active.indices[..., :self.attr_k], None
        grad, end = self.loss_gradient(h, targets)
        return self._choose(x, active, grad), end

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
    path = labels_path(keys.dataset, header)
    if not path.is_file():
        raise UserError(f"no labels at {path}; write them: python concepts.py CONFIG --write_labels (with this run's keys on concepts and data)")
    check_labels(path, header)
    return data.mapped(path, header["dtype"], HEADER).reshape(header["shape"])


def check_labels(path, header):
    """UserError unless the file there holds labels with this header, whole."""
    found, size = read_header(path), HEADER + math.prod(header["shape"]) * np.dtype(header["dtype"]).itemsize
    if found is None or path.stat().st_size != size and found == header:
        raise UserError(f"{path} is damaged or cut short; remove it and write it again: python concepts.py CONFIG --write_labels")
    if found != header:
        other = ", ".join(name for name in header if found.get(name) != header[name])
        raise UserError(f"{path} holds the labels of another {other}; remove it and write it again: python concepts.py CONFIG --write_labels")


def write_labels(concept_model, keys, vocab_size, device):
    """Write the labels of all train tokens beside them; returns the path. Broken off, a second call goes on."""
    tokens = data.load_tokens(keys.dataset, "train")
    header = labels_header(concept_model, keys, tokens)
    path = labels_path(keys.dataset, header)
    if path.is_file():
        check_labels(path, header)
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


class SteeredSAE(nn.Module):
    """An SAE in the place of a CoCoMix model's concepts (`GPT.inserted`), its result added to the hidden state h: so the
    frozen concept model is steered, and generates, as a CoCoMix model does. With s the factors, one for each concept,

        c = ReLU(TopK(c_pre)),   c' = ReLU(TopK(s · c_pre))
        h ← h + (W_dec c' − W_dec c) · σ         decoded back; the rest of h, what the SAE can't say of it too, is kept

    The factors meet the values before TopK, as CoCoMix's meet z: for an active concept and a positive factor that is the
    paper's s_i · c_i. Where a concept is not active its c_i is 0 and no factor would change it; so, as for z, a negative
    factor on a negative c_pre,i turns it on.
    """
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, h, labels=None, scale=None):
        x, _, std = normalize(h)
        x = x.to(self.sae.encoder.dtype)
        plain = self.sae.encode(x)
        if scale is None:
            return torch.zeros_like(h), plain, None
        steered = topk(self.sae.preactivations(x) * scale, self.sae.k)
        steered = TopK(steered.values.relu(), steered.indices)
        return (self.sae.decode(steered) - self.sae.decode(plain)).to(h.dtype) * std, steered, None


def steerable(concept_model):
    """A concept model's GPT with its SAE between its blocks, weights shared: a GPT that takes `scale` as a CoCoMix model does."""
    gpt, sae = concept_model.gpt, concept_model.sae
    if gpt.config.insert != "none":
        raise UserError("the concept model mixes concepts or pauses in itself and can't be steered beside the run; --model=run steers the run alone")
    with torch.device("meta"):
        steered = GPT(config.replace(gpt.config, insert="concept", mix="add", insert_layer=concept_model.layer + 1, n_concepts=len(sae.encoder), concept_k=sae.k))
    for name in ("wte", "wpe", "drop", "h", "ln_f"):
        setattr(steered, name, getattr(gpt, name))
    steered.inserted = SteeredSAE(sae)
    return steered.eval()


# ---------------------------------------------------------------------------------------------------
# The dictionary: what each concept is

TOKENS, NAME = 16, 8        # tokens kept of each kind a concept; so many of those that follow it are its own: its name
CONTEXTS, BEFORE, AFTER = 6, 16, 8  # contexts a concept, and the tokens shown before and after the one that is marked
NEIGHBOURS = 8
EDGES = 2.0 ** (torch.arange(33) / 4 - 3)  # of the bins of activations: 1/8 to 32, four to a doubling; what lies beyond counts in the last


class Dictionary(NamedTuple):
    """What the C concepts of a run are. Lists of tokens begin with the best, -1 fills them up; file positions are in train.bin."""
    checkpoint: str                  # a hash of the run's weights
    asked: int                       # training tokens asked for
    tokens: int                      # and looked at: whole blocks, drawn from all of the split
    labelled: torch.Tensor           # (C,) at how many of them the concept is a label
    predicted: torch.Tensor          # (C,) at how many the run predicts it: keeps it in its TopK
    activations: torch.Tensor        # (C, bins) positions with an activation between two EDGES
    own: torch.Tensor                # (C, TOKENS) the tokens that follow where it is a label; see `typical`
    own_share: torch.Tensor          # (C, TOKENS) how often they do, of all that follows it
    own_lift: torch.Tensor           # (C, TOKENS) how many times as often as anywhere
    at: torch.Tensor                 # the same for the tokens at which it is a label
    at_share: torch.Tensor
    at_lift: torch.Tensor
    promotes: torch.Tensor           # (C, TOKENS) the tokens that W_:,i raises and lowers most; empty where nothing is mixed in
    suppresses: torch.Tensor
    norm: torch.Tensor               # (C,) ‖W_:,i‖, 0 where nothing is mixed in
    neighbours: torch.Tensor         # (C, NEIGHBOURS) concepts whose decoder directions are nearest
    cosine: torch.Tensor             # (C, NEIGHBOURS) how near
    contexts: torch.Tensor           # (C, CONTEXTS, BEFORE + 1 + AFTER) tokens around its largest activations, each in another block
    contexts_activation: torch.Tensor  # (C, CONTEXTS) -inf where there is none
    predictions: torch.Tensor        # the same around its largest predicted logits
    predictions_logit: torch.Tensor

    def name(self, concept, tokenizer, n=5):
        """A concept's own tokens as text, such as `'self' 'path' 'get'`: what it is called everywhere."""
        return show_tokens(self.own[concept, :min(n, NAME)], tokenizer) or "(never a label)"


def show_tokens(ids, tokenizer):
    return " ".join(repr(tokenizer.decode([t])) for t in ids.tolist() if t >= 0)


def best_of_each(group, score, n):
    """The n entries with the highest score of every group: (their indices, sorted by group; their ranks in it, from 0)."""
    order = np.lexsort((-score, group))
    rank = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return order[rank < n], rank[rank < n]


class PairCounts:
    """How often a concept stood with a token. Exact up to `limit` different pairs; beyond, the rarest are forgotten
    whenever new ones are counted in, so memory stays flat."""
    def __init__(self, limit=1 << 23):
        self.limit, self.keys, self.counts, self.new = limit, np.empty(0, np.int64), np.empty(0, np.int64), []

    def add(self, keys):
        """keys: concept · V + token, one for each time."""
        self.new.append(keys)
        if sum(map(len, self.new)) > max(1 << 20, len(self.keys)):
            self.gather()

    def gather(self):
        once = np.ones(sum(map(len, self.new)), np.int64)
        self.keys, inverse = np.unique(np.concatenate((self.keys, *self.new)), return_inverse=True)
        self.counts = np.bincount(inverse, np.concatenate((self.counts, once))).astype(np.int64)
        self.new = []
        if len(self.keys) > self.limit:
            kept = np.sort(np.argpartition(-self.counts, self.limit)[:self.limit])
            self.keys, self.counts = self.keys[kept], self.counts[kept]


def typical(pairs, everywhere, C, prior=20):
    """(ids, share, lift), each (C, TOKENS): the tokens that tell most about the concepts they stand with.

    A token's share p(t | concept) is taken as if the concept had been seen `prior` times more, with tokens as they
    come everywhere, p(t): what was seen twice proves little. Its lift is p(t | concept) / p(t). They are sorted by
    p(t | concept) · log lift, the token's part in the divergence of the two: by lift alone the rarest would win, by
    share alone the commonest. Tokens with a lift up to 1 are left out.
    """
    pairs.gather()
    concept, token = np.divmod(pairs.keys, len(everywhere))
    p = everywhere[token] / everywhere.sum()
    share = (pairs.counts + prior * p) / (np.bincount(concept, pairs.counts, C)[concept] + prior)
    lift = share / p
    score = share * np.log(lift)
    order, rank = best_of_each(concept, np.where(lift > 1, score, -np.inf), TOKENS)
    rank, order = rank[lift[order] > 1], order[lift[order] > 1]
    out = np.full((C, TOKENS), -1, np.int32), np.zeros((C, TOKENS), np.float32), np.zeros((C, TOKENS), np.float32)
    for table, values in zip(out, (token, share, lift)):
        table[concept[order], rank] = values[order]
    return tuple(map(torch.from_numpy, out))


class Strongest:
    """Where each of C concepts has its largest values so far, each in another block: memory does not grow with the text."""
    def __init__(self, C, n=CONTEXTS):
        self.value, self.where = np.full((C, n), -np.inf, np.float32), np.full((C, n), -1, np.int64)

    def add(self, top, where):
        """top: TopK (rows, T, k); where: the file position of each row's and token's, (rows, T)."""
        (rows, T, k), n = top.values.shape, self.value.shape[1]
        value, concept = top.values.flatten().float().cpu().numpy(), top.indices.flatten().cpu().numpy()
        place = np.flatnonzero(value > self.value[concept, -1])  # what would come among the largest: soon very few
        value, concept = value[place], concept[place]
        first, _ = best_of_each(concept * rows + place // (T * k), value, 1)  # the largest of a block
        value, concept, at = value[first], concept[first], where.flatten()[place[first] // k]
        touched = np.unique(concept)
        group = np.concatenate((np.repeat(touched, n), concept))
        value, at = np.concatenate((self.value[touched].ravel(), value)), np.concatenate((self.where[touched].ravel(), at))
        order, rank = best_of_each(group, value, n)
        self.value[group[order], rank], self.where[group[order], rank] = value[order], at[order]

    def contexts(self, tokens):
        """The tokens around each: (C, n, BEFORE + 1 + AFTER), -1 beyond the file's ends and where there is none."""
        places = self.where[..., None] + np.arange(-BEFORE, AFTER + 1)
        inside = (places >= 0) & (places < len(tokens)) & (self.where[..., None] >= 0)
        return torch.from_numpy(np.where(inside, tokens[places * inside].astype(np.int32), -1))


def column_norms(model):
    """‖W_:,i‖ of the C concepts of a model's compress matrix: how far a unit of each moves ĉ."""
    return model.inserted.compress.detach().float().norm(dim=1).cpu().numpy()


@torch.no_grad()
def promoted(model, n=TOKENS):
    """The n tokens that each W_:,i raises most through the final LayerNorm and the head, and those that it lowers most:
    (C, n), (C, n). ĉ enters the residual stream, itself or added to h, so it reaches the head along the stream too: this is
    that direct way, not what the blocks between make of it. The LayerNorm takes the mean off and multiplies with its gain;
    its division by σ, one number for all tokens, changes no order."""
    W, weight = model.inserted.compress, model.wte.weight[:model.config.vocab_size]
    up, down = [], []
    for rows in W.split(1024):
        effect = ((rows - rows.mean(1, keepdim=True)) * model.ln_f.weight) @ weight.T
        up.append(effect.topk(n).indices.int().cpu())
        down.append((-effect).topk(n).indices.int().cpu())
    return torch.cat(up), torch.cat(down)


def neighbours(directions, n=NEIGHBOURS):
    """The n concepts whose directions, unit rows of (C, d), have the largest cosine with each concept's: (C, n) ids and cosines."""
    ids, cosines = [], []
    for first in range(0, len(directions), 1024):
        cosine = directions[first:first + 1024] @ directions.T
        cosine[torch.arange(len(cosine)), torch.arange(first, first + len(cosine))] = -torch.inf  # itself
        top = cosine.topk(min(n, len(directions) - 1))
        ids.append(top.indices.int().cpu())
        cosines.append(top.values.cpu())
    return torch.cat(ids), torch.cat(cosines)


@torch.no_grad()
def build(content, model, concept_model, tokens, device):
    """The Dictionary of a run over about `tokens` tokens of its train split: one pass, in memory that does not grow with them."""
    C, V, T = model.config.n_concepts, model.config.vocab_size, model.config.block_size
    train = data.tokens_of_run(content, "train")
    rows = max(1, min((4096 if device.type == "cpu" else 32768) // T, -(-tokens // T), (len(train) - 1) // T))
    batches = data.Batches(train, T, rows, V, shift=False)
    steps = max(1, min(round(tokens / (rows * T)), batches.blocks // rows))
    labelled, predicted = (torch.zeros(C, dtype=torch.long, device=device) for _ in range(2))
    activations = torch.zeros(C * (len(EDGES) - 1), dtype=torch.long, device=device)
    edges, everywhere = EDGES[1:-1].to(device), np.zeros(V, np.int64)
    at, own, strongest, likeliest = PairCounts(), PairCounts(), Strongest(C), Strongest(C)
    with config.progress(steps * rows * T, "dictionary", "tok", unit_scale=True, leave=False) as bar:
        for step in range(steps):
            x, y = (t.to(device) for t in batches[step])
            active, labels = concept_model.read(x, y)
            kept = model.concepts(x)
            labelled += torch.bincount(labels.flatten(), minlength=C)
            predicted += torch.bincount(kept.indices.flatten(), minlength=C)
            bins = active.indices * (len(EDGES) - 1) + torch.bucketize(active.values, edges)
            activations += torch.bincount(bins[active.values > 0], minlength=len(activations))
            everywhere += torch.bincount(torch.cat((x, y)).flatten(), minlength=V).cpu().numpy()
            at.add((labels * V + x[..., None]).flatten().cpu().numpy())
            own.add((labels * V + y[..., None]).flatten().cpu().numpy())
            where = batches.starts(step)[:, None] + np.arange(T)
            strongest.add(active, where)
            likeliest.add(kept, where)
            bar.update(y.numel())
    mixes = model.config.mix != "none"
    promotes, suppresses = promoted(model) if mixes else (torch.zeros(C, 0, dtype=torch.int32),) * 2
    return Dictionary(model_hash(model), tokens, steps * rows * T, labelled.cpu(), predicted.cpu(), activations.view(C, -1).cpu(),
                      *typical(own, everywhere, C), *typical(at, everywhere, C), promotes, suppresses,
                      torch.from_numpy(column_norms(model)) if mixes else torch.zeros(C), *neighbours(concept_model.sae.decoder),
                      strongest.contexts(train), torch.from_numpy(strongest.value), likeliest.contexts(train), torch.from_numpy(likeliest.value))


def dictionary_of(path, content, model, device, tokens=None):
    """The Dictionary of the run whose checkpoint lies at path: the one kept beside it as concepts.pt, if it is this checkpoint's
    and over `tokens` tokens (None: over any number); else it is made, which is said on screen, and kept."""
    kept = Path(path).parent / "concepts.pt"
    if kept.is_file():
        try:
            found = Dictionary(**read_tensors(kept, "a concept dictionary"))
            if found.checkpoint == model_hash(model) and tokens in (None, found.asked):
                return found
        except (UserError, TypeError):
            pass  # damaged, or of another form: made anew
    tokens = tokens or 1_000_000
    print(f"making {kept}, the dictionary of the run's concepts, from {tokens:,} training tokens (once for a checkpoint)")
    made = build(content, model, of_run(content, device), tokens, device)
    with data.replacing(kept) as file:
        torch.save(made._asdict(), file)
    return made


# ---------------------------------------------------------------------------------------------------
# Reading it: finding concepts by words, and the report

def entry(d, concept, tokenizer):
    """What the dictionary d says of a concept, as plain values with the tokens as text; see REPORT for what reads it."""
    text = lambda ids: tokenizer.decode([t for t in ids if t >= 0])
    def typical(ids, share, lift):
        return [[text([t]), round(s, 4), round(l, 2)] for t, s, l in zip(ids[concept].tolist(), share[concept].tolist(), lift[concept].tolist()) if t >= 0]
    def contexts(tokens, values):
        return [[text(row[:BEFORE]), text(row[BEFORE:BEFORE + 1]), text(row[BEFORE + 1:]), round(value, 2)]
                for row, value in zip(tokens[concept].tolist(), values[concept].tolist()) if value > -torch.inf]
    return dict(id=concept, labelled=d.labelled[concept].item(), predicted=d.predicted[concept].item(), norm=round(d.norm[concept].item(), 4),
                own=typical(d.own, d.own_share, d.own_lift), at=typical(d.at, d.at_share, d.at_lift),
                promotes=[text([t]) for t in d.promotes[concept].tolist()], suppresses=[text([t]) for t in d.suppresses[concept].tolist()],
                neighbours=[[i, round(c, 3)] for i, c in zip(d.neighbours[concept].tolist(), d.cosine[concept].tolist())],
                activations=d.activations[concept].tolist(), contexts=contexts(d.contexts, d.contexts_activation), predictions=contexts(d.predictions, d.predictions_logit))


def used(d):
    """The concepts that were ever a label or predicted, most used first."""
    use = d.labelled + d.predicted
    return use.argsort(descending=True, stable=True)[:(use > 0).sum()].tolist()


def find(entries, query):
    """The entries that go with the words of a query, best first.

    For each word: what its tokens add to the divergence (share · log lift, see `typical`) among the concept's own tokens and
    among those it stands at, a token that only contains the word, or is a part of it, of three letters at least, counting by
    their lengths' ratio; and a tenth of the share of its contexts in which the word stands. Square roots of these are
    summed, so a concept that has something of every word comes before one that has much of a single word.
    """
    def alike(token, word):
        token = token.strip().lower()
        short, long = sorted((token, word), key=len)
        return 1.0 if token == word else len(short) / len(long) if len(short) > 2 and 2 * len(short) >= len(long) and short in long else 0.0

    def score(e, word):
        tokens = sum(alike(token, word) * share * math.log(lift) for token, share, lift in e["own"] + e["at"] if lift > 1)
        return math.sqrt(tokens + 0.1 * sum(word in "".join(c[:3]).lower() for c in e["contexts"]) / CONTEXTS)

    scores = [(sum(score(e, word) for word in query.lower().split()), e) for e in entries]
    return [e for s, e in sorted(scores, key=lambda pair: -pair[0]) if s > 0]


REPORT = Path(__file__).resolve().parent / "assets/report.html"


@torch.no_grad()
def passages(content, model, concept_model, tokenizer, device, n=4, length=96):
    """n passages of held-out text, each a list of [token, [[predicted concept, logit], …], [label concept, …]]."""
    val = data.tokens_of_run(content, "val")
    length = min(length, model.config.block_size, len(val) // 2)
    batches = data.Batches(val, length, n, model.config.vocab_size, shift=False)
    x, y = (t.to(device) for t in batches[0])
    top, labels = model.concepts(x), concept_model.labels(x, y)
    values = [[[round(v, 2) for v in position] for position in row] for row in top.values[..., :concept_model.attr_k].tolist()]
    return [[[tokenizer.decode([t]), list(map(list, zip(ids, zs))), ls] for t, ids, zs, ls in zip(*row)] for row in zip(x.tolist(), top.indices.tolist(), values, labels.tolist())]


def write_report(path, run, d, entries, some_passages):
    """The dictionary as one HTML file that needs nothing else: assets/report.html with the data in it as JSON."""
    content = json.dumps(dict(run=run, tokens=d.tokens, concepts=len(d.labelled), name=NAME, contexts=CONTEXTS, edges=[round(e, 3) for e in EDGES.tolist()],
                              entries=entries, passages=some_passages), ensure_ascii=False, separators=(",", ":"))
    content = content.replace("<", "\\u003c")  # no </script> of the text ends the data
    with data.replacing(path) as file:
        file.write(REPORT.read_text(encoding="utf-8").replace("/*DATA*/", content).encode("utf-8", "replace"))


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


@dataclass(frozen=True)
class Config(LabelKeys):
    find: str | None = key(None, "words: print the concepts that go best with them")
    tokens: int | None = key(None, "training tokens for the dictionary (none: as many as the one there is, or 1,000,000)", low=1)
    top: int = key(20, "concepts to print", low=1)
    pages: int = key(4096, "concepts in the report, the most used", low=1)
    weights: bool = key(False, "the lengths of the compress matrix's columns (Figure 6c)")
    plot: str | None = key(None, "--weights: draw them into this .png, .svg or .pdf")
    write_labels: bool = key(False, "make the labels of all train tokens, as a config file of train.py (and keys over it) says")
    download: bool = key(False, "fetch GPT-2 and the published SAE of --concept_layer, and say where they lie")


def show_dictionary(path, content, cfg, device):
    """The dictionary of the run at path in the terminal: the most used concepts and where the report is, or those found."""
    model, tokenizer = load_model(content, device), data.load_tokenizer(content["tokenizer"])
    d = dictionary_of(path, content, model, device, cfg.tokens)
    entries = [entry(d, concept, tokenizer) for concept in used(d)]
    shown = entries if cfg.find is None else find(entries, cfg.find)
    if not shown:
        raise UserError(f"find={cfg.find!r}: no concept stands with these words; try a part of one, or a token such as return")
    print(f"{(d.labelled > 0).sum():,} of {len(d.labelled):,} concepts were labels, and {(d.predicted > 0).sum():,} were predicted, on {d.tokens:,} tokens of train\n")
    print(f"{'concept':>8} {'label at':>9} {'predicted':>9} {'‖W‖':>6}  stands at → comes before: its own tokens")
    for e in shown[:cfg.top if cfg.find is None else min(cfg.top, 10)]:
        at, own = (" ".join(repr(token) for token, *_ in e[kind][:5]) for kind in ("at", "own"))
        print(f"{e['id']:8} {e['labelled'] / d.tokens:9.2%} {e['predicted'] / d.tokens:9.2%} {e['norm']:6.2f}  {at}  →  {own}")
    if cfg.find is None:
        report = Path(path).parent / "concepts.html"
        write_report(report, str(Path(path).parent), d, entries[:cfg.pages], passages(content, model, of_run(content, device), tokenizer, device))
        print(f"\nreport: {report}")


def main(argv):
    cfg, rest = config.parse(Config, argv, __doc__, most=1, files="shared")
    config.picture_path(cfg.plot)
    if cfg.plot and not cfg.weights:
        raise UserError("--plot draws the lengths of --weights: give both")
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
        what = next((arg for arg in argv if arg.endswith(".py") and not arg.startswith("-")), f"--{given[0]}")
        raise UserError(f"{what} is for --write_labels; the report is of a run, with the run's own")
    path = find_checkpoint(rest[0] if rest else None)
    content = load_checkpoint(path, RUN)
    insert, mix = content["model_config"]["insert"], content["model_config"]["mix"]
    if insert != "concept" or cfg.weights and mix == "none":
        raise UserError(f"a run of method={content['train_config']['method']!r}, mix={mix!r} has no {'compress matrix' if insert == 'concept' else 'concepts'}; name a cocomix run")
    if cfg.weights:
        return show_weights(column_norms(load_model(content)), cfg.plot)
    show_dictionary(path, content, cfg, device)


if __name__ == "__main__":
    config.run(main)
