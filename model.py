"""The GPT, and the mixer in the middle of its stack (CoCoMix, arXiv 2502.08524).

    tokens → embed → lower blocks → h ─┬────────────────→ interleave → upper blocks → logits
                                       └→ concepts → ĉ ─────↑   (h_1, ĉ_1, …, h_T, ĉ_T)

    z = M(h)                                                concept logits, length C
    L_concept = logsumexp(z) - mean of z_i over the labels  (eq. 2)
    ĉ = W TopK(z) + b_W                                     (eq. 3)
    total = next-token loss, read at the ĉ positions, + λ L_concept    (eq. 4, train.step_losses)

GPT-2's architecture: learned positions, pre-LayerNorm, GELU-tanh, tied head, optional biases.
Other mixers (support/ablations.py) insert a pause vector or a predicted hidden state; a plain GPT
has none. TopK(z) is sparse: values and indices of a vector of C that is zero elsewhere.

Shapes: B sequences, T tokens, d = n_embd, V vocabulary, C concepts.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support import kernels, published
from support.ablations import INTERLEAVED, HiddenMixer, PauseMixer, check_model_config
from support.checkpoint import load_weights
from support.kernels import TopK, linear_cross_entropy, linear_topk, normalize, sparse_decode, topk

class Output(NamedTuple):
    """A forward pass; None where not asked for or not applicable."""
    logits: torch.Tensor | None        # (B, T, V), only without targets
    loss: torch.Tensor | None          # next-token loss (+ kd_weight · kl), mean, nats
    concept_loss: torch.Tensor | None  # L_concept, mean, nats (hidden: its distance)
    concepts: TopK | None              # (B, T, concept_k) predicted concepts: logits and ids
    kl: torch.Tensor | None = None     # KL(teacher ‖ model), mean, nats; for the log, no gradient

class Mixed(NamedTuple):
    h: torch.Tensor                    # (B, 2T, d) interleaved, else (B, T, d)
    concepts: TopK | None              # (B, T, concept_k)
    concept_loss: torch.Tensor | None

@dataclass(frozen=True)
class ModelConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    embedding_std: float = 0.02  # initial std of the token embedding
    init_std: float = 0.02       # … of the blocks' matrices and wpe; the mixer's is always 0.02
    insert: str = "none"         # the mixer: concept (CoCoMix), hidden, pause, or none
    mix: str = "interleave"      # (h_1, ĉ_1, …); interleave_residual: h + ĉ for ĉ; add: h + ĉ; none
    insert_layer: int = 0        # the mixer sits at the input of this block
    n_concepts: int = 0          # C
    concept_k: int = 32          # predicted concepts kept by TopK
    hidden_size: int = 0         # insert="hidden": width of the concept model
    distance: str = "l2"         # insert="hidden": its loss

    __post_init__ = check_model_config

    @property
    def interleaved(self):
        """Whether the upper blocks see two positions per token."""
        return self.insert != "none" and self.mix in INTERLEAVED

    @property
    def insert_at(self):
        """The first upper block; n_layer for a plain GPT, which has no upper blocks."""
        return self.n_layer if self.insert == "none" else self.insert_layer

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, queries=None, cache=None, mask=None):
        """x (B, P, d), P positions → (B, P, d), or only its positions `queries` (a slice). cache: a
        KVCache that holds the positions before x. mask (B, P, P) bool: true where a query (row)
        sees a key; default: causal."""
        B, P, d = x.shape
        read = slice(None)
        causal = cache is None and mask is None
        if queries is not None and causal and kernels.skips_mask(x.device):
            queries, read = None, queries  # attention at all positions, of which these are read
        if queries is None:
            q, k, v = self.c_attn(x).split(d, dim=-1)
        else:  # the other positions are keys and values only
            weight, bias = self.c_attn.weight, self.c_attn.bias
            q_bias, kv_bias = (None, None) if bias is None else (bias[:d], bias[d:])
            q = F.linear(x[:, queries], weight[:d], q_bias)
            k, v = F.linear(x, weight[d:], kv_bias).split(d, dim=-1)
        q, k, v = (t.view(B, -1, self.n_head, d // self.n_head).transpose(1, 2) for t in (q, k, v))
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
        several = q.shape[2] > 1  # a single query is the last position: it sees every key
        if mask is not None:
            mask = mask[:, None] if queries is None else mask[:, None, queries]
        elif several and (past or queries is not None):  # query i is position past + i
            at = torch.arange(past, past + P, device=x.device)
            rows = at if queries is None else at[queries]
            mask = rows[:, None] >= torch.arange(past + P, device=x.device)
        y = kernels.attention(q, k, v, mask, several and mask is None,
                              self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2)[:, read].flatten(2))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, queries=None, cache=None, mask=None):
        """(B, T, d) → (B, T, d), or only x[:, queries]; the others then serve as keys."""
        residual = x if queries is None else x[:, queries]
        x = residual + self.drop(self.attn(self.ln_1(x), queries, cache, mask))
        return x + self.drop(self.mlp(self.ln_2(x)))

# The mixer: forward(h, labels, scale) → (ĉ (B, T, d) or None, concepts or None, loss or None)

class ConceptMixer(nn.Module):
    """Predict concepts from h and compress the prediction to one vector (eqs. 2 and 3).

        x = normalize(h) - b;  z = M x + b_M;  ĉ = (W TopK(z) + b_W + b) · σ + μ

    TopK keeps values as they are, without ReLU. The paper omits normalisation and b; the official
    code has both. compress is W.T: its row i, W's column i, is concept i's vector.
    """
    def __init__(self, config):
        super().__init__()
        self.k, self.mixes = config.concept_k, config.mix != "none"
        self.pre_bias = nn.Parameter(torch.zeros(config.n_embd))                         # b
        self.predict = nn.Linear(config.n_embd, config.n_concepts)                       # M, b_M
        if self.mixes:
            self.compress = nn.Parameter(torch.empty(config.n_concepts, config.n_embd))  # W.T
            self.compress_bias = nn.Parameter(torch.zeros(config.n_embd))                # b_W
            nn.init.normal_(self.compress, std=0.02)
        nn.init.normal_(self.predict.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)

    def forward(self, h, labels=None, scale=None):
        """labels (B, T, attr_k) concepts, or None. scale: steering, one factor per concept logit,
        (C,) or (B, 1, C); there is no loss then."""
        x, mean, std = normalize(h)
        x = x - self.pre_bias
        if scale is None:
            top, loss = linear_topk(x, self.predict.weight, self.predict.bias, self.k, labels)
        else:
            top, loss = topk(self.predict(x) * scale, self.k), None
        if not self.mixes:
            return None, top, loss
        compressed = sparse_decode(top, self.compress) + self.compress_bias
        return (compressed + self.pre_bias) * std + mean, top, loss

MIXERS = {"concept": ConceptMixer, "hidden": HiddenMixer, "pause": PauseMixer}

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpoint_blocks = config, False
        padded = -(-config.vocab_size // 64) * 64  # to a multiple of 64: faster products
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                std = config.embedding_std if name == "wte.weight" else config.init_std
                if name.endswith("c_proj.weight"):  # two per block add to the residual stream
                    std = std / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # last, so that with one seed all methods start from the same blocks
        self.mixer = MIXERS[config.insert](config) if config.insert != "none" else None

    def embed(self, idx, past=0, positions=None):
        """Tokens (B, T) → (B, T, d); the first is at position `past`, or each at its own of
        `positions` (B, T)."""
        at = self.wpe.weight[past:past + idx.shape[1]] if positions is None else self.wpe(positions)
        return self.drop(self.wte(idx) + at)

    def forward_blocks(self, x, start, stop, cache=None, mask=None):
        """x at the input of block `start` → after block stop-1.

        Nothing reads the h positions after the last block, so that of an interleaved model returns
        the T ĉ positions only. mask (B, P, P) bool: what each position sees (default: causal).
        """
        c = self.config
        for i in range(start, stop):
            queries = slice(1, None, 2) if c.interleaved and i == c.n_layer - 1 else None
            if self.checkpoint_blocks and torch.is_grad_enabled():  # recomputed in the backward
                x = checkpoint(self.h[i], x, queries, None, mask, use_reentrant=False)
            else:
                x = self.h[i](x, queries, None if cache is None else cache[i], mask)
        return x

    def mix(self, h, labels=None, scale=None):
        """h (B, T, d) at the input of block insert_at → Mixed, that block's input."""
        if self.mixer is None:
            return Mixed(h, None, None)
        c, concepts, loss = self.mixer(h, labels, scale)
        how = self.config.mix
        if how == "add":
            h = h + c
        elif how == "interleave":
            h = torch.stack((h, c), dim=2).flatten(1, 2)
        elif how == "interleave_residual":
            h = torch.stack((h, h + c), dim=2).flatten(1, 2)
        else:
            assert how == "none", f"mix={how!r} is not in GPT.mix"
        return Mixed(h, concepts, loss)

    def finish(self, h, start, labels=None, scale=None):
        """`forward` from h (B, T, d) at the input of block start ≤ insert_at: (h_final, Mixed)."""
        h = self.forward_blocks(h, start, self.config.insert_at)         # lower blocks
        mixed = self.mix(h, labels, scale)                               # mixer
        h_final = self.forward_blocks(mixed.h, self.config.insert_at, self.config.n_layer)  # upper
        return h_final, mixed

    def forward(self, idx, targets=None, labels=None, scale=None, teacher=None, kd_weight=0.0):
        """Tokens (B, T) → Output: losses with targets (B, T), else logits.

        labels: what the mixer should predict, concepts (B, T, attr_k) or hidden states
        (B, T, hidden_size). scale: steering (see ConceptMixer). teacher: see linear_cross_entropy.
        """
        c = self.config
        assert idx.shape[1] <= c.block_size, (
            f"{idx.shape[1]} tokens are more than block_size={c.block_size}")
        h = self.forward_blocks(self.embed(idx), 0, c.insert_at)            # lower blocks
        mixed = self.mix(h, labels, scale)                                  # mixer
        h_final = self.forward_blocks(mixed.h, c.insert_at, c.n_layer)      # upper blocks, no ln_f
        if targets is None:
            return Output(self.head(h_final), None, mixed.concept_loss, mixed.concepts)
        loss, kl = linear_cross_entropy(self.ln_f(h_final), self.wte.weight, targets,
                                        c.vocab_size, teacher, kd_weight)
        return Output(None, loss, mixed.concept_loss, mixed.concepts, kl)

    def concepts(self, idx, scale=None):
        """The concepts predicted at each token, TopK (B, T, concept_k); lower blocks only."""
        h = self.forward_blocks(self.embed(idx), 0, self.config.insert_at)
        return self.mixer(h, scale=scale)[1]

    def head(self, x):
        """Final hidden states (…, d) → logits (…, V), without the padding."""
        return self.ln_f(x) @ self.wte.weight[:self.config.vocab_size].T

def load_model(content, device="cpu"):
    """The GPT of a checkpoint's content, in evaluation mode."""
    return load_weights(GPT, ModelConfig, content, device)

def load_gpt(name, device="cpu"):
    """(frozen GPT, its tokenizer's hash). name: "gpt2" (124M, from the hub), a folder or file of
    GPT-2 weights in the hub's layout, or a run of ours (its folder or ckpt.pt)."""
    content = published.read_model(name)
    return load_model(content, device).requires_grad_(False), content["tokenizer_hash"]
