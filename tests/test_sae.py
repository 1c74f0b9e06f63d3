"""The SAE: its losses against dense formulas, its file layout, its training."""
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from support.runtime import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_SAE, StopAt, run, tiny_gpt
from torch.utils._python_dispatch import TorchDispatchMode

import sae as sae_module
from model import load_gpt
from sae import SAE, Config, initialize, load_sae, losses, train_step, variance_share
from support import kernels, reference, sae_run, training
from support.activations import HiddenStates, check_layer, geometric_median, hidden_states
from support.kernels import normalize
from support.log import read_log
from support.published import sae_file
from support.sae_run import report
from support.tokens import Batches, load_tokens, sequential

CPU = torch.device("cpu")

def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)

def make(d=12, C=30, k=4):
    sae = SAE(d, C, k).double()
    initialize(sae, normal(400, d), torch.Generator().manual_seed(0))
    return sae

# -- losses and steps ------------------------------------------------------------------------------

@pytest.mark.parametrize("k_aux, n_dead", [(5, 11), (1, 20)], ids=["AuxK dense", "AuxK sparse"])
def test_losses_and_gradients_equal_the_dense_formulas(k_aux, n_dead):
    sae, x = make(), normal(50, 12)
    assert (n_dead <= 16 * k_aux) == (k_aux == 5)  # the limit between the two forms of AuxK
    dead = torch.zeros(30, dtype=torch.bool)
    dead[torch.randperm(30)[:n_dead]] = True
    pre, c = reference.sae_preactivations(sae, x), reference.sae_encode(sae, x)
    residual = x - (c @ sae.decoder + sae.pre_bias)
    fvu = residual.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    # as openai's trainer: both with b_pre, a constant in the target
    target = residual.detach() + sae.pre_bias.detach()
    values, indices = pre.masked_fill(~dead, -torch.inf).topk(k_aux)
    rebuilt = torch.zeros_like(pre).scatter(-1, indices, values.relu()) @ sae.decoder
    rebuilt = rebuilt + sae.pre_bias
    aux = (target - rebuilt).pow(2).sum() / (target - target.mean(0)).pow(2).sum()
    ours_fvu, ours_aux, top = losses(sae, x, dead, k_aux)
    torch.testing.assert_close(ours_fvu, fvu)
    torch.testing.assert_close(ours_aux, aux)
    torch.testing.assert_close(torch.zeros_like(pre).scatter(-1, top.indices, top.values), c)
    parameters = list(sae.parameters())
    ours = torch.autograd.grad(ours_fvu + ours_aux / 32, parameters)
    expected = torch.autograd.grad(fvu + aux / 32, parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert losses(sae, x, torch.zeros_like(dead), k_aux)[1] == 0
    assert losses(sae, x, dead, 0)[1] == 0

class Sizes(TorchDispatchMode):
    """`with Sizes(sizes)`: appends the size of every tensor that an operation returns."""
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, (tuple, list)) else [out]
        self.sizes += [t.numel() for t in several if torch.is_tensor(t)]
        return out

def test_the_backward_keeps_and_computes_no_dense_tensor():
    N, C = 600, 512
    sae, x, sizes = SAE(16, C, 4), torch.randn(N, 16), []

    def pack(t):
        sizes.append(t.numel())
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fvu, aux, _ = losses(sae, x, torch.arange(C) % 2 == 0, 8)
    assert len(sizes) > 10
    with Sizes(sizes):
        (fvu + aux).backward()
    assert max(sizes) < N * C / 2 and sae.encoder.grad is not None

def test_reconstruction_restores_mean_and_scale():
    sae, h = make(), 3 + 5 * normal(20, 12)
    x, mean, std = reference.normalize(h)
    decoded = reference.sae_encode(sae, x) @ sae.decoder + sae.pre_bias
    torch.testing.assert_close(sae(h)[0], decoded * std + mean)

