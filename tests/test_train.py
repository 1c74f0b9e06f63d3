"""Training: it learns, resumes bit for bit and stops cleanly; the schedule and the optimizer."""
import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from support.runtime import UserError

import pytest
import torch
from conftest import TINY, StopAt, make_dataset, run, tiny_gpt

import eval as evaluation
import train
from concepts import Targets
from model import ModelConfig, load_model
from support import accounting, checkpoint, training
from support.checkpoint import load_checkpoint
from support.distributed import Ranks
from support.kernels import Teacher
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

def test_a_run_that_continues_elsewhere_says_so(dataset, tmp_path, monkeypatch):
    argv = arguments(dataset, tmp_path)
    for step, bf16 in (5, False), (6, True), (7, True):
        monkeypatch.setattr(training, "uses_bf16", lambda dtype, device, bf16=bf16: bf16)
        with StopAt(step):
            status, out, _ = run(train.main, *argv, "--resume")
        assert status == 130
        assert ("continues with dtype bfloat16 (before: float32)" in out) == (step == 6)
    first = read_log(tmp_path / "log.jsonl")[0]
    assert first["dtype"] == "float32" and len(first["moved"]) == 1
    assert first["moved"][0].items() >= dict(dtype="bfloat16", device=first["device"]).items()

@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_optimizer_is_fused_where_the_device_can(fused):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    before, after = (torch.optim.AdamW([p], fused=f) for f in (not fused, fused))
    before.step()
    checkpoint.load_optimizer(after, dict(optimizer=before.state_dict()), "x")
    assert after.param_groups[0]["fused"] == fused
    after.step()
    assert after.state[p]["step"] == 2

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
    assert log[0]["max_iters"] == 12
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
    other = shutil.copytree(chain["sae"], tmp_path / "sae")
    state = torch.load(other / "sae.pt")
    state["latent_bias"] += 1
    torch.save(state, other / "sae.pt")
    trained(*arguments(dataset, tmp_path / "same", *start))
    old, new = (load_checkpoint(f)["model"] for f in (chain["cocomix"], tmp_path / "same"))
    assert all(torch.equal(t, new[name]) for name, t in old.items()) and len(old) == len(new)
    for keys, message in (("--mix=add", "another shape than this run: give it --mix=interleave\n"),
                          ("--insert_layer=2", "give it --insert_layer=1\n"),
                          ("--method=ntp", "has a concept mixer, unlike this run"),
                          (f"--sae={other}", f"learned from another sae, then at --sae="
                                             f"{chain['sae']}: give this run the same")):
        status, _, err = run(train.main, *arguments(dataset, tmp_path / "b", *start, *keys.split()))
        assert status == 1 and message in err and err.count("\n") == 1, err

def test_pause_vectors_start_from_others_whatever_the_teacher(chain, dataset, tmp_path):
    keys = ["--method=pause_kd", "--max_iters=0"]
    trained(*arguments(dataset, tmp_path / "a", *keys, f"--concept_model={chain['gpt']}"))
    trained(*arguments(dataset, tmp_path / "b", *keys, f"--concept_model={chain['ntp']}",
                       f"--init_from={tmp_path / 'a'}", "--concept_k=3"))
    a, b = (load_checkpoint(tmp_path / name)["model"]["mixer.vector"] for name in "ab")
    assert torch.equal(a, b)

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

def test_max_iters_on_the_command_line_overrides_a_configs_max_tokens(tmp_path):
    def max_iters(*argv):
        argv = [str(ROOT / "config" / "cocomix_69m.py"), *argv]
        return read_config(train.Config, argv, train.__doc__).max_iters
    assert max_iters() == 38147 and max_iters("--max_iters=100") == 100
    with pytest.raises(UserError, match="exclude each other"):
        max_iters("--max_iters=100", "--max_tokens=1e6")
    short = tmp_path / "short.py"
    short.write_text("max_iters = 10")
    with pytest.raises(UserError, match="exclude each other"):
        max_iters(str(short))
    assert max_iters(str(short), "--max_iters=20") == 20
    assert max_iters(str(short), "--max_tokens=1e6") == 2  # of 512 · 1024 tokens
    assert max_iters(str(short), "--max_tokens=none") == 10

