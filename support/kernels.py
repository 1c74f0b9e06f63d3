"""Fast paths: attention, sparse products, TopK in stages, heads whose loss comes with its gradient.

Each function equals the plain formula in its docstring; the tests hold the two equal in float64.
Shapes: N positions, d features, C concepts, V vocabulary.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

class TopK(NamedTuple):
    """The k largest of C numbers per row, kept sparse."""
    values: torch.Tensor   # (..., k), largest first unless `topk` was told otherwise
    indices: torch.Tensor  # (..., k) int64

class Teacher(NamedTuple):
    """Another model's next-token distribution, softmax(x @ weight.T), as a second target (KD)."""
    x: torch.Tensor       # (B, T, d') its hidden states after the final norm
    weight: torch.Tensor  # (V or more, d') its head

def normalize(h):
    """(x, μ, σ) with x = (h - μ) / (σ + 1e-5): h (…, d); μ and σ (…, 1), its mean and unbiased
    standard deviation over the features. A LayerNorm without gain that keeps what it removed."""
    mean = h.mean(-1, keepdim=True)
    centred = h - mean
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(h.shape[-1] - 1)
    return centred / (std + 1e-5), mean, std

# Attention

def skips_mask(device):
    """Whether causal attention of some queries computes all of them and then takes some, rather
    than these alone under a mask. Both are exact. A mask saves 2 d² FLOPs per position left out but
    rules out flash attention, so a GPU does without. (Not measured yet: results/gpu.py will.)"""
    return device.type == "cuda"

def pads_heads(device):
    """Whether `attention` pads heads to a width divisible by 8."""
    return device.type == "cuda"

def attention(q, k, v, mask=None, causal=False, dropout=0.0):
    """F.scaled_dot_product_attention of q, k, v (B, heads, positions, width).

    A GPU's kernels for masks or float32 need aligned rows, which widths divisible by 8 have; others
    fall back to the plain formula, whose weights (B, heads, positions, positions) fill the memory.
    Zeros change nothing: widths are padded with them."""
    width = q.shape[-1]
    needed = width % 8 and (mask is not None or q.dtype == torch.float32)
    if needed and pads_heads(q.device):
        q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                                       scale=1 / math.sqrt(width))
    return y[..., :width]

# Sparse products. S is the (N, C) matrix with values[n, k] in column indices[n, k], else zero.

def sparse_decode(top, weight):
    """S @ weight: the kept rows of weight (C, d), each times its value, summed → (..., d)."""
    values, indices = top.values.flatten(0, -2), top.indices.flatten(0, -2)
    return _SparseDecode.apply(values, indices, weight).view(*top.values.shape[:-1], -1)

def embedding_sum(values, indices, weight):
    """Σ_k values[n, k] · weight[indices[n, k]]: values, indices (N, k), weight (C, d) → (N, d)."""
    return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values.to(weight.dtype))

def gathered_dot(indices, weight, x):
    """(x @ weight.T) at the given columns only: indices (N, k), weight (C, d), x (N, d) → (N, k).
    The kernel, an embedding bag's gradient for its weights, makes no (N, k, d) gather."""
    N, k = indices.shape
    first = torch.arange(0, N * k, k, device=x.device)
    bag = torch.arange(N, device=x.device).repeat_interleave(k)
    weight, flat = weight.to(x.dtype), indices.flatten()
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(x, weight, flat, first, bag, 0).view(N, k)

def sparse_outer(top, x, n_rows):
    """S.T @ x: for each concept the sum of the x that kept it, each times its value:
    values, indices (N, k), x (N, d) → (n_rows, d). Sorted by concept, each row is an embedding bag
    over x: no atomics, so the result is deterministic."""
    concept, order = top.indices.flatten().sort(stable=True)
    starts = torch.searchsorted(concept, torch.arange(n_rows, device=x.device))
    values = top.values.to(x.dtype).flatten()[order]
    rows = order // top.indices.shape[-1]
    longest = longest_bag(x.device)
    if longest is None:
        return F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=values)
    cuts = longest * torch.arange(1, len(rows) // longest + 1, device=x.device)
    pieces = torch.cat((starts, cuts)).sort().values
    sums = F.embedding_bag(rows, x, pieces, mode="sum", per_sample_weights=values)
    first_piece = torch.searchsorted(cuts, starts) + torch.arange(n_rows, device=x.device)
    return F.embedding_bag(torch.arange(len(pieces), device=x.device), sums, first_piece,
                           mode="sum")

def longest_bag(device):
    """Entries of an embedding bag that are summed one after the other; None: all. A GPU waits for
    the longest bag, and half of all positions may keep the same concept."""
    return 1024 if device.type == "cuda" else None

class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, weight):
        ctx.save_for_backward(values, indices, weight)
        return embedding_sum(values, indices, weight)

    @staticmethod
    def backward(ctx, grad):
        values, indices, weight = ctx.saved_tensors
        grad, d_values, d_weight = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            d_values = gathered_dot(indices, weight, grad).to(values.dtype)
        if ctx.needs_input_grad[2]:
            d_weight = sparse_outer(TopK(values, indices), grad, len(weight))
        return d_values, None, d_weight

