"""Tables and pictures of training runs, read from their logs.

Seeds of one method form one Curve. Runs are compared with the first run seed by seed: a seed shares
batches and initial weights across methods, so differences vary less than the losses do.
"""
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from support.runtime import UserError

from support.log import read_log

# The paper's eight measures: key in eval.jsonl → heading in Table 1
MEASURES = {
    "perplexity": "val ppl", "lambada_openai/perplexity": "LAMBADA ppl",
    "wikitext/word_perplexity": "WikiText ppl", "hellaswag/acc_norm": "HellaSwag",
    "piqa/acc": "PIQA", "social_iqa/acc": "SIQA", "arc_easy/acc": "ARC-e",
    "winogrande/acc": "WinoG"}
AVERAGES = dict(average_perplexity=list(MEASURES)[:3],  # Table 1
                task_perplexity=list(MEASURES)[1:3],    # Figures 2 and 4
                average_accuracy=list(MEASURES)[3:])    # both

def perplexity(loss):
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf

def averages(row):
    """The AVERAGES whose measures are all in row."""
    return {name: statistics.fmean(row[measure] for measure in measures)
            for name, measures in AVERAGES.items()
            if all(row.get(measure) is not None for measure in measures)}

# --------------------------------------------------------------------------------------------------
# Tables: (key, heading, format); text ("{}") is aligned left

COLUMNS = (
    ("run", "run", "{}"), ("method", "method", "{}"), ("mix", "mix", "{}"),
    ("select", "labels by", "{}"), ("loss", "val loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"), ("tokens", "tokens", "{:,}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"), ("seconds", "train s", "{:.0f}"),
    ("active_params", "active", "{:,}"), ("params", "params", "{:,}"),
    ("concept_loss", "concept loss", "{:.3f}"), ("label_concepts", "label concepts", "{:,}"),
    ("hit_rate", "hit rate", "{:.1%}"), ("fixed_hit_rate", "most common", "{:.1%}"),
    ("official_perplexity", "official ppl", "{:.2f}"))
TABLE_1 = (("run", "run", "{}"), ("tokens", "tokens", "{:,}"),
           *((key, heading, "{:,.2f}" if heading.endswith("ppl") else "{:.1%}")
             for key, heading in MEASURES.items()),
           ("average_perplexity", "avg ppl", "{:,.2f}"), ("average_accuracy", "avg acc", "{:.1%}"))

def table(rows, columns=COLUMNS):
    """Rows (dicts) as text. Columns that no row has are left out; – stands for a missing value."""
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[heading for _, heading, _ in columns]]
    for row in rows:
        cells.append(["–" if row.get(key) is None else form.format(row[key])
                      for key, _, form in columns])
    lines = [""] * len(cells)
    for i, (_, _, form) in enumerate(columns):
        width = max(len(line[i]) for line in cells)
        for n, line in enumerate(cells):
            cell = line[i].ljust(width) if form == "{}" else line[i].rjust(width)
            lines[n] += "  " * (i > 0) + cell
    return "\n".join([lines[0], "─" * len(lines[0])] + lines[1:])

def training(log):
    """What a run's log says about its training."""
    start, steps = log[0], [line for line in log if "loss" in line]
    end = steps[-1] if steps else dict(step=0, tokens=0, seconds=0.0)
    speed = end["tokens"] / end["seconds"] if end["seconds"] else None
    known = ("flops_per_token", "device", "torch", "source_hash", "active_params", "params")
    return dict(step=end["step"], tokens=end["tokens"], seconds=end["seconds"], tokens_per_s=speed,
                **{name: start.get(name) for name in known})

# --------------------------------------------------------------------------------------------------
# Learning curves

def log_of(run):
    """The log.jsonl in a run's folder, or the log itself: results/ keeps logs under other names."""
    path = Path(run) if str(run).endswith(".jsonl") else Path(run) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no log at {path}: name the folder of a run, or its log")
    return path

