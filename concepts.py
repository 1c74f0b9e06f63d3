"""The concept model: a frozen GPT and a sparse autoencoder that name the concepts that matter at each position.

    python concepts.py out/stdlib/cocomix            # the concepts a run was trained with: how often, on what

For tokens and their targets, with h the hidden state after block concept_layer:

    c = SAE's active concepts of h                              sparse, k of C
    g = ∂(mean next-token loss) / ∂h                            h left as it is, weights frozen
    a_i = c_i · ⟨W_dec,i, g⟩                                    attribution, at the active i
    labels = the attr_k largest a_i                             concepts whose growth would raise the loss

The lower blocks run without gradients, the upper ones with the gradient for h alone.
"""
from collections import Counter
from dataclasses import dataclass

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch

import data
from config import UserError, key
from model import RUN, TopK, gathered_dot, linear_cross_entropy, load_checkpoint, load_gpt, pick_device
from sae import check_layer, hidden_states, load_sae, normalize


class ConceptModel:
    """GPT + SAE → labels (B, T, attr_k).

    select        attribution, or activation: the attr_k strongest concepts
    attribution   code: a_i over the active concepts, as above; paper: over all C, with the values before TopK (eq. 1)
    sign          raise: the largest a_i (paper and code); lower: the largest -a_i; abs: the largest |a_i|
    bf16          the GPT's matrix products in bfloat16 (the SAE's stay in float32)
    """
    def __init__(self, gpt, sae, layer, attr_k=4, select="attribution", attribution="code", sign="raise", bf16=False):
        check_layer(gpt, layer)
        among = sae.k if select == "activation" or attribution == "code" else len(sae.encoder)
        if attr_k > among:
            raise UserError(f"attr_k={attr_k} labels can't be chosen among {among} concepts")
        self.gpt, self.sae, self.layer, self.bf16 = gpt, sae, layer, bf16
        self.attr_k, self.select, self.attribution, self.sign = attr_k, select, attribution, sign

    def labels(self, idx, targets):
        """The concepts to predict at each position: tokens and targets (B, T) → (B, T, attr_k) int64, best first.

        Attribution in the code's form chooses among concepts above 0; where fewer than attr_k are, the best stands again.
        """
        with torch.autocast(idx.device.type, enabled=False):  # the same precision wherever this is called from
            h = hidden_states(self.gpt, idx, self.layer, self.bf16)
            x = normalize(h)[0].to(self.sae.encoder.dtype)
            with torch.no_grad():
                active = self.sae.encode(x)
            if self.select == "activation":
                return active.indices[..., :self.attr_k]
            grad = self.loss_gradient(h, targets)
            if self.attribution == "paper":
                return torch.stack([self._signed(a).topk(self.attr_k).indices for a in self._attributions_of_all(x, grad)])
            scores = self._signed(self.attributions(active, grad).values).masked_fill(active.values <= 0, -torch.inf)
            best = scores.topk(self.attr_k)
            labels = active.indices.gather(-1, best.indices)
            return torch.where(best.values == -torch.inf, labels[..., :1], labels)

    def loss_gradient(self, h, targets):
        """g = ∂(mean next-token loss) / ∂h, for hidden states h (B, T, d) after block `layer` → (B, T, d)."""
        with torch.enable_grad(), torch.autocast(h.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            h = h.detach().requires_grad_()
            end = self.gpt.blocks(h, self.layer + 1, self.gpt.config.n_layer)[0]
            loss = linear_cross_entropy(self.gpt.ln_f(end), self.gpt.wte.weight, targets, self.gpt.config.vocab_size)
        return torch.autograd.grad(loss, h)[0].to(self.sae.decoder.dtype)

    def attributions(self, active, grad):
        """a_i = c_i · ⟨W_dec,i, g⟩ at the active concepts: TopK (B, T, k), g (B, T, d) → the same with a for c."""
        dots = gathered_dot(active.indices.flatten(0, -2), self.sae.decoder, grad.flatten(0, -2))
        return TopK(active.values * dots.view(active.values.shape), active.indices)

    @torch.no_grad()
    def _attributions_of_all(self, x, grad):
        """Eq. 1: c_pre in place of c, all C concepts; one sequence (T, C) at a time."""
        for x_row, g_row in zip(x, grad):
            yield self.sae.preactivations(x_row) * (g_row @ self.sae.decoder.T)

    def _signed(self, a):
        return {"raise": a, "lower": -a, "abs": a.abs()}[self.sign]

    def flops_per_token(self, block_size=None):
        """Operations to make a token's labels, in a context of block_size tokens: the whole forward, the SAE's encoder, and, for attribution, the upper
        blocks' and the head's gradient for their inputs."""
        d, block_size = self.gpt.config.n_embd, block_size or self.gpt.config.block_size
        forward = self.gpt.flops_per_token(backward=False, block_size=block_size)
        upper = forward - (self.layer + 1) * (24 * d ** 2 + 2 * d * block_size)
        if self.select == "activation":
            forward, upper = forward - upper, 0
        return forward + upper + self.sae.flops_per_token()


def load_concept_model(concept_model, sae, layer, device, **choices):
    """(ConceptModel, its tokenizer's hash) from the keys `concept_model`, `sae` and `concept_layer`."""
    gpt, tokenizer = load_gpt(concept_model, device)
    check_layer(gpt, layer)  # before an SAE is looked for there
    return ConceptModel(gpt, load_sae(sae, layer, gpt.config.n_embd, device, gpt), layer, **choices), tokenizer


def of_run(content, device):
    """The ConceptModel that a checkpoint's run was trained with; None for a method without one."""
    t = content["train_config"]
    if t["method"] != "cocomix":
        return None
    return load_concept_model(t["concept_model"], t["sae"], t["concept_layer"], device, attr_k=t["attr_k"], select=t["select"],
                              attribution=t["attribution"], sign=t["attribution_sign"], bf16=device.type == "cuda" and t["dtype"] != "float32")[0]


# ---------------------------------------------------------------------------------------------------
# The report

@dataclass(frozen=True)
class Config:
    tokens: int = key(65536, "tokens of val to look at", low=1)
    top: int = key(20, "concepts to print", low=1)
    device: str = key("auto", "cpu, cuda, mps; auto takes the fastest there is")


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


def main(argv):
    cfg, runs = config.parse(Config, argv, __doc__, most=1, files=False)
    device = pick_device(cfg.device)
    content = load_checkpoint(runs[0] if runs else None, RUN)
    concept_model = of_run(content, device)
    if concept_model is None:
        raise UserError(f"a run of method {content['train_config']['method']!r} has no concepts; name a cocomix run")
    tokenizer = data.load_tokenizer(content["tokenizer"])
    count, at, then = use(concept_model, content, cfg.tokens, device)
    total = count.total() / concept_model.attr_k
    show = lambda counter: "  ".join(repr(tokenizer.decode([t])) for t, _ in counter.most_common(6))
    print(f"{len(count):,} of {len(concept_model.sae.encoder):,} concepts were labels on {total:,.0f} tokens of val\n")
    print(f"{'concept':>8} {'label at':>9}  at the tokens (most first) → before the tokens")
    for concept, n in count.most_common(cfg.top):
        print(f"{concept:8} {n / total:9.2%}  {show(at[concept])}  →  {show(then[concept])}")


if __name__ == "__main__":
    config.run(main)
