"""support/reference.py against the official numbers, and the fast code against it, in float64."""
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from golden import G, check_gradients, close, cocomix, concept_model, golden, official_loss
from test_golden import COMPARABLE, LABELS, X, check_labels

from concepts import ConceptModel
from sae import SAE
from support import reference
from support.ablations import DISTANCES, INSERTS, MIXES
from support.reference import step_losses

VARIANTS = [("none", "interleave")] + [(insert, mix) for insert in INSERTS for mix in MIXES
                                       if insert != "none" and (insert, mix) != ("pause", "none")]

# -- the reference and the official code -----------------------------------------------------------

def test_reference_sae_and_attribution_are_the_official_ones():
    gpt, ae, layer = concept_model().gpt, concept_model().sae, int(G["concept_model/layer"])
    h = reference.run_blocks(gpt, reference.embed(gpt, X), 0, layer + 1)
    close(h, "concept_model/h")
    x, mean, std = reference.normalize(h)
    c = reference.sae_encode(ae, x)
    close(reference.sae_preactivations(ae, x), "sae/pre")
    close(c, "concept_model/latents")
    close((c @ ae.decoder + ae.pre_bias) * std + mean, "sae/recon")
    a = reference.attribution(ae, c, golden("concept_model/grad"))
    close(a, "concept_model/attribution", atol=3e-8, rtol=1e-4)
    check_labels(reference.choose_labels(a), LABELS, COMPARABLE)

def test_reference_attribution_from_tokens_is_the_official_one():
    """On the 23 positions per row that have a target."""
    teacher = concept_model()
    a = reference.concept_attribution(teacher.gpt, teacher.sae, teacher.layer, X[:, :-1], X[:, 1:])
    expected = golden("concept_model/attribution")[:, :-1]
    torch.testing.assert_close(a, expected, atol=3e-8, rtol=1e-4)

def test_reference_logits_losses_and_gradients_are_the_official_ones():
    model = cocomix()
    h = reference.run_blocks(model, reference.embed(model, X), 0, model.config.insert_layer)
    close(reference.concept_logits(model.mixer, h), "cocomix/z")
    logits, concept = reference.forward(model, X, LABELS)
    close(logits, "cocomix/logits")
    loss = official_loss(logits)
    assert loss.item() == pytest.approx(float(G["cocomix/loss"]), abs=1e-6)
    assert concept.item() == pytest.approx(float(G["cocomix/loss_concept"]), abs=1e-6)
    (loss + 0.1 * concept).backward()
    check_gradients(model)

# -- the ablations and steering, which the reference leaves out ------------------------------------

def hidden_vector(mixer, h, labels):
    """Predict h_con in place of concepts. (ĉ or None, the loss or None)."""
    x, mean, std = reference.normalize(h)
    g, loss = mixer.predict(x - mixer.pre_bias), None
    if labels is not None:
        loss = {"l1": (g - labels).abs().mean(), "l2": ((g - labels) ** 2).mean(),
                "cos": (1 - F.cosine_similarity(g, labels, dim=-1)).mean()}[mixer.distance]
    c = (mixer.compress(g) + mixer.pre_bias) * std + mean if mixer.mixes else None
    return c, loss

def forward(model, idx, labels=None, scale=1.0):
    """reference.forward for every mixer and way to mix. scale (C,) multiplies the concept logits
    before TopK (steering)."""
    config, c, loss = model.config, None, None
    h = reference.run_blocks(model, reference.embed(model, idx), 0, config.insert_at)
    if config.insert == "concept":
        z = reference.concept_logits(model.mixer, h)
        loss = None if labels is None else reference.concept_loss(z, labels)
        if config.mix != "none":
            c = reference.continuous_concept(model.mixer, z * scale, h)
    elif config.insert == "hidden":
        c, loss = hidden_vector(model.mixer, h, labels)
    elif config.insert == "pause":
        c = model.mixer.vector.expand_as(h)
    if config.interleaved:
        c = h + c if config.mix == "interleave_residual" else c
        h = torch.stack((h, c), dim=2).flatten(1, 2)
    elif config.mix == "add":
        h = h + c
    h = reference.run_blocks(model, h, config.insert_at, config.n_layer)
    return reference.head(model, h[:, 1::2] if config.interleaved else h), loss

def test_the_extension_leaves_cocomix_as_it_is():
    model, (x, _), labels = tiny_gpt(insert="concept"), tokens(), random_labels("concept")
    for ours, expected in zip(forward(model, x, labels), reference.forward(model, x, labels),
                              strict=True):
        assert torch.equal(ours, expected)

# -- the fast code and the reference ---------------------------------------------------------------

def tokens(B=2, T=12):
    return torch.randint(61, (B, T)), torch.randint(61, (B, T))

def random_labels(insert):
    if insert == "concept":
        return torch.randint(40, (2, 12, 4))
    return torch.randn(2, 12, 20, dtype=torch.float64) if insert == "hidden" else None

