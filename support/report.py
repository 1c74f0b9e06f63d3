"""Showing a run's concepts: a table, an HTML report, the column norms of the compress matrix."""
import json
from pathlib import Path

from support.runtime import UserError

import numpy as np
import torch

from support.concept_index import CONTEXTS, EDGES, NAME, describe, find, texts, used
from support.curves import new_figure, picture_path, save_figure
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
    changed = [name for name in label_keys if name != "device"
               and getattr(cfg, name) != getattr(type(cfg), name)]
    if changed and not (cfg.write_labels or cfg.download):
        files = [arg for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
        raise UserError(f"{files[0] if files else '--' + changed[0]} is for --write_labels; the "
                        "concepts of a run are read with the run's own settings")

def check_run(content, weights):
    """UserError unless a checkpoint's run has concepts (weights: and a compress matrix)."""
    insert, mix = content["model_config"]["insert"], content["model_config"]["mix"]
    if insert != "concept" or weights and mix == "none":
        missing = "compress matrix" if insert == "concept" else "concepts"
        raise UserError(f"a run of method={content['train_config']['method']!r}, mix={mix!r} has "
                        f"no {missing}; name a cocomix run")

def show_index(path, content, model, tokenizer, index, cfg, concept_model):
    """Print the concepts of the run at `path`: the cfg.top best matches for the words cfg.find, or
    without words the most used ones and where the HTML report is, with cfg.pages concepts."""
    entries = [describe(index, concept, tokenizer) for concept in used(index)]
    if cfg.find is not None:
        matches = find(entries, cfg.find)[:min(cfg.top, 10)]
        if not matches:
            raise UserError(f"find={cfg.find!r}: no concept matches; try a part of one word")
        return print_table(index, matches)
    print_table(index, entries[:cfg.top])
    report = Path(path).with_name("concepts.html")
    write_report(report, str(report.parent), index, entries[:cfg.pages],
                 passages(content, model, concept_model, tokenizer))
    print(f"\nreport: {report}")

def print_table(index, entries):
    labelled, predicted = (index.labelled > 0).sum(), (index.predicted > 0).sum()
    print(f"in {index.tokens:,} training tokens, {labelled:,} of {len(index.labelled):,} concepts "
          f"occur as labels and {predicted:,} are predicted\n")
    print(f"{'concept':>8} {'label at':>9} {'predicted':>9} {'‖W‖':>6}  "
          "current tokens  →  typical next tokens")
    for e in entries:
        print(f"{e['id']:8} {e['labelled'] / index.tokens:9.2%} "
              f"{e['predicted'] / index.tokens:9.2%} {e['norm']:6.2f}  "
              f"{texts(e['current'])}  →  {texts(e['next'])}")

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
        found.append([])
        for token, concepts, logits, label in zip(*row, strict=True):
            predicted = [[i, round(z, 2)] for i, z in zip(concepts, logits, strict=True)]
            found[-1].append([tokenizer.decode([token]), predicted[:concept_model.attr_k], label])
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
        figure, axis = new_figure(1, 1, 5, 3.5)
        axis.hist(norms, bins=50, range=(0, edges[-1]))
        axis.set(xlabel="norm of a concept's column of W", ylabel="concepts")
        save_figure(figure, plot)
