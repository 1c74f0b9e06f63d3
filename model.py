"""The GPT, and what is inserted between its blocks.

    tokens → embed → blocks 0 … insert_layer-1 → h ─┬────────────────→ interleave → the other blocks → logits
                                                    └→ concepts → ĉ ─────↑   (h_1, ĉ_1, …, h_T, ĉ_T)

- GPT-2's architecture: learned positions, pre-LayerNorm, GELU-tanh, tied head, biases optional.
- insert="concept": CoCoMix (arXiv 2502.08524). At insert_layer the model predicts concepts from its hidden
  state, compresses its prediction to one vector ĉ and mixes it in; mix says how. insert="pause": one learned
  vector stands where ĉ would (arXiv 2310.02226). insert="hidden": the concept model's hidden state is predicted
  in place of concepts. insert="none": a plain GPT.
- Concepts stay sparse, (values, indices) of the k kept: no (B, T, C) mask, no dense compress product.
- The heads' losses are computed in chunks together with their gradients: no (B, T, V) tensor lives.
- Generation with a KV cache; concepts can be read off and multiplied on the way (steering).

Shapes: B sequences, T tokens, d = n_embd, V vocabulary, C concepts, N = B·T.
"""
import ctypes
import math
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import LOCAL_RANK, UserError
from data import replacing


class TopK(NamedTuple):
    """The k largest of C numbers a row, kept sparse."""
    values: torch.Tensor   # (..., k), largest first unless `topk` was told otherwise
    indices: torch.Tensor  # (..., k) int64


class Teacher(NamedTuple):
    """Another model's next-token distribution, softmax(x @ weight.T), as a second target (knowledge distillation)."""
    x: torch.Tensor       # (B, T, d') its hidden states after the final norm
    weight: torch.Tensor  # (V or more, d') its head


class Output(NamedTuple):
    """What a forward pass gives; None where it was not asked for or does not apply."""
    logits: torch.Tensor | None = None        # (B, T, V), without targets only
    loss: torch.Tensor | None = None          # next-token loss, mean over positions, nats; with a teacher + kd_weight · kl
    concept_loss: torch.Tensor | None = None  # of what `inserted` predicts, mean over positions, nats (or a distance)
    concepts: TopK | None = None              # (B, T, concept_k) predicted concepts: logits and ids
    kl: torch.Tensor | None = None            # KL(teacher ‖ model), mean over positions, nats; without a gradient of its own


# ---------------------------------------------------------------------------------------------------
# Sparse products. S is the (N, C) matrix with values[n, k] at column indices[n, k] and zeros elsewhere.

def sparse_decode(top, weight):
    """S @ weight: the sum of the kept rows of weight (C, d), each times its value → (..., d)."""
    return _SparseDecode.apply(top.values.flatten(0, -2), top.indices.flatten(0, -2), weight).view(*top.values.shape[:-1], -1)


def gathered_dot(indices, weight, x):
    """(x @ weight.T) at the given columns alone: indices (N, k), weight (C, d), x (N, d) → (N, k).

    It is the gradient of an embedding bag for its per-sample weights, whose kernel makes no (N, k, d) gather.
    """
    N, k = indices.shape
    first = torch.arange(0, N * k, k, device=x.device)
    bag = torch.arange(N, device=x.device).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, weight.to(x.dtype), indices.flatten(), first, bag, 0).view(N, k)


def sparse_outer(top, x, n_rows):
    """S.T @ x: a row for each concept, the sum of the x at which it was kept, each times its value:
    values, indices (N, k), x (N, d) → (n_rows, d).

    Sorted by concept, each row is an embedding bag over x: no atomics, so the result does not vary.
    """
    concept, order = top.indices.flatten().sort(stable=True)
    starts = torch.searchsorted(concept, torch.arange(n_rows, device=x.device))
    return F.embedding_bag(order // top.indices.shape[-1], x, starts, mode="sum", per_sample_weights=top.values.to(x.dtype).flatten()[order])


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, weight):
        ctx.save_for_backward(values, indices, weight)
        return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values.to(weight.dtype))

    @staticmethod
    def backward(ctx, grad):
        values, indices, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (gathered_dot(indices, weight, grad).to(values.dtype) if ctx.needs_input_grad[0] else None, None,
                sparse_outer(TopK(values, indices), grad, len(weight)) if ctx.needs_input_grad[2] else None)


