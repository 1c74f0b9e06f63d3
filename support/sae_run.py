"""What surrounds the SAE's training loop: data, log, checkpoints, the final report."""
import json
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict

from support.runtime import UserError

import torch

from support import published, tokens
from support.activations import HiddenStates, hidden_states
from support.checkpoint import load_optimizer, model_hash, read_tensors, save_checkpoint
from support.files import atomic_write
from support.kernels import linear_cross_entropy, normalize
from support.log import Log
from support.training import Run

class SAERun(Run):
    """A run of sae.py: its hidden states, where it is, its log and files."""
    title, file, config = "SAE", "sae_ckpt.pt", "sae_config"
    files = "sae.pt", "sae.json"
    needs = "sae_config", "sae", "uses", "optimizer", "step", "seconds"
    # may change on resume
    free = ("dataset", "concept_model", "out_dir", "log_interval", "save_interval", "device",
            "resume", "overwrite")

    def __init__(self, cfg, gpt, tokenizer, device):
        if cfg.k > cfg.n_concepts:
            raise UserError(f"k={cfg.k} latents cannot be kept of n_concepts={cfg.n_concepts}")
        super().__init__(cfg, max(1, cfg.max_tokens // cfg.batch_size), cfg.batch_size)
        self.gpt, self.device = gpt, device
        tokens.check_tokenizer(cfg, tokens.load_meta(cfg.dataset), tokenizer, gpt)
        self.block_size = T = cfg.block_size or gpt.config.block_size
        train = tokens.load_tokens(cfg.dataset, "train")
        self.uses = {"train.bin": tokens.tokens_hash(train), "concept_model": model_hash(gpt)}
        if self.content is not None and self.content["uses"] != self.uses:
            changed = [name for name in self.uses if self.content["uses"][name] != self.uses[name]]
            raise UserError(f"{self.out}: {' and '.join(changed)} changed since this SAE was "
                            "trained; --overwrite trains it again")
        batches = tokens.Batches(train, T, max(1, 8192 // T), gpt.config.vocab_size, cfg.seed)
        self.states = HiddenStates(gpt, cfg, batches, device)
        self.dead_tokens = cfg.dead_tokens
        if self.dead_tokens is None:
            self.dead_tokens = min(10_000_000, self.steps * cfg.batch_size // 20)

    def attach(self, sae, optimizer):
        """What to train. Resumes both, if there is a checkpoint, and opens the log."""
        self.sae, self.optimizer, path = sae, optimizer, self.out / "sae.pt"
        if self.content is not None:
            sae.load_state_dict(self.content["sae"])
            load_optimizer(optimizer, self.content, self.checkpoint)
        info = self._report_of(path) if self.step >= self.steps else None
        self.finished = info is not None  # else `end` writes both files again
        if self.finished:
            print(f"{self.out}: already trained ({self.step} steps); {summary(info)}")
        else:
            self.log = Log(self.out / "log.jsonl", self.step)

    @staticmethod
    def _report_of(path):
        """The content of sae.json, if that and the SAE at `path` can be read."""
        with suppress(UserError, OSError):
            info = published.read_info(path)
            read_tensors(path, "an SAE")
            return info if "fvu" in info else None

    @contextmanager
    def start(self):
        with super().start():
            if self.step == 0:
                self.save()
                self.begin()
            yield

    def advance(self, fvu, aux, top, stopping):
        """One optimizer step was taken; log and save where that is due."""
        super().advance(fvu + aux)
        logging = self.step % self.cfg.log_interval == 0 or self.last
        saving = self.step % self.cfg.save_interval == 0 or self.last or stopping
        if logging or saving:
            self._report(fvu, aux, top, logging)
        if saving:
            self.save()

    def _report(self, fvu, aux, top, logging):
        self.check_steps("the SAE's loss")
        self.seconds += self.lap()
        self.check_weights(self.sae)
        dead = (self.sae.since_active >= self.dead_tokens).float().mean().item()
        line = dict(step=self.step, tokens=self.tokens, fvu=fvu.item(), aux=aux.item(),
                    l0=(top.values > 0).float().sum(-1).mean().item(), dead_share=dead,
                    seconds=self.seconds)
        self.spikes.update("FVU", line["fvu"], self.step, self.remedy)
        if logging:
            self.log.write(line)
        self.bar.set_postfix_str(f"FVU {line['fvu']:.3f} dead {dead:.1%}")

    def save(self):
        save_checkpoint(self.checkpoint, sae_config=asdict(self.cfg), uses=self.uses,
                        sae=self.sae.state_dict(), optimizer=self.optimizer.state_dict(),
                        step=self.step, seconds=self.seconds)
        self.lap()  # checkpoints do not count as training time

    def end(self):
        """Evaluate the SAE, write sae.json and, last, sae.pt; warn if it is degenerate."""
        cfg = self.cfg
        val = tokens.load_tokens(cfg.dataset, "val")[:cfg.eval_tokens + 1]
        info = dict(concept_model=cfg.concept_model, concept_model_hash=self.uses["concept_model"],
                    concept_layer=cfg.concept_layer, dataset=cfg.dataset,
                    n_concepts=cfg.n_concepts, k=cfg.k, tokens=self.steps * cfg.batch_size,
                    seconds=round(self.seconds, 1), dead_tokens=self.dead_tokens)
        info |= report(self.sae, self.gpt, cfg.concept_layer, val, self.block_size, self.device,
                       self.dead_tokens)
        with atomic_write(self.out / "sae.json") as file:
            file.write(json.dumps(info, indent=1).encode() + b"\n")
        save_checkpoint(self.out / "sae.pt", **published.sae_file(self.sae))
        print(f"{self.out}: {summary(info)}")
        if problem := degenerate(info):
            print(f"warning: this SAE is degenerate: {problem}. Its FVU of {info['fvu']:.3f} does "
                  "not show it. Look for spikes of grad_norm in the concept model's log",
                  file=sys.stderr)

@torch.no_grad()
def report(sae, gpt, layer, val, block_size, device, dead_tokens):
    """How good the SAE is on held-out tokens, as a dict: FVU; L0, active concepts per token; the
    shares of dead latents and of activations that belong to the k most frequent concepts (1: the
    same k everywhere); the model's loss as usual, with reconstructions, and with zeros (nats)."""
    count, error, first, second = 0, 0.0, 0.0, 0.0
    loss = dict(plain=0.0, spliced=0.0, zeros=0.0)
    active = torch.zeros(len(sae.encoder), dtype=torch.long, device=device)  # times it fired
    for x, y in tokens.sequential(val, block_size, 8, gpt.config.vocab_size):
        x, y = x.to(device), y.to(device)
        h = hidden_states(gpt, x, layer).float()
        back, top = sae(h)
        normal, mean, std = normalize(h)
        residual = (normal - (back - mean) / std).cpu().double()  # MPS has no float64
        normal = normal.cpu().double()
        error += (residual ** 2).sum()
        first = first + normal.sum((0, 1))
        second = second + (normal ** 2).sum()
        active += torch.bincount(top.indices[top.values > 0], minlength=len(active))
        for name, state in dict(plain=h, spliced=back, zeros=torch.zeros_like(h)).items():
            h_final, _ = gpt.finish(state, layer + 1)
            mean_loss, _ = linear_cross_entropy(gpt.ln_f(h_final), gpt.wte.weight, y,
                                                gpt.config.vocab_size)
            loss[name] += mean_loss.item() * y.numel()
        count += y.numel()
    loss = {name: total / count for name, total in loss.items()}
    return dict(
        fvu=(error / (second - (first ** 2).sum() / count)).item(),
        l0=(active.sum() / count).item(),
        commonest_share=(active.topk(sae.k).values.sum() / active.sum()).item(),
        dead_share=(sae.since_active >= dead_tokens).cpu().double().mean().item(),
        **{f"loss_{name}": value for name, value in loss.items()},
        loss_recovered=(loss["zeros"] - loss["spliced"]) / (loss["zeros"] - loss["plain"]))

def summary(info):
    """A report in one line."""
    return (f"FVU {info['fvu']:.3f}, L0 {info['l0']:.1f}, dead {info['dead_share']:.1%}; loss "
            f"{info['loss_plain']:.3f} as usual, {info['loss_spliced']:.3f} with reconstructions, "
            f"{info['loss_zeros']:.3f} with zeros: {info['loss_recovered']:.1%} recovered")

def degenerate(info):
    """What is wrong with an SAE according to its report, in words; "" if nothing is."""
    shares = {"of the latents are dead": info["dead_share"],
              f"of the activations belong to {info['k']} concepts": info["commonest_share"]}
    return " and ".join(f"{share:.0%} {what}" for what, share in shares.items() if share > 0.5)
