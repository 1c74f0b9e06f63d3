"""At the paper's scale: compiled, within memory, in many processes. On the CPU, and with `cuda` where there is a GPU."""
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import data
import train
from concepts import ConceptModel
from config import read_log
from conftest import TINY, run, tiny_gpt
from model import GPT, ModelConfig, load_checkpoint
from sae import SAE

ROOT = Path(train.__file__).resolve().parent
VARIANTS = [("none", "interleave"), ("pause", "interleave"), ("concept", "interleave"), ("concept", "add"), ("concept", "none"), ("hidden", "interleave")]
torch_compile = torch.compile


def guided(chain, method, *more):
    return [f"--method={method}", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}", *more]


# -- torch.compile --------------------------------------------------------------------------------------

METHODS = {"cocomix": [], "ntp": [], "kd": [], "pause_kd": [], "cocomix_kd": [], "cocomix, eq. 1": ["--attribution=paper"], "cocomix, activation": ["--select=activation"],
           "cocomix, predicted only": ["--mix=none"], "cocomix, hidden": ["--target=cos", "--checkpoint_blocks"], "cocomix, not learned": ["--concept_weight=0"], "cocomix, without effect": ["--mix=none", "--concept_weight=0"],
           "cocomix, dropout": ["--dropout=0.1", "--checkpoint_blocks"]}


def graphs_at_each_line(monkeypatch, argv, **compile_with):
    """A compiled run's [(line of the log, graphs that torch.compile has made by then)]; a graph break is an error."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    seen = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch_compile, fullgraph=True, **compile_with))

    class Counting(train.config.Log):
        def write(self, values):
            seen.append((values, counters["stats"]["unique_graphs"]))
            super().write(values)
    monkeypatch.setattr(train.config, "Log", Counting)
    status, _, err = run(train.main, *argv, "--compile")
    assert status == 0, err
    return seen


def check_that_all_is_compiled_once(seen):
    first = next(i for i, (line, _) in enumerate(seen) if "loss" in line)
    assert first == 2 and "val_loss" in seen[1][0] and sum("val_loss" in line for line, _ in seen) == 5
    counts = [count for _, count in seen]
    assert counts[first] >= 2 and set(counts[first:]) == {counts[first]}, counts


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_no_graph_break_and_nothing_is_compiled_after_the_first_evaluation_and_step(name, chain, dataset, tmp_path, monkeypatch):
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--eval_interval=2", "--micro_batch_size=2", "--dtype=bfloat16", *guided(chain, name.split(",")[0], *METHODS[name])]
    check_that_all_is_compiled_once(graphs_at_each_line(monkeypatch, argv, backend="eager"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what torch.compile warns of is not ours
@pytest.mark.parametrize("name", ["cocomix", "cocomix_kd", "cocomix, eq. 1"])
def test_a_compiled_run_learns_as_the_plain_one(name, chain, dataset, tmp_path, monkeypatch):
    argv = [*TINY, f"--dataset={dataset}", "--micro_batch_size=2", *guided(chain, name.split(",")[0], *METHODS[name])]
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'plain'}")[0] == 0
    graphs_at_each_line(monkeypatch, [*argv, f"--out_dir={tmp_path / 'compiled'}"])
    check_same_course(tmp_path / "plain", tmp_path / "compiled", 1e-3)


def check_same_course(a, b, tolerance):
    """Two runs' logs have the same lines, their losses within the (relative) tolerance."""
    a, b = (read_log(folder / "log.jsonl") for folder in (a, b))
    assert len(a) == len(b) > 6
    for line, other in zip(a, b):
        assert line.keys() == other.keys()
        for name in {"loss", "concept_loss", "kl", "val_loss", "val_concept_loss", "grad_norm"} & line.keys():
            assert other[name] == pytest.approx(line[name], rel=tolerance), (name, line["step"])


