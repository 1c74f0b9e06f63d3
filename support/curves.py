"""Rows of results, tables and pictures, and the learning curves that are read from runs' logs.

Seeds of one method form one Curve. Runs are compared with the first run seed by seed: a seed shares
batches and initial weights across methods, so differences vary less than the losses do.
"""
import json
import math
import statistics
from itertools import pairwise
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
    return math.inf if loss >= 700 else math.exp(loss)

def averages(row):
    """The AVERAGES whose measures are all in row."""
    return {name: statistics.fmean(row[measure] for measure in measures)
            for name, measures in AVERAGES.items()
            if all(row.get(measure) is not None for measure in measures)}

def append_rows(path, *rows):
    """Append rows (dicts) to a .jsonl file; without rows, only find out whether that is possible.
    UserError: the file holds something else."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", errors="replace") as file:
        file.seek(0)
        content = file.read()
        if content[:7] not in ("", '{"run":', '{"row":', '{"model'):
            raise UserError(f"{path} is a file of something else; name another one")
        if rows and content and not content.endswith("\n"):
            file.write("\n")  # after a line that was cut short
        for row in rows:
            row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            file.write(json.dumps(row) + "\n")

# --------------------------------------------------------------------------------------------------
# Tables: (key, heading, format); text ("{}") is aligned left; a missing value is –

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

def cells(row, columns):
    """A row (a dict) as texts, one for each column."""
    return ["–" if row.get(key) is None else form.format(row[key]) for key, _, form in columns]

def table(rows, columns=COLUMNS):
    """Rows as text, without the columns that no row has."""
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    lines = [[heading for _, heading, _ in columns], *(cells(row, columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligns = ["<" if form == "{}" else ">" for *_, form in columns]
    first, *others = ("  ".join(map("{:{}{}}".format, line, aligns, widths)) for line in lines)
    return "\n".join([first, "─" * len(first), *others])

def markdown(headings, rows):
    """A Markdown table of texts; all columns but the first are aligned right."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def training(log):
    """What a run's log says about its training."""
    steps = [line for line in log if "loss" in line] or [dict(step=0, tokens=0, seconds=0.0)]
    row = {name: steps[-1][name] for name in ("step", "tokens", "seconds")}
    row["tokens_per_s"] = row["tokens"] / row["seconds"] if row["seconds"] else None
    known = ("flops_per_token", "device", "torch", "source_hash", "active_params", "params")
    return row | {name: log[0].get(name) for name in known}

# --------------------------------------------------------------------------------------------------
# Learning curves

def log_of(run):
    """The log.jsonl in a run's folder, or the log itself: results/ keeps logs under other names."""
    path = Path(run) if str(run).endswith(".jsonl") else Path(run) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no log at {path}: name the folder of a run, or its log")
    return path

def named(paths):
    """[(name of the run's folder or log, path)]; where names repeat, their paths are the names."""
    runs = {path: path.parent if path.name in ("ckpt.pt", "log.jsonl") else path.with_suffix("")
            for path in paths}
    unique = len({run.name for run in runs.values()}) == len(paths)
    return [(runs[path].name if unique else str(runs[path]), path) for path in paths]

class Curve(NamedTuple):
    """The training of one method, at the evaluations that all of its seeds share."""
    tokens: list[int]
    losses: dict[int, list[float]]  # seed → validation loss at each evaluation
    seconds: list[float]    # of training at each seed's median tokens/s, mean over the seeds
    flops_per_token: float  # label computation included, even where labels were stored

    def at(self, tokens):
        """{seed: loss} after so many tokens."""
        return {seed: losses[self.tokens.index(tokens)] for seed, losses in self.losses.items()}

def read_curves(logs):
    """{name: log lines} → {name: Curve}. Logs named NAME-SEED are seeds of one method NAME."""
    groups = {}
    for name, log in logs.items():
        seed = log[0].get("seed") if log else None
        group = groups.setdefault(name.removesuffix(f"-{seed}"), {})
        if seed in group:  # NAME and NAME-SEED, both with this seed
            group = groups.setdefault(name, {})
        group[seed] = log
    return {name: read_curve(name, list(group.values())) for name, group in groups.items()}

def read_curve(name, logs):
    points = [{line["tokens"]: line for line in log
               if line.get("tokens") and {"val_loss", "seconds"} <= line.keys()} for log in logs]
    shared = sorted(set.intersection(*map(set, points)))
    if not shared:
        raise UserError(f"{name}: no evaluation after the start in all of its logs; name runs of "
                        "train.py, trained longer or with a smaller --eval_interval")
    losses, speeds = {}, []
    for log, at in zip(logs, points, strict=True):
        losses[log[0].get("seed")] = [at[tokens]["val_loss"] for tokens in shared]
        logged = [line["tokens_per_s"] for line in log if "tokens_per_s" in line]
        speeds.append(statistics.median(logged or [max(at) / at[max(at)]["seconds"]]))
    seconds = [statistics.fmean(tokens / speed for speed in speeds) for tokens in shared]
    flops = [logs[0][0].get(key) or 0 for key in ("flops_per_token", "concept_flops_per_token")]
    return Curve(shared, losses, seconds, sum(flops))

