"""Nothing lost, nothing wrong, nothing silent: numbers that are not finite, losses that jump, files that are damaged, two
processes in a folder; and that the same seed gives the same run, however long."""
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import crash
import sae
import train
from conftest import TINY, make_dataset, run
from model import load_checkpoint

ROOT = Path(train.__file__).resolve().parent


def argv(dataset, out, *more):
    return [*TINY, f"--dataset={dataset}", f"--out_dir={out}", *more]


# -- numbers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_by_its_step_and_the_checkpoint_is_kept(dataset, tmp_path, monkeypatch, value):
    """Between two lines of the log, where nothing waits for the device."""
    keep, calls = train.step_losses, []
    def broken(model, cfg, *more):
        losses = keep(model, cfg, *more)
        if model.training and (calls.append(1) or len(calls) == 6):
            return losses._replace(total=losses.total * value)
        return losses
    monkeypatch.setattr(train, "step_losses", broken)
    status, _, err = run(train.main, *argv(dataset, tmp_path, "--max_iters=20", "--log_interval=100", "--eval_interval=4", "--micro_batch_size=4"))
    assert status == 1 and "the gradient's norm is nan at step 6" in err and f"the last good checkpoint is {tmp_path / 'ckpt.pt'}" in err
    content = load_checkpoint(tmp_path)
    assert content["step"] == 4 and all(t.isfinite().all() for t in content["model"].values())


def test_weights_that_are_not_finite_are_not_saved(dataset, tmp_path, monkeypatch):
    """Even where no loss shows them: the embedding of a token that is only padding."""
    keep = train.evaluate
    def spoils(network, *more):
        if (tmp_path / "ckpt.pt").is_file():
            network.wte.weight.data[-1] = math.inf
        return keep(network, *more)
    monkeypatch.setattr(train, "evaluate", spoils)
    status, _, err = run(train.main, *argv(dataset, tmp_path))
    assert status == 1 and "the weight wte.weight is inf at step 4" in err and load_checkpoint(tmp_path)["step"] == 0


def test_an_sae_whose_loss_is_not_finite_stops_at_the_step(chain, dataset, tmp_path, monkeypatch):
    keep, calls = sae.losses, []
    def broken(*args):
        fvu, aux, top = keep(*args)
        return (fvu * math.nan if calls.append(1) or len(calls) == 3 else fvu), aux, top
    monkeypatch.setattr(sae, "losses", broken)
    status, _, err = run(sae.main, f"--concept_model={chain['gpt']}", f"--dataset={dataset}", f"--out_dir={tmp_path}", "--concept_layer=1", "--n_concepts=48", "--k=6",
                         "--batch_size=64", "--max_tokens=1280", "--log_interval=20", "--device=cpu")
    assert status == 1 and "the SAE's loss is nan at step 3" in err
    assert load_checkpoint(tmp_path / "sae_ckpt.pt", ("sae", "step"))["step"] == 0 and not (tmp_path / "sae.pt").exists()


def test_a_loss_that_jumps_warns_and_one_that_falls_or_trembles_does_not(capsys):
    spikes, rng = config.Spikes(), random.Random(0)
    for step in range(1, 400):
        spikes.see("loss", 3 + 7 * math.exp(-step / 50) + rng.gauss(0, 0.05), step, "do less")
    assert capsys.readouterr().err == ""
    spikes.see("loss", 5.0, 400, "do less")
    assert capsys.readouterr().err.startswith("warning: the loss 5.000 at step 400 is far above its running mean 3.0")
    spikes.see("loss", 3.0, 401, "do less")
    assert capsys.readouterr().err == ""


def test_a_training_whose_loss_jumps_warns_once_in_a_line_and_goes_on(dataset, tmp_path, monkeypatch):
    keep, calls = train.step_losses, []
    def jumps(model, *more):
        losses = keep(model, *more)
        return losses._replace(next_token=losses.next_token + 9) if model.training and (calls.append(1) or len(calls) == 30) else losses
    monkeypatch.setattr(train, "step_losses", jumps)
    status, _, err = run(train.main, *argv(dataset, tmp_path, "--max_iters=32", "--eval_interval=32", "--micro_batch_size=4"))
    warned, = [line for line in err.replace("\r", "\n").splitlines() if "warning" in line]
    assert status == 0 and warned.startswith("warning: the loss 1") and "at step 30 is far above" in warned and "below 0.001" in warned


# -- files --------------------------------------------------------------------------------------------------

