"""Train a GPT on next tokens and, with CoCoMix, on concepts.

    python train.py config/stdlib_cocomix.py                    # a config file
    python train.py config/stdlib_ntp.py --learning_rate=1e-3   # … and keys that override it
    python train.py config/stdlib_ntp.py --resume               # continue as if never interrupted
    torchrun --standalone --nproc_per_node=8 train.py config/cocomix_124m.py    # on 8 GPUs

One step minimises

    next-token loss + kd_weight · KL(concept model ‖ model) + concept_weight · L_concept    (eq. 4)

without the terms that a method does not have. A run writes ckpt.pt and log.jsonl to out_dir.
"""
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from support.runtime import Stop  # before torch

import torch

from concepts import SELECTS, Targets, load_concept_model
from model import GPT, ModelConfig, load_model
from support import runtime
from support.ablations import MIXES
from support.cli import key
from support.device import should_compile
from support.files import mixed_seed
from support.labels import open_labels
from support.published import start_from
from support.tokens import check_tokenizer
from support.training import TrainingRun, read_config

@dataclass(frozen=True)
class Config:
    method: Literal["ntp", "kd", "pause", "pause_kd", "cocomix", "cocomix_kd"] = key(
        "ntp", "ntp: next tokens only; kd: with a teacher; pause vectors; cocomix: concepts")
    n_layer: int = key(12, "blocks", low=1, high=1000)
    n_head: int = key(12, "attention heads", low=1)
    n_embd: int = key(768, "width of the hidden states", low=1)
    dropout: float = key(0.0, "share of activations dropped", low=0, high=0.99)
    bias: bool = key(True, "biases in linear layers and LayerNorms")
    embedding_std: float = key(0.02, "initial std of the token embedding", low=0)
    init_std: float = key(0.02, "… of other matrices; narrow: 0.02·sqrt(768/n_embd)", low=0)
    init_from: str | None = key(None, "weights to start from: gpt2, its folder, or a run")
    # concepts
    insert_layer: int = key(5, "the mixer sits at the input of this block", low=0)
    concept_k: int = key(32, "predicted concepts kept by TopK", low=1)
    concept_weight: float = key(0.1, "λ, weight of the concept loss", low=0)
    concept_lr_scale: float = key(1.0, "factor on the mixer's learning rate", low=0)
    mix: Literal[MIXES] = key(
        "interleave", "insert ĉ after each h, or h + ĉ after each h; add ĉ to h; insert nothing")
    target: Literal["concept", "l1", "l2", "cos"] = key(
        "concept", "what the mixer predicts; l1, l2, cos: the hidden state, with this distance")
    kd_weight: float = key(0.1, "weight of KL(concept model ‖ model), in methods with kd", low=0)
    labels: Literal["fly", "disk"] = key("fly", "computed at each step (fly), or beforehand (disk)")
    concept_model: str = key("gpt2", "the frozen GPT to learn from: a run, GPT-2 weights, or gpt2")
    sae: str = key("openai", "its SAE: a run of sae.py, a published .pt, openai or openai_128k")
    concept_layer: int = key(5, "the SAE reads the hidden state after this block", low=0)
    attr_k: int = key(4, "label concepts per position", low=1)
    select: Literal[SELECTS] = key("attribution", "how labels are selected")
    attribution: Literal["code", "paper"] = key("code", "among active concepts, or all (eq. 1)")
    attribution_sign: Literal["raise", "lower", "abs"] = key("raise", "labels' effect on the loss")
    # data and length
    dataset: str = key("openwebtext", "a name under data/, or the path of a dataset")
    block_size: int = key(1024, "context length in tokens", low=1)
    batch_size: int = key(480, "sequences per optimizer step", low=1, high=1_000_000)
    micro_batch_size: int | Literal["auto"] = key("auto", "sequences per pass, at most", low=1)
    max_iters: int = key(40000, "optimizer steps", low=0)
    max_tokens: int | None = key(None, "tokens to train on; sets max_iters", low=1)
    shift_blocks: bool = key(True, "shift the blocks by a random offset in each epoch")
    # optimizer
    learning_rate: float = key(6e-4, "peak", low=0)
    min_lr: float | None = key(None, "at the end of the cosine (none: a tenth of the peak)", low=0)
    warmup_iters: int | None = key(None, "linear warm-up (none: 1/300 of the run)", low=0)
    weight_decay: float = key(0.1, "of matrices and embeddings", low=0)
    decay_all: bool = key(False, "also decay biases and LayerNorms, as the official code does")
    beta1: float = key(0.9, "of AdamW", low=0, high=0.9999)
    beta2: float = key(0.95, "of AdamW", low=0, high=0.9999)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", low=0)
    # run
    out_dir: str = key("out/run", "folder for ckpt.pt and log.jsonl")
    eval_interval: int = key(1000, "steps between evaluations, each with a checkpoint", low=1)
    eval_iters: int = key(20, "batches of batch_size val sequences per evaluation", low=1)
    keep_checkpoints: bool = key(False, "keep the model of every evaluation as step_N.pt")
    log_interval: int = key(10, "steps between two lines of the log", low=1)
    device: str = key("auto", "cpu, cuda, cuda:1 or mps; auto: the fastest available")
    dtype: Literal["auto", "float32", "bfloat16"] = key("auto", "auto: bfloat16 on A100 and newer")
    compile: bool | Literal["auto"] = key("auto", "torch.compile; auto: on GPUs with Triton")
    checkpoint_blocks: bool = key(False, "recompute blocks in the backward: less memory, slower")
    seed: int = key(1337, "for initialisation and data order", low=0, high=2**32 - 1)
    resume: bool = key(False, "resume from out_dir's checkpoint, if there is one")
    overwrite: bool = key(False, "replace the run in out_dir")
    wandb_log: bool = key(False, "also log to Weights & Biases")
    wandb_project: str = key("cocomix", "its project")
    wandb_run_name: str | None = key(None, "its run name (none: out_dir)")

