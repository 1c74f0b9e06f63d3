"""Text generation with a key/value cache, plain or under several steering scales at once."""
import codecs
from copy import copy

import torch

from support.kernels import TopK

class KVCache:
    """Keys and values of one block, (B, heads, positions, d/heads), filled from the left."""
    def __init__(self, positions):
        self.positions, self.length = positions, 0

    def append(self, k, v):
        """Add new keys and values; returns all of them so far."""
        if not self.length:
            shape = (*k.shape[:2], self.positions, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def repeat(self, times):
        self.k, self.v = self.k.repeat(times, 1, 1, 1), self.v.repeat(times, 1, 1, 1)

def new_cache(config):
    """One KVCache per block; interleaved blocks hold two positions per token."""
    upper = config.block_size * (2 if config.interleaved else 1)
    return [KVCache(upper if i >= config.insert_at else config.block_size)
            for i in range(config.n_layer)]

def draw(logits, temperature, top_k, uniform):
    """Sample tokens (rows, 1) from logits (rows, V) with random numbers from 0 to 1, (rows, 1)."""
    kept = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, kept = logits.topk(top_k)
    # subtracting the maximum keeps a tiny temperature from overflowing
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    cumulative = scaled.softmax(-1).cumsum(-1)
    token = (cumulative < uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    return token if kept is None else kept.gather(-1, token)

@torch.no_grad()
def read(model, idx, use_cache=True):
    """The lower blocks' reading of idx (B, T ≤ block_size): (h at insert_at, the KVCaches)."""
    cache = new_cache(model.config) if use_cache else None
    return model.forward_blocks(model.embed(idx), 0, model.config.insert_at, cache=cache), cache

@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, scale=None, generator=None,
           use_cache=True, stop=None, prompt=None):
    """Continue prompts idx (B, T): yields the next tokens, (B, 1), max_new_tokens times.

    temperature 0: greedy. top_k: sample from the k most likely tokens. scale: steering, a factor
    for each concept logit, (C,); or (S, 1, C) for a sweep: all B prompts under one scale after the
    other, with the same random numbers → (S·B, 1); lower blocks read the prompts once. stop: a row
    that has drawn this token repeats it; the end once all have. prompt: read(model, idx), if known.
    Text beyond block_size is continued from its last block_size // 2 tokens, cache or not."""
    c, B, S = model.config, len(idx), 1
    if scale is not None and scale.dim() == 3:
        S, scale = len(scale), scale.repeat_interleave(B, dim=0)
    ended = torch.zeros(S * B, 1, dtype=torch.bool, device=idx.device)
    start, cache = 0, None  # of the context window
    if prompt is not None:  # the copies are filled from here on
        h, cache = prompt[0], [copy(layer) for layer in prompt[1]]
    for i in range(max_new_tokens):
        if idx.shape[1] - start > c.block_size:
            start, cache = idx.shape[1] - max(1, c.block_size // 2), None
        if cache is None:
            h, cache = read(model, idx[:, start:], use_cache)
        elif i:
            new = model.embed(idx[:, -1:], idx.shape[1] - 1 - start)
            h = model.forward_blocks(new, 0, c.insert_at, cache=cache)
        if len(idx) < S * B:  # first step of a sweep: from here on the scales differ
            idx, h = idx.repeat(S, 1), h.repeat(S, 1, 1)
            for layer in cache[:c.insert_at] if use_cache else ():
                layer.repeat(S)
        h = model.forward_blocks(model.mix(h, scale=scale).h, c.insert_at, c.n_layer, cache=cache)
        logits = model.head(h[:, -1]).float()
        if temperature < 1e-30:  # 0 in float32
            token = logits.argmax(-1, keepdim=True)
        else:
            uniform = torch.rand(B, 1, generator=generator, device=idx.device).repeat(S, 1)
            token = draw(logits, temperature, top_k, uniform)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended |= token == stop
        yield token
        if stop is not None and ended.all():
            return
        idx = torch.cat((idx, token), dim=1)

def generate(model, idx, *args, **options):
    """`stream` at once: prompts idx (B, T) → tokens (S·B, at most T + max_new_tokens)."""
    tokens = list(stream(model, idx, *args, **options))
    return torch.cat((idx.repeat(len(tokens[0]) // len(idx), 1), *tokens), dim=1)

def decoder(tokenizer):
    """A function: a text's next token → the characters that it completes."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    return lambda token: decode(tokenizer.decode_single_token_bytes(token))

@torch.no_grad()
def concepts_at(model, idx, scale=None):
    """The concepts predicted at each token of idx (1, T), TopK (1, T, k), each from at least half a
    block of context where T exceeds block_size."""
    size, parts = model.config.block_size, []
    half = size // 2
    for start in range(0, max(1, idx.shape[1] - half), size - half):
        top = model.concepts(idx[:, start:start + size], scale)
        parts.append([t[:, half if start else 0:] for t in top])
    return TopK(*(torch.cat(t, dim=1) for t in zip(*parts, strict=True)))
