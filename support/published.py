"""What others published, downloads and file layouts: GPT-2's weights and the SAEs trained on it."""
import base64
import hashlib
import http.client
import logging
import os
import shlex
import urllib.request
from pathlib import Path

from support.runtime import RANK, UserError, explain

import torch
import torch.nn.functional as F

from support import checkpoint
from support.files import read_json
from support.tokens import hub_tokenizer

HUB = {f"gpt2{size}": f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")}
HUB["distilgpt2"] = "distilbert/distilgpt2"
FILES = "model.safetensors", "pytorch_model.bin"  # of a folder in the hub's layout, best first
# What config.json may say. The hub's library assumes the first value where a key is missing.
COMPUTED = dict(
    model_type=("gpt2",), activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,), add_cross_attention=(False,),
    scale_attn_by_inverse_layer_idx=(False,), quantization_config=(None,), auto_map=(None,))
SAE_URL = ("https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/"
           "resid_post_mlp_v5_{size}/autoencoders/{layer}.pt")
SIZES = {"openai": ("32k", 32768), "openai_128k": ("128k", 131072)}  # in the URL; n_concepts
ONLINE = "run python concepts.py --download where there is a network"

def download(sae, layer):
    """Fetch GPT-2 and the published SAE of a layer, and print their paths."""
    if sae not in SIZES:
        raise UserError(f"sae={sae!r} is not fetched: expected {' or '.join(SIZES)}")
    print(f"GPT-2: {fetch_gpt2()}")
    print(f"its SAE: {fetch_sae(sae, layer)}")

# --------------------------------------------------------------------------------------------------
# GPT-2

def read_model(name):
    """model_config, model and tokenizer_hash of a run of ours or of GPT-2 (see find_weights)."""
    weights, path = find_weights(name), Path(name)
    if weights is None:
        if not path.is_file() and not list(path.glob("*ckpt.pt")):
            if name in ("resume", "scratch"):  # nanoGPT's
                raise UserError(f"init_from={name!r}: --resume continues a run, and without "
                                "init_from a run starts from scratch")
            raise UserError(f"no checkpoint at {path} and no {' or '.join(FILES)}; train it first: "
                            f"python train.py {checkpoint.config_of(path)}, or name a folder of "
                            f"GPT-2 weights, or one of {', '.join(HUB)} to download")
        return checkpoint.load_checkpoint(name, ("model_config", "model", "tokenizer_hash"))
    if path.is_dir() and (path / "ckpt.pt").is_file():
        raise UserError(f"{path} holds a run and other weights: name {path / 'ckpt.pt'} or "
                        f"{weights}")
    settings, state = read_gpt2(weights)
    if path.exists() and not weights.with_name("config.json").is_file():
        print(f"{weights}: no config.json next to it; assuming GPT-2's, heads of 64 features")
    tokenizer = hub_tokenizer(weights.parent, settings["vocab_size"])
    return dict(model_config=settings, model=state, tokenizer_hash=tokenizer)

def start_from(name, model, tokenizer, concept_model):
    """Copy the weights of a run or of GPT-2 (see read_model) into a new GPT for a dataset with this
    tokenizer (its hash). A mixer is copied, too; if there is none, the new one stays fresh.
    UserError: another shape, tokenizer, mixer or concept model."""
    content, new = read_model(name), model.config
    if content["tokenizer_hash"] != tokenizer:
        raise UserError(f"init_from={name!r} has another tokenizer than the dataset; prepare the "
                        "text with its tokenizer, or start from another model")
    old = checkpoint.load_weights(type(model), type(new), content, "cpu")
    keys = ["n_layer", "n_head", "n_embd", "bias"]
    if old.mixer is not None:
        if new.insert != old.config.insert:
            raise UserError(f"init_from={name!r} has a {old.config.insert} mixer, unlike this run; "
                            "give it the same --method and --target, or start from a plain GPT")
        keys += ["mix", "insert_layer"] + ["concept_k"] * (new.insert == "concept")
        if new.insert != "pause" and (changed := checkpoint.changed_models(content, concept_model)):
            was = " ".join(f"--{name}={content['train_config'][name]}" for name in changed)
            raise UserError(f"init_from={name!r} learned from another {' and '.join(changed)}, "
                            f"then at {was}: give this run the same, or start from a plain GPT")
    values = {key: getattr(old.config, key) for key in keys}
    if changes := [f"--{k}={v}" for k, v in values.items() if v != getattr(new, k)]:
        raise UserError(f"init_from={name!r} has another shape than this run: give it "
                        f"{' '.join(changes)}")
    if new.block_size > old.config.block_size:
        raise UserError(f"block_size={new.block_size} is over the {old.config.block_size} of "
                        f"init_from={name!r}")
    weights = old.state_dict()
    weights["wpe.weight"] = weights["wpe.weight"][:new.block_size]
    model.load_state_dict(weights, strict=False)  # they have no weights for a new mixer

