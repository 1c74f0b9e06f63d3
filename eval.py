"""Evaluate runs and compare them.

    python eval.py out/stdlib/ntp out/stdlib/cocomix                          # one table
    python eval.py out/stdlib/ntp out/stdlib/cocomix --plot=curves.png        # and a picture of their logs
    python eval.py --compare out/stdlib/ntp out/stdlib/cocomix                # the course of training against the first run's, from the logs alone
    python eval.py out/stdlib/cocomix --steering --plot=steering.png          # what turning its concepts does, and what it costs
    python eval.py                                                            # the newest checkpoint under out/

Loss is the mean over all of val.bin, every token a target once, in blocks of block_size; perplexity is its
exponential. The concept loss and the hit rate (the share of the label concepts that are among the concept_k
predicted ones) are measured against the concept model the run was trained with; beside it stands the hit rate of
naming the same concept_k concepts, the commonest labels of val, at every position.
"""
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch

import concepts
import data
from config import UserError, key
from model import RUN, find_checkpoint, linear_cross_entropy, load_checkpoint, load_model, perplexity, pick_device


@dataclass(frozen=True)
class Config:
    tokens: int | None = key(None, "tokens of val to evaluate (none: all)", low=2)
    batch_size: int = key(16, "sequences at once", low=1)
    compare: bool = key(False, "val loss over training and what the first run's end costs the others, read from the logs; nothing is evaluated")
    plot: str | None = key(None, "draw val loss against tokens, FLOPs and time into this .png, .svg or .pdf; no suffix: .png and .svg (--compare: out/compare)")
    steering: bool = key(False, "steer by the most used concepts: how often their own tokens come, and the perplexity, by factor")
    steered: int = key(32, "so many concepts, those that the run predicts most", low=1)
    write: str | None = key(None, "append the rows to this .jsonl file")
    device: str = key("auto", "cpu, cuda, mps; auto takes the fastest there is")


@torch.no_grad()
def evaluate(content, device, tokens=None, batch_size=16):
    """A checkpoint's content → dict: loss (nats), perplexity, and for a CoCoMix run concept_loss, hit_rate and fixed_hit_rate."""
    model, concept_model = load_model(content, device), concepts.of_run(content, device)
    val = data.tokens_of_run(content, "val")[:None if tokens is None else tokens + 1]
    loss, concept_loss, hits, count = 0.0, 0.0, 0.0, 0
    labelled = torch.zeros(model.config.n_concepts, dtype=torch.long, device=device)
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
                labelled += torch.bincount(labels.flatten(), minlength=len(labelled))
            count += y.numel()
            bar.update(y.numel())
    row = dict(loss=loss / count, perplexity=perplexity(loss / count), val_tokens=count)
    if concept_model is not None:
        row["concept_loss"] = concept_loss / count
    if model.config.insert == "concept":
        row |= dict(hit_rate=hits / count, fixed_hit_rate=(labelled.topk(model.config.concept_k).values.sum() / labelled.sum()).item())
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
           ("concept_loss", "concept loss", "{:.3f}"), ("hit_rate", "hit rate", "{:.1%}"), ("fixed_hit_rate", "by commonest", "{:.1%}"))


def table(rows, columns=COLUMNS):
    """Rows (dicts) as lines of text, a column for each of the (key, title, format) that some row has; – where one has no value."""
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
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


class Curve(NamedTuple):
    """The course of one method's training: means over its seeds at the evaluations that all of them share."""
    tokens: list[int]
    losses: list[list[float]]  # of each seed, at each of tokens
    seconds: list[float]
    flops_per_token: float     # with those that make the labels, wherever they were made

    @property
    def loss(self):
        """Mean over the seeds."""
        return [statistics.fmean(at) for at in zip(*self.losses)]

    @property
    def spread(self):
        """Half the distance between the best and the worst seed at the end; None for one seed."""
        last = [losses[-1] for losses in self.losses]
        return (max(last) - min(last)) / 2 if len(last) > 1 else None