def test_initialization():
    sae = make(d=32, C=256, k=8)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(256, dtype=torch.float64))
    torch.testing.assert_close(F.normalize(sae.encoder, dim=1), sae.decoder)
    unit = F.normalize(normal(2000, 32), dim=1)
    back = sae.decode(sae.encode(unit + sae.pre_bias)) - sae.pre_bias
    assert back.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)

def test_geometric_median_has_the_smallest_summed_distance():
    x = torch.cat((normal(99, 3), torch.full((20, 3), 50.0, dtype=torch.float64)))
    point = geometric_median(x, 1000)

    def total(p):
        return (x - p).norm(dim=1).sum()
    assert all(total(point) <= total(point + 0.01 * normal(3)) for _ in range(50))
    assert point.norm() < 1 < x.mean(0).norm()

def test_a_step_moves_directions_only_across_themselves_and_keeps_them_at_unit_norm():
    """Plain gradient descent, whose step is the gradient itself."""
    sae, x, cfg = make(), normal(50, 12), Config(k_aux=0)
    before = sae.decoder.detach().clone()
    raw, = torch.autograd.grad(losses(sae, x, torch.zeros(30, dtype=torch.bool), 0)[0], sae.decoder)
    assert ((raw * before).sum(1).abs() > 1e-6).any()
    train_step(sae, torch.optim.SGD(sae.parameters(), lr=0.1), x, cfg, 1000, 0)
    across = raw - (raw * before).sum(1, keepdim=True) * before
    assert (sae.decoder.grad * before).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(sae.decoder.grad, across)
    torch.testing.assert_close(sae.decoder.detach(), F.normalize(before - 0.1 * across, dim=1))

def test_a_step_counts_how_often_and_how_strongly_latents_fire():
    sae, cfg = make(), Config(k_aux=0)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.0)
    sae.since_active.fill_(7)
    batches = [normal(5, 12), normal(5, 12)]
    dense = [reference.sae_encode(sae, x).detach() for x in batches]
    for step, x in enumerate(batches):
        train_step(sae, optimizer, x, cfg, 1000, step)
    fired = [(c > 1e-3).double() for c in dense]
    frequency = torch.stack([f.mean(0) for f in fired]).mean(0)  # both steps weigh the same
    torch.testing.assert_close(sae.frequency, frequency)
    mean_square = torch.stack([(c ** 2).mean(0) for c in dense]).mean(0)
    torch.testing.assert_close(sae.mean_square, mean_square)
    first, last = ((f.sum(0) > 0) for f in fired)
    expected = torch.where(last, 0, torch.where(first, 5, 17))
    assert torch.equal(sae.since_active, expected) and len(expected.unique()) == 3

def test_variance_share_is_one_for_the_mean():
    x = torch.randn(100, 5)
    assert variance_share(x - x.mean(0), x).item() == pytest.approx(1)

# -- files -----------------------------------------------------------------------------------------

def test_a_file_in_the_published_layout_is_written_and_read(tmp_path):
    sae = make().float()
    sae.frequency.uniform_()
    torch.save(sae_file(sae), tmp_path / "5.pt")
    state = torch.load(tmp_path / "5.pt", weights_only=True)
    assert set(state) == {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight",
                          "stats_last_nonzero", "latents_activation_frequency",
                          "latents_mean_square", "activation", "activation_state_dict"}
    assert state["encoder.weight"].shape == (30, 12) and state["decoder.weight"].shape == (12, 30)
    assert state["activation"] == "TopK"
    assert state["activation_state_dict"] == {"k": 4, "postact_fn": "ReLU"}
    again, h = load_sae(str(tmp_path / "5.pt"), layer=5, d=12), torch.randn(7, 12)
    assert torch.equal(again(h)[0], sae(h)[0]) and torch.equal(again.frequency, sae.frequency)
    assert not any(p.requires_grad for p in again.parameters())

