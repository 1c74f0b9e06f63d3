"""How fast a training step is, and where its time goes.

    python bench.py config/stdlib_ntp.py config/stdlib_cocomix.py       # tokens/s side by side
    python bench.py config/ntp_69m.py config/cocomix_69m.py --disk --official --batch_size=2
    python bench.py --count config/*_69m.py config/*_1b.py              # parameters and FLOPs only

Steps of all rows alternate, so a slow minute slows them alike; their models share the memory, so
measure large ones one at a time on a GPU. Figures are medians over the rounds, ratios medians of
each round's ratio. FLOPs are counted at their minimum (support/accounting.py), so FLOP/s and MFU
fall with every product that is not needed. GPT-2 and its SAE are not fetched: random weights of the
same shapes take the same time. --official is the official code's recipe (support/reference.py):
float32, everything dense, four separate cross-entropies, concept model and SAE not frozen. The
hours of --count follow from the speeds in results/bench-h200.jsonl (--write), where it exists.
"""
import gc
import platform
import signal
import statistics
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

try:
    import resource
except ImportError:  # Windows
    resource = None

from support.runtime import UserError, run

import torch
import torch.nn.functional as F
from torch.profiler import profile
from torch.utils.benchmark import timer

import train
from concepts import ConceptModel
from model import GPT, ModelConfig
from sae import SAE
from support import accounting, reference
from support.cli import key, parse
from support.curves import append_rows, cells, markdown
from support.device import compile_model, keep_freed_memory, pick_device, should_compile, uses_bf16
from support.distributed import Ranks
from support.log import read_log
from support.tokens import load_meta
from support.training import keys_in

MEASURED = Path(__file__).resolve().parent / "results" / "bench-h200.jsonl"
OFFICIAL = dict(mix="interleave", select="attribution", labels="fly", concept_lr_scale=1.0,
                decay_all=True, weight_decay=0.01, beta2=0.999, dtype="float32", compile=False)

@dataclass(frozen=True)
class Config(train.Config):
    count: bool = key(False, "only count parameters and FLOPs")
    rounds: int = key(5, "rounds; in each, every row has a turn", low=1)
    steps: int = key(1, "steps per turn", low=1)
    disk: bool = key(False, "for each CoCoMix config also a row with labels from disk")
    official: bool = key(False, "for each CoCoMix config also a row with the official recipe")
    profile: bool = key(False, "list the operations that take most of a step's time")
    memory: bool = key(True, "measure peak memory (on a CPU: in one process per row)")
    write: str | None = key(None, "append the rows to this .jsonl file")

def gpt2_and_sae(cfg, device):
    """A ConceptModel of GPT-2's and its SAE's shapes, with random weights."""
    target = train.inserts(cfg)
    with device:
        gpt = GPT(ModelConfig()).eval().requires_grad_(False)
        sae = SAE(768, 32768, 32).requires_grad_(False) if target == "concept" else None
    return ConceptModel(gpt, sae, cfg.concept_layer, cfg.attr_k, cfg.select, cfg.attribution,
                        cfg.attribution_sign, target, train.is_taught(cfg),
                        uses_bf16(cfg.dtype, device), should_compile(cfg, device))

def make_models(cfg, device):
    """A run's (GPT, ConceptModel or None), random weights; on the meta device, shapes only."""
    try:
        meta = load_meta(cfg.dataset)
    except UserError:
        if cfg.dataset not in ("openwebtext", "openwebmath"):  # a benchmark does not need the data
            raise
        meta = dict(tokenizer="gpt2", tokenizer_hash="gpt2", vocab_size=50257)
    cfg = replace(cfg, init_from=None)  # any weights take the same time
    real = torch.device("cpu") if device.type == "meta" else device
    run = SimpleNamespace(content=None, meta=meta, ranks=Ranks(), device=real)
    if cfg.concept_model == "gpt2" and (train.predicts(cfg) or train.is_taught(cfg)):
        concept_model = gpt2_and_sae(cfg, device)
    else:
        concept_model, _ = train.open_concept_model(replace(cfg, labels="fly"), run)
    run.device = device
    run.vocab_size = concept_model.gpt.config.vocab_size if concept_model else meta["vocab_size"]
    with device:
        return train.build_model(cfg, run, concept_model), concept_model

