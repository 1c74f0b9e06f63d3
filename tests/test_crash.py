"""kill -9 at random moments loses nothing: what goes on with --resume ends like a run that was never stopped, bit for bit."""
import ast
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import concepts
import crash
import train
from conftest import TINY, run
from model import load_checkpoint

ROOT = Path(train.__file__).resolve().parent


def command(chain, dataset, name):
    """(script, its arguments) of the case `name`."""
    guided = [f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]
    often = [*TINY, "--max_iters=30", "--eval_interval=2", f"--dataset={dataset}"]
    accumulated = ["--micro_batch_size=2", "--dropout=0.1"]
    return {
        "ntp": ("train.py", [*often, "--method=ntp"]),
        "ntp, accumulated": ("train.py", [*often, "--method=ntp", *accumulated]),
        "cocomix": ("train.py", [*often, "--method=cocomix", *guided]),
        "cocomix, accumulated, labels from disk": ("train.py", [*often, "--method=cocomix", *guided, *accumulated, "--labels=disk", "--shift_blocks=false"]),
        "kd, accumulated": ("train.py", [*often, "--method=kd", *guided[:1], *accumulated]),
        "sae": ("sae.py", ["--n_concepts=48", "--k=6", "--concept_layer=1", "--batch_size=64", "--max_tokens=4096", "--k_aux=8", "--dead_tokens=300", "--save_interval=2", "--log_interval=1",
                           "--device=cpu", "--eval_tokens=1000", f"--dataset={dataset}", guided[0]]),
    }[name]


def killed(script, argv, kills, out):
    """Run tests/crash.py; what its kills hit."""
    process = subprocess.run([sys.executable, str(ROOT / "tests/crash.py"), script, str(kills), *argv, f"--out_dir={out}"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    hit = ast.literal_eval(process.stdout)
    assert hit["kills"] == kills and hit["ends"] >= 1
    return hit


def test_a_killed_run_ends_like_one_that_never_stopped(chain, dataset, tmp_path):
    script, argv = command(chain, dataset, "ntp")
    killed(script, [*argv, "--max_iters=10"], 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ntp, accumulated", "cocomix", "cocomix, accumulated, labels from disk", "kd, accumulated", "sae"])
def test_twenty_kills_lose_nothing(chain, dataset, tmp_path, name):
    script, argv = command(chain, dataset, name)
    if "--labels=disk" in argv:
        status, _, err = run(concepts.main, "--write_labels", *[a for a in argv if a.partition("=")[0].lstrip("-") in concepts.LabelKeys.__dataclass_fields__])
        assert status == 0, err
    hit = killed(script, argv, 20, tmp_path)
    assert hit["ahead"] + hit["writing"] > 0, hit  # between a line of the log and its checkpoint, and while one was written


def torchrun(*argv):
    """Two processes of train.py in a session of their own."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *argv],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def children(pid):
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find torchrun's processes")
@pytest.mark.parametrize("name", ["ntp", "cocomix, accumulated, labels from disk"])
def test_two_processes_are_killed_together_or_one_of_them(chain, dataset, tmp_path, name):
    _, argv = command(chain, dataset, name)
    argv = [*argv, "--max_iters=400", "--learning_rate=1e-3", "--micro_batch_size=1"]
    if "--labels=disk" in argv:
        assert run(concepts.main, "--write_labels", *[a for a in argv if a.partition("=")[0].lstrip("-") in concepts.LabelKeys.__dataclass_fields__])[0] == 0
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(1)
    process = torchrun(*argv, f"--out_dir={whole}")
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err
    for kill in range(3):
        process = torchrun(*argv, f"--out_dir={killed}", "--resume")
        log, start = killed / "log.jsonl", time.time()
        size = log.stat().st_size if log.is_file() else 0
        while process.poll() is None and time.time() < start + 120 and not (log.is_file() and log.stat().st_size > size):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        victims = children(process.pid)
        for pid in [victims[-1]] if kill == 1 else [process.pid, *victims]:  # torchrun ends the others itself, once
            os.kill(pid, signal.SIGKILL)
        err = process.communicate(timeout=120)[1]
        assert process.returncode != 0, err
        assert 0 <= load_checkpoint(killed)["step"] < 400
    process = torchrun(*argv, f"--out_dir={killed}", "--resume")
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err
    crash.check_same_end(whole, killed, "ckpt.pt")