def test_a_warm_up_longer_than_the_run_is_named(dataset, tmp_path):
    argv = arguments(dataset, tmp_path, "--warmup_iters=9")
    assert "note: warmup_iters=9 of max_iters=8 steps" in run(train.main, *argv)[1]

def test_a_run_does_not_replace_its_own_concept_model(chain, dataset, tmp_path):
    folder = shutil.copytree(chain["gpt"], tmp_path / "gpt")
    before = (folder / "ckpt.pt").read_bytes()
    for place in (folder, folder / "ckpt.pt"):
        status, _, err = run(train.main, *arguments(dataset, folder, "--overwrite", "--method=kd",
                                                    f"--concept_model={place}"))
        assert status == 1 and "would replace the concept model" in err
    assert (folder / "ckpt.pt").read_bytes() == before

def test_keys_that_a_method_does_not_use_are_named_and_stop_nothing(chain, dataset, tmp_path):
    keys = [*TINY, "--method=kd", f"--concept_model={chain['gpt']}", f"--dataset={dataset}"]
    status, out, err = run(train.main, *keys, "--concept_layer=5", "--select=activation",
                           f"--out_dir={tmp_path}")
    assert status == 0, err
    assert "note: method='kd' does not use" in out and "concept_layer" in out and "select" in out
    assert "kd_weight" not in out and "concept_model" not in out.split("\n")[0]

@pytest.mark.parametrize("clip, norm", [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_a_step_is_clipped_and_has_the_schedules_learning_rate(clip, norm):
    model = torch.nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.SGD([dict(params=model.parameters(), lr_scale=2.0)], lr=9.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    cfg = train.Config(grad_clip=clip, max_iters=3000, learning_rate=0.1)  # 10 steps of warm-up
    assert train.update(model, optimizer, cfg, 4).item() == pytest.approx(5)
    moved = (before - model.weight.detach()).norm().item()
    assert moved == pytest.approx(2 * 0.05 * norm, rel=1e-5)
    assert model.weight.grad is None

def test_betas_are_the_configs():
    model = torch.nn.Linear(2, 2)
    groups = train.make_optimizer(model, train.Config(beta1=0.8, beta2=0.9), CPU).param_groups
    assert all(group["betas"] == (0.8, 0.9) for group in groups)

def test_min_lr_and_warmup_iters_set_the_ends_of_the_schedule():
    cfg = train.Config(max_iters=100, learning_rate=1.0, min_lr=0.3, warmup_iters=20)
    rates = [train.learning_rate(cfg, step) for step in range(100)]
    assert rates[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert rates[20] == 1 and rates[-1] == pytest.approx(0.3)

def test_every_step_draws_its_own_dropout(dataset, tmp_path, monkeypatch):
    seeds, keep = [], train.step_losses

    def watched(model, *more):
        if model.training:
            seeds.append(torch.initial_seed())
        return keep(model, *more)
    monkeypatch.setattr(train, "step_losses", watched)
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                         "--dropout=0.1", "--micro_batch_size=4")
    assert status == 0 and len(seeds) == len(set(seeds)) == 8, err

def test_only_steps_count_as_training_time(dataset, tmp_path, monkeypatch):
    clock, keep, val = [0.0], train.step_losses, iter([5.0, 3.0, 4.0])

    def step_losses(*args):
        clock[0] += 1
        return keep(*args)

    def evaluate(*_):
        clock[0] += 100
        return next(val), None
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(train, "step_losses", step_losses)
    monkeypatch.setattr(train, "evaluate", evaluate)
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                         "--micro_batch_size=4", "--log_interval=2")
    assert status == 0, err
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert [line["tokens_per_s"] for line in lines] == [128.0] * 4
    content = load_checkpoint(tmp_path)
    assert content["seconds"] == 8 and content["best_val_loss"] == 3

def test_the_val_sample_is_the_same_for_every_seed(chain, dataset, tmp_path):
    losses = []
    for seed in (1, 2):
        run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / str(seed)}",
            "--max_iters=0", f"--init_from={chain['gpt']}", f"--seed={seed}")
        losses.append(read_log(tmp_path / str(seed) / "log.jsonl")[-1]["val_loss"])
    assert losses[0] == losses[1]

