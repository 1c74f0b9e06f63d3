"""How fast a training step is, and where its time goes.

    python bench.py config/stdlib_ntp.py config/stdlib_cocomix.py       # tokens/s side by side
    python bench.py config/ntp_69m.py config/cocomix_69m.py --disk --official --batch_size=2
    python bench.py --count config/*_69m.py config/*_1b.py              # parameters and FLOPs only

Steps of all rows alternate in one process, so a slow minute of the machine slows them alike.
Figures are medians over the rounds, ratios are medians of each round's ratio. FLOPs are counted at
their minimum (support/accounting.py), so FLOP/s and MFU fall with every product that is not needed.
GPT-2 and its SAE are not fetched: random weights of the same shapes take the same time.

--disk adds, for each CoCoMix config, a row with labels from disk; --official, one with the official
code's recipe (support/reference.py): float32, everything dense, four separate cross-entropies,
concept model and SAE not frozen. On a CPU that row runs in a process of its own, where glibc frees
memory as usual (support.device.keep_freed_memory). --parts times the pieces of each row's step.
--count takes hours from results/bench-h200.jsonl (written with --write).
"""
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from support.runtime import UserError, run

import torch

import train
from concepts import ConceptModel, Targets, load_concept_model
from model import GPT, ModelConfig
from sae import SAE
from support import accounting, reference
from support.accounting import flops_per_token, label_flops_per_token, micro_batch, num_params
from support.cli import key, parse
from support.device import compile_model, pick_device, should_compile, uses_bf16
from support.files import atomic_write
from support.log import read_log
from support.step_parts import clocked, show_parts
from support.tokens import check_tokenizer, load_meta

MEASURED = Path(__file__).resolve().parent / "results" / "bench-h200.jsonl"

@dataclass(frozen=True)
class Config(train.Config):
    count: bool = key(False, "only count parameters and FLOPs")
    rounds: int = key(5, "rounds; in each, every row has a turn", low=1)
    steps: int = key(1, "steps per turn", low=1)
    disk: bool = key(False, "for each CoCoMix config also a row with labels from disk")
    official: bool = key(False, "for each CoCoMix config also a row with the official recipe")
    parts: bool = key(False, "time the pieces of each step")
    memory: bool = key(True, "measure peak memory (on a CPU: in one process per row)")
    only_row: int | None = key(None, "internal: serve this row alone to another bench.py", low=0)
    write: str | None = key(None, "append the rows to this .jsonl file")

def concept_model_of(cfg, device):
    """The run's concept model, or None. For gpt2: random weights of its and its SAE's shapes."""
    target, taught = train.inserts(cfg), train.is_taught(cfg)
    if target in ("none", "pause") and not taught:
        return None
    bf16, compiled = uses_bf16(cfg.dtype, device), should_compile(cfg, device)
    if cfg.concept_model != "gpt2":
        real = torch.device("cpu") if device.type == "meta" else device
        concept_model, tokenizer = load_concept_model(cfg, real, target, taught, compiled)
        check_tokenizer(cfg, load_meta(cfg.dataset), tokenizer, concept_model.gpt)
        return concept_model
    with device:
        gpt, sae = GPT(ModelConfig(vocab_size=50257)).eval().requires_grad_(False), None
        if target == "concept":
            sae = SAE(gpt.config.n_embd, 32768, 32).eval().requires_grad_(False)
    return ConceptModel(gpt, sae, cfg.concept_layer, cfg.attr_k, cfg.select, cfg.attribution,
                        cfg.attribution_sign, target, taught, bf16, compiled)

def make_models(cfg, device):
    """A run's (GPT, ConceptModel or None), random weights; on the meta device, shapes only."""
    try:
        vocab_size = load_meta(cfg.dataset)["vocab_size"]
    except UserError:
        if cfg.dataset not in ("openwebtext", "openwebmath"):  # a benchmark does not need the data
            raise
        vocab_size = 50257
    concept_model, n_concepts, hidden_size = concept_model_of(cfg, device), 0, 0
    if concept_model is not None:
        vocab_size = concept_model.gpt.config.vocab_size
        hidden_size = concept_model.gpt.config.n_embd
        n_concepts = len(concept_model.sae.encoder) if concept_model.sae else 0
    with device:
        return GPT(train.model_config(cfg, vocab_size, n_concepts, hidden_size)), concept_model