def curves(logs):
    """{name: log lines} → {name: Curve}. Logs called NAME-SEED, with the seed they were trained with, are one method NAME."""
    groups = {}
    for name, log in logs.items():
        seed = str(log[0].get("seed")) if log else "None"
        groups.setdefault(name.removesuffix(f"-{seed}"), []).append(log)
    found = {}
    for name, group in groups.items():
        points = [{line["tokens"]: line for line in log if "val_loss" in line and line["tokens"]} for log in group]
        shared = sorted(set.intersection(*map(set, points)))
        if not shared:
            raise UserError(f"{name}: no evaluation after the start is in its log" + ("s" if len(group) > 1 else "") + "; train on, or with a smaller --eval_interval")
        start = group[0][0]
        found[name] = Curve(shared, [[at[t]["val_loss"] for t in shared] for at in points],
                            [statistics.fmean(at[t]["seconds"] for at in points) for t in shared],
                            (start.get("flops_per_token") or 0) + (start.get("concept_flops_per_token") or 0))
    return found


def tokens_to_reach(curve, loss):
    """Tokens after which a curve is first at or below `loss`, linear between its evaluations; None if it never is."""
    before = None
    for tokens, value in zip(curve.tokens, curve.loss):
        if value <= loss:
            return tokens if before is None else before[0] + (tokens - before[0]) * (before[1] - loss) / (before[1] - value)
        before = tokens, value
    return None


