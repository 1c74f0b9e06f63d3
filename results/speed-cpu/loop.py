"""What a run takes besides its steps: the start, waiting for batches, evaluation.

    python results/speed-cpu/loop.py          # after make demo; writes loop.md

The demo's NTP and CoCoMix run once more to the end, each in a process of its own, with clocks
around `Batches.prefetch` and `evaluate`. The start is the time from the process's first line,
imports included, to the end of the first step, with the first evaluation and checkpoint.
"""
# ruff: noqa: E402
import time

START = time.perf_counter()

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

def run(config_file):
    """Run it and print the seconds: to the first step, waiting for batches after it, in
    evaluations, in total."""
    import train
    from support.tokens import Batches
    waits, evaluations, first = [], [], []
    prefetch, evaluate = Batches.prefetch, train.evaluate

    def timed_prefetch(self, *args):
        batches = prefetch(self, *args)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waits.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch
            first.append(time.perf_counter() - START)  # asked for the next one: the step is done

    def timed_evaluate(*args):
        start = time.perf_counter()
        result = evaluate(*args)
        evaluations.append(time.perf_counter() - start)
        return result

    Batches.prefetch, train.evaluate = timed_prefetch, timed_evaluate
    with tempfile.TemporaryDirectory() as out:
        train.main([config_file, f"--out_dir={out}"])
    print(first[0], sum(waits[1:]), sum(evaluations), time.perf_counter() - START)

def main():
    python = platform.python_version()
    lines = [f"{platform.machine()}, {os.cpu_count()} cores, Python {python}", "",
             "| run | start to the end of the first step, s | waiting for batches | evaluation "
             "| whole run, s |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in ("stdlib_ntp", "stdlib_cocomix"):
        command = [sys.executable, __file__, f"config/{name}.py"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        first, waiting, evaluating, whole = map(float, out.splitlines()[-1].split())
        lines.append(f"| {name} | {first:.1f} | {waiting / whole:.2%} | {evaluating / whole:.1%} "
                     f"| {whole:.1f} |")
    (HERE / "loop.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

if __name__ == "__main__":
    run(sys.argv[1]) if sys.argv[1:] else main()
