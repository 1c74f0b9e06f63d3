"""Generate text, watch the concepts, turn them.

    python sample.py out/stdlib/ntp --start="def main("                   # continue a prompt (--start=FILE:path reads one)
    python sample.py out/stdlib/cocomix --start="def main(" --inspect     # under each token its strongest predicted concepts
    python sample.py out/stdlib/cocomix --steer                           # plain and steered; the concepts chosen by itself
    python sample.py out/stdlib/cocomix --steer=17:6,error:-8             # concept 17 times 6, the one that goes with "error" times -8
    python sample.py out/stdlib/cocomix --steer=error --steer_sweep       # a row a factor, from -10 to 10

Steering multiplies a concept's logit z_i before TopK, at every position (the paper's factors: -10 … 10). Beside the run
stands its frozen concept model, steered in the SAE's space by the same concept and factor (concepts.SteeredSAE), as in the
paper's figure 5; --model takes one of the two alone. Words and names are the concept dictionary's (concepts.py).
"""
import shutil
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch

import concepts
import data
from config import UserError, key
from model import RUN, TopK, find_checkpoint, load_checkpoint, load_model, pick_device

SWEEP = (-10, -8, -6, -4, -2, 0, 1, 2, 4, 6, 8, 10)  # 1 steers nothing


@dataclass(frozen=True)
class Config:
    start: str = key("", "the prompt: text, or FILE:path (none: a new document)")
    num_samples: int = key(1, "texts to generate", low=1)
    max_new_tokens: int = key(100, "tokens a text", low=1)
    temperature: float = key(0.8, "0 takes the likeliest token; 1 samples as the model says", low=0)
    top_k: int | None = key(200, "sample among so many likeliest tokens (none: all)", low=1)
    seed: int = key(1337, "of the sampling", low=0, high=2**32 - 1)
    steer: str | None = key(None, "CONCEPT:FACTOR,CONCEPT:FACTOR, a concept by its number or by words; alone: three often used ones", bare="auto", follows=r"[^-].*:-?[\d.]|-\d+:")
    steer_sweep: bool = key(False, "steer by each factor from -10 to 10; --steer then names concepts without factors")
    model: Literal["run", "concept", "both"] | None = key(None, "which model speaks: the run, its frozen concept model, both (none: both with --steer, else the run)")
    inspect: bool = key(False, "print under each token its strongest predicted concepts")
    device: str = key("auto", "cpu, cuda, mps; auto takes the fastest there is")


def parse_steer(text, n_concepts, sweep=False):
    """"17:6,raise error:-8" → {17: 6.0, "raise error": -8.0}: concepts by number or words, with their factors; for a sweep
    without, {…: None}. UserError: not of this form, no such concept, not finite."""
    factors = {}
    for part in text.split(","):
        name, colon, factor = part.rpartition(":")
        try:
            name, value = (name.strip(), float(factor)) if colon else (part.strip(), None)
        except ValueError:
            name, value = part.strip(), None
        if not name or (value is None) != sweep:
            raise UserError(f"steer={part!r}: " + ("--steer_sweep sets the factors; name concepts alone, such as --steer=17" if sweep else "expected CONCEPT:FACTOR, such as 17:6 or error:-8"))
        if value is not None and not abs(value) <= 1000:  # NaN too
            raise UserError(f"steer={part!r}: the factor must be a number from -1000 to 1000; the paper's are -10 to 10")
        if name.lstrip("-").isdecimal() and not 0 <= int(name) < n_concepts:
            raise UserError(f"steer={part!r}: the model has concepts 0 to {n_concepts - 1}")
        name = int(name) if name.isdecimal() else name
        if name in factors:
            raise UserError(f"steer={part!r}: concept {name} has a factor already")
        factors[name] = value
    return factors


def look_up(words, d, tokenizer):
    """The concept that goes best with words, as `concepts.py --find` has it; it is said which. UserError: none does."""
    found = concepts.find([concepts.entry(d, concept, tokenizer) for concept in concepts.used(d)], words)
    if not found:
        raise UserError(f"steer={words!r}: no concept goes with it; python concepts.py RUN lists them, --find=WORDS looks for others")
    concept = found[0]["id"]
    print(f"{words!r}: concept {concept}, at {' '.join(repr(t) for t, *_ in found[0]['at'][:5])}, before {d.name(concept, tokenizer)}")
    return concept


def scale_of(factors, n_concepts, device):
    """{concept: factor} → the factors of all concept logits, (C,)."""
    scale = torch.ones(n_concepts, device=device)
    for concept, factor in factors.items():
        scale[concept] = factor
    return scale