def flops_of(cfg, model):
    return accounting.flops_per_token(model, concept_loss=cfg.concept_weight > 0)

def count(name, cfg):
    """A row of --count; millions of parameters and FLOPs per token, billions of tokens."""
    model, concept_model = make_models(cfg, torch.device("meta"))
    at_steps = train.asked(cfg, concept_model)
    concept_flops = accounting.label_flops_per_token(at_steps, cfg.block_size)
    tokens = cfg.max_tokens or cfg.max_iters * cfg.batch_size * cfg.block_size
    params, flops, hours = accounting.num_params(model), flops_of(cfg, model), "not measured"
    for line in read_log(MEASURED) if MEASURED.is_file() else []:
        same = name, params, flops + concept_flops  # not another shape
        if same == (line["row"], line.get("params", params), line.get("flops_per_token", same[2])):
            hours = f"{tokens / line['tokens_per_s'] / 3600:,.0f}"
    return dict(
        row=name, shape=f"{cfg.n_layer} × {cfg.n_embd}", params=params / 1e6,
        active_params=accounting.num_params(model, active=True) / 1e6, tokens=tokens / 1e9,
        flops=flops / 1e6, concept_flops=concept_flops / 1e6 or None, hours=hours)

def clocked(f, times=1):
    """Mean seconds of f() over some calls."""
    start = timer()  # once a GPU has finished
    for _ in range(times):
        f()
    return (timer() - start) / times