def course(runs, columns=4):
    """{name: Curve} as a Markdown table: val loss at up to `columns` evaluations that all share, the last with half the
    distance between the best and worst seed; what it takes to come to the first run's last loss, in tokens and in FLOPs, as
    shares of the first run's; seconds and FLOPs of the whole run."""
    shared = sorted(set.intersection(*(set(run.tokens) for run in runs.values())))
    if not shared:
        raise UserError("these runs share no evaluation: compare runs of one eval_interval and batch size")
    n = min(columns, len(shared))
    shown = [shared[round((i + 1) * len(shared) / n) - 1] for i in range(n)]
    first = next(iter(runs.values()))
    goal, end = first.loss[first.tokens.index(shared[-1])], shared[-1]
    rows = [["run", "seeds", *(f"loss at {tokens / 1e6:.2f}M" for tokens in shown), "tokens needed", "FLOPs needed", "FLOPs", "seconds"]]
    rows.append(["---"] + ["---:"] * (len(rows[0]) - 1))
    for name, run in runs.items():
        at = {t: loss for t, loss in zip(run.tokens, run.loss)}
        cells = [f"{at[t]:.3f}" for t in shown]
        if run.spread is not None and run.tokens[-1] == end:
            cells[-1] += f" ± {run.spread:.3f}"
        needed, known = tokens_to_reach(run, goal), run.flops_per_token and first.flops_per_token
        share = lambda tokens, by=1.0: "not reached" if needed is None else f"{tokens * by / end:.1%}"
        rows.append([name, str(len(run.losses)), *cells, share(needed), share(needed, run.flops_per_token / first.flops_per_token) if known else "–",
                     f"{run.flops_per_token * run.tokens[-1]:.2e}" if known else "–", f"{run.seconds[-1]:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(path, runs):
    """{name: Curve}: val loss against tokens, FLOPs and training time, a line for each, a band from its best to its worst seed.
    A path without a suffix gives a .png and an .svg; returns the paths."""
    plt = config.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for name, run in runs.items():
        for axis, at in zip(axes, (run.tokens, [t * run.flops_per_token for t in run.tokens], run.seconds)):
            line, = axis.plot(at, run.loss, marker="o", markersize=3, label=name)
            if len(run.losses) > 1:
                axis.fill_between(at, [min(v) for v in zip(*run.losses)], [max(v) for v in zip(*run.losses)], color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, label in zip(axes, ("training tokens", "training FLOPs", "training time (s)")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    axes[0].set_ylabel("validation loss (nats a token)")
    axes[0].legend(frameon=False)
    paths = [Path(path)] if Path(path).suffix else [Path(f"{path}.png"), Path(f"{path}.svg")]
    for path in paths:
        config.save_figure(figure, path)
    plt.close(figure)
    return " ".join(map(str, paths))


# ---------------------------------------------------------------------------------------------------
# Steering

FACTORS = (-10.0, -5.0, -2.0, 0.0, 1.0, 2.0, 5.0, 10.0)  # 1 is plain
PROMPTS, PROMPT, NEW, COST = 32, 16, 64, 2048  # prompts, their tokens, the tokens generated; tokens for the perplexity


@torch.no_grad()
def steering(path, content, device, steered):
    """What steering by a concept does and what it costs, for the `steered` concepts that the run predicts most (and
    that were labels, so that they have own tokens): rows with speaker, concept, factor, own, tokens, loss.

    A concept's own tokens are its dictionary's (concepts.py): the NAME tokens that follow it most typically in the *training*
    text, so they don't depend on anything measured here. Each of PROMPTS beginnings of *val* blocks, PROMPT tokens, is
    continued by NEW tokens (temperature 1, all tokens), the concept's logit times the factor at every position:

        own    how many of the generated `tokens` are the concept's own; at factor 1, the plain count: the same prompts, the same
               tokens counted, the same luck (one random number a token for all factors; other luck for other concepts)
        loss   nats a token on COST tokens of val under the same steering, each given those before it: what it does to text
               that has nothing to do with the concept. Its exponential is the perplexity.

    The speakers are the run ("CoCoMix") and its frozen concept model, steered at the same concept in the SAE's space
    (concepts.SteeredSAE). A factor of 10 need not be as strong for the one as for
    the other: compare rates at equal perplexities. A rate can rise because the concept is written about, or because its
    tokens are merely pasted in; the perplexity tells the two apart only in part.
    """
    model = load_model(content, device)
    d = concepts.dictionary_of(path, content, model, device)
    concept_model = concepts.of_run(content, device)
    chosen = [c for c in d.predicted.argsort(descending=True, stable=True).tolist() if d.predicted[c] and d.own[c, 0] >= 0][:steered]
    C, val = model.config.n_concepts, data.tokens_of_run(content, "val")
    rows = []
    for name, speaker in (("CoCoMix", model), ("concept model", concepts.steerable(concept_model))):
        c = speaker.config
        T = min(c.block_size, model.config.block_size)
        blocks = data.Batches(val, T, 1, c.vocab_size, shift=False)
        n = lambda most: range(min(most, blocks.blocks))
        prompts = torch.cat([blocks[i][0][:, :PROMPT] for i in n(PROMPTS)]).to(device)
        below = [(speaker.blocks(speaker.embed(x.to(device)), 0, c.insert_layer)[0], y.to(device)) for x, y in (blocks[i] for i in n(-(-COST // T)))]  # no factor reaches these
        with config.progress(len(chosen), f"steer {name}", "concept", leave=False) as bar:
            for concept in chosen:
                scale = torch.ones(len(FACTORS), 1, C, device=device)
                scale[:, 0, concept] = torch.tensor(FACTORS, device=device)
                texts = speaker.generate(prompts, NEW, scale=scale, generator=torch.Generator(device).manual_seed(concept))[:, prompts.shape[1]:]
                own = torch.isin(texts, d.own[concept, :concepts.NAME].to(device)).view(len(FACTORS), -1)
                for factor, s, hits in zip(FACTORS, scale, own):
                    loss = [linear_cross_entropy(speaker.ln_f(speaker.blocks(h, c.insert_layer, c.n_layer, scale=s)[0]), speaker.wte.weight, y, c.vocab_size)[0].item() for h, y in below]
                    rows.append(dict(speaker=name, concept=concept, factor=factor, own=hits.sum().item(), tokens=hits.numel(), loss=sum(loss) / len(loss)))
                bar.update()
    return rows


def steering_summary(rows):
    """Rows of `steering`, averaged over its concepts: speaker, factor, rate, gain, its standard error, raised, perplexity.

    rate: the share of own tokens. gain: the geometric mean over the concepts of (own + 1) / (own, plain, + 1), so that each
    concept counts alike and one whose tokens never came plain does not count without end; its standard error is over the
    concepts, to first order. raised: the share of concepts whose own tokens came oftener than plain.
    """
    summary = []
    for speaker in dict.fromkeys(row["speaker"] for row in rows):
        at = {factor: [row for row in rows if row["speaker"] == speaker and row["factor"] == factor] for factor in FACTORS}
        own = lambda some: torch.tensor([row["own"] for row in some], dtype=torch.float64)
        for factor, some in at.items():
            logs = ((own(some) + 1) / (own(at[1.0]) + 1)).log()
            gain, error = logs.mean().exp().item(), logs.std(correction=min(1, len(logs) - 1)).item() / len(logs) ** 0.5
            summary.append(dict(speaker=speaker, factor=factor, rate=sum(row["own"] / row["tokens"] for row in some) / len(some), gain=gain, gain_error=gain * error,
                                raised=(logs > 0).double().mean().item(), perplexity=perplexity(sum(row["loss"] for row in some) / len(some))))
    return summary


STEERING = (("speaker", "model", "{}"), ("factor", "factor", "{:g}"), ("rate", "own tokens", "{:.2%}"), ("gain", "× plain", "{:.2f}"), ("gain_error", "± s.e.", "{:.2f}"),
            ("raised", "concepts raised", "{:.0%}"), ("perplexity", "val perplexity", "{:.1f}"))


def plot_steering(path, summary):
    """Own tokens over plain, and perplexity, by factor; and the one against the other: a line a model."""
    plt = config.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for speaker in dict.fromkeys(row["speaker"] for row in summary):
        some = [row for row in summary if row["speaker"] == speaker]
        values = {name: [row[name] for row in some] for name in some[0]}
        plain = next(row["perplexity"] for row in some if row["factor"] == 1)
        cost = [p / plain for p in values["perplexity"]]
        axes[0].errorbar(values["factor"], values["gain"], values["gain_error"], marker="o", markersize=4, capsize=2, label=speaker)
        axes[1].plot(values["factor"], cost, marker="o", markersize=4)
        axes[2].errorbar(cost, values["gain"], values["gain_error"], marker="o", markersize=4, capsize=2, linestyle="none")
        for factor, x, y in zip(values["factor"], cost, values["gain"]):
            axes[2].annotate(f"{factor:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    for axis, x, y in zip(axes, ("factor", "factor", "val perplexity over plain"), ("rate of own tokens over plain", "val perplexity over plain", "rate of own tokens over plain")):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    config.save_figure(figure, path)
    plt.close(figure)


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


def write(path, rows):
    """Append rows to a .jsonl file; no path, nothing."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n" for row in rows)


def main_steering(cfg, runs, device):
    config.picture_path(cfg.plot)
    if len(runs) > 1:
        raise UserError(f"--steering takes one run, not {len(runs)}: {' '.join(runs)}")
    path = find_checkpoint(runs[0] if runs else None)
    content = load_checkpoint(path, RUN)
    if content["model_config"]["insert"] != "concept" or content["model_config"]["mix"] == "none":
        raise UserError(f"{path}: nothing to steer: --steering needs a cocomix run that mixes its concepts in")
    rows = steering(path, content, device, cfg.steered)
    summary = steering_summary(rows)
    print(table(summary, STEERING))
    write(cfg.write, rows)
    if cfg.plot:
        plot_steering(cfg.plot, summary)
        print(f"curves: {cfg.plot}")


def main(argv):
    cfg, runs = config.parse(Config, argv, __doc__, files=False)
    if cfg.plot and Path(cfg.plot).suffix:
        config.picture_path(cfg.plot)
    if cfg.write and Path(cfg.write).is_dir():
        raise UserError(f"{cfg.write} is a folder; name a file in it")
    device = pick_device(cfg.device)
    if cfg.steering:
        return main_steering(cfg, runs, device)
    if cfg.compare:
        if not runs:
            raise UserError("--compare needs runs, or logs of runs: python eval.py --compare out/A out/B")
        logs = {name: config.read_log(path) for name, path in named([log_of(run) for run in runs])}
        print(course(curves(logs)))
        print(f"curves: {plot(cfg.plot or 'out/compare', curves(logs))}")
        return
    rows, logs = [], {}
    for name, path in named([find_checkpoint(run) for run in runs or [None]]):
        row, log = evaluate_run(name, path, device, cfg)
        rows.append(row)
        if log:
            logs[name] = log
    print(table(rows))
    write(cfg.write, rows)
    if cfg.plot:
        if not logs:
            raise UserError("nothing to draw: no log.jsonl beside these checkpoints")
        print(f"curves: {plot(cfg.plot, curves(logs))}")


if __name__ == "__main__":
    config.run(main)
