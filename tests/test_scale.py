"""At scale: compiled, within memory, in many processes; on the CPU, and on a GPU where there is
one (marked cuda)."""
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
from conftest import TINY, run, tiny_gpt

import train
from concepts import ConceptModel
from model import GPT, ModelConfig
from sae import SAE
from support import kernels, training
from support.accounting import activation_bytes, step_bytes
from support.checkpoint import load_checkpoint
from support.device import compile_model
from support.files import mixed_seed
from support.log import read_log
from support.tokens import Batches, load_tokens

ROOT = Path(train.__file__).resolve().parent
VARIANTS = [("none", "interleave"), ("pause", "interleave"), ("concept", "interleave"),
            ("concept", "add"), ("concept", "none"), ("hidden", "interleave")]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
REPORTED = ("error: out of memory: a smaller --batch_size (train.py: --micro_batch_size) needs "
            f"less ({OUT_OF_MEMORY})")
torch_compile = torch.compile

def teacher_keys(chain, method, *more):
    return [f"--method={method}", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}", *more]

# -- torch.compile ---------------------------------------------------------------------------------

METHODS = {
    "cocomix": [], "ntp": [], "kd": [], "pause_kd": [], "cocomix_kd": [],
    "cocomix, eq. 1": ["--attribution=paper"], "cocomix, activation": ["--select=activation"],
    "cocomix, predicted only": ["--mix=none"],
    "cocomix, hidden": ["--target=cos", "--checkpoint_blocks"],
    "cocomix, not learned": ["--concept_weight=0"],
    "cocomix, without effect": ["--mix=none", "--concept_weight=0"],
    "cocomix, dropout": ["--dropout=0.1", "--checkpoint_blocks"]}

def method_keys(chain, name):
    return teacher_keys(chain, name.split(",")[0], *METHODS[name])

def graphs_at_each_line(monkeypatch, argv, **compile_with):
    """[(line of the log, graphs compiled by then)] of a compiled run; a graph break is an error."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    seen, compile_whole = [], functools.partial(torch_compile, fullgraph=True, **compile_with)
    monkeypatch.setattr(torch, "compile", compile_whole)

    class CountingLog(training.Log):
        def write(self, values):
            seen.append((values, counters["stats"]["unique_graphs"]))
            super().write(values)
    monkeypatch.setattr(training, "Log", CountingLog)
    status, _, err = run(train.main, *argv, "--compile")
    assert status == 0, err
    return seen

def check_that_all_is_compiled_once(seen):
    first = next(i for i, (line, _) in enumerate(seen) if "loss" in line)
    assert first == 2 and "val_loss" in seen[1][0]
    assert sum("val_loss" in line for line, _ in seen) == 5
    counts = [count for _, count in seen]
    assert counts[first] >= 2 and set(counts[first:]) == {counts[first]}, counts

@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_graph_break_and_no_compilation_after_the_first_evaluation_and_step(
        name, chain, dataset, tmp_path, monkeypatch):
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--eval_interval=2",
            "--micro_batch_size=2", "--dtype=bfloat16", *method_keys(chain, name)]
    check_that_all_is_compiled_once(graphs_at_each_line(monkeypatch, argv, backend="eager"))

@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile's warnings are not ours
@pytest.mark.parametrize("name", ["cocomix", "cocomix_kd", "cocomix, eq. 1"])
def test_a_compiled_run_learns_as_the_plain_one(name, chain, dataset, tmp_path, monkeypatch):
    argv = [*TINY, f"--dataset={dataset}", "--micro_batch_size=2", *method_keys(chain, name)]
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'plain'}")[0] == 0
    graphs_at_each_line(monkeypatch, [*argv, f"--out_dir={tmp_path / 'compiled'}"])
    check_same_curve(tmp_path / "plain", tmp_path / "compiled", 1e-3)

def check_same_curve(a, b, tolerance):
    """Two runs' logs have the same lines, their losses within the (relative) tolerance."""
    losses = {"loss", "concept_loss", "kl", "val_loss", "val_concept_loss", "grad_norm"}
    a, b = (read_log(folder / "log.jsonl") for folder in (a, b))
    assert len(a) == len(b) > 6
    for line, other in zip(a, b, strict=True):
        assert line.keys() == other.keys()
        for name in losses & line.keys():
            expected = pytest.approx(line[name], rel=tolerance)
            assert other[name] == expected, (name, line["step"])

@pytest.mark.slow
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
                    reason="older torch cannot compile for tensors without memory")
