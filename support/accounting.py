"""Counting: parameters, FLOPs and bytes, from the models' shapes.

FLOPs are the minimum, a multiply-add counted as two: only active concepts, only gradients that are
needed, causal attention at half the square.
"""
import math
import re

import torch

from support.device import uses_bf16

# dense, bfloat16, by torch.cuda.get_device_name without "NVIDIA" and the memory's size
PEAK_FLOPS = {"H200": 989e12, "H100 HBM3": 989e12, "H100 SXM5": 989e12, "H100 PCIe": 756e12,
              "H100 NVL": 835e12, "A100-SXM4": 312e12, "A100-PCIE": 312e12, "A100 PCIe": 312e12,
              "L40S": 362e12, "GeForce RTX 4090": 165e12, "GeForce RTX 3090": 71e12}

def peak_flops(device):
    """The device's dense bfloat16 FLOP/s, or None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return PEAK_FLOPS.get(re.sub(r"NVIDIA |[- ]\d+GB", "", name))

def num_params(model, active=False):
    """Parameters. active: count only the concept_k rows of compress that a position uses."""
    c, total = model.config, sum(p.numel() for p in model.parameters())
    if active and c.insert == "concept" and c.mix != "none":
        total -= (c.n_concepts - c.concept_k) * c.n_embd
    return total

def positions_per_token(c, i):
    """(queries, keys) of block i. Of the last block only one position per token is read."""
    keys = 2 if c.interleaved and i >= c.insert_layer else 1
    return 1 if i == c.n_layer - 1 else keys, keys

def attention_flops(c, start, block_size):
    """FLOPs per token of q·k and its product with v, causal, in the blocks from start on."""
    pairs = sum(math.prod(positions_per_token(c, i)) for i in range(start, c.n_layer))
    return 4 * c.n_embd * pairs * block_size // 2

def flops_per_token(model, backward=True, block_size=None, concept_loss=True):
    """FLOPs per token of a GPT, with its heads and the kept rows of compress. Interleaved positions
    count as two per token, except for the last block's queries and MLP. backward: add twice the
    forward; without a concept loss, the head of a mixer has a gradient for the kept concepts only.
    block_size: context length (default: the model's)."""
    c, d = model.config, model.config.n_embd
    block_size = block_size or c.block_size
    flops = 2 * d * c.vocab_size + attention_flops(c, 0, block_size)
    for i in range(c.n_layer):
        queries, keys = positions_per_token(c, i)
        flops += 2 * d * d * (2 * keys + 10 * queries)  # k, v; q, projection, MLP
    mixes, no_gradient = c.mix != "none", 0
    if c.insert == "concept":
        flops += 2 * d * (c.n_concepts + mixes * c.concept_k)
        no_gradient = 0 if concept_loss else 4 * d * (c.n_concepts - mixes * c.concept_k)
    if c.insert == "hidden":
        flops += 2 * d * (4 * (d + c.hidden_size) + mixes * c.hidden_size)
    return 3 * flops - no_gradient if backward else flops

def label_flops_per_token(concept_model, block_size=None):
    """FLOPs per token of a ConceptModel (0 for None): the lower blocks; for concepts, the encoder;
    for attribution or a teacher, upper blocks and head; for attribution, their gradient, too."""
    if concept_model is None:
        return 0
    gpt, labels = concept_model.gpt, concept_model.target == "concept"
    d, block_size = gpt.config.n_embd, block_size or gpt.config.block_size
    lower = (concept_model.layer + 1) * (24 * d ** 2 + 2 * d * block_size)
    forward = flops_per_token(gpt, backward=False, block_size=block_size)
    upper = forward - lower
    encoder = 2 * concept_model.sae.encoder.numel() if labels else 0
    if labels and concept_model.select == "attribution":
        # the gradient for activations: one product per product, but two per product of attention
        attention = attention_flops(gpt.config, concept_model.layer + 1, block_size)
        decoder = encoder if concept_model.attribution == "paper" else 0  # else the active ones
        sparse = 3 * forward - flops_per_token(gpt, block_size=block_size, concept_loss=False)
        return lower + encoder + decoder + 2 * upper + attention - sparse // 2
    return lower + encoder + (upper if concept_model.teaches else 0)

def activation_bytes(model, tokens, start=0, bf16=True, taught=False):
    """Peak bytes of a forward and backward of `tokens` tokens through the blocks from `start` on
    and the heads, without weights and their gradients: an upper estimate.

    Under bfloat16 autocast a position in a block keeps 36 d bytes for the backward: the residual
    stream twice in float32, then 14 d numbers for the matrix products (two LayerNorms, q, k, v,
    attention, GELU before and after). With checkpoint_blocks it keeps only its float32 input.
    Three more positions cover the mixer, the heads and the block that the backward is in. Added are
    one chunk of logits with what is computed from it (more with a teacher), and the heads'
    gradients, computed in the forward and copied in the backward."""
    c, d = model.config, model.config.n_embd
    doubled = c.n_layer - max(start, c.insert_layer) if c.interleaved else 0
    positions = c.n_layer - start + doubled
    block = d * (8 + 14 * (2 if bf16 else 4))
    kept = (4 * d if model.checkpoint_blocks else block) * positions + 3 * block
    width = max(c.vocab_size, c.n_concepts)
    chunk = (36 if taught else 24) * width * min(tokens, (1 << 28) // width)
    return tokens * kept + chunk + 8 * d * (c.vocab_size + c.n_concepts)

def step_bytes(model, concept_model, tokens, bf16=True):
    """Bytes that a training step on `tokens` tokens needs besides the models' weights: an upper
    estimate. 18 per parameter: the gradient (again in DDP's buckets), Adam's two moments and a
    copy in bfloat16; of the frozen model only the copy."""
    taught = concept_model is not None and concept_model.teaches
    needed = activation_bytes(model, tokens, bf16=bf16, taught=taught)
    if concept_model is not None:
        gpt = concept_model.gpt
        labels = activation_bytes(gpt, tokens, concept_model.layer + 1, bf16) + 2 * num_params(gpt)
        needed = max(needed, labels)
    return 18 * num_params(model) + needed

def micro_batch(cfg, rows, model, concept_model, device):
    """How many of a process's `rows` sequences go through the model at once: the largest divisor
    of rows within micro_batch_size. auto: what fits in 90% of a GPU's free memory by `step_bytes`,
    and at most 65,536 tokens (it is busy with these, and compiling takes longer and more memory
    with each chunk of logits); elsewhere, at most 8,192 tokens."""
    def fits(n):
        if cfg.micro_batch_size != "auto":
            return n <= cfg.micro_batch_size
        if n * cfg.block_size > (1 << 16 if device.type == "cuda" else 8192):
            return False
        if device.type != "cuda":
            return True
        freed = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + freed  # PyTorch keeps what it has freed
        bf16 = uses_bf16(cfg.dtype, device)
        return step_bytes(model, concept_model, n * cfg.block_size, bf16) <= 0.9 * free

    return max((n for n in range(1, rows + 1) if rows % n == 0 and fits(n)), default=1)