def find_weights(name):
    """The file of GPT-2 weights or the index of its shards. name: one of HUB or its full name on
    the hub, a folder or a file. None: something else, a run of ours."""
    path, repo = Path(name), HUB.get(name, name)
    if repo in HUB.values() and not path.exists():
        return fetch_gpt2(repo)
    for file in (path / f"{name}{end}" for name in FILES for end in ("", ".index.json")):
        if file.is_file():
            return file
    return path if path.name.endswith((".bin", ".safetensors", ".index.json")) else None

def fetch_gpt2(repo=HUB["gpt2"]):
    """The path of a GPT-2's weights in the hub's cache, downloaded if necessary."""
    remedy = f"copy its {FILES[0]} and config.json ({repo}) to a folder and name that instead"
    if repo == HUB["gpt2"]:
        remedy = f"{ONLINE}, or {remedy}"
    with explain("GPT-2 can't be fetched", remedy, Exception):
        import huggingface_hub as hub
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # do not print its retries
        for file in FILES:
            if isinstance(cached := hub.try_to_load_from_cache(repo, file), str):
                return Path(cached)
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, FILES[0]))  # fails at once without a network
        return Path(hub.hf_hub_download(repo, FILES[0]))

def read_gpt2(path):
    """(settings for ModelConfig, state dict of a GPT) from GPT-2 weights of any size and the
    config.json next to them. UserError: not GPT-2's, or our GPT computes something else."""
    content, file = _read_weights(path), path.with_name("config.json")
    config = read_json(file) if file.is_file() else None
    with explain(f"{path}: not GPT-2's weights", "name another file", Exception):
        state = gpt2_state(content)
        wte = next(t for name, t in content.items() if name.endswith("wte.weight"))
        block_size, (vocab_size, d) = len(state["wpe.weight"]), wte.shape
        n_layer = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
        if len(state) != 4 + 12 * n_layer or (config is None and d % 64):
            raise ValueError(f"{len(state)} tensors for {n_layer} blocks of width {d}")
        if not all(t.is_floating_point() and t.float().sum().isfinite() for t in state.values()):
            raise ValueError("integers, or numbers that are not finite")
        tied = config is None or config.get("tie_word_embeddings", True)
        head = content.get("lm_head.weight", wte if tied else None)
        if head is None or not torch.equal(head.float(), wte.float()):
            raise ValueError("lm_head.weight is not the token embedding, but our GPT's head is")
    settings = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_embd=d)
    if config is None:
        return settings | dict(n_head=d // 64), state  # as in all that OpenAI published
    n_head = config.setdefault("n_head", config.get("num_attention_heads", 12))
    possible = COMPUTED | dict(
        vocab_size=[vocab_size], n_positions=[block_size], n_layer=[n_layer], n_embd=[d],
        n_inner=[None, 4 * d], n_head=[n for n in range(1, d + 1) if d % n == 0])
    for name, values in possible.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{file}: {name}={config[name]!r}, but our GPT with these weights can "
                            f"only have {' or '.join(map(repr, values))}")
    return settings | dict(n_head=n_head), state

def gpt2_state(content):
    """GPT-2's state dict → ours: no prefix, Conv1D weights (in, out) transposed, no mask buffers
    and no tied head, the embedding padded to a multiple of 64 rows."""
    state = {}
    for name, t in content.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = t.T.contiguous() if conv else t
    wte = state["wte.weight"]
    state["wte.weight"] = F.pad(wte, (0, 0, 0, -len(wte) % 64))
    return state

def _read_weights(path):
    """The tensors of a file, or of the shards that an index names."""
    if path.name.endswith(".index.json"):
        with explain(f"{path} is not an index of weights", "copy it again"):
            files = sorted(set(read_json(path)["weight_map"].values()))
            return {k: t for f in files for k, t in _read_weights(path.with_name(f)).items()}
    read = checkpoint.read_safetensors if path.suffix == ".safetensors" else checkpoint.read_tensors
    return read(path, "weights")

# --------------------------------------------------------------------------------------------------
# Sparse autoencoders, in the layout of openai/sparse_autoencoder

NAMES = dict(pre_bias="pre_bias", encoder="encoder.weight", latent_bias="latent_bias",
             decoder="decoder.weight", since_active="stats_last_nonzero",
             frequency="latents_activation_frequency", mean_square="latents_mean_square")

def find_sae(name, layer):
    """The file of an SAE: published ("openai", …; fetched if necessary), a file, a run's folder."""
    if name in SIZES:
        return fetch_sae(name, layer)
    path = Path(name) / "sae.pt" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        config = checkpoint.config_of(path.parent if path.suffix == ".pt" else path)
        raise UserError(f"no SAE at {path}; train one: python sae.py {config}, or use --sae=openai "
                        "for GPT-2")
    return path

def check_fits(sae, concept_model):
    """UserError if a published SAE is asked for with a run of ours, by their names."""
    if sae in SIZES and find_weights(concept_model) is None:
        raise UserError(f"sae={sae!r} was trained on GPT-2, not on {concept_model}; train another: "
                        f"python sae.py --concept_model={shlex.quote(concept_model)} "
                        "--concept_layer=… --dataset=… --out_dir=…")