@torch.no_grad()
def choose(model, tokenizer, idx, d, device, n=3, candidates=32, factors=(-8.0, 8.0)):
    """Concepts to show, {concept: factor}: of the most predicted whose names are words (half of their own tokens at least, of
    four letters at least; where there are none, of all), the n that steer best here: where a factor raises the share of the
    model's next-token probability, at the prompt's last position, that their own tokens take."""
    own = lambda concept: d.own[concept, :concepts.NAME][d.own[concept, :concepts.NAME] >= 0].tolist()
    words = lambda concept: [t for t in own(concept) if len(tokenizer.decode([t]).strip()) > 3 and tokenizer.decode([t]).strip().isalpha()]
    common = [c for c in d.predicted.argsort(descending=True, stable=True).tolist() if d.predicted[c] and own(c)]
    common = ([c for c in common if 2 * len(words(c)) >= concepts.NAME] or common)[:candidates]
    trials = [(concept, factor, own(concept)) for concept in common for factor in factors]
    c = model.config
    below, *_ = model.blocks(model.embed(idx), 0, c.insert_layer)  # the same for all trials

    def next_token(trials):  # probabilities at the last position, (rows, V)
        scale = torch.stack([scale_of({concept: factor}, c.n_concepts, device) for concept, factor, _ in trials])[:, None]
        return model.head(model.blocks(below.expand(len(trials), -1, -1), c.insert_layer, c.n_layer, scale=scale)[0][:, -1]).softmax(-1)

    plain, gains = next_token([(0, 1.0, ())])[0], []
    for i in range(0, len(trials), 8):
        gains += [(p[tokens].sum() / plain[tokens].sum()).log().item() for p, (_, _, tokens) in zip(next_token(trials[i:i + 8]), trials[i:i + 8])]
    chosen, taken = {}, set()
    for gain, (concept, factor, tokens) in sorted(zip(gains, trials), reverse=True):
        if len(chosen) < n and concept not in chosen and tokens[0] not in taken:
            chosen[concept] = factor
            taken.update(tokens)
    return chosen


# ---------------------------------------------------------------------------------------------------
# On the screen

def show(title, width):
    print(f"\n── {title} {'─' * max(0, width - 4 - len(title))}")


def columns(texts, width):
    """Texts side by side in columns of equal width, longer lines cut as a terminal does; a single text as it is."""
    if len(texts) == 1:
        return texts[0]
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    cut = [[line[i:i + each] for line in text.expandtabs().splitlines() for i in range(0, max(1, len(line)), each)] for text in texts]
    return "\n".join(" │ ".join(cell.ljust(each) for cell in row).rstrip() for row in zip_longest(*cut, fillvalue=""))


