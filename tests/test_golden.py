"""Equality with the official code, on what it computed from random weights (golden.py)."""
import pytest
import torch
from golden import (
    INSERT_LAYER,
    LAYER,
    G,
    check_gradients,
    close,
    cocomix,
    concept_model,
    golden,
    official_loss,
    sae,
)

from support.kernels import normalize

X = golden("x")
LABELS = golden("concept_model/labels")
# With fewer than 4 concepts above 0 the official topk picks arbitrary others, and so it does where
# the last position has no target and no gradient.
COMPARABLE = (golden("concept_model/attribution") > 0).sum(-1) >= 4
COMPARABLE[:, -1] = False

def dense(top, n):
    zeros = torch.zeros(*top.values.shape[:-1], n, dtype=top.values.dtype)
    return zeros.scatter_(-1, top.indices, top.values)

def check_labels(labels, official, comparable):
    assert comparable.sum() >= 10
    ours, official = labels[comparable].sort(-1).values, official[comparable].sort(-1).values
    assert torch.equal(ours, official)

def test_concept_model_loss_and_hidden_state():
    gpt = concept_model().gpt
    expected = pytest.approx(float(G["concept_model/loss"]), abs=1e-6)
    assert official_loss(gpt(X).logits).item() == expected
    close(gpt.forward_blocks(gpt.embed(X), 0, LAYER + 1), "concept_model/h")

def official_gradient(gpt):
    h = golden("concept_model/h").requires_grad_()
    loss = official_loss(gpt.head(gpt.forward_blocks(h, LAYER + 1, 4)))
    return torch.autograd.grad(loss, h)[0]

def test_gradient_for_the_hidden_state():
    close(official_gradient(concept_model().gpt), "concept_model/grad", atol=3e-8, rtol=1e-4)

def test_loss_gradient_is_the_official_one_where_all_targets_are_given():
    """Ours has a target at every position: on the first 23 positions the two losses agree."""
    teacher = concept_model()
    ours = teacher.loss_gradient(golden("concept_model/h")[:, :-1], X[:, 1:])[0].double()
    official = official_gradient(teacher.gpt)[:, :-1]
    torch.testing.assert_close(ours, official, atol=1e-7, rtol=1e-5)

def test_sae_encode_and_decode():
    ae = sae()
    x, mean, std = normalize(golden("concept_model/h"))
    close(ae.preactivations(x), "sae/pre")
    top = ae.encode(x)
    close(dense(top, 64), "concept_model/latents")
    close(ae.decode(top) * std + mean, "sae/recon")

def test_attribution_and_labels():
    teacher = concept_model()
    x = normalize(golden("concept_model/h"))[0]
    active, grad = teacher.sae.encode(x), golden("concept_model/grad")
    a = teacher.attributions(active, grad)
    close(dense(a, 64), "concept_model/attribution", atol=3e-8, rtol=1e-4)
    check_labels(teacher._choose(x, active, grad), LABELS, COMPARABLE)

def test_labels_from_tokens():
    """The whole path, on 23 positions per row (each with a target)."""
    labels = concept_model().labels(X[:, :-1], X[:, 1:])
    check_labels(labels, LABELS[:, :-1], COMPARABLE[:, :-1])

def test_cocomix_logits_and_losses():
    model = cocomix()
    h = model.forward_blocks(model.embed(X), 0, INSERT_LAYER)
    close(model.mixer.predict(normalize(h)[0] - model.mixer.pre_bias), "cocomix/z")
    predicted = model.concepts(X)
    torch.testing.assert_close(predicted.values, golden("cocomix/z").topk(8).values,
                               atol=1e-5, rtol=1e-5)
    assert torch.equal(predicted.indices, golden("cocomix/z").topk(8).indices)
    logits = model(X).logits
    close(logits, "cocomix/logits")
    assert official_loss(logits).item() == pytest.approx(float(G["cocomix/loss"]), abs=1e-6)
    concept_loss = model(X, X, LABELS).concept_loss
    assert concept_loss.item() == pytest.approx(float(G["cocomix/loss_concept"]), abs=1e-6)

def test_cocomix_gradients():
    model = cocomix()
    (official_loss(model(X).logits) + 0.1 * model(X, X, LABELS).concept_loss).backward()
    check_gradients(model)