def topk(z, k, sorted=True):
    """z.topk(k) of (..., C); for a large C exactly, too, but faster. The k largest lie in the k groups of eight columns with the
    largest maxima; those groups are found by this same function, one level down, until few are left.

    Groups are strided (of G groups, group g holds columns g, g + G, …), so that their maxima are one pass over whole rows.
    sorted=False: in any order. Of equal values any may be taken.
    """
    C = z.shape[-1]
    G = C // 8
    if C < 1024 or C % 8 or 4 * k > G:
        return TopK(*z.topk(k, sorted=sorted))
    groups = topk(z.unflatten(-1, (8, G)).amax(-2), k, sorted=False).indices                # (..., k)
    among = (groups[..., None, :] + torch.arange(0, C, G, device=z.device)[:, None]).flatten(-2)  # (..., 8 k)
    values, at = z.gather(-1, among).topk(k, sorted=sorted)
    return TopK(values, among.gather(-1, at))


# ---------------------------------------------------------------------------------------------------
# A linear layer whose (N, C) output is only looked at: its k largest, a cross-entropy, or both.

def linear_topk(x, weight, bias, k, labels=None):
    """z = x @ weight.T + bias; (TopK of z, the label loss). The plain formula:

        values, indices = z.topk(k)
        loss = (z.logsumexp(-1) - z.gather(-1, labels).mean(-1)).mean()    # labels (..., m), each counts 1/m

    x (..., d), weight (C, d), bias (C,) or None. z is made a few rows at a time and its gradient with it, so
    memory stays at one chunk; the gradient through the kept values is sparse. Without labels the loss is None.
    """
    values, indices, loss, _ = _LinearTopK.apply(x.flatten(0, -2), weight, bias, None if labels is None else labels.flatten(0, -2), k, len(weight),
                                                 None, None, 0.0, torch.is_grad_enabled())
    shape = *x.shape[:-1], k
    return TopK(values.view(shape), indices.view(shape)), loss if labels is not None else None


def linear_cross_entropy(x, weight, targets, n_valid=None, teacher=None, kd_weight=0.0):
    """Next-token loss and, with a teacher, distillation: x (..., d), weight (V, d), targets (...) → (loss, kl). The plain formula:

        z = x @ weight[:n_valid].T
        kl = F.kl_div(z.log_softmax(-1), (teacher.x @ teacher.weight[:n_valid].T).softmax(-1), reduction="none").sum(-1).mean()
        loss = F.cross_entropy(z, targets) + kd_weight * kl

    Rows of weight from n_valid on are padding: they take no part. kl is for the log: its gradient is in that of the
    loss. Without a teacher it is None. Chunked as in `linear_topk`.
    """
    taught = (None, None) if teacher is None else (teacher.x.flatten(0, -2), teacher.weight)
    _, _, loss, kl = _LinearTopK.apply(x.flatten(0, -2), weight, None, targets.reshape(-1, 1), 0, n_valid or len(weight), *taught, kd_weight, torch.is_grad_enabled())
    return loss, kl if teacher is not None else None