@pytest.mark.filterwarnings("default")
def test_at_gpt2s_size_the_graph_stays_small_and_no_logits_are_kept(monkeypatch):
    """Traced with tensors that have no memory, in the chunks that a GPU gets."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._subclasses import FakeTensorMode
    monkeypatch.setattr(kernels, "chunk_rows", lambda device, width: (1 << 28) // width)
    graphs = []

    def keep(graph, _):
        graphs.append(graph.graph)
        return graph
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep,
                           partition_fn=min_cut_rematerialization_partition)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(ModelConfig(n_layer=3, n_head=12, n_embd=768, insert="concept", insert_layer=1,
                                n_concepts=32768))
        x, labels = torch.randint(50257, (32, 1024)), torch.randint(32768, (32, 1024, 4))
        compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = compiled(x, x, labels)
        (out.loss + out.concept_loss).backward()
    forward, backward = graphs
    assert len(forward.nodes) < 1500 and len(backward.nodes) < 1500
    kept = [node.meta["val"] for node in forward.output_node().args[0]
            if getattr(node, "op", "placeholder") != "placeholder"
            and isinstance(node.meta.get("val"), torch.Tensor)]
    widths = {t.shape[-1] for t in kept if t.dim() > 1 and t.numel() > t.shape[-1]}
    assert not widths & {50257, 50304, 32768}
    size, estimate = sum(t.nbytes for t in kept), activation_bytes(model, x.numel())
    assert 0.4 * estimate < size < estimate

# -- memory ----------------------------------------------------------------------------------------

def error_lines(err):
    return [line for line in err.replace("\r", "\n").splitlines() if "error" in line]

def test_out_of_memory_names_the_micro_batch(dataset, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY}\nGPU 0 has …")
    monkeypatch.setattr(train, "step_losses", full)
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    assert status == 1 and error_lines(err) == [REPORTED]

def gradients(model):
    torch.manual_seed(3)
    idx, targets = torch.randint(61, (2, 12)), torch.randint(61, (2, 12))
    labels = {"concept": torch.randint(40, (2, 12, 4)),
              "hidden": torch.randn(2, 12, 24, dtype=torch.float64)}.get(model.config.insert)
    model.zero_grad()
    device = model.wte.weight.device
    out = model(idx.to(device), targets.to(device), None if labels is None else labels.to(device))
    (out.loss if out.concept_loss is None else out.loss + 0.3 * out.concept_loss).backward()
    return [out.loss.detach().cpu()] + [p.grad.cpu() for p in model.parameters()]

@pytest.mark.parametrize("insert, mix", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_have_the_same_gradients(insert, mix, dropout):
    model = tiny_gpt(insert=insert, mix=mix, dropout=dropout, hidden_size=24)
    plain = gradients(model)
    model.checkpoint_blocks = True
    for a, b in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)

# -- many processes --------------------------------------------------------------------------------

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_default_dtype(torch.float64)
import train
from support import distributed, runtime, training
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
rank, meetings = int(os.environ["RANK"]), []

def counted(group, bucket):
    meetings.append(1)
    return allreduce_hook(group, bucket)

class Counting(distributed.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, counted)
distributed.DistributedDataParallel = Counting
{code}
runtime.run(train.main, parallel=True)
"""

def torchrun(processes, script, *argv):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}", str(script), *map(str, argv)]

def in_processes(tmp_path, processes, argv, code=""):
    """(status, stderr) of train.py in float64 in several processes, after the given code."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), code=code))
    done = subprocess.run(torchrun(processes, script, *argv), capture_output=True, text=True,
                          timeout=300)
    return done.returncode, done.stderr

def alone(argv):
    torch.set_default_dtype(torch.float64)
    try:
        status, _, err = run(train.main, *argv)
        assert status == 0, err
    finally:
        torch.set_default_dtype(torch.float32)

def check_same_run(a, b):
    """Two float64 runs: the same losses, weights and Adam's moments (means of the gradients)."""
    check_same_curve(a, b, 1e-6)  # a log holds seven digits
    a, b = (load_checkpoint(folder) for folder in (a, b))
    assert a["step"] == b["step"] == 5
    for name, t in a["model"].items():
        torch.testing.assert_close(b["model"][name], t, atol=1e-5, rtol=1e-5)
    for i, state in a["optimizer"]["state"].items():
        for name, t in state.items():
            other = b["optimizer"]["state"][i][name]
            torch.testing.assert_close(other, t, atol=1e-9, rtol=1e-5)

