"""Training: it learns, resumes bit for bit and stops cleanly; the schedule and the optimizer."""
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from support.runtime import UserError

import pytest
import torch
from conftest import TINY, StopAt, make_dataset, run

import eval as evaluation
import train
from model import load_model
from support import accounting, checkpoint
from support.checkpoint import load_checkpoint
from support.log import read_log
from support.training import read_config

ROOT = Path(train.__file__).resolve().parent
CPU = torch.device("cpu")

def arguments(dataset, out, *more):
    return [*TINY, f"--dataset={dataset}", f"--out_dir={out}", *more]

def teaching(chain):
    return [f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]

def cocomix(chain):
    return ["--method=cocomix", *teaching(chain)]

def trained(*argv):
    """Train; it must succeed."""
    status, _, err = run(train.main, *argv)
    assert status == 0, err

def evaluated(folder, *more):
    """Evaluate a run; it must succeed → its row."""
    path = folder / "row.jsonl"
    status, _, err = run(evaluation.main, folder, "--device=cpu", f"--write={path}", *more)
    assert status == 0, err
    return json.loads(path.read_text())

def values_of(log, name):
    return [line[name] for line in log if name in line]

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

# -- methods ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["ntp", "kd", "pause", "pause_kd", "cocomix", "cocomix_kd"])
def test_sixty_steps_lower_the_loss(chain, dataset, tmp_path, method):
    more = [] if method == "ntp" else teaching(chain)
    trained(*arguments(dataset, tmp_path, "--max_iters=60", "--eval_interval=60",
                       "--learning_rate=1e-2", f"--method={method}", *more))
    log = read_log(tmp_path / "log.jsonl")
    first, last = values_of(log, "val_loss")
    assert last < first - 0.25
    taught, predicts = method.endswith("kd"), method.startswith("cocomix")
    assert len(values_of(log, "loss")) == 60
    assert len(values_of(log, "kl")) == (60 if taught else 0)
    assert len(values_of(log, "concept_loss")) == (60 if predicts else 0)
    if taught:
        kl = values_of(log, "kl")
        assert 0 < kl[-1] < kl[0] - 0.1
    if predicts:
        first, last = values_of(log, "val_concept_loss")
        assert last < first - 0.1

ABLATIONS = ["--target=l1", "--target=l2 --mix=add", "--target=cos --mix=interleave_residual",
             "--target=l2 --mix=none", "--mix=none", "--concept_weight=0",
             "--concept_weight=0 --mix=interleave_residual", "--mix=add",
             "--method=pause --mix=interleave_residual", "--select=activation",
             "--attribution=paper", "--attribution_sign=lower", "--attribution_sign=abs"]

@pytest.mark.parametrize("keys", ABLATIONS)
def test_every_ablation_trains_resumes_and_is_evaluated(chain, dataset, tmp_path, keys):
    argv = arguments(dataset, tmp_path, "--max_iters=12", "--eval_interval=6",
                     "--learning_rate=1e-2", *cocomix(chain), *keys.split())
    with StopAt(7):
        assert run(train.main, *argv)[0] == 130
    trained(*argv, "--resume")
    val = values_of(read_log(tmp_path / "log.jsonl"), "val_loss")
    assert len(val) == 3 and val[2] < val[0]
    row, predicts = evaluated(tmp_path), "--method=pause" not in keys
    assert ("concept_loss" in row) == predicts
    assert ("hit_rate" in row) == (predicts and "--target" not in keys)

