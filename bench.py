"""How fast a training step is, and where its time goes.

    python bench.py config/stdlib_ntp.py config/stdlib_cocomix.py           # tokens/s side by side
    python bench.py config/ntp_69m.py config/cocomix_69m.py --disk --official --batch_size=2 --block_size=256
    python bench.py --count config/*_69m.py config/*_1b.py                  # parameters and FLOPs alone, from the shapes

Steps of all rows alternate in one process, so that a slow minute of the machine slows them alike; figures are medians over
the rounds, ratios are those of each round. FLOPs are counted at their minimum (only active concepts, only gradients that are
needed, causal attention at half the square), so achieved FLOP/s and MFU (against the GPU's dense bf16 peak) fall with every
product that needn't be. GPT-2 and its SAE are not fetched: random weights of their shapes take the same time.

--disk adds, to each CoCoMix, a row whose labels are known (from disk); --official one with the official code's recipe done
plainly, in the paper's form: float32, dense attribution over all C, dense TopK mask, dense compress product, four separate
cross-entropies, the concept model and its SAE with gradients; on a CPU it takes its turns in a process of its own, where glibc
has its own way with freed memory (model.keep_freed_memory). --parts times the pieces of each row's step, alone. --count runs
nothing; GPU hours stand in its table where results/bench-h200.jsonl (written with --write) has a config's tokens/s.
"""
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch
import torch.nn.functional as F

import data
import train
from concepts import ConceptModel, Guidance, check_tokenizer, load_concept_model, uses_bf16
from config import UserError, key
from model import GPT, ModelConfig, linear_cross_entropy, linear_topk, pick_device, sparse_decode
from sae import SAE, hidden_states, normalize

MEASURED = Path(__file__).resolve().parent / "results" / "bench-h200.jsonl"


@dataclass(frozen=True)
class Config(train.Config):
    count: bool = key(False, "only count parameters and FLOPs")
    rounds: int = key(5, "times that each row has its turn", low=1)
    steps: int = key(1, "steps a turn", low=1)
    disk: bool = key(False, "for each CoCoMix also a row with labels from disk")
    official: bool = key(False, "for each CoCoMix also a row with the official recipe")
    parts: bool = key(False, "time the pieces of each step")
    memory: bool = key(True, "measure peak memory (on a CPU: with a process for each row)")
    only_row: int | None = key(None, "be a process for this row alone: print its peak memory (bytes) and, for each line read, the seconds of a turn", low=0)
    write: str | None = key(None, "append the rows to this .jsonl file")


def concept_model_of(cfg, device):
    """The run's concept model; GPT-2's and the published SAE's shapes with random weights. None where there is none."""
    method, target = train.METHODS[cfg.method], train.inserted(cfg)
    if target in ("none", "pause") and not method.taught:
        return None
    if cfg.concept_model != "gpt2":
        concept_model, tokenizer = load_concept_model(cfg, torch.device("cpu") if device.type == "meta" else device, target, method.taught, train.compiles(cfg, device))
        check_tokenizer(cfg, data.load_meta(cfg.dataset), tokenizer, concept_model.gpt)
        return concept_model
    with device:
        gpt = GPT(ModelConfig(vocab_size=50257)).eval().requires_grad_(False)
        sae = SAE(gpt.config.n_embd, 32768, 32).eval().requires_grad_(False) if target == "concept" else None
    return ConceptModel(gpt, sae, cfg.concept_layer, cfg.attr_k, cfg.select, cfg.attribution, cfg.attribution_sign, target, method.taught, uses_bf16(cfg.dtype, device),
                        train.compiles(cfg, device))


