"""What surrounds a training loop: data, resuming, log, checks, timing, checkpoints."""
import gc
import math
import platform
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from support.runtime import RANK, UserError, explain, progress

import torch

from support import accounting, checkpoint, tokens
from support.cli import parse
from support.curves import perplexity
from support.device import compile_model, pick_device, should_compile, uses_bf16
from support.distributed import Ranks
from support.log import Log, SpikeDetector, read_log

def keys_in(argv):
    """The keys that a command line gives, those of its config files left out."""
    return {a.lstrip("-").partition("=")[0].replace("-", "_") for a in argv if a.startswith("--")}

def read_config(cls, argv, doc):
    """The Config of train.py from a command line. UserError: keys that contradict each other."""
    cfg, _ = parse(cls, argv, doc, most=0)
    given, both = keys_in(argv), {"max_iters", "max_tokens"}
    if both <= cfg.given and len(both & given) != 1:
        raise UserError("max_iters and max_tokens exclude each other: one sets the other")
    if cfg.max_tokens is not None and "max_iters" not in given:
        cfg = replace(cfg, max_iters=-(-cfg.max_tokens // (cfg.batch_size * cfg.block_size)))
    if cfg.min_lr is not None and cfg.min_lr > cfg.learning_rate:
        raise UserError(f"min_lr={cfg.min_lr} is over learning_rate={cfg.learning_rate}")
    if cfg.labels == "disk":
        if not cfg.method.startswith("cocomix") or cfg.target != "concept":
            raise UserError("labels='disk' is for methods that predict concepts, not for method="
                            f"{cfg.method!r} with target={cfg.target!r}")
        if cfg.shift_blocks:
            raise UserError("labels='disk' needs --shift_blocks=false: labels are stored unshifted")
    if (cfg.warmup_iters or 0) > cfg.max_iters:
        print(f"note: warmup_iters={cfg.warmup_iters} of max_iters={cfg.max_iters} steps: the "
              "learning rate does not reach its peak")
    if unused := [name for name in unused_keys(cfg) if name in given]:
        print(f"note: method={cfg.method!r} does not use {', '.join(unused)}")
    return cfg

def unused_keys(cfg):
    """The keys that the run's method (and target and select) does not use."""
    cocomix, kd = cfg.method.startswith("cocomix"), cfg.method.endswith("kd")
    mixer, concepts = cocomix or cfg.method.startswith("pause"), cocomix and cfg.target == "concept"
    attribution = concepts and cfg.select == "attribution"
    used = dict(insert_layer=mixer, mix=mixer, concept_lr_scale=mixer, target=cocomix,
                concept_weight=cocomix, concept_layer=cocomix, concept_k=concepts, labels=concepts,
                sae=concepts, attr_k=concepts, select=concepts, attribution=attribution,
                attribution_sign=attribution, kd_weight=kd, concept_model=cocomix or kd)
    return [name for name, is_used in used.items() if not is_used]

def start_wandb(cfg, run_id):
    """(wandb.log, the run's id) of a new wandb run, or of the one with this id. UserError: not
    installed, not logged in."""
    remedy = "pip install wandb, run wandb login, set WANDB_MODE=offline, or drop --wandb_log"
    with explain("wandb does not start", remedy, Exception):
        import wandb
        if not hasattr(wandb, "init"):
            raise ImportError("the folder wandb/ here is not the package")
        started = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or cfg.out_dir,
                             config=asdict(cfg), id=run_id, resume="allow")
    return wandb.log, started.id

class Run:
    """What the runs of train.py and sae.py share: resuming, counting, checks, progress bar, clock.
    """
    def __init__(self, cfg, steps, tokens_per_step):
        if not cfg.out_dir.strip():
            raise UserError("out_dir is empty: name a folder, such as --out_dir=out/run")
        if cfg.resume and cfg.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        self.cfg, self.steps, self.tokens_per_step = cfg, steps, tokens_per_step
        self.out = Path(cfg.out_dir)
        self.checkpoint = self.out / self.file
        self.content = self._open()
        state = self.content or dict(step=0, seconds=0.0)
        self._move_to(state["step"])
        self.seconds = state["seconds"]
        self.unchecked, self.spikes = [], SpikeDetector()
        self.remedy = (f"starting again with --overwrite and a learning_rate below "
                       f"{cfg.learning_rate} may help")

    def _open(self):
        """The content of out_dir's checkpoint if this run continues it, else None."""
        exists = self.checkpoint.is_file()
        others = {"ckpt.pt", "sae_ckpt.pt"} - {self.file}
        if not exists and not self.cfg.overwrite:
            others.update(("log.jsonl", *self.files))
        for path in sorted(checkpoint.files_of_run(self.out, *others)):
            raise UserError(f"{self.out} holds {path.name}, which is not of this run; choose "
                            "another --out_dir")
        if not exists or self.cfg.overwrite:
            if self.cfg.resume:
                print(f"{self.out}: nothing to resume, starting at step 0")
            return None
        if not self.cfg.resume:
            raise UserError(f"{self.out} already holds a run; --resume continues it, --overwrite "
                            "replaces it, --out_dir=… starts another")
        content = checkpoint.load_checkpoint(self.checkpoint, self.needs)
        for name in content[self.config].keys() - asdict(self.cfg).keys():
            raise UserError(f"{self.checkpoint} has {name}={content[self.config][name]!r}, a key "
                            "of another script: resume it with that, or choose another --out_dir")
        extended = ""
        for name, value in asdict(self.cfg).items():
            before = content[self.config].get(name, value)  # a newer version has more keys
            if name in self.free or before == value:
                continue
            if name == "max_iters" and content["step"] == before < value:
                extended = (f"{self.out}: extended from {before} to {value} steps; the learning "
                            f"rate rises to where the schedule of {value} steps is there")
                continue
            raise UserError(f"{self.checkpoint} has {name}={before!r}, but now it is {value!r}: "
                            "take it back, or choose another --out_dir")
        if extended:
            print(extended)
        content[self.config] = asdict(self.cfg)
        return content

    def begin(self):
        """The first checkpoint is written: what is left of an older run goes."""
        if RANK == 0:
            for path in checkpoint.files_of_run(self.out, *self.files):
                path.unlink()
        self.log.begin()

    @contextmanager
    def start(self):
        """`with run.start()`: the bar is shown, the clock runs."""
        with progress(self.steps * self.tokens_per_step, self.title, "tok", initial=self.tokens,
                      unit_scale=True) as self.bar:
            self.content = None
            gc.collect()  # the checkpoint, and a compiled model that is no longer needed
            self.clock = time.perf_counter()
            yield

    def _move_to(self, step):
        self.step, self.tokens, self.last = step, step * self.tokens_per_step, step == self.steps

    def lap(self):
        """Seconds since the last lap."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before

    def advance(self, value):
        """One optimizer step was taken. value: a scalar tensor that `check_steps` will read."""
        self.unchecked.append(value)
        self._move_to(self.step + 1)
        self.bar.update(self.tokens_per_step)

    def finite(self, name, value, step=None):
        """UserError if a number of a step (default: the last one) is NaN or infinite."""
        if not math.isfinite(value):
            remedy = "nothing was written; check the data and embedding_std"
            if self.step:
                remedy = f"the last good checkpoint is {self.checkpoint}; {self.remedy}"
            step = self.step if step is None else step
            raise UserError(f"{name} is {value} at step {step}: not finite; {remedy}")

    def check_steps(self, name):
        """Check the value of every step since the last call → these values, as floats."""
        values = torch.stack(self.unchecked).tolist()  # waits for the device
        for step, value in enumerate(values, self.step - len(values) + 1):
            self.finite(name, value, step)
        self.unchecked = []
        return values

    def check_weights(self, model):
        for name, p in model.named_parameters():
            self.finite(f"the weight {name}", p.abs().max().item())

class TrainingRun(Run):
    """A run of train.py: its data, where it is (step, seconds, losses), its log and checkpoints."""
    file, config = "ckpt.pt", "train_config"
    files = "eval.jsonl", "step_*.pt"  # what else belongs to a run
    needs = *checkpoint.RUN, "optimizer", "step", "seconds", "val_loss", "best_val_loss"
    # keys that may change on resume; all others affect the losses (micro_batch_size with dropout,
    # too: the masks differ)
    free = ("dataset", "concept_model", "sae", "out_dir", "eval_interval", "keep_checkpoints",
            "log_interval", "max_tokens", "micro_batch_size", "device", "compile", "resume",
            "checkpoint_blocks", "init_from", "overwrite", "wandb_log", "wandb_project",
            "wandb_run_name")

    def __init__(self, cfg):
        self.ranks, self.title, self.device = Ranks(), cfg.method, pick_device(cfg.device)
        place = Path(cfg.concept_model).resolve()
        place = place.parent if place.is_file() else place
        if (cfg.overwrite and place == Path(cfg.out_dir).resolve()
                and "concept_model" not in unused_keys(cfg)):
            raise UserError(f"--overwrite would replace the concept model in out_dir="
                            f"{cfg.out_dir!r}; choose another --out_dir")
        super().__init__(cfg, cfg.max_iters, cfg.batch_size * cfg.block_size)
        losses = self.content or dict(val_loss=math.nan, best_val_loss=math.inf)
        self.val_loss, self.best_val_loss = losses["val_loss"], losses["best_val_loss"]
        self.finished = self.content is not None and self.step >= cfg.max_iters
        if self.finished:
            print(f"{self.out}: already trained ({self.step} steps, val loss {self.val_loss:.4f} "
                  "on its val sample)")
            return
        self.meta = tokens.load_meta(cfg.dataset)
        self.vocab_size = self.meta["vocab_size"]
        train, val = (tokens.load_tokens(cfg.dataset, split) for split in ("train", "val"))
        if self.content is not None:  # they must be unchanged
            tokens.tokens_of_run(self.content, "train")
            tokens.tokens_of_run(self.content, "val")
        self.uses = {"train.bin": tokens.tokens_hash(train), "val.bin": tokens.tokens_hash(val)}
        tokenizer = tokens.tokenizer_of_dataset(cfg.dataset)
        file = tokens.tokenizer_file(tokenizer._mergeable_ranks) if tokenizer else b""
        self.tokenizer_file = torch.tensor(list(file), dtype=torch.uint8)
        self.batches = tokens.Batches(train, cfg.block_size, cfg.batch_size, self.vocab_size,
                                      cfg.seed, cfg.shift_blocks, self.ranks.rank, self.ranks.size)
        self.val_blocks = tokens.Batches(val, cfg.block_size, 1, self.vocab_size, shift=False,
                                         split="val")
        self.ranks.join(self.device)

    def attach(self, model, optimizer, concept_model, at_steps):
        """Take the models, resume the optimizer, open the log. at_steps: the part of the concept
        model that the steps ask, or None."""
        cfg, ranks = self.cfg, self.ranks
        self.model, self.optimizer = model, optimizer
        # before the optimizer's state and DDP's buckets take the memory that it counts
        self.micro = accounting.micro_batch(cfg, cfg.batch_size // ranks.size, model, concept_model,
                                            self.device)
        if self.content is not None:
            checkpoint.load_optimizer(optimizer, self.content, self.checkpoint)
            checkpoint.check_models(self.content, concept_model)
        self.uses |= checkpoint.models_used(concept_model)
        if ranks.sum(self.step) != [self.step * ranks.size]:
            raise UserError(f"processes disagree about {self.checkpoint}: out_dir must be a folder "
                            "that all machines share")
        self.compiled = compile_model(model) if should_compile(cfg, self.device) else model
        self.parallel = ranks.parallel(self.compiled)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16,
                                       enabled=uses_bf16(cfg.dtype, self.device))
        place = self._place()
        head, labels = self._head() | place, self.model.config.insert in ("concept", "hidden")
        flops = [accounting.label_flops_per_token(asked, cfg.block_size) for asked in
                 (at_steps, concept_model if labels and cfg.concept_weight > 0 else at_steps)]
        self.flops = head["flops_per_token"] + flops[0]
        head["concept_flops_per_token"] = flops[1]  # also where labels come from disk
        also, self.wandb_id = None, (self.content or {}).get("wandb_id")
        if cfg.wandb_log and ranks.first:
            also, self.wandb_id = start_wandb(cfg, self.wandb_id)
        self.log = Log(self.out / "log.jsonl", self.step, also,
                       dict(max_iters=cfg.max_iters) | self._moved(place))
        if self.log.empty:
            self.log.write(head)
        where = f"{ranks.size} × " * (ranks.size > 1) + self.device.type
        print(f"{cfg.method}: {head['active_params'] / 1e6:.2f}M active of "
              f"{head['params'] / 1e6:.2f}M parameters, {self.flops / 1e6:.1f} MFLOP per token, "
              f"{cfg.max_iters} steps of {self.tokens_per_step} tokens on {where}, {self.micro} "
              "sequences at a time")

    def _place(self):
        """Where this run computes, for the first line of log.jsonl."""
        device = f"{platform.machine()} {self.device.type}"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name()
        return dict(device=device, threads=torch.get_num_threads(), processes=self.ranks.size,
                    torch=torch.__version__,
                    dtype="bfloat16" if uses_bf16(self.cfg.dtype, self.device) else "float32")

    def _moved(self, place):
        """Where a resumed run now computes elsewhere: an entry of the log's first line, with the
        places of earlier moves, and a line that says so."""
        path = self.out / "log.jsonl"
        first = next(iter(read_log(path)), {}) if self.step and path.is_file() else {}
        moves = first.get("moved", [])
        before = first | (moves[-1] if moves else {})
        changed = {k: v for k, v in place.items() if before.get(k, v) != v}
        if not changed:
            return {}
        texts = (f"{k} {v} (before: {before[k]})" for k, v in changed.items())
        print(f"{self.out}: continues with {', '.join(texts)}")
        return dict(moved=[*moves, dict(step=self.step, **place)])

    def _head(self):
        """The first line of log.jsonl: what is trained on what; `_place` is added."""
        cfg, model = self.cfg, self.model
        return dict(
            step=self.step, method=cfg.method, seed=cfg.seed, max_iters=cfg.max_iters,
            params=accounting.num_params(model),
            active_params=accounting.num_params(model, active=True),
            flops_per_token=accounting.flops_per_token(
                model, concept_loss=cfg.concept_weight > 0),
            labels=cfg.labels if model.config.insert in ("concept", "hidden") else None,
            concept_model_hash=self.uses.get("concept_model"), data_hash=self.uses["train.bin"],
            source_hash=self.meta.get("source_hash"))

    def training_batches(self, stored_labels):
        """(x, y, labels or None) of all steps left, on the device."""
        return self.batches.prefetch(self.step, self.cfg.max_iters, self.device, stored_labels)

    def validation_batches(self, label_model):
        """This process's ValBatches, the same at every evaluation, for every seed and any number of
        processes. label_model: says what should be predicted, or None."""
        cfg, val, ranks = self.cfg, self.val_blocks, self.ranks
        whole = val.blocks // cfg.batch_size * cfg.batch_size  # micro batches all alike
        self.val_rows = min(cfg.eval_iters * cfg.batch_size, whole or val.blocks)
        rows = [val[i] for i in range(ranks.rank, self.val_rows, ranks.size)]
        groups = [rows[i:i + self.micro] for i in range(0, len(rows), self.micro)]
        return ValBatches([tuple(torch.cat(t).to(self.device) for t in zip(*group, strict=True))
                           for group in groups], label_model)

    @property
    def at_eval(self):
        return self.step % self.cfg.eval_interval == 0 or self.last

    @property
    def at_log(self):
        return self.step % self.cfg.log_interval == 0 or self.at_eval

    def report(self, means, lr):
        """Write a line: the step's losses {name: scalar tensor of this process} and the speed."""
        norms = self.check_steps("the gradient's norm")
        totals = self.ranks.sum(*means.values())
        means = {name: t / self.ranks.size for name, t in zip(means, totals, strict=True)}
        for name, value in means.items():
            self.finite("the " + name.replace("_", " "), value)
        self.spikes.update("loss", means["loss"], self.step, self.remedy)
        elapsed = self.lap()
        self.seconds += elapsed
        speed = len(norms) * self.tokens_per_step / elapsed
        line = dict(step=self.step, tokens=self.tokens, **means, lr=lr, grad_norm=norms[-1],
                    tokens_per_s=speed, seconds=self.seconds)
        text = " ".join(f"{name.removesuffix('_loss')} {v:.3f}" for name, v in means.items())
        if peak := accounting.peak_flops(self.device):
            line["mfu"] = speed * self.flops / (peak * self.ranks.size)
            text += f" MFU {line['mfu']:.1%}"
        if math.isfinite(self.val_loss):
            text += f" val {self.val_loss:.3f}"
        self.log.write(line)
        self.bar.set_postfix_str(text)

    def evaluated(self, val_loss, concept_loss):
        """Write a line for an evaluation; concept_loss may be None."""
        self.finite("the val loss", val_loss)
        self.val_loss, self.best_val_loss = val_loss, min(self.best_val_loss, val_loss)
        line = dict(step=self.step, tokens=self.tokens, val_loss=val_loss, seconds=self.seconds)
        if concept_loss is not None:
            line["val_concept_loss"] = concept_loss
        self.log.write(line)

    def save(self):
        """Write ckpt.pt and, after an evaluation with keep_checkpoints, step_N.pt before it."""
        self.check_weights(self.model)
        if self.ranks.first:
            content = dict(model_config=asdict(self.model.config), model=self.model.state_dict(),
                           train_config=asdict(self.cfg), uses=self.uses,
                           tokenizer=self.meta["tokenizer"],
                           tokenizer_hash=self.meta["tokenizer_hash"],
                           tokenizer_file=self.tokenizer_file,
                           step=self.step)
            if self.step and self.at_eval and self.cfg.keep_checkpoints:
                checkpoint.save_checkpoint(self.out / f"step_{self.step}.pt", **content)
            checkpoint.save_checkpoint(self.checkpoint, **content | dict(
                optimizer=self.optimizer.state_dict(), seconds=self.seconds, val_loss=self.val_loss,
                best_val_loss=self.best_val_loss, wandb_id=self.wandb_id))
        self.ranks.wait()
        if self.step == 0:
            self.begin()
        self.lap()  # evaluations and checkpoints do not count as training time

    def end(self):
        self.ranks.leave()
        print(f"{self.out}: val loss {self.val_loss:.4f} (perplexity "
              f"{perplexity(self.val_loss):.2f}) on {self.val_rows * self.cfg.block_size:,} val "
              f"tokens after {self.step} steps, "
              f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")

class ValBatches:
    """Iterates over (x, y, labels or None), as often as wanted. Label concepts are computed once;
    hidden states, too large to keep, each time."""
    def __init__(self, batches, label_model):
        self.batches, self.label_model = batches, label_model
        self.predicts, self.kept = label_model is not None, [None] * len(batches)
        if self.predicts and label_model.target == "concept":
            self.kept = [label_model.labels(x, y) for x, y in batches]
            self.label_model = None  # free its memory, if nobody else needs it

    def __iter__(self):
        for (x, y), labels in zip(self.batches, self.kept, strict=True):
            yield x, y, self.label_model.labels(x, y) if self.label_model else labels
