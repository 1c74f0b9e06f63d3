"""Generate text, inspect the predicted concepts, steer them.

    python sample.py out/stdlib/ntp --start="def main("                # or --start=FILE:path
    python sample.py out/stdlib/cocomix --start="def main(" --inspect  # concepts under each token
    python sample.py out/stdlib/cocomix --steer                        # plain and steered text
    python sample.py out/stdlib/cocomix --steer=17:6,error:-8          # by number, or by words
    python sample.py out/stdlib/cocomix --steer=error --steer_sweep    # factors from -10 to 10
    python sample.py out/stdlib/cocomix --serve                        # all of it in a browser

Steering multiplies a concept's logit z_i before TopK, at every position (the paper's factors: -10
to 10). As in the paper's Figure 5, the frozen concept model is shown next to the run, steered in
the SAE's space (concepts.SteeredSAE). Words are looked up in the concept index.
"""
import shutil
import unicodedata
from dataclasses import dataclass
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Literal

from support.runtime import UserError, run  # before torch

import torch

from concepts import concept_model_of_run, steerable
from model import load_model
from support.checkpoint import (
    RUN,
    find_checkpoint,
    index_name,
    kind_of_run,
    load_checkpoint,
    relocate,
    run_of,
)
from support.cli import key, parse
from support.concept_index import (
    NAME,
    describe,
    find,
    index_of_run,
    quoted,
    texts,
    token_text,
    used,
)
from support.device import pick_device
from support.engine import concepts_at, decoder, stream
from support.serve import FACTOR, HOTTEST, SLIDERS, TOKENS, Playground, Server
from support.steering import choose_concepts, scales
from support.tokens import encode_text, tokenizer_of_run, tokens_of_run

SWEEP = (-10, -8, -6, -4, -2, 0, 1, 2, 4, 6, 8, 10)  # 1 changes nothing

@dataclass(frozen=True)
class Config:
    start: str = key("", "the prompt: text, or FILE:path (none: a new document)")
    num_samples: int = key(1, "texts to generate", low=1)
    max_new_tokens: int = key(100, "tokens per text", low=1)
    temperature: float = key(0.8, "0: greedy; 1: the model's own distribution", low=0)
    top_k: int | None = key(200, "sample from this many most likely tokens (none: all)", low=1)
    stop: bool = key(True, "end a text at the end-of-text token")
    seed: int = key(1337, "of the random numbers", low=0, high=2**32 - 1)
    steer: str = key("", "CONCEPT:FACTOR,…, by number or words; without a value: three "
                            "often used concepts", bare="auto", follows=r"[^-].*:-?[\d.]|-\d+:")
    steer_sweep: bool = key(False, "steer by factors from -10 to 10; --steer then takes no factors")
    model: Literal["run", "concept", "both"] | None = key(
        None, "generate with the run, its concept model, or both (none: both with --steer)")
    inspect: bool = key(False, "print the strongest predicted concepts under each token")
    serve: int | None = key(None, "read and steer in a browser, at this port of this computer "
                            "(0: any; without a value: 8000)", low=0, high=65535, bare="8000",
                            follows=r"\d+$")
    dataset: str | None = key(None, "where the run's dataset is now (none: where it was)")
    concept_model: str | None = key(None, "where its concept model is (none: where it was)")
    sae: str | None = key(None, "where its SAE is (none: where it was)")
    out_dir: str | None = key(None, "folder for concepts.pt (none: the run's)")
    device: str = key("auto", "cpu, cuda, cuda:1 or mps; auto: the fastest available")

# --------------------------------------------------------------------------------------------------
# Which concepts to steer

def parse_steer(text, n_concepts, sweep=False):
    """"17:6,error:-8" → {17: 6.0, "error": -8.0}; for a sweep, "17,error" → both with None."""
    expected = "concepts alone, as in --steer=17" if sweep else "CONCEPT:FACTOR, such as error:-8"
    factors = {}
    for part in text.split(","):
        name, colon, factor = part.rpartition(":")
        try:
            name, factor = (name, float(factor)) if colon else (part, None)
        except ValueError:  # a colon in the words
            name, factor = part, None
        name, where = name.strip(), f"steer={part!r}:"
        if name.removeprefix("-").isdecimal():
            name = int(name)
            assert 0 <= name < n_concepts, f"{where} the model has concepts 0 to {n_concepts - 1}"
        assert name != "" and (factor is None) == sweep, f"{where} expected {expected}"
        assert sweep or abs(factor) <= 1000, f"{where} the factor must be from -1000 to 1000"
        assert name not in factors, f"{where} concept {name} already has a factor"
        factors[name] = factor
    return factors