def topk(z, k, sorted=True):
    """z.topk(k) of (..., C); exact, and faster where C is large.

    The k largest lie in the k groups of eight columns with the largest maxima. This same function
    finds those groups, one level down, until few are left. Groups are strided (of G groups, group g
    holds columns g, g + G, …), so their maxima take one pass over whole rows. sorted=False: in any
    order. Among equal values any may be taken."""
    C = z.shape[-1]
    G = C // 8
    if C < 1024 or C % 8 or 4 * k > G:
        return TopK(*z.topk(k, sorted=sorted))
    groups = topk(z.unflatten(-1, (8, G)).amax(-2), k, sorted=False).indices  # (..., k)
    columns = groups[..., None, :] + torch.arange(0, C, G, device=z.device)[:, None]
    columns = columns.flatten(-2)                                             # (..., 8 k)
    values, at = z.gather(-1, columns).topk(k, sorted=sorted)
    return TopK(values, columns.gather(-1, at))

# Linear heads. The (N, C) logits are only needed for their k largest, for a cross-entropy, or both.

def linear_topk(x, weight, bias, k, labels=None):
    """(TopK of z, label loss) for z = x @ weight.T + bias. The plain formula:

        values, indices = z.topk(k)
        loss = (z.logsumexp(-1) - z.gather(-1, labels).mean(-1)).mean()    # labels (..., m)

    x (..., d), weight (C, d), bias (C,) or None. Only a few rows of z exist at a time; their
    gradient is computed with them. The gradient through the kept values is sparse. Without labels
    the loss is None."""
    flat_labels = None if labels is None else labels.flatten(0, -2)
    values, indices, loss, _ = _Head.apply(
        x.flatten(0, -2), weight, bias, flat_labels, k, len(weight),
        None, None, 0.0, torch.is_grad_enabled())
    shape = *x.shape[:-1], k
    return TopK(values.view(shape), indices.view(shape)), None if labels is None else loss

def linear_cross_entropy(x, weight, targets, n_valid=None, teacher=None, kd_weight=0.0):
    """(next-token loss, kl or None): x (..., d), weight (V, d), targets (...). The plain formula:

        z = x @ weight[:n_valid].T
        p = (teacher.x @ teacher.weight[:n_valid].T).softmax(-1)
        kl = F.kl_div(z.log_softmax(-1), p, reduction="none").sum(-1).mean()
        loss = F.cross_entropy(z, targets) + kd_weight * kl

    Rows of weight from n_valid on are padding and take no part. kl is for the log; its gradient is
    part of the loss's. Without a teacher kl is None. Chunked as in `linear_topk`."""
    assert x.shape[:-1] == targets.shape, f"{x.shape[:-1]} positions for targets {targets.shape}"
    taught = (None, None) if teacher is None else (teacher.x.flatten(0, -2), teacher.weight)
    _, _, loss, kl = _Head.apply(
        x.flatten(0, -2), weight, None, targets.reshape(-1, 1), 0, n_valid or len(weight),
        *taught, kd_weight, torch.is_grad_enabled())
    return loss, None if teacher is None else kl