def spread(values, form=".3f"):
    """Mean ± half the range, as text; only the mean of a single value."""
    values = list(values)
    text = f"{statistics.fmean(values):{form}}"
    if not text.strip("-0.%"):
        text = text.removeprefix("-")  # no -0.000
    return text + (f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else "")

def tokens_to_reach(tokens, losses, goal):
    """Tokens after which a curve first reaches the loss `goal`, interpolated; None if never."""
    if losses[0] <= goal:
        return tokens[0]
    for (start, high), (end, low) in pairwise(zip(tokens, losses, strict=True)):
        if low <= goal:
            return start + (end - start) * (high - goal) / (high - low)
    return None

def shared_tokens(curves):
    """The token counts at which all of {name: Curve} were evaluated, ascending."""
    shared = sorted(set.intersection(*(set(curve.tokens) for curve in curves.values())))
    if not shared:
        raise UserError("these runs share no evaluation: use one eval_interval and batch size")
    return shared

def versus_first(curve, first, end):
    """The cells "vs first", "tokens needed" and "FLOPs needed" of `learning_curves`."""
    goals, final = first.at(end), curve.at(end)
    seeds = [seed for seed in final if seed in goals]
    if curve is first or not seeds:
        return ["–"] * 3
    difference = spread(final[seed] - goals[seed] for seed in seeds)
    needed = [tokens_to_reach(curve.tokens, curve.losses[seed], goals[seed]) for seed in seeds]
    if None in needed:
        return [difference, "not reached", "not reached"]
    tokens, flops = [n / end for n in needed], "–"
    if curve.flops_per_token and first.flops_per_token:
        flops = spread((t * curve.flops_per_token / first.flops_per_token for t in tokens), ".1%")
    return [difference, spread(tokens, ".1%"), flops]

def learning_curves(curves, columns=4):
    """{name: Curve} as a Markdown table: losses at up to `columns` shared evaluations, the last one
    minus the first run's; tokens and FLOPs needed to reach the first run's final loss, relative to
    its own; FLOPs and seconds in all. ±: half the range over seeds."""
    shared, first = shared_tokens(curves), next(iter(curves.values()))
    n = min(columns, len(shared))
    shown = [shared[round(i * len(shared) / n) - 1] for i in range(1, n + 1)]
    rows = []
    for name, curve in curves.items():
        flops = curve.flops_per_token * curve.tokens[-1]
        rows.append([name, str(len(curve.losses)), *(spread(curve.at(t).values()) for t in shown),
                     *versus_first(curve, first, shared[-1]), f"{flops:.2e}" if flops else "–",
                     f"{curve.seconds[-1]:.0f}"])
    losses = [f"loss at {tokens / 1e6:.2f}M" for tokens in shown]
    return markdown(["run", "seeds", *losses, "vs first", "tokens needed", "FLOPs needed", "FLOPs",
                     "seconds"], rows)

# --------------------------------------------------------------------------------------------------
# Pictures

MARK = "drawn by support/curves.py of CoCoMix"  # in a picture's metadata: it may be replaced

def new_figure(rows, columns, width, height, **options):
    """(a matplotlib Figure, its axes), width and height in inches."""
    try:
        import matplotlib.figure
    except ImportError as e:
        raise UserError("drawing needs matplotlib: pip install -r requirements.txt") from e
    matplotlib.rcParams["svg.hashsalt"] = "cocomix"  # no random ids in an .svg
    matplotlib.rcParams["text.parse_math"] = False  # names may hold a $
    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)

def legend(name):
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out _names

def picture_files(path):
    return [Path(path)] if Path(path).suffix else [Path(f"{path}.png"), Path(f"{path}.svg")]

def picture_path(path, overwrite=False):
    """Refuse, before the work, a path that no picture can be written to (None: no picture), or
    where there is a file that was not drawn here, unless overwrite."""
    for file in picture_files(path) if path else ():
        if file.suffix not in (".png", ".svg", ".pdf") or file.is_dir():
            raise UserError(f"plot={path!r}: expected a file name ending in .png, .svg or .pdf")
        if file.exists() and not overwrite and MARK.encode() not in file.read_bytes():
            raise UserError(f"{file} is there already and was not drawn here: move it, name "
                            "another file, or replace it with --overwrite")