def look_up(words, index, tokenizer):
    """The best match for the words, as in `concepts.py --find`. Prints what it found."""
    found = find([describe(index, concept, tokenizer) for concept in used(index)], words)
    assert found, f"steer={words!r}: no concept matches; search with concepts.py RUN --find=WORDS"
    concept = found[0]["id"]
    print(f"{words!r}: concept {concept}, at {texts(found[0]['current'])}, "
          f"before {index.name(concept, tokenizer)}")
    return concept

def candidates(index, tokenizer, most=32):
    """The most predicted concepts with at least NAME / 2 typical next tokens of four letters or
    more; the most predicted of all if there is none."""
    def words(concept):
        tokens = (tokenizer.decode([t]).strip() for t in index.next_ids(concept))
        return sum(len(token) > 3 and token.isalpha() for token in tokens)
    common = choose_concepts(index)
    return ([c for c in common if 2 * words(c) >= NAME] or common)[:most]

@torch.no_grad()
def choose(model, tokenizer, idx, index, n=3, factors=(-8.0, 8.0)):
    """{concept: factor}: the n candidates whose typical next tokens gain most in probability at the
    end of the prompt, by ratio, under one of the factors; each with another first token."""
    c = model.config
    h = model.forward_blocks(model.embed(idx[:, -c.block_size:]), 0, c.insert_at)  # not steered

    def next_token(variants):  # probabilities (variants, V)
        scale = scales(variants, c.n_concepts, idx.device)
        h_final, _ = model.finish(h.expand(len(variants), -1, -1), c.insert_at, scale=scale)
        return model.head(h_final[:, -1]).softmax(-1)

    plain, gains = next_token([{}]), []
    for concept in candidates(index, tokenizer):
        tokens = index.next_ids(concept)
        steered = next_token([{concept: factor} for factor in factors])
        gain = steered[:, tokens].sum(-1) / plain[:, tokens].sum(-1)
        gains += [(g, concept, f) for g, f in zip(gain.tolist(), factors, strict=True)]
    chosen, taken = {}, set()
    for _, concept, factor in sorted(gains, reverse=True):
        tokens = index.next_ids(concept)
        if len(chosen) < n and concept not in chosen and tokens[0] not in taken:
            chosen[concept] = factor
            taken.update(tokens)
    return chosen

def plan(chosen, sweep, together, index, tokenizer):
    """{title: {concept: factor}} to generate: plain, and steered by each chosen {concept: factor}
    (or all together); for a sweep, one per factor."""
    if sweep:
        for concept in chosen:
            print(f"concept {concept}, before {index.name(concept, tokenizer)}")
        return {f"× {factor}": dict.fromkeys(chosen, factor) for factor in SWEEP}
    steered = {f"concept {c} × {f:g}, before {index.name(c, tokenizer)}": {c: f}
               for c, f in chosen.items()}
    return {"plain": {}} | ({"; ".join(steered): chosen} if together else steered)

# --------------------------------------------------------------------------------------------------
# On the screen

def width_of(text):
    """How many columns of a terminal a text takes."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf", "Cc") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)

def pad(text, width):
    return text + " " * (width - width_of(text))

def wrap(line, width):
    """A line in pieces of at most `width` columns, and of at least one character."""
    pieces = [""]
    for character in line:
        if pieces[-1] and width_of(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces

def columns(texts, width, least=8):
    """Texts next to each other, wrapped into columns of equal width; a single one unchanged. Below
    each other where a column would have fewer than `least`."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    if len(texts) == 1 or each < least:
        return "\n\n".join(texts)
    wrapped = [[piece for line in text.expandtabs().splitlines() for piece in wrap(line, each)]
               for text in texts]
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join(" │ ".join(pad(cell, each) for cell in row).rstrip() for row in rows)

