"""The concept model: a frozen GPT and its SAE choose the concepts that matter at each position.

    python concepts.py out/stdlib/cocomix                       # list concepts, write concepts.html
    python concepts.py out/stdlib/cocomix --find "raise error"   # the best match for these words
    python concepts.py out/stdlib/cocomix --weights              # how much each concept is used
    python concepts.py config/stdlib_cocomix.py --write_labels   # store all labels for training
    python concepts.py --download                                # fetch GPT-2 and its SAE

For tokens and the next tokens, with h the hidden state after block concept_layer:

    c = the SAE's active concepts of h (c_pre: before TopK)    sparse, k of C
    g = ∂(mean next-token loss) / ∂h                           weights frozen
    a_i = c_i · ⟨W_dec,i, g⟩                                   attribution, at the active i (eq. 1)
    labels = the attr_k largest a_i                            if they grew, the loss would most
"""
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Literal, NamedTuple

from support.runtime import UserError, run  # before torch

import torch
import torch.nn as nn

from model import GPT, load_gpt, load_model
from sae import load_sae
from support import published, report
from support.activations import check_layer, hidden_states
from support.checkpoint import RUN, check_models, find_checkpoint, load_checkpoint, relocate
from support.cli import key, parse
from support.concept_index import column_norms
from support.device import pick_device, uses_bf16
from support.kernels import Teacher, TopK, gathered_dot, linear_cross_entropy, normalize, topk
from support.labels import write_all
from support.tokens import tokenizer_of_run

SELECTS = ("attribution", "activation")  # how ConceptModel._label chooses

class Targets(NamedTuple):
    """What the concept model says about a batch; None where it was not asked."""
    labels: torch.Tensor | None = None  # (B, T, attr_k) concepts, or (B, T, d) hidden states
    teacher: Teacher | None = None      # its next-token distribution (KD)
    active: TopK | None = None          # (B, T, k) the SAE's active concepts