def test_the_total_and_the_losses_of_the_log():
    model, (x, y) = tiny_gpt(insert="concept"), torch.randint(61, (2, 2, 12))
    labels = torch.randint(40, (2, 12, 4))
    teacher = Teacher(torch.randn(2, 12, 5).double(), torch.randn(64, 5).double())
    cfg = train.Config(kd_weight=0.5, concept_weight=0.7)
    found = train.step_losses(model, cfg, x, y, Targets(labels, teacher))
    plain = model(x, y, labels)
    torch.testing.assert_close(found.next_token, plain.loss.detach())
    torch.testing.assert_close(found.concept, plain.concept_loss.detach())
    torch.testing.assert_close(
        found.total, plain.loss + 0.5 * found.kl + 0.7 * plain.concept_loss)

def test_in_an_evaluation_every_row_weighs_the_same():
    model, (x, y) = tiny_gpt(insert="concept"), torch.randint(61, (2, 5, 12))
    labels = torch.randint(40, (5, 12, 4))
    train_run = SimpleNamespace(model=model, compiled=model, cfg=train.Config(), ranks=Ranks(),
                                autocast=contextlib.nullcontext())

    class Groups(list):
        predicts = True
    groups = Groups((x[r], y[r], labels[r]) for r in (slice(0, 4), slice(4, 5)))
    whole = model(x, y, labels)
    assert train.evaluate(train_run, groups) == pytest.approx(
        (whole.loss.item(), whole.concept_loss.item()))

def test_a_model_has_the_keys_of_its_run():
    cfg = train.Config(method="cocomix", target="cos", bias=False, dropout=0.1, embedding_std=0.3,
                       init_std=0.4, concept_k=7, insert_layer=2, mix="add", n_layer=3, n_head=2,
                       n_embd=16, block_size=32)
    assert train.model_config(cfg, 100, 0, 20) == ModelConfig(
        block_size=32, vocab_size=100, n_layer=3, n_head=2, n_embd=16, dropout=0.1, bias=False,
        embedding_std=0.3, init_std=0.4, insert="hidden", mix="add", insert_layer=2, n_concepts=0,
        concept_k=7, hidden_size=20, distance="cos")

def test_what_affects_the_losses_is_kept_on_resume():
    kept = """learning_rate min_lr warmup_iters weight_decay decay_all beta1 beta2 grad_clip
        kd_weight concept_weight concept_lr_scale select attribution attribution_sign attr_k
        concept_layer concept_k seed batch_size block_size eval_iters dtype shift_blocks dropout
        method mix target insert_layer max_iters labels"""
    assert not {*kept.split()} & {*training.TrainingRun.free}

def test_an_evaluation_reads_eval_iters_batches(dataset, tmp_path):
    status, out, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                           "--max_iters=1")
    assert status == 0 and "on 256 val tokens" in out, err  # 2 batches of 4 blocks of 32

def test_val_labels_are_those_of_the_next_tokens():
    x, y = torch.randint(61, (2, 2, 12))
    for target in ("concept", "hidden"):
        asked = SimpleNamespace(target=target, labels=lambda x, y: (x, y))
        (a, b, labels), = training.ValBatches([(x, y)], asked)
        assert a is x and b is y and labels[0] is x and labels[1] is y