def check_same_gradients(model, ours, expected):
    parameters = dict(model.named_parameters())
    ours, expected = (torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True,
                                          allow_unused=True) for loss in (ours, expected))
    for name, a, b in zip(parameters, ours, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")

@pytest.mark.parametrize("insert, mix", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_equal_the_reference(insert, mix, bias):
    model = tiny_gpt(insert=insert, mix=mix, bias=bias)
    (x, y), labels = tokens(), random_labels(insert)
    logits, concept = forward(model, x, labels)
    loss, out = reference.next_token_loss(logits, y), model(x, y, labels)
    torch.testing.assert_close(model(x).logits, logits)
    torch.testing.assert_close(out.loss, loss)
    if labels is None:
        assert concept is None and out.concept_loss is None
        return check_same_gradients(model, out.loss, loss)
    torch.testing.assert_close(out.concept_loss, concept)
    check_same_gradients(model, out.loss + 0.3 * out.concept_loss, loss + 0.3 * concept)

@pytest.mark.parametrize("distance", DISTANCES)
def test_hidden_state_losses_equal_the_reference(distance):
    model, (x, y) = tiny_gpt(insert="hidden", distance=distance), tokens()
    labels = random_labels("hidden")
    logits, concept = forward(model, x, labels)
    out = model(x, y, labels)
    torch.testing.assert_close(out.concept_loss, concept)
    check_same_gradients(model, out.loss + out.concept_loss,
                         reference.next_token_loss(logits, y) + concept)

def test_steering_scales_the_logits_before_topk():
    model, (x, _) = tiny_gpt(insert="concept"), tokens()
    scale = torch.ones(40, dtype=torch.float64)
    scale[[3, 17]] = torch.tensor([-8.0, 5.0], dtype=torch.float64)
    expected = forward(model, x, scale=scale)[0]
    torch.testing.assert_close(model(x, scale=scale).logits, expected)

def teacher_with_many_concepts(**choices):
    """So many active concepts that four of them raise the loss at every position."""
    gpt = tiny_gpt().requires_grad_(False).eval()
    sae = SAE(24, 40, 30).double().requires_grad_(False)
    torch.nn.init.normal_(sae.pre_bias, std=0.1)
    torch.nn.init.normal_(sae.latent_bias, mean=3, std=0.1)
    return ConceptModel(gpt, sae, 1, **choices)

@pytest.mark.parametrize("mix", MIXES)
def test_a_whole_step_equals_the_reference(mix, monkeypatch):
    """Tokens → labels → losses and gradients."""
    if mix != "interleave":
        monkeypatch.setattr(reference, "forward", forward)
    teacher, model = teacher_with_many_concepts(), tiny_gpt(insert="concept", mix=mix)
    x, y = tokens()
    total, next_token, concept, attribution = step_losses(
        model, teacher.gpt, teacher.sae, teacher.layer, x, y, concept_weight=0.3)
    labels = teacher.labels(x, y)
    assert torch.equal(labels, reference.choose_labels(attribution))
    assert (attribution > 0).sum(-1).min() >= 4
    out = model(x, y, labels)
    torch.testing.assert_close(out.loss, next_token)
    torch.testing.assert_close(out.concept_loss, concept)
    check_same_gradients(model, out.loss + 0.3 * out.concept_loss, total)

def test_the_paper_s_attribution_lets_all_concepts_compete():
    """Eq. 1: c_pre in place of c."""
    teacher, (x, y) = teacher_with_many_concepts(attribution="paper"), tokens()
    gpt, sae = teacher.gpt, teacher.sae
    h = reference.run_blocks(gpt, reference.embed(gpt, x), 0, 2).requires_grad_()
    logits = reference.head(gpt, reference.run_blocks(gpt, h, 2, 3))
    grad, = torch.autograd.grad(reference.next_token_loss(logits, y), h)
    c_pre = reference.sae_preactivations(sae, reference.normalize(h)[0])
    expected = reference.choose_labels(reference.attribution(sae, c_pre, grad))
    assert torch.equal(teacher.labels(x, y), expected)

def test_the_reference_is_not_frozen_where_the_official_code_is_not():
    """Weights that require gradients accumulate them, and the attributions keep their graph."""
    teacher, model, (x, y) = teacher_with_many_concepts(), tiny_gpt(insert="concept"), tokens()
    arguments = model, teacher.gpt, teacher.sae, teacher.layer, x, y
    assert step_losses(*arguments)[-1].grad_fn is None
    assert all(p.grad is None for p in teacher.gpt.parameters())
    teacher.gpt.requires_grad_(), teacher.sae.requires_grad_()
    assert step_losses(*arguments)[-1].grad_fn is not None
    once = [p.grad.clone() for p in teacher.gpt.parameters()]
    step_losses(*arguments)
    for p, grad in zip(teacher.gpt.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
