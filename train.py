"""Train a GPT on next tokens and, with CoCoMix, on concepts.

    python train.py config/stdlib_cocomix.py                    # a config file
    python train.py config/stdlib_ntp.py --learning_rate=1e-3   # … and keys over it
    python train.py config/stdlib_ntp.py --resume               # go on as if it had never stopped
    torchrun --standalone --nproc_per_node=8 train.py config/cocomix_124m.py    # on many GPUs: the same losses

One step: the batch → what the concept model says of it (label concepts, a teacher's distribution) → the model's
next-token and concept losses → one backward. A method is a few choices: see METHODS, `model_config`, `step_losses`.
A run leaves ckpt.pt and log.jsonl in out_dir: a line for every log_interval steps and for every evaluation.
"""
import math
import platform
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from concepts import Guidance, LabelKeys, check_tokenizer, load_concept_model, open_labels, uses_bf16
from config import UserError, key
from model import GPT, RUN, ModelConfig, load_checkpoint, load_model, load_optimizer, model_checkpoint, perplexity, pick_device, save_checkpoint
from sae import model_hash


@dataclass(frozen=True)
class Config(LabelKeys):  # the keys that choose data and labels stand in concepts.py
    # what is trained
    method: Literal["ntp", "kd", "pause", "pause_kd", "cocomix", "cocomix_kd"] = key("ntp", "next-token prediction; with a teacher (KD), pause vectors, concepts")
    n_layer: int = key(12, "blocks", low=1, high=1000)
    n_head: int = key(12, "attention heads", low=1)
    n_embd: int = key(768, "width of the hidden states", low=1)
    dropout: float = key(0.0, "share of activations dropped", low=0, high=0.99)
    bias: bool = key(True, "biases in linear layers and LayerNorms")
    embedding_std: float = key(0.02, "of the token embedding at the start; a small width learns faster with about 1/sqrt(n_embd)", low=0)
    init_std: float = key(0.02, "standard deviation of the other matrices at the start: GPT-2's, for 768 features; fewer features need about 0.02·sqrt(768/n_embd)", low=0)
    # concepts
    insert_layer: int = key(5, "concepts are predicted and mixed in at the input of this block", low=0)
    concept_k: int = key(32, "predicted concepts kept by TopK", low=1)
    concept_weight: float = key(0.1, "weight of the concept loss", low=0)
    concept_lr_scale: float = key(1.0, "factor on the learning rate of the inserted module: concept head, compress matrix, pause vector", low=0)
    mix: Literal["interleave", "interleave_residual", "add", "none"] = key("interleave", "what joins the hidden states h: ĉ or h + ĉ after each, ĉ added, nothing")
    target: Literal["concept", "l1", "l2", "cos"] = key("concept", "what is predicted: concepts, or the concept model's hidden state itself, by this distance")
    kd_weight: float = key(0.1, "KD: weight of KL(concept model ‖ model)", low=0)
    labels: Literal["fly", "disk"] = key("fly", "label concepts made at each step, or read (concepts.py --write_labels made them)")
    # data and length
    batch_size: int = key(480, "sequences an optimizer step", low=1, high=1_000_000)
    micro_batch_size: int | Literal["auto"] = key("auto", "sequences at once in a process, at most; auto: what fits into the GPU's memory", low=1)
    max_iters: int = key(40000, "optimizer steps", low=0)
    max_tokens: int | None = key(None, "tokens to train on; sets max_iters", low=1)
    shift_blocks: bool = key(True, "shift the blocks by an offset of their own in each epoch")
    # optimizer
    learning_rate: float = key(6e-4, "peak", low=0)
    min_lr: float | None = key(None, "at the end of the cosine (none: a tenth of the peak)", low=0)
    warmup_iters: int | None = key(None, "steps of linear warm-up (none: 1/300 of the run)", low=0)
    weight_decay: float = key(0.1, "of matrices and embeddings", low=0)
    decay_all: bool = key(False, "weight decay of biases and LayerNorms, too, as the official code has it")
    beta1: float = key(0.9, "of AdamW", low=0, high=0.9999)
    beta2: float = key(0.95, "of AdamW", low=0, high=0.9999)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping", low=0)
    # run
    out_dir: str = key("out/run", "where ckpt.pt and log.jsonl go")
    eval_interval: int = key(1000, "steps between evaluations, each with a checkpoint", low=1)
    eval_iters: int = key(20, "batches of batch_size val sequences an evaluation", low=1)
    keep_checkpoints: bool = key(False, "keep the model of every evaluation, as step_N.pt, for eval.py --every")
    log_interval: int = key(10, "steps between two lines of the log", low=1)
    compile: bool | Literal["auto"] = key("auto", "torch.compile; auto: on CUDA")
    checkpoint_blocks: bool = key(False, "keep only the blocks' inputs for the backward and run them again there: less memory, a third more time")
    seed: int = key(1337, "of the initialisation and the data order", low=0, high=2**32 - 1)
    resume: bool = key(False, "go on from out_dir's checkpoint, if there is one")
    overwrite: bool = key(False, "start again though out_dir holds a run")
    wandb_log: bool = key(False, "send the log to Weights & Biases, too")
    wandb_project: str = key("cocomix", "there")
    wandb_run_name: str | None = key(None, "there (none: out_dir)")


