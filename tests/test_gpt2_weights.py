"""GPT-2 weights in the hub's layout: what their config.json says is computed or refused. The logits
are compared with a plain computation in that layout, and with transformers if installed."""
import json

from support.runtime import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import run

import eval as evaluation
from model import GPT, ModelConfig, load_gpt
from support import published, tokens
from support.checkpoint import model_hash
from support.published import HUB, load_sae, start_from
from support.tokens import load_tokenizer

CONFIG = dict(model_type="gpt2", vocab_size=211, n_positions=32, n_embd=64, n_layer=3, n_head=4,
              activation_function="gelu_new", layer_norm_epsilon=1e-5)
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
          torch.int64: "I64"}

def hub_weights(prefix="", **settings):
    """Random weights with the names and shapes of the hub."""
    c = CONFIG | settings
    d = c["n_embd"]
    shapes = dict(wte=(c["vocab_size"], d), wpe=(c["n_positions"], d))
    state = {f"{prefix}{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    for name in ("ln_f", *(f"h.{i}.ln_{j}" for i in range(c["n_layer"]) for j in (1, 2))):
        state[f"{prefix}{name}.weight"] = 1 + torch.randn(d) * 0.2
        state[f"{prefix}{name}.bias"] = torch.randn(d) * 0.2
    for i in range(c["n_layer"]):
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
        for name, rows, columns in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d),
                                    ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)):
            state[f"{prefix}h.{i}.{name}.weight"] = torch.randn(rows, columns) * 0.2
            state[f"{prefix}h.{i}.{name}.bias"] = torch.randn(columns) * 0.2
    return state

