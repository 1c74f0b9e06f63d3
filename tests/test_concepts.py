"""Labels: attribution against finite differences and dense formulas, selection, the forms of the sign; labels on disk."""
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import concepts
import data
import train
from concepts import ConceptModel, LabelKeys, load_concept_model, open_labels, write_labels
from config import UserError, read_log
from conftest import TINY, CountProducts, run, tiny_gpt
from model import load_checkpoint, load_model
from sae import SAE, hidden_states, normalize


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
    a = teacher.attributions(active, teacher.loss_gradient(h, y)[0].double()).values
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


def test_a_teacher_gives_its_own_logits_and_costs_no_second_forward():
    teacher = concept_model()
    x, y = torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    logits = teacher.gpt(x).logits
    for select, target in (("attribution", "concept"), ("activation", "concept"), ("attribution", "hidden"), ("attribution", "none")):
        teacher.select, teacher.target, counts = select, target, []
        for teaches in (False, True):
            with CountProducts() as counter:
                guidance = teacher.guide(x, y, teaches)
            counts.append(counter.flops)
        taught = guidance.teacher
        torch.testing.assert_close(taught.x @ taught.weight[:61].T, logits)
        assert not taught.x.requires_grad
        if target == "hidden":
            torch.testing.assert_close(guidance.labels, normalize(hidden_states(teacher.gpt, x, teacher.layer))[0])
        if (select, target) == ("attribution", "concept"):
            assert counts[0] == counts[1]  # labels by attribution have run the upper blocks already
            assert torch.equal(guidance.labels, teacher.labels(x, y))


# -- labels on disk -----------------------------------------------------------------------------------

def float64(f):
    torch.set_default_dtype(torch.float64)
    try:
        return f()
    finally:
        torch.set_default_dtype(torch.float32)


def label_keys(chain, dataset, *more):
    return [f"--dataset={dataset}", "--block_size=32", "--concept_layer=1", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}", "--device=cpu", *more]


@pytest.fixture
def own_dataset(dataset, tmp_path):  # labels are written beside the data
    return shutil.copytree(dataset, tmp_path / "data")


@pytest.mark.parametrize("choice", [["--select=activation", "--attr_k=3"], ["--attribution_sign=abs"]], ids=" ".join)
def test_training_on_labels_from_disk_equals_labels_made_on_the_fly(chain, own_dataset, tmp_path, choice):
    def losses(name, *more):
        assert run(train.main, *TINY, *label_keys(chain, own_dataset, *choice), "--method=cocomix", "--shift_blocks=false", f"--out_dir={tmp_path / name}", *more)[0] == 0
        return read_log(tmp_path / name / "log.jsonl")
    def both():
        assert run(concepts.main, "--write_labels", *label_keys(chain, own_dataset, *choice))[0] == 0
        return losses("disk", "--labels=disk"), losses("fly")
    disk, fly = float64(both)
    for a, b in zip(disk, fly, strict=True):
        for name in {"loss", "concept_loss", "val_loss", "val_concept_loss", "grad_norm"} & {*a, *b}:
            assert a[name] == b[name]
    kd = float64(lambda: losses("kd", "--labels=disk", "--method=cocomix_kd", "--kd_weight=0"))
    assert kd[-1]["val_loss"] == pytest.approx(fly[-1]["val_loss"], abs=1e-6)


def test_labels_on_disk_are_those_of_every_unshifted_block_and_writing_goes_on_where_it_stopped(chain, own_dataset, monkeypatch):
    keys = LabelKeys(str(own_dataset), 32, chain["gpt"], chain["sae"], 1)
    teacher, _ = load_concept_model(keys, torch.device("cpu"))
    whole = np.array(data.load_tokens(own_dataset, "train"))
    path = write_labels(teacher, keys, 257, torch.device("cpu"))
    labels = np.array(open_labels(teacher, keys))
    assert labels.shape == ((len(whole) - 1) // 32, 32, 4) and labels.dtype == np.uint16 and labels.max() < 48
    x, y = torch.tensor(whole[320:352].astype(int))[None], torch.tensor(whole[321:353].astype(int))[None]
    assert np.array_equal(labels[10], teacher.labels(x, y)[0])
    content = path.read_bytes()
    path.unlink()
    calls, keep = [], teacher.labels

    def breaks(*a):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return keep(*a)
    monkeypatch.setattr(teacher, "labels", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_labels(teacher, keys, 257, torch.device("cpu"))
    part = path.with_suffix(".part")
    with open(part, "ab") as file:
        file.write(b"half a row")
    write_labels(teacher, keys, 257, torch.device("cpu"))
    assert len(calls) == 4 and path.read_bytes() == content and not part.exists()  # 3 calls of 8192 tokens, one of them twice


def test_labels_of_something_else_are_refused(chain, own_dataset, tmp_path):
    assert run(concepts.main, "--write_labels", *label_keys(chain, own_dataset))[0] == 0
    def train_on(*more):
        status, _, err = run(train.main, *TINY, *label_keys(chain, own_dataset), "--method=cocomix", "--labels=disk", f"--out_dir={tmp_path / 'run'}", *more)
        assert status == 1 and len(err.strip().splitlines()) == 1
        return err
    assert "--shift_blocks=false" in train_on()
    assert "no labels at" in train_on("--shift_blocks=false", "--select=activation")
    assert "no labels at" in train_on("--shift_blocks=false", "--attr_k=2")
    other = shutil.copytree(chain["sae"], tmp_path / "sae")
    state = torch.load(other / "sae.pt")
    state["latent_bias"] += 1
    torch.save(state, other / "sae.pt")
    assert "labels of another sae" in train_on("--shift_blocks=false", f"--sae={other}")
    status, _, err = run(concepts.main, "--write_labels", *label_keys(chain, own_dataset), f"--sae={other}")  # nor are they written over
    assert status == 1 and "labels of another sae" in err
    (other / "sae.json").unlink()
    assert "labels of another concept_model, sae" in train_on("--shift_blocks=false", f"--sae={other}", f"--concept_model={chain['ntp']}")
    path = next(own_dataset.glob("labels_*.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    assert "cut short" in train_on("--shift_blocks=false") and "cut short" in run(concepts.main, "--write_labels", *label_keys(chain, own_dataset))[2]
    assert "not for method='ntp'" in train_on("--shift_blocks=false", "--method=ntp")


def test_the_column_lengths_of_the_compress_matrix_are_shown_and_drawn(chain, tmp_path):
    status, out, err = run(concepts.main, chain["cocomix"], "--weights", f"--plot={tmp_path / 'w.svg'}")
    assert status == 0, err
    norms = load_model(load_checkpoint(chain["cocomix"])).inserted.compress.norm(dim=1)
    assert f"{(norms < 1e-2).float().mean().item():.1%} of 48 columns are shorter than 0.01; median {norms.median().item():.2f}" in out
    assert len(out.splitlines()) == 21 and (tmp_path / "w.svg").is_file()
    assert "no compress matrix" in run(concepts.main, chain["ntp"], "--weights")[2] or "no concepts" in run(concepts.main, chain["ntp"], "--weights")[2]