def make_models(cfg, device):
    """A run's (GPT, ConceptModel or None), with random weights; on the meta device, shapes without memory."""
    try:
        vocab_size = data.load_meta(cfg.dataset)["vocab_size"]
    except UserError:
        if cfg.dataset not in ("openwebtext", "openwebmath"):  # those need not be fetched for a benchmark
            raise
        vocab_size = 50257
    concept_model = concept_model_of(cfg, device)
    n_concepts = hidden_size = 0
    if concept_model is not None:
        vocab_size, hidden_size = concept_model.gpt.config.vocab_size, concept_model.gpt.config.n_embd
        n_concepts = len(concept_model.sae.encoder) if concept_model.sae else 0
    with device:
        return GPT(train.model_config(cfg, vocab_size, n_concepts, hidden_size)), concept_model


def asked(cfg, concept_model):
    """The part of a run's concept model that its steps ask: all, its next-token distribution alone, or none."""
    if concept_model is None or concept_model.target != "none" and cfg.labels == "fly" and cfg.concept_weight > 0:
        return concept_model
    return concept_model.without_concepts() if concept_model.teaches else None


def count(name, cfg):
    """A row of --count: parameters, FLOPs a training token, tokens, and hours on one H200 where its tokens/s are known."""
    model, concept_model = make_models(cfg, torch.device("meta"))
    concept_model = asked(cfg, concept_model)
    tokens = cfg.max_tokens or cfg.max_iters * cfg.batch_size * cfg.block_size
    speeds = {line["row"]: line["tokens_per_s"] for line in config.read_log(MEASURED)} if MEASURED.is_file() else {}
    return dict(row=name, shape=f"{cfg.n_layer} × {cfg.n_embd}", active_params=model.num_params(active=True) / 1e6, params=model.num_params() / 1e6,
                flops=model.flops_per_token() / 1e6, concept_flops=concept_model.flops_per_token(cfg.block_size) / 1e6 if concept_model else None,
                tokens=tokens / 1e9, hours=f"{tokens / speeds[name] / 3600:,.0f}" if name in speeds else "not measured")


