"""Idle OpenMP threads spin before they sleep. How long should they, on a busy machine?

    python results/speed-cpu/busy.py        # about 15 minutes; writes busy.md

Training steps of NTP and CoCoMix at the demo's and the 69M shapes, with libgomp's default, with
GOMP_SPINCOUNT=1000 (what support/runtime.py sets), and without spinning. Each setting is a process
of its own; they take turns, on an idle machine, next to one and two busy processes, and next to
another training of ours. Ratios are medians of each round's ratio to the default.
"""
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import RowAlone, read_rows

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"default": {"GOMP_SPINCOUNT": "300000"}, "1000": {"GOMP_SPINCOUNT": "1000"},
            "none": {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}}
SHAPES = {"demo, NTP": ["config/stdlib_ntp.py"], "demo, CoCoMix": ["config/stdlib_cocomix.py"],
          "69M, NTP": ["config/ntp_69m.py", "--batch_size=2", "--block_size=256"],
          "69M, CoCoMix": ["config/cocomix_69m.py", "--batch_size=2", "--block_size=256"]}
BUSY = [sys.executable, "-c", "while True: pass"]
TRAINING = [sys.executable, "train.py", "config/stdlib_ntp.py", "--out_dir=out/busy", "--overwrite",
            "--max_iters=1000000"]
LOADS = {"idle": [], "one busy process": [BUSY], "two busy processes": [BUSY, BUSY],
         "another training": [TRAINING]}

@contextmanager
def load(commands):
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    others = [subprocess.Popen(command, cwd=ROOT, **quiet) for command in commands]
    time.sleep(10 if TRAINING in commands else 0)
    yield
    for other in others:
        other.kill()
        other.wait()

def open_row(name, keys, settings):
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(variable, None)
    os.environ.update(settings)
    _, [(_, cfg, kind)] = read_rows(keys)
    return RowAlone(name, cfg, kind)

def measure(shape, keys):
    """The lines of one shape's table, a line per load."""
    rows = {name: open_row(name, keys, settings) for name, settings in SETTINGS.items()}
    rounds, steps = (5, 10) if shape.startswith("demo") else (3, 1)
    lines = []
    for title, commands in LOADS.items():
        os.environ.pop("OMP_WAIT_POLICY", None)
        os.environ["GOMP_SPINCOUNT"] = "1000"  # of the other training
        with load(commands):
            speeds = {name: [] for name in rows}
            for _ in range(rounds):
                for name, row in rows.items():
                    speeds[name].append(row.turn(steps)[0])
        cells = [f"{statistics.median(found):,.0f}" for found in speeds.values()]
        for name in ("1000", "none"):
            pairs = zip(speeds[name], speeds["default"], strict=True)
            cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
        lines.append(f"| {shape} | {title} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines

def main():
    import torch
    lines = [f"{os.cpu_count()} cores, torch {torch.__version__}; tokens/s", "",
             "| shapes | next to it | default | 1000 | none | 1000 ÷ default | none ÷ default |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for shape, keys in SHAPES.items():
        lines += measure(shape, keys)
    (Path(__file__).parent / "busy.md").write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
