"""Measured steering: eval.py --steering."""
import json
import math
import shutil

from support.runtime import UserError

import pytest
import torch
from conftest import run, tiny_gpt

import concepts
import eval as evaluation
from concepts import ConceptModel
from model import load_model
from sae import SAE
from support import steering
from support.activations import hidden_states
from support.checkpoint import load_checkpoint
from support.concept_index import NAME, index_of_run
from support.engine import generate
from support.tokens import Batches, tokens_of_run

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def cocomix(chain, tmp_path_factory):
    """A run with its index: (folder, content, model, concept model, index)."""
    folder = tmp_path_factory.mktemp("steer") / "cocomix"
    shutil.copytree(chain["cocomix"], folder)
    content = load_checkpoint(folder)
    model, concept_model = load_model(content), concepts.concept_model_of_run(content, CPU)
    index = index_of_run(folder, content, model, concept_model, CPU, 4000)
    return folder, content, model, concept_model, index

def first_blocks(content, n):
    """The n val blocks that steering uses, and their targets."""
    val = torch.tensor(tokens_of_run(content, "val").astype(int))
    starts = Batches(tokens_of_run(content, "val"), 32, n, 257, shift=False).starts(0)
    rows = torch.stack([val[start:start + 33] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]

def test_steering_is_measured_as_defined(cocomix, tmp_path, monkeypatch):
    folder, content, model, concept_model, index = cocomix
    monkeypatch.setattr(steering, "FACTORS", (-10.0, 1.0, 4.0))
    for name, value in dict(PROMPTS=3, PROMPT_TOKENS=6, NEW_TOKENS=30, LOSS_TOKENS=90).items():
        monkeypatch.setattr(steering, name, value)
    path, picture = tmp_path / "rows.jsonl", tmp_path / "c.png"
    status, out, err = run(evaluation.main, folder, "--device=cpu", "--steering", "--steered=2",
                           f"--write={path}", f"--plot={picture}")
    assert status == 0 and picture.stat().st_size > 5000 and "next tokens" in out, err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3
    labelled = [c for c in range(48) if index.labelled[c]]
    most = sorted(labelled, key=lambda c: -index.predicted[c])[:2]
    assert {row["concept"] for row in rows} == set(most)
    x, y = first_blocks(content, 3)
    models = {"CoCoMix": model, "concept model": concepts.steerable(concept_model)}
    for row in rows:
        scale, steered = torch.ones(48), models[row["model"]]
        scale[row["concept"]] = row["factor"]
        random = torch.Generator().manual_seed(row["concept"])
        text = generate(steered, x[:, :6], 30, scale=scale, generator=random)[:, 6:]
        typical = index.next_tokens[row["concept"], :NAME].tolist()
        assert row["next_tokens"] == sum(t in typical for t in text.flatten().tolist())
        assert row["tokens"] == 90
        with torch.no_grad():
            logits = steered(x, scale=scale).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
    plain = [row["loss"] for row in rows if row["factor"] == 1 and row["model"] == "CoCoMix"]
    with torch.no_grad():
        assert plain[0] == pytest.approx(model(x, y).loss.item(), abs=1e-4)

def test_the_table_has_the_geometric_mean_over_concepts(monkeypatch):
    monkeypatch.setattr(steering, "FACTORS", (1.0, 5.0))
    counts = {(1, 1.0): 3, (2, 1.0): 0, (1, 5.0): 15, (2, 5.0): 0}
    rows = [dict(model="CoCoMix", concept=concept, factor=factor, next_tokens=n, tokens=100,
                 loss=math.log(10 * factor)) for (concept, factor), n in counts.items()]
    plain, steered = steering.steering_summary(rows)
    assert plain["gain"] == 1 and plain["gain_error"] == 0 and plain["raised"] == 0
    assert plain["perplexity"] == pytest.approx(10)
    assert steered["gain"] == pytest.approx(math.sqrt(4 * 1))  # (15+1)/(3+1) and (0+1)/(0+1)
    assert steered["rate"] == pytest.approx(0.075)
    assert steered["raised"] == 0.5 and steered["perplexity"] == pytest.approx(50)
    # of the logs: standard deviation log(4)/√2, over √2
    assert steered["gain_error"] == pytest.approx(2 * math.log(4) / 2)

def test_one_concept_has_no_standard_error(tmp_path):
    rows = [dict(model="a", concept=1, factor=factor, next_tokens=n, tokens=99, loss=2.0 + n / 100)
            for factor, n in ((1.0, 3), (4.0, 7))]
    summary = steering.steering_summary(rows)
    assert [row["gain_error"] for row in summary] == [None, None]
    assert summary[1]["gain"] == pytest.approx(2)
    steering.plot_steering(tmp_path / "x.png", summary)

def test_a_concept_model_with_a_mixer_of_its_own_is_left_out(cocomix, monkeypatch):
    for name, value in dict(PROMPTS=1, NEW_TOKENS=2, LOSS_TOKENS=32, FACTORS=(1.0, 2.0)).items():
        monkeypatch.setattr(steering, name, value)

    def refuse(concept_model):
        raise UserError("it has a mixer")
    monkeypatch.setattr(concepts, "steerable", refuse)
    argv = cocomix[0], "--device=cpu", "--steering", "--steered=1"
    status, out, err = run(evaluation.main, *argv)
    assert status == 0 and "left out: steering the concept model: it has a mixer" in out, err
    assert "CoCoMix" in out

@pytest.mark.cuda
def test_steering_is_measured_on_a_gpu(cocomix, tmp_path, monkeypatch):
    shutil.copytree(cocomix[0], tmp_path / "run")
    monkeypatch.setattr(steering, "PROMPTS", 2)
    argv = tmp_path / "run", "--device=cuda", "--steering", "--steered=2"
    assert run(evaluation.main, *argv)[0] == 0

def test_steering_acts_on_the_state_that_the_sae_reads():
    sae = SAE(24, 40, 6).double().requires_grad_(False)
    torch.nn.init.normal_(sae.latent_bias, std=0.3)
    gpt = tiny_gpt().requires_grad_(False).eval()
    cm, x = ConceptModel(gpt, sae, 1), torch.randint(61, (2, 12))
    scale = torch.ones(40, dtype=torch.float64)
    scale[[3, 5]] = -8
    h = hidden_states(gpt, x, 1)
    change, _, _ = concepts.SteeredSAE(sae)(h, scale=scale)
    expected = gpt.head(gpt.finish(h + change, 2)[0])
    torch.testing.assert_close(concepts.steerable(cm)(x, scale=scale).logits, expected)