def hub_logits(state, x, **settings):
    """What the hub's library computes from such weights, in plain steps."""
    c = CONFIG | dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False) | settings
    act = dict(relu=F.relu, gelu=F.gelu).get(c["activation_function"])
    state = {name.removeprefix("transformer."): t for name, t in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + c["layer_norm_epsilon"]).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    (B, T), heads = x.shape, c["n_head"]
    h = state["wte.weight"][x] + state["wpe.weight"][:T]
    for i in range(c["n_layer"]):
        q, k, v = (t.view(B, T, heads, -1).transpose(1, 2) for t in
                   linear(norm(h, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1))
        scores = q @ k.mT
        if c["scale_attn_weights"]:
            scores = scores / q.shape[-1] ** 0.5
        if c["scale_attn_by_inverse_layer_idx"]:
            scores = scores / (i + 1)
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        h = h + linear(mixed, f"h.{i}.attn.c_proj")
        hidden = linear(norm(h, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        tanh = 0.5 * hidden * (1 + (0.7978845608 * (hidden + 0.044715 * hidden ** 3)).tanh())
        h = h + linear(tanh if act is None else act(hidden), f"h.{i}.mlp.c_proj")
    return norm(h, "ln_f") @ state.get("lm_head.weight", state["wte.weight"]).T

def write_safetensors(state, path):
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, t in state.items():
        raw = t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=DTYPES[t.dtype], shape=list(t.shape),
                            data_offsets=[len(content), len(content) + len(raw)])
        content += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)

def write(folder, state, config=None, kind="bin", **settings):
    """A folder of the hub: weights as a .bin or .safetensors file, whole or in shards."""
    folder.mkdir(exist_ok=True)
    suffix = kind.removesuffix(" shards")
    name, save = dict(bin=("pytorch_model.bin", torch.save),
                      safetensors=("model.safetensors", write_safetensors))[suffix]
    if kind.endswith("shards"):
        files = [f"{name.split('.')[0]}-{i}-of-3.{suffix}" for i in range(3)]
        where = {tensor: files[i % 3] for i, tensor in enumerate(state)}
        for file in files:
            save({n: t for n, t in state.items() if where[n] == file}, folder / file)
        (folder / f"{name}.index.json").write_text(json.dumps(dict(weight_map=where)))
    else:
        save(state, folder / name)
    if config is not False:
        (folder / "config.json").write_text(json.dumps((config or CONFIG) | settings))
    return str(folder)

X = torch.arange(64).view(2, 32) * 7 % 211

def close(ours, logits):
    torch.testing.assert_close(ours(X).logits, logits, atol=2e-4, rtol=1e-4)

@pytest.mark.parametrize("kind", ["bin", "safetensors", "bin shards", "safetensors shards"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_every_layout_of_a_folder_gives_the_hubs_logits(tmp_path, capsys, kind, prefix):
    state = hub_weights(prefix)
    folder = write(tmp_path, state, kind=kind)
    ours, _ = load_gpt(folder)
    assert ours.config.n_head == 4 and capsys.readouterr().out == ""
    logits = hub_logits(state, X)
    close(ours, logits)
    assert (hub_logits(state, X, n_head=1) - logits).abs().max() > 0.1
    for file in tmp_path.glob("*.index.json"):
        close(load_gpt(str(file))[0], logits)

def test_a_new_model_starts_from_such_weights(tmp_path):
    folder, state = str(tmp_path), hub_weights()
    write(tmp_path, state)
    model = GPT(ModelConfig(block_size=32, vocab_size=211, n_layer=3, n_head=4, n_embd=64)).eval()
    start_from(folder, model, "unknown, 211 tokens", None)
    close(model, hub_logits(state, X))
    with pytest.raises(UserError, match="another tokenizer than the dataset"):
        start_from(folder, model, "gpt2", None)

def test_a_half_precision_file_is_read_in_its_precision(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        state = {name: t if t.dtype == torch.bool else t.to(dtype)
                 for name, t in hub_weights().items()}
        ours, _ = load_gpt(write(tmp_path, state, kind="safetensors"))
        close(ours, hub_logits({name: t.float() for name, t in state.items()}, X))

def test_without_config_json_the_assumption_is_printed(tmp_path, capsys):
    state = hub_weights()
    ours, _ = load_gpt(write(tmp_path, state, config=False))
    assert "no config.json next to it; assuming GPT-2's, heads of 64" in capsys.readouterr().out
    close(ours, hub_logits(state, X, n_head=1))

def test_another_number_of_heads_is_another_model(tmp_path):
    state = hub_weights()
    models = [load_gpt(write(tmp_path / str(n), state, n_head=n))[0] for n in (1, 2, 4)]
    assert len({model_hash(model) for model in models}) == 3

def test_a_folder_of_a_run_and_of_other_weights_is_refused(tmp_path):
    folder = write(tmp_path, hub_weights())
    load_gpt(folder)
    (tmp_path / "ckpt.pt").write_bytes(b"a run's")
    with pytest.raises(UserError, match="holds a run and other weights: name .*ckpt.pt or .*bin"):
        load_gpt(folder)

@pytest.mark.parametrize("setting", [
    dict(activation_function="gelu_pytorch_tanh"), dict(activation_function="gelu_fast"),
    dict(n_inner=256), dict(n_inner=None), dict(reorder_and_upcast_attn=True), dict(n_head=1),
    dict(n_head=64), dict(tie_word_embeddings=True), dict(scale_attn_weights=True)])
def test_settings_that_our_gpt_has_are_taken(tmp_path, setting):
    state = hub_weights()
    ours, _ = load_gpt(write(tmp_path, state, **setting))
    close(ours, hub_logits(state, X, **setting))

def test_where_config_json_is_silent_the_hubs_defaults_hold(tmp_path):
    sizes = dict(n_embd=96, n_layer=2)
    state = hub_weights(**sizes)
    ours, _ = load_gpt(write(tmp_path, state, dict(model_type="gpt2")))
    assert ours.config.n_head == 12
    close(ours, hub_logits(state, X, **sizes, n_head=12))
    ours, _ = load_gpt(write(tmp_path, state, dict(num_attention_heads=6)))
    assert ours.config.n_head == 6

@pytest.mark.parametrize("setting", [
    dict(activation_function="relu"), dict(activation_function="gelu"),
    dict(layer_norm_epsilon=1e-2), dict(scale_attn_weights=False),
    dict(scale_attn_by_inverse_layer_idx=True)])
def test_settings_that_change_the_logits_are_refused(tmp_path, setting):
    state, ((name, value),) = hub_weights(), setting.items()
    change = hub_logits(state, X, **setting) - hub_logits(state, X)
    assert change.abs().max() > 1e-3
    with pytest.raises(UserError, match=f"config.json: {name}={value!r}, but our GPT .* only have"):
        load_gpt(write(tmp_path, state, **setting))

@pytest.mark.parametrize("setting", [
    dict(model_type="gpt_neo"), dict(add_cross_attention=True), dict(auto_map={"AutoModel": "a.B"}),
    dict(quantization_config={"bits": 8}), dict(n_head=5), dict(n_head=0), dict(n_head=None),
    dict(n_head="4"), dict(n_inner=128), dict(vocab_size=212), dict(n_positions=64),
    dict(n_layer=2), dict(n_embd=128)])
def test_settings_of_another_model_are_refused(tmp_path, setting):
    (name, value), = setting.items()
    with pytest.raises(UserError) as e:
        load_gpt(write(tmp_path, hub_weights(), **setting))
    assert f"config.json: {name}={value!r}, but our GPT" in str(e.value)

def test_a_head_of_its_own_is_refused(tmp_path):
    state = hub_weights("transformer.")
    same = {"lm_head.weight": state["transformer.wte.weight"].clone()}
    for tied in (True, False):
        ours, _ = load_gpt(write(tmp_path, state | same, tie_word_embeddings=tied))
        close(ours, hub_logits(state, X))
    same["lm_head.weight"][7, 3] += 0.01
    for config in (CONFIG, False, CONFIG | dict(tie_word_embeddings=False)):
        with pytest.raises(UserError, match="lm_head.weight is not the token embedding"):
            load_gpt(write(tmp_path / "other", state | same, config))
    with pytest.raises(UserError, match="lm_head.weight is not the token embedding"):
        load_gpt(write(tmp_path, state, tie_word_embeddings=False))  # it is in no file

def test_safetensors_come_first(tmp_path):
    old, new = hub_weights(), hub_weights()
    write(tmp_path, old, kind="bin")
    close(load_gpt(str(tmp_path))[0], hub_logits(old, X))
    write(tmp_path, new, kind="safetensors shards")
    close(load_gpt(str(tmp_path))[0], hub_logits(new, X))
    write(tmp_path, old, kind="safetensors")
    close(load_gpt(str(tmp_path))[0], hub_logits(old, X))

@pytest.mark.parametrize("change, message", [
    ({"wte.weight": torch.ones(211, 64, dtype=torch.int64)}, "integers"),
    ({"h.1.ln_1.bias": torch.full((64,), torch.nan)}, "not finite"),
    ({"score.weight": torch.ones(2, 64)}, "41 tensors for 3 blocks")])
def test_weights_that_are_not_gpt2s_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=f"not GPT-2's weights.*{message}"):
        load_gpt(write(tmp_path, hub_weights() | change))

def damage(folder, what):
    if what == "config":
        (folder / "config.json").write_text("[]")
    elif what == "index":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif what == "shard":
        (folder / "model-1-of-3.safetensors").unlink()
    else:
        path = folder / "model-1-of-3.safetensors"
        path.write_bytes(path.read_bytes()[:dict(header=100, tensor=-100, empty=0)[what]])

@pytest.mark.parametrize("what, message", [
    ("config", "config.json is damaged"), ("index", "index.json is not an index"),
    ("shard", "No such file"), ("header", "can't be read as weights"),
    ("tensor", "can't be read as weights"), ("empty", "can't be read as weights")])
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, what, message):
    folder = write(tmp_path, hub_weights(), kind="safetensors shards")
    damage(tmp_path, what)
    status, _, err = run(evaluation.main, f"--model={folder}", "--dataset=stdlib", "--device=cpu")
    line, = err.strip().splitlines()
    assert status == 1 and message in line and "Traceback" not in err

# -- names and tokenizers --------------------------------------------------------------------------

def test_both_names_of_a_published_model_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fetched", state := hub_weights("transformer."), config=False)
    asked = []

    def fetch(repo):
        asked.append(repo)
        return tmp_path / "fetched/pytorch_model.bin"
    monkeypatch.setattr(published, "fetch_gpt2", fetch)
    for name, repo in HUB.items():
        for spelled in (name, repo):
            close(load_gpt(spelled)[0], hub_logits(state, X, n_head=1))
    assert asked == [repo for repo in HUB.values() for _ in range(2)]
    assert HUB["gpt2"] == "openai-community/gpt2" and HUB["distilgpt2"] == "distilbert/distilgpt2"
    write(tmp_path / "distilgpt2", state)  # a folder of this name
    assert load_gpt("distilgpt2")[0].config.n_head == 4 and len(asked) == 2 * len(HUB)

def test_a_name_or_folder_without_weights_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "uer/gpt2-chinese", "gpt3"):
        with pytest.raises(UserError) as e:
            load_gpt(name)
        text = str(e.value)
        assert f"no checkpoint at {name} and no model.safetensors or pytorch_model.bin" in text
        assert "train.py" in text and "gpt2, gpt2-medium" in text and "distilgpt2" in text

def small(vocab_size):
    sizes = dict(vocab_size=vocab_size, n_embd=4, n_layer=1, n_head=2)
    return hub_weights(**sizes), CONFIG | sizes

@pytest.mark.parametrize("vocab_size", [21128, 50256, 50258, 50304])
def test_a_vocabulary_of_another_size_is_not_called_gpt2s(tmp_path, vocab_size):
    folder = write(tmp_path, *small(vocab_size))
    assert load_gpt(folder)[1] == f"unknown, {vocab_size} tokens"
    status, _, err = run(evaluation.main, f"--model={folder}", "--dataset=stdlib", "--device=cpu")
    line, = err.strip().splitlines()
    assert status == 1 and "has other tokens than GPT-2's" in line

def gpt2_spelled():
    """The tokens of GPT-2 as in its vocab.json: bytes that cannot be printed are moved up."""
    try:
        ranks = load_tokenizer("gpt2")._mergeable_ranks
    except UserError:
        pytest.skip("needs GPT-2's tokenizer, from the network or TIKTOKEN_CACHE_DIR")
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in printed]
    spelled = {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(moved)}
    return {"".join(spelled[b] for b in token): i for token, i in ranks.items()}