def asked(cfg, concept_model):
    """What the run's steps ask of its concept model: everything, its distribution only, or None."""
    if concept_model is None:
        return None
    if concept_model.target != "none" and cfg.labels == "fly" and cfg.concept_weight > 0:
        return concept_model
    return concept_model.distribution_only() if concept_model.teaches else None

def count(name, cfg):
    """A row of --count; millions of parameters and FLOPs per token, billions of tokens."""
    model, concept_model = make_models(cfg, torch.device("meta"))
    concept_flops = label_flops_per_token(asked(cfg, concept_model), cfg.block_size)
    tokens = cfg.max_tokens or cfg.max_iters * cfg.batch_size * cfg.block_size
    measured = read_log(MEASURED) if MEASURED.is_file() else []
    speeds = {line["row"]: line["tokens_per_s"] for line in measured}
    hours = f"{tokens / speeds[name] / 3600:,.0f}" if name in speeds else "not measured"
    return dict(row=name, shape=f"{cfg.n_layer} × {cfg.n_embd}", params=num_params(model) / 1e6,
                active_params=num_params(model, active=True) / 1e6,
                flops=flops_per_token(model) / 1e6, concept_flops=concept_flops / 1e6 or None,
                tokens=tokens / 1e9, hours=hours)

class Row:
    """One method's models, optimizer and training step, on a batch of random tokens.

    kind: "", "labels from disk" or "official". process: takes this row's turns, if given."""
    def __init__(self, name, cfg, device, kind="", process=None):
        torch.manual_seed(0)
        self.name = f"{name}, {kind}" if kind else name
        self.cfg, self.device, self.kind, self.process = cfg, device, kind, process
        self.seconds, self.concept_seconds, self.peak = [], [], None  # measured: rounds, bytes
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.model, concept_model = make_models(cfg, device)
        self.model.checkpoint_blocks, c = cfg.checkpoint_blocks, self.model.config
        self.micro = n = micro_batch(cfg, cfg.batch_size, self.model, concept_model, device)
        self.micro_batches = [slice(i, i + n) for i in range(0, cfg.batch_size, n)]
        shape, self.labels = (cfg.batch_size, cfg.block_size), None
        self.x, self.y = torch.randint(c.vocab_size, (2, *shape), device=device)
        if c.n_concepts and cfg.labels == "disk":
            self.labels = torch.randint(c.n_concepts, (*shape, cfg.attr_k), device=device)
        self.concept_model = asked(cfg, concept_model)
        self.concept_flops = label_flops_per_token(self.concept_model, cfg.block_size)  # per token
        self.flops = flops_per_token(self.model, block_size=cfg.block_size) + self.concept_flops
        self.autocast, self.compiled = nullcontext(), self.model
        if kind == "official":
            self.concept_model.gpt.requires_grad_(), self.concept_model.sae.requires_grad_()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.learning_rate,
                                               fused=device.type in ("cpu", "cuda"))
        else:
            self.optimizer = train.make_optimizer(self.model, cfg, device)
            if uses_bf16(cfg.dtype, device):
                self.autocast = torch.autocast(device.type, dtype=torch.bfloat16)
            if should_compile(cfg, device):
                self.compiled = compile_model(self.model)
        if process is None:
            self.step(), self.step()  # compile, allocate the optimizer's state
        if device.type == "cuda":
            self.allocated = torch.cuda.memory_allocated(device) - before

    def targets(self, rows):
        """What the concept model says about these rows of the batch; labels may be from disk."""
        targets = Targets()
        if self.concept_model is not None:
            targets = self.concept_model.targets(self.x[rows], self.y[rows])
        return targets if self.labels is None else targets._replace(labels=self.labels[rows])

    def losses(self, rows):
        """The loss that is minimised, for these rows of the batch."""
        x, y, cm = self.x[rows], self.y[rows], self.concept_model
        if self.kind == "official":
            step = reference.step_losses(self.model, cm.gpt, cm.sae, cm.layer, x, y, cm.attr_k,
                                         self.cfg.concept_weight)
            self.held = step.attribution  # as there, its graph is kept until the next step
            return step.total
        targets = self.targets(rows)
        with self.autocast:
            return train.step_losses(self.compiled, self.cfg, x, y, targets).total

    def step(self):
        """One optimizer step, as in train.py."""
        for rows in self.micro_batches:
            (self.losses(rows) * (self.micro / len(self.x))).backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)
        self.optimizer.step()

    def ask(self):
        """What a step asks of the concept model, alone."""
        for rows in self.micro_batches:
            self.targets(rows)

    def turn(self, steps):
        """Seconds per step, the mean of some steps."""
        return self.process.turn() if self.process else clocked(self.step, self.device, steps)

