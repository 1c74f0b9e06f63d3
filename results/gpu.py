"""The first half hour on a GPU, the most important results first.

    python results/gpu.py --minutes=28     # run what is missing, stop in time
    python results/gpu.py --rehearse       # the same on a CPU with tiny shapes, into out/rehearsal

The steps, in this order: the tests that need a GPU; gpu_kernels.py; bench.py for NTP, Pause, KD
and CoCoMix at 69M, 124M and 386M, one row each, appended to bench-h200.jsonl; the comparison on
books. The output of each is in gpu/STEP.txt next to this file. If stopped, run the same command
again: finished steps are skipped and the books resume. The environment's BOOKS is their folder, and
without a network TIKTOKEN_CACHE_DIR one with GPT-2's tokenizer.
"""
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.runtime import UserError, run

import torch

from support.cli import key, parse
from support.log import read_log

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --insert_layer=1 "
        "--device=cpu --memory=false")
# an experiment in place of the books
BOOKS = """out = "out/rehearsal/runs"
prepare = ["data/stdlib/prepare.py"]
runs = {"NTP": "train.py config/stdlib_ntp.py",
        "Pause": "train.py config/stdlib_ntp.py --method=pause --insert_layer=1"}
every = "--max_iters=2 --eval_interval=1 --eval_iters=1 --block_size=16 --device=cpu"
"""

@dataclass(frozen=True)
class Config:
    minutes: float = key(28.0, "stop after so many", low=0.1)
    rehearse: bool = key(False, "tiny shapes on a CPU, into out/rehearsal")

def steps(rehearse):
    """(folder of the outputs, file of the benchmark, {step: command}), in order."""
    if rehearse:
        folder = ROOT / "out/rehearsal"
        measured, sizes, keys = folder / "bench.jsonl", ("69m",), f"{TINY} --rounds=1"
        # without a GPU the tests that need one are skipped
        commands = {"tests": "-m pytest -q tests/test_steering.py -m cuda -p no:cacheprovider",
                    "kernels": "results/gpu_kernels.py --device=cpu --tokens=256 --repeats=1"}
    else:
        folder, measured = ROOT / "results/gpu", ROOT / "results/bench-h200.jsonl"
        sizes, keys = ("69m", "124m", "386m"), "--batch_size=64 --device=cuda"
        commands = {"tests": "-m pytest -q tests -m cuda", "kernels": "results/gpu_kernels.py"}
    for size in sizes:
        for method in ("ntp", "pause", "kd", "cocomix"):
            name = f"{method}_{size}"
            write = shlex.quote(f"--write={measured}")
            commands[name] = f"bench.py config/{name}.py {keys} {write}"
    commands["books"] = "results/run.py results/books-h200"
    if rehearse:
        books = folder / "books"
        books.mkdir(parents=True, exist_ok=True)
        (books / "experiment.py").write_text(BOOKS)
        commands["books"] = f"results/run.py {shlex.quote(str(books))}"
    return folder, measured, commands

def finished(name, command, output, measured):
    """Whether a step ended well before: its output begins with the command and ends with "done",
    and its row is still there."""
    text = output.read_text() if output.is_file() else ""
    done = text.startswith(f"$ python {command}\n") and text.endswith("\ndone\n")
    if "_" not in name:
        return done
    return done and measured.is_file() and name in {line["row"] for line in read_log(measured)}

def call(command, output, seconds):
    """Run `python command` for so long at most, output to a file → its status, None if stopped."""
    with open(output, "w") as file:
        print(f"$ python {command}", file=file, flush=True)
        process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as e:
            os.killpg(process.pid, signal.SIGINT)  # what it started, too: runs save their state
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if isinstance(e, KeyboardInterrupt):
                raise
            return None
        if status == 0:
            print("\ndone", file=file)
    return status

def main(argv):
    cfg, _ = parse(Config, argv, __doc__, most=0, files=False)
    if not cfg.rehearse and not torch.cuda.is_available():
        raise UserError("no GPU here; --rehearse tries all steps in small on a CPU")
    end, failed = time.monotonic() + 60 * cfg.minutes, []
    folder, measured, commands = steps(cfg.rehearse)
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in commands.items():
        output = folder / f"{name}.txt"
        if finished(name, command, output, measured):
            print(f"{name}: finished before", flush=True)
            continue
        left = end - time.monotonic() - 25  # to let a stopped run save
        if left <= 0:
            print(f"{name}: no time left; run the same command again")
            break
        started = time.monotonic()
        status = call(command, output, left)
        outcome = {0: "done", None: "stopped, out of time"}.get(status, f"status {status}")
        print(f"{name}: {outcome} after {time.monotonic() - started:.0f} s", flush=True)
        if status:
            failed.append(name)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; the output is in {folder}; run the same "
                        "command to try again")

if __name__ == "__main__":
    run(main)