def test_any_flipped_bit_of_a_checkpoint_is_seen_or_harmless(chain, tmp_path):
    """torch.load alone takes flipped weights as they are."""
    whole, rng, seen = Path(chain["cocomix"], "ckpt.pt").read_bytes(), random.Random(0), 0
    content = load_checkpoint(chain["cocomix"])
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        try:
            assert crash.same(load_checkpoint(tmp_path), content)
        except config.UserError as e:
            assert "cut short, damaged" in str(e)
            seen += 1
    assert seen > 30  # the rest hit padding
    for size in (0, 1, len(whole) // 3, len(whole) - 1):
        (tmp_path / "ckpt.pt").write_bytes(whole[:size])
        with pytest.raises(config.UserError, match="cut short, damaged"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("script", ["train", "sae"])
def test_a_run_that_cannot_save_leaves_an_older_ones_folder_as_it_was(chain, dataset, tmp_path, monkeypatch, script):
    """The log of a run to be overwritten goes with its checkpoint, not before."""
    main, out = (train.main, tmp_path) if script == "train" else (sae.main, tmp_path)
    if script == "train":
        keys = argv(dataset, out)
        assert run(main, *keys)[0] == 0
        keys += ["--overwrite"]
    else:
        keys = [f"--concept_model={chain['gpt']}", f"--dataset={dataset}", f"--out_dir={out}", "--concept_layer=1", "--n_concepts=48", "--k=6", "--batch_size=64", "--max_tokens=128", "--device=cpu"]
        (out / "log.jsonl").write_text('{"step": 1}\n')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    status, _, err = run(main, *keys)
    assert status == 1 and "can't be written (No space left on device); what was there before is kept" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_two_processes_do_not_train_in_one_folder(dataset, tmp_path):
    held = config.Log(tmp_path / "log.jsonl")
    status, _, err = run(train.main, *argv(dataset, tmp_path))
    assert status == 1 and f"another process is training in {tmp_path}" in err and list(tmp_path.iterdir()) == []
    del held
    assert run(train.main, *argv(dataset, tmp_path))[0] == 0


def test_a_log_with_damaged_lines_is_read_without_them(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n[3]\n7\n\xff\xfe\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert config.read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2, "loss": 0.5}]
    log = config.Log(tmp_path / "log.jsonl", 1)
    log.write(dict(step=2, loss=0.25))
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2, "loss": 0.25}\n'


def test_nothing_is_unpickled_or_evaluated():
    """Loads are weights_only, and no text of a person's is run but a config file."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("config/__init__.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("results/*.py")]:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert not [word for word in ("pickle.load", " eval(", "=eval(", " exec(", "allow_pickle", "shell=True", "os.system", "weights_only=False") if word in text], path


# -- the same again -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["ntp", "cocomix_kd"])
def test_two_runs_of_one_seed_are_equal_bit_for_bit(chain, dataset, tmp_path, method):
    guided = [] if method == "ntp" else [f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]
    for name in ("whole", "again"):
        status, _, err = run(train.main, *argv(dataset, tmp_path / name, f"--method={method}", "--dropout=0.1", *guided))
        assert status == 0, err
    crash.check_same_end(tmp_path / "whole", tmp_path / "again", "ckpt.pt")
    assert run(train.main, *argv(dataset, tmp_path / "other", f"--method={method}", "--dropout=0.1", "--seed=2", *guided))[0] == 0
    assert crash.without_times(tmp_path / "other" / "log.jsonl") != crash.without_times(tmp_path / "again" / "log.jsonl")


SOAK = """
import json, os, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import config, train
stats, keep = [], torch.nn.utils.clip_grad_norm_
def once_a_step(*args):
    stats.append(time.process_time())
    if len(stats) % 1000 == 0:
        rss = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        print(json.dumps(dict(step=len(stats), rss=rss, files=len(os.listdir("/proc/self/fd")))), flush=True)
    return keep(*args)
torch.nn.utils.clip_grad_norm_ = once_a_step
try:
    config.run(train.main)
except SystemExit as e:
    assert not e.code, e.code
print(json.dumps(stats))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read memory and open files")
def test_twenty_thousand_steps_stay_flat_in_memory_files_and_time(tmp_path):
    dataset = make_dataset(tmp_path / "data")
    (tmp_path / "soak.py").write_text(SOAK.format(root=str(ROOT)))
    process = subprocess.run([sys.executable, str(tmp_path / "soak.py"), "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=2", "--max_iters=20000", "--eval_interval=1000",
                              "--eval_iters=1", "--log_interval=10", "--device=cpu", f"--dataset={dataset}", f"--out_dir={tmp_path / 'run'}"],
                             capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    *marks, times = [json.loads(line) for line in process.stdout.splitlines() if line[0] in "{["]
    assert len(times) == 20_000 and [mark["step"] for mark in marks] == list(range(1000, 20_001, 1000))
    assert marks[-1]["rss"] < 1.05 * marks[0]["rss"], marks
    assert marks[-1]["files"] <= marks[0]["files"], marks

    def step_time(first):
        """Of a thousand steps, in CPU time; the quickest of four medians, since other processes share the caches."""
        taken = torch.tensor(times[first:first + 1000]).diff()
        return min(part.median().item() for part in taken.chunk(4))
    assert step_time(19_000) < 1.15 * step_time(0), (step_time(0), step_time(19_000))
