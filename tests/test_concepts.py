"""The concept model: attribution against finite differences and dense formulas, the selection of
labels, its teacher. The values of the official code are in test_golden.py."""
from support.runtime import UserError

import pytest
import torch
from conftest import CountProducts, run, tiny_gpt

import concepts
from concepts import ConceptModel, LabelConfig, concept_model_of_run
from model import load_model
from sae import SAE
from support import reference
from support.accounting import label_flops_per_token
from support.activations import hidden_states
from support.checkpoint import load_checkpoint
from support.cli import parse
from support.kernels import normalize

CPU = torch.device("cpu")

def make(layer=1, C=40, k=6, **choices):
    gpt = tiny_gpt().requires_grad_(False).eval()
    sae = SAE(24, C, k).double()
    torch.nn.init.normal_(sae.latent_bias, std=0.3)
    torch.nn.init.normal_(sae.pre_bias, std=0.3)
    return ConceptModel(gpt, sae.requires_grad_(False), layer, **choices)

def tokens(T=12):
    return torch.randint(61, (2, T)), torch.randint(61, (2, T))

def read(cm, x):
    """(h, normalised h, active concepts) after the concept model's layer."""
    h = hidden_states(cm.gpt, x, cm.layer)
    return h, normalize(h)[0], cm.sae.encode(normalize(h)[0])

def loss_from(cm, h, y):
    """The mean next-token loss as a function of h, by the plain formulas."""
    h_final = reference.run_blocks(cm.gpt, h, cm.layer + 1, cm.gpt.config.n_layer)
    return reference.next_token_loss(reference.head(cm.gpt, h_final), y)

# -- attribution and labels ------------------------------------------------------------------------

def test_attribution_is_the_slope_of_the_loss_along_the_concept():
    cm, (x, y) = make(), tokens()
    h, _, active = read(cm, x)
    a = cm.attributions(active, cm.loss_gradient(h, y)[0].double()).values
    for row, t, j in ((0, 0, 0), (0, 7, 3), (1, 11, 1), (1, 4, 5)):
        step = torch.zeros_like(h)
        step[row, t] = 1e-5 * cm.sae.decoder[active.indices[row, t, j]]
        slope = (loss_from(cm, h + step, y) - loss_from(cm, h - step, y)) / 2e-5
        expected = (active.values[row, t, j] * slope).item()
        assert a[row, t, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)

@pytest.mark.parametrize("sign", ["raise", "lower", "abs"])
@pytest.mark.parametrize("attribution", ["code", "paper"])
def test_labels_equal_the_dense_formula(sign, attribution):
    cm, (x, y) = make(attribution=attribution, sign=sign), tokens()
    h, h_normal, _ = read(cm, x)
    h.requires_grad_()
    grad = torch.autograd.grad(loss_from(cm, h, y), h)[0]
    c = reference.sae_encode(cm.sae, h_normal)
    competing = reference.sae_preactivations(cm.sae, h_normal) if attribution == "paper" else c
    a = reference.attribution(cm.sae, competing, grad)
    a = {"raise": a, "lower": -a, "abs": a.abs()}[sign]
    if attribution == "code":
        a = a.masked_fill(c <= 0, -torch.inf)
    expected, labels = a.topk(4), cm.labels(x, y)
    enough = (expected.values > -torch.inf).all(-1)  # positions with four active concepts
    assert enough.sum() > 12
    assert torch.equal(labels[enough], expected.indices[enough])

def test_selection_by_activation_takes_the_strongest():
    cm, (x, y) = make(select="activation"), tokens()
    _, h_normal, _ = read(cm, x)
    assert torch.equal(cm.labels(x, y), cm.sae.preactivations(h_normal).topk(4).indices)

@pytest.mark.parametrize("select", ["attribution", "activation"])
def test_where_too_few_concepts_are_active_only_active_ones_are_labels(select):
    cm, (x, y) = make(select=select), tokens()
    # half of the positions keep fewer than three
    cm.sae.latent_bias -= read(cm, x)[2].values[..., 2].median()
    active, labels = read(cm, x)[2], cm.labels(x, y)
    n_active = (active.values > 0).sum(-1)
    some = n_active > 0
    assert ((n_active < 4) & some).any()
    allowed = torch.zeros(2, 12, 40, dtype=torch.bool)
    allowed.scatter_(-1, active.indices, active.values > 0)
    assert allowed.gather(-1, labels)[some].all()

def test_weights_stay_frozen_and_gradients_stay_off():
    cm, (x, y) = make(), tokens()
    labels = cm.labels(x, y)
    assert labels.shape == (2, 12, 4) and labels.dtype == torch.int64 and not labels.requires_grad
    assert all(p.grad is None for p in [*cm.gpt.parameters(), *cm.sae.parameters()])
    with torch.no_grad():
        assert torch.equal(cm.labels(x, y), labels)

@pytest.mark.parametrize("choices, error, message", [
    (dict(layer=2), UserError, "concept_layer=2"), (dict(layer=7), UserError, "concept_layer=7"),
    (dict(attr_k=7), AssertionError, "attr_k=7 labels: only 6 candidates"),
    (dict(attr_k=41, attribution="paper"), AssertionError, "attr_k=41 labels: only 40"),
    (dict(attr_k=7, attribution="paper", select="activation"), AssertionError, "only 6"),
])
def test_impossible_choices_are_named(choices, error, message):
    with pytest.raises(error, match=message):
        make(**choices)