def chunk_rows(device, width):
    """Rows of (rows, width) logits made at once: 8 MB stay in a CPU's cache, but 512 rows at least keep its matrix products
    fast and are worth a pass over the weight's gradient; a GPU wants larger ones."""
    return max(512, (1 << 21 if device.type == "cpu" else 1 << 28) // width)


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, labels, k, n_valid, teacher_x, teacher_weight, kd_weight, grad):
        # grad: whether gradients are wanted, since grad mode is always off in here. z becomes exp(z - max) in place, so
        # what is needed of z itself (its TopK, its values at the labels, its product with the teacher's) is taken first.
        N, C = len(x), len(weight)
        ctx.set_materialize_grads(False)
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        kl = torch.zeros_like(loss)
        values, indices = loss.new_empty(N, k), torch.empty(N, k, dtype=torch.long, device=x.device)
        wanted = [grad and labels is not None and t is not None and need for t, need in zip((x, weight, bias), ctx.needs_input_grad)]
        dx, dw, db = torch.empty_like(x, dtype=loss.dtype) if wanted[0] else None, None, None
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(low), weight.to(low)
            if teacher_x is not None:
                teacher_x, teacher_weight = teacher_x.to(low), teacher_weight.to(low)
        rows = chunk_rows(x.device, C)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, N, rows):
                chunk = slice(i, min(i + rows, N))
                z = (x[chunk] @ weight.T).to(loss.dtype)
                if bias is not None:
                    z += bias
                if k:
                    values[chunk], indices[chunk] = topk(z, k)
                if labels is None:
                    continue
                if n_valid < C:
                    z[:, n_valid:] = -torch.inf
                y = labels[chunk]
                largest, at_labels = values[chunk, :1] if k else z.amax(-1, keepdim=True), z.gather(-1, y)
                if teacher_x is not None:  # KL(p ‖ softmax(z)) = logsumexp(z) - Σ p z - H(p)
                    log_p = (teacher_x[chunk] @ teacher_weight[:n_valid].T).to(loss.dtype).log_softmax(-1)
                    p = log_p.exp()
                    kl += (p * (log_p - z[:, :n_valid])).sum()
                e = z.sub_(largest).exp_()
                total = e.sum(-1, keepdim=True)
                normaliser = (largest + total.log())[:, 0]
                loss += (normaliser - at_labels.mean(-1)).sum()
                if teacher_x is not None:
                    kl += normaliser.sum()
                if any(wanted):  # d loss / d z = (softmax(z) - 1/m at the m labels) / N; e is softmax × total, so scale rows once
                    if teacher_x is not None:  # and kd_weight · (softmax(z) - p) / N
                        e *= 1 + kd_weight
                        e[:, :n_valid] -= kd_weight * total * p
                    e.scatter_add_(-1, y, (-total / y.shape[1]).expand(y.shape))
                    scale = 1 / (total * N)
                    if wanted[2]:
                        db = _plus(db, (scale.T @ e)[0])
                    e = e.to(x.dtype)
                    if wanted[0]:
                        dx[chunk] = (e @ weight) * scale
                    if wanted[1]:
                        scaled = (x[chunk] * scale).to(x.dtype)
                        dw = (e.T @ scaled).to(loss.dtype) if dw is None else dw.addmm_(e.T, scaled) if dw.dtype == x.dtype else dw.add_(e.T @ scaled)
        ctx.save_for_backward(x, weight, indices, dx, dw, db)
        ctx.has_bias = bias is not None
        kl /= N
        ctx.mark_non_differentiable(indices, kl)
        return values, indices, loss / N + kd_weight * kl, kl

    @staticmethod
    def backward(ctx, grad_values, _, grad_loss, __):
        x, weight, indices, dx, dw, db = ctx.saved_tensors
        dx, dw, db = (None if t is None or grad_loss is None else t.mul_(grad_loss) for t in (dx, dw, db))  # in place: a second backward is an error
        if grad_values is not None and grad_values.shape[1]:
            top = TopK(grad_values, indices)
            if ctx.needs_input_grad[0]:
                dx = _plus(dx, F.embedding_bag(indices, weight, mode="sum", per_sample_weights=grad_values.to(weight.dtype)))
            if ctx.needs_input_grad[1]:
                dw = _plus(dw, sparse_outer(top, x, len(weight)))
            if ctx.has_bias and ctx.needs_input_grad[2]:
                db = _plus(db, grad_values.new_zeros(len(weight)).index_add_(0, indices.flatten(), grad_values.flatten()))
        return dx, dw, db, *[None] * 7


def _plus(total, term):
    """total + term in total's memory; a total that has not begun is None."""
    return term if total is None else total.add_(term)


# ---------------------------------------------------------------------------------------------------
# The transformer

INSERTS = ("none", "concept", "hidden", "pause")
DISTANCES = ("l1", "l2", "cos")
MIXES = ("interleave", "interleave_residual", "add", "none")


