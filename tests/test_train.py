"""The training loop: it learns, it resumes bit for bit, it stops cleanly; and the commands around it."""
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import concepts
import data
import eval as evaluation
import train
from config import UserError, read_log
from conftest import TINY, make_dataset, run
from model import load_checkpoint, load_model

ROOT = Path(train.__file__).resolve().parent


def argv(dataset, out, *more):
    return [*TINY, f"--dataset={dataset}", f"--out_dir={out}", *more]


def cocomix(chain):
    return ["--method=cocomix", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]


@pytest.mark.parametrize("method", ["ntp", "kd", "pause", "pause_kd", "cocomix", "cocomix_kd"])
def test_sixty_steps_lower_the_loss(chain, dataset, tmp_path, method):
    more = cocomix(chain)[1:] if method != "ntp" else []
    status, out, err = run(train.main, *argv(dataset, tmp_path, "--max_iters=60", "--eval_interval=60", "--learning_rate=1e-2", f"--method={method}", *more))
    assert status == 0, err
    log = read_log(tmp_path / "log.jsonl")
    val = [line["val_loss"] for line in log if "val_loss" in line]
    assert len(val) == 2 and val[1] < val[0] - 0.25
    steps = [line for line in log if "loss" in line]
    assert all(("kl" in line) == method.endswith("kd") and ("concept_loss" in line) == method.startswith("cocomix") for line in steps)
    if "kl" in steps[0]:
        assert 0 < steps[-1]["kl"] < steps[0]["kl"] - 0.1
    if "concept_loss" in steps[0]:
        concept = [line["val_concept_loss"] for line in log if "val_loss" in line]
        assert concept[1] < concept[0] - 0.1


@pytest.mark.parametrize("keys", [["--target=l1"], ["--target=l2", "--mix=add"], ["--target=cos", "--mix=interleave_residual"], ["--target=l2", "--mix=none"], ["--mix=none"],
                                  ["--concept_weight=0"], ["--concept_weight=0", "--mix=interleave_residual"], ["--mix=add"], ["--method=pause", "--mix=interleave_residual"],
                                  ["--select=activation"], ["--attribution=paper"], ["--attribution_sign=lower"], ["--attribution_sign=abs"]], ids=" ".join)
def test_every_ablation_trains_resumes_and_is_evaluated(chain, dataset, tmp_path, keys):
    common = argv(dataset, tmp_path, "--max_iters=12", "--eval_interval=6", "--learning_rate=1e-2", *cocomix(chain), *keys)
    with StopAt(7):
        assert run(train.main, *common)[0] == 130
    status, out, err = run(train.main, *common, "--resume")
    assert status == 0, err
    val = [line["val_loss"] for line in read_log(tmp_path / "log.jsonl") if "val_loss" in line]
    assert len(val) == 3 and val[2] < val[0]
    status, out, err = run(evaluation.main, tmp_path, "--device=cpu", f"--write={tmp_path / 'row.jsonl'}")
    assert status == 0, err
    row = json.loads((tmp_path / "row.jsonl").read_text())
    assert ("hit_rate" in row) == (row["method"] == "cocomix" and "--target" not in keys[0]) and ("concept_loss" in row) == (row["method"] == "cocomix")


def test_methods_differ_by_their_own_terms_alone(chain, dataset, tmp_path):
    """KD with weight 0 is NTP, Pause + KD with weight 0 is Pause, CoCoMix that neither predicts nor mixes is NTP."""
    def weights(*keys):
        out = tmp_path / "".join(keys)
        assert run(train.main, *argv(dataset, out, *cocomix(chain), *keys, "--resume"))[0] == 0
        return load_checkpoint(out)["model"]
    for a, b in [(["--method=ntp"], ["--method=kd", "--kd_weight=0"]), (["--method=pause"], ["--method=pause_kd", "--kd_weight=0"]),
                 (["--method=ntp"], ["--method=cocomix", "--mix=none", "--concept_weight=0"])]:
        a, b = weights(*a), weights(*b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["cocomix", "kd"])
