"""The lead over NTP during training, and where students pass their concept model.

    python results/books-cpu-long/gaps.py

Reads the logs in this folder and writes gaps.md, gaps.png, gaps.svg, pairs.md and costs.md. After T
tokens, with the same seed, batches and learning rates:

    gap           a row's validation loss minus NTP's, in nats; pairs.md: minus another row's
    tokens saved  1 - t/T, where t is how many tokens the row needed for NTP's loss after T tokens

A student passes its concept model at the first evaluation from which on its validation loss is
below that of the finished concept model, on the same validation tokens. costs.md: FLOPs relative to
those of NTP's whole training, with labels and teacher as long as the concept model was asked.
"""
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import UserError, run

from support import curves
from support.log import read_log

HERE = Path(__file__).resolve().parent
ROWS = {"ntp": "NTP", "kd": "KD", "kd_weight_1": "KD, weight 1", "cocomix": "CoCoMix",
        "cocomix_tuned": "CoCoMix, tuned", "tuned_nothing_mixed_in": "tuned, nothing mixed in",
        "tuned_kd_weight_1": "tuned + KD, weight 1", "tuned_half": "tuned, half",
        "kd_weight_1_half": "KD, weight 1, half"}
HALF = {"tuned, half": "CoCoMix, tuned", "KD, weight 1, half": "KD, weight 1"}  # of which row
PAIRS = (("CoCoMix, tuned", "tuned, nothing mixed in"), ("CoCoMix, tuned", "KD, weight 1"),
         ("tuned + KD, weight 1", "KD, weight 1"), ("CoCoMix", "KD"),
         ("CoCoMix", "KD, weight 1"),
         *HALF.items(), ("tuned, half", "KD, weight 1, half"))

def read_rows():
    """{row: Curve} and {row: the first line of a log} of the finished runs, NTP first."""
    logs = {path.stem: read_log(path) for path in HERE.glob("*-*.jsonl")}
    logs = {name: log for name, log in logs.items()
            if name.rpartition("-")[0] in ROWS and log[-1].get("step") == log[0]["max_iters"]}
    found = curves.read_curves(logs)
    heads = {name.rpartition("-")[0]: log[0] for name, log in logs.items()}
    return ({title: found[name] for name, title in ROWS.items() if name in found},
            {title: heads[name] for name, title in ROWS.items() if name in heads})

def flops(head, share):
    """The FLOPs of the first `share` of a training, divided by the tokens of all of it. head: the
    first line of its log."""
    until = re.search(r"--until=(\d+)", head["command"])  # of schedule.py
    asked = min(share, int(until[1]) / head["max_iters"]) if until else share
    return share * head["flops_per_token"] + asked * head["concept_flops_per_token"]

def gaps(curve, other):
    """{seed: the row's loss minus the other's after each of its tokens}."""
    return {seed: [loss - less for loss, less in zip(losses, other.losses[seed], strict=True)]
            for seed, losses in curve.losses.items() if seed in other.losses}

def saved(curve, ntp):
    """{seed: the share of tokens saved after each of its tokens, None where none are}."""
    found = {}
    for seed, losses in curve.losses.items():
        needed = [curves.tokens_to_reach(curve.tokens[:i + 1], losses[:i + 1], goal)
                  for i, goal in enumerate(ntp.losses.get(seed, []))]
        found[seed] = [None if n is None else 1 - n / t
                       for n, t in zip(needed, curve.tokens, strict=False)]
    return found

def crossing(tokens, losses, goal):
    """The tokens after which a curve's losses stay below `goal`; None if they don't."""
    above = [i for i, loss in enumerate(losses) if loss >= goal]
    first = above[-1] + 1 if above else 0
    return tokens[first] if first < len(tokens) else None

def concept_losses():
    """{seed: the validation loss of its finished concept model}."""
    logs = [read_log(path) for path in sorted(HERE.glob("gpt-*.jsonl"))]
    return {log[0]["seed"]: log[-1]["val_loss"] for log in logs}

def shown(curve):
    """The places of the first evaluation and of those at eighths of training, and their headings.
    """
    n = len(curve.tokens)
    places = sorted({0, *(round(i * n / 8) - 1 for i in range(1, 9))} - {-1})
    return places, [f"{curve.tokens[i] / 1e6:.1f}M" for i in places]

def gap_cells(curve, other):
    """The gaps of a row to another where `shown`, as cells."""
    values = list(gaps(curve, other).values())
    return [curves.spread(seed[i] for seed in values) for i in shown(curve)[0]]

