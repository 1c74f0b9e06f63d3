"""The demo's chain under other seeds and thread counts: python results/stdlib-demo/spread.py

Each run trains the concept model, its SAE, NTP and CoCoMix with one seed and one or two threads,
evaluates all three models on all of val, and counts the concepts that are labels on 200,000
training tokens. Finished chains are skipped. spread.jsonl keeps the rows, spread.md and summary.md
are tables.
"""
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEEDS = (1, 2, 3, 4, 5)
MODELS = {"gpt": "concept model", "ntp": "NTP", "cocomix": "CoCoMix"}
COLUMNS = {
    "seed": "seed", "threads": "threads", "gpt": "concept model", "ntp": "NTP",
    "cocomix": "CoCoMix", "lead": "CoCoMix − NTP", "norm": "largest gradient norm after step 20",
    "fvu": "SAE's FVU", "dead_share": "dead latents",
    "commonest_share": "activations of the 16 most frequent", "labels": "concepts that are labels"}

def command(threads, *words):
    """Run a script of the repository with so many threads → what it prints."""
    words = [str(word) for word in words]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout

def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def largest_norm(run):
    log = read(ROOT / run / "log.jsonl")
    return max(line["grad_norm"] for line in log if "grad_norm" in line and line["step"] > 20)

def chain(seed, threads):
    """One chain → its row."""
    out, keys = Path("out/spread") / f"{seed}-{threads}", ("--resume", f"--seed={seed}")
    gpt, sae, ntp, cocomix = (out / name for name in ("gpt", "sae", "ntp", "cocomix"))
    from_gpt = f"--concept_model={gpt}"
    command(threads, "train.py", "config/stdlib_gpt.py", f"--out_dir={gpt}", *keys)
    command(threads, "sae.py", "config/stdlib_sae.py", from_gpt, f"--out_dir={sae}", *keys)
    command(threads, "train.py", "config/stdlib_ntp.py", f"--out_dir={ntp}", *keys)
    command(threads, "train.py", "config/stdlib_cocomix.py", from_gpt, f"--sae={sae}",
            f"--out_dir={cocomix}", *keys)
    rows = ROOT / out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    command(threads, "eval.py", gpt, ntp, cocomix, f"--write={rows}")
    losses = {name: row["loss"] for name, row in zip(MODELS, read(rows), strict=True)}
    norms = {f"norm_{name}": largest_norm(out / name) for name in MODELS}
    listing = command(threads, "concepts.py", cocomix, "--tokens=200_000")
    used = re.search(r"([\d,]+) of [\d,]+ concepts", listing)[1]
    info = json.loads((ROOT / sae / "sae.json").read_text())
    shares = {name: info[name] for name in ("fvu", "dead_share", "commonest_share")}
    return dict(seed=seed, threads=threads, **losses, **norms, **shares,
                labels=int(used.replace(",", "")))

def cell(name, value):
    if name.endswith("share"):
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)

def markdown(titles, rows):
    lines = [titles, ["---:"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

def draw(rows):
    """Write spread.md, a line per run, and summary.md, a line per model."""
    for row in rows:
        row["lead"] = row["cocomix"] - row["ntp"]
        row["norm"] = max(row[f"norm_{name}"] for name in MODELS)
    cells = [[cell(name, row[name]) for name in COLUMNS] for row in rows]
    (HERE / "spread.md").write_text(markdown(list(COLUMNS.values()), cells))
    summary = []
    for name, title in {**MODELS, "lead": "CoCoMix − NTP"}.items():
        values = [row[name] for row in rows]
        spread = f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
        summary.append([title, spread, f"{min(values):.3f}", f"{max(values):.3f}",
                        str(len(values))])
    titles = ["", "val loss, mean ± standard deviation", "lowest", "highest", "runs"]
    (HERE / "summary.md").write_text(markdown(titles, summary))

def main():
    path = HERE / "spread.jsonl"
    rows = read(path) if path.is_file() else []
    for threads in (1, 2):
        done = {row["seed"] for row in rows if row["threads"] == threads}
        missing = [seed for seed in SEEDS if seed not in done]
        with ThreadPoolExecutor(max(1, os.cpu_count() // threads)) as pool:
            for row in pool.map(chain, missing, [threads] * len(missing)):
                rows.append(row)
                rows.sort(key=lambda row: (row["threads"], row["seed"]))
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows)
    print((HERE / "spread.md").read_text() + "\n" + (HERE / "summary.md").read_text())

if __name__ == "__main__":
    main()