@dataclass(frozen=True)
class ModelConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    embedding_std: float = 0.02     # of the token embedding at the start
    init_std: float = 0.02          # of the other matrices: GPT-2's, for 768 features
    insert: str = "none"            # what joins the hidden states: none, concept (CoCoMix), hidden (of the concept model, predicted), pause
    mix: str = "interleave"         # how: (h_1, ĉ_1, h_2, …); interleave_residual puts h + ĉ for ĉ; add: h + ĉ; none: ĉ is dropped
    insert_layer: int = 0           # at the input of this block
    n_concepts: int = 0             # C
    concept_k: int = 32             # concepts kept before they are compressed
    hidden_size: int = 0            # insert="hidden": width of the concept model's hidden state
    distance: str = "l2"            # insert="hidden": what its prediction is trained with

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(message)
        check(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        check(self.vocab_size <= 1 << 16, f"vocab_size={self.vocab_size} is over 65536: token files are uint16")
        check(self.insert in INSERTS, f"insert={self.insert!r}: expected one of {', '.join(INSERTS)}")
        check(self.mix in MIXES, f"mix={self.mix!r}: expected one of {', '.join(MIXES)}")
        check(self.distance in DISTANCES, f"distance={self.distance!r}: expected one of {', '.join(DISTANCES)}")
        check(self.insert != "hidden" or self.hidden_size > 0, f"hidden_size={self.hidden_size}: insert='hidden' needs the width of the concept model's hidden state")
        check(self.insert != "pause" or self.mix != "none", "mix='none' with pause vectors would insert nothing: that is method='ntp'")
        if self.insert != "none":
            check(0 <= self.insert_layer < self.n_layer, f"insert_layer={self.insert_layer} is outside the stack of {self.n_layer} blocks (0 to {self.n_layer - 1})")
        if self.insert == "concept":
            check(1 <= self.concept_k <= self.n_concepts, f"concept_k={self.concept_k} concepts can't be kept of {self.n_concepts}")

    @property
    def interleaved(self):
        """Two positions a token from insert_layer on?"""
        return self.insert != "none" and self.mix.startswith("interleave")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, queries=None, cache=None, mask=None):
        B, T, d = x.shape
        if queries is None:
            q, k, v = self.c_attn(x).split(d, dim=-1)
        else:  # the other positions serve as keys and values only
            weight, bias = self.c_attn.weight, self.c_attn.bias
            q = F.linear(x[:, queries], weight[:d], None if bias is None else bias[:d])
            k, v = F.linear(x, weight[d:], None if bias is None else bias[d:]).split(d, dim=-1)
        q, k, v = (t.view(B, -1, self.n_head, d // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, d/heads)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
        several = q.shape[2] > 1  # one query alone is the last position: it sees every key
        if mask is not None:
            mask = mask[:, None] if queries is None else mask[:, None, queries]  # (B, 1, queries, keys)
        elif several and (past or queries is not None):  # query i stands at position past + i, and sees the keys up to itself
            at = torch.arange(past, past + T, device=x.device)
            mask = (at if queries is None else at[queries])[:, None] >= torch.arange(past + T, device=x.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=several and mask is None, dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).flatten(2))


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
        """(B, T, d) → (B, T, d), or the positions x[:, queries] alone: the others serve as keys only."""
        x = (x if queries is None else x[:, queries]) + self.drop(self.attn(self.ln_1(x), queries, cache, mask))
        return x + self.drop(self.mlp(self.ln_2(x)))


def normalize(h):
    """((h − μ) / (σ + 1e-5), μ, σ): a LayerNorm without gain that keeps what it removed. h (…, d); μ and σ, the mean and the
    unbiased standard deviation over features, (…, 1)."""
    mean = h.mean(-1, keepdim=True)
    centred = h - mean
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(h.shape[-1] - 1)  # h.std, in fewer passes
    return centred / (std + 1e-5), mean, std


class Wrapped(nn.Module):
    """Predict something from a hidden state h and make one vector ĉ of the prediction. With μ, σ the mean and unbiased
    standard deviation of h over its features and b one learned vector, both forms read x and write y as

        x = (h − μ) / (σ + 1e-5) − b,    ĉ = (y + b) · σ + μ

    The paper does without this wrapping; it is the official code's.
    """
    def __init__(self, config):
        super().__init__()
        self.mixes = config.mix != "none"
        self.bias = nn.Parameter(torch.zeros(config.n_embd))  # b

    def normalize(self, h):
        x, mean, std = normalize(h)
        return x - self.bias, mean, std


class Concepts(Wrapped):
    """Predict concepts from a hidden state and compress the prediction to one vector: h (B, T, d) → ĉ (B, T, d).

        z = M(x)                                              concept logits, (B, T, C)
        L = logsumexp(z) − mean over the labels i of z_i      the concept loss: cross-entropy, each label 1/attr_k
        y = W TopK(z) + b_W                                   TopK keeps values as they are, no ReLU

    x, y, ĉ: see `Wrapped`.
    """
    def __init__(self, config):
        super().__init__(config)
        self.k = config.concept_k
        self.predict = nn.Linear(config.n_embd, config.n_concepts)                       # M, b_M
        if self.mixes:
            self.compress = nn.Parameter(torch.empty(config.n_concepts, config.n_embd))  # W, a row a concept: W_:,i
            self.compress_bias = nn.Parameter(torch.zeros(config.n_embd))                # b_W
            nn.init.normal_(self.compress, std=0.02)
        nn.init.normal_(self.predict.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)

    def logits(self, h):
        """z, all C concept logits."""
        return self.predict(self.normalize(h)[0])

    def forward(self, h, labels=None, scale=None):
        """(ĉ or None if none is mixed in, the concepts kept, the concept loss or None). labels (B, T, attr_k) concepts;
        scale: steering, a factor for each z_i, (C,) or (B, 1, C); it leaves the loss out."""
        x, mean, std = self.normalize(h)
        if scale is None:
            top, loss = linear_topk(x, self.predict.weight, self.predict.bias, self.k, labels)
        else:
            top, loss = topk(self.predict(x) * scale, self.k), None
        if not self.mixes:
            return None, top, loss
        return (sparse_decode(top, self.compress) + self.compress_bias + self.bias) * std + mean, top, loss


class Hidden(Wrapped):
    """Predict the concept model's hidden state itself: an ablation of the paper (direct hidden prediction).

        g = MLP(x)                    two layers, the first 4 d wide, as in a block (the paper gives no width)
        L = distance(g, h_con)        h_con normalised as the SAE reads it; l1, l2: mean over its features; cos: 1 − cosine
        y = W g + b_W

    x, y, ĉ: see `Wrapped`.
    """
    def __init__(self, config):
        super().__init__(config)
        self.distance = config.distance
        self.predict = nn.Sequential(nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU("tanh"), nn.Linear(4 * config.n_embd, config.hidden_size))
        layers = [self.predict[0], self.predict[2]]
        if self.mixes:
            self.compress = nn.Linear(config.hidden_size, config.n_embd)
            layers.append(self.compress)
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, h, labels=None, scale=None):
        """(ĉ or None if none is mixed in, None, the distance or None). labels (B, T, hidden_size) normalised hidden states."""
        x, mean, std = self.normalize(h)
        g, loss = self.predict(x), None
        if labels is not None:
            error = g - labels
            loss = {"l1": lambda: error.abs().mean(), "l2": lambda: error.pow(2).mean(),
                    "cos": lambda: 1 - F.cosine_similarity(g, labels, dim=-1).mean()}[self.distance]()
        return (self.compress(g) + self.bias) * std + mean if self.mixes else None, None, loss


