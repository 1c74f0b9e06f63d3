"""Showing a run's concepts: a table, an HTML report, the column norms of the compress matrix."""
import json
import shlex
from pathlib import Path

from support.runtime import UserError

import numpy as np
import torch

from support.checkpoint import PLACES, index_name, kind_of_run, run_of
from support.concept_index import CONTEXTS, EDGES, NAME, describe, find, index_of_run, texts, used
from support.curves import new_figure, picture_path, save_figure
from support.engine import decoder
from support.files import atomic_write
from support.tokens import Batches, tokens_of_run

DATA = b'<script id="data" type="application/json">'  # in every report
TEMPLATE = Path(__file__).with_name("report.html")

def check_arguments(cfg, rest, argv, label_keys):
    """Refuse arguments of concepts.py that contradict each other."""
    picture_path(cfg.plot, cfg.overwrite)
    assert cfg.weights or not cfg.plot, "--plot draws what --weights prints: give both"
    assert not (cfg.weights and cfg.find), "--weights and --find exclude each other"
    assert not (cfg.write_labels and rest), (
        f"--write_labels takes a config file of train.py, not {rest[0]!r}")
    given = [arg for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
    given += [f"--{name}" for name in label_keys
              if name in cfg.given and name not in (*PLACES, "device")]
    if given and not (cfg.write_labels or cfg.download):
        raise UserError(f"{given[0]} is for --write_labels; a run is read with its own settings")

def check_run(content, weights):
    """Refuse a checkpoint whose run has no concepts (weights: or no compress matrix)."""
    model = content["model_config"]
    assert model["insert"] == "concept", (
        f"{kind_of_run(content)} has no concepts; name a cocomix run that predicts concepts")
    assert model["mix"] != "none" or not weights, (
        "mix='none' has no compress matrix; name a cocomix run with another mix")

def check_report(path, overwrite):
    """UserError if there is a file at the path of the HTML report that is not one."""
    written_here = not path.exists() or path.is_file() and DATA in path.read_bytes()
    if not written_here and not overwrite:
        raise UserError(f"{path} is not a report of this script; --overwrite replaces it, "
                        "--out_dir=FOLDER writes elsewhere")

def show_index(path, content, model, tokenizer, cfg, load_concept_model, device):
    """Print the cfg.top concepts that match the words cfg.find best; without words the most used
    ones, and write the HTML report into cfg.out_dir or the run's folder, with cfg.pages
    concepts. path: of the checkpoint."""
    folder = Path(cfg.out_dir or path.parent)
    report = folder / f"{index_name(path)}.html"
    check_report(report, cfg.overwrite or cfg.find)
    index = index_of_run(folder, content, model, load_concept_model, device, cfg.tokens,
                         cfg.overwrite, index_name(path))
    entries = [describe(index, concept, tokenizer) for concept in used(index)]
    if cfg.find:
        matches = find(entries, cfg.find)[:cfg.top if "top" in cfg.given else 10]
        assert matches, f"find={cfg.find!r}: no concept matches; try a part of one word"
        return print_table(index, matches)
    print_table(index, entries[:cfg.top])
    some_passages = []
    try:
        some_passages = passages(content, model, load_concept_model(), tokenizer)
    except (UserError, AssertionError, OSError) as e:
        print(f"left out: passages in the report: {e}")
    write_report(report, run_of(path), index, entries[:cfg.pages], some_passages, model.config.mix)
    print(f"\nreport: {report}")

def print_table(index, entries):
    labelled, predicted = index.labelled.count_nonzero(), index.predicted.count_nonzero()
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
        text = decoder(tokenizer)
        for token, concepts, logits, label in zip(*row, strict=True):
            predicted = [[i, round(z, 2)] for i, z in zip(concepts, logits, strict=True)]
            found[-1].append([text(token), predicted[:concept_model.attr_k], label])
    return found

def write_report(path, run, index, entries, some_passages, mix="interleave"):
    """One HTML file that needs nothing else: report.html with the data in it, as JSON."""
    command = f"python sample.py {shlex.quote(str(run))}" + " --model=concept" * (mix == "none")
    data = dict(run=str(run), command=command, tokens=index.tokens, concepts=len(index.labelled),
                name=NAME, contexts=CONTEXTS, edges=[round(e, 3) for e in EDGES.tolist()],
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