@pytest.mark.parametrize("shape", [["--n_layer=4", "--n_embd=24", "--n_head=3"], ["--n_layer=2", "--n_embd=8", "--n_head=1", "--block_size=16"]], ids=["weak-to-strong", "strong-to-weak"])
def test_any_run_teaches_a_student_of_another_shape_on_other_text(chain, tmp_path, method, shape):
    """By keys alone: a student larger or smaller than its concept model, on a dataset that this has not seen."""
    other = make_dataset(tmp_path / "other", seed=9)
    teaching = load_checkpoint(chain["gpt"])
    assert other != teaching["train_config"]["dataset"] and teaching["model_config"]["n_layer"] == 3 and teaching["model_config"]["n_embd"] == 16
    status, _, err = run(train.main, *argv(other, tmp_path / "run", *cocomix(chain), f"--method={method}", *shape))
    assert status == 0, err
    lines = read_log(tmp_path / "run" / "log.jsonl")
    guided = [line["concept_loss" if method == "cocomix" else "kl"] for line in lines if "loss" in line]
    assert len(guided) == 8 and all(0 < value < 10 for value in guided)
    status, _, err = run(evaluation.main, tmp_path / "run", "--device=cpu", "--tokens=500", f"--write={tmp_path / 'r.jsonl'}")
    assert status == 0, err
    assert ("hit_rate" in json.loads((tmp_path / "r.jsonl").read_text())) == (method == "cocomix")


class StopAt:
    """A Log that breaks off the run (as a crash would) when it has written the line of a step."""
    def __init__(self, step):
        self.step, self.Log = step, train.config.Log

    def __enter__(self):
        step, Log = self.step, self.Log

        class Crashing(Log):
            def write(self, values):
                super().write(values)
                if values["step"] == step and "loss" in values:
                    raise KeyboardInterrupt
        train.config.Log = Crashing

    def __exit__(self, *_):
        train.config.Log = self.Log


@pytest.mark.parametrize("method, crash, more", [("ntp", 5, []), ("ntp", 7, ["--micro_batch_size=1", "--dropout=0.2"]), ("pause", 4, []),
                                                 ("cocomix", 6, []), ("cocomix", 3, ["--micro_batch_size=3", "--mix=interleave_residual"])])
def test_resume_equals_uninterrupted_bit_for_bit(chain, dataset, tmp_path, method, crash, more):
    more = (cocomix(chain) if method == "cocomix" else [f"--method={method}"]) + more + ["--eval_interval=2"]
    assert run(train.main, *argv(dataset, tmp_path / "a", *more))[0] == 0
    with StopAt(crash):
        assert run(train.main, *argv(dataset, tmp_path / "b", *more))[0] == 130
    saved = load_checkpoint(tmp_path / "b")["step"]
    assert saved == (crash - 1) // 2 * 2  # the crash came before this step's evaluation and checkpoint
    status, _, err = run(train.main, *argv(dataset, tmp_path / "b", "--resume", *more))
    assert status == 0, err
    a, b = (load_checkpoint(tmp_path / name) for name in "ab")
    assert a["step"] == b["step"] == 8 and a["best_val_loss"] == b["best_val_loss"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(t, b["optimizer"]["state"][i][k]) for k, t in state.items())
    a, b = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    keep = lambda log: [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in log]
    assert keep(a) == keep(b)
    assert [line["step"] for line in b if "loss" in line] == list(range(1, 9))


def test_a_run_that_is_done_is_not_run_again_and_none_is_overwritten(chain, dataset):
    before = (Path(chain["ntp"]) / "ckpt.pt").read_bytes()
    status, out, _ = run(train.main, *argv(dataset, chain["ntp"], "--seed=1", "--resume"))
    assert status == 0 and "already trained (8 steps" in out
    status, _, err = run(train.main, *argv(dataset, chain["ntp"], "--seed=1"))
    assert status == 1 and "--resume goes on" in err and len(err.strip().splitlines()) == 1
    status, _, err = run(train.main, *argv(dataset, chain["ntp"], "--seed=2", "--resume"))
    assert status == 1 and "seed=1" in err
    assert (Path(chain["ntp"]) / "ckpt.pt").read_bytes() == before


