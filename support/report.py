"""Showing a run's concepts: a table, an HTML report, the column norms of the compress matrix."""
import json
from dataclasses import fields
from pathlib import Path

from support.runtime import UserError

import numpy as np
import torch

from support.concept_index import CONTEXTS, EDGES, NAME, describe, find, used
from support.curves import picture_path, pyplot, save_figure
from support.files import atomic_write
from support.tokens import Batches, tokens_of_run

TEMPLATE = Path(__file__).with_name("report.html")

def check_arguments(cfg, rest, argv, label_keys):
    """UserError if arguments of concepts.py contradict each other."""
    picture_path(cfg.plot)
    if cfg.plot and not cfg.weights:
        raise UserError("--plot draws the norms that --weights prints: give both")
    if cfg.write_labels and rest:
        raise UserError(f"--write_labels takes a config file of train.py, not {rest[0]!r}")
    changed = [f.name for f in fields(cfg) if f.name in label_keys and f.name != "device"
               and getattr(cfg, f.name) != f.default]
    if changed and not (cfg.write_labels or cfg.download):
        files = [arg for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
        raise UserError(f"{files[0] if files else '--' + changed[0]} is for --write_labels; the "
                        "concepts of a run are read with the run's own settings")

def check_run(content, weights):
    """UserError unless a checkpoint's run has concepts (weights: and a compress matrix)."""
    insert, mix = content["model_config"]["insert"], content["model_config"]["mix"]
    if insert != "concept" or weights and mix == "none":
        missing = "compress matrix" if insert == "concept" else "concepts"
        method = content["train_config"]["method"]
        raise UserError(f"a run of method={method!r}, mix={mix!r} has no {missing}; name a cocomix "
                        "run")

def show_index(path, content, model, tokenizer, index, cfg, concept_model):
    """Print the concepts of the run at `path`: the cfg.top best matches for the words cfg.find, or
    without words the most used ones and where the HTML report is, with cfg.pages concepts."""
    entries = [describe(index, concept, tokenizer) for concept in used(index)]
    if cfg.find is not None:
        matches = find(entries, cfg.find)
        if not matches:
            raise UserError(f"find={cfg.find!r}: no concept matches these words; try a part of "
                            "one, or a token such as return")
        return print_table(index, matches[:min(cfg.top, 10)])
    print_table(index, entries[:cfg.top])
    run, report = Path(path).parent, Path(path).parent / "concepts.html"
    some_passages = passages(content, model, concept_model, tokenizer)
    write_report(report, str(run), index, entries[:cfg.pages], some_passages)
    print(f"\nreport: {report}")

def print_table(index, entries):
    labelled, predicted = (index.labelled > 0).sum(), (index.predicted > 0).sum()
    print(f"in {index.tokens:,} training tokens, {labelled:,} of {len(index.labelled):,} concepts "
          f"occur as labels and {predicted:,} are predicted\n")
    print(f"{'concept':>8} {'label at':>9} {'predicted':>9} {'‖W‖':>6}  "
          "current tokens  →  typical next tokens")
    for e in entries:
        current = " ".join(repr(token) for token, *_ in e["current"][:5])
        following = " ".join(repr(token) for token, *_ in e["next"][:5])
        print(f"{e['id']:8} {e['labelled'] / index.tokens:9.2%} "
              f"{e['predicted'] / index.tokens:9.2%} {e['norm']:6.2f}  {current}  →  {following}")

@torch.no_grad()
def passages(content, model, concept_model, tokenizer, n=4, length=96):
    """n held-out passages, lists of [token, [[predicted concept, logit], …], [label, …]]."""
    val = tokens_of_run(content, "val")
    length = min(length, model.config.block_size, len(val) // 2)
    batches = Batches(val, length, n, model.config.vocab_size, shift=False, split="val")
    x, y = (t.to(model.wte.weight.device) for t in batches[0])
    top, labels = model.concepts(x), concept_model.labels(x, y)
    found = []
    for row in zip(x.tolist(), top.indices.tolist(), top.values.tolist(), labels.tolist(),
                   strict=True):
        passage = []
        for token, concepts, logits, label in zip(*row, strict=True):
            predicted = [[i, round(z, 2)] for i, z in zip(concepts, logits, strict=True)]
            passage.append([tokenizer.decode([token]), predicted[:concept_model.attr_k], label])
        found.append(passage)
    return found

def write_report(path, run, index, entries, some_passages):
    """One HTML file that needs nothing else: report.html with the data in it, as JSON."""
    data = dict(run=run, tokens=index.tokens, concepts=len(index.labelled), name=NAME,
                contexts=CONTEXTS, edges=[round(e, 3) for e in EDGES.tolist()],
                entries=entries, passages=some_passages)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # so that a </script> in the data does not end the script
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text)
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))

def show_weights(norms, plot=None, bins=20, unused=1e-2):
    """Print a histogram of the compress matrix's column norms (C,), and draw it to the file `plot`
    (the paper's Figure 6c)."""
    counts, edges = np.histogram(norms, bins=bins, range=(0, norms.max() or 1.0))
    for n, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        print(f"{low:8.3f} to {high:6.3f} {n:7,}  {'█' * round(50 * n / counts.max())}")
    print(f"{(norms < unused).mean():.1%} of {len(norms):,} columns are shorter than {unused}; "
          f"median {np.median(norms):.3f}")
    if plot:
        figure, axis = pyplot().subplots(figsize=(5, 3.5), layout="constrained")
        axis.hist(norms, bins=50, range=(0, edges[-1]))
        axis.set(xlabel="norm of a concept's column of W", ylabel="concepts")
        save_figure(figure, plot)