def save_figure(figure, path):
    """Write a figure to path, or without a suffix to a .png and an .svg; the same figure gives the
    same bytes. Returns the paths as text."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # else computed again, a little differently, per file
    metadata = {".png": {"Software": MARK}, ".svg": {"Creator": MARK, "Date": None},
                ".pdf": {"Creator": MARK, "CreationDate": None}}
    for file in picture_files(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100, metadata=metadata[file.suffix])
    return " ".join(map(str, picture_files(path)))

def count_axis(axis):
    """A grid, and 1k, 1M … along x."""
    from matplotlib.ticker import EngFormatter
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))

def plot(path, curves, panels=None):
    """Draw {name: Curve}: loss against tokens, FLOPs and time, with a band from the best to the
    worst seed; the first fifth of training may lie above it. panels {title: names}: a row for each.
    Returns the paths written."""
    panels = {title: found for title, names in (panels or {}).items()
              if (found := [name for name in names if name in curves])} or {"": list(curves)}
    size, place = (13, 4), {}
    if len(panels) > 1:  # the legend is next to the last panel
        size, place = (15, 3 * len(panels)), dict(loc="upper left", bbox_to_anchor=(1, 1))
    figure, rows = new_figure(len(panels), 3, *size, sharey="row", squeeze=False)
    for (title, names), axes in zip(panels.items(), rows, strict=True):
        late = []  # losses that have to be visible
        for name in names:
            late += draw_curve(axes, name, curves[name])
        margin = 0.05 * (max(late) - min(late)) or 0.1
        axes[0].set_ylim(min(late) - margin, max(late) + margin)
        for axis, label in zip(axes, ("tokens", "FLOPs", "time (s)"), strict=True):
            axis.set_xlabel(f"training {label}")
            count_axis(axis)
        axes[0].set_ylabel("validation loss (nats per token)")
        axes[0].set_title(title, loc="left", fontsize=10)
        axes[-1 if place else 0].legend(frameon=False, **place)
    return save_figure(figure, path)

def draw_curve(axes, name, curve):
    """Draw one Curve into a row of axes; returns its losses after the first fifth of training."""
    best, worst, mean = ([pick(at) for at in zip(*curve.losses.values(), strict=True)]
                         for pick in (min, max, statistics.fmean))
    flops = [tokens * curve.flops_per_token for tokens in curve.tokens]
    for axis, at in zip(axes, (curve.tokens, flops, curve.seconds), strict=True):
        line, = axis.plot(at, mean, marker="o", markersize=3, label=legend(name))
        if len(curve.losses) > 1:
            axis.fill_between(at, best, worst, color=line.get_color(), alpha=0.2, linewidth=0)
    late = sum(tokens < curve.tokens[-1] / 5 for tokens in curve.tokens)
    return best[late:] + worst[late:]

def merge_evaluations(lines):
    """Lines of an eval.jsonl → one per checkpoint, by tokens: of its evaluations on the run's own
    validation split those of the most tokens, of those on tasks those of the most documents; the
    latest of equals."""
    at = {line["tokens"]: dict(tokens=line["tokens"]) for line in lines}
    own = [line for line in lines if not line.get("dataset")]
    for line in sorted(own, key=lambda line: line.get("val_tokens", 0)):
        at[line["tokens"]].update({k: v for k, v in line.items() if "/" not in k})
    for line in sorted(lines, key=lambda line: line.get("limit") or math.inf):
        at[line["tokens"]].update({k: v for k, v in line.items() if "/" in k})
    return [row | averages(row) for _, row in sorted(at.items())]

def plot_tasks(path, evaluations, titles, rows):
    """Draw the measures {key: title} in {name: lines of its eval.jsonl} against training tokens.
    Returns the paths written."""
    columns = len(titles) // rows
    figure, axes = new_figure(rows, columns, 3.4 * columns, 3 * rows)
    for axis, (measure, title) in zip(axes.flat, titles.items(), strict=True):
        for name, lines in evaluations.items():
            found = [line for line in merge_evaluations(lines) if measure in line]
            axis.plot([line["tokens"] for line in found], [line[measure] for line in found],
                      marker="o", markersize=3, label=legend(name))
        axis.set_title(title, fontsize=10)
        count_axis(axis)
        if "acc" in measure:
            axis.yaxis.set_major_formatter("{x:.1%}")
    figure.supxlabel("training tokens", fontsize=10)
    axes.flat[0].legend(frameon=False)
    return save_figure(figure, path)

def compare(runs, picture, overwrite=False):
    """Print and draw the learning curves of runs (folders or logs), and their tasks as in the
    paper's Figures 2 (PICTURE-averages) and 7 to 9 (PICTURE-tasks)."""
    paths = dict(named([log_of(run) for run in runs]))
    curves = read_curves({name: read_log(path) for name, path in paths.items()})
    print(learning_curves(curves))
    print(f"curves: {plot(picture, curves)}")
    evaluations = {name: read_log(path.with_name("eval.jsonl")) for name, path in paths.items()
                   if path.name == "log.jsonl" and path.with_name("eval.jsonl").is_file()}
    if any("/" in key for lines in evaluations.values() for line in lines for key in line):
        averages = dict(perplexity="val ppl", task_perplexity="mean ppl (LAMBADA, WikiText)",
                        average_accuracy="mean accuracy (5 tasks)")
        for which, titles, rows in (("averages", averages, 1), ("tasks", MEASURES, 2)):
            path = Path(picture).with_stem(f"{Path(picture).stem}-{which}")
            picture_path(path, overwrite)
            print(f"{which}: {plot_tasks(path, evaluations, titles, rows)}")