class Row:
    """One method's models and optimizer, and its training step on a batch of random tokens; the steps are taken in `process`, if given."""
    def __init__(self, name, cfg, device, kind="", process=None):
        torch.manual_seed(0)
        self.process = process
        self.name, self.cfg, self.device, self.kind = name + (f", {kind}" if kind else ""), cfg, device, kind
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.model, self.concept_model = make_models(cfg, device)
        vocab_size, n_concepts = self.model.config.vocab_size, self.model.config.n_concepts
        self.model.checkpoint_blocks = cfg.checkpoint_blocks
        self.micro = train.micro_batch(cfg, cfg.batch_size, self.model, self.concept_model, device)
        self.x, self.y = torch.randint(vocab_size, (2, cfg.batch_size, cfg.block_size), device=device)
        self.labels = torch.randint(n_concepts, (cfg.batch_size, cfg.block_size, cfg.attr_k), device=device) if n_concepts and cfg.labels == "disk" else None
        self.concept_model = asked(cfg, self.concept_model)
        self.concept_flops = self.concept_model.flops_per_token(cfg.block_size) if self.concept_model else 0
        self.autocast = torch.autocast(device.type, dtype=torch.bfloat16) if uses_bf16(cfg.dtype, device) and kind != "official" else nullcontext()
        self.compiled = train.compile_model(self.model) if kind != "official" and train.compiles(cfg, device) else self.model
        if kind == "official":
            self.concept_model.gpt.requires_grad_(), self.concept_model.sae.requires_grad_()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.learning_rate, fused=device.type in ("cpu", "cuda"))
        else:
            self.optimizer = train.make_optimizer(self.model, cfg, device)
        if not process:
            self.step(), self.step()  # compiles, makes the optimizer's state
        self.allocated = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else 0

    @property
    def flops(self):
        """Of a token, at the minimum: model and, where it runs, concept model."""
        return self.model.flops_per_token(block_size=self.cfg.block_size) + self.concept_flops

    def guide(self, rows):
        """What is known of some rows of the batch: asked of the concept model, or from disk."""
        guidance = Guidance() if self.concept_model is None else self.concept_model.guide(self.x[rows], self.y[rows])
        return guidance if self.labels is None else guidance._replace(labels=self.labels[rows])

    def losses(self, rows):
        """The sum that is minimised, of some rows of the batch."""
        if self.kind == "official":
            loss, self.held = official_losses(self.model, self.concept_model, self.x[rows], self.y[rows], self.cfg.concept_weight)
            return loss
        guidance = self.guide(rows)
        with self.autocast:
            return train.step_losses(self.compiled, self.cfg, self.x[rows], self.y[rows], guidance).total

    @property
    def micro_batches(self):
        return [slice(first, first + self.micro) for first in range(0, len(self.x), self.micro)]

    def turn(self, steps):
        """Seconds a step, the mean of some steps."""
        if self.process:
            return self.process.turn()
        start = clock(self.device)
        for _ in range(steps):
            self.step()
        return (clock(self.device) - start) / steps

    def step(self):
        """One optimizer step, as in train.py."""
        for rows in self.micro_batches:
            (self.losses(rows) * (len(self.x[rows]) / len(self.x))).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def official_losses(model, concept_model, x, y, concept_weight):
    """The official code's step, plainly: everything dense, in float32. As there, nothing of the frozen model is told that it
    needs no gradients: its weights' add up from step to step, and the labels' graph lives on with what this returns, the total
    loss and the attributions (B, T, C)."""
    gpt, sae, c = concept_model.gpt, concept_model.sae, model.config
    h = gpt.blocks(gpt.embed(x), 0, concept_model.layer + 1)[0]
    h.retain_grad()
    logits = gpt.head(gpt.blocks(h, concept_model.layer + 1, gpt.config.n_layer)[0])
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    pre = sae.preactivations(normalize(h.detach())[0])
    top = pre.topk(sae.k)
    active = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    attributions = active * (h.grad @ sae.decoder.T)
    labels = attributions.topk(concept_model.attr_k).indices

    x = model.embed(x)
    for i, block in enumerate(model.h):
        if i == c.insert_layer:
            m = model.inserted
            normal, mean, std = m.normalize(x)
            z = m.predict(normal)
            concept_loss = sum(F.cross_entropy(z.flatten(0, 1), labels[..., j].flatten()) for j in range(labels.shape[-1])) / labels.shape[-1]
            kept = z.topk(c.concept_k)
            dense = torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
            vector = (dense @ m.compress + m.compress_bias + m.bias) * std + mean
            x = torch.stack((x, vector), dim=2).flatten(1, 2)
        x = block(x)
    logits = model.ln_f(x[:, 1::2]) @ model.wte.weight[:c.vocab_size].T
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + concept_weight * concept_loss, attributions


# ---------------------------------------------------------------------------------------------------
# measuring

def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(f, device, times=3):
    """Median seconds of f(), after one call that is not counted."""
    f()
    seconds = []
    for _ in range(times):
        start = clock(device)
        f()
        seconds.append(clock(device) - start)
    return statistics.median(seconds)