# A run may be resumed with other values of these; the rest decides its losses.
FREE = ("out_dir", "eval_interval", "keep_checkpoints", "log_interval", "micro_batch_size", "device", "compile", "checkpoint_blocks", "resume", "overwrite",
        "wandb_log", "wandb_project", "wandb_run_name")

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}  # dense bf16


def peak_flops(device):
    """The device's dense bf16 FLOP/s, None where it isn't known."""
    return next((f for name, f in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name(device)), None)


class Method(NamedTuple):
    inserted: str  # between the blocks: none, pause, concept (with another target than concepts: hidden)
    taught: bool   # by the concept model's next-token distribution (KD)?


METHODS = {"ntp": Method("none", False), "kd": Method("none", True), "pause": Method("pause", False), "pause_kd": Method("pause", True),
           "cocomix": Method("concept", False), "cocomix_kd": Method("concept", True)}


def inserted(cfg):
    """What the run's model inserts: none, pause, concept or hidden."""
    kind = METHODS[cfg.method].inserted
    return "hidden" if kind == "concept" and cfg.target != "concept" else kind


def model_config(cfg, vocab_size, n_concepts=0, hidden_size=0):
    """The ModelConfig of a run. What tells one method from another is in these few fields and in `step_losses`."""
    return ModelConfig(
        block_size=cfg.block_size, vocab_size=vocab_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd,
        dropout=cfg.dropout, bias=cfg.bias, embedding_std=cfg.embedding_std, init_std=cfg.init_std, insert=inserted(cfg), mix=cfg.mix, insert_layer=cfg.insert_layer,
        n_concepts=n_concepts, concept_k=cfg.concept_k, hidden_size=hidden_size, distance="l2" if cfg.target == "concept" else cfg.target)


def learning_rate(cfg, step):
    """Of step `step` (from 0): linear warm-up whose first step is above 0, then a cosine to min_lr at the last."""
    warmup = max(1, cfg.max_iters // 300) if cfg.warmup_iters is None else cfg.warmup_iters
    low = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, cfg.max_iters - 1 - warmup))
    return low + (cfg.learning_rate - low) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model, cfg, device):
    """AdamW, decay on matrices and embeddings (dim ≥ 2) only, unless decay_all; fused where there is one. A group's lr_scale
    stands over the learning rate of the step."""
    groups = []
    for scale, inside in ((1.0, False), (cfg.concept_lr_scale, True)):
        parameters = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("inserted.") == inside]
        for matrices, decay in ((True, cfg.weight_decay), (False, cfg.weight_decay if cfg.decay_all else 0.0)):
            if some := [p for p in parameters if (p.dim() >= 2) == matrices]:
                groups.append(dict(params=some, weight_decay=decay, lr_scale=scale))
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=device.type in ("cpu", "cuda"))


class Losses(NamedTuple):
    """Means over positions, in nats; only total has a gradient, the others are for the log."""
    total: torch.Tensor           # what is minimised
    next_token: torch.Tensor
    concept: torch.Tensor | None  # of the predicted concepts, or the distance of the predicted hidden state
    kl: torch.Tensor | None       # KL(concept model ‖ model)


