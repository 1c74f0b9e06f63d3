"""Text generation with a key/value cache, plain or under several steering scales at once."""
import torch

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
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, scale=None, generator=None,
             use_cache=True):
    """Continue prompts idx (B, T) → tokens (B, T + max_new_tokens).

    temperature 0: greedy. top_k: sample from the k most likely tokens. scale: steering, a factor
    for each concept logit, (C,); or (S, 1, C) for a sweep: all B prompts under one scale after the
    other, with the same random numbers → (S·B, T + max_new_tokens); lower blocks read them once.
    Text beyond block_size is continued from its last block_size // 2 tokens, cache or not."""
    c, B, S = model.config, len(idx), 1
    if scale is not None and scale.dim() == 3:
        S, scale = len(scale), scale.repeat_interleave(B, dim=0)
    start, cache = 0, None  # of the context window
    for _ in range(max_new_tokens):
        if idx.shape[1] - start > c.block_size:
            start, cache = idx.shape[1] - max(1, c.block_size // 2), None
        if cache is None:
            cache = new_cache(c) if use_cache else None
            new, past = idx[:, start:], 0
        else:
            new, past = idx[:, -1:], idx.shape[1] - 1 - start
        h = model.forward_blocks(model.embed(new, past), 0, c.insert_at, cache=cache)
        if len(idx) < S * B:  # first step of a sweep: from here on the scales differ
            idx, h = idx.repeat(S, 1), h.repeat(S, 1, 1)
            if cache is not None:
                for layer in cache[:c.insert_at]:
                    layer.repeat(S)
        h = model.forward_blocks(model.mix(h, scale=scale).h, c.insert_at, c.n_layer, cache=cache)
        logits = model.head(h[:, -1]).float()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            uniform = torch.rand(B, 1, generator=generator, device=idx.device).repeat(S, 1)
            token = draw(logits, temperature, top_k, uniform)
        idx = torch.cat((idx, token), dim=1)
    return idx