def parts(row):
    """{piece of a row's step: seconds}, each run alone on one micro batch with inputs of its shape, forward and, where the
    step has one, backward; scaled to the whole batch."""
    cfg, model, device, cm = row.cfg, row.model, row.device, row.concept_model
    x, y, c = row.x[:row.micro], row.y[:row.micro], model.config
    found, N = {}, len(row.x) / len(x)

    def backward(make, *inputs):
        """Of make(*inputs), to its inputs and the model's weights."""
        def f():
            leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
            with row.autocast:
                out = make(*leaves)
            out.backward(torch.ones_like(out))
        return f

    if cm is not None:
        with torch.autocast(device.type, enabled=False):
            h = hidden_states(cm.gpt, x, cm.layer, cm.bf16)
            found["concept forward"] = timed(lambda: hidden_states(cm.gpt, x, cm.layer, cm.bf16), device)
            if cm.target == "concept":
                normal = normalize(h)[0].to(cm.sae.encoder.dtype)
                with torch.no_grad():
                    active = cm.sae.encode(normal)
                    found["TopK of the SAE"] = timed(lambda: cm.sae.encode(normal), device)
                if cm.select == "attribution":
                    grad, _ = cm.loss_gradient(h, y)
                    found["concept backward"] = timed(lambda: cm.loss_gradient(h, y), device)
                    found["attribution"] = timed(lambda: cm._choose(normal, active, grad), device)
            if cm.teaches and "concept backward" not in found:
                with torch.no_grad():
                    found["concept forward"] += timed(lambda: cm._upper(h), device)
    guidance = row.guide(slice(0, row.micro))
    if c.insert == "none":
        found["blocks"] = timed(backward(lambda e: model.blocks(e, 0, c.n_layer)[0], model.embed(x)), device)
        end = model.embed(x)
    else:
        h = model.blocks(model.embed(x), 0, c.insert_layer)[0].detach()
        found["lower blocks"] = timed(backward(lambda e: model.blocks(e, 0, c.insert_layer)[0], model.embed(x)), device)
        if c.insert == "concept":
            predict = model.inserted.predict
            head = lambda h: linear_topk(h, predict.weight, predict.bias, c.concept_k, guidance.labels)
            with row.autocast:
                top = head(h)[0]
            found["concept head and loss"] = timed(backward(lambda h: (lambda t, l: t.values.sum() * 1e-3 + l)(*head(h)), h), device)
            if c.mix != "none":
                found["compress"] = timed(backward(lambda v, w: sparse_decode(top._replace(values=v), w), top.values, model.inserted.compress), device)
        elif c.insert == "hidden":
            found["hidden head and loss"] = timed(backward(lambda h: model.inserted(h, guidance.labels)[2], h), device)
        inserted, model.inserted = model.inserted, _Twice()
        try:
            end = model.blocks(h, c.insert_layer, c.n_layer)[0].detach()
            found["upper blocks"] = timed(backward(lambda h: model.blocks(h, c.insert_layer, c.n_layer)[0], h), device)
        finally:
            model.inserted = inserted
    found["head and loss"] = timed(backward(lambda e: linear_cross_entropy(model.ln_f(e), model.wte.weight, y, c.vocab_size, guidance.teacher, cfg.kd_weight)[0], end), device)
    found = {name: seconds * N for name, seconds in found.items()}
    row.losses(slice(0, row.micro)).backward()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        row.optimizer.step()
    found["optimizer"] = timed(update, device)
    row.optimizer.zero_grad(set_to_none=True)
    return found


class _Twice(torch.nn.Module):
    """In the place of what is inserted, for the upper blocks' own time: h itself, which costs nothing."""
    def forward(self, h, labels=None, scale=None):
        return h, None, None


def measure(rows, rounds, steps):
    """The rows take turns: ([[seconds a step of each round] of each row], [[seconds of its concept model's part] …])."""
    whole, asking = [[] for _ in rows], [[] for _ in rows]
    for _ in range(rounds):
        for i, row in enumerate(rows):
            if rows[i - 1].process and not row.process:  # after a turn elsewhere, in which this process idled
                row.step()
            whole[i].append(row.turn(steps))
            if row.concept_flops and row.kind != "official":
                start = clock(row.device)
                for _ in range(steps):
                    for part in row.micro_batches:
                        row.guide(part)
                asking[i].append((clock(row.device) - start) / steps)
    return whole, asking


def peak_on_gpu(row):
    """Peak bytes of the GPU's memory while a row takes a step, without the other rows' models."""
    torch.cuda.reset_peak_memory_stats(row.device)
    others = torch.cuda.memory_allocated(row.device) - row.allocated
    row.step()
    return torch.cuda.max_memory_allocated(row.device) - others