class Row:
    """One method's models, optimizer and training step, on a batch of random tokens; a run to the
    functions of train.py. kind: "", "labels from disk" or "official"."""
    ranks = Ranks()

    def __init__(self, name, cfg, device, kind=""):
        torch.manual_seed(0)
        self.cfg, self.device, self.kind, self.turns = cfg, device, kind, []
        others = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.model, concept_model = make_models(cfg, device)
        B, c, self.labels = cfg.batch_size, self.model.config, None
        self.micro = n = accounting.micro_batch(cfg, B, self.model, concept_model, device)
        self.x, self.y = torch.randint(c.vocab_size, (2, B, cfg.block_size), device=device)
        self.micro_batches = list(zip(self.x.split(n), self.y.split(n), strict=True))
        if c.n_concepts and cfg.labels == "disk":
            self.labels = torch.randint(c.n_concepts, (*self.x.shape, cfg.attr_k), device=device)
        self.concept_model = train.asked(cfg, concept_model)
        del concept_model
        gc.collect()  # freed here, where labels come from disk
        self.asks = self.concept_model is not None and kind != "official"
        if kind == "official":
            self.concept_model.gpt.requires_grad_(), self.concept_model.sae.requires_grad_()
        self.optimizer = train.make_optimizer(self.model, cfg, device)
        bf16, compiled = uses_bf16(cfg.dtype, device), should_compile(cfg, device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.parallel = compile_model(self.model) if compiled else self.model
        self.concept_flops = accounting.label_flops_per_token(self.concept_model, cfg.block_size)
        self.flops = self.concept_flops + flops_of(cfg, self.model)  # per token
        self.step(), self.step()  # compile, allocate the optimizer's state
        known = device.type == "cuda" or device.type == "cpu" and resource
        self.facts = dict(
            row=f"{name}, {kind}" if kind else name, method=cfg.method, kind=kind,
            dtype="bfloat16" if bf16 else "float32", compiled=compiled, micro_batch_size=n,
            batch_size=cfg.batch_size, block_size=cfg.block_size, flops_per_token=self.flops,
            params=accounting.num_params(self.model),
            peak_gib=self.peak(others) if cfg.memory and known else None,
            active_params=accounting.num_params(self.model, active=True),
            concept_flops_share=self.concept_flops / self.flops if self.asks else None)

    def step(self):
        if self.kind == "official":
            self.official_backward()
        else:
            train.accumulate(self, self.concept_model, self.x, self.y, self.labels)
        train.update(self.model, self.optimizer, self.cfg, step=0)

    def official_backward(self):
        cm = self.concept_model
        for x, y in self.micro_batches:
            total, *_, self.held = reference.step_losses(  # its graph is held, as there
                self.model, cm.gpt, cm.sae, cm.layer, x, y, cm.attr_k, self.cfg.concept_weight)
            (total * (self.micro / len(self.x))).backward()

    def ask(self):
        """What a step asks of the concept model, alone; a teacher's logits, too, which the
        student's loss computes in chunks."""
        for micro_batch in self.micro_batches:
            teacher = self.concept_model.concept_targets(*micro_batch).teacher
            with self.autocast:
                for x in teacher.x.split(1) if teacher else ():
                    F.linear(x, teacher.weight)

    def turn(self, steps):
        """(tokens per second, the concept model's share of the time or None), over some steps."""
        self.step()  # not counted: this process may have been idle
        seconds = clocked(self.step, steps)
        share = clocked(self.ask, steps) / seconds if self.asks else None
        return self.x.numel() / seconds, share

    def peak(self, others):
        """Peak GiB of a step: on a GPU above the `others` in use; on a CPU those resident in this
        process, libraries included."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - others) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def profile(self):
        """The 15 operations (on a GPU: kernels) in which a step spends most time, one per line."""
        kind = "CUDA" if self.device.type == "cuda" else "CPU"
        time = "self_device_time_total" if kind == "CUDA" else "self_cpu_time_total"
        with profile() as measured:
            self.step()
        us = Counter({event.key: getattr(event, time) for event in measured.key_averages()
                      if event.device_type.name == kind and not event.is_user_annotation})
        return "\n".join(f"{t / 1e3:10.2f} ms {t / us.total():6.1%}  {name[:75]}"
                         for name, t in us.most_common(15))

class RowAlone:
    """A Row in a process of its own, on the CPU."""
    def __init__(self, name, cfg, kind):
        self.name, self.cfg, self.kind, self.turns = name, cfg, kind, []
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=signal.signal,
                                        initargs=(signal.SIGINT, signal.SIG_DFL))
        self.facts = self.call("open", name, cfg, kind)

    def call(self, method, *arguments):
        try:
            return self.pool.submit(call_alone, method, *arguments).result()
        except BrokenProcessPool as e:
            raise UserError(f"the process of {self.name} was killed, perhaps for lack of memory: a "
                            "smaller --batch_size needs less") from e

    def turn(self, steps):
        return self.call("turn", steps)

    def profile(self):
        return self.call("profile")

def call_alone(method, *arguments):
    """In the process of a RowAlone: "open" its Row → its facts, or call a method of the Row."""
    global row_alone
    if method != "open":
        return getattr(row_alone, method)(*arguments)
    name, cfg, kind = arguments
    if kind != "official":  # the official code leaves memory to glibc
        keep_freed_memory()
    row_alone = Row(name, cfg, torch.device("cpu"), kind)
    return row_alone.facts

COLUMNS = (("row", "row", "{}"), ("tokens_per_s", "tokens/s", "{:,.0f}"),
           ("speed_ratio", "÷ first row", "{:.2f}"), ("flops_per_token", "FLOP/token", "{:.2e}"),
           ("flop_per_s", "FLOP/s", "{:.2e}"), ("flop_per_s_ratio", "÷ first row", "{:.2f}"),
           ("mfu", "MFU", "{:.1%}"), ("peak_gib", "peak GiB", "{:.2f}"),
           ("concept_share", "concept model's time", "{:.1%}"),
           ("concept_flops_share", "its FLOPs", "{:.1%}"))

COUNTED = (("row", "config", "{}"), ("shape", "blocks × width", "{}"),
           ("active_params", "active, M", "{:,.1f}"), ("params", "parameters, M", "{:,.1f}"),
           ("flops", "MFLOP a token", "{:,.0f}"), ("concept_flops", "concept model's", "{:,.0f}"),
           ("tokens", "tokens, B", "{:g}"), ("hours", "hours on one H200", "{}"))

def table(found, columns=COLUMNS):
    """Dicts as a Markdown table; – for a missing value."""
    return markdown([title for _, title, _ in columns], [cells(row, columns) for row in found])

def read_rows(argv):
    """(the last file's Config, [(name, Config, kind)] of the rows to measure) of a command line."""
    files = [a for a in argv if a.endswith(".py") and not a.startswith("-")]
    keys = [a for a in argv if a not in files]
    if not files:
        parse(Config, keys, __doc__, most=0)  # --help ends here
        raise UserError("name config files: python bench.py config/ntp_69m.py config/kd_69m.py")
    wanted = []
    for file in files:
        (cfg, _), name = parse(Config, [file, *keys], __doc__, most=0), Path(file).stem
        if "max_iters" in keys_in(keys):  # it replaces the config file's max_tokens
            cfg = replace(cfg, max_tokens=None)
        wanted.append((name, cfg, ""))
        if train.inserts(cfg) != "concept":
            continue
        if cfg.disk and cfg.labels != "disk":
            wanted.append((name, replace(cfg, labels="disk"), "labels from disk"))
        if cfg.official and not train.is_taught(cfg):
            assert cfg.concept_weight, (
                "--official needs a concept model: concept_weight=0 leaves it out")
            wanted.append((name, replace(cfg, **OFFICIAL), "official"))
    assert any(kind for *_, kind in wanted) or not (cfg.disk or cfg.official), (
        "--disk and --official add rows for CoCoMix configs (--official: without a teacher); there "
        "is none among these configs")
    return cfg, wanted

def result_of(row, first, machine, gpu_peak):
    """A row's line of the table; first: the row it is compared with."""
    speeds, shares = zip(*row.turns, strict=True)
    speed, flops = statistics.median(speeds), row.facts["flops_per_token"]
    ratio = statistics.median(a / b for a, (b, _) in zip(speeds, first.turns, strict=True))
    return row.facts | dict(
        machine=machine, torch=torch.__version__, rounds=row.cfg.rounds, steps=row.cfg.steps,
        tokens_per_s=speed, speed_ratio=ratio, flop_per_s=speed * flops,
        flop_per_s_ratio=ratio * flops / first.facts["flops_per_token"],
        mfu=speed * flops / gpu_peak if gpu_peak else None,
        concept_share=None if None in shares else statistics.median(shares))

def main(argv):
    cfg, wanted = read_rows(argv)
    if cfg.count:
        return print(table([count(name, c) for name, c, kind in wanted if not kind], COUNTED))
    if cfg.write:
        append_rows(cfg.write)  # if it fails, then now
    device = pick_device(cfg.device)
    machine = (torch.cuda.get_device_name(device) if device.type == "cuda" else
               f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads")
    rows = [RowAlone(name, c, kind) if device.type == "cpu" and (c.memory or kind == "official")
            else Row(name, c, device, kind) for name, c, kind in wanted]
    for _ in range(cfg.rounds):
        for row in rows:
            row.turns.append(row.turn(cfg.steps))
    results = [result_of(row, rows[0], machine, accounting.peak_flops(device)) for row in rows]
    print(f"{machine}; rounds: {cfg.rounds}, steps in each: {cfg.steps}\n\n{table(results)}")
    for row in rows:
        if cfg.profile and row.kind != "official":
            print(f"\n{row.facts['row']}\n{row.profile()}")
    if cfg.write:
        append_rows(cfg.write, *results)

if __name__ == "__main__":
    run(main)
