"""Concepts turned: in the frozen concept model as in CoCoMix, on the screen, and measured."""
import json
import math
import shutil

import pytest
import torch

import concepts
import data
import eval as evaluation
import sample
from conftest import run, tiny_gpt
from model import GPT, load_checkpoint, load_model
from sae import SAE, normalize
from test_concepts import concept_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cocomix(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steer") / "cocomix"
    shutil.copytree(chain["cocomix"], folder)
    content = load_checkpoint(folder)
    return folder, content, load_model(content), concepts.dictionary_of(folder / "ckpt.pt", content, load_model(content), CPU, 4000)


def factors(**values):
    scale = torch.ones(40, dtype=torch.float64)
    for i, factor in values.items():
        scale[int(i[1:])] = factor
    return scale


def test_the_steered_sae_equals_the_dense_formula():
    sae = SAE(24, 40, 6).double()
    torch.nn.init.normal_(sae.latent_bias, std=0.3)
    h, scale = torch.randn(2, 9, 24, dtype=torch.float64), factors(c3=-8, c17=5)
    x, mean, std = normalize(h)
    pre = (x - sae.pre_bias) @ sae.encoder.T + sae.latent_bias
    dense = lambda z: torch.zeros_like(z).scatter(-1, z.topk(6).indices, z.topk(6).values.relu())
    change, steered, _ = concepts.SteeredSAE(sae)(h, scale=scale)
    torch.testing.assert_close(change, (dense(pre * scale) - dense(pre)) @ sae.decoder * std)
    assert torch.equal(steered.indices, (pre * scale).topk(6).indices)
    assert (steered.indices == 3).any() and not torch.allclose(change, torch.zeros_like(change))


def test_an_active_concept_is_multiplied_and_the_rest_of_the_hidden_state_kept():
    sae = SAE(24, 40, 6).double()
    h = torch.randn(2, 9, 24, dtype=torch.float64)
    x, _, std = normalize(h)
    active = sae.encode(x)
    concept = active.indices[0, 0, 0].item()
    change = concepts.SteeredSAE(sae)(h, scale=factors(**{f"c{concept}": 3.0}))[0]
    here = (active.indices == concept) & (active.values > 0)
    c = (active.values * here).sum(-1, keepdim=True)
    where = here.any(-1)
    torch.testing.assert_close(change[where], (2 * c * sae.decoder[concept] * std)[where])  # (3 - 1) · c_i · W_dec,i · σ
    assert where.any()


def test_factors_of_one_leave_the_concept_model_as_it_is():
    teacher = concept_model()
    teacher.gpt = tiny_gpt(insert="none").eval()
    steered, (x, y) = concepts.steerable(teacher), (torch.randint(61, (2, 12)), torch.randint(61, (2, 12)))
    torch.testing.assert_close(steered(x, scale=factors()).logits, teacher.gpt(x).logits)
    torch.testing.assert_close(steered(x, y).loss, teacher.gpt(x, y).loss)
    assert not torch.allclose(steered(x, scale=factors(c3=-8, c5=-8)).logits, teacher.gpt(x).logits)
    luck = lambda: torch.Generator().manual_seed(1)
    sweep = torch.stack([factors(), factors(c3=-8), factors(c5=9)])[:, None]
    texts = steered.generate(x[:, :5], 20, scale=sweep, generator=luck())  # with the cache, beyond block_size
    assert torch.equal(texts, steered.generate(x[:, :5], 20, scale=sweep, generator=luck(), use_cache=False))
    assert torch.equal(texts[:2], teacher.gpt.generate(x[:, :5], 20, generator=luck()))
    assert teacher.gpt.inserted is None and isinstance(steered, GPT) and steered.wte is teacher.gpt.wte


def test_a_concept_model_with_insertions_of_its_own_is_refused():
    teacher = concept_model(layer=0)
    teacher.gpt = tiny_gpt(insert="pause")
    with pytest.raises(concepts.UserError, match="--model=run"):
        concepts.steerable(teacher)


# -- sample.py ----------------------------------------------------------------------------------------

def test_sample_is_repeatable(cocomix):
    common = [cocomix[0], "--device=cpu", "--max_new_tokens=12", "--start=def f"]
    plain = run(sample.main, *common)
    assert plain[0] == 0 and "def f" in plain[1] and plain == run(sample.main, *common)
    assert run(sample.main, *common, "--seed=2")[1] != plain[1]


def test_steer_takes_numbers_and_words_and_shows_both_models(cocomix):
    folder, content, _, d = cocomix
    common = [folder, "--device=cpu", "--max_new_tokens=12", "--start=ab"]
    status, out, err = run(sample.main, *common, "--steer=3:9,17:-9")
    assert status == 0 and "concept 3 × 9" in out and "concept 17 × -9" in out and out.count("COCOMIX") == 2 and out.count("│ CONCEPT MODEL") == 2, err
    tokenizer = data.load_tokenizer(content["tokenizer"])
    word = tokenizer.decode(d.own[3, :1].tolist())
    found = concepts.find([concepts.entry(d, c, tokenizer) for c in concepts.used(d)], word)[0]["id"]
    status, out, err = run(sample.main, *common, f"--steer={word}:-8", "--model=run")
    assert status == 0 and f"{word!r}: concept {found}, at" in out and f"concept {found} × -8, before {d.name(found, tokenizer)}" in out and "│" not in out
    status, out, err = run(sample.main, *common, "--steer")
    assert status == 0 and out.count("── concept") == 3, err


def test_a_factor_of_one_steers_nothing_and_a_sweep_has_a_row_a_factor(cocomix):
    common = [cocomix[0], "--device=cpu", "--max_new_tokens=20", "--start=def f", "--model=run"]
    rows = lambda out: [part.partition("\n")[2].strip() for part in out.split("── ")[1:]]
    plain = rows(run(sample.main, *common)[1])[0]
    assert rows(run(sample.main, *common, "--steer=3:1")[1]) == [plain, plain]
    status, out, err = run(sample.main, *common, "--steer=3", "--steer_sweep")
    assert status == 0 and [part.split()[1] for part in out.split("── ")[1:]] == [str(f) for f in sample.SWEEP], err
    assert rows(out)[sample.SWEEP.index(1)] == plain
    for factor in (-10, 10):
        assert rows(run(sample.main, *common, f"--steer=3:{factor}")[1])[1] == rows(out)[sample.SWEEP.index(factor)]


def test_without_its_concept_model_the_run_is_steered_alone(cocomix, tmp_path):
    folder, content, *_ = cocomix
    shutil.copytree(folder, tmp_path / "run")
    content = torch.load(folder / "ckpt.pt", weights_only=True)
    content["train_config"]["concept_model"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "run/ckpt.pt")
    status, out, err = run(sample.main, tmp_path / "run", "--device=cpu", "--max_new_tokens=5", "--steer=3:9")
    assert status == 0 and "the run alone is steered" in out and "│" not in out, err
    status, out, err = run(sample.main, tmp_path / "run", "--device=cpu", "--max_new_tokens=5", "--steer=3:9", "--model=both")
    assert status == 1 and "no checkpoint at" in err


def test_inspect_shows_each_tokens_predicted_concepts_by_name_and_weight(cocomix, monkeypatch):
    folder, content, model, d = cocomix
    monkeypatch.setenv("COLUMNS", "70")
    status, out, err = run(sample.main, folder, "--device=cpu", "--inspect", "--start=abcab", "--max_new_tokens=60", "--top_k=5")
    assert status == 0, err
    text, _, gloss = out.strip().partition("\n\nCoCoMix:\n")
    text = text.partition("\n")[2]
    assert all(len(line) <= 70 for line in gloss.splitlines())
    groups = [group.splitlines() for group in gloss.strip().split("\n\n")]
    tokenizer = data.load_tokenizer(content["tokenizer"])
    ids = tokenizer.encode_ordinary(text)
    assert len(ids) == 65 and [cell for group in groups for cell in group[0].split()] == [repr(tokenizer.decode([t])) for t in ids]  # the prompt's tokens, too
    idx = torch.tensor([ids])
    first = model(idx[:, :32]).concepts  # within block_size: what the whole forward predicts
    shown = [cell for group in groups for cell in group[1].split("  ") if cell.strip()]
    expected = [f"{c} {d.name(c, tokenizer, 1)} {z:.1f}" for c, z in zip(first.indices[0, :, 0].tolist(), first.values[0, :, 0].tolist())]
    assert [cell.strip() for cell in shown[:32]] == expected and len(shown) == 65


def test_beyond_block_size_concepts_are_read_with_half_a_block_before_them():
    model = tiny_gpt(insert="concept")
    idx = torch.randint(61, (1, 45))
    top = sample.concepts_at(model, idx)
    assert top.values.shape == (1, 45, 5)
    for t in (0, 15, 16, 23, 24, 31, 32, 40, 44):
        start = 0 if t < 16 else (t // 8 - 1) * 8
        assert torch.equal(top.indices[:, t], model.concepts(idx[:, start:t + 1]).indices[:, -1])


def test_columns_and_glosses_fit_the_screen():
    assert sample.columns(["abc\n\nde", "x" * 25], 23).splitlines() == ["abc        │ " + "x" * 10, "           │ " + "x" * 10, "de         │ xxxxx"]
    assert sample.columns(["as it is " * 20], 23) == "as it is " * 20
    assert sample.gloss(["'a'", "'bb'", "'c'"], [["1 x"], ["22 yyy"], ["3"]], 14) == "'a'  'bb'\n1 x  22 yyy\n\n'c'\n3\n"


# -- eval.py ------------------------------------------------------------------------------------------

def test_steering_is_measured_as_it_is_defined(cocomix, tmp_path, monkeypatch):
    folder, content, model, d = cocomix
    for name, value in dict(FACTORS=(-10.0, 1.0, 4.0), PROMPTS=3, PROMPT=6, NEW=30, COST=90).items():
        monkeypatch.setattr(evaluation, name, value)
    status, out, err = run(evaluation.main, folder, "--device=cpu", "--steering", "--steered=2", f"--write={tmp_path / 'rows.jsonl'}", f"--plot={tmp_path / 'c.png'}")
    assert status == 0 and (tmp_path / "c.png").stat().st_size > 5000, err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3
    most = sorted((c for c in range(48) if d.labelled[c]), key=lambda c: -d.predicted[c])[:2]
    assert {row["concept"] for row in rows} == set(most)
    val = torch.tensor(data.tokens_of_run(content, "val").astype(int))
    x, y = torch.stack([val[i * 32:i * 32 + 33] for i in data.Batches(val, 32, 3, 257, shift=False).starts(0) // 32]).split([32, 1], 1)
    y = torch.cat((x[:, 1:], y), 1)
    speakers = {"CoCoMix": model, "concept model": concepts.steerable(concepts.of_run(content, CPU))}
    for row in rows:
        speaker, scale = speakers[row["speaker"]], sample.scale_of({row["concept"]: row["factor"]}, 48, CPU)
        with torch.no_grad():
            text = speaker.generate(x[:, :6], 30, scale=scale, generator=torch.Generator().manual_seed(row["concept"]))[:, 6:]
            logits = speaker(x, scale=scale).logits
        own = d.own[row["concept"], :concepts.NAME]
        assert row["own"] == sum(t in own.tolist() for t in text.flatten().tolist()) and row["tokens"] == 90
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item(), abs=1e-4)
    plain = [row for row in rows if row["factor"] == 1 and row["speaker"] == "CoCoMix"]
    with torch.no_grad():
        assert plain[0]["loss"] == pytest.approx(model(x, y).loss.item(), abs=1e-4)


def test_the_steering_table_is_the_geometric_mean_over_concepts(monkeypatch):
    monkeypatch.setattr(evaluation, "FACTORS", (1.0, 5.0))
    counts = {(1, 1.0): 3, (2, 1.0): 0, (1, 5.0): 15, (2, 5.0): 0}
    rows = [dict(speaker="CoCoMix", concept=c, factor=f, own=n, tokens=100, loss=math.log(10 * f)) for (c, f), n in counts.items()]
    plain, steered = evaluation.steering_summary(rows)
    assert plain["gain"] == 1 and plain["gain_error"] == 0 and plain["raised"] == 0 and plain["perplexity"] == pytest.approx(10)
    assert steered["gain"] == pytest.approx(math.sqrt(4 * 1)) and steered["rate"] == pytest.approx(0.075)  # (15+1)/(3+1) and (0+1)/(0+1)
    assert steered["raised"] == 0.5 and steered["perplexity"] == pytest.approx(50)
    assert steered["gain_error"] == pytest.approx(2 * math.log(4) / 2)  # of the logs: standard deviation log(4)/√2, over √2


def test_hit_rate_stands_beside_that_of_the_commonest_labels(cocomix):
    folder, content, *_ = cocomix
    row = evaluation.evaluate(content, load_model(content), CPU)
    teacher, tokens = concepts.of_run(content, CPU), data.tokens_of_run(content, "val")
    labels = torch.cat([teacher.labels(x, y).flatten(0, 1) for x, y in data.sequential(tokens, 32, 8, 257)])
    commonest = set(labels.flatten().bincount().topk(4).indices.tolist())
    expected = sum(len(commonest & set(position)) / 4 for position in labels.tolist()) / len(labels)
    assert row["fixed_hit_rate"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.cuda
def test_reading_and_steering_run_on_a_gpu(cocomix, tmp_path, monkeypatch):
    folder, content, model, d = cocomix
    shutil.copy(folder / "ckpt.pt", tmp_path / "ckpt.pt")
    monkeypatch.setattr(evaluation, "PROMPTS", 2)
    assert run(concepts.main, tmp_path, "--device=cuda", "--tokens=4000")[0] == 0
    made = concepts.dictionary_of(tmp_path / "ckpt.pt", content, model, CPU)
    assert abs(made.labelled.sum() - d.labelled.sum()) <= 0.02 * d.tokens and (made.labelled - d.labelled).abs().sum() <= 0.1 * d.labelled.sum()  # bfloat16
    assert run(sample.main, tmp_path, "--device=cuda", "--steer", "--inspect", "--max_new_tokens=8")[0] == 0
    assert run(evaluation.main, tmp_path, "--device=cuda", "--steering", "--steered=2")[0] == 0