class Process:
    """A process that makes row i alone. Its `peak`: resident bytes after some steps, libraries included."""
    def __init__(self, argv, i):
        self.i, self.process = i, subprocess.Popen([sys.executable, __file__, *argv, f"--only_row={i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.peak = int(self.read())

    def turn(self):
        """Row.turn(--steps) there."""
        print(file=self.process.stdin, flush=True)
        return float(self.read())

    def read(self):
        if line := self.process.stdout.readline():
            return line
        status = self.process.wait()
        said = (self.process.stderr.read().strip().splitlines() or ["nothing said"])[-1]
        raise UserError(said.removeprefix("error: ") if said.startswith("error: ") else f"the process of row {self.i} ended with status {status}: {said}")

    def end(self):
        self.process.communicate()


COLUMNS = (("row", "row", "{}"), ("tokens_per_s", "tokens/s", "{:,.0f}"), ("speed_ratio", "of the first's", "{:.2f}"), ("flops_per_token", "FLOP a token", "{:.2e}"),
           ("flop_per_s", "FLOP/s", "{:.2e}"), ("flop_per_s_ratio", "of the first's", "{:.2f}"), ("mfu", "MFU", "{:.1%}"), ("peak_gib", "peak GiB", "{:.2f}"),
           ("concept_share", "concept model's time", "{:.1%}"), ("concept_flops_share", "its FLOPs", "{:.1%}"))

COUNTED = (("row", "config", "{}"), ("shape", "blocks × width", "{}"), ("active_params", "active, M", "{:,.1f}"), ("params", "parameters, M", "{:,.1f}"), ("flops", "MFLOP a token", "{:,.0f}"),
           ("concept_flops", "concept model's", "{:,.0f}"), ("tokens", "tokens, B", "{:g}"), ("hours", "hours on one H200", "{}"))


def table(found, columns=COLUMNS):
    """Dicts as a Markdown table, a row each; – where a value is missing."""
    cells = [[title for _, title, _ in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    cells += [["–" if row.get(name) is None else form.format(row[name]) for name, _, form in columns] for row in found]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def main(argv):
    files, keys = [a for a in argv if a.endswith(".py") and not a.startswith("-")], [a for a in argv if not a.endswith(".py") or a.startswith("-")]
    if not files and not {"--help", "-h"} & set(keys):
        raise UserError("name config files: python bench.py config/stdlib_ntp.py config/stdlib_cocomix.py" + (f", not {keys[0]}" if keys and not keys[0].startswith("-") else ""))
    wanted = []
    for file in files or [None]:
        cfg, _ = config.parse(Config, ([file] if file else []) + keys, __doc__, most=0)
        name = Path(file).stem
        wanted.append((name, cfg, ""))
        if train.inserted(cfg) == "concept":
            if cfg.disk and cfg.labels != "disk":
                wanted.append((name, config.replace(cfg, labels="disk"), "labels from disk"))
            if cfg.official and not train.METHODS[cfg.method].taught:
                if cfg.concept_weight == 0:
                    raise UserError("--official: with concept_weight=0 there would be no concept model in it")
                wanted.append((name, config.replace(cfg, mix="interleave", select="attribution", labels="fly"), "official"))
    if (cfg.disk or cfg.official) and not any(kind for *_, kind in wanted):
        raise UserError("--disk and --official add rows to a CoCoMix (without a teacher, for --official); there is none among these configs")
    if cfg.count:
        print(table([count(name, cfg) for name, cfg, kind in wanted if not kind], COUNTED))
        return
    if cfg.write and Path(cfg.write).is_dir():
        raise UserError(f"{cfg.write} is a folder; name a file in it")
    if cfg.write:
        Path(cfg.write).parent.mkdir(parents=True, exist_ok=True)  # if it can't be, then now
    if cfg.only_row is not None and cfg.only_row >= len(wanted):
        raise UserError(f"only_row={cfg.only_row}: there are rows 0 to {len(wanted) - 1}")
    official = cfg.only_row is not None and wanted[cfg.only_row][2] == "official"
    device = torch.device("cpu") if official else pick_device(cfg.device)  # the official code does not have its memory kept
    if cfg.only_row is not None:
        row = Row(*wanted[cfg.only_row][:2], device, wanted[cfg.only_row][2])
        row.step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), flush=True)
        for _ in sys.stdin:
            row.step()  # after the others' turns, in which this process idled
            print(row.turn(cfg.steps), flush=True)
        return
    peak = train.peak_flops(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
    processes, peaks = [], []  # all of them before the rows: what a process has at its start is counted to its peak
    for i, (*_, kind) in enumerate(wanted):
        elsewhere = kind == "official" and device.type == "cpu"
        process = Process(argv, i) if elsewhere or cfg.memory and device.type == "cpu" else None
        peaks.append(process and process.peak)
        if process and not elsewhere:
            process.end()
        processes.append(process if elsewhere else None)
    rows = [Row(name, row_cfg, torch.device("meta") if process else device, kind, process) for (name, row_cfg, kind), process in zip(wanted, processes)]
    if cfg.memory and device.type == "cuda":
        peaks = [peak_on_gpu(row) for row in rows]
    whole, asking = measure(rows, cfg.rounds, cfg.steps)
    for row in rows:
        if row.process:
            row.process.end()
    found = []
    for i, row in enumerate(rows):
        tokens, seconds = row.x.numel(), statistics.median(whole[i])
        ratio = statistics.median(first / own for first, own in zip(whole[0], whole[i]))
        found.append(dict(
            row=row.name, method=row.cfg.method, kind=row.kind, machine=machine, torch=torch.__version__, dtype="bfloat16" if not isinstance(row.autocast, nullcontext) else "float32",
            compiled=row.compiled is not row.model, batch_size=row.cfg.batch_size, micro_batch_size=row.micro, block_size=row.cfg.block_size, params=row.model.num_params(),
            active_params=row.model.num_params(active=True), tokens_per_s=tokens / seconds, speed_ratio=ratio * tokens / rows[0].x.numel(), flops_per_token=row.flops,
            flop_per_s=tokens / seconds * row.flops, flop_per_s_ratio=ratio * tokens * row.flops / (rows[0].x.numel() * rows[0].flops),
            mfu=tokens / seconds * row.flops / peak if peak else None,
            peak_gib=peaks[i] / 2**30 if cfg.memory and peaks[i] else None,
            concept_share=statistics.median(a / b for a, b in zip(asking[i], whole[i])) if asking[i] else None,
            concept_flops_share=row.concept_flops / row.flops if asking[i] else None, rounds=cfg.rounds, steps=cfg.steps))
    print(f"{machine}; {cfg.rounds} round{'s' * (cfg.rounds > 1)} of {cfg.steps} step{'s' * (cfg.steps > 1)}\n\n{table(found)}")
    if cfg.parts:
        for row, result in zip(rows, found):
            if row.kind == "official":
                continue
            result["parts"] = parts(row)
            step = row.x.numel() / result["tokens_per_s"]
            print(f"\n{row.name}: a step takes {step * 1e3:.1f} ms")
            for name, seconds in sorted(result["parts"].items(), key=lambda item: -item[1]):
                print(f"  {name:24} {seconds * 1e3:9.2f} ms {seconds / step:7.1%}")
            print(f"  {'all of these':24} {sum(result['parts'].values()) * 1e3:9.2f} ms {sum(result['parts'].values()) / step:7.1%}")
    if cfg.write:
        with data.replacing(cfg.write) as file:
            before = Path(cfg.write).read_bytes() if Path(cfg.write).is_file() else b""
            file.write(before + b"".join(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}).encode() + b"\n" for result in found))


if __name__ == "__main__":
    config.run(main)