FIVE = [*TINY, "--batch_size=8", "--max_iters=5", "--eval_interval=2"]
COUNT = """
import atexit
def report():
    with open(os.environ["COUNT"] + f".{rank}", "w") as file:
        file.write(str(len(meetings)))
atexit.register(report)
"""

def test_two_processes_equal_one_and_exchange_gradients_once_a_step(chain, dataset, tmp_path,
                                                                    monkeypatch):
    argv = [*FIVE, f"--dataset={dataset}", *teacher_keys(chain, "cocomix")]
    one, two = tmp_path / "one", tmp_path / "two"
    alone([*argv, f"--out_dir={one}", "--micro_batch_size=8"])
    two.mkdir()
    for name in ("ckpt.pt", "step_1.pt", "eval.jsonl"):  # of a run that is replaced
        (two / name).touch()
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    argv = [*argv, f"--out_dir={two}", "--micro_batch_size=1", "--overwrite"]
    status, err = in_processes(tmp_path, 2, argv, COUNT)
    assert status == 0, err
    check_same_run(one, two)
    assert not (two / "step_1.pt").exists() and not (two / "eval.jsonl").exists()
    counts = [(tmp_path / f"count.{rank}").read_text() for rank in (0, 1)]
    assert counts == ["5", "5"]  # 4 micro batches a step
    assert err.count("cocomix: 100%") <= 2
    assert read_log(two / "log.jsonl")[0]["processes"] == 2

CRASH = """
class Crashing(training.Log):
    def write(self, values):
        super().write(values)
        if values["step"] == 3 and "loss" in values:
            raise KeyboardInterrupt
training.Log = Crashing
"""

@pytest.mark.slow
@pytest.mark.parametrize("name, processes, then", [
    ("ntp", 4, 1), ("cocomix_kd", 2, 4), ("cocomix, hidden", 4, 2), ("pause_kd", 1, 2),
    ("cocomix, without effect", 2, 2)])
def test_a_run_resumes_with_another_number_of_processes(name, processes, then, chain, dataset,
                                                        tmp_path):
    argv = [*FIVE, f"--dataset={dataset}", *method_keys(chain, name)]
    alone([*argv, f"--out_dir={tmp_path / 'one'}"])
    argv += [f"--out_dir={tmp_path / 'many'}", "--micro_batch_size=1"]
    assert in_processes(tmp_path, processes, argv, CRASH)[0] != 0
    assert load_checkpoint(tmp_path / "many")["step"] == 2
    status, err = in_processes(tmp_path, then, [*argv, "--resume"])
    assert status == 0, err
    check_same_run(tmp_path / "one", tmp_path / "many")

SMALL_BUCKETS = """
import functools
torch.compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
distributed.DistributedDataParallel = functools.partial(Counting, bucket_cap_mb=0.01)
"""

@pytest.mark.slow
def test_two_compiled_processes_equal_one(chain, dataset, tmp_path):
    """With several of DDP's buckets: its own compiler, which splits the graph there, is off."""
    argv = [*FIVE, f"--dataset={dataset}", *teacher_keys(chain, "cocomix")]
    alone([*argv, f"--out_dir={tmp_path / 'one'}"])
    argv += [f"--out_dir={tmp_path / 'two'}", "--compile", "--micro_batch_size=2"]
    status, err = in_processes(tmp_path, 2, argv, SMALL_BUCKETS)
    assert status == 0, err
    check_same_run(tmp_path / "one", tmp_path / "two")

@pytest.mark.slow
@pytest.mark.parametrize("key, message", [
    ("--dataset=nowhere", "no dataset 'nowhere'"),
    ("--batch_size=3", "batch_size=3 is not divisible by the 2 processes")])
def test_an_error_of_all_processes_is_printed_once(key, message, dataset):
    command = torchrun(2, ROOT / "train.py", *TINY, f"--dataset={dataset}", key)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stdout == ""
    line, = [line for line in error_lines(done.stderr) if line.startswith("error: ")]
    assert message in line

FAILING = """
keep, calls = train.step_losses, []
def fails(*args):
    calls.append(1)
    if rank == {rank} and len(calls) > 6:
        raise torch.OutOfMemoryError({message!r})
    return keep(*args)
train.step_losses = fails
"""