def measure(rows, rounds, steps):
    """Give each row its turn in each round."""
    for _ in range(rounds):
        for i, row in enumerate(rows):
            if rows[i - 1].process and not row.process:
                row.step()  # this process was idle during the last turn
            row.seconds.append(row.turn(steps))
            if row.concept_flops and row.kind != "official":
                row.concept_seconds.append(clocked(row.ask, row.device, steps))
    for row in rows:
        if row.process:
            row.process.end()

def peak_on_gpu(row):
    """Peak bytes of GPU memory during a step, without the other rows' models."""
    torch.cuda.reset_peak_memory_stats(row.device)
    others = torch.cuda.memory_allocated(row.device) - row.allocated
    row.step()
    return torch.cuda.max_memory_allocated(row.device) - others

class Process:
    """A process that runs row i alone. peak: its resident bytes, libraries included."""
    def __init__(self, argv, i):
        self.i, pipe = i, subprocess.PIPE
        command = [sys.executable, __file__, *argv, f"--only_row={i}"]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.peak = int(self.read())

    def turn(self):
        print(file=self.process.stdin, flush=True)
        return float(self.read())

    def read(self):
        if line := self.process.stdout.readline():
            return line
        status = self.process.wait()
        last = (self.process.stderr.read().strip().splitlines() or ["no message"])[-1]
        if not last.startswith("error: "):
            last = f"the process of row {self.i} ended with status {status}: {last}"
        raise UserError(last.removeprefix("error: "))

    def end(self):
        self.process.communicate()