def named(paths):
    """[(short name, path)]: the name of the run's folder or log; its path where names repeat."""
    runs = [path.parent if path.name in ("ckpt.pt", "log.jsonl") else path.with_suffix("")
            for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    return list(zip(names, paths, strict=True))

class Curve(NamedTuple):
    """The training of one method, at the evaluations that all of its seeds share."""
    tokens: list[int]
    seeds: list[int]
    losses: list[list[float]]  # (seeds, evaluations) validation loss
    seconds: list[float]       # of training at each seed's median tokens/s, mean over the seeds
    flops_per_token: float     # label computation included, even where labels were stored

    @property
    def loss(self):
        """Mean over the seeds."""
        return [statistics.fmean(at) for at in zip(*self.losses, strict=True)]

    def at(self, tokens):
        """{seed: loss} after so many tokens."""
        i = self.tokens.index(tokens)
        return {seed: losses[i] for seed, losses in zip(self.seeds, self.losses, strict=True)}

def read_curves(logs):
    """{name: log lines} → {name: Curve}. Logs named NAME-SEED are seeds of one method NAME."""
    groups = {}
    for name, log in logs.items():
        seed = str(log[0].get("seed")) if log else "None"
        groups.setdefault(name.removesuffix(f"-{seed}"), []).append(log)
    return {name: read_curve(name, group) for name, group in groups.items()}

def read_curve(name, logs):
    points = [{line["tokens"]: line for line in log
               if line.get("tokens") and {"val_loss", "seconds"} <= line.keys()} for log in logs]
    shared = sorted(set.intersection(*map(set, points)))
    if not shared:
        raise UserError(f"{name}: no evaluation after the start that its logs share; train longer, "
                        "or with a smaller --eval_interval")
    speeds = []
    for log, at in zip(logs, points, strict=True):
        logged = [line["tokens_per_s"] for line in log if "tokens_per_s" in line]
        speeds.append(statistics.median(logged or [max(at) / at[max(at)]["seconds"]]))
    start = logs[0][0]
    flops = (start.get("flops_per_token") or 0) + (start.get("concept_flops_per_token") or 0)
    return Curve(shared, [log[0].get("seed") for log in logs],
                 [[at[tokens]["val_loss"] for tokens in shared] for at in points],
                 [statistics.fmean(tokens / speed for speed in speeds) for tokens in shared], flops)

def spread(values, form=".3f"):
    """Mean ± half the range, as text; only the mean of a single value."""
    values = list(values)
    mean = f"{statistics.fmean(values):{form}}"
    if not mean.strip("-0.%"):
        mean = mean.removeprefix("-")  # no -0.000
    return mean + (f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else "")

def tokens_to_reach(tokens, losses, goal):
    """Tokens after which a curve is first at or below the loss `goal`, interpolated linearly;
    None if it never is."""
    before = None
    for at, loss in zip(tokens, losses, strict=True):
        if loss <= goal:
            if before is None:
                return at
            return before[0] + (at - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = at, loss
    return None

def shared_tokens(curves):
    """The token counts at which all of {name: Curve} were evaluated, ascending."""
    shared = sorted(set.intersection(*(set(curve.tokens) for curve in curves.values())))
    if not shared:
        raise UserError("these runs share no evaluation: compare runs with the same eval_interval "
                        "and batch size")
    return shared

def versus_first(curve, first, end):
    """Cells: final loss minus the first run's; tokens and FLOPs needed to reach the first run's
    final loss, relative to what the first run needed."""
    goals = first.at(end)
    pairs = [(goals[seed], losses) for seed, losses in zip(curve.seeds, curve.losses, strict=True)
             if seed in goals]
    if curve is first or not pairs:
        return ["–"] * 3
    i = curve.tokens.index(end)
    difference = spread(losses[i] - goal for goal, losses in pairs)
    needed = [tokens_to_reach(curve.tokens, losses, goal) for goal, losses in pairs]
    if None in needed:
        return [difference, "not reached", "not reached"]
    tokens, flops = [n / end for n in needed], "–"
    if curve.flops_per_token and first.flops_per_token:
        flops = spread((t * curve.flops_per_token / first.flops_per_token for t in tokens), ".1%")
    return [difference, spread(tokens, ".1%"), flops]

def learning_curves(curves, columns=4):
    """{name: Curve} as a Markdown table: validation loss at up to `columns` shared evaluations; the
    final loss vs the first run's; tokens and FLOPs needed to reach the first run's final loss,
    relative to the first run (label computation included); FLOPs and seconds of the whole run.
    ±: half the range over the seeds."""
    shared, first = shared_tokens(curves), next(iter(curves.values()))
    n = min(columns, len(shared))
    shown = [shared[round((i + 1) * len(shared) / n) - 1] for i in range(n)]
    rows = [["run", "seeds", *(f"loss at {tokens / 1e6:.2f}M" for tokens in shown), "vs first",
             "tokens needed", "FLOPs needed", "FLOPs", "seconds"]]
    rows.append(["---"] + ["---:"] * (len(rows[0]) - 1))
    for name, curve in curves.items():
        flops = curve.flops_per_token * curve.tokens[-1]
        rows.append([name, str(len(curve.losses)), *(spread(curve.at(t).values()) for t in shown),
                     *versus_first(curve, first, shared[-1]), f"{flops:.2e}" if flops else "–",
                     f"{curve.seconds[-1]:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

# --------------------------------------------------------------------------------------------------
# Pictures

def pyplot():
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("drawing needs matplotlib: pip install -r requirements.txt") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot

def picture_path(path):
    """Refuse a path that no picture can be written to (None: no picture)."""
    if path and (Path(path).suffix not in (".png", ".svg", ".pdf") or Path(path).is_dir()):
        raise UserError(f"plot={str(path)!r}: expected a file name ending in .png, .svg or .pdf")

def save_figure(figure, path):
    """Write a figure and close it: to path or, where that has no suffix, to a .png and an .svg. The
    same figure gives the same bytes (no date, no random ids). Returns the paths as text."""
    path = Path(path)
    paths = [path] if path.suffix else [Path(f"{path}.png"), Path(f"{path}.svg")]
    pyplot().rcParams["svg.hashsalt"] = "cocomix"
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # else computed again, a little differently, per file
    no_date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata=no_date.get(path.suffix))
    pyplot().close(figure)
    return " ".join(map(str, paths))

def plot(path, curves, panels=None):
    """Draw {name: Curve}: validation loss against tokens, FLOPs and training time, with a band from
    the best to the worst seed. The steep first fifth of training may lie above the picture.
    panels {title: names}: one row of three for each. Returns the paths written."""
    plt = pyplot()
    panels = {title: [name for name in names if name in curves]
              for title, names in (panels or {}).items()}
    panels = {title: names for title, names in panels.items() if names} or {"": list(curves)}
    height = 4 if len(panels) == 1 else 3 * len(panels)
    figure, rows = plt.subplots(len(panels), 3, figsize=(13, height), sharey="row", squeeze=False,
                                layout="constrained")
    for (title, names), axes in zip(panels.items(), rows, strict=True):
        late = []  # losses that have to be visible
        for name in names:
            late += draw_curve(axes, name, curves[name])
        margin = 0.05 * (max(late) - min(late)) or 0.1
        axes[0].set_ylim(min(late) - margin, max(late) + margin)
        for axis, label in zip(axes, ("tokens", "FLOPs", "time (s)"), strict=True):
            axis.set_xlabel(f"training {label}")
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
        axes[0].set_ylabel("validation loss (nats per token)")
        axes[0].set_title(title, loc="left", fontsize=10)
        axes[0].legend(frameon=False, fontsize=7 if len(names) > 6 else None)
    return save_figure(figure, path)

def draw_curve(axes, name, curve):
    """Draw one Curve into a row of axes; returns its losses after the first fifth of training."""
    best, worst = ([pick(at) for at in zip(*curve.losses, strict=True)] for pick in (min, max))
    flops = [tokens * curve.flops_per_token for tokens in curve.tokens]
    for axis, at in zip(axes, (curve.tokens, flops, curve.seconds), strict=True):
        line, = axis.plot(at, curve.loss, marker="o", markersize=3, label=name)
        if len(curve.losses) > 1:
            axis.fill_between(at, best, worst, color=line.get_color(), alpha=0.2, linewidth=0)
    late = sum(tokens < curve.tokens[-1] / 5 for tokens in curve.tokens)
    return best[late:] + worst[late:]

def merge_evaluations(lines):
    """Lines of an eval.jsonl → [(tokens, measures)], ascending. Where a checkpoint was evaluated
    several times, the latest of the most complete evaluations counts."""
    at = {}
    for line in sorted(lines, key=lambda line: (line.get("limit") or math.inf,
                                                line.get("val_tokens", 0))):
        at.setdefault(line["tokens"], {}).update(line)
    return sorted(at.items())

def plot_tasks(path, evaluations):
    """Draw the paper's measures against training tokens, from {name: lines of its eval.jsonl}:
    PATH-averages (Figure 2) and PATH-tasks (Figures 7 to 9). Returns the paths written."""
    plt, path = pyplot(), Path(path)
    found = {name: merge_evaluations(lines) for name, lines in evaluations.items()}
    titles = {**MEASURES, "task_perplexity": "mean ppl (LAMBADA, WikiText)",
              "average_accuracy": "mean accuracy (5 tasks)"}
    averages = ("perplexity", "task_perplexity", "average_accuracy")
    written = []
    for which, measures, rows in (("averages", averages, 1), ("tasks", tuple(MEASURES), 2)):
        columns = len(measures) // rows
        figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 3 * rows),
                                    layout="constrained")
        for axis, measure in zip(axes.flat, measures, strict=True):
            for name, lines in found.items():
                points = [(tokens, line[measure]) for tokens, line in lines if measure in line]
                axis.plot([tokens for tokens, _ in points], [value for _, value in points],
                          marker="o", markersize=3, label=name)
            axis.set_title(titles[measure], fontsize=10)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
            if "acc" in measure:
                axis.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1, 1))
        figure.supxlabel("training tokens", fontsize=10)
        axes.flat[0].legend(frameon=False)
        written.append(save_figure(figure, path.with_stem(f"{path.stem}-{which}")))
    return " ".join(written)

def compare(runs, picture):
    """Print and draw the learning curves of runs (folders or logs), and their tasks."""
    paths = dict(named([log_of(run) for run in runs]))
    curves = read_curves({name: read_log(path) for name, path in paths.items()})
    print(learning_curves(curves))
    print(f"curves: {plot(picture, curves)}")
    evaluations = {}
    for name, path in paths.items():
        if path.name == "log.jsonl" and path.with_name("eval.jsonl").is_file():
            evaluations[name] = read_log(path.with_name("eval.jsonl"))
    if any("/" in key for lines in evaluations.values() for line in lines for key in line):
        print(f"tasks: {plot_tasks(picture, evaluations)}")