def inserts(cfg):
    """The method's mixer: none, pause, concept or hidden."""
    if cfg.method.startswith("cocomix"):
        return "concept" if cfg.target == "concept" else "hidden"
    return "pause" if cfg.method.startswith("pause") else "none"

def predicts(cfg):
    """Whether the mixer predicts what the concept model says: concepts, or its hidden state."""
    return inserts(cfg) in ("concept", "hidden")

def is_taught(cfg):
    return cfg.method.endswith("kd")  # has the KD term

def model_config(cfg, vocab_size, n_concepts=0, hidden_size=0):
    """The ModelConfig of a run."""
    return ModelConfig(
        block_size=cfg.block_size, vocab_size=vocab_size, n_layer=cfg.n_layer, n_head=cfg.n_head,
        n_embd=cfg.n_embd, dropout=cfg.dropout, bias=cfg.bias, embedding_std=cfg.embedding_std,
        init_std=cfg.init_std, insert=inserts(cfg), mix=cfg.mix, insert_layer=cfg.insert_layer,
        n_concepts=n_concepts, concept_k=cfg.concept_k, hidden_size=hidden_size,
        distance="l2" if cfg.target == "concept" else cfg.target)

def learning_rate(cfg, step):
    """At step `step` (from 0): linear warm-up, its first step above 0, then a cosine to min_lr."""
    warmup = max(1, cfg.max_iters // 300) if cfg.warmup_iters is None else cfg.warmup_iters
    low = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, cfg.max_iters - 1 - warmup))
    return low + (cfg.learning_rate - low) * (1 + math.cos(math.pi * done)) / 2

def make_optimizer(model, cfg, device):
    """AdamW with decay on matrices and embeddings only, unless decay_all. A group's lr_scale
    multiplies its learning rate."""
    vector_decay = cfg.weight_decay if cfg.decay_all else 0.0
    groups = []
    for scale, in_mixer in ((1.0, False), (cfg.concept_lr_scale, True)):
        params = [p for name, p in model.named_parameters()
                  if p.requires_grad and name.startswith("mixer.") == in_mixer]
        matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        for some, decay in ((matrices, cfg.weight_decay), (vectors, vector_decay)):
            if some:
                groups.append(dict(params=some, weight_decay=decay, lr_scale=scale))
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8,
                             fused=device.type in ("cpu", "cuda"))

class Losses(NamedTuple):
    """Means over positions, in nats; only total has a gradient."""
    total: torch.Tensor           # what is minimised (eq. 4)
    next_token: torch.Tensor
    concept: torch.Tensor | None  # L_concept, or the distance of the predicted hidden state
    kl: torch.Tensor | None       # KL(concept model ‖ model)

def step_losses(model, cfg, x, y, targets=Targets()):  # noqa: B008 (an immutable default)
    """The Losses of tokens x and the next tokens y, both (B, T)."""
    out = model(x, y, targets.labels, teacher=targets.teacher, kd_weight=cfg.kd_weight)
    total, next_token, concept = out.loss, out.loss.detach(), None
    if out.kl is not None:  # out.loss includes the KD term
        next_token = next_token - cfg.kd_weight * out.kl
    if out.concept_loss is not None:
        total = total + cfg.concept_weight * out.concept_loss
        concept = out.concept_loss.detach()
    return Losses(total, next_token, concept, out.kl)

