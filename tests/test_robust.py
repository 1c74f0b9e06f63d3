"""Nothing lost, nothing wrong, nothing silent: numbers that are not finite, losses that jump,
damaged files, two processes in one folder; and the same seed gives the same run."""
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

from support.runtime import UserError

import crash
import pytest
import torch
from conftest import TINY, make_dataset, run

import sae
import train
from support.checkpoint import load_checkpoint
from support.log import Log, SpikeDetector, read_log

ROOT = Path(train.__file__).resolve().parent

def argv(dataset, out, *more):
    return [*TINY, f"--dataset={dataset}", f"--out_dir={out}", *more]

def sae_argv(chain, dataset, out, *more):
    return [f"--concept_model={chain['gpt']}", f"--dataset={dataset}", f"--out_dir={out}",
            "--concept_layer=1", "--n_concepts=48", "--k=6", "--batch_size=64", "--device=cpu",
            *more]

def train_a_run(*argv):
    status, _, err = run(train.main, *argv)
    assert status == 0, err

# -- numbers ---------------------------------------------------------------------------------------

def in_training_call(monkeypatch, number, change):
    """Change what the number-th call of train.step_losses returns, not counting evaluations."""
    keep, calls = train.step_losses, []

    def changed(model, *more):
        losses = keep(model, *more)
        if model.training:
            calls.append(1)
            if len(calls) == number:
                return change(losses)
        return losses
    monkeypatch.setattr(train, "step_losses", changed)

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_by_its_step_and_the_checkpoint_is_kept(
        dataset, tmp_path, monkeypatch, value):
    """Between two lines of the log, where nothing waits for the device."""
    in_training_call(monkeypatch, 6, lambda losses: losses._replace(total=losses.total * value))
    more = "--max_iters=20", "--log_interval=100", "--eval_interval=4", "--micro_batch_size=4"
    status, _, err = run(train.main, *argv(dataset, tmp_path, *more))
    assert status == 1 and "the gradient's norm is nan at step 6" in err
    assert f"the last good checkpoint is {tmp_path / 'ckpt.pt'}" in err
    content = load_checkpoint(tmp_path)
    assert content["step"] == 4 and all(t.isfinite().all() for t in content["model"].values())

def test_weights_that_are_not_finite_are_not_saved(dataset, tmp_path, monkeypatch):
    """Even where no loss shows them: the embedding of a token that is only padding."""
    keep = train.evaluate

    def spoil_the_weights(training, *more):
        if (tmp_path / "ckpt.pt").is_file():
            training.model.wte.weight.data[-1] = math.inf
        return keep(training, *more)
    monkeypatch.setattr(train, "evaluate", spoil_the_weights)
    status, _, err = run(train.main, *argv(dataset, tmp_path))
    assert status == 1 and "the weight wte.weight is inf at step 4" in err
    assert load_checkpoint(tmp_path)["step"] == 0

def test_an_sae_whose_loss_is_not_finite_stops_at_the_step(chain, dataset, tmp_path, monkeypatch):
    keep, calls = sae.losses, []

    def broken(*args):
        fvu, aux, top = keep(*args)
        calls.append(1)
        return (fvu * math.nan if len(calls) == 3 else fvu), aux, top
    monkeypatch.setattr(sae, "losses", broken)
    more = "--max_tokens=1280", "--log_interval=20"
    status, _, err = run(sae.main, *sae_argv(chain, dataset, tmp_path, *more))
    assert status == 1 and "the SAE's loss is nan at step 3" in err
    assert load_checkpoint(tmp_path / "sae_ckpt.pt", ("sae", "step"))["step"] == 0
    assert not (tmp_path / "sae.pt").exists()

def test_a_loss_that_jumps_warns_and_one_that_falls_or_fluctuates_does_not(capsys):
    spikes, rng = SpikeDetector(), random.Random(0)
    for step in range(1, 400):
        loss = 3 + 7 * math.exp(-step / 50) + rng.gauss(0, 0.05)
        spikes.update("loss", loss, step, "do less")
    assert capsys.readouterr().err == ""
    spikes.update("loss", 5.0, 400, "do less")
    assert capsys.readouterr().err.startswith(
        "warning: the loss 5.000 at step 400 is far above its running mean 3.0")
    spikes.update("loss", 3.0, 401, "do less")
    assert capsys.readouterr().err == ""

def test_a_run_whose_loss_jumps_warns_once_in_a_line_and_continues(dataset, tmp_path, monkeypatch):
    in_training_call(monkeypatch, 30,
                     lambda losses: losses._replace(next_token=losses.next_token + 9))
    more = "--max_iters=32", "--eval_interval=32", "--micro_batch_size=4"
    status, _, err = run(train.main, *argv(dataset, tmp_path, *more))
    warned, = [line for line in err.replace("\r", "\n").splitlines() if "warning" in line]
    assert status == 0 and warned.startswith("warning: the loss 1")
    assert "at step 30 is far above" in warned and "below 0.001" in warned

# -- files -----------------------------------------------------------------------------------------

