"""GPT-2 and its published SAE: fetched once and checked; the messages without a network. The files
are created here, with the right shapes."""
import base64
import errno
import hashlib
import http.server
import json
import socket
import threading
from pathlib import Path

from support.runtime import UserError

import numpy as np
import pytest
import torch
from conftest import run

import concepts
import train
from model import load_gpt
from sae import SAE, load_sae
from support import published, tokens
from support.accounting import num_params
from support.published import fetch_sae, find_weights, read_gpt2, read_sae, sae_file

ROOT = Path(train.__file__).resolve().parent

def zeros(*shape):
    """Zeros that take no space in a file."""
    return torch.zeros(1).expand(shape)

def published_sae(n_concepts=32768, d=768):
    return {"pre_bias": zeros(d), "encoder.weight": zeros(n_concepts, d),
            "latent_bias": zeros(n_concepts), "decoder.weight": zeros(d, n_concepts),
            "stats_last_nonzero": zeros(n_concepts).long(),
            "latents_activation_frequency": zeros(n_concepts),
            "latents_mean_square": zeros(n_concepts),
            "activation": "TopK", "activation_state_dict": {"k": 32, "postact_fn": "ReLU"}}

def gpt2_weights(n_layer=12, d=768):
    """With the names and shapes of the hub's pytorch_model.bin, mask buffers included."""
    state = {"wte.weight": zeros(50257, d), "wpe.weight": zeros(1024, d), "ln_f.weight": zeros(d),
             "ln_f.bias": zeros(d)}
    for i in range(n_layer):
        state[f"h.{i}.attn.bias"] = zeros(1, 1, 1024, 1024)
        for name, rows, columns in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d),
                                    ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)):
            state[f"h.{i}.{name}.weight"] = zeros(rows, columns)
            state[f"h.{i}.{name}.bias"] = zeros(columns)
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            state[f"h.{i}.{name}"] = zeros(d)
    return state

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Empty caches of our own and of the hub's client."""
    from huggingface_hub import constants
    monkeypatch.setenv("COCOMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path

@pytest.fixture
def offline(monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)

class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. Of 8.pt it announces a wrong MD5; 9.pt breaks off."""
    def __init__(self, *args):
        super().__init__(*args, directory=self.folder)

    def log_message(self, *_):
        pass

    def end_headers(self):
        file = self.folder / self.path[1:].partition("?")[0]
        if file.is_file():
            digest = hashlib.md5(b"" if file.stem == "8" else file.read_bytes()).digest()
            self.send_header("Content-MD5", base64.b64encode(digest).decode())
        super().end_headers()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[:-1] if self.path.startswith("/9") else content)

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that a local server offers as the place of the published SAEs: LAYER.pt."""
    Handler.folder = tmp_path / "served"
    Handler.folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(published, "SAE_URL", address + "/{layer}.pt?size={size}")
        yield Handler.folder
        running.shutdown()
        thread.join()

def in_hub_cache(root, content):
    """Fill the hub's cache as its client does: a reference, and the files of that commit."""
    folder = root / "hub" / "models--openai-community--gpt2"
    for name in ("refs", "snapshots/abc"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    torch.save(content, folder / "snapshots/abc/pytorch_model.bin")
    return folder / "snapshots/abc/pytorch_model.bin"

# -- the SAE ---------------------------------------------------------------------------------------

def test_the_published_sae_is_fetched_with_a_bar_checked_and_kept(cache, server, capsys):
    torch.save(published_sae(), server / "3.pt")
    path = fetch_sae("openai", 3)
    assert path.parent == cache / "cache" and path.read_bytes() == (server / "3.pt").read_bytes()
    assert "100%" in capsys.readouterr().err and list(path.parent.iterdir()) == [path]
    (server / "3.pt").unlink()
    sae = load_sae("openai", 3, 768)  # from the cache
    assert sae.encoder.shape == (32768, 768) and sae.k == 32

@pytest.mark.parametrize("content, message", [
    (published_sae(n_concepts=1024), "an SAE of shape (1024, 768); (32768, 768) was expected"),
    (published_sae(d=512), "returned an SAE of shape (32768, 512)"),
    ({"a": 1}, "is not an SAE in the published layout"),
    (b"<html>Please log in</html>", "can't be read as the SAE of http://127.0.0.1"),
    (None, "HTTP Error 404"),
])
def test_a_wrong_file_is_refused_and_nothing_stays(cache, server, content, message):
    if isinstance(content, bytes):
        (server / "3.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, server / "3.pt")
    with pytest.raises(UserError) as e:
        fetch_sae("openai", 3)
    assert message in str(e.value) and not list((cache / "cache").iterdir())
    if content is None:
        e.value.__cause__.close()  # the 404 page: a command closes it when it ends

@pytest.mark.parametrize("layer", [8, 9])
def test_a_damaged_download_is_refused(cache, server, layer):
    torch.save(published_sae(), server / f"{layer}.pt")
    with pytest.raises(UserError, match="the SAE can't be fetched .*MD5 is not the one.* by hand"):
        fetch_sae("openai", layer)
    assert not list((cache / "cache").iterdir())

def test_only_the_twelve_layers_of_gpt2_are_published(cache, offline):
    with pytest.raises(UserError, match="concept_layer=12 is not from 0 to 11"):
        fetch_sae("openai", 12)
    for name, file in (("openai", "v5_32k/autoencoders/11.pt"),
                       ("openai_128k", "v5_128k/autoencoders/11.pt")):
        with pytest.raises(UserError) as e:
            fetch_sae(name, 11)
        assert "run python concepts.py --download where there is a network" in str(e.value)
        assert f"{file} here by hand as {cache}/cache/sae-{name}-layer11.pt" in str(e.value)

def test_an_sae_is_written_in_the_published_layout_and_read_again():
    sae = SAE(24, 48, 6)
    content = sae_file(sae)
    assert content.keys() == published_sae().keys() and content["decoder.weight"].shape == (24, 48)
    state, k = read_sae(content, "a.pt")
    assert k == 6 and state.keys() == sae.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in sae.state_dict().items())

@pytest.mark.parametrize("change, message", [
    ({"pre_bias": zeros(23)}, "pre_bias has the shape"), ({"decoder.weight": 3}, "not an SAE"),
    ({"activation_state_dict": {"k": 49}}, "k=49 of 48"), ({"activation": "ReLU"}, "only TopK"),
    ({"latent_bias": zeros(48) + torch.nan}, "not finite"),
])
def test_an_sae_that_cannot_be_used_is_refused(change, message):
    with pytest.raises(UserError, match=f"a.pt.*{message}"):
        read_sae(sae_file(SAE(24, 48, 6)) | change, "a.pt")

def test_download_fetches_both_and_prints_their_paths(cache, server):
    gpt2 = in_hub_cache(cache, {})
    torch.save(published_sae(), server / "5.pt")
    status, out, err = run(concepts.main, "--download")
    assert status == 0, err
    assert str(gpt2) in out and str(cache / "cache" / "sae-openai-layer5.pt") in out
    assert len(out.splitlines()) == 2
    torch.save(published_sae(), server / "7.pt")
    assert "layer7.pt" in run(concepts.main, "--download", "--concept_layer=7")[1]
    status, _, err = run(concepts.main, "--download", "--sae=out/sae")
    assert status == 1 and "openai or openai_128k" in err

@pytest.mark.slow
def test_unprepared_and_offline_the_next_command_is_named_in_one_line(
        cache, offline, monkeypatch, tmp_path):
    """config/cocomix_124m.py without any file, then with the data, then GPT-2, then its SAE."""
    monkeypatch.setattr(tokens, "ROOT", tmp_path / "data")
    folder = tmp_path / "data" / "openwebtext"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text("")

    def message():
        status, _, err = run(train.main, ROOT / "config/cocomix_124m.py", "--device=cpu",
                             f"--out_dir={tmp_path / 'run'}")
        assert status == 1 and len(err.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
        return err
    assert "run python data/openwebtext/prepare.py" in message()

    for split in ("train", "val"):
        np.zeros(600_000, dtype="<u2").tofile(folder / f"{split}.bin")
    meta = dict(tokenizer="gpt2", tokenizer_hash="gpt2", vocab_size=50257, train_tokens=600_000,
                val_tokens=600_000)
    (folder / "meta.json").write_text(json.dumps(meta))
    line = message()
    assert "GPT-2 can't be fetched" in line and "run python concepts.py --download" in line
    assert "--concept_model=FOLDER" in line

    in_hub_cache(cache, gpt2_weights())
    line, path = message(), cache / "cache" / "sae-openai-layer5.pt"
    assert "the SAE can't be fetched" in line and "run python concepts.py --download" in line
    assert f"here by hand as {path}" in line

    path.parent.mkdir(exist_ok=True)
    torch.save(published_sae(), path)
    started = []

    def start(config):
        started.append(config)
        raise UserError("here it would train")
    monkeypatch.setattr(train, "GPT", start)
    assert "here it would train" in message() and started[0].n_concepts == 32768

# -- GPT-2 -----------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new zip file", "old pickle", "safetensors"])
def test_gpt2_124m_loads_from_every_kind_of_file(tmp_path, kind):
    n_layer = 1 if kind == "safetensors" else 12
    weights = gpt2_weights(n_layer)
    if kind == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
        contiguous = {name: t.contiguous() for name, t in weights.items()}
        safetensors.save_file(contiguous, tmp_path / "model.safetensors")
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin",
                   _use_new_zipfile_serialization=kind == "new zip file")
    gpt, tokenizer = load_gpt(str(tmp_path))
    assert tokenizer == "gpt2" and gpt.config.vocab_size == 50257 and gpt.config.n_head == 12
    assert gpt.wte.weight.shape == (50304, 768) and gpt.config.bias
    loaded = sum(t.numel() for name, t in weights.items() if not name.endswith(".attn.bias"))
    assert num_params(gpt) == loaded + 47 * 768

def test_where_the_weights_of_a_name_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "fetch_gpt2", lambda: Path("fetched.bin"))
    assert find_weights("gpt2") == Path("fetched.bin") and find_weights("out/run") is None
    assert find_weights("gpt2_run") is None and find_weights("a.bin") == Path("a.bin")
    with pytest.raises(UserError, match="'gpt2-xl': only gpt2 is fetched by name"):
        find_weights("gpt2-xl")
    (tmp_path / "gpt2").mkdir()
    assert find_weights("gpt2") is None
    (tmp_path / "gpt2/model.safetensors").touch()
    assert find_weights("gpt2") == Path("gpt2/model.safetensors")

@pytest.mark.parametrize("state", [
    {}, [1], {"wte.weight": zeros(100, 64)}, {"wte.weight": zeros(100, 60)}, {"wte.weight": 3},
    {name: t for name, t in gpt2_weights(2, 64).items() if name != "h.1.ln_1.bias"}])
def test_other_weights_are_not_gpt2s(tmp_path, state):
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(UserError, match="a.bin: not GPT-2's weights"):
        read_gpt2(tmp_path / "a.bin")
