"""Equality with the official code, on the numbers it gave for random weights (official.npz, see golden.py)."""
import pytest
import torch

from golden import G, LAYER, cocomix, concept_model, golden, official_loss, sae
from sae import normalize

X = golden("x")


def close(ours, name, tolerance=1e-5):
    torch.testing.assert_close(ours.detach().to(torch.float64), golden(name), atol=tolerance, rtol=tolerance)


def dense(top, n):
    return torch.zeros(*top.values.shape[:-1], n, dtype=top.values.dtype).scatter_(-1, top.indices, top.values)


def test_concept_model_loss_and_hidden_state():
    gpt = concept_model().gpt
    assert official_loss(gpt(X).logits).item() == pytest.approx(float(G["concept_model/loss"]), abs=1e-6)
    close(gpt.blocks(gpt.embed(X), 0, LAYER + 1)[0], "concept_model/h")


def official_gradient(gpt):
    h = golden("concept_model/h").requires_grad_()
    return torch.autograd.grad(official_loss(gpt.head(gpt.blocks(h, LAYER + 1, 4)[0])), h)[0]


def test_gradient_for_the_hidden_state():
    grad = official_gradient(concept_model().gpt)
    torch.testing.assert_close(grad, golden("concept_model/grad"), atol=3e-8, rtol=1e-4)


def test_loss_gradient_is_the_official_one_where_all_targets_are_given():
    """Ours has a target at every position: on the first 23 positions alone, both losses are the same."""
    teacher = concept_model()
    h = golden("concept_model/h")[:, :-1]
    torch.testing.assert_close(teacher.loss_gradient(h, X[:, 1:])[0].double(), official_gradient(teacher.gpt)[:, :-1], atol=1e-7, rtol=1e-5)


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
    active = teacher.sae.encode(x)
    a = teacher.attributions(active, golden("concept_model/grad"))
    torch.testing.assert_close(dense(a, 64), golden("concept_model/attribution"), atol=3e-8, rtol=1e-4)
    scores = a.values.masked_fill(active.values <= 0, -torch.inf)
    labels = active.indices.gather(-1, scores.topk(4).indices)
    fewer = (golden("concept_model/attribution") > 0).sum(-1) < 4  # there the official topk fills up with arbitrary ids
    fewer[:, -1] = True                                            # no target there, so no gradient
    assert (~fewer).sum() >= 10
    assert torch.equal(labels[~fewer].sort(-1).values, golden("concept_model/labels")[~fewer].sort(-1).values)


def test_labels_method_agrees_with_the_official_labels():
    """The whole path, tokens to labels, on 23 positions a row (each with a target)."""
    labels = concept_model().labels(X[:, :-1], X[:, 1:])
    many = (golden("concept_model/attribution")[:, :-1] > 0).sum(-1) >= 4
    assert torch.equal(labels[many].sort(-1).values, golden("concept_model/labels")[:, :-1][many].sort(-1).values)


def test_cocomix_logits_and_losses():
    model = cocomix()
    h = model.blocks(model.embed(X), 0, 2)[0]
    close(model.inserted.logits(h), "cocomix/z")
    out = model(X)
    close(out.logits, "cocomix/logits")
    assert official_loss(out.logits).item() == pytest.approx(float(G["cocomix/loss"]), abs=1e-6)
    concept_loss = model(X, X, golden("concept_model/labels")).concept_loss
    assert concept_loss.item() == pytest.approx(float(G["cocomix/loss_concept"]), abs=1e-6)


def test_cocomix_gradients():
    model = cocomix()
    out = model(X)
    (official_loss(out.logits) + 0.1 * model(X, X, golden("concept_model/labels")).concept_loss).backward()
    ours = {"transformer.concept_predictor.weight": model.inserted.predict.weight.grad, "transformer.concept_predictor.bias": model.inserted.predict.bias.grad,
            "transformer.compress_layer.weight": model.inserted.compress.grad.T, "transformer.pre_bias": model.inserted.bias.grad,
            "transformer.wte.weight": model.wte.weight.grad[:101], "transformer.h.0.attn.c_attn.weight": model.h[0].attn.c_attn.weight.grad.T,
            "transformer.h.3.mlp.c_proj.weight": model.h[3].mlp.c_proj.weight.grad.T}
    names = [name.removeprefix("cocomix/grads/") for name in G.files if name.startswith("cocomix/grads/")]
    assert sorted(names) == sorted(ours)
    for name in names:
        torch.testing.assert_close(ours[name], golden(f"cocomix/grads/{name}"), atol=1e-7, rtol=1e-4)