class Pause(nn.Module):
    """One learned vector for every position (arXiv 2310.02226), where ĉ would stand."""
    def __init__(self, config):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(config.n_embd))
        nn.init.normal_(self.vector, std=0.02)

    def forward(self, h, labels=None, scale=None):
        return self.vector.expand_as(h), None, None


def mix(h, c, how):
    """Bring c (B, T, d) into the hidden states h (B, T, d): (B, 2T, d) interleaved, else (B, T, d)."""
    if how == "none":
        return h
    if how == "add":
        return h + c
    return torch.stack((h, h + c if how == "interleave_residual" else c), dim=2).flatten(1, 2)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpoint_blocks = config, False
        padded = -(-config.vocab_size // 64) * 64  # to a multiple of 64: nicer tiles
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            if p.dim() >= 2:  # GPT-2's: the projections into the residual stream scaled by their number
                std = config.embedding_std if name == "wte.weight" else config.init_std
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.inserted = None  # made last, so that the rest starts the same for every method
        if config.insert != "none":
            self.inserted = {"concept": Concepts, "hidden": Hidden, "pause": Pause}[config.insert](config)

    # -- forward ------------------------------------------------------------------------------------

    def embed(self, idx, past=0, positions=None):
        """Tokens (B, T) → (B, T, d), the first at position `past`, or each at its own of `positions` (B, T)."""
        return self.drop(self.wte(idx) + (self.wpe.weight[past:past + idx.shape[1]] if positions is None else self.wpe(positions)))

    def blocks(self, x, start, stop, labels=None, scale=None, cache=None, mask=None):
        """Hidden states at the input of block `start` → those after block stop-1, and what `inserted` gave.

        (B, T, d) → (B, T, d); where the last block has run over interleaved positions, it gives the T concept
        positions alone, since nothing reads the others (they still serve as its keys). mask (B, T, T) bool: which
        tokens each one sees (none: all up to itself); only earlier ones and itself.
        """
        config, concepts, concept_loss = self.config, None, None
        for i in range(start, stop):
            if self.inserted is not None and i == config.insert_layer:
                c, concepts, concept_loss = self.inserted(x, labels, scale)
                x = mix(x, c, config.mix)  # (B, 2T, d) if interleaved
                if mask is not None and config.interleaved:  # two positions a token; the first does not see the second
                    mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).tril()
            queries = slice(1, None, 2) if config.interleaved and i == config.n_layer - 1 else None
            if self.checkpoint_blocks and torch.is_grad_enabled():  # only its input is kept; the backward runs it again
                x = checkpoint(self.h[i], x, queries, use_reentrant=False)
            else:
                x = self.h[i](x, queries, None if cache is None else cache[i], mask)
        return x, concepts, concept_loss

    def forward(self, idx, targets=None, labels=None, scale=None, teacher=None, kd_weight=0.0):
        """Tokens (B, T) → Output: the losses where there are targets (B, T), else the logits (B, T, V).

        labels: what `inserted` should predict, concepts (B, T, attr_k) or hidden states (B, T, hidden_size). scale:
        factors for the concept logits (steering). teacher: see `linear_cross_entropy`.
        """
        if idx.shape[1] > self.config.block_size:
            raise UserError(f"{idx.shape[1]} tokens are more than block_size={self.config.block_size}")
        x, concepts, concept_loss = self.blocks(self.embed(idx), 0, self.config.n_layer, labels, scale)
        if targets is None:
            return Output(self.head(x), None, concept_loss, concepts)
        loss, kl = linear_cross_entropy(self.ln_f(x), self.wte.weight, targets, self.config.vocab_size, teacher, kd_weight)
        return Output(None, loss, concept_loss, concepts, kl)

    def concepts(self, idx, scale=None):
        """The concepts predicted at each position, TopK (B, T, concept_k): tokens (B, T) through the blocks below alone."""
        below, *_ = self.blocks(self.embed(idx), 0, self.config.insert_layer)
        return self.inserted(below, scale=scale)[1]

    def head(self, x):
        """Hidden states after the last block (…, d) → logits (…, V), padding left out."""
        return self.ln_f(x) @ self.wte.weight[:self.config.vocab_size].T

    # -- counting -----------------------------------------------------------------------------------

    def num_params(self, active=False):
        """Parameters. active: of the compress matrix only the concept_k rows that a position uses count."""
        total = sum(p.numel() for p in self.parameters())
        if active and self.config.insert == "concept" and self.config.mix != "none":
            total -= (self.config.n_concepts - self.config.concept_k) * self.config.n_embd
        return total

    def flops_per_token(self, backward=True, block_size=None):
        """Floating-point operations a token needs at the least, a multiply-add as two.

        Matrix products and attention (causal, so half of the square); interleaved positions counted as two,
        the last block's queries and MLP at one; the concept head, the kept rows of the compress matrix and
        the tied head included. backward: forward and twice as much again. block_size: tokens of context (none: the model's).
        """
        c, d = self.config, self.config.n_embd
        flops = 2 * d * c.vocab_size
        for i in range(c.n_layer):
            positions = 2 if c.interleaved and i >= c.insert_layer else 1
            queries = 1 if i == c.n_layer - 1 else positions
            flops += 2 * d * d * (2 * positions + 10 * queries)  # keys and values; queries, projection and MLP
            flops += queries * 4 * d * positions * (block_size or c.block_size) // 2
        if c.insert == "concept":
            flops += 2 * d * c.n_concepts + (2 * d * c.concept_k if c.mix != "none" else 0)
        if c.insert == "hidden":
            flops += 2 * 4 * d * (d + c.hidden_size) + (2 * d * c.hidden_size if c.mix != "none" else 0)
        return flops * (3 if backward else 1)

    def activation_bytes(self, tokens, start=0, bf16=True, taught=False):
        """Bytes at the peak of a forward and backward of `tokens` tokens through the blocks from `start` on and the heads,
        beside weights and gradients: an estimate from above.

        A position in a block holds 36 d bytes until the backward under bfloat16 autocast: the residual stream twice in
        float32, then 14 d numbers for the matrix products (two LayerNorms, q, k, v, attention, GELU before and after).
        With checkpoint_blocks it holds its float32 input alone. Three positions more stand for the insertion, the heads
        and the block in which the backward is; then a chunk of logits with what is made of it (more under a teacher); then
        the heads' gradients, made in the forward and once again in the backward.
        """
        c, d = self.config, self.config.n_embd
        positions = sum(2 if c.interleaved and i >= c.insert_layer else 1 for i in range(start, c.n_layer))
        block = d * (8 + 14 * (2 if bf16 else 4))
        kept = (4 * d if self.checkpoint_blocks else block) * positions + 3 * block
        width = max(c.vocab_size, c.n_concepts)
        return tokens * kept + (36 if taught else 16) * width * min(tokens, (1 << 28) // width) + 8 * d * (c.vocab_size + c.n_concepts)

    # -- generation ---------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, scale=None, generator=None, use_cache=True):
        """Continue each of the prompts idx (B, T) → tokens (B, T + max_new_tokens).

        temperature 0 takes the likeliest token; top_k keeps that many. scale: factors for the concept logits (steering),
        (C,), or (S, 1, C) for a sweep: every prompt is then continued under each of the S, with the same luck →
        (S·B, T + max_new_tokens), the B under the first factors first. The blocks below insert_layer don't see the factors,
        so the prompts go through them once. Past block_size both ways, with the cache and without, go on from the last
        block_size // 2 tokens.
        """
        c, B, S = self.config, len(idx), len(scale) if scale is not None and scale.dim() == 3 else 1
        if S > 1:
            scale = scale.repeat_interleave(B, dim=0)
        start, cache, parting = 0, None, c.insert_layer if c.insert != "none" else 0
        for _ in range(max_new_tokens):
            if idx.shape[1] - start > c.block_size:
                start, cache = idx.shape[1] - max(1, c.block_size // 2), None
            if cache is None:
                cache, new, past = self.new_cache() if use_cache else None, idx[:, start:], 0
            else:
                new, past = idx[:, -1:], idx.shape[1] - 1 - start
            x, *_ = self.blocks(self.embed(new, past), 0, parting, cache=cache)
            if len(idx) < S * B:  # the prompts have come to where the factors part them
                idx, x = idx.repeat(S, 1), x.repeat(S, 1, 1)
                for layer in (cache or [])[:parting]:
                    layer.k, layer.v = layer.k.repeat(S, 1, 1, 1), layer.v.repeat(S, 1, 1, 1)
            x, *_ = self.blocks(x, parting, c.n_layer, scale=scale, cache=cache)
            logits, kept = self.head(x[:, -1]).float(), None
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None and top_k < c.vocab_size:
                    logits, kept = logits.topk(top_k)
                # a number drawn from 0 to 1 falls into one token's share; less the largest, a tiny temperature does not overflow
                shares = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1).cumsum(-1)
                drawn = torch.rand(B, 1, generator=generator, device=idx.device).repeat(S, 1)
                token = (shares < drawn * shares[:, -1:]).sum(-1, keepdim=True)
                token = token if kept is None else kept.gather(-1, token)
            idx = torch.cat((idx, token), dim=1)
        return idx

    def new_cache(self):
        c = self.config
        return [LayerCache(c.block_size * (2 if c.interleaved and i >= c.insert_layer else 1)) for i in range(c.n_layer)]


class LayerCache:
    """The keys and values of one block, (B, heads, positions, d/heads), filled from the left."""
    def __init__(self, positions):
        self.positions, self.length = positions, 0

    def append(self, k, v):
        if not self.length:
            self.k, self.v = (t.new_empty(*t.shape[:2], self.positions, t.shape[3]) for t in (k, v))
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


# ---------------------------------------------------------------------------------------------------
# Checkpoints and devices

RUN = ("model_config", "model", "train_config", "tokenizer", "tokenizer_hash")  # what a run's checkpoint holds at least
KINDS = dict(tokenizer=str, tokenizer_hash=str, step=int, seconds=float, val_loss=float, best_val_loss=float)  # all else in one is a dict


def save_checkpoint(path, **content):
    """Write a checkpoint whole or not at all: a temporary file, fsynced, renamed."""
    with replacing(path) as file:
        torch.save(content, file)


def find_checkpoint(run=None):
    """The path of a run's checkpoint: a folder or a file; without one, the newest under out/ (said on screen)."""
    if run is None:
        found = list(Path("out").rglob("ckpt.pt"))
        if not found:
            raise UserError("no checkpoint under out/; train one: python train.py config/stdlib_cocomix.py, or make demo")
        path = max(found, key=os.path.getmtime)
        print(f"using the newest checkpoint, {path}")
        return path
    path = Path(run) / "ckpt.pt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        if (path.parent / "sae_ckpt.pt").is_file():
            raise UserError(f"{path.parent} is an SAE's folder; name the run of a model, such as out/stdlib/cocomix")
        raise UserError(f"no checkpoint at {path}; train it first (python train.py config/…), or name another run under out/")
    return path


def read_tensors(path, what):
    """A file of torch.save as tensors and plain values, never code, on the CPU. UserError: cut short, damaged, not one."""
    try:
        if zipfile.is_zipfile(path):  # torch.save writes a checksum of each tensor, which torch.load does not look at
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(damaged)
        with warnings.catch_warnings():  # of a kind of pickle that is refused anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch and pickle raise many kinds
        raise UserError(f"{path} can't be read as {what} ({type(e).__name__}): cut short, damaged, or not one") from e


def load_checkpoint(run=None, needs=("model_config", "model")):
    """A checkpoint as a dict of tensors and plain values. UserError: none there, damaged, not of this kind."""
    path = find_checkpoint(run)
    content = read_tensors(path, "a checkpoint")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), KINDS.get(key, dict)) for key in needs):
        raise UserError(f"{path} is not a checkpoint of this kind: {', '.join(needs)} expected in it")
    return content


