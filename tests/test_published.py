"""GPT-2 and its published SAE: fetched once, checked, and what is said without a network. Files of the right shapes are made here."""
import base64
import errno
import hashlib
import http.server
import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import concepts
import sae as sae_module
import train
from config import UserError
from conftest import run
from model import load_gpt
from sae import fetch_sae, load_sae


def zeros(*shape):
    """Zeros that take no room in a file."""
    return torch.zeros(1).expand(shape)


def published(n_concepts=32768, d=768):
    return {"pre_bias": zeros(d), "encoder.weight": zeros(n_concepts, d), "latent_bias": zeros(n_concepts), "decoder.weight": zeros(d, n_concepts),
            "stats_last_nonzero": zeros(n_concepts).long(), "latents_activation_frequency": zeros(n_concepts), "latents_mean_square": zeros(n_concepts),
            "activation": "TopK", "activation_state_dict": {"k": 32, "postact_fn": "ReLU"}}


def gpt2_weights(n_layer=12, d=768):
    """Under the names and in the shapes of the hub's pytorch_model.bin, its mask buffers among them."""
    state = {"wte.weight": zeros(50257, d), "wpe.weight": zeros(1024, d), "ln_f.weight": zeros(d), "ln_f.bias": zeros(d)}
    for i in range(n_layer):
        state |= {f"h.{i}.attn.bias": zeros(1, 1, 1024, 1024)}
        for name, rows, columns in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)):
            state |= {f"h.{i}.{name}.weight": zeros(rows, columns), f"h.{i}.{name}.bias": zeros(columns)}
        for name in ("ln_1", "ln_2"):
            state |= {f"h.{i}.{name}.weight": zeros(d), f"h.{i}.{name}.bias": zeros(d)}
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


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder behind a local address, where the published SAEs are looked for: LAYER.pt."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            pass

        def end_headers(self):
            file = folder / self.path[1:].partition("?")[0]
            if file.is_file():  # as its server does; of layer 8 another one's
                self.send_header("Content-MD5", base64.b64encode(hashlib.md5(b"" if file.stem == "8" else file.read_bytes()).digest()).decode())
            super().end_headers()

        def copyfile(self, source, outputfile):
            outputfile.write(source.read()[:-1 if self.path.startswith("/9") else None])  # it breaks off
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        monkeypatch.setattr(sae_module, "PUBLISHED", f"http://127.0.0.1:{running.server_port}/{{layer}}.pt?size={{size}}")
        yield folder
        running.shutdown()
        thread.join()