def read_info(path):
    """The sae.json next to an SAE of ours; {} where there is none (a published file)."""
    path = Path(path).with_suffix(".json")
    return read_json(path, "train the SAE again") if path.is_file() else {}

def load_sae(name, layer, d, gpt):
    """(state dict, k) of an SAE for hidden states of width d after block `layer` of gpt (or None).
    UserError: missing, damaged, of another width or layer, trained on another model."""
    if name in SIZES and gpt is not None and (gpt.config.n_layer, gpt.config.n_embd) != (12, 768):
        raise UserError(f"sae={name!r} is GPT-2 124M's; train one for this model: sae.py")
    path = find_sae(name, layer)
    info = {} if name in SIZES else read_info(path)
    trained_on, at = info.get("concept_model_hash"), info.get("concept_layer", layer)
    if at != layer:
        raise UserError(f"{path} was trained on layer {at}, not {layer}; name another --sae, or "
                        f"train a new run with --concept_layer={at}")
    if trained_on and gpt is not None and trained_on != checkpoint.model_hash(gpt):
        raise UserError(f"{path} was trained on another concept model ({info['concept_model']} as "
                        "it was then); say where that one is now: --concept_model=PATH, or, for a "
                        "new run, train the SAE again: python sae.py --overwrite with its keys")
    if not info and name not in SIZES:
        print(f"{path}: no sae.json next to it; not compared with the concept model and layer")
    state, k = read_sae(checkpoint.read_tensors(path, "an SAE"), path)
    if (width := state["encoder"].shape[1]) != d:
        raise UserError(f"{path} has width {width}, but the hidden states have {d}; train another")
    return state, k

def read_sae(content, path):
    """(state dict of an SAE, k) from the content of a file in the published layout."""
    with explain(f"{path} is not an SAE in the published layout", "name another file"):
        settings = dict(content.get("activation_state_dict", {}))
        activation, k = content["activation"], int(settings.get("k", 0))
        state = {ours: content[theirs] for ours, theirs in NAMES.items()}
        state["decoder"] = state["decoder"].T
        n_concepts, d = state["encoder"].shape
        shapes = dict.fromkeys(NAMES, (n_concepts,)) | dict(
            pre_bias=(d,), encoder=(n_concepts, d), decoder=(n_concepts, d))
        for name, t in state.items():
            if tuple(t.shape) != shapes[name]:
                raise ValueError(f"{NAMES[name]} has the shape {tuple(t.shape)}")
    if activation != "TopK" or settings.get("postact_fn", "ReLU") != "ReLU":
        raise UserError(f"{path}: a {activation} autoencoder, {settings}; only TopK with ReLU runs")
    if not 1 <= k <= n_concepts:
        raise UserError(f"{path}: k={k} of {n_concepts} concepts is impossible")
    if not all(t.isfinite().all() for t in state.values()):
        raise UserError(f"{path} holds weights that are not finite; fetch or train it again")
    return state, k

def sae_file(sae):
    """The content of an SAE's file in the published layout."""
    state = sae.state_dict()
    content = {theirs: state[ours].cpu() for ours, theirs in NAMES.items()}
    content["decoder.weight"] = content["decoder.weight"].T.contiguous()
    return content | dict(activation="TopK", activation_state_dict=dict(k=sae.k, postact_fn="ReLU"))

def fetch_sae(name, layer):
    """The path of a published SAE in $COCOMIX_CACHE or ~/.cache/cocomix, downloaded if necessary:
    complete and of the right shape, or not at all."""
    if not 0 <= layer < 12:  # of GPT-2 124M
        raise UserError(f"sae={name!r}: concept_layer={layer} is not from 0 to 11")
    size, n_concepts = SIZES[name]
    url = SAE_URL.format(size=size, layer=layer)
    with explain("there is no home folder", "set COCOMIX_CACHE to a folder", RuntimeError):
        folder = Path(os.environ.get("COCOMIX_CACHE") or Path.home() / ".cache" / "cocomix")
    path = folder / f"sae-{name}-layer{layer}.pt"
    if path.is_file():
        return path
    remedy = f"{ONLINE}, copy {url} here by hand as {path}, or set COCOMIX_CACHE to its folder"
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(url, part)
        state, _ = read_sae(checkpoint.read_tensors(part, f"the SAE of {url}"), url)
        if (shape := tuple(state["encoder"].shape)) != (n_concepts, 768):
            raise ValueError(f"{url} returned an SAE of shape {shape}; ({n_concepts}, 768) was "
                             "expected")
        part.rename(path)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise UserError(f"the SAE can't be fetched ({type(e).__name__}: {e}); {remedy}") from e
    finally:
        part.unlink(missing_ok=True)
    return path

def _download(url, path):
    """Download a file and compare its MD5 with the one that the server announces."""
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as answer:
        announced = answer.headers["Content-MD5"]
    torch.hub.download_url_to_file(url, str(path), progress=RANK == 0)
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).digest()
    if announced and announced != base64.b64encode(digest).decode():
        raise OSError("its MD5 is not the one the server announces")