def load_model(content, device="cpu"):
    """The GPT of a checkpoint's content, in evaluation mode."""
    known = {f.name for f in fields(ModelConfig)}
    try:
        model = GPT(ModelConfig(**{k: v for k, v in content["model_config"].items() if k in known}))
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError) as e:
        raise UserError(f"the checkpoint's weights don't fit its model config: {str(e).splitlines()[-1].strip()}") from e
    return model.to(device).eval()


def load_optimizer(optimizer, content, path):
    """Into an optimizer, its state from a checkpoint's content. UserError: it is of other parameters."""
    try:
        optimizer.load_state_dict(content["optimizer"])
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"the optimizer's state in {path} doesn't fit the model ({type(e).__name__}: {e}); start again: --overwrite, or another --out_dir") from e


def model_checkpoint(model, **more):
    """What save_checkpoint needs of a model."""
    return dict(model_config=asdict(model.config), model=model.state_dict(), **more)


def _mps_works():
    try:
        one = torch.ones(1, 1, device="mps")
        gathered_dot(torch.zeros(1, 1, dtype=torch.long, device="mps"), one, one)
        return True
    except (NotImplementedError, RuntimeError):
        return False


def perplexity(loss):
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def pick_device(name="auto"):
    """torch.device of a name; "auto" takes CUDA, else MPS if its torch can do the sparse products, else the CPU, where the
    process keeps its memory from then on. Under torchrun "cuda" is a GPU of the process's own. UserError: it isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and _mps_works() else "cpu"
    try:
        device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32 where products are in float32
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device={name!r} is not available here ({str(e).splitlines()[0]})" + (f"; process {LOCAL_RANK} of this machine has no GPU: fewer --nproc_per_node" if LOCAL_RANK else "")) from e
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Have glibc keep what this process frees for what it allocates next, here on the CPU. By itself it gives large blocks back to
    the kernel, which hands them out again zeroed, page by page: at the 69M shapes that is a tenth of a step or more. The price is
    that resident memory stays at its peak. Other C libraries are left as they are."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)   # M_MMAP_MAX: large blocks, too, come from the heap …
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: … which never shrinks


def load_gpt(name, device="cpu"):
    """(a frozen GPT, its tokenizer's hash): "gpt2" (124M, from the hub), a folder or file of GPT-2 weights in the
    hub's layout (pytorch_model.bin, model.safetensors), or a checkpoint of ours (a run's folder or its ckpt.pt)."""
    folder = Path(name)
    weights = next((folder / f for f in ("pytorch_model.bin", "model.safetensors") if (folder / f).is_file()), folder)
    if name == "gpt2" and not folder.exists():
        weights = fetch_gpt2()
    if weights.name == "ckpt.pt" or weights.suffix not in (".bin", ".safetensors"):
        if name.startswith("gpt2-") and not folder.exists():
            raise UserError(f"{name!r}: only gpt2 is fetched by name; bring its files and name their folder")
        content = load_checkpoint(weights, ("model_config", "model", "tokenizer_hash"))
        model, tokenizer = load_model(content, device), content["tokenizer_hash"]
    else:
        model, tokenizer = _gpt2(_read_weights(weights)).to(device).eval(), "gpt2"
    return model.requires_grad_(False), tokenizer


def fetch_gpt2():
    """The path of GPT-2 124M's weights, fetched from the hub unless they are in its cache. UserError: no network, with
    what to do by hand."""
    try:
        import logging

        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news; what fails is said below
    except ImportError as e:
        raise UserError("fetching GPT-2 needs huggingface_hub: pip install datasets") from e
    file = "openai-community/gpt2", "pytorch_model.bin"
    if isinstance(cached := try_to_load_from_cache(*file), str):
        return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(*file))  # with no network it fails at once; the download would try for half a minute
        return Path(hf_hub_download(*file))
    except Exception as e:  # one of many kinds
        raise UserError(f"GPT-2 can't be fetched ({type(e).__name__}); run python concepts.py --download where there is a network, or bring "
                        "pytorch_model.bin of openai-community/gpt2 and name its folder: --concept_model=FOLDER (eval.py: --model=FOLDER)") from e


def _read_weights(path):
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    if path.suffix != ".safetensors":
        return read_tensors(path, "weights")
    try:
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError as e:
        raise UserError(f"{path} needs the safetensors package (pip install safetensors), or bring pytorch_model.bin instead") from e
    except Exception as e:
        raise UserError(f"{path} can't be read as weights ({type(e).__name__}): cut short or damaged") from e


def gpt2_state(state):
    """A state dict in GPT-2's naming → ours: the prefix dropped, Conv1D weights (in, out) transposed, mask buffers
    and the tied head left out, the embedding padded to a multiple of 64 rows."""
    out = {}
    for name, t in state.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        out[name] = t.T.contiguous() if conv else t
    out["wte.weight"] = F.pad(out["wte.weight"], (0, 0, 0, -len(out["wte.weight"]) % 64))
    return out


def _gpt2(state):
    """GPT-2 of any size, its shape read off the weights (heads of 64 features, as all of GPT-2's are)."""
    try:
        if not isinstance(state, dict):
            raise ValueError("no dict of tensors")
        vocab_size, n_embd = next(t.shape for n, t in state.items() if n.endswith("wte.weight"))
        if n_embd % 64:
            raise ValueError(f"a width of {n_embd} is no multiple of 64")
        state = gpt2_state(state)
        n_layer = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("h."))
        model = GPT(ModelConfig(block_size=len(state["wpe.weight"]), vocab_size=vocab_size, n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd))
        model.load_state_dict(state)
        return model
    except (KeyError, RuntimeError, StopIteration, ValueError, AttributeError) as e:
        raise UserError(f"these are not GPT-2's weights ({type(e).__name__}: {str(e).splitlines()[-1].strip() if str(e) else 'no wte.weight'})") from e
