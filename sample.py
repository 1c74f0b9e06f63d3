"""Generate text, watch the concepts, turn them.

    python sample.py out/stdlib/ntp --start="def main("            # continue a prompt (--start=FILE:path reads one)
    python sample.py out/stdlib/cocomix --inspect                  # each new token with its strongest predicted concepts
    python sample.py out/stdlib/cocomix --steer                    # plain beside steered; the concepts chosen by itself
    python sample.py out/stdlib/cocomix --steer=17:6,204:-8        # by these: concept 17 times 6, concept 204 times -8

Steering multiplies a concept's logit z_i before TopK, at every position (the paper's factors: -10 … 10).
"""
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch

import data
from config import UserError, key
from model import RUN, load_checkpoint, load_model, pick_device


@dataclass(frozen=True)
class Config:
    start: str = key("", "the prompt: text, or FILE:path (none: a new document)")
    num_samples: int = key(1, "texts to generate", low=1)
    max_new_tokens: int = key(100, "tokens a text", low=1)
    temperature: float = key(0.8, "0 takes the likeliest token; 1 samples as the model says", low=0)
    top_k: int | None = key(200, "sample among so many likeliest tokens (none: all)", low=1)
    seed: int = key(1337, "of the sampling", low=0, high=2**32 - 1)
    steer: str | None = key(None, "ID:FACTOR,ID:FACTOR; alone: three concepts that the model uses often", bare="auto", follows=r"-?\d+:")
    inspect: bool = key(False, "print each new token's strongest predicted concepts")
    tokens: int = key(32768, "tokens of val from which --steer alone learns which concepts are used", low=256)
    device: str = key("auto", "cpu, cuda, mps; auto takes the fastest there is")


def parse_steer(text, n_concepts):
    """"17:6,204:-8" → {17: 6.0, 204: -8.0}. UserError: not of this form, no such concept, not finite."""
    factors = {}
    for part in text.split(","):
        name, colon, factor = part.partition(":")
        try:
            concept, value = int(name), float(factor)
        except ValueError:
            raise UserError(f"steer={part!r}: expected ID:FACTOR, such as 17:6") from None
        if not 0 <= concept < n_concepts:
            raise UserError(f"steer={part!r}: the model has concepts 0 to {n_concepts - 1}")
        if not abs(value) <= 1000:  # NaN too
            raise UserError(f"steer={part!r}: the factor must be a number from -1000 to 1000; the paper's are -10 to 10")
        factors[concept] = value
    return factors


def scale_of(factors, n_concepts, device):
    """{concept: factor} → the factors of all concept logits, (C,)."""
    scale = torch.ones(n_concepts, device=device)
    for concept, factor in factors.items():
        scale[concept] = factor
    return scale


@torch.no_grad()
def usage(model, content, tokens, device, strongest=4):
    """Which concepts the model predicts (its `strongest` at each position) on val, and before which tokens:
    (how often each, {concept: Counter of the next token}, share of each token)."""
    count, then, overall = Counter(), {}, Counter()
    for x, y in data.sequential(data.tokens_of_run(content, "val")[:tokens + 1], model.config.block_size, 8, model.config.vocab_size):
        out = model(x.to(device), y.to(device))
        top = out.concepts.indices[..., :strongest].flatten(0, -2).tolist()
        following = y.flatten().tolist()
        overall.update(following)
        for row, token in zip(top, following):
            for concept in row:
                count[concept] += 1
                then.setdefault(concept, Counter())[token] += 1
    total = sum(overall.values())
    return count, then, {token: n / total for token, n in overall.items()}