@pytest.mark.parametrize("one, other", [
    ("--method=ntp", "--method=kd --kd_weight=0"),
    ("--method=pause", "--method=pause_kd --kd_weight=0"),
    ("--method=ntp", "--method=cocomix --mix=none --concept_weight=0"),
])
def test_methods_differ_only_by_their_own_terms(chain, dataset, tmp_path, one, other):
    weights = []
    for name, keys in (("one", one), ("other", other)):
        trained(*arguments(dataset, tmp_path / name, *teaching(chain), *keys.split()))
        weights.append(load_checkpoint(tmp_path / name)["model"])
    for name, t in weights[0].items():
        torch.testing.assert_close(t, weights[1][name], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("method", ["cocomix", "kd"])
@pytest.mark.parametrize("shape", ["--n_layer=4 --n_embd=24 --n_head=3",
                                   "--n_layer=2 --n_embd=8 --n_head=1 --block_size=16"],
                         ids=["weak-to-strong", "strong-to-weak"])
def test_any_run_teaches_a_student_of_another_shape_on_other_text(chain, tmp_path, method, shape):
    """The student is larger or smaller than its concept model, its dataset unknown to that."""
    other, concept_model = make_dataset(tmp_path / "other", seed=9), load_checkpoint(chain["gpt"])
    settings = concept_model["model_config"]
    assert other != concept_model["train_config"]["dataset"]
    assert (settings["n_layer"], settings["n_embd"]) == (3, 16)
    trained(*arguments(other, tmp_path / "run", *cocomix(chain), f"--method={method}",
                       *shape.split()))
    term = "concept_loss" if method == "cocomix" else "kl"
    found = values_of(read_log(tmp_path / "run" / "log.jsonl"), term)
    assert len(found) == 8 and all(0 < value < 10 for value in found)
    row = evaluated(tmp_path / "run", "--tokens=500")
    assert ("hit_rate" in row) == (method == "cocomix")

def test_methods_see_the_same_batches_in_the_same_order(dataset, chain, tmp_path, monkeypatch):
    seen, step_losses = dict(ntp=[], cocomix=[]), train.step_losses

    def watched(name):
        def losses(model, cfg, x, *more):
            if model.training:
                seen[name].append(x.clone())
            return step_losses(model, cfg, x, *more)
        return losses
    for name, more in (("ntp", ["--n_embd=20"]), ("cocomix", cocomix(chain))):
        monkeypatch.setattr(train, "step_losses", watched(name))
        trained(*arguments(dataset, tmp_path / name, *more))
    assert len(seen["ntp"]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))

# -- resuming and stopping -------------------------------------------------------------------------

@pytest.mark.parametrize("method, crash, more", [
    ("ntp", 5, []), ("ntp", 7, ["--micro_batch_size=1", "--dropout=0.2"]), ("pause", 4, []),
    ("cocomix", 6, []), ("cocomix", 3, ["--micro_batch_size=3", "--mix=interleave_residual"]),
])
def test_resume_equals_uninterrupted_bit_for_bit(chain, dataset, tmp_path, method, crash, more):
    keys = [*cocomix(chain), f"--method={method}", "--eval_interval=2", *more]
    trained(*arguments(dataset, tmp_path / "a", *keys))
    with StopAt(crash):
        assert run(train.main, *arguments(dataset, tmp_path / "b", *keys))[0] == 130
    # it crashed before this step's evaluation and checkpoint
    assert load_checkpoint(tmp_path / "b")["step"] == (crash - 1) // 2 * 2
    trained(*arguments(dataset, tmp_path / "b", "--resume", *keys))
    a, b = (load_checkpoint(tmp_path / name) for name in "ab")
    assert a["step"] == b["step"] == 8 and a["best_val_loss"] == b["best_val_loss"]
    assert all(torch.equal(t, b["model"][name]) for name, t in a["model"].items())
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(t, b["optimizer"]["state"][i][k]) for k, t in state.items())
    logs = [read_log(tmp_path / name / "log.jsonl") for name in "ab"]
    for line in (*logs[0], *logs[1]):
        for name in ("seconds", "tokens_per_s"):
            line.pop(name, None)
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[1] if "loss" in line] == list(range(1, 9))

