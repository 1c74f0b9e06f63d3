"""Checkpoints: complete or not written at all, read as tensors and plain values only."""
import json
import os
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path

from support.runtime import UserError, explain

import torch

from support.files import atomic_write, fingerprint

# What the checkpoint of a run must hold; every entry is a dict unless TYPES says otherwise.
RUN = ("model_config", "model", "train_config", "uses", "tokenizer", "tokenizer_hash",
       "tokenizer_file")
TYPES = dict(tokenizer=str, tokenizer_hash=str, tokenizer_file=torch.Tensor, step=int,
             seconds=float, val_loss=float, best_val_loss=float)
PLACES = "dataset", "concept_model", "sae"  # keys that say where something is

def save_checkpoint(path, **content):
    with atomic_write(path) as file:
        torch.save(content, file)

def find_checkpoint(run=None, out_dir=None):
    """The path of a run's checkpoint. run: its folder or file; None: the newest run under out/.
    out_dir: the command's key, which does not name the run."""
    if run is None:
        if out_dir and Path(out_dir, "ckpt.pt").is_file():
            raise UserError(f"out_dir={out_dir!r} is a folder for results; name the run without a "
                            f"key: {out_dir}")
        path = max(Path("out").rglob("ckpt.pt"), key=os.path.getmtime, default=None)
        if path is None:
            raise UserError("no checkpoint under out/; train one: make demo, or python train.py …")
        print(f"using the newest checkpoint, {path}")
        return path
    path = Path(run) / "ckpt.pt" if Path(run).is_dir() else Path(run)
    if path.is_file():
        if out_dir and Path(out_dir, "ckpt.pt").is_file() and not path.parent.samefile(out_dir):
            raise UserError(f"out_dir={out_dir!r} is the folder of another run than {run}")
        return path
    if (path.parent / "sae_ckpt.pt").is_file():
        raise UserError(f"{path.parent} is an SAE's folder; name the run of a model, such as "
                        "out/stdlib/cocomix")
    raise UserError(f"no checkpoint at {path}; train it first: python train.py "
                    f"{config_of(path.parent if path.suffix == '.pt' else path)}")

def config_of(folder):
    """The config file whose runs are in a folder, for messages."""
    places = (file for file in sorted(Path("config").glob("*.py"))
              if f'out_dir = "{folder}"\n' in file.read_text(errors="replace"))
    return next(places, "config/…")

def run_of(path):
    """A run as a person names it: the folder of its ckpt.pt, or another checkpoint's file."""
    return path.parent if path.name == "ckpt.pt" else path

def index_name(path):
    """The name of a checkpoint's concept index and report, without a suffix."""
    return "concepts" if path.name == "ckpt.pt" else f"concepts-{path.stem}"

def files_of_run(folder, *patterns):
    """A run's files in its folder that match one of the patterns, such as step_*.pt; step_best.pt,
    say, is not one that a run writes."""
    found = (path for pattern in patterns for path in Path(folder).glob(pattern))
    return [path for path in found
            if not path.name.startswith("step_") or path.stem[5:].isdecimal()]