@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_fails_ends_all_with_its_message(rank, dataset, tmp_path):
    start, argv = time.time(), [*FIVE, f"--dataset={dataset}", f"--out_dir={tmp_path / 'run'}"]
    code = FAILING.format(rank=rank, message=OUT_OF_MEMORY)
    status, err = in_processes(tmp_path, 2, argv, code)
    assert status != 0 and time.time() - start < 120
    assert [line for line in error_lines(err) if "error: " in line] == [REPORTED]
    assert "train.py" not in err.replace("script.py", "")  # no traceback of ours

@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM to torchrun", "SIGTERM to one"])
def test_a_signal_stops_all_processes_at_one_step(how, dataset, tmp_path):
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=100000",
            "--eval_interval=100000", "--log_interval=5"]
    process = subprocess.Popen(torchrun(2, ROOT / "train.py", *argv), stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    log, deadline = tmp_path / "log.jsonl", time.time() + 90
    while time.time() < deadline and not (log.is_file() and log.read_text().count("\n") >= 5):
        time.sleep(0.1)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun also passes it on
    elif how == "SIGTERM to torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
        ours = [int(pid) for pid, command in zip(children, commands, strict=True)
                if b"--out_dir" in command]
        os.kill(ours[-1], signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    step = load_checkpoint(tmp_path)["step"]
    line, = [line for line in err.replace("\r", "\n").splitlines() if "stopped by" in line]
    assert f"at step {step}; saved" in line and str(tmp_path / "ckpt.pt") in line
    assert "--resume" in line
    assert step == max(line["step"] for line in read_log(log)) >= 15
    assert not list(tmp_path.glob("*.tmp"))

def test_dropout_depends_only_on_seed_step_and_process():
    seeds = [mixed_seed(seed, step, rank)
             for seed in range(3) for step in range(20) for rank in range(8)]
    assert len(set(seeds)) == len(seeds) and seeds[0] == mixed_seed(0, 0, 0)

# -- Weights & Biases ------------------------------------------------------------------------------

def test_wandb_gets_the_lines_of_the_log(dataset, tmp_path, monkeypatch):
    inits, lines = [], []

    def init(**keys):
        inits.append(keys)
        return types.SimpleNamespace(id="a")
    fake = types.SimpleNamespace(init=init,
                                 log=lambda values, step: lines.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    assert run(train.main, *argv, "--max_iters=0")[0] == 0 and not inits  # off by default
    argv += ["--overwrite", "--wandb_log", "--wandb_project=p"]
    assert run(train.main, *argv)[0] == 0
    (keys,), log = inits, read_log(tmp_path / "log.jsonl")
    assert keys["project"] == "p" and keys["name"] == str(tmp_path)
    assert keys["config"]["n_layer"] == 3
    assert [step for step, _ in lines] == [line["step"] for line in log]
    logged = [json.loads(json.dumps(values)).keys() for _, values in lines]
    assert logged == [line.keys() for line in log]

@pytest.mark.parametrize("module, message", [
    (None, "pip install wandb"), (types.SimpleNamespace(init=lambda **_: 1 / 0), "wandb login")])
def test_a_wandb_that_is_missing_or_does_not_start_is_one_line(module, message, dataset, tmp_path,
                                                               monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--wandb_log"]
    status, _, err = run(train.main, *argv)
    assert status == 1 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "ckpt.pt").exists()

# -- with a GPU ------------------------------------------------------------------------------------

cuda = pytest.mark.cuda

@cuda
@pytest.mark.parametrize("insert, mix", VARIANTS)
def test_gradients_on_the_gpu_equal_the_cpus(insert, mix):
    model = tiny_gpt(insert=insert, mix=mix, hidden_size=24)
    on_cpu = gradients(model)
    model.cuda()
    for checkpointed in (False, True):
        model.checkpoint_blocks = checkpointed
        for a, b in zip(on_cpu, gradients(model), strict=True):
            torch.testing.assert_close(b, a, atol=1e-9, rtol=1e-7)

@cuda
@pytest.mark.parametrize("choices", [dict(), dict(select="activation"), dict(attribution="paper"),
                                     dict(sign="abs")], ids=str)
def test_labels_on_the_gpu_equal_the_cpus(choices):
    gpt = tiny_gpt().requires_grad_(False).eval()
    sae = SAE(24, 40, 6).double().requires_grad_(False)
    teacher, x, y = ConceptModel(gpt, sae, 1, **choices), *torch.randint(61, (2, 2, 12))
    labels = teacher.labels(x, y)
    gpt.cuda(), sae.cuda()
    assert torch.equal(teacher.labels(x.cuda(), y.cuda()).cpu(), labels)

@cuda
@pytest.mark.parametrize("name", ["ntp", "kd", "cocomix", "cocomix, hidden"])
def test_a_float32_run_on_the_gpu_has_the_cpus_curve(name, chain, dataset, tmp_path, monkeypatch):
    torch.set_float32_matmul_precision("highest")  # without TF32
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    argv = [*TINY, f"--dataset={dataset}", "--dtype=float32", "--compile=false",
            *method_keys(chain, name)]
    for device in ("cpu", "cuda"):
        keys = [f"--device={device}", f"--out_dir={tmp_path / device}"]
        status, _, err = run(train.main, *argv, *keys)
        assert status == 0, err
    check_same_curve(tmp_path / "cpu", tmp_path / "cuda", 2e-3)

@cuda
@pytest.mark.parametrize("name", ["ntp", "cocomix", "cocomix_kd", "cocomix, eq. 1",
                                  "cocomix, dropout"])
def test_on_the_gpu_no_graph_break_and_no_compilation_after_the_first_evaluation_and_step(
        name, chain, dataset, tmp_path, monkeypatch):
    argv = [*TINY, f"--dataset={dataset}", "--n_embd=32", "--eval_interval=2",
            "--micro_batch_size=2", *method_keys(chain, name)]
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    status, _, err = run(train.main, *argv, "--device=cpu", f"--out_dir={plain}")
    assert status == 0, err
    argv += ["--device=cuda", f"--out_dir={compiled}"]
    check_that_all_is_compiled_once(graphs_at_each_line(monkeypatch, argv))
    if "dropout" not in name:  # bfloat16 against float32
        a, b = (read_log(folder / "log.jsonl")[-1]["val_loss"] for folder in (plain, compiled))
        assert b == pytest.approx(a, rel=0.02)

@cuda
def test_resume_on_the_gpu_draws_the_same_dropout(dataset, tmp_path):
    argv = [*TINY, f"--dataset={dataset}", "--device=cuda", "--dtype=float32", "--compile=false",
            "--dropout=0.3"]
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'a'}")[0] == 0
    keep, calls = train.step_losses, []

    def crashes(model, *args):
        calls.extend([1] if model.training else [])
        if model.training and len(calls) > 6:
            raise KeyboardInterrupt
        return keep(model, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step_losses", crashes)
        assert run(train.main, *argv, f"--out_dir={tmp_path / 'b'}")[0] == 130
    assert load_checkpoint(tmp_path / "b")["step"] == 4
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'b'}", "--resume")[0] == 0
    check_same_curve(tmp_path / "a", tmp_path / "b", 1e-3)

@cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("insert, taught", [("none", True), ("concept", False)])
def test_the_peak_of_a_step_on_the_gpu_fits_its_estimate(insert, taught, checkpointed, compiled):
    """8 blocks of width 512 at GPT-2's vocabulary, 8 × 1024 tokens; the peak may use the 10% that
    auto leaves free."""
    torch._dynamo.reset()
    device, cfg = torch.device("cuda", 0), train.Config()
    gpt = GPT(ModelConfig(n_layer=2, n_head=8, n_embd=512)).to(device).eval().requires_grad_(False)
    sae = SAE(512, 32768, 32).to(device).requires_grad_(False)
    teacher = ConceptModel(gpt, sae, 0, target=insert, teaches=taught, bf16=True, compile=compiled)
    n_concepts = 32768 if insert == "concept" else 0
    model = GPT(ModelConfig(n_layer=8, n_head=8, n_embd=512, insert=insert, insert_layer=3,
                            n_concepts=n_concepts)).to(device)
    model.checkpoint_blocks = checkpointed
    forward = compile_model(model) if compiled else model
    optimizer = train.make_optimizer(model, cfg, device)
    x = torch.randint(50257, (8, 1024), device=device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(2):  # the second with the optimizer's state
        targets = teacher.concept_targets(x, x)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses = train.step_losses(forward, cfg, x, x, targets)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del targets, losses
        peak = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
    estimate = step_bytes(model, teacher, x.numel())
    print(f"peak {peak / 1e9:.2f} GB, estimate {estimate / 1e9:.2f} GB")
    assert 0.15 * estimate < peak < estimate / 0.9

@cuda
def test_batches_reach_the_gpu_intact(dataset):
    batches = Batches(load_tokens(dataset, "train"), 32, 4, 257)
    for step, (x, y, _) in enumerate(batches.prefetch(0, 5, torch.device("cuda", 0))):
        expected = batches[step]
        assert all(t.is_contiguous() for t in expected)
        torch.cuda.synchronize()
        assert torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])