def test_a_finished_run_is_not_run_again_and_none_is_overwritten(chain, dataset):
    path = Path(chain["ntp"]) / "ckpt.pt"
    before = path.read_bytes()
    status, out, _ = run(train.main, *arguments(dataset, chain["ntp"], "--seed=1", "--resume"))
    assert status == 0 and "already trained (8 steps" in out
    status, _, err = run(train.main, *arguments(dataset, chain["ntp"], "--seed=1"))
    assert status == 1 and "--resume continues it" in err and len(err.strip().splitlines()) == 1
    status, _, err = run(train.main, *arguments(dataset, chain["ntp"], "--seed=2", "--resume"))
    assert status == 1 and "seed=1" in err
    assert path.read_bytes() == before

def test_a_finished_run_can_be_extended(dataset, tmp_path):
    argv = arguments(dataset, tmp_path, "--method=ntp")
    trained(*argv)
    status, out, err = run(train.main, *argv, "--resume", "--max_iters=12")
    assert status == 0 and "extended from 8 to 12 steps; the learning rate rises to" in out, err
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 13))
    cfg = train.Config(max_iters=12, learning_rate=1e-3)
    rates = [train.learning_rate(cfg, step) for step in range(8, 12)]
    assert values_of(log, "lr")[8:] == pytest.approx(rates) and rates[0] > values_of(log, "lr")[7]
    assert run(train.main, *argv, "--resume", "--max_iters=12")[1].count("already trained (12") == 1
    status, _, err = run(train.main, *argv, "--resume", "--max_iters=10")
    assert status == 1 and "has max_iters=12, but now it is 10" in err
    status, out, _ = run(train.main, *argv, "--resume", "--max_iters=20", "--weight_decay=0.3")
    assert status == 1 and "extended" not in out  # it is not

def test_an_unfinished_run_keeps_its_schedule(dataset, tmp_path):
    with StopAt(6):
        run(train.main, *arguments(dataset, tmp_path))
    status, _, err = run(train.main, *arguments(dataset, tmp_path, "--resume", "--max_iters=12"))
    assert status == 1 and "has max_iters=8, but now it is 12" in err

def test_a_resumed_run_continues_the_same_wandb_run(dataset, tmp_path, monkeypatch):
    started, lines = [], []

    def init(id, resume, **_):
        started.append(id)
        return SimpleNamespace(id=id or f"new{len(started)}")
    package = SimpleNamespace(init=init, log=lambda line, step: lines.append(step))
    monkeypatch.setitem(sys.modules, "wandb", package)
    argv = arguments(dataset, tmp_path, "--wandb_log")
    with StopAt(6):
        run(train.main, *argv)
    trained(*argv, "--resume")
    trained(*argv, "--overwrite")
    assert started == [None, "new1", None] and lines[:3] == [0, 0, 1]
    assert load_checkpoint(tmp_path)["wandb_id"] == "new3"

def test_a_folder_named_wandb_is_not_the_package(dataset, tmp_path, monkeypatch):
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    status, _, err = run(train.main, *arguments(dataset, tmp_path / "run", "--wandb_log"))
    assert status == 1 and "the folder wandb/ here is not the package; pip install wandb" in err
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

# -- starting from weights -------------------------------------------------------------------------

def val_losses(folder):
    return values_of(read_log(folder / "log.jsonl"), "val_loss")

def test_a_run_starts_from_another(chain, dataset, tmp_path):
    trained(*arguments(dataset, tmp_path / "ntp", f"--init_from={chain['gpt']}", "--max_iters=0",
                       "--block_size=16"))
    old, new = (load_checkpoint(folder)["model"] for folder in (chain["gpt"], tmp_path / "ntp"))
    assert torch.equal(old.pop("wpe.weight")[:16], new.pop("wpe.weight"))
    assert all(torch.equal(t, new[name]) for name, t in old.items()) and len(old) == len(new)
    longer = arguments(dataset, tmp_path / "ntp", "--resume", "--max_iters=1", "--block_size=16")
    status, out, err = run(train.main, *longer)  # its weights are in the checkpoint: no --init_from
    assert status == 0 and "extended from 0 to 1" in out, err