def chunk_rows(device, width):
    """Rows of (rows, width) logits computed at once. 8 MB stay in a CPU's cache, but at least 512
    rows keep its matrix products fast; a GPU wants larger ones."""
    return max(512, (1 << 21 if device.type == "cpu" else 1 << 28) // width)

class _Head(torch.autograd.Function):
    """Logits in chunks: their TopK, their loss and its gradient, all computed in the forward."""
    @staticmethod
    def forward(ctx, x, weight, bias, labels, k, n_valid, teacher_x, teacher_weight, kd_weight,
                grad):  # whether gradients are wanted: grad mode is always off in here
        N, C = len(x), len(weight)
        ctx.set_materialize_grads(False)
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        kl = torch.zeros_like(loss)
        values = loss.new_empty(N, k)
        indices = torch.empty(N, k, dtype=torch.long, device=x.device)
        wanted = [grad and labels is not None and need for need in ctx.needs_input_grad[:3]]
        grads = _Gradients(x, wanted, loss.dtype)
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(low), weight.to(low)
            if teacher_x is not None:
                teacher_x, teacher_weight = teacher_x.to(low), teacher_weight.to(low)
        rows = chunk_rows(x.device, C)
        columns = None if x.is_cuda else n_valid  # a GPU is faster with the padding
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
                largest = values[chunk, :1] if k else z.amax(-1, keepdim=True)
                p = None
                if teacher_x is not None:
                    teacher_z = teacher_x[chunk] @ teacher_weight[:columns].T
                    log_p = teacher_z[:, :n_valid].to(loss.dtype).log_softmax(-1)
                    p = log_p.exp()
                    kl += (p * (log_p - z[:, :n_valid])).sum()  # KL = this + Σ logsumexp(z)
                e, total, normaliser, chunk_loss = _softmax_loss_(z, largest, labels[chunk])
                loss += chunk_loss
                if p is not None:
                    kl += normaliser.sum()
                if any(wanted):
                    _logits_gradient_(e, total, labels[chunk], p, kd_weight)
                    grads.add(chunk, e, 1 / (total * N), x, weight)
        ctx.save_for_backward(x, weight, indices, grads.x, grads.weight, grads.bias)
        kl /= N
        ctx.mark_non_differentiable(indices, kl)
        return values, indices, loss / N + kd_weight * kl, kl

    @staticmethod
    def backward(ctx, grad_values, _indices, grad_loss, _kl):
        x, weight, indices, dx, dw, db = ctx.saved_tensors
        if grad_loss is None:
            dx = dw = db = None
        # in place, so a second backward is an error
        dx, dw, db = (None if t is None else t.mul_(grad_loss) for t in (dx, dw, db))
        if grad_values is not None and grad_values.shape[1]:
            if ctx.needs_input_grad[0]:
                dx = _plus(dx, embedding_sum(grad_values, indices, weight))
            if ctx.needs_input_grad[1]:
                dw = _plus(dw, sparse_outer(TopK(grad_values, indices), x, len(weight)))
            if ctx.needs_input_grad[2]:
                zeros = grad_values.new_zeros(len(weight))
                db = _plus(db, zeros.index_add_(0, indices.flatten(), grad_values.flatten()))
        return dx, dw, db, *[None] * 7

def _softmax_loss_(z, largest, y):
    """z (rows, C) becomes e = exp(z - largest) in place → (e, its row sums (rows, 1),
    logsumexp(z) (rows,), the summed cross-entropy of the labels y (rows, m), each 1/m)."""
    at_labels = z.gather(-1, y)
    e = z.sub_(largest).exp_()
    total = e.sum(-1, keepdim=True)
    normaliser = (largest + total.log())[:, 0]
    return e, total, normaliser, (normaliser - at_labels.mean(-1)).sum()

def _logits_gradient_(e, total, y, p, kd_weight):
    """e = total · softmax(z) becomes total · N · (d loss / d z) in place, with

        d loss / d z = (softmax(z) - 1/m at the m labels + kd_weight · (softmax(z) - p)) / N"""
    if p is not None:
        e *= 1 + kd_weight
        e[:, :p.shape[1]] -= kd_weight * total * p
    e.scatter_add_(-1, y, (-total / y.shape[1]).expand(y.shape))

class _Gradients:
    """The gradients for x, weight and bias, summed over chunks; None where not wanted."""
    def __init__(self, x, wanted, dtype):
        self.wanted, self.dtype, self.weight, self.bias = wanted, dtype, None, None
        self.x = torch.empty_like(x, dtype=dtype) if wanted[0] else None

    def add(self, chunk, e, scale, x, weight):
        """e · scale: the gradient of the chunk's logits; e (rows, C), scale (rows, 1)."""
        if self.wanted[2]:
            self.bias = _plus(self.bias, (scale.T @ e)[0])
        e = e.to(x.dtype)
        if self.wanted[0]:
            self.x[chunk] = (e @ weight) * scale
        if self.wanted[1]:
            scaled = (x[chunk] * scale).to(x.dtype)
            if self.weight is None:
                self.weight = (e.T @ scaled).to(self.dtype)
            elif self.weight.dtype == x.dtype:
                self.weight.addmm_(e.T, scaled)
            else:
                self.weight.add_(e.T @ scaled)

def _plus(total, term):
    """total + term in total's memory; total may be None."""
    return term if total is None else total.add_(term)