def table(found):
    """A row for each method: its gap to NTP during training, and where it passes."""
    ntp, goals, rows = found["NTP"], concept_losses(), []
    headings = shown(ntp)[1]
    for title, curve in found.items():
        cells = ["–"] * len(headings) if title == "NTP" else gap_cells(curve, ntp)
        passed = [crossing(curve.tokens, losses, goals[seed])
                  for seed, losses in curve.losses.items()]
        text = "never"
        if some := [t / 1e6 for t in passed if t is not None]:
            text = curves.spread(some, ".1f")
            text += f" ({len(some)} of {len(passed)} seeds)" * (len(some) < len(passed))
        rows.append([title, str(len(curve.losses)), *cells, text])
    return curves.markdown(["run", "seeds", *headings, "passes its concept model at (M tokens)"],
                           rows)

def costs_table(found, heads):
    """A row for each method: what it costs, and tokens and FLOPs for NTP's final loss."""
    ntp, rows = found["NTP"], []
    ntp_flops = flops(heads["NTP"], 1)
    for title, curve in found.items():
        ends = {seed: ntp.losses[seed][-1] for seed in curve.losses if seed in ntp.losses}
        needed = [curves.tokens_to_reach(curve.tokens, curve.losses[seed], goal)
                  for seed, goal in ends.items()]
        cells = ["–", "–"]
        if None not in needed:
            shares = [tokens / curve.tokens[-1] for tokens in needed]
            cells = [curves.spread(shares, ".1%"),
                     curves.spread((flops(heads[title], share) / ntp_flops for share in shares),
                                   ".1%")]
        rows.append([title, str(len(curve.losses)),
                     f"{flops(heads[title], 1) / ntp_flops:.1%}", *cells])
    return curves.markdown(["run", "seeds", "FLOPs", "tokens for NTP's final loss",
                            "FLOPs for NTP's final loss"], rows)

def pairs_table(found):
    """A row for each of PAIRS: the gap of the first row to the second during training."""
    rows = [[one, other, str(len(gaps(found[one], found[other]))),
             *gap_cells(found[one], found[other])]
            for one, other in PAIRS if one in found and other in found
            and gaps(found[one], found[other])]
    return curves.markdown(["loss of", "minus that of", "seeds", *shown(found["NTP"])[1]], rows)

def draw(found):
    figure, axes = curves.new_figure(1, 2, 11, 4)
    ntp, colors = found["NTP"], {}
    for title, curve in found.items():
        for axis, per_seed in zip(axes, (gaps(curve, ntp), saved(curve, ntp)), strict=True):
            if title == "NTP":
                axis.axhline(0, color="black", linewidth=1)
                axis.plot([], [], color="black", label=title)
                continue
            at = [(t, [v for v in values if v is not None])
                  for t, values in zip(curve.tokens, zip(*per_seed.values(), strict=True),
                                       strict=True)]
            at = [(t, values) for t, values in at if len(values) == len(per_seed)]
            x = [t for t, _ in at]
            style = dict(color=colors.get(HALF[title]), linestyle="--") if title in HALF else {}
            line, = axis.plot(x, [statistics.fmean(v) for _, v in at], label=title, **style)
            colors[title] = line.get_color()
            axis.fill_between(x, [min(v) for _, v in at], [max(v) for _, v in at], alpha=0.2,
                              color=line.get_color(), linewidth=0)
    for axis in axes:
        axis.set_xlabel("training tokens")
        curves.count_axis(axis)
    axes[0].set_ylabel("validation loss minus NTP's (nats)")
    late = [loss for curve in found.values() for values in gaps(curve, ntp).values()
            for t, loss in zip(curve.tokens, values, strict=True) if t > 1e6]
    axes[0].set_ylim(min(late) - 0.05, max(late) + 0.05)
    axes[1].set_ylabel("tokens saved to reach NTP's loss")
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    axes[0].legend(frameon=False, fontsize=8)
    curves.save_figure(figure, HERE / "gaps")

def main(_):
    found, heads = read_rows()
    missing = {seed for curve in found.values() for seed in curve.losses} - concept_losses().keys()
    if missing or "NTP" not in found:
        raise UserError("the logs of NTP, and of each seed's concept model (gpt-SEED.jsonl), are "
                        "needed")
    texts = dict(gaps=table(found), pairs=pairs_table(found), costs=costs_table(found, heads))
    for name, text in texts.items():
        (HERE / f"{name}.md").write_text(text + "\n")
        print(f"{text}\n")
    draw(found)

if __name__ == "__main__":
    run(main)