def step_losses(model, cfg, x, y, guidance=Guidance()):
    """The Losses of tokens x and targets y (B, T), under the concept model's guidance:

        total = next_token + kd_weight · kl + concept_weight · concept        the last two where the method has them
    """
    out = model(x, y, guidance.labels, teacher=guidance.teacher, kd_weight=cfg.kd_weight)
    total, next_token, concept = out.loss, out.loss.detach(), out.concept_loss
    if out.kl is not None:  # out.loss holds kd_weight · kl
        next_token = next_token - cfg.kd_weight * out.kl
    if concept is not None:
        total, concept = total + cfg.concept_weight * concept, concept.detach()
    return Losses(total, next_token, concept, out.kl)


@torch.no_grad()
def evaluate(model, cfg, batches, labels, ranks):
    """Mean next-token and concept loss over all processes' val batches [(x, y)]; labels, an iterable beside them, or None
    for a method without."""
    model.eval()
    rows, loss, concept = 0, 0.0, 0.0
    for (x, y), label in zip(batches, labels or [None] * len(batches)):
        losses = step_losses(model, cfg, x, y, Guidance(label))
        rows, loss = rows + len(x), loss + losses.next_token.item() * len(x)
        if labels is not None:
            concept += losses.concept.item() * len(x)
    model.train()
    rows, loss, concept = ranks.sum(rows, loss, concept)
    return loss / rows, concept / rows if labels is not None else None


def compiles(cfg, device):
    return cfg.compile is True or cfg.compile == "auto" and device.type == "cuda"


def compile_model(model):
    """torch.compile, for the shapes that come and no others."""
    torch._dynamo.config.optimize_ddp = False  # it would split the graph at DDP's buckets, and can't split our autograd functions
    return torch.compile(model, dynamic=False)


def step_bytes(model, concept_model, tokens, bf16=True):
    """Bytes that training on `tokens` tokens at once takes beside the models' weights: an estimate from above. 18 a
    parameter: the gradient (again in DDP's buckets), Adam's two moments, a copy in bfloat16; this alone of the frozen model."""
    labels = concept_model.gpt.activation_bytes(tokens, concept_model.layer + 1, bf16) + 2 * concept_model.gpt.num_params() if concept_model else 0
    return 18 * model.num_params() + max(model.activation_bytes(tokens, bf16=bf16, taught=bool(concept_model and concept_model.teaches)), labels)


def micro_batch(cfg, rows, model, concept_model, device):
    """How many of a process's `rows` sequences go through the model at once: the largest divisor within micro_batch_size, so
    that all micro batches are alike. auto: within nine tenths of a GPU's free memory, by `step_bytes`; else within 8 192 tokens."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    fits = ((lambda n: n <= cfg.micro_batch_size) if cfg.micro_batch_size != "auto" else
            (lambda n: n * cfg.block_size <= 8192) if free is None else
            (lambda n: step_bytes(model, concept_model, n * cfg.block_size, uses_bf16(cfg.dtype, device)) <= 0.9 * free))
    return max((n for n in range(1, rows + 1) if rows % n == 0 and fits(n)), default=1)


class Ranks:
    """The processes of a run that torchrun started, one a GPU; without torchrun this one alone.

    Every process draws its own rows of the global batch. What they have to agree on goes through here.
    """
    size, rank, first = config.WORLD_SIZE, config.RANK, config.RANK == 0  # the first one writes

    def join(self, device):
        """Connect the processes: what fails before fails in each of them alike."""
        self.device = device
        if self.size > 1:
            own = device if device.type == "cuda" else None
            dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(minutes=30), device_id=own)

    def wait(self):
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first_on_machine(self):
        """The body runs in one process a machine first, then in the others, which find what it fetched."""
        if config.LOCAL_RANK:
            self.wait()
        yield
        if not config.LOCAL_RANK:
            self.wait()

    def sum(self, *values):
        """Numbers or scalar tensors of each process → their sums, floats, the same in all."""
        values = [float(v) for v in values]
        if self.size > 1:
            values = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(values)
            values = values.tolist()
        return values

    def largest(self, number):
        """The largest of the processes' numbers, an int."""
        if self.size > 1:
            number = torch.tensor(number, device=self.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def parallel(self, model):
        """A model whose backward leaves the processes' mean gradient in each of them."""
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.size > 1 else model

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()


def wandb_log(cfg):
    """wandb.log of a run that has begun. UserError: not installed, not logged in."""
    try:
        import wandb
    except ImportError as e:
        raise UserError("wandb_log needs the package wandb: pip install wandb; log.jsonl is written without it, too") from e
    try:
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or cfg.out_dir, config=asdict(cfg))
    except Exception as e:  # its own kinds
        raise UserError(f"wandb does not start ({type(e).__name__}: {e}): wandb login, or WANDB_MODE=offline, or leave --wandb_log out") from e
    return wandb.log