def gloss(cells, width):
    """Cells (a token and the notes under it) next to each other, in rows of at most `width`."""
    rows, room = [], 0
    for cell in cells:
        size = max(map(width_of, cell)) + 2
        if size > room:
            rows.append([""] * len(cell))
            room = width
        rows[-1] = [line + pad(text, size) for line, text in zip(rows[-1], cell, strict=True)]
        room -= size
    return "\n\n".join("\n".join(map(str.rstrip, row)) for row in rows) + "\n"

def inspection(model, ids, scale, index, tokenizer, width, n=3):
    """The text of ids with the n strongest concepts under each token: number, first typical next
    token, and logit (or the SAE's activation)."""
    idx = torch.tensor([ids], device=model.wte.weight.device)
    top, cells = concepts_at(model, idx, scale), []
    strongest = top.indices[0, :, :n].tolist(), top.values[0, :, :n].tolist()
    for token, concepts, values in zip(ids, *strongest, strict=True):
        notes = [f"{concept} {index.name(concept, tokenizer, 1)} {value:.1f}"
                 for concept, value in zip(concepts, values, strict=True)]
        cells.append([quoted(token_text(tokenizer, token)), *notes])
    return gloss(cells, width)

def read_prompt(start, tokenizer):
    """The prompt's tokens, "<|endoftext|>" being one; it begins a document, as does an empty
    prompt."""
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(f"{start[5:]} is not UTF-8 text (byte {e.start}); convert it: iconv -f "
                            f"ENCODING -t UTF-8 {start[5:]}") from e
    return encode_text(tokenizer, start, special=True) or [tokenizer.eot_token]

def load_models(cfg, content, model, load_concept_model):
    """The models that generate, {name: GPT}: the run, its steerable concept model, or both."""
    steered, c = cfg.steer or cfg.steer_sweep or cfg.serve is not None, model.config
    which = cfg.model or ("both" if steered else "run")
    assert c.insert == "concept" or not steered and not cfg.inspect and which == "run", (
        f"{kind_of_run(content)} has no concepts: --steer, --inspect, --serve and --model need a "
        "cocomix run that predicts concepts")
    assert not steered or c.mix != "none" or which == "concept", (
        "mix='none' leaves nothing to steer but the concept model; add --model=concept")
    models = {} if which == "concept" else {"CoCoMix": model}
    if which != "run":
        try:
            models["concept model"] = steerable(load_concept_model())
        except UserError as e:
            if cfg.model:
                raise
            print(f"only the run is steered: {e}")
    return models

def playground(cfg, path, content, models, index, tokenizer, chosen):
    """What --serve shows: the page's Playground."""
    for concept, factor in chosen.items():
        assert abs(factor) <= FACTOR, f"steer={concept}:{factor:g}: a slider ends at {FACTOR}"
    assert len(chosen) <= SLIDERS, f"{len(chosen)} concepts to steer: the page takes {SLIDERS}"
    for name, most in (("max_new_tokens", TOKENS), ("temperature", HOTTEST)):
        value = getattr(cfg, name)
        assert value <= most, f"{name}={value}: the page takes at most {most}"
    val = None
    try:
        val = tokens_of_run(content, "val")
    except UserError as e:
        print(f"left out: the perplexity of a setting: {e}")
    prompt = read_prompt(cfg.start, tokenizer)
    size = min(gpt.config.block_size for gpt in models.values())
    assert len(prompt) <= size, f"a prompt of {len(prompt)} tokens: the page takes at most {size}"
    start = tokenizer.decode(prompt) if cfg.start else ""
    settings = dict(run=str(run_of(path)), prompt=start, seed=cfg.seed,
                    tokens=cfg.max_new_tokens, temperature=cfg.temperature, factors=chosen)
    return Playground(models, index, tokenizer, val, cfg.top_k, settings)

def continuations(cfg, models, idx, scale, tokenizer, live):
    """{name of a model: the new tokens of each row}; a live text is printed as it comes."""
    stop, found = tokenizer.eot_token if cfg.stop else None, {}
    for name, gpt in models.items():
        generator = torch.Generator(idx.device).manual_seed(cfg.seed)  # the same for all models
        steps, text = [], decoder(tokenizer)
        for step in stream(gpt, idx.expand(cfg.num_samples, -1), cfg.max_new_tokens,
                           cfg.temperature, cfg.top_k, scale, generator, stop=stop):
            steps.append(step[:, 0].tolist())
            if live and steps[-1][0] != stop:
                print(text(steps[-1][0]), end="", flush=True)
        rows = map(list, zip(*steps, strict=True))
        found[name] = [row[:row.index(stop)] if stop in row else row for row in rows]
    return found