@torch.no_grad()
def concepts_at(model, idx, scale=None):
    """The concepts at each token of idx (1, T), TopK (1, T, k); beyond block_size, read with half a block before it at least."""
    size, parts, done = model.config.block_size, [], 0
    while done < idx.shape[1]:
        start = max(0, done - size // 2)
        parts.append([t[:, done - start:] for t in model.concepts(idx[:, start:start + size], scale)])
        done = min(idx.shape[1], start + size)
    return TopK(*(torch.cat(t, dim=1) for t in zip(*parts)))


def gloss(tokens, notes, width):
    """Tokens (strings) in lines of at most width characters, under each its notes (lists of strings, all of one length)."""
    lines, row, used = [], [], 0
    for cell in [*([token, *under] for token, under in zip(tokens, notes)), None]:
        size = 0 if cell is None else max(map(len, cell)) + 2
        if row and (cell is None or used + size > width):
            lines += ["".join(line).rstrip() for line in zip(*row)] + [""]
            row, used = [], 0
        if cell is not None:
            row.append([text.ljust(size) for text in cell])
            used += size
    return "\n".join(lines)


def inspection(model, ids, scale, d, tokenizer, width, n=3):
    """The text of ids with, under each token, the n strongest concepts there: number, first own token, weight (z, or c)."""
    top = concepts_at(model, ids[None], scale)
    notes = [[f"{concept} {d.name(concept, tokenizer, 1)} {value:.1f}" for concept, value in zip(*row)] for row in zip(top.indices[0, :, :n].tolist(), top.values[0, :, :n].tolist())]
    return gloss([repr(tokenizer.decode([t])) for t in ids.tolist()], notes, width)


def read_prompt(start, tokenizer):
    """The tokens of the prompt: text, or FILE:path; the end-of-text token, after which a new document begins, where it is empty."""
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{start[5:]} is not UTF-8 text (byte {e.start})") from e
    return tokenizer.encode_ordinary(start) or [tokenizer.eot_token]


def load_speakers(cfg, content, model, device):
    """The models that speak, {name: GPT}: the run, its concept model, or both."""
    which = cfg.model or ("both" if cfg.steer else "run")
    speakers = {} if which == "concept" else {"CoCoMix" if model.config.insert == "concept" else "run": model}
    if which != "run":
        try:
            speakers["concept model"] = concepts.steerable(concepts.of_run(content, device))
        except UserError as e:
            if cfg.model:
                raise
            print(f"the run alone is steered: {e}")
    return speakers


def plan(chosen, sweep, together, d, tokenizer):
    """What is generated, [(title, {concept: factor})], for the chosen {concept: factor}: plain and steered, by each or by all
    of them together; for a sweep a line for every factor."""
    named = lambda c, times: f"concept {c}{times}, before {d.name(c, tokenizer)}"
    if sweep:
        print("\n".join(named(c, "") for c in chosen))
        return [(f"× {factor}", dict.fromkeys(chosen, factor)) for factor in SWEEP]
    parts = [chosen] if together else [{c: f} for c, f in chosen.items()]
    return [("plain", {})] + [("; ".join(named(c, f" × {f:g}") for c, f in part.items()), part) for part in parts]


def main(argv):
    cfg, runs = config.parse(Config, argv, __doc__, most=1, files=False)
    if cfg.steer_sweep and cfg.steer is None:
        cfg = config.replace(cfg, steer="auto")
    device = pick_device(cfg.device)
    path = find_checkpoint(runs[0] if runs else None)
    content = load_checkpoint(path, RUN)
    model, tokenizer = load_model(content, device), data.load_tokenizer(content["tokenizer"])
    if (cfg.steer or cfg.inspect or cfg.model in ("concept", "both")) and model.config.insert != "concept":
        raise UserError(f"this run's method, {content['train_config']['method']!r}, has no concepts: --steer, --inspect and --model need a cocomix run")
    if cfg.steer and model.config.mix == "none" and cfg.model != "concept":
        raise UserError("this run predicts concepts but mixes none in (mix='none'): nothing to steer; --model=concept steers its concept model")
    auto = cfg.steer == "auto"
    chosen = parse_steer(cfg.steer, model.config.n_concepts, cfg.steer_sweep) if cfg.steer and not auto else {}
    prompt = read_prompt(cfg.start, tokenizer)
    idx = torch.tensor([prompt], device=device)
    speakers = load_speakers(cfg, content, model, device)

    d = concepts.dictionary_of(path, content, model, device) if cfg.steer or cfg.inspect else None
    variants, scale = [("", {})], None
    if cfg.steer:
        if auto:
            speaker = next(iter(speakers.values()))
            chosen = choose(speaker, tokenizer, idx[:, -speaker.config.block_size:], d, device, n=1 if cfg.steer_sweep else 3)
        chosen = {look_up(name, d, tokenizer) if isinstance(name, str) else name: factor for name, factor in chosen.items()}
        variants = plan(chosen, cfg.steer_sweep, not auto, d, tokenizer)
        scale = torch.stack([scale_of(factors, model.config.n_concepts, device) for _, factors in variants])[:, None]

    texts = {}  # name: (variants × samples, tokens), all in one call
    for name, speaker in speakers.items():
        generator = torch.Generator(device).manual_seed(cfg.seed)  # the same luck for all
        texts[name] = speaker.generate(idx.expand(cfg.num_samples, -1), cfg.max_new_tokens, cfg.temperature, cfg.top_k, scale, generator)
    width = shutil.get_terminal_size((100, 24)).columns
    for row in range(len(variants) * cfg.num_samples):
        v, sample = divmod(row, cfg.num_samples)
        show(variants[v][0] or f"sample {sample + 1}", width)
        ids = {name: rows[row, prompt == [tokenizer.eot_token]:] for name, rows in texts.items()}
        if len(ids) > 1:
            print(columns([name.upper() for name in ids], width))
        print(columns([tokenizer.decode(t.tolist()) for t in ids.values()], width))
        if cfg.inspect:
            for name, t in ids.items():
                print(f"\n{name}:\n" + inspection(speakers[name], t, None if scale is None else scale[v], d, tokenizer, width))


if __name__ == "__main__":
    config.run(main)