def accumulate(run, concept_model, x, y, stored):
    """Forward and backward over the batch x, y (B, T), run.micro rows at a time (a divisor of B) →
    its mean losses by name. concept_model: None if not asked; stored: labels from disk, or None."""
    means, share = {}, run.micro / len(x)
    for first in range(0, len(x), run.micro):
        rows = slice(first, first + run.micro)
        targets = concept_model.concept_targets(x[rows], y[rows]) if concept_model else Targets()
        if stored is not None:
            targets = targets._replace(labels=stored[rows])
        if run.ranks.size > 1:  # the processes exchange gradients once, in the last backward
            run.parallel.require_backward_grad_sync = rows.stop == len(x)
        with run.autocast:
            losses = step_losses(run.parallel, run.cfg, x[rows], y[rows], targets)
        (losses.total * share).backward()
        for name, value in (("loss", losses.next_token), ("concept_loss", losses.concept),
                            ("kl", losses.kl)):  # the names in log.jsonl
            if value is not None:
                means[name] = means.get(name, 0) + value * share
    return means

def update(model, optimizer, cfg, step):
    """Clip the gradient and take optimizer step `step` (from 0) → the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step) * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

@torch.no_grad()
def evaluate(run, batches):
    """(mean next-token loss, mean concept loss or None) over the val batches of all processes."""
    run.model.eval()
    rows, loss, concept = 0, 0.0, 0.0
    with run.autocast:
        for x, y, labels in batches:
            losses = step_losses(run.compiled, run.cfg, x, y, Targets(labels))
            rows, loss = rows + len(x), loss + losses.next_token.item() * len(x)
            concept += 0.0 if labels is None else losses.concept.item() * len(x)
    run.model.train()
    rows, loss, concept = run.ranks.sum(rows, loss, concept)
    return loss / rows, concept / rows if batches.predicts else None

def open_concept_model(cfg, run):
    """(ConceptModel, labels stored on disk) of a run; None for what its method does not need."""
    if inserts(cfg) in ("none", "pause") and not is_taught(cfg):
        return None, None
    with run.ranks.first_on_machine():
        concept_model, tokenizer = load_concept_model(
            cfg, run.device, inserts(cfg), is_taught(cfg), should_compile(cfg, run.device))
    check_tokenizer(cfg, run.meta, tokenizer, concept_model.gpt)
    stored = cfg.labels == "disk" and cfg.concept_weight > 0
    return concept_model, open_labels(concept_model, cfg, run.content) if stored else None

def asked(cfg, concept_model):
    """What training steps run of the ConceptModel: all of it, its distribution only, or None."""
    if predicts(cfg) and cfg.concept_weight > 0 and cfg.labels == "fly":
        return concept_model
    return concept_model.distribution_only() if is_taught(cfg) else None

def build_model(cfg, run, concept_model):
    """The run's GPT: new, from init_from's weights, or the one it resumes."""
    torch.manual_seed(cfg.seed)  # here, so that what all methods share starts from the same weights
    if run.content is not None:
        model = load_model(run.content, run.device)
    else:
        hidden_size = concept_model.gpt.config.n_embd if concept_model else 0
        n_concepts = len(concept_model.sae.encoder) if concept_model and concept_model.sae else 0
        model = GPT(model_config(cfg, run.vocab_size, n_concepts, hidden_size)).to(run.device)
        if cfg.init_from:
            with run.ranks.first_on_machine():
                start_from(cfg.init_from, model, run.meta["tokenizer_hash"], concept_model)
    if predicts(cfg) and cfg.mix == "none" and not cfg.concept_weight:
        model.mixer.requires_grad_(False)  # unused; DDP would wait for its gradient
    model.checkpoint_blocks = cfg.checkpoint_blocks
    return model

def main(argv):
    """The TrainingRun holds data, step, log and checkpoints; what CoCoMix adds is in accumulate."""
    cfg = read_config(Config, argv, __doc__)
    run = TrainingRun(cfg)
    if run.finished:
        return
    concept_model, stored_labels = open_concept_model(cfg, run)
    model = build_model(cfg, run, concept_model)
    optimizer = make_optimizer(model, cfg, run.device)
    at_steps = asked(cfg, concept_model)
    run.attach(model, optimizer, concept_model, at_steps)
    val = run.validation_batches(concept_model if predicts(cfg) else None)
    del concept_model  # freed at the start, where labels come from disk
    with Stop() as stop, run.start():
        model.train()
        if run.step == 0:
            run.evaluated(*evaluate(run, val))
            run.save()
        for x, y, labels in run.training_batches(stored_labels):
            torch.manual_seed(mixed_seed(cfg.seed, run.step, run.ranks.rank))  # of dropout
            means = accumulate(run, at_steps, x, y, labels)
            run.advance(update(model, optimizer, cfg, run.step))
            # read once: a signal that comes later ends the next step
            stopping = run.ranks.largest(stop.signal or 0)
            if run.at_log or stopping:
                run.report(means, learning_rate(cfg, run.step - 1))
            if run.at_eval:
                run.evaluated(*evaluate(run, val))
            if run.at_eval or stopping:
                run.save()
            if stopping and not run.last:
                run.ranks.leave()
                return stop.leave(stopping, run.checkpoint, run.step)
    run.end()

if __name__ == "__main__":
    runtime.run(main, parallel=True)
