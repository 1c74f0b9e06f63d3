"""Hidden states of a frozen GPT: what its SAE reads and is trained on."""
from support.runtime import UserError

import torch

from support.device import uses_bf16
from support.kernels import normalize

@torch.no_grad()
def hidden_states(gpt, idx, layer, bf16=False):
    """The residual stream after block `layer`: tokens (B, T) → (B, T, d)."""
    with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=bf16):
        return gpt.forward_blocks(gpt.embed(idx), 0, layer + 1)

class HiddenStates:
    """Shuffled, normalised hidden states of a concept model, a pure function of (seed, step).

    Tokens are drawn as in training; the states of `buffer` batches are shuffled together."""
    def __init__(self, gpt, cfg, batches, device):
        self.gpt, self.cfg, self.batches, self.device = gpt, cfg, batches, device
        self._round = None

    def __getitem__(self, step):
        c = self.cfg
        number, within = divmod(step, c.buffer)
        if self._round != number:
            tokens_at_once = self.batches.batch_size * self.batches.block_size
            per_round = -(-c.buffer * c.batch_size // tokens_at_once)
            states = []
            for i in range(number * per_round, (number + 1) * per_round):
                x = self.batches[i][0].to(self.device)
                h = hidden_states(self.gpt, x, c.concept_layer, uses_bf16("auto", self.device))
                states.append(normalize(h)[0].flatten(0, 1).float())
            states = torch.cat(states)
            generator = torch.Generator().manual_seed(c.seed * 1_000_003 + number)
            order = torch.randperm(len(states), generator=generator)
            self._states, self._round = states[order.to(self.device)], number
        return self._states[within * c.batch_size:(within + 1) * c.batch_size]

def check_layer(gpt, layer):
    """UserError unless block `layer` of a concept model has a block above it and no mixer below."""
    c = gpt.config
    if not 0 <= layer < c.n_layer - 1:
        raise UserError(f"concept_layer={layer} must leave a block above it: choose 0 to "
                        f"{c.n_layer - 2}, as the concept model has {c.n_layer} blocks")
    if c.insert != "none" and layer >= c.insert_layer:
        raise UserError(f"concept_layer={layer} is above the concept model's own mixer, at the "
                        f"input of block {c.insert_layer}: choose a layer below it, or a plain GPT")

def geometric_median(x, steps=100):
    """The point with the smallest summed distance to the rows of x (N, d) → (d,) (Weiszfeld)."""
    point = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-8)
        new = (weight[:, None] * x).sum(0) / weight.sum()
        if (new - point).norm() < 1e-6 * (1 + point.norm()):
            return new
        point = new
    return point