def read_config(argv):
    """The Config of a command line. UserError: keys that don't go together."""
    cfg, _ = config.parse(Config, argv, __doc__, most=0)
    given = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    if {"max_iters", "max_tokens"} <= given:
        raise UserError("--max_iters and --max_tokens exclude each other: one sets the other")
    if cfg.max_tokens is not None and "max_iters" not in given:  # the command line goes over a config file's max_tokens
        cfg = config.replace(cfg, max_iters=-(-cfg.max_tokens // (cfg.batch_size * cfg.block_size)))
    if not cfg.out_dir.strip():
        raise UserError("out_dir is empty: name a folder, such as --out_dir=out/run")
    if cfg.min_lr is not None and cfg.min_lr > cfg.learning_rate:
        raise UserError(f"min_lr={cfg.min_lr} is over learning_rate={cfg.learning_rate}: the rate falls from the one to the other")
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume and --overwrite exclude each other: go on with the run, or start it again?")
    return cfg


def main(argv):
    cfg = read_config(argv)
    device, out, ranks = pick_device(cfg.device), Path(cfg.out_dir), Ranks()
    checkpoint, log_path, tokens_a_step = out / "ckpt.pt", out / "log.jsonl", cfg.batch_size * cfg.block_size

    # before anything is loaded: is there a run here already, is there data
    content = None
    if checkpoint.is_file() and not cfg.overwrite:
        if not cfg.resume:
            raise UserError(f"{out} holds a run already; --resume goes on with it, --overwrite starts again, --out_dir=… starts another")
        content = load_checkpoint(checkpoint, (*RUN, "optimizer", "step", "seconds", "val_loss", "best_val_loss"))
        config.check_same(content["train_config"], asdict(cfg), checkpoint, FREE)
        if content["step"] >= cfg.max_iters:
            print(f"{out}: already trained ({content['step']} steps, val loss {content['val_loss']:.4f} on its sample of val)")
            return
    if cfg.resume and content is None:
        print(f"{out}: nothing to resume, starting")
    meta = data.load_meta(cfg.dataset)
    vocab_size = meta["vocab_size"]
    if content is not None:
        data.tokens_of_run(content, "train")  # still of the same tokenizer?
    batches = data.Batches(data.load_tokens(cfg.dataset, "train"), cfg.block_size, cfg.batch_size, vocab_size, cfg.seed, cfg.shift_blocks, ranks.rank, ranks.size)
    # the same val blocks at every evaluation, whatever the seed and the processes; whole batches, so that all micro batches are alike
    val = data.Batches(data.load_tokens(cfg.dataset, "val"), cfg.block_size, 1, vocab_size, shift=False)
    val_rows = min(cfg.eval_iters * cfg.batch_size, val.blocks // cfg.batch_size * cfg.batch_size or val.blocks)

    # the models
    ranks.join(device)
    bf16 = uses_bf16(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    concept_model, n_concepts, hidden_size, disk = None, 0, 0, None
    predicts, taught = inserted(cfg) in ("concept", "hidden"), METHODS[cfg.method].taught
    if predicts or taught:
        with ranks.first_on_machine():
            concept_model, tokenizer = load_concept_model(cfg, device, inserted(cfg), taught, compiles(cfg, device))
        check_tokenizer(cfg, meta, tokenizer, concept_model.gpt)
        hidden_size, n_concepts = concept_model.gpt.config.n_embd, len(concept_model.sae.encoder) if concept_model.sae else 0
    if cfg.labels == "disk":
        if inserted(cfg) != "concept":
            raise UserError(f"labels='disk' is for methods that predict concepts, not for method={cfg.method!r} with target={cfg.target!r}")
        if cfg.shift_blocks:
            raise UserError("labels='disk' needs --shift_blocks=false: labels are stored for unshifted blocks")
        disk = open_labels(concept_model, cfg)
    torch.manual_seed(cfg.seed)  # here, so that what all methods share starts the same
    model = GPT(model_config(cfg, vocab_size, n_concepts, hidden_size)).to(device) if content is None else load_model(content, device)
    if predicts and cfg.mix == "none" and not cfg.concept_weight:
        model.inserted.requires_grad_(False)  # it takes no part, and DDP would wait for its gradient
    model.checkpoint_blocks = cfg.checkpoint_blocks
    micro = micro_batch(cfg, cfg.batch_size // ranks.size, model, concept_model, device)
    optimizer = make_optimizer(model, cfg, device)
    step, seconds, best = 0, 0.0, math.inf
    if content is not None:
        load_optimizer(optimizer, content, checkpoint)
        step, seconds, best = content["step"], content["seconds"], content["best_val_loss"]
    if ranks.sum(step) != [step * ranks.size]:
        raise UserError(f"some processes found {checkpoint} and others another one or none: out_dir must be a folder that all machines share")
    compiled = compile_model(model) if compiles(cfg, device) else model
    parallel = ranks.parallel(compiled)
    guided = concept_model is not None and (taught or predicts and cfg.concept_weight > 0)  # is it asked at every step?
    flops, concept_flops = model.flops_per_token(), concept_model.flops_per_token(cfg.block_size) if guided else 0
    log = config.Log(log_path, step, wandb_log(cfg) if cfg.wandb_log and ranks.first else None)
    if log.empty:
        log.write(dict(step=step, method=cfg.method, seed=cfg.seed, max_iters=cfg.max_iters, params=model.num_params(), active_params=model.num_params(active=True), flops_per_token=flops,
                       concept_flops_per_token=concept_flops, labels=cfg.labels if predicts else None,
                       concept_model_hash=model_hash(concept_model.gpt) if concept_model else None,
                       device=torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} {device.type}", threads=torch.get_num_threads(), processes=ranks.size,
                       torch=torch.__version__, source_hash=meta.get("source_hash")))
    print(f"{cfg.method}: {model.num_params(active=True) / 1e6:.2f}M active of {model.num_params() / 1e6:.2f}M parameters, "
          f"{(flops + concept_flops) / 1e6:.1f} MFLOP a token, {cfg.max_iters} steps of {tokens_a_step} tokens, on {f'{ranks.size} × ' if ranks.size > 1 else ''}{device.type}, {micro} sequences at once")
    peak = peak_flops(device)

    val_loss = content["val_loss"] if content else math.nan
    rows = [val[i] for i in range(ranks.rank, val_rows, ranks.size)]
    val_batches = [tuple(torch.cat(t).to(device) for t in zip(*rows[i:i + micro])) for i in range(0, len(rows), micro)]
    val_labels = None
    if predicts and step < cfg.max_iters:
        val_labels = lambda: (concept_model.labels(x, y) for x, y in val_batches)
        if inserted(cfg) == "concept":  # small, and the same every time: made once
            kept = list(val_labels())
            val_labels = lambda: kept
    if disk is not None:  # what is left to ask of the concept model: its distribution, or nothing
        guided, concept_model = taught, concept_model.without_concepts() if taught else None

    run = dict(train_config=asdict(cfg), tokenizer=meta["tokenizer"], tokenizer_hash=meta["tokenizer_hash"])

    def save():
        for name, p in model.named_parameters():
            finite(f"the weight {name}", p.abs().max().item())
        if ranks.first:
            save_checkpoint(checkpoint, **model_checkpoint(model, **run, optimizer=optimizer.state_dict(), step=step, seconds=seconds, val_loss=val_loss, best_val_loss=best))
        ranks.wait()

    def evaluation():
        nonlocal val_loss, best
        with autocast:
            val_loss, concept_loss = evaluate(compiled, cfg, val_batches, val_labels and val_labels(), ranks)
        finite("the val loss", val_loss)
        best = min(best, val_loss)
        line = dict(step=step, tokens=step * tokens_a_step, val_loss=val_loss, seconds=seconds)
        if concept_loss is not None:
            line["val_concept_loss"] = concept_loss
        log.write(line)

    def finite(name, value, at=None):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {step if at is None else at}: not finite; "
                            + (f"the last good checkpoint is {checkpoint}; a learning_rate below {cfg.learning_rate} may help" if step else "nothing is written; look at the data and at embedding_std"))

    with config.Stop() as stop, config.progress(cfg.max_iters * tokens_a_step, cfg.method, "tok", initial=step * tokens_a_step, unit_scale=True) as bar:
        model.train()
        if step == 0:
            evaluation()
            save()
            for stale in (*out.glob("step_*.pt"), *out.glob("eval.jsonl")) if ranks.first else ():  # of a run that this one overwrites
                stale.unlink()
            log.begin()
        since, clock, norms, spikes = step, time.perf_counter(), [], config.Spikes()
        for x, y, labels in batches.prefetch(step, cfg.max_iters, device, disk):
            torch.manual_seed(data.mixed_seed(cfg.seed, step, ranks.rank))  # of dropout: nothing to save but the step
            means = {}
            for first in range(0, len(x), micro):
                rows = slice(first, first + micro)
                guidance = concept_model.guide(x[rows], y[rows]) if guided else Guidance()
                if labels is not None:
                    guidance = guidance._replace(labels=labels[rows])
                if ranks.size > 1:  # the processes' gradients meet once a step, in the last backward
                    parallel.require_backward_grad_sync = rows.stop == len(x)
                with autocast:
                    losses = step_losses(parallel, cfg, x[rows], y[rows], guidance)
                share = micro / len(x)
                (losses.total * share).backward()
                for name, value in (("loss", losses.next_token), ("concept_loss", losses.concept), ("kl", losses.kl)):
                    if value is not None:
                        means[name] = means.get(name, 0) + value * share
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, step) * group.get("lr_scale", 1.0)  # a checkpoint of older code has none
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update(tokens_a_step)

            last = step == cfg.max_iters
            at_eval = step % cfg.eval_interval == 0 or last
            stopping = ranks.largest(stop.signal or 0)  # read once: a signal in what follows belongs to the next step
            if step % cfg.log_interval == 0 or at_eval or stopping:
                norms = torch.stack(norms).tolist()  # waits for the device
                for at, norm in enumerate(norms, since + 1):
                    finite("the gradient's norm", norm, at)
                means = {name: total / ranks.size for name, total in zip(means, ranks.sum(*means.values()))}
                for name, value in means.items():
                    finite("the " + name.replace("_", " "), value)
                spikes.see("loss", means["loss"], step, f"if it does not come down again, begin anew with a learning_rate below {cfg.learning_rate}")
                now = time.perf_counter()
                seconds += now - clock
                speed = (step - since) * tokens_a_step / (now - clock)
                line = dict(step=step, tokens=step * tokens_a_step, **means, lr=learning_rate(cfg, step - 1), grad_norm=norm, tokens_per_s=speed, seconds=seconds)
                text = " ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in means.items())
                if peak:
                    line["mfu"] = speed * (flops + guided * concept_flops) / (peak * ranks.size)
                    text += f" MFU {line['mfu']:.1%}"
                log.write(line)
                bar.set_postfix_str(text + (f" val {val_loss:.3f}" if math.isfinite(val_loss) else ""))
                if at_eval:
                    evaluation()
                if at_eval and cfg.keep_checkpoints and ranks.first:  # first: a run killed in between writes it again
                    save_checkpoint(out / f"step_{step}.pt", **model_checkpoint(model, **run, step=step))
                if at_eval or stopping:
                    save()
                since, clock, norms = step, time.perf_counter(), []
            if stopping and not last:
                ranks.leave()
                return stop.leave(stopping, checkpoint, step)
    ranks.leave()
    print(f"{out}: val loss {val_loss:.4f} (perplexity {perplexity(val_loss):.2f}) on {val_rows * cfg.block_size:,} tokens of val after {step} steps, {step * tokens_a_step / max(seconds, 1e-9):,.0f} tokens/s")


if __name__ == "__main__":
    config.run(main)