@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_reconstructions_equal_those_of_eai_sparsify(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = pytest.importorskip("sparsify", reason="needs eai-sparsify (requirements-test.txt)")
    sae, x = make(d=24, C=64, k=6).float(), torch.randn(40, 24)
    theirs = sparsify.SparseCoder(24, sparsify.SparseCoderConfig(num_latents=64, k=6))
    pairs = ((sae.encoder, theirs.encoder.weight), (sae.latent_bias, theirs.encoder.bias),
             (sae.decoder, theirs.W_dec), (sae.pre_bias, theirs.b_dec))
    with torch.no_grad():
        sae.latent_bias.normal_(std=0.1)
        for our_weight, their_weight in pairs:
            their_weight.copy_(our_weight)
        torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x).sae_out)

# -- training --------------------------------------------------------------------------------------

def test_training_lowers_fvu_and_reports(chain):
    folder = Path(chain["sae"])
    log, info = read_log(folder / "log.jsonl"), json.loads((folder / "sae.json").read_text())
    assert log[-1]["fvu"] < 0.75 * log[0]["fvu"]
    assert 0 < info["fvu"] < 1 and 0 < info["l0"] <= 6
    plain, spliced, zeros = (info[f"loss_{name}"] for name in ("plain", "spliced", "zeros"))
    assert plain <= spliced <= zeros
    assert info["loss_recovered"] == pytest.approx((zeros - spliced) / (zeros - plain))
    sae = load_sae(chain["sae"], layer=1, d=16)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(48), atol=1e-5, rtol=0)

class Perfect(SAE):
    """Returns the hidden state itself."""
    def forward(self, h):
        return h, super().forward(h)[1]

def test_the_report_on_a_perfect_and_on_a_useless_sae(chain, dataset):
    """A perfect SAE recovers all of the loss; one that returns only its bias has an FVU near 1."""
    gpt, _ = load_gpt(chain["gpt"])
    tokens = load_tokens(dataset, "val")[:641]

    def reported(sae):
        return report(sae, gpt, 1, tokens, 32, CPU, 10)
    found = reported(Perfect(16, 48, 6))
    assert found["fvu"] == pytest.approx(0, abs=1e-6)
    assert found["loss_recovered"] == pytest.approx(1)
    useless = SAE(16, 48, 6)
    states = [normalize(hidden_states(gpt, x, 1))[0] for x, _ in sequential(tokens, 32, 8, 257)]
    with torch.no_grad():
        useless.pre_bias.copy_(torch.cat([x.flatten(0, 1) for x in states]).mean(0))
        useless.encoder.zero_()
    assert reported(useless)["fvu"] == pytest.approx(1, abs=1e-4)

@pytest.mark.parametrize("mix", ["interleave", "add", "none"])
def test_layers_above_a_mixer_or_without_a_block_above_are_refused(chain, mix):
    gpt, _ = load_gpt(chain["cocomix"])
    gpt.config = replace(gpt.config, mix=mix)
    check_layer(gpt, 0)
    with pytest.raises(UserError, match="concept_layer=1 is above the concept model's own mixer"):
        check_layer(gpt, 1)
    with pytest.raises(UserError, match="concept_layer=2 must leave a block above it.*3 blocks"):
        check_layer(gpt, 2)

def test_only_steps_count_as_training_time(chain, dataset, tmp_path, monkeypatch):
    clock, keep = [0.0], sae_module.train_step

    def step(*args):
        clock[0] += 1
        return keep(*args)

    def save(*_, **__):
        clock[0] += 100
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(sae_module, "train_step", step)
    monkeypatch.setattr(sae_run, "save_checkpoint", save)
    status, _, err = run(sae_module.main, *TINY_SAE, "--max_tokens=2048", "--eval_tokens=500",
                         "--save_interval=2", "--log_interval=3", f"--dataset={dataset}",
                         f"--concept_model={chain['gpt']}", f"--out_dir={tmp_path}")
    assert status == 0, err
    assert [line["seconds"] for line in read_log(tmp_path / "log.jsonl")] == [3, 6, 8]