def write(cfg, models, prompt, idx, variants, tokenizer, index):
    """Print the continuations under each of the variants, {title: {concept: factor}}. Of a single
    model's, the first appears token by token."""
    width, alone = shutil.get_terminal_size((100, 24)).columns, len(models) == 1
    scale = None
    if any(variants.values()):
        scale = scales(variants.values(), len(index.labelled), idx.device)
    shown = [] if prompt == [tokenizer.eot_token] else prompt
    titles = []
    for title, sample in product(variants, range(1, cfg.num_samples + 1)):
        parts = [title, f"sample {sample}" if cfg.num_samples > 1 or not title else ""]
        title = f"── {', '.join(filter(None, parts))} "
        titles.append(f"\n{title}{'─' * (width - width_of(title))}")
    if alone:
        print(f"{titles[0]}\n{tokenizer.decode(shown)}", end="", flush=True)
    found = continuations(cfg, models, idx, scale, tokenizer, alone)
    for row, title in enumerate(titles):
        texts = {name: tokenizer.decode(shown + rows[row]) for name, rows in found.items()}
        if alone:
            print(f"{title}\n{''.join(texts.values())}" if row else "")
        else:
            named = [f"{name.upper()}\n{text}" for name, text in texts.items()]
            print(f"{title}\n{columns(named, width)}")
        if cfg.inspect:
            for name, rows in found.items():
                factors = None if scale is None else scale[row // cfg.num_samples]
                text = inspection(models[name], prompt + rows[row], factors, index, tokenizer,
                                  width)
                print(f"\n{name}:\n{text}")

def main(argv):
    cfg, runs = parse(Config, argv, __doc__, files=False)
    stray = [run for run in runs if cfg.steer_sweep and not Path(run).exists()]
    assert not stray, f"no run {stray[0]}; a concept to sweep needs =, as in --steer={stray[0]}"
    assert len(runs) < 2, f"unexpected argument {runs[1]!r}; keys are --key, and there is one run"
    if cfg.serve is not None:
        for name in ("num_samples", "steer_sweep", "inspect", "stop"):
            assert getattr(cfg, name) == getattr(Config, name), f"--{name} is not for --serve"
    device = pick_device(cfg.device)
    path = find_checkpoint(runs[0] if runs else None, cfg.out_dir)
    content = load_checkpoint(path, RUN)
    relocate(content, cfg)
    model, tokenizer = load_model(content, device), tokenizer_of_run(content)
    load_concept_model = partial(concept_model_of_run, content, device)
    prompt, steer = read_prompt(cfg.start, tokenizer), cfg.steer or ("auto" * cfg.steer_sweep)
    idx = torch.tensor([prompt], device=device)
    models = load_models(cfg, content, model, load_concept_model)

    chosen, index, variants = {}, None, {"": {}}
    if steer and steer != "auto":
        chosen = parse_steer(steer, model.config.n_concepts, cfg.steer_sweep)
    server = Server(cfg.serve) if cfg.serve is not None else None
    if steer or cfg.inspect or server:
        folder = Path(cfg.out_dir or path.parent)
        index = index_of_run(folder, content, model, load_concept_model, device,
                             name=index_name(path))
    if steer == "auto":
        first = next(iter(models.values()))
        chosen = choose(first, tokenizer, idx, index, n=1 if cfg.steer_sweep else 3)
    factors = {}
    for name, factor in chosen.items():
        concept = look_up(name, index, tokenizer) if isinstance(name, str) else name
        assert concept not in factors, f"steer={name!r}: concept {concept} already has a factor"
        factors[concept] = factor
    if server:
        return server.run(playground(cfg, path, content, models, index, tokenizer, factors))
    if steer:
        variants = plan(factors, cfg.steer_sweep, steer != "auto", index, tokenizer)
    write(cfg, models, prompt, idx, variants, tokenizer, index)

if __name__ == "__main__":
    run(main)
