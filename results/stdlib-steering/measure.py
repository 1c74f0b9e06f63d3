"""Measured steering of three runs: python results/stdlib-steering/measure.py

The runs are the chains of results/stdlib-demo (spread.py) with seeds 1 to 3 and two threads. Each
has its own concept model, SAE and concepts. steering.jsonl keeps a line for each seed, model,
concept and factor; table-SEED.txt is what eval.py prints; table.md has mean ± standard deviation
over the seeds.
"""
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.steering import plot_steering, steering_summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEEDS = (1, 2, 3)
COLUMNS = {"rate": ("next tokens", ".2%"), "gain": ("× unsteered", ".2f"),
           "raised": ("concepts raised", ".0%"), "perplexity": ("val perplexity", ".1f")}

def measure(seed):
    """The rows of one run's steering, with its seed."""
    rows = HERE / "rows.jsonl"
    rows.unlink(missing_ok=True)
    words = ["eval.py", f"out/spread/{seed}-2/cocomix", "--steering", f"--write={rows}"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    (HERE / f"table-{seed}.txt").write_text(f"$ python {' '.join(words[:3])}\n{done.stdout}")
    found = [{"seed": seed} | json.loads(line) for line in rows.read_text().splitlines()]
    rows.unlink()
    return found

def draw(rows):
    """Write table.md, and steering.png over the concepts of all seeds."""
    lines = ["| model | factor | " + " | ".join(name for name, _ in COLUMNS.values()) + " |",
             "| --- | ---: |" + " ---: |" * len(COLUMNS)]
    summaries = [steering_summary([row for row in rows if row["seed"] == seed]) for seed in SEEDS]
    for same in zip(*summaries, strict=True):
        cells = [same[0]["model"], f"{same[0]['factor']:g}"]
        for key, (_, form) in COLUMNS.items():
            values = [row[key] for row in same]
            cells.append(f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}}")
        lines.append("| " + " | ".join(cells) + " |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot_steering(HERE / "steering.png", steering_summary(rows))

def main():
    rows = [row for seed in SEEDS for row in measure(seed)]
    (HERE / "steering.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows)

if __name__ == "__main__":
    main()