def test_flops_of_labels_are_those_of_the_matrix_products_that_run():
    x, y = torch.randint(61, (1, 16)), torch.randint(61, (1, 16))
    attention = 4 * 24 * 16 // 2  # of one block
    # by attribution: 3 blocks forward, one backward, which is twice a forward; by activation: the 2
    # lower blocks
    for select, blocks in (("attribution", 5), ("activation", 2)):
        cm = make(select=select)
        cm.gpt = tiny_gpt(vocab_size=64).requires_grad_(False).eval()
        with CountProducts() as counter:
            cm.labels(x, y)
        assert label_flops_per_token(cm) == counter.flops / 16 + blocks * attention

@pytest.mark.parametrize("select, target", [("attribution", "concept"), ("activation", "concept"),
                                            ("attribution", "hidden"), ("attribution", "none")])
def test_a_teacher_has_the_models_logits_and_costs_no_second_forward(select, target):
    cm, (x, y), counts = make(select=select, target=target), tokens(16), []
    for teaches in (False, True):
        with CountProducts() as counter:
            targets = cm.concept_targets(x, y, teaches)
        counts.append(counter.flops)
        assert (targets.teacher is not None) == teaches
    teacher = targets.teacher
    torch.testing.assert_close(teacher.x @ teacher.weight[:61].T, cm.gpt(x).logits)
    assert not teacher.x.requires_grad
    if target == "hidden":
        torch.testing.assert_close(targets.labels, read(cm, x)[1])
    elif target == "none":
        assert targets.labels is None and targets.active is None
    else:
        assert torch.equal(targets.labels, cm.labels(x, y))
        # labels by attribution have already run the upper blocks
        assert (counts[0] == counts[1]) == (select == "attribution")

@pytest.mark.parametrize("mix", ["interleave", "add", "none"])
@pytest.mark.parametrize("n_layer, insert_layer", [(3, 0), (3, 1), (3, 2), (1, 0)])
def test_a_teacher_may_have_a_mixer_of_its_own(monkeypatch, mix, n_layer, insert_layer):
    gpt = tiny_gpt(insert="concept", mix=mix, n_layer=n_layer, insert_layer=insert_layer)
    monkeypatch.setattr(concepts, "load_gpt", lambda *_: (gpt.requires_grad_(False).eval(), "hash"))
    cm, _ = concepts.load_concept_model(parse(LabelConfig, [])[0], CPU, target="none", teaches=True)
    x, y = tokens()
    teacher = cm.concept_targets(x, y).teacher
    torch.testing.assert_close(teacher.x @ teacher.weight[:61].T, gpt(x).logits)

def test_for_labels_from_disk_only_the_next_token_distribution_is_left():
    cm, (x, y) = make(), tokens()
    targets = cm.distribution_only().concept_targets(x, y)
    assert targets.labels is None and targets.active is None
    assert torch.equal(targets.teacher.x, cm.concept_targets(x, y, teaches=True).teacher.x)

# -- runs ------------------------------------------------------------------------------------------

def test_a_run_finds_the_concept_model_that_it_learned_from(chain):
    assert concept_model_of_run(load_checkpoint(chain["ntp"]), CPU) is None
    content = load_checkpoint(chain["cocomix"])
    cm = concept_model_of_run(content, CPU)
    assert (cm.layer, cm.attr_k, cm.target, len(cm.sae.encoder)) == (1, 4, "concept", 48)
    gpt = load_checkpoint(chain["gpt"])["model"]
    assert all(torch.equal(t, gpt[name]) for name, t in cm.gpt.state_dict().items())
    content["train_config"] |= dict(select="activation", attr_k=3)
    x, y = torch.randint(97, 123, (2, 12)), torch.randint(97, 123, (2, 12))
    labels = concept_model_of_run(content, CPU).labels(x, y)
    assert torch.equal(labels, read(cm, x)[2].indices[..., :3])

def test_the_column_norms_of_the_compress_matrix_are_shown_and_drawn(chain, tmp_path):
    plot = tmp_path / "w.svg"
    status, out, err = run(concepts.main, chain["cocomix"], "--weights", f"--plot={plot}")
    assert status == 0, err
    norms = load_model(load_checkpoint(chain["cocomix"])).mixer.compress.norm(dim=1)
    short, median = (norms < 1e-2).float().mean().item(), norms.median().item()
    assert f"{short:.1%} of 48 columns are shorter than 0.01; median {median:.2f}" in out
    assert len(out.splitlines()) == 21 and plot.is_file()
    status, _, err = run(concepts.main, chain["ntp"], "--weights")
    assert status == 1 and "no concepts" in err

def test_a_run_has_the_labels_that_its_keys_say(chain):
    content = load_checkpoint(chain["cocomix"])
    content["train_config"] |= dict(attribution="paper", attribution_sign="lower")
    cm = concepts.concept_model_of_run(content, CPU)
    assert (cm.select, cm.attribution, cm.sign) == ("attribution", "paper", "lower")