class ConceptModel:
    """A frozen GPT and its SAE (None where no concepts are needed).

    target        what labels are: concept, (B, T, attr_k); hidden, the normalised hidden state;
                  pause or none, no labels
    select        attribution, or activation: the attr_k most active concepts
    attribution   code: a_i at the active concepts; paper: at all C, with c_pre for c (eq. 1)
    sign          raise: the largest a_i (paper and code); lower: the largest -a_i; abs: |a_i|
    teaches       whether its next-token distribution is needed too
    bf16          the GPT's matrix products in bfloat16 (the SAE's: float32, TF32 on a GPU)
    """
    def __init__(self, gpt, sae, layer, attr_k=4, select="attribution", attribution="code",
                 sign="raise", target="concept", teaches=False, bf16=False, compile=False):
        if target in ("concept", "hidden"):
            check_layer(gpt, layer)
        if target == "concept":
            all_compete = select == "attribution" and attribution == "paper"
            candidates = len(sae.encoder) if all_compete else sae.k
            assert attr_k <= candidates, f"attr_k={attr_k} labels: only {candidates} candidates"
        self.gpt, self.sae, self.layer, self.bf16, self.compile = gpt, sae, layer, bf16, compile
        self.attr_k, self.select, self.attribution, self.sign = attr_k, select, attribution, sign
        self.target, self.teaches = target, teaches
        if compile:  # everything but autograd.grad, which it cannot trace
            for name in ("_lower", "_upper", "_choose"):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    @torch.no_grad()
    def concept_targets(self, idx, y, teaches=None):
        """Tokens and the next tokens y (B, T) → Targets, from one forward pass."""
        teaches = self.teaches if teaches is None else teaches
        labels = normed = teacher = None
        with torch.autocast(idx.device.type, enabled=False):  # self.bf16 alone sets the precision
            h, x, active = self._lower(idx)
            if self.target == "hidden":
                labels = x
            elif self.target == "concept":
                labels, normed = self._label(h, x, active, y)
            if teaches:
                normed = self._upper(h)[0] if normed is None else normed
                teacher = Teacher(normed, self.gpt.wte.weight)
        return Targets(labels, teacher, active)

    def labels(self, idx, y):
        """(B, T, attr_k) int64 label concepts, best first; or the hidden states (B, T, d)."""
        return self.concept_targets(idx, y, teaches=False).labels

    def distribution_only(self):
        """The same model asked for its next-token distribution only: steps need no labels."""
        return ConceptModel(self.gpt, None, self.layer, target="none", teaches=True, bf16=self.bf16,
                            compile=self.compile)

    def _lower(self, idx):
        """Tokens (B, T) → (h after block `layer`, h normalised, its active concepts or None)."""
        h = hidden_states(self.gpt, idx, self.layer, self.bf16)
        x = normalize(h)[0].to(self.gpt.wte.weight.dtype)
        return h, x, self.sae.encode(x) if self.target == "concept" else None

    def _label(self, h, x, active, y):
        """→ (label concepts (B, T, attr_k), the state after ln_f if it was computed)."""
        if self.select == "activation":
            return self._active(active), None
        assert self.select == "attribution", f"select={self.select!r} is not in _label"
        grad, normed = self.loss_gradient(h, y)
        return self._choose(x, active, grad), normed

    def _upper(self, h, y=None):
        """h after block `layer` → (hidden state after ln_f, mean next-token loss if y is given)."""
        loss = None
        with torch.autocast(h.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            normed = self.gpt.ln_f(self.gpt.finish(h, self.layer + 1)[0])
            if y is not None:
                loss, _ = linear_cross_entropy(normed, self.gpt.wte.weight, y,
                                               self.gpt.config.vocab_size)
        return normed.detach(), loss

    def loss_gradient(self, h, y):
        """h after block `layer` (B, T, d) → (∂(mean next-token loss) / ∂h, state after ln_f)."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            normed, loss = self._upper(h, y)
        return torch.autograd.grad(loss, h)[0].to(self.gpt.wte.weight.dtype), normed

    def _choose(self, x, active, grad):
        """Label concepts (B, T, attr_k) by attribution, best first (eq. 1)."""
        if self.attribution == "paper":  # all C compete, with c_pre; (T, C) at a time
            rows = [self.sae.preactivations(x_row) * (grad_row @ self.sae.decoder.T)
                    for x_row, grad_row in zip(x, grad, strict=True)]
            return torch.stack([self._signed(a).topk(self.attr_k).indices for a in rows])
        a = self._signed(self.attributions(active, grad).values)
        best = a.masked_fill(active.values <= 0, -torch.inf).topk(self.attr_k).indices
        return self._active(TopK(*(t.gather(-1, best) for t in active)))

    def _active(self, top):
        """The first attr_k concepts; where fewer are active (or none), the first is repeated."""
        values, indices = (t[..., :self.attr_k] for t in top)
        return torch.where(values > 0, indices, indices[..., :1])

    def attributions(self, active, grad):
        """a_i = c_i · ⟨W_dec,i, g⟩: active TopK (B, T, k), g (B, T, d) → TopK with a for c."""
        indices = active.indices.flatten(0, -2)
        dots = gathered_dot(indices, self.sae.decoder, grad.flatten(0, -2))
        return TopK(active.values * dots.view(active.values.shape), active.indices)

    def _signed(self, a):
        return {"raise": a, "lower": -a, "abs": a.abs()}[self.sign]

def load_concept_model(cfg, device, target="concept", teaches=False, compile=False):
    """(ConceptModel, its tokenizer's hash) from a Config with the label keys."""
    gpt, tokenizer = load_gpt(cfg.concept_model, device)
    layer = cfg.concept_layer if target in ("concept", "hidden") else -1  # below all
    sae = None
    if target == "concept":
        check_layer(gpt, layer)
        published.check_fits(cfg.sae, cfg.concept_model)
        sae = load_sae(cfg.sae, layer, gpt.config.n_embd, device, gpt)
    return ConceptModel(gpt, sae, layer, cfg.attr_k, cfg.select, cfg.attribution,
                        cfg.attribution_sign, target, teaches, uses_bf16(cfg.dtype, device),
                        compile), tokenizer

class SteeredSAE(nn.Module):
    """An SAE in place of a mixer: the frozen concept model is steered as a CoCoMix model is.

        c = ReLU(TopK(c_pre));  c' = ReLU(TopK(s · c_pre));  h ← h + (W_dec c' - W_dec c) · σ

    The factors s act before TopK, as CoCoMix's act on z; for active concepts and factors of at
    least 1 this is the paper's s_i · c_i. What the SAE cannot reconstruct of h is kept.
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
        change = self.sae.decode(steered) - self.sae.decode(plain)
        return change.to(h.dtype) * std, steered, None

def steerable(concept_model):
    """A concept model's GPT with SteeredSAE as its mixer; the weights are shared."""
    gpt, sae = concept_model.gpt, concept_model.sae
    if gpt.config.insert != "none":
        raise UserError("the concept model has a mixer of its own and cannot be steered; "
                        "--model=run steers the run only")
    settings = replace(gpt.config, insert="concept", mix="add", n_concepts=len(sae.encoder),
                       insert_layer=concept_model.layer + 1, concept_k=sae.k)
    with torch.device("meta"):
        steered = GPT(settings)
    for name in ("wte", "wpe", "drop", "h", "ln_f"):
        setattr(steered, name, getattr(gpt, name))
    steered.mixer = SteeredSAE(sae)
    return steered.eval()

@dataclass(frozen=True)
class LabelConfig:
    """What labels depend on, and where they are computed; train.py has these keys, too."""
    dataset: str = key("openwebtext", "a name under data/, or the path of a dataset")
    block_size: int = key(1024, "context length in tokens", low=1)
    concept_model: str = key("gpt2", "names the concepts: a run, GPT-2 weights, or gpt2")
    sae: str = key("openai", "its SAE: a run of sae.py, a published .pt, openai or openai_128k")
    concept_layer: int = key(5, "the SAE reads the hidden state after this block", low=0)
    attr_k: int = key(4, "label concepts per position", low=1)
    select: Literal[SELECTS] = key("attribution", "how labels are selected")
    attribution: Literal["code", "paper"] = key("code", "among active concepts, or all (eq. 1)")
    attribution_sign: Literal["raise", "lower", "abs"] = key("raise", "labels' effect on the loss")
    device: str = key("auto", "cpu, cuda, cuda:1 or mps; auto: the fastest available")
    dtype: Literal["auto", "float32", "bfloat16"] = key("auto", "auto: bfloat16 on A100 and newer")

@dataclass(frozen=True)
class Config(LabelConfig):
    find: str = key("", "words: print the concepts that match them best")
    tokens: int | None = key(None, "training tokens to index (none: any index, else 1M)", low=1)
    top: int = key(20, "concepts to print", low=1)
    pages: int = key(4096, "concepts in the report, the most used", low=1)
    weights: bool = key(False, "the norms of the compress matrix's columns (Figure 6c)")
    plot: str | None = key(None, "--weights: draw them to this .png, .svg or .pdf")
    out_dir: str | None = key(None, "folder for concepts.pt and concepts.html (none: the run's)")
    overwrite: bool = key(False, "replace a concepts.pt or .html that is something else")
    write_labels: bool = key(False, "store the labels of all train tokens for a train.py config")
    download: bool = key(False, "fetch GPT-2 and the published SAE of --concept_layer")

LABEL_KEYS = [f.name for f in fields(LabelConfig)]

def concept_model_of_run(content, device, **other_keys):
    """The ConceptModel that a checkpoint's run learned from, or None if it learned no concepts;
    other_keys replace some of the run's. UserError: it is missing, or another is in its place."""
    target = content["model_config"]["insert"]
    if target not in ("concept", "hidden"):
        return None
    trained = {k: v for k, v in content["train_config"].items() if k in LABEL_KEYS}
    concept_model, _ = load_concept_model(Config(**trained | other_keys), device, target)
    check_models(content, concept_model)
    return concept_model

def main(argv):
    cfg, rest = parse(Config, argv, __doc__, most=1, files="shared")
    report.check_arguments(cfg, rest, argv, LABEL_KEYS)
    if cfg.download:
        return published.download(cfg.sae, cfg.concept_layer)
    device = pick_device(cfg.device)
    if cfg.write_labels:
        return write_all(*load_concept_model(cfg, device), cfg, device)
    path = find_checkpoint(rest[0] if rest else None, cfg.out_dir)
    content = load_checkpoint(path, RUN)
    report.check_run(content, cfg.weights)
    relocate(content, cfg)
    model = load_model(content, device)
    if cfg.weights:
        return report.show_weights(column_norms(model), cfg.plot)
    run_concept_model = cache(partial(concept_model_of_run, content, device))
    report.show_index(path, content, model, tokenizer_of_run(content), cfg,
                      run_concept_model, device)

if __name__ == "__main__":
    run(main)
