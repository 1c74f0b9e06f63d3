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
for always predicting the concept_k most common labels. Labels are those of the run's concept model.

The paper's seven tasks give the numbers of lm-evaluation-harness 0.4, in float32. They run by
default for GPT-2's tokens, else with --tasks or --eval_data. Each evaluation is appended to the
run's eval.jsonl, from which --compare draws the paper's Figures 2 and 7 to 9.
"""
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from support.runtime import UserError, progress, run  # before torch

import torch

import concepts
from model import load_gpt, load_model
from support import curves
from support.checkpoint import RUN, find_checkpoint, load_checkpoint
from support.cli import key, parse
from support.concept_index import index_of_run
from support.device import pick_device
from support.log import read_log
from support.steering import STEERING, plot_steering, steering, steering_summary
from support.tasks import DETAILS, choose_tasks, details, run_task
from support.tokens import load_tokenizer, sequential, tokens_of_run

@dataclass(frozen=True)
class Config:
    tokens: int | None = key(None, "val tokens to evaluate on (none: all)", low=2)
    batch_size: int = key(16, "sequences per batch", low=1)
    official: bool = key(False, "also perplexity as the official code computes it")
    tasks: str = key("auto", "all, none or names: piqa,arc_easy; auto: all with eval_data or for a "
                     "run in GPT-2's tokens, else none", bare="all", follows=r"[a-z_,]+$")
    eval_data: str | None = key(None, "folder of the tasks' documents, NAME.jsonl[.gz], fields as "
                                "on the hub (none: download them)")
    limit: int | None = key(None, "first documents of each task to use (none: all)", low=1)
    model: str | None = key(None, "also evaluate gpt2 (downloaded), or a folder of its weights")
    dataset: str | None = key(None, "val.bin to evaluate --model on, in GPT-2's tokens")
    every: bool = key(False, "all checkpoints of a run (train.py --keep_checkpoints)")
    compare: bool = key(False, "only learning curves, and the cost of the first run's final loss")
    plot: str | None = key(None, "draw val loss into this .png, .svg or .pdf; no suffix: .png and "
                           ".svg (--compare: out/compare)")
    steering: bool = key(False, "steer: how often typical next tokens appear, and the perplexity")
    steered: int = key(32, "concepts to steer, those that the run predicts most", low=1)
    write: str | None = key(None, "append the rows to this .jsonl file")
    device: str = key("auto", "cpu, cuda or mps; auto: the fastest available")

@torch.no_grad()
def evaluate(content, model, device, tokens=None, batch_size=16):
    """The validation part of a row; label_concepts: how many different concepts are labels."""
    concept_model, c = concepts.concept_model_of_run(content, device), model.config
    val = tokens_of_run(content, "val")[:tokens and tokens + 1]
    loss, concept_loss, hits, count, labelled = 0.0, 0.0, 0.0, 0, 0
    with progress(len(val) - 1, "evaluate", "tok", unit_scale=True, leave=False) as bar:
        for x, y in sequential(val, c.block_size, batch_size, c.vocab_size):
            x, y = x.to(device), y.to(device)
            labels = None if concept_model is None else concept_model.labels(x, y)
            out = model(x, y, labels)
            loss += out.loss.item() * y.numel()
            if labels is not None:
                concept_loss += out.concept_loss.item() * y.numel()
            if out.concepts is not None:
                hit = (labels[..., :, None] == out.concepts.indices[..., None, :]).any(-1)
                hits += hit.float().mean(-1).sum().item()
                labelled += torch.bincount(labels.flatten(), minlength=c.n_concepts)
            count += y.numel()
            bar.update(y.numel())
    row = dict(loss=loss / count, perplexity=curves.perplexity(loss / count), val_tokens=count)
    if concept_model is not None:
        row["concept_loss"] = concept_loss / count
    if c.insert == "concept":
        fixed = labelled.topk(c.concept_k).values.sum() / labelled.sum()
        row |= dict(label_concepts=(labelled > 0).sum().item(), hit_rate=hits / count,
                    fixed_hit_rate=fixed.item())
    return row

@torch.no_grad()
def official_perplexity(content, model, device, tokens=None, batch_size=16):
    """As the official code computes it: block_size - 1 targets per block, the remainder dropped."""
    size, val = model.config.block_size, tokens_of_run(content, "val")[:tokens]
    assert len(val) >= size, f"official: val has {len(val)} tokens, less than one block of {size}"
    blocks = torch.from_numpy(val[:len(val) // size * size].astype("int64")).view(-1, size)
    loss = 0.0
    for rows in blocks.to(device).split(batch_size):
        loss += model(rows[:, :-1], rows[:, 1:]).loss.item() * len(rows)
    return curves.perplexity(loss / len(blocks))

def evaluate_checkpoint(name, content, model, log, tasks, device, cfg):
    """A row of the tables. log: the run's lines up to the checkpoint. tasks: {name: documents}."""
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
    if trained["dataset"] is None and not tasks:
        raise UserError(f"nothing to evaluate {name} on: add --dataset=NAME, in GPT-2's tokens, or "
                        "--eval_data=DIR with the tasks' documents")
    if trained["dataset"] is not None:
        size = cfg.tokens, cfg.batch_size
        row |= evaluate(content, model, device, *size)
        if cfg.official:
            row["official_perplexity"] = official_perplexity(content, model, device, *size)
    if tasks:
        tokenizer = load_tokenizer(content["tokenizer"])
        for task, documents in tasks.items():
            row |= run_task(task, documents, model, tokenizer, cfg.batch_size)
        row |= curves.averages(row)
        after = f" after {row['tokens']:,} tokens" if "tokens" in row else ""
        print(f"{name}{after}, on {device}:\n{curves.table(details(row, tasks), DETAILS)}\n")
    return row