@pytest.mark.parametrize("stop", [3, 8])
def test_resume_equals_uninterrupted(chain, dataset, tmp_path, stop):
    argv = [*TINY_SAE, "--max_tokens=3072", "--eval_tokens=500", "--save_interval=1",
            "--log_interval=1", "--dead_tokens=600", "--buffer=3", f"--dataset={dataset}",
            f"--concept_model={chain['gpt']}"]
    assert run(sae_module.main, *argv, f"--out_dir={tmp_path / 'a'}")[0] == 0
    with StopAt(stop):
        assert run(sae_module.main, *argv, f"--out_dir={tmp_path / 'b'}")[0] == 130
    status, _, err = run(sae_module.main, *argv, f"--out_dir={tmp_path / 'b'}", "--resume")
    assert status == 0, err
    a, b = (torch.load(tmp_path / name / "sae.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(t, b[name]) for name, t in a.items() if torch.is_tensor(t))
    a, b = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert [line["step"] for line in b] == list(range(1, 13))
    assert [line["fvu"] for line in a] == [line["fvu"] for line in b]

def test_a_finished_sae_is_not_trained_again(chain, dataset, tmp_path):
    folder = shutil.copytree(chain["sae"], tmp_path / "sae")
    argv = [*TINY_SAE, "--max_tokens=8192", "--learning_rate=3e-3", "--eval_tokens=1000",
            f"--dataset={dataset}", f"--concept_model={chain['gpt']}", f"--out_dir={folder}"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, out, err = run(sae_module.main, *argv, "--resume")
    assert status == 0 and "already trained (32 steps)" in out, err
    status, _, err = run(sae_module.main, *argv)
    assert status == 1 and "--resume continues it" in err
    status, _, err = run(sae_module.main, *argv, "--resume", "--seed=2")
    assert status == 1 and "seed=1337" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for name, content in (("sae.json", None), ("sae.json", b"{}"), ("sae.pt", b"damaged")):
        (folder / name).unlink()
        if content:
            (folder / name).write_bytes(content)
        status, out, err = run(sae_module.main, *argv, "--resume")  # both are written again
        assert status == 0 and "FVU" in out and "already trained" not in out, err
        assert (folder / name).read_bytes() == before[name]

def test_an_sae_step_minimises_the_auxiliary_loss_too():
    sae = SAE(12, 30, 4).double()
    x, cfg = torch.randn(50, 12).double(), Config(k_aux=5, aux_weight=0.25)
    sae.since_active[::2] = 1000
    fvu, aux, _ = losses(sae, x, sae.since_active >= 1000, 5)
    expected = sae.encoder.detach() - 0.1 * torch.autograd.grad(fvu + 0.25 * aux, sae.encoder)[0]
    assert aux > 0
    train_step(sae, torch.optim.SGD(sae.parameters(), lr=0.1), x, cfg, 1000, 0)
    torch.testing.assert_close(sae.encoder.detach(), expected)

def test_hidden_states_are_shuffled(dataset):
    gpt = tiny_gpt(torch.float32, vocab_size=257).requires_grad_(False).eval()
    cfg = SimpleNamespace(buffer=2, batch_size=32, concept_layer=1, seed=3)
    batches = Batches(load_tokens(dataset, "train"), 16, 4, 257, 3)
    states = HiddenStates(gpt, cfg, batches, CPU)
    found = torch.cat([states[0], states[1]])
    h = kernels.normalize(gpt.forward_blocks(gpt.embed(batches[0][0]), 0, 2))[0].flatten(0, 1)
    assert not torch.allclose(found, h)
    nearest = torch.cdist(found, h).argmin(1)
    assert len(nearest.unique()) == 64 and (nearest[:32] >= 32).any()  # of both batches

def test_latents_are_dead_after_a_twentieth_of_the_training(chain):
    assert json.loads(Path(chain["sae"], "sae.json").read_text())["dead_tokens"] == 8192 // 20