@pytest.mark.parametrize("mix", ["add", "interleave_residual"])
def test_a_new_mixer_hardly_changes_a_pretrained_model(chain, dataset, tmp_path, mix):
    start = f"--init_from={chain['gpt']}"
    trained(*arguments(dataset, tmp_path / "ntp", start, "--max_iters=0"))
    trained(*arguments(dataset, tmp_path / "new", start, "--max_iters=0", *cocomix(chain),
                       f"--mix={mix}"))
    plain, = val_losses(tmp_path / "ntp")
    assert val_losses(tmp_path / "new") == pytest.approx([plain], abs=0.05)
    new, old = (load_checkpoint(folder)["model"] for folder in (tmp_path / "new", chain["gpt"]))
    fresh = {name for name in new if name not in old}
    assert fresh and all(name.startswith("mixer.") for name in fresh)
    assert all(torch.equal(t, new[name]) for name, t in old.items())

def test_a_run_starts_from_one_with_the_same_mixer(chain, dataset, tmp_path):
    start = [f"--init_from={chain['cocomix']}", "--max_iters=0", *cocomix(chain)]
    trained(*arguments(dataset, tmp_path / "same", *start))
    old, new = (load_checkpoint(f)["model"] for f in (chain["cocomix"], tmp_path / "same"))
    assert all(torch.equal(t, new[name]) for name, t in old.items()) and len(old) == len(new)
    for keys, message in (("--mix=add", "another shape than this run: give it --mix=interleave\n"),
                          ("--insert_layer=2", "give it --insert_layer=1\n"),
                          ("--method=ntp", "has a concept mixer, unlike this run")):
        status, _, err = run(train.main, *arguments(dataset, tmp_path / "b", *start, *keys.split()))
        assert status == 1 and message in err and err.count("\n") == 1, err

def wait_for(condition, seconds):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.02)

@pytest.mark.parametrize("number", [signal.SIGINT] + [
    pytest.param(number, marks=pytest.mark.slow)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)])
def test_a_signal_saves_and_the_run_can_resume(dataset, tmp_path, number):
    """In a real process, as a person would stop it."""
    argv = arguments(dataset, tmp_path, "--max_iters=100000", "--eval_interval=100000")
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    log = tmp_path / "log.jsonl"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) >= 8, 60)
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} at step" in err and "--resume" in err
    assert "Traceback" not in err
    step = load_checkpoint(tmp_path)["step"]
    assert step >= 5 and step == max(line["step"] for line in read_log(log))

@pytest.mark.skipif(not Path("/proc/self/maps").exists(),
                    reason="needs /proc to see that torch is being loaded")
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_during_the_imports_prints_no_traceback(script, tmp_path):
    def default_handler():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, str(ROOT / script), str(tmp_path)], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               preexec_fn=default_handler)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), 30)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and err in ("", "stopped\n")

def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(dataset, tmp_path, monkeypatch):
    step_losses, calls = train.step_losses, []

    def broken(model, *args):
        losses = step_losses(model, *args)
        calls.append(1)
        if model.training and len(calls) > 6:
            losses = losses._replace(next_token=losses.next_token * math.nan)
        return losses
    monkeypatch.setattr(train, "step_losses", broken)
    status, _, err = run(train.main, *arguments(dataset, tmp_path))
    assert status == 1 and "the loss is nan at step" in err and "not finite" in err
    assert "ckpt.pt" in err
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path)["model"].values())

# -- batches ---------------------------------------------------------------------------------------

def test_memory_is_looked_at_before_a_resumed_optimizer_takes_some(
        dataset, tmp_path, monkeypatch):
    argv, seen = arguments(dataset, tmp_path / "run"), []
    trained(*argv)
    for module, name in ((accounting, "micro_batch"), (checkpoint, "load_optimizer")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *argv, call=original, name=name:
                            seen.append(name) or call(*argv))
    trained(*argv, "--max_iters=10", "--resume")
    assert seen == ["micro_batch", "load_optimizer"]