def test_any_flipped_bit_of_a_checkpoint_is_detected_or_harmless(chain, tmp_path):
    """torch.load alone accepts flipped bits in the weights."""
    whole = Path(chain["cocomix"], "ckpt.pt").read_bytes()
    content, rng, detected = load_checkpoint(chain["cocomix"]), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        try:
            assert crash.same(load_checkpoint(tmp_path), content)
        except UserError as e:
            assert "cut short, damaged" in str(e)
            detected += 1
    assert detected > 30  # the others hit padding
    for size in (0, 1, len(whole) // 3, len(whole) - 1):
        (tmp_path / "ckpt.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short, damaged"):
            load_checkpoint(tmp_path)

@pytest.mark.parametrize("script", ["train", "sae"])
def test_a_run_that_cannot_save_does_not_change_the_folder_of_an_older_one(
        chain, dataset, tmp_path, monkeypatch, script):
    """The log of a run that is overwritten is replaced together with its checkpoint, not before."""
    if script == "train":
        main, keys = train.main, argv(dataset, tmp_path)
        train_a_run(*keys)
        keys += ["--overwrite"]
    else:
        main, keys = sae.main, sae_argv(chain, dataset, tmp_path, "--max_tokens=128")
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
        keys += ["--overwrite"]
    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    before = files()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    status, _, err = run(main, *keys)
    assert status == 1
    assert "can't be written (No space left on device); what was there before is kept" in err
    assert files() == before

def test_two_processes_do_not_train_in_one_folder(dataset, tmp_path):
    held = Log(tmp_path / "log.jsonl")
    status, _, err = run(train.main, *argv(dataset, tmp_path))
    assert status == 1 and f"another process is training in {tmp_path}" in err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    del held
    train_a_run(*argv(dataset, tmp_path))

def test_a_log_with_damaged_lines_is_read_without_them(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n[3]\n7\n\xff\xfe\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert read_log(path) == [{"step": 1}, {"step": 2, "loss": 0.5}]
    Log(path, 1).write(dict(step=2, loss=0.25))
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 0.25}\n'

def test_nothing_is_unpickled_or_evaluated():
    """Loads are weights_only, and no text is run as code but config files."""
    banned = ("pickle.load", " eval(", "=eval(", " exec(", "allow_pickle", "shell=True",
              "os.system", "weights_only=False")
    paths = [path for pattern in ("*.py", "support/*.py", "data/**/*.py", "results/*.py")
             for path in ROOT.glob(pattern)]
    for path in paths:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert not [word for word in banned if word in text], path

# -- the same again --------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["ntp", "cocomix_kd"])
def test_two_runs_of_one_seed_are_equal_bit_for_bit(chain, dataset, tmp_path, method):
    keys = [f"--method={method}", "--dropout=0.1"]
    if method != "ntp":
        keys += [f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]
    train_a_run(*argv(dataset, tmp_path / "whole", *keys))
    train_a_run(*argv(dataset, tmp_path / "again", *keys))
    crash.check_same_end(tmp_path / "whole", tmp_path / "again", "ckpt.pt")
    train_a_run(*argv(dataset, tmp_path / "other", *keys, "--seed=2"))
    logs = [crash.without_times(tmp_path / name / "log.jsonl") for name in ("other", "again")]
    assert logs[0] != logs[1]

SOAK = """
import json, os, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import train
from support import runtime
stats, keep = [], torch.nn.utils.clip_grad_norm_
def once_per_step(*args):
    stats.append(time.process_time())
    if len(stats) % 1000 == 0:
        rss = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = len(os.listdir("/proc/self/fd"))
        print(json.dumps(dict(step=len(stats), rss=rss, files=files)), flush=True)
    return keep(*args)
torch.nn.utils.clip_grad_norm_ = once_per_step
try:
    runtime.run(train.main)
except SystemExit as e:
    assert not e.code, e.code
print(json.dumps(stats))
"""

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read memory")
def test_twenty_thousand_steps_stay_flat_in_memory_files_and_time(tmp_path):
    dataset = make_dataset(tmp_path / "data")
    (tmp_path / "soak.py").write_text(SOAK.format(root=str(ROOT)))
    command = [sys.executable, str(tmp_path / "soak.py"), "--n_layer=1", "--n_head=1", "--n_embd=8",
               "--block_size=16", "--batch_size=2", "--max_iters=20000", "--eval_interval=1000",
               "--eval_iters=1", "--log_interval=10", "--device=cpu", f"--dataset={dataset}",
               f"--out_dir={tmp_path / 'run'}"]
    process = subprocess.run(command, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    *marks, times = [json.loads(line) for line in process.stdout.splitlines() if line[0] in "{["]
    assert len(times) == 20_000
    assert [mark["step"] for mark in marks] == list(range(1000, 20_001, 1000))
    assert marks[-1]["rss"] < 1.05 * marks[0]["rss"], marks
    assert marks[-1]["files"] <= marks[0]["files"], marks

    def step_time(first):
        """CPU time of one of a thousand steps: the lowest of four medians, since other processes
        share the caches."""
        taken = torch.tensor(times[first:first + 1000]).diff()
        return min(part.median().item() for part in taken.chunk(4))
    assert step_time(19_000) < 1.15 * step_time(0), (step_time(0), step_time(19_000))