@torch.no_grad()
def choose(model, tokenizer, idx, content, tokens, device, n=3, candidates=32, factors=(-8.0, 8.0)):
    """Concepts to show: of the often used, the n that steer best.

    A concept's own tokens are the five with a letter and the highest lift: how much more often they follow where the
    model predicts it than elsewhere. It steers well where a factor raises the share of the model's next-token
    probability, at the prompt's last position, that its own tokens take. → [(concept, factor, own tokens)]
    """
    count, then, share = usage(model, content, tokens, device)
    trials = []
    for concept, used in count.most_common(candidates):
        enough = [t for t, m in then[concept].items() if m >= 5 and any(c.isalpha() for c in tokenizer.decode([t]))]
        own = sorted(enough, key=lambda t: then[concept][t] / used / share[t] * math.log1p(then[concept][t]), reverse=True)[:5]
        if own:
            trials += [(concept, factor, own) for factor in factors]
    if not trials:
        raise UserError("the model predicts no concept often enough to choose one; name some: --steer=ID:FACTOR")

    def next_token(scale=None, rows=1):  # probabilities at the last position, (rows, V)
        x = model.blocks(model.embed(idx.expand(rows, -1)), 0, model.config.n_layer, scale=scale)[0]
        return model.head(x[:, -1]).softmax(-1)

    plain, gains = next_token()[0], []
    for i in range(0, len(trials), 8):
        scale = torch.stack([scale_of({c: f}, model.config.n_concepts, device) for c, f, _ in trials[i:i + 8]])[:, None]
        gains += [(p[own].sum() / plain[own].sum()).log().item() for p, (_, _, own) in zip(next_token(scale, len(scale)), trials[i:i + 8])]
    chosen, taken = [], set()
    for gain, (concept, factor, own) in sorted(zip(gains, trials), reverse=True):
        if concept not in {c for c, _, _ in chosen} and own[0] not in taken:
            chosen.append((concept, factor, own))
            taken.update(own)
        if len(chosen) == n:
            break
    return chosen


def promoted(model, concept, n=3):
    """The tokens that a concept's compress row raises most through the final LayerNorm's gain and the head."""
    direction = model.inserted.compress[concept] * model.ln_f.weight
    return (model.wte.weight[:model.config.vocab_size] @ direction).topk(n).indices.tolist()


def show(title, text):
    print(f"\n── {title} {'─' * max(0, 96 - len(title))}\n{text}")


def main(argv):
    cfg, runs = config.parse(Config, argv, __doc__, most=1, files=False)
    device = pick_device(cfg.device)
    content = load_checkpoint(runs[0] if runs else None, RUN)
    model, tokenizer = load_model(content, device), data.load_tokenizer(content["tokenizer"])
    has_concepts = model.config.insert == "concept"
    if (cfg.steer or cfg.inspect) and not has_concepts:
        raise UserError(f"this run's method, {content['train_config']['method']!r}, has no concepts: --steer and --inspect need a cocomix run")
    if cfg.steer and model.config.mix == "none":
        raise UserError("this run predicts concepts but mixes none in (mix='none'): nothing to steer")

    start = cfg.start
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{start[5:]} is not UTF-8 text (byte {e.start})") from e
    tokens = tokenizer.encode_ordinary(start) or [tokenizer.eot_token]
    idx = torch.tensor([tokens], device=device)

    factors = parse_steer(cfg.steer, model.config.n_concepts) if cfg.steer not in (None, "auto") else {}

    def generate(scale=None):
        generator = torch.Generator(device).manual_seed(cfg.seed)  # the same luck, plain and steered
        return model.generate(idx.expand(cfg.num_samples, -1), cfg.max_new_tokens, cfg.temperature, cfg.top_k, scale, generator)

    def text(ids):  # a new document begins after the end-of-text token, which is not shown
        return tokenizer.decode(ids[1:] if tokens == [tokenizer.eot_token] else ids)

    out, concepts = generate()
    for i, ids in enumerate(out.tolist()):
        show("plain" if cfg.steer else f"sample {i + 1}", text(ids))
        if cfg.inspect:
            print()
            for j, token in enumerate(ids[len(tokens):]):
                best = zip(concepts.indices[i, j, :4].tolist(), concepts.values[i, j, :4].tolist())
                print(f"{tokenizer.decode([token])!r:>16}  " + "   ".join(
                    f"{c} ({z:.1f}: {' '.join(repr(tokenizer.decode([t])) for t in promoted(model, c, 2))})" for c, z in best))
    if not cfg.steer:
        return
    window = idx[:, -model.config.block_size:]
    if cfg.steer == "auto":  # learn the concepts' use, and which of them turn this prompt
        chosen = choose(model, tokenizer, window, content, cfg.tokens, device)
        runs = [({c: f}, f"concept {c} × {f:g}, which comes before " + " ".join(repr(tokenizer.decode([t])) for t in own)) for c, f, own in chosen]
    else:
        runs = [(factors, "steered: " + ", ".join(f"concept {c} × {f:g}" for c, f in factors.items()))]
    for factors, title in runs:
        for ids in generate(scale_of(factors, model.config.n_concepts, device))[0].tolist():
            show(title, text(ids))


if __name__ == "__main__":
    config.run(main)