def test_both_methods_see_the_same_batches_in_the_same_order(dataset, chain, tmp_path, monkeypatch):
    seen = {}
    keep = train.step_losses
    for method in ("ntp", "cocomix"):
        def watch(model, cfg, x, y, *more):
            if model.training:
                seen.setdefault(method, []).append(x.clone())
            return keep(model, cfg, x, y, *more)
        monkeypatch.setattr(train, "step_losses", watch)
        assert run(train.main, *argv(dataset, tmp_path / method, *(cocomix(chain) if method == "cocomix" else ["--n_embd=20"])))[0] == 0
    assert len(seen["ntp"]) == 8 and all(torch.equal(a, b) for a, b in zip(seen["ntp"], seen["cocomix"]))


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(dataset, tmp_path, micro):
    runs = {}
    for m in (4, micro):
        torch.set_default_dtype(torch.float64)
        try:
            assert run(train.main, *argv(dataset, tmp_path / f"{m}", f"--micro_batch_size={m}", "--learning_rate=1e-3"))[0] == 0
        finally:
            torch.set_default_dtype(torch.float32)
        runs[m] = load_checkpoint(tmp_path / f"{m}")["model"]
    for name, t in runs[4].items():
        torch.testing.assert_close(runs[micro][name], t, atol=1e-9, rtol=1e-7)


