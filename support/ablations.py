"""Mixers of the paper's ablations and baselines, and which settings of a model make sense."""
from support.runtime import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.kernels import normalize

INSERTS = ("none", "concept", "hidden", "pause")
INTERLEAVED = ("interleave", "interleave_residual")  # mixes with two positions per token
MIXES = (*INTERLEAVED, "add", "none")
DISTANCES = ("l1", "l2", "cos")

def check_model_config(c):
    """UserError if the settings of a ModelConfig contradict each other."""
    def check(ok, message):
        if not ok:
            raise UserError(message)
    check(c.n_embd % c.n_head == 0, f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}")
    check(c.vocab_size <= 1 << 16, f"vocab_size={c.vocab_size} is over 65536: tokens are uint16")
    for name, known in (("insert", INSERTS), ("mix", MIXES), ("distance", DISTANCES)):
        value = getattr(c, name)
        check(value in known, f"{name}={value!r}: expected one of {', '.join(known)}")
    check(c.insert != "hidden" or c.hidden_size > 0,
          f"hidden_size={c.hidden_size}: insert='hidden' needs the concept model's width")
    check(c.insert != "pause" or c.mix != "none",
          "mix='none' with pause vectors would insert nothing: that is method='ntp'")
    check(c.insert == "none" or 0 <= c.insert_layer < c.n_layer,
          f"insert_layer={c.insert_layer} is outside the stack of {c.n_layer} blocks (0 to "
          f"{c.n_layer - 1})")
    check(c.insert != "concept" or 1 <= c.concept_k <= c.n_concepts,
          f"concept_k={c.concept_k} concepts cannot be kept of {c.n_concepts}")

class HiddenMixer(nn.Module):
    """Predict the concept model's hidden state instead of concepts (the paper's Figure 6b).

        g = MLP(x);  L = distance(g, h_con);  ĉ = (W g + b_W + b) · σ + μ     x, b: see ConceptMixer

    h_con is normalised as for the SAE. l1, l2: mean over features; cos: 1 - cosine."""
    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.distance, self.mixes = config.distance, config.mix != "none"
        self.pre_bias = nn.Parameter(torch.zeros(d))
        self.predict = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, config.hidden_size))
        if self.mixes:
            self.compress = nn.Linear(config.hidden_size, d)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, h, labels=None, scale=None):
        """labels (B, T, hidden_size) normalised hidden states, or None."""
        x, mean, std = normalize(h)
        g, loss = self.predict(x - self.pre_bias), None
        if labels is not None and self.distance == "cos":
            loss = 1 - F.cosine_similarity(g, labels, dim=-1).mean()
        elif labels is not None:
            error = g - labels
            loss = error.abs().mean() if self.distance == "l1" else error.pow(2).mean()
        c = (self.compress(g) + self.pre_bias) * std + mean if self.mixes else None
        return c, None, loss

class PauseMixer(nn.Module):
    """One learned vector at every position (arXiv 2310.02226)."""
    def __init__(self, config):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(config.n_embd))
        nn.init.normal_(self.vector, std=0.02)

    def forward(self, h, labels=None, scale=None):
        return self.vector.expand_as(h), None, None