def serve_row(name, cfg, kind):
    """The other side of a Process: print the row's peak, then the seconds of each turn."""
    # pick_device would keep freed memory, which the official code does not do
    device = torch.device("cpu") if kind == "official" else pick_device(cfg.device)
    row = Row(name, cfg, device, kind)
    row.step()
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, flush=True)
    for _ in sys.stdin:
        row.step()  # this process was idle during the others' turns
        print(row.turn(cfg.steps), flush=True)

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
    lines = [[title for _, title, _ in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    for row in found:
        lines.append(["–" if row.get(n) is None else f.format(row[n]) for n, _, f in columns])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

def read_rows(argv):
    """(the last file's Config, [(name, Config, kind)] of the rows to measure) of a command line."""
    files = [a for a in argv if a.endswith(".py") and not a.startswith("-")]
    keys = [a for a in argv if a not in files]
    if not files and not {"--help", "-h"} & set(keys):
        unexpected = f", not {keys[0]}" if keys and not keys[0].startswith("-") else ""
        raise UserError("name config files: python bench.py config/stdlib_ntp.py "
                        f"config/stdlib_cocomix.py{unexpected}")
    wanted = []
    for file in files or [None]:
        cfg, _ = parse(Config, ([file] if file else []) + keys, __doc__, most=0)
        name = Path(file).stem
        wanted.append((name, cfg, ""))
        if train.inserts(cfg) != "concept":
            continue
        if cfg.disk and cfg.labels != "disk":
            wanted.append((name, replace(cfg, labels="disk"), "labels from disk"))
        if cfg.official and not train.is_taught(cfg):
            if cfg.concept_weight == 0:
                raise UserError("--official needs a concept model: concept_weight=0 leaves it out")
            official = replace(cfg, mix="interleave", select="attribution", labels="fly")
            wanted.append((name, official, "official"))
    if (cfg.disk or cfg.official) and not any(kind for *_, kind in wanted):
        raise UserError("--disk and --official add rows for CoCoMix configs (--official: without a "
                        "teacher); there is none among these configs")
    if cfg.write and Path(cfg.write).is_dir():
        raise UserError(f"--write={cfg.write} is a folder; name a file in it")
    if cfg.only_row is not None and cfg.only_row >= len(wanted):
        raise UserError(f"only_row={cfg.only_row}: there are rows 0 to {len(wanted) - 1}")
    return cfg, wanted

def open_rows(argv, cfg, wanted, device):
    """The Rows to measure. On a CPU their peak memory is that of a process for each."""
    processes, peaks, on_cpu = [], [], device.type == "cpu"
    for i, (*_, kind) in enumerate(wanted):  # before the rows, whose memory a process would inherit
        process = Process(argv, i) if on_cpu and (cfg.memory or kind == "official") else None
        peaks.append(process.peak if process and cfg.memory else None)
        if process and kind != "official":
            process.end()
            process = None
        processes.append(process)
    rows = []
    for (name, row_cfg, kind), process, peak in zip(wanted, processes, peaks, strict=True):
        rows.append(Row(name, row_cfg, torch.device("meta") if process else device, kind, process))
        rows[-1].peak = peak
    for row in rows if cfg.memory and device.type == "cuda" else ():
        row.peak = peak_on_gpu(row)
    return rows

def result_of(row, first, machine, gpu_peak):
    """A row's line of the table; first: the row it is compared with."""
    tokens, cfg, share = row.x.numel(), row.cfg, None
    speed = tokens / statistics.median(row.seconds)
    ratios = [a / b for a, b in zip(first.seconds, row.seconds, strict=True)]
    ratio = statistics.median(ratios) * tokens / first.x.numel()
    if row.concept_seconds:
        shares = [a / b for a, b in zip(row.concept_seconds, row.seconds, strict=True)]
        share = statistics.median(shares)
    return dict(
        row=row.name, method=cfg.method, kind=row.kind, machine=machine, torch=torch.__version__,
        dtype="float32" if isinstance(row.autocast, nullcontext) else "bfloat16",
        compiled=row.compiled is not row.model, batch_size=cfg.batch_size,
        micro_batch_size=row.micro, block_size=cfg.block_size, params=num_params(row.model),
        active_params=num_params(row.model, active=True), tokens_per_s=speed, speed_ratio=ratio,
        flops_per_token=row.flops, flop_per_s=speed * row.flops,
        flop_per_s_ratio=ratio * row.flops / first.flops, concept_share=share,
        mfu=speed * row.flops / gpu_peak if gpu_peak else None,
        peak_gib=row.peak / 2**30 if row.peak else None,
        concept_flops_share=None if share is None else row.concept_flops / row.flops,
        rounds=cfg.rounds, steps=cfg.steps)

def append_results(path, results):
    before = Path(path).read_bytes() if Path(path).is_file() else b""
    with atomic_write(path) as file:
        file.write(before)
        for result in results:
            line = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}
            file.write(json.dumps(line).encode() + b"\n")

def main(argv):
    cfg, wanted = read_rows(argv)
    if cfg.count:
        print(table([count(name, c) for name, c, kind in wanted if not kind], COUNTED))
        return
    if cfg.write:
        Path(cfg.write).parent.mkdir(parents=True, exist_ok=True)  # if it fails, then now
    if cfg.only_row is not None:
        return serve_row(*wanted[cfg.only_row])
    device = pick_device(cfg.device)
    machine = f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    rows = open_rows(argv, cfg, wanted, device)
    measure(rows, cfg.rounds, cfg.steps)
    results = [result_of(row, rows[0], machine, accounting.peak_flops(device)) for row in rows]
    turns = f"{cfg.rounds} round{'s' * (cfg.rounds > 1)} of {cfg.steps} step{'s' * (cfg.steps > 1)}"
    print(f"{machine}; {turns}\n\n{table(results)}")
    for row, result in zip(rows, results, strict=True):
        if cfg.parts and row.kind != "official":
            result["parts"] = show_parts(row, row.x.numel() / result["tokens_per_s"])
    if cfg.write:
        append_results(cfg.write, results)

if __name__ == "__main__":
    run(main)
