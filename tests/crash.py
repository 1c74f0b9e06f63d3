"""Kill a training again and again, and see whether it ends as if nothing had happened.

    python tests/crash.py train.py KILLS --method=ntp --out_dir=FOLDER …     (or sae.py)

The command runs once in FOLDER/whole, undisturbed. Then it is started in FOLDER/killed with --resume and sent SIGKILL at a
random moment, as often as asked; after each kill its checkpoint must load, and a run that reaches its end must have the
weights, the optimizer and the log (less its times) of the undisturbed one, bit for bit. Each start is a fork of this
process, which has loaded torch but used nothing of it: that costs milliseconds, not seconds. Prints what the kills hit.
"""
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import sae
import torch
import torch._dynamo  # which the first optimizer would import, in seconds
import train
from model import load_checkpoint

MAIN = {"train.py": (train.main, "ckpt.pt"), "sae.py": (sae.main, "sae_ckpt.pt")}


def fork(main, argv):
    """A process that runs main(argv), silent but for its errors."""
    pid = os.fork()
    if not pid:
        sys.argv = ["command", *argv]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        config.progress = lambda *args, **keys: config.tqdm(disable=True)
        try:
            config.run(main)
        except SystemExit as e:
            if isinstance(e.code, str):
                os.write(2, e.code.encode() + b"\n")
            os._exit(1 if isinstance(e.code, str) else e.code or 0)
    return pid


def without_times(path):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in config.read_log(path)]


def same(a, b):
    """Are two values (tensors, lists, dicts of them) equal bit for bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_same_end(whole, killed, checkpoint):
    """Two finished runs: the same weights, optimizer and log."""
    a, b = (load_checkpoint(folder / checkpoint, ("optimizer", "step")) for folder in (whole, killed))
    for content in (a, b):
        del content["seconds"]
        content.pop("train_config", None), content.pop("sae_config", None)  # out_dir
    assert same(a, b), [key for key in a if not same(a[key], b[key])]
    assert without_times(whole / "log.jsonl") == without_times(killed / "log.jsonl")
    if (whole / "sae.pt").is_file():
        assert same(*(torch.load(folder / "sae.pt", weights_only=True) for folder in (whole, killed)))
    assert not list(killed.glob("*.tmp")), list(killed.iterdir())


def main(script, kills, *argv):
    torch.set_num_threads(1)
    (command, checkpoint), kills, rng = MAIN[script], int(kills), random.Random(0)
    folder = Path(next(a for a in argv if a.startswith("--out_dir=")).partition("=")[2])
    argv, whole, killed = [a for a in argv if not a.startswith("--out_dir=")], folder / "whole", folder / "killed"
    start = time.perf_counter()
    status = os.waitpid(fork(command, [*argv, f"--out_dir={whole}"]), 0)[1]
    assert status == 0, status
    duration, hit = time.perf_counter() - start, dict(kills=0, before=0, writing=0, ahead=0, ends=0)
    begun = False
    while True:
        pid = fork(command, [*argv, f"--out_dir={killed}", "--resume"])
        if hit["kills"] < kills:
            time.sleep(rng.uniform(0, duration / 2))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if status == signal.SIGKILL:
            log = config.read_log(killed / "log.jsonl") if (killed / "log.jsonl").is_file() else []
            steps = [line["step"] for line in log]
            begun = begun or bool(steps) and max(steps) > 0
            if begun or (killed / checkpoint).is_file():
                step = load_checkpoint(killed / checkpoint, ("optimizer", "step"))["step"]  # a folder that holds a first step holds a checkpoint that loads
                hit["ahead"] += bool(steps) and max(steps) > step
            else:
                hit["before"] += 1
            hit["kills"] += 1
            hit["writing"] += bool(list(killed.glob("*.tmp")))
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