@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_a_tokenizer_of_the_same_size_is_told_from_gpt2s(tmp_path, file, monkeypatch):
    folder = write(tmp_path, *small(50257))
    assert load_gpt(folder)[1] == "gpt2"  # no file says otherwise

    def name(ids):
        content = dict(model=dict(vocab=ids)) if file == "tokenizer.json" else ids
        (tmp_path / file).write_text(json.dumps(content))
        return load_gpt(folder)[1]
    ids = {f"token {i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
    assert name(ids) == "unknown, 50257 tokens"
    if file == "tokenizer.json":  # of a kind with scores for ids
        assert name([[token, -1.0] for token in ids]) == "unknown, 50257 tokens"
    monkeypatch.setattr(tokens, "GPT2", tokens.fingerprint(*(f"token {i}".encode()
                                                             for i in range(50256))))
    assert name(ids) == name(dict(reversed(ids.items()))) == "gpt2"
    assert name(ids | {"token 1": 2, "token 2": 1}) == "unknown, 50257 tokens"
    (tmp_path / file).write_text("[]")
    with pytest.raises(UserError, match=f"{file} is damaged"):
        load_gpt(folder)

def test_the_fingerprint_is_that_of_gpt2s_tokenizer(tmp_path):
    ids = gpt2_spelled()
    assert ids["Ġthe"] == 262 and ids["Ġgazed"] == 50255
    folder = write(tmp_path, *small(50257))
    (tmp_path / "vocab.json").write_text(json.dumps(ids | {"<|endoftext|>": 50256}))
    assert load_gpt(folder)[1] == "gpt2"

def test_a_published_sae_is_for_gpt2_124m_only(tmp_path):
    sizes = dict(n_embd=768, n_layer=6, n_head=12)  # as distilgpt2: of the same width
    gpt, _ = load_gpt(write(tmp_path, hub_weights(**sizes), **sizes))
    with pytest.raises(UserError, match="sae='openai' is GPT-2 124M's; train one"):
        load_sae("openai", 3, 768, gpt)

@pytest.mark.slow
@pytest.mark.parametrize("setting", [dict(), dict(n_head=8), dict(activation_function="relu"),
                                     dict(activation_function="gelu_pytorch_tanh"),
                                     dict(scale_attn_by_inverse_layer_idx=True),
                                     dict(scale_attn_weights=False), dict(layer_norm_epsilon=1e-2),
                                     dict(reorder_and_upcast_attn=True)])
def test_plain_computation_and_ours_equal_transformers(tmp_path, setting):
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers (requirements-test.txt)")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **CONFIG | setting, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        logits = theirs(X).logits
    torch.testing.assert_close(hub_logits(theirs.state_dict(), X, **setting), logits,
                               atol=2e-4, rtol=1e-4)
    for folder, size in ((tmp_path / "whole", "1GB"), (tmp_path / "shards", "100KB")):
        theirs.save_pretrained(folder, max_shard_size=size)
        try:
            close(load_gpt(str(folder))[0], logits)
        except UserError as e:
            assert "config.json" in str(e) and setting.keys() & str(e).replace("=", " ").split()
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