def in_hub_cache(root, content):
    """The hub's cache as its client fills it: an entry of refs, and the files of that commit."""
    folder = root / "hub" / "models--openai-community--gpt2"
    for name in ("refs", "snapshots/abc"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    torch.save(content, folder / "snapshots/abc/pytorch_model.bin")
    return folder / "snapshots/abc/pytorch_model.bin"


def test_the_published_sae_is_fetched_with_a_bar_checked_and_kept(cache, server, capsys):
    torch.save(published(), server / "3.pt")
    path = fetch_sae("openai", 3)
    assert path.parent == cache / "cache" and path.read_bytes() == (server / "3.pt").read_bytes()
    assert "100%" in capsys.readouterr().err and [p.name for p in path.parent.iterdir()] == [path.name]
    (server / "3.pt").unlink()
    sae = load_sae("openai", 3, 768)  # from the cache
    assert sae.encoder.shape == (32768, 768) and sae.k == 32


@pytest.mark.parametrize("content, message", [
    (published(n_concepts=1024), "gave an SAE of shape (1024, 768); (32768, 768) was expected"),
    (published(d=512), "gave an SAE of shape (32768, 512)"),
    ({"a": 1}, "is not an SAE in the published layout"),
    (b"<html>Please log in</html>", "can't be read as the SAE of http://127.0.0.1"),
    (None, "HTTP Error 404"),
])
def test_a_wrong_file_is_refused_and_leaves_nothing(cache, server, content, message):
    if content is not None:
        (server / "3.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, server / "3.pt")
    with pytest.raises(UserError) as e:
        fetch_sae("openai", 3)
    assert message in str(e.value) and not list((cache / "cache").iterdir())
    if content is None:
        e.value.__cause__.close()  # the 404's page: a command ends with it


def test_a_download_that_breaks_off_is_not_called_a_full_disk(cache, server):
    torch.save(published(), server / "9.pt")
    with pytest.raises(UserError, match="SAE can't be fetched .*"):
        fetch_sae("openai", 9)
    assert not list((cache / "cache").iterdir())


def test_a_download_with_another_md5_than_the_server_says_is_refused(cache, server):
    torch.save(published(), server / "8.pt")
    with pytest.raises(UserError, match="another MD5 than the server says"):
        fetch_sae("openai", 8)
    assert not list((cache / "cache").iterdir())


def test_only_the_twelve_layers_of_gpt2_are_published(cache, offline):
    with pytest.raises(UserError, match="concept_layer=12 is not from 0 to 11"):
        fetch_sae("openai", 12)
    for name, size in (("openai", "v5_32k/autoencoders/11.pt"), ("openai_128k", "v5_128k/autoencoders/11.pt")):
        with pytest.raises(UserError, match=f"concepts.py --download .* bring https://.*{size} here by hand as .*sae-{name}-layer11.pt"):
            fetch_sae(name, 11)


def test_download_fetches_both_and_says_where_they_lie(cache, server):
    gpt2 = in_hub_cache(cache, {})
    torch.save(published(), server / "5.pt")
    status, out, err = run(concepts.main, "--download")
    assert status == 0, err
    assert str(gpt2) in out and str(cache / "cache" / "sae-openai-layer5.pt") in out and len(out.splitlines()) == 2
    torch.save(published(), server / "7.pt")
    assert "layer7.pt" in run(concepts.main, "--download", "--concept_layer=7")[1]
    status, _, err = run(concepts.main, "--download", "--sae=out/sae")
    assert status == 1 and "openai or openai_128k" in err


@pytest.mark.slow
def test_unprepared_and_offline_each_next_command_is_named_in_one_line(cache, offline, monkeypatch, tmp_path):
    """config/cocomix_124m.py with nothing there, then with the data, then GPT-2, then its SAE."""
    monkeypatch.setattr(train.data, "ROOT", tmp_path / "data")
    folder = tmp_path / "data" / "openwebtext"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text("")

    def said():
        status, _, err = run(train.main, Path(train.__file__).parent / "config/cocomix_124m.py", "--device=cpu", f"--out_dir={tmp_path / 'run'}")
        assert status == 1 and len(err.strip().splitlines()) == 1 and not (tmp_path / "run").exists()
        return err
    assert "run: python data/openwebtext/prepare.py" in said()

    for split in ("train", "val"):
        np.zeros(600_000, dtype="<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps(dict(tokenizer="gpt2", tokenizer_hash="gpt2", vocab_size=50257, train_tokens=600_000, val_tokens=600_000)))
    line = said()
    assert "GPT-2 can't be fetched" in line and "run python concepts.py --download" in line and "--concept_model=FOLDER" in line

    in_hub_cache(cache, gpt2_weights())
    line = said()
    path = cache / "cache" / "sae-openai-layer5.pt"
    assert "the SAE can't be fetched" in line and "run python concepts.py --download" in line and f"here by hand as {path}" in line

    path.parent.mkdir(exist_ok=True)
    torch.save(published(), path)
    started = []
    monkeypatch.setattr(train, "GPT", lambda config: started.append(config) or (_ for _ in ()).throw(UserError("here it would train")))
    assert "here it would train" in said() and started[0].n_concepts == 32768


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new zip file", "old pickle", "safetensors"])
def test_gpt2_124m_loads_from_every_kind_of_file(tmp_path, kind):
    if kind == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors (requirements-test.txt)")
        safetensors.save_file({k: v.contiguous() for k, v in gpt2_weights(n_layer=1).items()}, tmp_path / "model.safetensors")
    else:
        torch.save(gpt2_weights(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "new zip file")
    gpt, tokenizer = load_gpt(str(tmp_path))
    assert tokenizer == "gpt2" and gpt.config.vocab_size == 50257 and gpt.wte.weight.shape == (50304, 768) and gpt.config.n_head == 12 and gpt.config.bias
    assert gpt.num_params() == sum(t.numel() for k, t in gpt2_weights(gpt.config.n_layer).items() if not k.endswith(".attn.bias")) + 47 * 768
