"""Kill a training run again and again, and check that it ends as if nothing had happened.

    python tests/crash.py train.py KILLS --method=ntp --out_dir=FOLDER …     (or sae.py)

The command first runs undisturbed in FOLDER/whole. Then it is started in FOLDER/killed with
--resume and gets SIGKILL at a random moment, KILLS times. After each kill its checkpoint must load.
A run that reaches its end must have the same weights, optimizer state and log (except times) as the
undisturbed one, bit for bit. Each start is a fork of this process, which has imported torch but not
used it: that takes milliseconds instead of seconds. Prints what the kills hit.
"""
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import runtime  # isort: skip (before torch)

import torch
import torch._dynamo  # the first optimizer would import it, which takes seconds

import sae
import train
from support.checkpoint import load_checkpoint
from support.log import read_log

MAIN = {"train.py": (train.main, "ckpt.pt"), "sae.py": (sae.main, "sae_ckpt.pt")}
TIMES = ("seconds", "tokens_per_s")

def fork(main, argv):
    """The id of a process that runs main(argv) and prints nothing but errors."""
    pid = os.fork()
    if not pid:
        sys.argv = ["command", *argv]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        tqdm = runtime.tqdm
        runtime.tqdm = lambda **keys: tqdm(disable=True)
        try:
            runtime.run(main, parallel=True)
        except SystemExit as e:
            if isinstance(e.code, str):
                os.write(2, e.code.encode() + b"\n")
            os._exit(1 if isinstance(e.code, str) else e.code or 0)
    return pid

def without_times(path):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(path)]

def same(a, b):
    """Are two values (tensors, or lists and dicts of them) equal bit for bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def check_same_end(whole, killed, checkpoint):
    """Two finished runs have the same weights, optimizer state and log."""
    a, b = (load_checkpoint(run / checkpoint, ("optimizer", "step")) for run in (whole, killed))
    for content in (a, b):
        for name in ("seconds", "train_config", "sae_config"):  # they differ in out_dir
            content.pop(name, None)
    assert same(a, b), [key for key in a if not same(a[key], b[key])]
    assert without_times(whole / "log.jsonl") == without_times(killed / "log.jsonl")
    if (whole / "sae.pt").is_file():
        assert same(*(torch.load(run / "sae.pt", weights_only=True) for run in (whole, killed)))
    assert not list(killed.glob("*.tmp")), list(killed.iterdir())

def inspect(killed, checkpoint, begun, hit):
    """Check the folder of a killed run, count what the kill hit → has the run begun?"""
    log = read_log(killed / "log.jsonl") if (killed / "log.jsonl").is_file() else []
    last = max((line["step"] for line in log), default=0)
    begun = begun or last > 0
    if begun or (killed / checkpoint).is_file():  # from the first step on there is a checkpoint
        step = load_checkpoint(killed / checkpoint, ("optimizer", "step"))["step"]
        hit["ahead"] += last > step
    else:
        hit["before"] += 1
    hit["kills"] += 1
    hit["writing"] += bool(list(killed.glob("*.tmp")))
    return begun

def main(script, kills, *argv):
    torch.set_num_threads(1)
    (command, checkpoint), kills, rng = MAIN[script], int(kills), random.Random(0)
    folder = Path(next(a for a in argv if a.startswith("--out_dir=")).partition("=")[2])
    whole, killed = folder / "whole", folder / "killed"
    argv = [a for a in argv if not a.startswith("--out_dir=")]
    start = time.perf_counter()
    status = os.waitpid(fork(command, [*argv, f"--out_dir={whole}"]), 0)[1]
    assert status == 0, status
    duration = time.perf_counter() - start
    hit, begun = dict(kills=0, before=0, writing=0, ahead=0, ends=0), False
    while True:
        pid = fork(command, [*argv, f"--out_dir={killed}", "--resume"])
        if hit["kills"] < kills:
            time.sleep(rng.uniform(0, duration / 2))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if status == signal.SIGKILL:
            begun = inspect(killed, checkpoint, begun, hit)
            continue
        assert status == 0, status
        check_same_end(whole, killed, checkpoint)
        hit["ends"] += 1
        if hit["kills"] == kills:
            return print(hit)
        shutil.rmtree(killed)
        begun = False

if __name__ == "__main__":
    main(*sys.argv[1:])
