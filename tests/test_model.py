"""The GPT: causality, padding, initial weights, mixers, GPT-2's weights. Its values and gradients
are tested in test_reference.py, generation in test_engine.py, its fast paths in test_kernels.py."""
from support.runtime import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from test_reference import VARIANTS, tokens

from model import GPT, ModelConfig, load_gpt, load_model
from support import kernels, reference
from support.ablations import DISTANCES, INSERTS, MIXES, HiddenMixer
from support.kernels import normalize

@pytest.mark.parametrize("insert, mix", VARIANTS)
def test_a_later_token_never_changes_an_earlier_logit(insert, mix):
    model, (x, _) = tiny_gpt(insert=insert, mix=mix), tokens()
    for t in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 1 + torch.randint(60, changed[:, t:].shape)) % 61
        before, after = model(x).logits, model(changed).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])

@pytest.mark.parametrize("mix", MIXES)
def test_concepts_alone_are_those_of_the_whole_forward(mix):
    model, (x, _) = tiny_gpt(insert="concept", mix=mix), tokens()
    steered = torch.ones(40, dtype=torch.float64)
    steered[5] = -9
    for scale in (None, steered):
        alone, whole = model.concepts(x, scale), model(x, scale=scale).concepts
        assert torch.equal(alone.indices, whole.indices)
        assert torch.equal(alone.values, whole.values)

def test_each_sequence_can_be_steered_by_factors_of_its_own():
    model, (x, _) = tiny_gpt(insert="concept"), tokens()
    scale = torch.ones(40, dtype=torch.float64)
    scale[[3, 17]] = torch.tensor([-8.0, 5.0], dtype=torch.float64)
    both = model(x, scale=torch.stack((scale, torch.ones_like(scale)))[:, None]).logits
    torch.testing.assert_close(both[0], model(x, scale=scale).logits[0])
    torch.testing.assert_close(both[1], model(x).logits[1])
    assert not torch.allclose(both[0], model(x).logits[0])

def test_padding_has_no_logits_and_no_part_in_the_loss():
    model, (x, y) = tiny_gpt(vocab_size=61), tokens()
    with torch.no_grad():
        model.wte.weight[61:] = 100.0
    logits, loss = model(x).logits, model(x, y).loss
    assert logits.shape[-1] == 61 and len(model.wte.weight) == 64
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    loss.backward()
    assert model.wte.weight.grad[61:].abs().max() == 0

def test_blocks_in_pieces_equal_the_whole_forward():
    model, (x, _) = tiny_gpt(insert="concept"), tokens()
    h = model.forward_blocks(model.embed(x), 0, 1)
    h_final, mixed = model.finish(h, 1)
    assert mixed.h.shape == (2, 24, 24) and h_final.shape == (2, 12, 24)
    assert torch.equal(model.head(h_final), model(x).logits)
    positions = torch.arange(12).expand(2, 12)
    assert torch.equal(model.embed(x, positions=positions), model.embed(x))
    assert torch.equal(model.embed(x[:, 5:], past=5), model.embed(x)[:, 5:])

@pytest.mark.parametrize("mix", ["interleave", "interleave_residual"])
def test_the_last_block_with_and_without_a_mask_is_the_same(mix, monkeypatch):
    model, (x, y) = tiny_gpt(insert="concept", mix=mix), tokens()
    found = []
    for skips in (False, True):
        monkeypatch.setattr(kernels, "skips_mask", lambda device, skips=skips: skips)
        loss = model(x, y).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.h.parameters()))])
    for masked, whole in zip(*found, strict=True):
        torch.testing.assert_close(masked, whole)

def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(AssertionError, match="17 tokens are more than block_size=16"):
        tiny_gpt()(torch.zeros(1, 17, dtype=torch.long))

@pytest.mark.parametrize("distance", DISTANCES)
def test_the_hidden_state_is_predicted_by_the_chosen_distance_and_compressed(distance):
    config = ModelConfig(16, 61, 3, 2, 24, insert="hidden", hidden_size=20, distance=distance)
    mixer = HiddenMixer(config).double()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    h = torch.randn(2, 5, 24, dtype=torch.float64)
    labels = torch.randn(2, 5, 20, dtype=torch.float64)
    c, concepts, loss = mixer(h, labels)
    assert concepts is None and mixer(h)[2] is None
    x, mean, std = normalize(h)
    first, second, w = mixer.predict[0], mixer.predict[2], mixer.compress
    hidden = F.gelu((x - mixer.pre_bias) @ first.weight.T + first.bias, approximate="tanh")
    g = hidden @ second.weight.T + second.bias
    expected = (g @ w.weight.T + w.bias + mixer.pre_bias) * std + mean
    torch.testing.assert_close(c, expected)
    cosine = (g * labels).sum(-1) / g.norm(dim=-1) / labels.norm(dim=-1)
    each = {"l1": (g - labels).abs().mean(-1), "l2": ((g - labels) ** 2).mean(-1),
            "cos": 1 - cosine}
    torch.testing.assert_close(loss, each[distance].mean())