def test_val_loss_does_not_depend_on_the_micro_batch(dataset, tmp_path):
    losses = []
    for micro in (1, 3, 4):
        assert run(train.main, *argv(dataset, tmp_path / f"{micro}", "--max_iters=0", f"--micro_batch_size={micro}"))[0] == 0
        losses.append(read_log(tmp_path / f"{micro}" / "log.jsonl")[1]["val_loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_learning_rate_warms_up_from_above_zero_and_ends_at_a_tenth():
    cfg = train.Config(max_iters=600, learning_rate=1.0)
    rates = [train.learning_rate(cfg, step) for step in range(600)]
    assert rates[:2] == [0.5, 1.0] and rates[-1] == pytest.approx(0.1) and max(rates) == 1.0
    assert all(a >= b for a, b in zip(rates[2:], rates[3:]))
    middle = 2 + (599 - 2) / 2
    assert train.learning_rate(cfg, middle) == pytest.approx(0.55)


def test_only_matrices_and_embeddings_decay_and_what_is_inserted_has_a_rate_of_its_own(chain):
    model = load_model(load_checkpoint(chain["cocomix"]))
    groups = train.make_optimizer(model, train.Config(concept_lr_scale=3), torch.device("cpu")).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    of = lambda **wanted: {names[id(p)] for g in groups if all(g[k] == v for k, v in wanted.items()) for p in g["params"]}
    assert {"wte.weight", "wpe.weight", "inserted.compress", "inserted.predict.weight"} <= of(weight_decay=0.1)
    assert of(weight_decay=0) and all("bias" in name or "ln_" in name for name in of(weight_decay=0))
    assert of(lr_scale=3) == {name for name in names.values() if name.startswith("inserted.")} and of(lr_scale=1) == set(names.values()) - of(lr_scale=3)
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert [g["weight_decay"] for g in train.make_optimizer(model, train.Config(decay_all=True), torch.device("cpu")).param_groups] == [0.1] * 4


def test_the_rate_of_what_is_inserted_is_that_of_the_rest_times_its_scale(chain, dataset, tmp_path):
    argv = [*TINY, f"--dataset={dataset}", "--method=cocomix", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}", "--max_iters=1", "--warmup_iters=0"]
    for scale in ("1", "0"):
        assert run(train.main, *argv, f"--out_dir={tmp_path / scale}", f"--concept_lr_scale={scale}")[0] == 0
    one, none = (load_checkpoint(tmp_path / scale)["model"] for scale in ("1", "0"))
    for name in one:
        assert torch.equal(one[name], none[name]) != (name.startswith("inserted.") and one[name].abs().sum() > 0), name


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_saves_and_resume_goes_on(dataset, tmp_path, number):
    """A real process, as a person would stop it."""
    command = [sys.executable, str(ROOT / "train.py"), *argv(dataset, tmp_path, "--max_iters=100000", "--eval_interval=100000", "--log_interval=1")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = tmp_path / "log.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and (not log.is_file() or len(log.read_text().splitlines()) < 8):
        time.sleep(0.1)
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} at step" in err and "--resume" in err and "Traceback" not in err
    step = load_checkpoint(tmp_path)["step"]
    assert step >= 5 and step == max(line["step"] for line in read_log(log))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see that torch is being loaded")
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_libraries_are_imported_prints_no_traceback(script, tmp_path):
    before = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, str(ROOT / script), str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before)
    deadline = time.time() + 30
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and err in ("", "stopped\n")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(dataset, tmp_path, monkeypatch):
    keep = train.step_losses
    def broken(model, *args):
        losses = keep(model, *args)
        return losses._replace(next_token=losses.next_token * math.nan) if model.training and len(calls) > 6 else losses
    calls = []
    monkeypatch.setattr(train, "step_losses", lambda *a: (calls.append(1), broken(*a))[1])
    status, _, err = run(train.main, *argv(dataset, tmp_path))
    assert status == 1 and "not finite" in err and "ckpt.pt" in err
    content = load_checkpoint(tmp_path)
    assert all(t.isfinite().all() for t in content["model"].values())


def test_max_iters_on_the_command_line_goes_over_a_configs_max_tokens():
    paper = str(ROOT / "config" / "cocomix_69m.py")
    assert train.read_config([paper]).max_iters == 38147 and train.read_config([paper, "--max_iters=100"]).max_iters == 100
    with pytest.raises(UserError, match="exclude each other"):
        train.read_config([paper, "--max_iters=100", "--max_tokens=1e6"])


# -- the commands after training --------------------------------------------------------------------

def test_eval_prints_a_table_of_what_a_plain_evaluation_gives(chain, dataset, tmp_path):
    status, out, err = run(evaluation.main, chain["ntp"], chain["cocomix"], "--device=cpu", f"--plot={tmp_path / 'c.png'}", f"--write={tmp_path / 'r.jsonl'}")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["ntp", "cocomix"] and (tmp_path / "c.png").stat().st_size > 5000
    model = load_model(load_checkpoint(chain["cocomix"]))
    teacher = concepts.of_run(load_checkpoint(chain["cocomix"]), torch.device("cpu"))
    tokens = torch.tensor(data.load_tokens(dataset, "val").astype(int))
    total, hits, n = 0.0, 0.0, 0
    with torch.no_grad():
        for i in range(0, len(tokens) - 1, 32):
            x, y = tokens[None, i:i + 32][:, :len(tokens) - 1 - i], tokens[None, i + 1:i + 33]
            total += torch.nn.functional.cross_entropy(model(x).logits[0], y[0], reduction="sum").item()
            labels, predicted = teacher.labels(x, y)[0], model(x).concepts.indices[0]
            hits += sum(len(set(a) & set(b)) / 4 for a, b in zip(labels.tolist(), predicted.tolist()))
            n += y.numel()
    assert n == len(tokens) - 1 == rows[1]["val_tokens"]
    assert rows[1]["loss"] == pytest.approx(total / n, abs=1e-5) and rows[1]["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)
    assert rows[1]["hit_rate"] == pytest.approx(hits / n, abs=1e-3)
    assert "hit rate" in out and "cocomix" in out and "–" in out


def test_compare_prints_the_course_of_training_from_folders_and_from_logs(chain, tmp_path):
    import shutil
    shutil.copy(Path(chain["cocomix"]) / "log.jsonl", tmp_path / "mine.jsonl")
    status, out, err = run(evaluation.main, "--compare", chain["ntp"], tmp_path / "mine.jsonl", f"--plot={tmp_path / 'c.svg'}")
    assert status == 0, err
    lines = out.splitlines()
    val = [line["val_loss"] for line in read_log(tmp_path / "mine.jsonl") if line.get("step") and "val_loss" in line]
    assert lines[2].startswith("| ntp | 1 |") and lines[3].startswith(f"| mine | 1 | {val[0]:.3f} | {val[1]:.3f} |")
    assert (tmp_path / "c.svg").is_file()
    assert "--compare needs runs" in run(evaluation.main, "--compare")[2]
