"""Evaluate runs and compare them.

    python eval.py out/stdlib/ntp out/stdlib/cocomix                          # one table
    python eval.py out/stdlib/ntp out/stdlib/cocomix --plot=curves.png        # and a picture of their logs
    python eval.py --compare out/stdlib/ntp out/stdlib/cocomix                # the course of training, from the logs alone
    python eval.py                                                            # the newest checkpoint under out/

Loss is the mean over all of val.bin, every token a target once, in blocks of block_size; perplexity is its
exponential. The concept loss and the hit rate (the share of the label concepts that are among the concept_k
predicted ones) are measured against the concept model the run was trained with.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch

import concepts
import data
from config import UserError, key
from model import RUN, find_checkpoint, load_checkpoint, load_model, perplexity, pick_device


@dataclass(frozen=True)
class Config:
    tokens: int | None = key(None, "tokens of val to evaluate (none: all)", low=2)
    batch_size: int = key(16, "sequences at once", low=1)
    compare: bool = key(False, "val loss over training, read from the logs; nothing is evaluated")
    plot: str | None = key(None, "draw val loss against tokens and time into this .png or .svg")
    write: str | None = key(None, "append the rows to this .jsonl file")
    device: str = key("auto", "cpu, cuda, mps; auto takes the fastest there is")


@torch.no_grad()
def evaluate(content, device, tokens=None, batch_size=16):
    """A checkpoint's content → dict: loss (nats), perplexity, and for a CoCoMix run concept_loss and hit_rate."""
    model, concept_model = load_model(content, device), concepts.of_run(content, device)
    val = data.tokens_of_run(content, "val")[:None if tokens is None else tokens + 1]
    loss, concept_loss, hits, count = 0.0, 0.0, 0.0, 0
    with config.progress(len(val) - 1, "evaluate", "tok", unit_scale=True, leave=False) as bar:
        for x, y in data.sequential(val, model.config.block_size, batch_size, model.config.vocab_size):
            x, y = x.to(device), y.to(device)
            labels = None if concept_model is None else concept_model.labels(x, y)
            out = model(x, y, labels)
            loss += out.loss.item() * y.numel()
            if labels is not None:
                concept_loss += out.concept_loss.item() * y.numel()
            if out.concepts is not None:
                hits += (labels[..., :, None] == out.concepts.indices[..., None, :]).any(-1).float().mean(-1).sum().item()
            count += y.numel()
            bar.update(y.numel())
    row = dict(loss=loss / count, perplexity=perplexity(loss / count), val_tokens=count)
    if concept_model is not None:
        row["concept_loss"] = concept_loss / count
    if model.config.insert == "concept":
        row["hit_rate"] = hits / count
    return row


def training(log):
    """What a run's log says of its training: steps, tokens, seconds, tokens/s, FLOPs a token, machine."""
    start = log[0]
    steps = [line for line in log if "loss" in line]
    end = steps[-1] if steps else dict(step=0, tokens=0, seconds=0.0)
    return dict(step=end["step"], tokens=end["tokens"], seconds=end["seconds"], tokens_per_s=end["tokens"] / end["seconds"] if end["seconds"] else None,
                **{name: start.get(name) for name in ("flops_per_token", "device", "torch", "source_hash", "active_params", "params")})


COLUMNS = (("run", "run", "{}"), ("method", "method", "{}"), ("mix", "mix", "{}"), ("select", "labels by", "{}"), ("loss", "val loss", "{:.4f}"), ("perplexity", "perplexity", "{:.2f}"), ("tokens", "tokens", "{:,}"),
           ("tokens_per_s", "tokens/s", "{:,.0f}"), ("seconds", "train s", "{:.0f}"), ("active_params", "active", "{:,}"), ("params", "params", "{:,}"),
           ("concept_loss", "concept loss", "{:.3f}"), ("hit_rate", "hit rate", "{:.1%}"))


