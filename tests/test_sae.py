"""The SAE: its files, its losses against dense formulas, its training."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sae as sae_module
from config import read_log
from conftest import run
from sae import SAE, geometric_median, initialize, load_sae, losses, normalize, project_gradient_, variance_share


def make(d=12, C=30, k=4):
    sae = SAE(d, C, k).double()
    initialize(sae, torch.randn(400, d, dtype=torch.float64), torch.Generator().manual_seed(0))
    return sae


def dense(sae, x):
    """c, c_pre of the plain formula, all (N, C)."""
    pre = (x - sae.pre_bias) @ sae.encoder.T + sae.latent_bias
    values, indices = pre.topk(sae.k)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu()), pre


@pytest.mark.parametrize("few", [0, 16], ids=["AuxK sparse", "AuxK dense"])
def test_losses_and_gradients_equal_the_dense_formulas(monkeypatch, few):
    monkeypatch.setattr(sae_module, "FEW", few)
    sae, x = make(), torch.randn(50, 12, dtype=torch.float64)
    dead = torch.zeros(30, dtype=torch.bool)
    dead[torch.randperm(30)[:11]] = True
    c, pre = dense(sae, x)
    residual = x - (c @ sae.decoder + sae.pre_bias)
    fvu = residual.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    target = residual.detach()
    values, indices = pre.masked_fill(~dead, -torch.inf).topk(5)
    rebuilt = torch.zeros_like(pre).scatter(-1, indices, values.relu()) @ sae.decoder
    aux = (target - rebuilt).pow(2).sum() / (target - target.mean(0)).pow(2).sum()
    ours_fvu, ours_aux, top = losses(sae, x, dead, 5)
    torch.testing.assert_close(ours_fvu, fvu)
    torch.testing.assert_close(ours_aux, aux)
    parameters = list(sae.parameters())
    for a, b in zip(torch.autograd.grad(ours_fvu + ours_aux / 32, parameters), torch.autograd.grad(fvu + aux / 32, parameters)):
        torch.testing.assert_close(a, b)
    assert losses(sae, x, torch.zeros_like(dead), 5)[1] == 0


def test_no_dense_tensor_is_kept_for_the_backward_or_made_in_it():
    from torch.utils._python_dispatch import TorchDispatchMode
    N, C = 600, 512
    sae, x = SAE(16, C, 4), torch.randn(N, 16)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        fvu, aux, _ = losses(sae, x, torch.arange(C) % 2 == 0, 8)
    assert len(sizes) > 10
    with Sizes():
        (fvu + aux).backward()
    assert max(sizes) < N * C / 2 and sae.encoder.grad is not None


def test_reconstruction_puts_mean_and_scale_back():
    sae, h = make(), 3 + 5 * torch.randn(20, 12, dtype=torch.float64)
    mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    c, _ = dense(sae, (h - mean) / (std + 1e-5))
    torch.testing.assert_close(sae(h)[0], (c @ sae.decoder + sae.pre_bias) * std + mean)


def test_initialization():
    sae = make(d=32, C=256, k=8)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(256, dtype=torch.float64))
    torch.testing.assert_close(F.normalize(sae.encoder, dim=1), sae.decoder)
    unit = F.normalize(torch.randn(2000, 32, dtype=torch.float64), dim=1)
    back = sae.decode(sae.encode(unit + sae.pre_bias)) - sae.pre_bias
    assert back.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)


def test_geometric_median_has_the_least_summed_distance():
    x = torch.cat((torch.randn(99, 3, dtype=torch.float64), torch.full((20, 3), 50.0, dtype=torch.float64)))
    point = geometric_median(x, 1000)
    total = lambda p: (x - p).norm(dim=1).sum()
    assert all(total(point) <= total(point + 0.01 * torch.randn(3, dtype=torch.float64)) for _ in range(50))
    assert point.norm() < 1 < x.mean(0).norm()


def test_projected_gradient_leaves_the_directions_length_alone():
    sae, x = make(), torch.randn(50, 12, dtype=torch.float64)
    losses(sae, x, torch.zeros(30, dtype=torch.bool), 0)[0].backward()
    before = sae.decoder.grad.clone()
    project_gradient_(sae)
    assert (sae.decoder.grad * sae.decoder).sum(1).abs().max() < 1e-12
    assert ((before * sae.decoder).sum(1).abs() > 1e-6).any()


def test_variance_share_is_one_for_the_mean():
    x = torch.randn(100, 5)
    assert variance_share(x - x.mean(0), x).item() == pytest.approx(1)


def test_file_round_trip_in_the_published_layout(tmp_path):
    sae = make().float()
    sae.frequency.uniform_()
    torch.save(sae.published(), tmp_path / "5.pt")
    state = torch.load(tmp_path / "5.pt", weights_only=True)
    assert set(state) == {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight", "stats_last_nonzero",
                          "latents_activation_frequency", "latents_mean_square", "activation", "activation_state_dict"}
    assert state["encoder.weight"].shape == (30, 12) and state["decoder.weight"].shape == (12, 30)
    assert state["activation"] == "TopK" and state["activation_state_dict"] == {"k": 4, "postact_fn": "ReLU"}
    again = load_sae(str(tmp_path / "5.pt"), layer=5, d=12)
    h = torch.randn(7, 12)
    assert torch.equal(again(h)[0], sae(h)[0]) and torch.equal(again.frequency, sae.frequency)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_reconstruction_equals_eai_sparsifys(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = pytest.importorskip("sparsify", reason="needs eai-sparsify (requirements-test.txt)")
    sae, x = make(d=24, C=64, k=6).float(), torch.randn(40, 24)
    theirs = sparsify.SparseCoder(24, sparsify.SparseCoderConfig(num_latents=64, k=6))
    with torch.no_grad():
        sae.latent_bias.normal_(std=0.1)
        for ours, own in ((sae.encoder, theirs.encoder.weight), (sae.latent_bias, theirs.encoder.bias), (sae.decoder, theirs.W_dec), (sae.pre_bias, theirs.b_dec)):
            own.copy_(ours)
        torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x).sae_out)


def test_training_lowers_fvu_and_reports(chain):
    folder = Path(chain["sae"])
    log, info = read_log(folder / "log.jsonl"), json.loads((folder / "sae.json").read_text())
    assert log[-1]["fvu"] < 0.75 * log[0]["fvu"]
    assert 0 < info["fvu"] < 1 and 0 < info["l0"] <= 6
    assert info["loss_plain"] <= info["loss_spliced"] <= info["loss_zeros"]
    assert info["loss_recovered"] == pytest.approx((info["loss_zeros"] - info["loss_spliced"]) / (info["loss_zeros"] - info["loss_plain"]))
    sae = load_sae(chain["sae"], layer=1, d=16)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(48), atol=1e-5, rtol=0)


def test_report_on_a_perfect_and_a_useless_sae(chain, dataset):
    """An SAE that gives the state back recovers all of the loss; one that gives the bias alone has an FVU near 1."""
    import data
    from model import load_gpt
    gpt, _ = load_gpt(chain["gpt"])
    tokens = data.load_tokens(dataset, "val")[:641]

    class Perfect(SAE):
        def forward(self, h):
            return h, super().forward(h)[1]
    result = sae_module.report(Perfect(16, 48, 6), gpt, 1, tokens, 32, torch.device("cpu"), 10)
    assert result["fvu"] == pytest.approx(0, abs=1e-6) and result["loss_recovered"] == pytest.approx(1)
    useless = SAE(16, 48, 6)
    x = torch.cat([normalize(sae_module.hidden_states(gpt, x, 1))[0].flatten(0, 1) for x, _ in data.sequential(tokens, 32, 8, 257)])
    with torch.no_grad():
        useless.pre_bias.copy_(x.mean(0))
        useless.encoder.zero_()
    assert sae_module.report(useless, gpt, 1, tokens, 32, torch.device("cpu"), 10)["fvu"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("stop", [3, 8])
def test_resume_equals_uninterrupted(chain, dataset, tmp_path, stop):
    argv = ["--n_concepts=48", "--k=6", "--concept_layer=1", "--batch_size=256", "--max_tokens=3072", "--k_aux=8", "--device=cpu", "--eval_tokens=500",
            f"--concept_model={chain['gpt']}", f"--dataset={dataset}", "--save_interval=1", "--log_interval=1", "--dead_tokens=600", "--buffer=3"]
    assert run(sae_module.main, *argv, f"--out_dir={tmp_path / 'a'}")[0] == 0
    stopped = []

    class StopAt(sae_module.config.Log):
        def write(self, values):
            super().write(values)
            if values["step"] == stop and not stopped:
                stopped.append(1)
                raise KeyboardInterrupt
    keep = sae_module.config.Log
    sae_module.config.Log = StopAt
    try:
        assert run(sae_module.main, *argv, f"--out_dir={tmp_path / 'b'}")[0] == 130
    finally:
        sae_module.config.Log = keep
    status, _, err = run(sae_module.main, *argv, f"--out_dir={tmp_path / 'b'}", "--resume")
    assert status == 0, err
    a, b = (torch.load(tmp_path / n / "sae.pt", weights_only=True) for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))
    a, b = (read_log(tmp_path / n / "log.jsonl") for n in "ab")
    assert [line["step"] for line in b] == list(range(1, 13))
    assert [line["fvu"] for line in a] == [line["fvu"] for line in b]