@pytest.mark.slow
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="older torch can't compile for tensors without memory")
@pytest.mark.filterwarnings("default")
def test_at_gpt2s_size_the_graph_stays_small_and_no_logits_are_kept_for_the_backward(monkeypatch):
    """Traced with tensors that have no memory, in the chunks that a GPU gets."""
    import model as model_module
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._subclasses import FakeTensorMode
    monkeypatch.setattr(model_module, "chunk_rows", lambda device, width: (1 << 28) // width)
    made = []
    def keep(graph, _):
        made.append(graph.graph)
        return graph
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(ModelConfig(n_layer=3, n_head=12, n_embd=768, insert="concept", insert_layer=1, n_concepts=32768))
        x, labels = torch.randint(50257, (32, 1024)), torch.randint(32768, (32, 1024, 4))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(x, x, labels)
        (out.loss + out.concept_loss).backward()
    forward, backward = made
    assert len(forward.nodes) < 1500 and len(backward.nodes) < 1500
    kept = [n.meta["val"] for n in forward.output_node().args[0] if getattr(n, "op", "placeholder") != "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    assert not [t.shape for t in kept if t.dim() > 1 and t.shape[-1] in (50257, 50304) or t.dim() > 1 and t.shape[-1] == 32768]
    size, estimate = sum(t.numel() * t.element_size() for t in kept), model.activation_bytes(x.numel())
    assert 0.4 * estimate < size < estimate


# -- memory -----------------------------------------------------------------------------------------------

def kept_for_the_backward(model, rows, bf16):
    """Bytes of the tensors that autograd keeps, weights left out."""
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []
    def pack(t):
        if t.untyped_storage().data_ptr() not in storages:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t
    idx, labels = torch.randint(64, (rows, 128)), torch.randint(64, (rows, 128, 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        model(idx, idx, labels if model.config.insert == "concept" else None)
    return sum(kept.values())


@pytest.mark.parametrize("insert, mix", [("none", "interleave"), ("concept", "interleave"), ("concept", "add")])
@pytest.mark.parametrize("bf16", [True, False])
def test_activations_fit_their_estimate(insert, mix, bf16):
    model = GPT(ModelConfig(block_size=128, vocab_size=64, n_layer=10, n_head=4, n_embd=128, insert=insert, mix=mix, insert_layer=1, n_concepts=64, concept_k=8))
    grow = lambda f: f(6) - f(2)  # copies of weights are in both
    kept, estimate = grow(lambda rows: kept_for_the_backward(model, rows, bf16)), grow(lambda rows: model.activation_bytes(rows * 128, bf16=bf16))
    assert 0.75 * estimate < kept < estimate
    model.checkpoint_blocks = True
    checkpointed = grow(lambda rows: kept_for_the_backward(model, rows, bf16))
    assert checkpointed < kept / 3 and checkpointed < grow(lambda rows: model.activation_bytes(rows * 128, bf16=bf16)) < 0.6 * estimate


@pytest.mark.parametrize("insert", ["none", "concept"])
def test_the_largest_model_fits_80_gb(insert):
    with torch.device("meta"):
        gpt2, sae = GPT(ModelConfig()).requires_grad_(False), SAE(768, 32768, 32)
        model = GPT(ModelConfig(n_layer=24, n_head=16, n_embd=2048 if insert == "concept" else 2096, insert=insert, insert_layer=5, n_concepts=32768 if insert == "concept" else 0))
    teacher = ConceptModel(gpt2, sae, 5, teaches=True)
    weights = 4 * sum(p.numel() for m in (model, gpt2, sae) for p in m.parameters())
    gigabytes = lambda rows: (weights + train.step_bytes(model, teacher, rows * 1024)) / 1e9
    assert 1.3e9 < model.num_params(active=True) < 1.6e9
    assert gigabytes(4) < 72 < gigabytes(32)  # nine tenths of 80
    model.checkpoint_blocks = True
    assert gigabytes(16) < 72


def test_micro_batches_are_alike_and_follow_memory(monkeypatch):
    model, cpu, gpu = tiny_gpt(torch.float32, insert="concept"), torch.device("cpu"), torch.device("cuda", 0)
    size = lambda rows, device, **keys: train.micro_batch(train.Config(block_size=1024, **keys), rows, model, None, device)
    assert [size(12, cpu, micro_batch_size=n) for n in (1, 3, 5, 7, 99)] == [1, 3, 4, 6, 12]
    assert (size(12, cpu), size(20, cpu), size(7, cpu), size(11, cpu)) == (6, 5, 7, 1)
    need = lambda rows: train.step_bytes(model, None, rows * 1024)
    for free, expected in ((need(12) / 0.9 + 1, 12), (need(12) / 0.9 - 1, 6), (need(5) / 0.9 + 1, 4), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
        assert size(12, gpu) == expected
    assert size(12, gpu, micro_batch_size=3) == 3
    teacher = ConceptModel(tiny_gpt(torch.float32, n_layer=40, n_embd=240), SAE(240, 40, 6), 1)
    assert train.step_bytes(model, teacher, 1024) > need(1)  # a large concept model for a small student


def test_out_of_memory_names_the_micro_batch(dataset, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
    monkeypatch.setattr(train, "step_losses", full)
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    assert status == 1 and [line for line in err.replace("\r", "\n").splitlines() if "error" in line] == [
        "error: out of memory: a smaller --micro_batch_size (or --batch_size) needs less (CUDA out of memory. Tried to allocate 2.00 GiB.)"]


def gradients(model, forward, hidden=False):
    torch.manual_seed(3)
    idx, targets = torch.randint(61, (2, 12)), torch.randint(61, (2, 12))
    labels = {"concept": torch.randint(40, (2, 12, 4)), "hidden": torch.randn(2, 12, 24, dtype=torch.float64)}.get(model.config.insert)
    model.zero_grad()
    device = model.wte.weight.device
    out = forward(*(None if t is None else t.to(device) for t in (idx, targets, labels)))
    (out.loss if out.concept_loss is None else out.loss + 0.3 * out.concept_loss).backward()
    return [out.loss.detach().cpu()] + [p.grad.cpu() for p in model.parameters()]


@pytest.mark.parametrize("insert, mix", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_have_the_same_gradients(insert, mix, dropout):
    model = tiny_gpt(insert=insert, mix=mix, dropout=dropout, hidden_size=24)
    plain = gradients(model, model)
    model.checkpoint_blocks = True
    for a, b in zip(plain, gradients(model, model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


# -- many processes -----------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_default_dtype(torch.float64)
import config, train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
rank, meetings = int(os.environ["RANK"]), []

class Counting(train.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda group, bucket: (meetings.append(1), allreduce_hook(group, bucket))[1])
train.DistributedDataParallel = Counting
"""


def torchrun(processes, script, *argv):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script), *map(str, argv)]


def spread(tmp_path, processes, argv, code=""):
    """train.py in float64 in so many processes; code: what else its script does before. (status, stderr)"""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)) + code + "\nconfig.run(train.main)\n")
    done = subprocess.run(torchrun(processes, script, *argv), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def alone(argv):
    torch.set_default_dtype(torch.float64)
    try:
        status, _, err = run(train.main, *argv)
        assert status == 0, err
    finally:
        torch.set_default_dtype(torch.float32)


def check_same_run(a, b):
    """Two float64 runs: the same losses, weights and Adam's moments (the gradients' running means)."""
    check_same_course(a, b, 1e-6)  # a log holds seven digits
    a, b = (load_checkpoint(folder) for folder in (a, b))
    assert a["step"] == b["step"] == 5
    for name, t in a["model"].items():
        torch.testing.assert_close(b["model"][name], t, atol=1e-5, rtol=1e-5)
    for i, state in a["optimizer"]["state"].items():
        for name, t in state.items():
            torch.testing.assert_close(b["optimizer"]["state"][i][name], t, atol=1e-9, rtol=1e-5)


FIVE = [*TINY, "--batch_size=8", "--max_iters=5", "--eval_interval=2"]
COUNT = "import atexit; atexit.register(lambda: open(f'{os.environ[\"COUNT\"]}.{rank}', 'w').write(str(len(meetings))))"


def test_two_processes_equal_one_and_their_gradients_meet_once_a_step(chain, dataset, tmp_path, monkeypatch):
    argv = [*FIVE, f"--dataset={dataset}", *guided(chain, "cocomix")]
    alone([*argv, f"--out_dir={tmp_path / 'one'}", "--micro_batch_size=8"])
    for name in ("ckpt.pt", "step_1.pt", "eval.jsonl"):  # of a run that is written over
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).touch()
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    status, err = spread(tmp_path, 2, [*argv, f"--out_dir={tmp_path / 'two'}", "--micro_batch_size=1", "--overwrite"], COUNT)
    assert status == 0, err
    check_same_run(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two" / "step_1.pt").exists() and not (tmp_path / "two" / "eval.jsonl").exists()
    assert [(tmp_path / f"count.{rank}").read_text() for rank in (0, 1)] == ["5", "5"]  # 4 micro batches a step
    assert err.count("cocomix: 100%") <= 2 and read_log(tmp_path / "two" / "log.jsonl")[0]["processes"] == 2


CRASH = """
class Crashing(config.Log):
    def write(self, values):
        super().write(values)
        if values["step"] == 3 and "loss" in values:
            raise KeyboardInterrupt
config.Log = Crashing
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, processes, then", [("ntp", 4, 1), ("cocomix_kd", 2, 4), ("cocomix, hidden", 4, 2), ("pause_kd", 1, 2), ("cocomix, without effect", 2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(name, processes, then, chain, dataset, tmp_path):
    argv = [*FIVE, f"--dataset={dataset}", *guided(chain, name.split(",")[0], *METHODS[name])]
    alone([*argv, f"--out_dir={tmp_path / 'one'}"])
    argv += [f"--out_dir={tmp_path / 'many'}", "--micro_batch_size=1"]
    assert spread(tmp_path, processes, argv, CRASH)[0] != 0
    assert load_checkpoint(tmp_path / "many")["step"] == 2
    status, err = spread(tmp_path, then, [*argv, "--resume"])
    assert status == 0, err
    check_same_run(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_two_compiled_processes_equal_one(chain, dataset, tmp_path):
    """Buckets so small that DDP has several: its own compiler, which would split the graph there, is off."""
    argv = [*FIVE, f"--dataset={dataset}", *guided(chain, "cocomix")]
    alone([*argv, f"--out_dir={tmp_path / 'one'}"])
    code = """
import functools
torch.compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
train.DistributedDataParallel = functools.partial(Counting, bucket_cap_mb=0.01)
"""
    status, err = spread(tmp_path, 2, [*argv, f"--out_dir={tmp_path / 'two'}", "--compile", "--micro_batch_size=2"], code)
    assert status == 0, err
    check_same_run(tmp_path / "one", tmp_path / "two")


def lines_with(text, err):
    return [line for line in err.replace("\r", "\n").splitlines() if text in line]


@pytest.mark.slow
def test_what_fails_in_every_process_is_said_once(dataset, tmp_path):
    done = subprocess.run(torchrun(2, ROOT / "train.py", *TINY, "--dataset=nowhere"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and len(lines_with("error: ", done.stderr)) == 1 and "no dataset 'nowhere'" in done.stderr and done.stdout == ""
    done = subprocess.run(torchrun(2, ROOT / "train.py", *TINY, f"--dataset={dataset}", "--batch_size=3"), capture_output=True, text=True, timeout=120)
    assert len(lines_with("error: batch_size=3 does not divide by the 2 processes", done.stderr)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_one_process_that_fails_ends_all_with_its_message(who, dataset, tmp_path):
    code = f"""
keep, calls = train.step_losses, []
def fails(*args):
    calls.append(1)
    if rank == {who} and len(calls) > 6:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return keep(*args)
train.step_losses = fails
"""
    start = time.time()
    status, err = spread(tmp_path, 2, [*FIVE, f"--dataset={dataset}", f"--out_dir={tmp_path / 'run'}"], code)
    assert status != 0 and time.time() - start < 120
    assert lines_with("error: ", err) == ["error: out of memory: a smaller --micro_batch_size (or --batch_size) needs less (CUDA out of memory. Tried to allocate 2.00 GiB.)"]
    assert "train.py" not in err.replace("script.py", "")  # no traceback of ours


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM to torchrun", "SIGTERM to one"])
def test_a_signal_stops_all_processes_at_one_step_and_resume_goes_on(how, dataset, tmp_path):
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=100000", "--eval_interval=100000", "--log_interval=5"]
    process = subprocess.Popen(torchrun(2, ROOT / "train.py", *argv), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    log, deadline = tmp_path / "log.jsonl", time.time() + 90
    while time.time() < deadline and (not log.is_file() or len(log.read_text().splitlines()) < 5):
        time.sleep(0.1)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun then passes it on again
    elif how == "SIGTERM to torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        last = [pid for pid in children if b"--out_dir" in Path(f"/proc/{pid}/cmdline").read_bytes()][-1]
        os.kill(last, signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    step = load_checkpoint(tmp_path)["step"]
    said, = lines_with("stopped by", err)
    assert f"at step {step}; saved in {tmp_path / 'ckpt.pt'}; --resume goes on" in said
    assert step == max(line["step"] for line in read_log(log)) >= 15 and not list(tmp_path.glob("*.tmp"))


def test_dropout_depends_on_seed_step_and_process_alone():
    seeds = [data.mixed_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(8)]
    assert len(set(seeds)) == len(seeds) and seeds[0] == data.mixed_seed(0, 0, 0)


# -- Weights & Biases ---------------------------------------------------------------------------------------

def test_wandb_gets_the_lines_of_the_log(dataset, tmp_path, monkeypatch):
    began, lines = [], []
    fake = types.SimpleNamespace(init=lambda **keys: began.append(keys), log=lambda values, step: lines.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    assert run(train.main, *argv, "--max_iters=0")[0] == 0 and not began  # off unless asked for
    assert run(train.main, *argv, "--overwrite", "--wandb_log", "--wandb_project=p")[0] == 0
    (keys,), log = began, read_log(tmp_path / "log.jsonl")
    assert keys["project"] == "p" and keys["name"] == str(tmp_path) and keys["config"]["n_layer"] == 3
    assert [step for step, _ in lines] == [line["step"] for line in log]
    assert [json.loads(json.dumps(values)).keys() for _, values in lines] == [line.keys() for line in log]


@pytest.mark.parametrize("module, message", [(None, "pip install wandb"), (types.SimpleNamespace(init=lambda **_: 1 / 0), "wandb login")])
def test_wandb_that_is_missing_or_does_not_start_is_one_line(module, message, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--wandb_log")
    assert status == 1 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "ckpt.pt").exists()


# -- with a GPU ---------------------------------------------------------------------------------------------

cuda = pytest.mark.cuda


@cuda
@pytest.mark.parametrize("insert, mix", VARIANTS)
def test_gradients_on_the_gpu_equal_the_cpus(insert, mix):
    model = tiny_gpt(insert=insert, mix=mix, hidden_size=24)
    on_cpu = gradients(model, model)
    model.cuda()
    for checkpointed in (False, True):
        model.checkpoint_blocks = checkpointed
        for a, b in zip(on_cpu, gradients(model, model), strict=True):
            torch.testing.assert_close(b, a, atol=1e-9, rtol=1e-7)


@cuda
@pytest.mark.parametrize("choices", [dict(), dict(select="activation"), dict(attribution="paper"), dict(sign="abs")], ids=str)
def test_labels_on_the_gpu_equal_the_cpus(choices):
    gpt, sae = tiny_gpt().requires_grad_(False).eval(), SAE(24, 40, 6).double().requires_grad_(False)
    teacher, x, y = ConceptModel(gpt, sae, 1, **choices), torch.randint(61, (2, 12)), torch.randint(61, (2, 12))
    labels = teacher.labels(x, y)
    gpt.cuda(), sae.cuda()
    assert torch.equal(teacher.labels(x.cuda(), y.cuda()).cpu(), labels)


@cuda
@pytest.mark.parametrize("name", ["ntp", "kd", "cocomix", "cocomix, hidden"])
def test_a_float32_run_on_the_gpu_takes_the_cpus_course(name, chain, dataset, tmp_path, monkeypatch):
    torch.set_float32_matmul_precision("highest")  # without TF32
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    argv = [*TINY, f"--dataset={dataset}", "--dtype=float32", "--compile=false", *guided(chain, name.split(",")[0], *METHODS[name])]
    for device in ("cpu", "cuda"):
        status, _, err = run(train.main, *argv, f"--device={device}", f"--out_dir={tmp_path / device}")
        assert status == 0, err
    check_same_course(tmp_path / "cpu", tmp_path / "cuda", 2e-3)


@cuda
@pytest.mark.parametrize("name", ["ntp", "cocomix", "cocomix_kd", "cocomix, eq. 1", "cocomix, dropout"])
def test_on_the_gpu_no_graph_breaks_and_nothing_is_compiled_after_the_first_evaluation_and_step(name, chain, dataset, tmp_path, monkeypatch):
    argv = [*TINY, f"--dataset={dataset}", "--n_embd=32", "--eval_interval=2", "--micro_batch_size=2", *guided(chain, name.split(",")[0], *METHODS[name])]
    status, _, err = run(train.main, *argv, "--device=cpu", f"--out_dir={tmp_path / 'plain'}")
    assert status == 0, err
    check_that_all_is_compiled_once(graphs_at_each_line(monkeypatch, [*argv, "--device=cuda", f"--out_dir={tmp_path / 'compiled'}"]))
    if "dropout" not in name:  # bfloat16 against float32
        a, b = (read_log(tmp_path / folder / "log.jsonl")[-1]["val_loss"] for folder in ("plain", "compiled"))
        assert b == pytest.approx(a, rel=0.02)


@cuda
def test_resume_on_the_gpu_draws_the_same_dropout(dataset, tmp_path):
    argv = [*TINY, f"--dataset={dataset}", "--device=cuda", "--dtype=float32", "--compile=false", "--dropout=0.3"]
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'a'}")[0] == 0
    keep = train.step_losses
    def crashes(model, *args):
        if model.training and (calls.append(1) or len(calls) > 6):
            raise KeyboardInterrupt
        return keep(model, *args)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step_losses", crashes)
        assert run(train.main, *argv, f"--out_dir={tmp_path / 'b'}")[0] == 130
    assert load_checkpoint(tmp_path / "b")["step"] == 4
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'b'}", "--resume")[0] == 0
    check_same_course(tmp_path / "a", tmp_path / "b", 1e-3)


@cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("insert, taught", [("none", True), ("concept", False)])
def test_the_peak_of_a_step_on_the_gpu_fits_its_estimate(insert, taught, checkpointed, compiled):
    """8 blocks of width 512 at GPT-2's vocabulary, 8 × 1024 tokens; the peak may take the tenth that auto leaves free, too."""
    torch._dynamo.reset()
    device, cfg = torch.device("cuda", 0), train.Config()
    gpt = GPT(ModelConfig(n_layer=2, n_head=8, n_embd=512)).to(device).eval().requires_grad_(False)
    sae = SAE(512, 32768, 32).to(device).requires_grad_(False)
    teacher = ConceptModel(gpt, sae, 0, target=insert, teaches=taught, bf16=True, compile=compiled)
    model = GPT(ModelConfig(n_layer=8, n_head=8, n_embd=512, insert=insert, insert_layer=3, n_concepts=32768 if insert == "concept" else 0)).to(device)
    model.checkpoint_blocks = checkpointed
    forward = train.compile_model(model) if compiled else model
    optimizer = train.make_optimizer(model, cfg, device)
    x = torch.randint(50257, (8, 1024), device=device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(2):  # the second with the optimizer's state
        guidance = teacher.guide(x, x)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses = train.step_losses(forward, cfg, x, x, guidance)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del guidance, losses
        peak = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
    estimate = train.step_bytes(model, teacher, x.numel())
    print(f"peak {peak / 1e9:.2f} GB, estimate {estimate / 1e9:.2f} GB")
    assert 0.15 * estimate < peak < estimate / 0.9


@cuda
def test_batches_reach_the_gpu_whole_and_by_themselves(dataset):
    batches = data.Batches(data.load_tokens(dataset, "train"), 32, 4, 257)
    for step, (x, y, _) in enumerate(batches.prefetch(0, 5, torch.device("cuda", 0))):
        expected = batches[step]
        assert all(t.is_contiguous() for t in expected)
        torch.cuda.synchronize()
        assert torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])