def table(rows):
    """Rows (dicts) as lines of text, a column for each of COLUMNS that some row has; – where one has no value."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    cells = [[title for _, title, _ in columns]] + [["–" if row.get(name) is None else form.format(row[name]) for name, _, form in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [form == "{}" for _, _, form in columns]
    lines = ["  ".join(cell.ljust(w) if l else cell.rjust(w) for cell, w, l in zip(row, widths, left)) for row in cells]
    return "\n".join([lines[0], "─" * len(lines[0])] + lines[1:])


def log_of(run):
    """The log.jsonl of a run's folder, or the log itself (results/ keeps logs by name)."""
    path = Path(run) if str(run).endswith(".jsonl") else Path(run) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no log at {path}: name a run's folder or a log of one")
    return path


def named(paths):
    """[(a short name, path)]: the run's folder, or the log's own name; whole paths where two would be alike."""
    names = [path.parent.name if path.name in ("ckpt.pt", "log.jsonl") else path.stem for path in paths]
    return list(zip(names if len(set(names)) == len(names) else map(str, paths), paths))


def course(logs, columns=8):
    """Val loss at up to `columns` evaluations that all logs of {name: lines} share, as a Markdown table by tokens."""
    points = {name: {line["tokens"]: line["val_loss"] for line in log if "val_loss" in line} for name, log in logs.items()}
    shared = sorted(set.intersection(*map(set, points.values())) - {0})
    if not shared:
        raise UserError("these runs share no evaluation: compare runs of one eval_interval and batch size")
    shown = [shared[round((i + 1) * len(shared) / min(columns, len(shared))) - 1] for i in range(min(columns, len(shared)))]
    rows = [["run", *(f"{tokens / 1e6:.2f}M" for tokens in shown)]] + [[name, *(f"{at[tokens]:.3f}" for tokens in shown)] for name, at in points.items()]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(path, logs):
    """Val loss against tokens and against training time, a line for each log of {name: lines}."""
    plt = config.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, log in logs.items():
        points = [line for line in log if "val_loss" in line and line["step"]]
        for axis, by in zip(axes, ("tokens", "seconds")):
            axis.plot([p[by] for p in points], [p["val_loss"] for p in points], marker="o", markersize=3, label=name)
    for axis, label in zip(axes, ("training tokens", "training time (s)")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    axes[0].set_ylabel("validation loss (nats a token)")
    axes[0].legend(frameon=False)
    config.save_figure(figure, path)


def evaluate_run(name, path, device, cfg):
    """(a row of the table, the log's lines or None) for the checkpoint at path."""
    content = load_checkpoint(path, RUN)
    trained = content["train_config"]
    row = dict(run=name, method=trained["method"])
    if trained["method"] != "ntp":
        row["mix"] = trained["mix"]
    if trained["method"] == "cocomix":
        row["select"] = trained["select"]
    log_path = path.parent / "log.jsonl"
    log = config.read_log(log_path) if log_path.is_file() else None
    if log:
        row |= training(log)
    return row | evaluate(content, device, cfg.tokens, cfg.batch_size), log


def main(argv):
    cfg, runs = config.parse(Config, argv, __doc__, files=False)
    config.picture_path(cfg.plot)
    if cfg.write and Path(cfg.write).is_dir():
        raise UserError(f"{cfg.write} is a folder; name a file in it")
    device = pick_device(cfg.device)
    if cfg.compare:
        logs = {name: config.read_log(path) for name, path in named([log_of(run) for run in runs or [find_checkpoint().parent]])}
        print(course(logs))
    else:
        rows, logs = [], {}
        for name, path in named([find_checkpoint(run) for run in runs or [None]]):
            row, log = evaluate_run(name, path, device, cfg)
            rows.append(row)
            if log:
                logs[name] = log
        print(table(rows))
        if cfg.write:
            Path(cfg.write).parent.mkdir(parents=True, exist_ok=True)
            with open(cfg.write, "a") as file:
                file.writelines(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n" for row in rows)
    if cfg.plot:
        if not logs:
            raise UserError("nothing to draw: no log.jsonl beside these checkpoints")
        plot(cfg.plot, logs)
        print(f"curves: {cfg.plot}")


if __name__ == "__main__":
    config.run(main)
