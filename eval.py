"""Evaluate runs and compare them.

    python eval.py                                                   # the newest run under out/
    python eval.py out/stdlib/ntp out/stdlib/cocomix --plot=x.png    # table and picture
    python eval.py out/stdlib/ntp --tasks=piqa,arc_easy --limit=100  # tasks, 100 documents of each
    python eval.py out/stdlib/ntp --every                # all that train.py --keep_checkpoints kept
    python eval.py --model=gpt2 --eval_data=DIR          # GPT-2 on all tasks, DIR/NAME.jsonl[.gz]
    python eval.py --compare out/stdlib/ntp out/stdlib/cocomix       # learning curves, from logs
    python eval.py out/stdlib/cocomix --steering         # the effect of steering, and its cost

val loss: the mean over val.bin in blocks of block_size; every token but the first is a target once.
hit rate: the share of label concepts among the concept_k predicted ones; "most common": the same
for always predicting the concept_k most common labels. The paper's seven tasks give the numbers of
lm-evaluation-harness 0.4. Evaluations are appended to the run's eval.jsonl, from which --compare
draws the paper's Figures 2 and 7 to 9. What can't be computed, because a run's dataset or concept
model is missing or has changed, is named and left out.
"""
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from support.runtime import UserError, progress, run  # before torch

import torch

import concepts
from model import load_gpt, load_model
from support import curves
from support.checkpoint import (
    RUN,
    files_of_run,
    find_checkpoint,
    index_name,
    load_checkpoint,
    relocate,
)
from support.cli import key, parse
from support.concept_index import index_of_run
from support.curves import append_rows
from support.device import pick_device
from support.log import read_log
from support.published import find_weights
from support.steering import STEERING, plot_steering, steering, steering_summary
from support.tasks import DETAILS, choose_tasks, details, run_task
from support.tokens import is_unchanged, sequential, tokenizer_of_run, tokens_of_run

@dataclass(frozen=True)
class Config:
    tokens: int | None = key(None, "val tokens to evaluate on (none: all)", low=2)
    batch_size: int = key(16, "sequences per batch", low=1)
    official: bool = key(False, "also perplexity as the official code computes it")
    tasks: str = key("auto", "all, none or names; auto: all with eval_data or for GPT-2's tokens",
                     bare="all", follows=r"[a-z_,]+$")
    eval_data: str | None = key(None, "folder of the tasks' NAME.jsonl[.gz] (none: download them)")
    limit: int | None = key(None, "first documents of each task to use (none: all)", low=1)
    model: str | None = key(None, "also evaluate gpt2 (downloaded), or a folder of its weights")
    dataset: str | None = key(None, "evaluate on this one (none: the run's, where it was)")
    concept_model: str | None = key(None, "where the run's concept model is (none: where it was)")
    sae: str | None = key(None, "where its SAE is (none: where it was)")
    out_dir: str | None = key(None, "folder for eval.jsonl and concepts.pt (none: the run's)")
    every: bool = key(False, "all checkpoints of a run (train.py --keep_checkpoints)")
    compare: bool = key(False, "only learning curves, and the cost of the first run's final loss")
    plot: str | None = key(None, "picture to draw, .png, .svg or .pdf; no suffix: .png and .svg "
                           "(--compare: out/compare)")
    steering: bool = key(False, "steer: how often typical next tokens appear, and the perplexity")
    steered: int = key(32, "concepts to steer, those that the run predicts most", low=1)
    write: str | None = key(None, "append the rows to this .jsonl file")
    overwrite: bool = key(False, "--plot: replace a file that this command did not draw")
    device: str = key("auto", "cpu, cuda or mps; auto: the fastest available")