@pytest.mark.parametrize("settings, message", [
    (dict(n_embd=25), "n_embd=25 is not divisible by n_head=2"),
    (dict(vocab_size=70_000), "vocab_size=70000 is over 65536"),
    (dict(insert="concepts"), "insert='concepts': expected one of none, concept, hidden, pause"),
    (dict(mix="between"), "mix='between'"), (dict(distance="l3"), "distance='l3'"),
    (dict(insert="hidden", hidden_size=0), "hidden_size=0"),
    (dict(insert="pause", mix="none"), "mix='none' with pause vectors"),
    (dict(insert="concept", insert_layer=3), "insert_layer=3 is outside the stack of 3 blocks"),
    (dict(insert="concept", concept_k=41), "concept_k=41 concepts cannot be kept of 40"),
])
def test_settings_that_contradict_each_other_are_named(settings, message):
    with pytest.raises(UserError) as e:
        tiny_gpt(**settings)
    assert message in str(e.value)

# -- initial weights -------------------------------------------------------------------------------

def test_initial_weights_are_those_of_gpt2():
    model = GPT(ModelConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128,
                            insert="concept", n_concepts=600))
    mixer, projection = model.mixer, model.h[3].mlp.c_proj.weight
    for weight in (model.wte.weight, mixer.predict.weight, mixer.compress):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert projection.std().item() == pytest.approx(0.02 / 16 ** 0.5, rel=0.05)
    assert mixer.pre_bias.abs().max() == 0 and mixer.predict.bias.abs().max() == 0

def test_methods_start_from_the_same_shared_weights():
    states = []
    for insert in INSERTS:
        torch.manual_seed(5)
        model = GPT(ModelConfig(16, 61, 3, 2, 24, insert=insert, n_concepts=40, concept_k=5,
                                hidden_size=20))
        states.append(model.state_dict())
    for name, weight in states[0].items():
        assert all(torch.equal(state[name], weight) for state in states)

# -- stored weights --------------------------------------------------------------------------------

def test_weights_of_an_older_version_are_named():
    model = tiny_gpt(insert="concept")
    state = {name.replace("mixer.", "inserted."): t for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match="older version of this code.*train the run again"):
        load_model(dict(model_config=vars(model.config), model=state))

def test_gpt2_weights_load_from_a_folder_in_the_hubs_layout(tmp_path):
    model, state = tiny_gpt(torch.float32, n_embd=128, vocab_size=61), {}
    for name, t in model.state_dict().items():
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = t.T.contiguous() if conv else t
    state["wte.weight"] = state["wte.weight"][:61]
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)  # the mask buffer of old files
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded, tokenizer = load_gpt(str(tmp_path))
    c = loaded.config
    assert tokenizer != "gpt2" and (c.n_layer, c.block_size, c.vocab_size) == (3, 16, 61)
    x = torch.randint(61, (2, 9))
    torch.testing.assert_close(loaded(x).logits, model(x).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not GPT-2's weights"):
        load_gpt(str(tmp_path))

@pytest.mark.slow
def test_gpt2_equals_transformers(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers (requirements-test.txt)")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=128, n_head=2, n_layer=3, n_positions=32, vocab_size=211, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    theirs.save_pretrained(tmp_path / "folder")  # model.safetensors
    x = torch.randint(211, (2, 32))
    for folder in (tmp_path, tmp_path / "folder"):
        ours, _ = load_gpt(str(folder))
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-4, rtol=1e-4)

def test_dropout_acts_in_training_only(monkeypatch):
    model, x = tiny_gpt(dropout=0.5), torch.randint(61, (2, 12))
    seen, keep = [], kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a: seen.append(a[-1]) or keep(*a))
    assert not torch.equal(model(x).logits, model(x).logits) and set(seen) == {0.5}
    model.eval()
    seen.clear()
    h = reference.run_blocks(model, reference.embed(model, x), 0, 3)
    torch.testing.assert_close(model(x).logits, reference.head(model, h))
    assert set(seen) == {0.0}

def test_the_initial_stds_are_those_of_the_config():
    model = GPT(ModelConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128,
                            embedding_std=0.3, init_std=0.05))
    assert model.wte.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.wpe.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.h[2].attn.c_attn.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.h[2].mlp.c_proj.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)

def test_kept_values_below_zero_stay(k=40):
    model, x = tiny_gpt(insert="concept", concept_k=k), torch.randint(61, (2, 12))
    labels = torch.randint(40, (2, 12, 4))
    assert (model(x).concepts.values < 0).any()
    torch.testing.assert_close(model(x).logits, reference.forward(model, x, labels)[0])
