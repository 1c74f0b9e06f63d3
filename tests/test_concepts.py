"""Labels: attribution against finite differences and dense formulas, selection, the forms of the sign."""
import pytest
import torch
import torch.nn.functional as F

from concepts import ConceptModel
from config import UserError
from conftest import CountProducts, tiny_gpt
from sae import SAE, normalize


def concept_model(layer=1, C=40, k=6, **choices):
    gpt = tiny_gpt().requires_grad_(False).eval()
    sae = SAE(24, C, k).double()
    torch.nn.init.normal_(sae.latent_bias, std=0.3)
    torch.nn.init.normal_(sae.pre_bias, std=0.3)
    return ConceptModel(gpt, sae.requires_grad_(False), layer, **choices)


def batch():
    return torch.randint(61, (2, 12)), torch.randint(61, (2, 12))


def loss_from(teacher, h, y):
    gpt = teacher.gpt
    return F.cross_entropy(gpt.head(gpt.blocks(h, teacher.layer + 1, gpt.config.n_layer)[0]).flatten(0, 1), y.flatten())


def test_attribution_is_the_slope_of_the_loss_along_the_concept():
    teacher, (x, y) = concept_model(), batch()
    h = teacher.gpt.blocks(teacher.gpt.embed(x), 0, 2)[0]
    active = teacher.sae.encode(normalize(h)[0])
    a = teacher.attributions(active, teacher.loss_gradient(h, y).double()).values
    for row, t, j in ((0, 0, 0), (0, 7, 3), (1, 11, 1), (1, 4, 5)):
        step = torch.zeros_like(h)
        step[row, t] = 1e-5 * teacher.sae.decoder[active.indices[row, t, j]]
        slope = (loss_from(teacher, h + step, y) - loss_from(teacher, h - step, y)) / 2e-5
        assert a[row, t, j].item() == pytest.approx((active.values[row, t, j] * slope).item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("sign", ["raise", "lower", "abs"])
@pytest.mark.parametrize("attribution", ["code", "paper"])
def test_labels_equal_the_dense_formula(sign, attribution):
    teacher, (x, y) = concept_model(attribution=attribution, sign=sign), batch()
    h = teacher.gpt.blocks(teacher.gpt.embed(x), 0, 2)[0].requires_grad_()
    g = torch.autograd.grad(loss_from(teacher, h, y), h)[0]
    pre = (normalize(h.detach())[0] - teacher.sae.pre_bias) @ teacher.sae.encoder.T + teacher.sae.latent_bias
    values, indices = pre.topk(6)
    c = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    a = (pre if attribution == "paper" else c) * (g @ teacher.sae.decoder.T)
    a = {"raise": a, "lower": -a, "abs": a.abs()}[sign]
    if attribution == "code":
        a = a.masked_fill(c <= 0, -torch.inf)
    expected = a.topk(4)
    labels = teacher.labels(x, y)
    enough = (expected.values > -torch.inf).all(-1)
    assert enough.sum() > 12 and torch.equal(labels[enough], expected.indices[enough])


def test_selection_by_activation_takes_the_strongest():
    teacher, (x, y) = concept_model(select="activation"), batch()
    h = teacher.gpt.blocks(teacher.gpt.embed(x), 0, 2)[0]
    assert torch.equal(teacher.labels(x, y), teacher.sae.preactivations(normalize(h)[0]).topk(4).indices)


def test_where_too_few_concepts_are_active_only_active_ones_are_labels():
    teacher, (x, y) = concept_model(), batch()
    h = teacher.gpt.blocks(teacher.gpt.embed(x), 0, 2)[0]
    teacher.sae.latent_bias -= teacher.sae.encode(normalize(h)[0]).values[..., 2].median()  # half of the positions keep fewer than 3
    active = teacher.sae.encode(normalize(h)[0])
    labels, some = teacher.labels(x, y), (active.values > 0).any(-1)
    few = ((active.values > 0).sum(-1) < 4) & some
    assert few.any()
    allowed = torch.zeros(2, 12, 40, dtype=torch.bool).scatter(-1, active.indices, active.values > 0)
    assert allowed.gather(-1, labels)[some].all()


def test_weights_stay_frozen_and_gradients_stay_off():
    teacher, (x, y) = concept_model(), batch()
    labels = teacher.labels(x, y)
    assert labels.shape == (2, 12, 4) and labels.dtype == torch.int64 and not labels.requires_grad
    assert all(p.grad is None for p in [*teacher.gpt.parameters(), *teacher.sae.parameters()])
    with torch.no_grad():
        assert torch.equal(teacher.labels(x, y), labels)


@pytest.mark.parametrize("choices, message", [(dict(layer=2), "concept_layer=2"), (dict(layer=7), "concept_layer=7"), (dict(attr_k=9), "attr_k=9")])
def test_impossible_choices_are_named(choices, message):
    with pytest.raises(UserError, match=message):
        concept_model(**choices)


def test_flops_of_the_labels_are_those_of_the_matrix_products_that_run():
    teacher = concept_model()
    x, y = torch.randint(61, (1, 16)), torch.randint(61, (1, 16))
    teacher.gpt = tiny_gpt(vocab_size=64, insert="none").requires_grad_(False).eval()
    attention = 3 * 4 * 24 * 16 // 2 + 1 * 4 * 24 * 16 // 2  # 3 blocks forward, one of them backward
    for select, without in (("attribution", attention), ("activation", 2 * 4 * 24 * 16 // 2)):
        teacher.select = select
        with CountProducts() as counter:
            teacher.labels(x, y)
        assert teacher.flops_per_token() == counter.flops / 16 + without
