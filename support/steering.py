"""Measured steering: how often a concept's typical next tokens appear, and what it costs."""
import math

from support.runtime import progress

import torch

from support.concept_index import NAME
from support.curves import new_figure, perplexity, save_figure
from support.engine import generate
from support.tokens import Batches

FACTORS = (-10.0, -5.0, -2.0, 0.0, 1.0, 2.0, 5.0, 10.0)  # 1: not steered
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 16, 64
LOSS_TOKENS = 2048  # of val, for the perplexity

def choose_concepts(index, n=None):
    """The n concepts that the run predicts most often, of those with typical next tokens."""
    order = index.predicted.argsort(descending=True, stable=True).tolist()
    return [c for c in order if index.predicted[c] and index.next_tokens[c, 0] >= 0][:n]

def scales(variants, n_concepts, device):
    """[{concept: factor}] → a factor for each concept logit, (variants, 1, C)."""
    scale = torch.ones(len(variants), 1, n_concepts, device=device)
    for row, factors in zip(scale, variants, strict=True):
        for concept, factor in factors.items():
            row[0, concept] = factor
    return scale

@torch.no_grad()
def steering(models, index, val, device, n_concepts):
    """Steer {name: model} by the n_concepts concepts of an index that its run predicts most.

    The starts of val blocks are continued at temperature 1, with the same random numbers under all
    factors. Returns rows of model, concept, factor; next_tokens, how many of the generated `tokens`
    are among the concept's NAME typical ones; and loss, nats per token on LOSS_TOKENS of val,
    steered too. A factor's strength depends on the model: compare next_tokens at equal perplexity.
    """
    chosen, C, rows = choose_concepts(index, n_concepts), len(index.predicted), []
    block_size = min(model.config.block_size for model in models.values())
    for name, model in models.items():
        blocks = Batches(val, block_size, 1, model.config.vocab_size, shift=False, split="val")
        n_prompts, n_loss = min(PROMPTS, blocks.blocks), -(-LOSS_TOKENS // block_size)
        prompts = torch.cat([blocks[i][0][:, :PROMPT_TOKENS] for i in range(n_prompts)]).to(device)
        held_out = [[t.to(device) for t in blocks[i]] for i in range(min(n_loss, blocks.blocks))]
        with progress(len(chosen), f"steer {name}", "concept", leave=False) as bar:
            for concept in chosen:
                scale = scales([{concept: factor} for factor in FACTORS], C, device)
                random = torch.Generator(device).manual_seed(concept)
                texts = generate(model, prompts, NEW_TOKENS, scale=scale, generator=random)
                typical = index.next_tokens[concept, :NAME].to(device)
                hits = torch.isin(texts[:, prompts.shape[1]:], typical).view(len(FACTORS), -1)
                for hit, one, factor in zip(hits, scale, FACTORS, strict=True):
                    losses = [model(x, y, scale=one).loss.item() for x, y in held_out]
                    rows.append(dict(model=name, concept=concept, factor=factor,
                                     next_tokens=hit.sum().item(), tokens=len(hit),
                                     loss=sum(losses) / len(losses)))
                bar.update()
    return rows

def steering_summary(rows):
    """Rows of `steering` → one per model and factor, averaged over the concepts.

    rate: share of typical next tokens. gain: geometric mean of (n + 1) / (n at factor 1, + 1);
    gain_error: its first-order standard error, None for one concept. raised: share of concepts with
    more of them.
    """
    groups, summary = {}, []
    for row in rows:
        groups.setdefault((row["model"], row["factor"]), []).append(row)
    for (name, factor), some in groups.items():
        steered, plain = (torch.tensor([row["next_tokens"] + 1 for row in group]).double().log()
                          for group in (some, groups[name, 1.0]))
        logs = steered - plain
        gain = logs.mean().exp().item()
        error = gain * logs.std().item() / math.sqrt(len(logs)) if len(logs) > 1 else None
        rate = sum(row["next_tokens"] / row["tokens"] for row in some) / len(some)
        loss = sum(row["loss"] for row in some) / len(some)
        summary.append(dict(model=name, factor=factor, rate=rate, gain=gain,
                            gain_error=error, perplexity=perplexity(loss),
                            raised=(logs > 0).double().mean().item()))
    return summary

STEERING = (("model", "model", "{}"), ("factor", "factor", "{:g}"),
            ("rate", "next tokens", "{:.2%}"), ("gain", "× unsteered", "{:.2f}"),
            ("gain_error", "± s.e.", "{:.2f}"), ("raised", "concepts raised", "{:.0%}"),
            ("perplexity", "val perplexity", "{:.1f}"))

def plot_steering(path, summary):
    """Gain by factor, perplexity by factor, gain by perplexity. Returns the path written."""
    figure, axes = new_figure(1, 3, 13, 4)
    gain, cost = "typical next tokens, × unsteered", "val perplexity, % above unsteered"
    style = dict(marker="o", markersize=4)
    for name in dict.fromkeys(row["model"] for row in summary):
        factors, gains, errors, perplexities = torch.tensor([
            [row[key] or 0.0 for key in ("factor", "gain", "gain_error", "perplexity")]
            for row in summary if row["model"] == name], dtype=torch.float64).T
        costs = 100 * (perplexities / perplexities[factors == 1] - 1)
        axes[0].errorbar(factors, gains, errors, capsize=2, label=name, **style)
        axes[1].plot(factors, costs, **style)
        shown = costs > 0  # the axis is logarithmic
        points = factors[shown], costs[shown], gains[shown]
        axes[2].errorbar(*points[1:], errors[shown], capsize=2, linestyle="none", **style)
        for factor, *at in zip(*points, strict=True):
            axes[2].annotate(f"{factor:g}", at, (5, 4), textcoords="offset points", fontsize=8)
    for axis, x, y in zip(axes, ("factor", "factor", cost), (gain, cost, gain), strict=True):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[2].set_xscale("log")
    axes[0].legend(frameon=False)
    return save_figure(figure, path)
