"""kill -9 at random moments loses nothing: a run resumed with --resume ends like one that was never
interrupted, bit for bit."""
import ast
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash
import pytest
from conftest import TINY, run

import concepts
import train
from support.checkpoint import load_checkpoint

ROOT = Path(train.__file__).resolve().parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

def command(chain, dataset, name):
    """(script, its arguments) of the case `name`."""
    concept_model, sae = f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"
    often = [*TINY, "--max_iters=30", "--eval_interval=2", f"--dataset={dataset}"]
    accumulated = ["--micro_batch_size=2", "--dropout=0.1"]
    cocomix = [*often, "--method=cocomix", concept_model, sae]
    return {
        "ntp": ("train.py", [*often, "--method=ntp"]),
        "ntp, accumulated": ("train.py", [*often, "--method=ntp", *accumulated]),
        "cocomix": ("train.py", cocomix),
        "cocomix, accumulated, labels from disk": (
            "train.py", [*cocomix, *accumulated, "--labels=disk", "--shift_blocks=false"]),
        "kd, accumulated": ("train.py", [*often, "--method=kd", concept_model, *accumulated]),
        "sae": ("sae.py", [
            "--n_concepts=48", "--k=6", "--concept_layer=1", "--batch_size=64", "--max_tokens=4096",
            "--k_aux=8", "--dead_tokens=300", "--save_interval=2", "--log_interval=1",
            "--device=cpu", "--eval_tokens=1000", f"--dataset={dataset}", concept_model]),
    }[name]

def write_labels(argv):
    """Store the labels that a run with these arguments needs."""
    keys = concepts.Config.__dataclass_fields__
    argv = [arg for arg in argv if arg.partition("=")[0].lstrip("-") in keys]
    status, _, err = run(concepts.main, "--write_labels", *argv)
    assert status == 0, err

def killed(script, argv, kills, out):
    """Run tests/crash.py → what its kills hit."""
    command = [sys.executable, str(ROOT / "tests/crash.py"), script, str(kills), *argv,
               f"--out_dir={out}"]
    process = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert process.returncode == 0, process.stderr
    hit = ast.literal_eval(process.stdout)
    assert hit["kills"] == kills and hit["ends"] >= 1
    return hit

def test_a_killed_run_ends_like_one_that_was_never_interrupted(chain, dataset, tmp_path):
    script, argv = command(chain, dataset, "ntp")
    killed(script, [*argv, "--max_iters=10"], 4, tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "ntp, accumulated", "cocomix", "cocomix, accumulated, labels from disk", "kd, accumulated",
    "sae"])
def test_twenty_kills_lose_nothing(chain, dataset, tmp_path, name):
    script, argv = command(chain, dataset, name)
    if "--labels=disk" in argv:
        write_labels(argv)
    hit = killed(script, argv, 20, tmp_path)
    # some kills hit between a line of the log and its checkpoint, or while one was written
    assert hit["ahead"] + hit["writing"] > 0, hit

def torchrun(*argv):
    """Two processes of train.py in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), *argv]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=ONE_THREAD)

def wait_for_success(process):
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err

def descendants(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    children = [int(child) for child in text.split()]
    return children + [pid for child in children for pid in descendants(child)]

def kill_after_a_log_line(process, log, delay, all_of_them):
    """SIGKILL once the log has grown: torchrun and its processes, or only one of the latter."""
    size, start = log.stat().st_size if log.is_file() else 0, time.time()
    while process.poll() is None and time.time() < start + 120:
        if log.is_file() and log.stat().st_size > size:
            break
        time.sleep(0.01)
    time.sleep(delay)
    victims = descendants(process.pid)
    for pid in [process.pid, *victims] if all_of_them else victims[-1:]:
        os.kill(pid, signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode != 0, err

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find processes")
@pytest.mark.parametrize("name", ["ntp", "cocomix, accumulated, labels from disk"])
def test_two_processes_are_killed_together_or_one_of_them(chain, dataset, tmp_path, name):
    _, argv = command(chain, dataset, name)
    argv = [*argv, "--max_iters=400", "--learning_rate=1e-3", "--micro_batch_size=1"]
    if "--labels=disk" in argv:
        write_labels(argv)
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(1)
    wait_for_success(torchrun(*argv, f"--out_dir={whole}"))
    for kill in range(3):
        process = torchrun(*argv, f"--out_dir={killed}", "--resume")
        kill_after_a_log_line(process, killed / "log.jsonl", rng.uniform(0, 0.5),
                              all_of_them=kill != 1)  # torchrun ends the other one itself
        assert 0 <= load_checkpoint(killed)["step"] < 400
    wait_for_success(torchrun(*argv, f"--out_dir={killed}", "--resume"))
    crash.check_same_end(whole, killed, "ckpt.pt")