@torch.no_grad()
def evaluate(content, model, device, tokens=None, batch_size=16, other=False):
    """The validation part of a row; label_concepts: how many different concepts are labels. other:
    see tokens_of_run."""
    val, c = tokens_of_run(content, "val", other)[:tokens and tokens + 1], model.config
    concept_model = labels = None
    with left_out("concept loss and hit rate"):
        concept_model = concepts.concept_model_of_run(content, device, dtype="float32")
    count, loss, concept_loss, hits, labelled = len(val) - 1, 0, 0, 0, 0
    with progress(count, "evaluate", "tok", unit_scale=True, leave=False) as bar:
        for x, y in sequential(val, c.block_size, batch_size, c.vocab_size):
            x, y = x.to(device), y.to(device)
            if concept_model is not None:
                labels = concept_model.labels(x, y)
            out = model(x, y, labels)
            loss += out.loss.item() * y.numel()
            if labels is not None:
                concept_loss += out.concept_loss.item() * y.numel()
            if labels is not None and out.concepts is not None:
                hit = (labels[..., :, None] == out.concepts.indices[..., None, :]).any(-1)
                hits += hit.float().mean(-1).sum().item()
                labelled += torch.bincount(labels.flatten(), minlength=c.n_concepts)
            bar.update(y.numel())
    row = dict(loss=loss / count, perplexity=curves.perplexity(loss / count), val_tokens=count)
    if labels is not None:
        row["concept_loss"] = concept_loss / count
    if labels is not None and c.insert == "concept":
        fixed = labelled.topk(c.concept_k).values.sum() / labelled.sum()
        row |= dict(label_concepts=labelled.count_nonzero().item(), hit_rate=hits / count,
                    fixed_hit_rate=fixed.item())
    return row