@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(dataset, tmp_path, double, micro):
    weights = []
    for n in (4, micro):
        trained(*arguments(dataset, tmp_path / str(n), f"--micro_batch_size={n}"))
        weights.append(load_checkpoint(tmp_path / str(n))["model"])
    for name, t in weights[0].items():
        torch.testing.assert_close(weights[1][name], t, atol=1e-9, rtol=1e-7)

def test_val_loss_does_not_depend_on_the_micro_batch(dataset, tmp_path):
    losses = []
    for n in (1, 3, 4):
        folder = tmp_path / str(n)
        trained(*arguments(dataset, folder, "--max_iters=0", f"--micro_batch_size={n}"))
        losses += values_of(read_log(folder / "log.jsonl"), "val_loss")
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)

# -- schedule and optimizer ------------------------------------------------------------------------

def test_learning_rate_warms_up_from_above_zero_and_ends_at_a_tenth():
    cfg = train.Config(max_iters=600, learning_rate=1.0)
    rates = [train.learning_rate(cfg, step) for step in range(600)]
    assert rates[:2] == [0.5, 1.0] and max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    middle = 2 + (599 - 2) / 2
    assert train.learning_rate(cfg, middle) == pytest.approx(0.55)

def test_only_matrices_and_embeddings_decay_and_the_mixer_has_its_own_learning_rate(chain):
    model = load_model(load_checkpoint(chain["cocomix"]))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = train.make_optimizer(model, train.Config(concept_lr_scale=3), CPU).param_groups

    def members(key, value):
        return {names[id(p)] for g in groups if g[key] == value for p in g["params"]}
    every = set(names.values())
    mixer = {name for name in every if name.startswith("mixer.")}
    vectors = {name for name in every if "bias" in name or "ln_" in name}
    assert members("lr_scale", 3) == mixer and members("lr_scale", 1) == every - mixer
    assert members("weight_decay", 0) == vectors
    assert members("weight_decay", 0.1) == every - vectors
    assert {"wte.weight", "wpe.weight", "mixer.compress", "mixer.predict.weight"} < every - vectors
    assert sum(len(g["params"]) for g in groups) == len(names)
    groups = train.make_optimizer(model, train.Config(decay_all=True), CPU).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1] * 4

def test_a_mixer_with_a_learning_rate_of_zero_stays_as_it_was(chain, dataset, tmp_path):
    weights = []
    for scale in ("1", "0"):
        trained(*arguments(dataset, tmp_path / scale, *cocomix(chain), "--max_iters=1",
                           "--warmup_iters=0", f"--concept_lr_scale={scale}"))
        weights.append(load_checkpoint(tmp_path / scale)["model"])
    for name, t in weights[0].items():
        moves = name.startswith("mixer.") and t.abs().sum() > 0
        assert torch.equal(t, weights[1][name]) != moves, name

# -- keys ------------------------------------------------------------------------------------------

def test_max_iters_on_the_command_line_overrides_a_configs_max_tokens():
    def max_iters(*argv):
        argv = [str(ROOT / "config" / "cocomix_69m.py"), *argv]
        return read_config(train.Config, argv, train.__doc__).max_iters
    assert max_iters() == 38147 and max_iters("--max_iters=100") == 100
    with pytest.raises(UserError, match="exclude each other"):
        max_iters("--max_iters=100", "--max_tokens=1e6")

def test_keys_that_a_method_does_not_use_are_named_and_stop_nothing(chain, dataset, tmp_path):
    keys = [*TINY, "--method=kd", f"--concept_model={chain['gpt']}", f"--dataset={dataset}"]
    status, out, err = run(train.main, *keys, "--concept_layer=5", "--select=activation",
                           f"--out_dir={tmp_path}")
    assert status == 0, err
    assert "note: method='kd' does not use" in out and "concept_layer" in out and "select" in out
    assert "kd_weight" not in out and "concept_model" not in out.split("\n")[0]