def read_tensors(path, what):
    """Load a torch.save file on the CPU; its pickle runs no code. UserError: damaged, not one."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify the checksums in the file
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(damaged)
        with warnings.catch_warnings():  # about a kind of pickle that is refused anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch and pickle raise many kinds
        raise UserError(f"{path} can't be read as {what} ({type(e).__name__}): cut short, damaged, "
                        "or of another kind; copy it again, or write it again with --overwrite"
                        ) from e

def read_safetensors(path, what):
    """Load a .safetensors file: its header's length, its header in JSON, the tensors' bytes."""
    dtypes = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                  BOOL=torch.bool, U8=torch.uint8)
    size = os.path.getsize(path)
    with explain(f"{path} can't be read as {what}", "copy it again", Exception):
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)
        start = 8 + int(data[:8].view(torch.int64))
        header = json.loads(bytes(data[8:start].tolist()))
        return {name: data[start:][slice(*t["data_offsets"])].clone().view(dtypes[t["dtype"]])
                .view(t["shape"]) for name, t in header.items() if name != "__metadata__"}

def load_checkpoint(run=None, needs=("model_config", "model")):
    """A checkpoint as a dict that holds `needs`. UserError: missing, damaged, of another kind."""
    path = find_checkpoint(run)
    content = read_tensors(path, "a checkpoint")
    if not isinstance(content, dict) or not all(
            isinstance(content.get(name), TYPES.get(name, dict)) for name in needs):
        raise UserError(f"{path} is not a checkpoint of this kind: it must hold {', '.join(needs)}")
    return content

def load_weights(cls, settings_cls, content, device):
    """The model cls(settings_cls(…)) of a checkpoint's content, in evaluation mode."""
    known = {f.name for f in fields(settings_cls)}
    settings = {k: v for k, v in content["model_config"].items() if k in known}
    remedy = "if an older version of this code wrote it, train the run again with --overwrite"
    with explain("the checkpoint's weights do not fit its model config", remedy,
                 (RuntimeError, TypeError)):
        model = cls(settings_cls(**settings))
        model.load_state_dict(content["model"])
    return model.to(device).eval()

def load_optimizer(optimizer, content, path):
    """Restore an optimizer's state. UserError: it belongs to other parameters."""
    saved, fused = content["optimizer"], optimizer.defaults["fused"]  # that of this device
    remedy = "start again with --overwrite or another --out_dir"
    with explain(f"the optimizer's state in {path} does not fit the model", remedy):
        groups = [group | dict(fused=fused) for group in saved["param_groups"]]
        optimizer.load_state_dict(saved | dict(param_groups=groups))

def relocate(content, cfg):
    """Put the PLACES that a command's cfg was given into the train_config of a checkpoint's
    content: where what the run was trained with is now."""
    for name in PLACES:
        if name in cfg.given and getattr(cfg, name) is not None:
            content["train_config"][name] = getattr(cfg, name)

def kind_of_run(content):
    """A run's method and, where it predicts hidden states, its target, for messages."""
    method, target = (content["train_config"].get(name) for name in ("method", "target"))
    hidden = content["model_config"].get("insert") == "hidden"
    return f"a run of method={method!r}" + (f" with target={target!r}" if hidden else "")

def models_used(concept_model):
    """The hashes that identify a ConceptModel's parts, for the entry `uses` of a checkpoint."""
    uses = {}
    if concept_model is not None:
        uses["concept_model"] = model_hash(concept_model.gpt)
        if concept_model.sae is not None:
            uses["sae"] = f"{model_hash(concept_model.sae)} k={concept_model.sae.k}"
    return uses

def changed_models(content, concept_model):
    """The parts of a ConceptModel that are not those that a checkpoint's run learned from."""
    return [name for name, found in models_used(concept_model).items()
            if found != content["uses"].get(name, found)]

def check_models(content, concept_model):
    """UserError if a part of a ConceptModel is not the one that a checkpoint's run learned from."""
    if changed := changed_models(content, concept_model):
        now = " and ".join(f"{name}={content['train_config'][name]!r}" for name in changed)
        places = " ".join(f"--{name}=PATH" for name in changed)
        raise UserError(f"{now}: not what this run learned from, but replaced or trained again; "
                        f"say where the old one is now: {places}, or train this run again with "
                        "--overwrite")

def model_hash(model):
    """A short hash of a model's weights, and of its number of heads, which no weight shows, unless
    they have GPT-2's width of 64."""
    weights = (p.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes()
               for p in model.parameters())
    c = getattr(model, "config", None)
    heads = [b"%d heads" % c.n_head] if c and c.n_head != c.n_embd // 64 else []
    return fingerprint(*weights, *heads)