@torch.no_grad()
def official_perplexity(content, model, device, tokens=None, batch_size=16, other=False):
    """As the official code computes it: block_size - 1 targets per block, the remainder dropped."""
    size, val = model.config.block_size, tokens_of_run(content, "val", other)[:tokens]
    assert len(val) >= size, (f"official: {len(val)} val tokens are less than one block of {size}; "
                              "evaluate on more --tokens")
    blocks = torch.from_numpy(val[:len(val) // size * size].astype("int64")).view(-1, size)
    loss = 0.0
    for rows in blocks.to(device).split(batch_size):
        loss += model(rows[:, :-1], rows[:, 1:]).loss.item() * len(rows)
    return curves.perplexity(loss / len(blocks))

def evaluate_checkpoint(name, content, model, tasks, device, cfg, log=()):
    """A row of the tables. tasks: {name: documents}. log: the run's lines up to the checkpoint."""
    trained = content["train_config"]
    row = dict(run=name, method=trained["method"])
    if model.config.insert != "none":
        row["mix"] = trained["mix"]
    if model.config.insert == "concept":
        row["select"] = trained["select"]
    if log:
        row |= curves.training(log)
    if "step" in content:
        tokens = content["step"] * trained["batch_size"] * trained["block_size"]
        row |= dict(step=content["step"], tokens=tokens)
    assert trained["dataset"] or tasks, (
        f"nothing to evaluate {name} on: add --dataset=NAME, in GPT-2's tokens, or --eval_data=DIR")
    if trained["dataset"]:
        size = cfg.tokens, cfg.batch_size, cfg.dataset is not None
        with left_out("val loss", tasks):
            row |= evaluate(content, model, device, *size)
        with left_out("official perplexity", tasks):
            if cfg.official:
                row["official_perplexity"] = official_perplexity(content, model, device, *size)
    if tasks:
        tokenizer = tokenizer_of_run(content)
        for task, documents in tasks.items():
            row |= run_task(task, documents, model, tokenizer, cfg.batch_size)
        row |= curves.averages(row)
        after = f" after {row['tokens']:,} tokens" if "tokens" in row else ""
        print(f"{name}{after}, on {device}:\n{curves.table(details(row, tasks), DETAILS)}\n")
    return row

@contextmanager
def left_out(what, anything_else=True):
    """Where the body fails, print what is left out and why; raise if there is nothing else."""
    try:
        yield
    except (UserError, AssertionError, OSError) as e:
        if not anything_else:
            raise
        print(f"left out: {what}: {e}")

def checkpoints(path, every):
    """A run's last checkpoint, or all that it kept, in order."""
    if not every:
        return [path]
    kept = sorted(files_of_run(path.parent, "step_*.pt"), key=lambda path: int(path.stem[5:]))
    assert kept, (f"{path.parent} has its last checkpoint only; --every needs a run trained with "
                  "--keep_checkpoints")
    return kept

def main_evaluate(cfg, runs, device):
    runs = runs or ([None] if cfg.model is None else [])  # None: the newest
    rows, tasks = [], cache(partial(choose_tasks, cfg.tasks, cfg.eval_data, cfg.limit))
    named = curves.named([find_checkpoint(run, cfg.out_dir) for run in runs])
    logs = {name: read_log(path.with_name("log.jsonl")) for name, path in named
            if path.with_name("log.jsonl").is_file()}
    assert logs or not cfg.plot, "nothing to draw: no log.jsonl next to these checkpoints"
    for name, path in named:
        with left_out(name, len(named) > 1):
            for checkpoint in checkpoints(path, cfg.every):
                content = load_checkpoint(checkpoint, (*RUN, "step"))
                relocate(content, cfg)
                so_far = [line for line in logs.get(name, []) if line["step"] <= content["step"]]
                rows.append(evaluate_checkpoint(
                    name, content, load_model(content, device), tasks(content["tokenizer_hash"]),
                    device, cfg, so_far))
                other = "loss" in rows[-1] and not is_unchanged(content, "val")
                about = dict(limit=cfg.limit, dataset=cfg.dataset if other else None,
                             batch_size=cfg.batch_size, evaluated_on=str(device))
                with left_out("a line in eval.jsonl (--out_dir=FOLDER writes it elsewhere)"):
                    append_rows(Path(cfg.out_dir or path.parent) / "eval.jsonl", rows[-1] | about)
    if cfg.model:
        assert find_weights(cfg.model), (f"model={cfg.model!r} is not GPT-2's weights; name a run "
                                         f"without a key: python eval.py {cfg.model}")
        model, tokenizer = load_gpt(cfg.model, device)
        assert tokenizer == "gpt2", f"model={cfg.model!r} has other tokens than GPT-2's"
        content = dict(model_config=asdict(model.config), tokenizer="gpt2", tokenizer_hash="gpt2",
                       train_config=dict(method="gpt2", dataset=cfg.dataset))
        rows.append(evaluate_checkpoint(cfg.model, content, model, tasks("gpt2"), device, cfg))
    assert rows, "none of these runs can be evaluated"
    if any("loss" in row for row in rows):
        print(curves.table(rows))
    if any("/" in name for row in rows for name in row):
        print(f"\n{curves.table(rows, curves.TABLE_1)}")
    if cfg.write:
        append_rows(cfg.write, *rows)
    if cfg.plot:
        print(f"curves: {curves.plot(cfg.plot, curves.read_curves(logs))}")

def main_steering(cfg, runs, device):
    assert len(runs) < 2, f"--steering takes one run, not {len(runs)}: {' '.join(runs)}"
    path = find_checkpoint(runs[0] if runs else None, cfg.out_dir)
    content = load_checkpoint(path, RUN)
    relocate(content, cfg)
    model, val = load_model(content, device), tokens_of_run(content, "val", bool(cfg.dataset))
    assert model.config.insert == "concept" and model.config.mix != "none", (
        f"{path}: nothing to steer: --steering needs a cocomix run with a mix")
    concept_model = cache(partial(concepts.concept_model_of_run, content, device, dtype="float32"))
    folder = Path(cfg.out_dir or path.parent)
    index = index_of_run(folder, content, model, concept_model, device, name=index_name(path))
    models = {"CoCoMix": model}
    with left_out("steering the concept model"):
        models["concept model"] = concepts.steerable(concept_model())
    rows = steering(models, index, val, device, cfg.steered)
    summary = steering_summary(rows)
    print(curves.table(summary, STEERING))
    if cfg.write:
        append_rows(cfg.write, *rows)
    if cfg.plot:
        print(f"curves: {plot_steering(cfg.plot, summary)}")

def main(argv):
    cfg, runs = parse(Config, argv, __doc__, files=False)
    picture = cfg.plot or ("out/compare" if cfg.compare else None)
    curves.picture_path(picture, cfg.overwrite)
    if cfg.write:
        append_rows(cfg.write)  # if it fails, then now
    device = pick_device(cfg.device)
    torch.set_float32_matmul_precision("highest")  # TF32 would round the harness's numbers
    assert not (cfg.steering and cfg.compare), "--steering and --compare exclude each other"
    if cfg.steering:
        return main_steering(cfg, runs, device)
    if cfg.compare:
        assert runs, "--compare needs runs or their logs: python eval.py --compare out/A out/B"
        return curves.compare(runs, picture, cfg.overwrite)
    return main_evaluate(cfg, runs, device)

if __name__ == "__main__":
    run(main)