def append(path, *rows):
    """Add rows to a .jsonl file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for row in rows:
            row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            file.write(json.dumps(row) + "\n")

def evaluate_all(cfg, paths, device):
    """Evaluate checkpoints and cfg.model: (rows, {name: log}). Rows are appended to eval.jsonl."""
    rows, logs = [], {}
    tasks = functools.cache(functools.partial(choose_tasks, cfg.tasks, cfg.eval_data, cfg.limit))
    for name, path in curves.named(paths):
        log_path = path.with_name("log.jsonl")
        logs[name] = read_log(log_path) if log_path.is_file() else []
        kept = [path]
        if cfg.every:
            kept = sorted(path.parent.glob("step_*.pt"), key=lambda path: int(path.stem[5:]))
        if not kept:
            raise UserError(f"{path.parent} has its last checkpoint only; --every needs a run "
                            "trained with --keep_checkpoints")
        for checkpoint in kept:
            content = load_checkpoint(checkpoint, (*RUN, "step"))
            so_far = [line for line in logs[name] if line["step"] <= content["step"]]
            rows.append(evaluate_checkpoint(name, content, load_model(content, device), so_far,
                                            tasks(content["tokenizer_hash"]), device, cfg))
            about = dict(limit=cfg.limit, batch_size=cfg.batch_size, evaluated_on=str(device))
            append(path.with_name("eval.jsonl"), rows[-1] | about)
    if cfg.model is not None:
        model, tokenizer = load_gpt(cfg.model, device)
        if tokenizer != "gpt2":
            raise UserError(f"model={cfg.model!r} is a run of ours, not GPT-2: leave --model= out")
        content = dict(model_config=asdict(model.config), tokenizer="gpt2", tokenizer_hash="gpt2",
                       train_config=dict(method="gpt2", dataset=cfg.dataset))
        rows.append(evaluate_checkpoint(cfg.model, content, model, [], tasks("gpt2"), device, cfg))
    return rows, {name: log for name, log in logs.items() if log}

def main_evaluate(cfg, runs, device):
    torch.set_float32_matmul_precision("highest")  # TF32 would round the harness's numbers
    runs = runs or ([None] if cfg.model is None else [])  # None: the newest
    rows, logs = evaluate_all(cfg, list(map(find_checkpoint, runs)), device)
    if any("loss" in row for row in rows):
        print(curves.table(rows))
    if any("/" in name for row in rows for name in row):
        print(f"\n{curves.table(rows, curves.TABLE_1)}")
    if cfg.write:
        append(cfg.write, *rows)
    if cfg.plot:
        assert logs, "nothing to draw: no log.jsonl next to these checkpoints"
        print(f"curves: {curves.plot(cfg.plot, curves.read_curves(logs))}")

def main_steering(cfg, runs, device):
    curves.picture_path(cfg.plot)
    assert len(runs) < 2, f"--steering takes one run, not {len(runs)}: {' '.join(runs)}"
    path = find_checkpoint(runs[0] if runs else None)
    content = load_checkpoint(path, RUN)
    model, val = load_model(content, device), tokens_of_run(content, "val")
    assert model.config.insert == "concept" and model.config.mix != "none", (
        f"{path}: nothing to steer: --steering needs a cocomix run with a mix")
    concept_model = concepts.concept_model_of_run(content, device)
    index = index_of_run(path, content, model, concept_model, device)
    models = {"CoCoMix": model, "concept model": concepts.steerable(concept_model)}
    rows = steering(models, index, val, device, cfg.steered)
    summary = steering_summary(rows)
    print(curves.table(summary, STEERING))
    if cfg.write:
        append(cfg.write, *rows)
    if cfg.plot:
        print(f"curves: {plot_steering(cfg.plot, summary)}")

def main(argv):
    cfg, runs = parse(Config, argv, __doc__, files=False)
    if cfg.plot and Path(cfg.plot).suffix:
        curves.picture_path(cfg.plot)
    if cfg.write and Path(cfg.write).is_dir():
        raise UserError(f"{cfg.write} is a folder; name a file in it")
    if cfg.dataset is not None and cfg.model is None:
        raise UserError("--dataset is for --model; a run is evaluated on its own dataset")
    device = pick_device(cfg.device)
    if cfg.steering:
        return main_steering(cfg, runs, device)
    if cfg.compare:
        assert runs, "--compare needs runs or their logs: eval.py --compare out/A out/B"
        return curves.compare(runs, cfg.plot or "out/compare")
    return main_evaluate(cfg, runs, device)

if __name__ == "__main__":
    run(main)
