"""sample.py: generation, steering of the run and of its concept model, inspection."""
import shutil
import sys

from support.runtime import UserError

import pytest
import torch
from conftest import run, tiny_gpt

import concepts
import sample
from model import GPT, load_model
from sae import SAE
from support.checkpoint import load_checkpoint
from support.concept_index import describe, find, index_of_run, used
from support.engine import concepts_at, generate
from support.kernels import normalize
from support.tokens import load_tokenizer

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def cocomix(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "cocomix"
    shutil.copytree(chain["cocomix"], folder)
    content = load_checkpoint(folder)
    model, concept_model = load_model(content), concepts.concept_model_of_run(content, CPU)
    index = index_of_run(folder, content, model, concept_model, CPU, 4000)
    return folder, model, index, load_tokenizer(content["tokenizer"])

def sections(out):
    """{title of a text's heading: the text}."""
    parts = [part.partition("\n") for part in out.split("── ")[1:]]
    return {title.rstrip(" ─"): text.strip() for title, _, text in parts}

def test_the_end_of_text_token_in_a_prompt_is_one_token(tmp_path):
    tokenizer = load_tokenizer("stdlib")
    end, a, b = tokenizer.eot_token, *map(tokenizer.encode_ordinary, ("def f", "class A"))
    expected = {"": [end], "<|endoftext|>": [end], "<|endoftext|>def f": [end, *a],
                "def f<|endoftext|>class A": [*a, end, *b], "def f<|endoftext|>": [*a, end]}
    for start, ids in expected.items():
        assert sample.read_prompt(start, tokenizer) == ids
        (tmp_path / "prompt.txt").write_text(start, encoding="utf-8-sig")  # with a byte-order mark
        assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}", tokenizer) == ids
    almost = "<|endoftext |>"
    assert sample.read_prompt(almost, tokenizer) == tokenizer.encode_ordinary(almost)

# -- steering the concept model ------------------------------------------------------------------

def factors(**values):
    scale = torch.ones(40, dtype=torch.float64)
    for name, factor in values.items():
        scale[int(name[1:])] = factor
    return scale

def tiny_concept_model(layer=1, **settings):
    sae = SAE(24, 40, 6).double().requires_grad_(False)
    torch.nn.init.normal_(sae.latent_bias, std=0.3)
    torch.nn.init.normal_(sae.pre_bias, std=0.3)
    gpt = tiny_gpt(**settings).requires_grad_(False).eval()
    return concepts.ConceptModel(gpt, sae, layer)

def test_the_steered_sae_equals_the_dense_formula():
    sae = tiny_concept_model().sae
    h, scale = torch.randn(2, 9, 24, dtype=torch.float64), factors(c3=-8, c17=5)
    x, mean, std = normalize(h)
    pre = (x - sae.pre_bias) @ sae.encoder.T + sae.latent_bias

    def dense(z):
        top = z.topk(6)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
    change, steered, _ = concepts.SteeredSAE(sae)(h, scale=scale)
    expected = (dense(pre * scale) - dense(pre)) @ sae.decoder * std
    torch.testing.assert_close(change, expected)
    assert torch.equal(steered.indices, (pre * scale).topk(6).indices)
    assert (steered.indices == 3).any() and change.abs().max() > 0.01

def test_an_active_concept_is_multiplied_and_the_rest_of_the_hidden_state_kept():
    sae = tiny_concept_model().sae
    h = torch.randn(2, 9, 24, dtype=torch.float64)
    x, _, std = normalize(h)
    active = sae.encode(x)
    concept = active.indices[0, 0, 0].item()
    change = concepts.SteeredSAE(sae)(h, scale=factors(**{f"c{concept}": 3.0}))[0]
    here = (active.indices == concept) & (active.values > 0)
    c = (active.values * here).sum(-1, keepdim=True)
    # (3 - 1) · c_i · W_dec,i · σ
    expected, where = 2 * c * sae.decoder[concept] * std, here.any(-1)
    assert where.any()
    torch.testing.assert_close(change[where], expected[where])

def test_factors_of_one_do_not_change_the_concept_model():
    concept_model = tiny_concept_model()
    gpt, steered = concept_model.gpt, concepts.steerable(concept_model)
    x, y = torch.randint(61, (2, 12)), torch.randint(61, (2, 12))
    torch.testing.assert_close(steered(x, scale=factors()).logits, gpt(x).logits)
    torch.testing.assert_close(steered(x, y).loss, gpt(x, y).loss)
    changed = steered(x, scale=factors(c3=-8, c5=-8)).logits
    assert not torch.allclose(changed, gpt(x).logits)
    sweep = torch.stack([factors(), factors(c3=-8), factors(c5=9)])[:, None]

    def continued(model, **options):  # beyond block_size
        return generate(model, x[:, :5], 20, generator=torch.Generator().manual_seed(1), **options)
    texts = continued(steered, scale=sweep)
    assert torch.equal(texts, continued(steered, scale=sweep, use_cache=False))
    assert torch.equal(texts[:2], continued(gpt))
    assert gpt.mixer is None and isinstance(steered, GPT) and steered.wte is gpt.wte

def test_a_concept_model_with_a_mixer_of_its_own_is_refused():
    with pytest.raises(UserError, match="--model=run"):
        concepts.steerable(tiny_concept_model(layer=0, insert="pause"))

# -- the command ---------------------------------------------------------------------------------

def test_sample_is_repeatable(cocomix):
    common = [cocomix[0], "--device=cpu", "--max_new_tokens=12", "--start=def f"]
    plain = run(sample.main, *common)
    assert plain[0] == 0 and "def f" in plain[1] and plain == run(sample.main, *common)
    assert run(sample.main, *common, "--seed=2")[1] != plain[1]

def test_steer_takes_numbers_and_words_and_shows_both_models(cocomix):
    folder, _, index, tokenizer = cocomix
    common = [folder, "--device=cpu", "--max_new_tokens=12", "--start=ab"]
    status, out, err = run(sample.main, *common, "--steer=3:9,17:-9")
    assert status == 0 and "concept 3 × 9" in out and "concept 17 × -9" in out, err
    assert out.count("COCOMIX") == 2 and out.count("│ CONCEPT MODEL") == 2
    word = tokenizer.decode(index.next_ids(3, 1))
    found = find([describe(index, c, tokenizer) for c in used(index)], word)[0]["id"]
    status, out, err = run(sample.main, *common, f"--steer={word}:-8", "--model=run")
    assert status == 0 and f"{word!r}: concept {found}, at" in out and "│" not in out, err
    assert f"concept {found} × -8, before {index.name(found, tokenizer)}" in out
    status, _, err = run(sample.main, *common, f"--steer={found}:3,{word}:-8")
    assert status == 1 and f"concept {found} already has a factor" in err
    status, out, err = run(sample.main, *common, "--steer")
    assert status == 0 and out.count("── concept") == 3, err
    status, out, err = run(sample.main, *common, "--steer=3:9", "--num_samples=2", "--model=run")
    assert status == 0 and "── plain, sample 2 ──" in out and ", sample 1 ──" in out, err

def test_a_factor_of_one_changes_nothing_and_a_sweep_has_a_text_per_factor(cocomix):
    common = [cocomix[0], "--device=cpu", "--max_new_tokens=20", "--start=def f", "--model=run"]
    plain = sections(run(sample.main, *common)[1])["sample 1"]
    texts = sections(run(sample.main, *common, "--steer=3:1")[1])
    assert list(texts.values()) == [plain, plain]
    status, out, err = run(sample.main, *common, "--steer=3", "--steer_sweep")
    texts = sections(out)
    assert status == 0 and list(texts) == [f"× {factor}" for factor in sample.SWEEP], err
    assert texts["× 1"] == plain
    for factor in (-10, 10):
        alone = sections(run(sample.main, *common, f"--steer=3:{factor}")[1])
        assert list(alone.values())[1] == texts[f"× {factor}"]

def test_without_its_concept_model_only_the_run_is_steered(cocomix, tmp_path):
    content = torch.load(cocomix[0] / "ckpt.pt", weights_only=True)
    shutil.copytree(cocomix[0], tmp_path / "run")
    content["train_config"]["concept_model"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "run/ckpt.pt")
    common = [tmp_path / "run", "--device=cpu", "--max_new_tokens=5", "--steer=3:9"]
    status, out, err = run(sample.main, *common)
    assert status == 0 and "only the run is steered" in out and "│" not in out, err
    status, out, err = run(sample.main, *common, "--model=both")
    assert status == 1 and "no checkpoint at" in err

def test_inspect_shows_each_tokens_predicted_concepts_by_name_and_weight(cocomix, monkeypatch):
    folder, model, index, tokenizer = cocomix
    monkeypatch.setenv("COLUMNS", "70")
    status, out, err = run(sample.main, folder, "--device=cpu", "--inspect", "--start=abcab",
                           "--max_new_tokens=60", "--top_k=5")
    assert status == 0, err
    text, _, gloss = out.strip().partition("\n\nCoCoMix:\n")
    ids = tokenizer.encode_ordinary(text.partition("\n")[2])
    assert len(ids) == 65  # the prompt's tokens, too
    assert all(len(line) <= 70 for line in gloss.splitlines())
    groups = [group.splitlines() for group in gloss.strip().split("\n\n")]
    tokens = [cell for group in groups for cell in group[0].split()]
    assert tokens == [repr(tokenizer.decode([t])) for t in ids]
    shown = [cell.strip() for group in groups for cell in group[1].split("  ") if cell.strip()]
    first = model(torch.tensor([ids[:32]])).concepts  # within block_size: the whole forward
    strongest = zip(first.indices[0, :, 0].tolist(), first.values[0, :, 0].tolist(), strict=True)
    expected = [f"{c} {index.name(c, tokenizer, 1)} {z:.1f}" for c, z in strongest]
    assert shown[:32] == expected and len(shown) == 65

def test_without_a_prompt_the_concepts_are_those_after_the_end_of_text_token(
        cocomix, monkeypatch):
    seen, inspection = [], sample.inspection
    monkeypatch.setattr(sample, "inspection", lambda *a: seen.append(a[1]) or inspection(*a))
    status, out, err = run(sample.main, cocomix[0], "--device=cpu", "--inspect",
                           "--max_new_tokens=5", "--stop=false")
    assert status == 0 and len(seen[0]) == 6 and seen[0][0] == cocomix[3].eot_token, err
    assert "<|endoftext|>" not in out.partition("CoCoMix:")[0]

def test_beyond_block_size_concepts_are_read_with_half_a_block_before_them():
    model = tiny_gpt(insert="concept")
    idx = torch.randint(61, (1, 45))
    top = concepts_at(model, idx)
    assert top.values.shape == (1, 45, 5)
    for t in (0, 15, 16, 23, 24, 31, 32, 40, 44):
        start = 0 if t < 16 else (t // 8 - 1) * 8
        alone = model.concepts(idx[:, start:t + 1])
        assert torch.equal(top.indices[:, t], alone.indices[:, -1])

def test_columns_and_glosses_fit_the_screen():
    assert sample.columns(["abc\n\nde", "x" * 25], 23).splitlines() == [
        "abc        │ " + "x" * 10, "           │ " + "x" * 10, "de         │ xxxxx"]
    assert sample.columns(["one text " * 20], 23) == "one text " * 20
    cells = [["'a'", "1 x"], ["'bb'", "22 yyy"], ["'c'", "3"]]
    assert sample.gloss(cells, 14) == "'a'  'bb'\n1 x  22 yyy\n\n'c'\n3\n"

@pytest.mark.parametrize("text, width", [
    ("a", 1), ("漢字", 4), ("e\u0301", 1), ("👍", 2), ("가", 2), ("\x1b", 0), ("ｱ", 1), ("", 0)])
def test_the_width_of_wide_and_combining_characters(text, width):
    assert sample.width_of(text) == width

@pytest.mark.parametrize("text", ["漢字かな交じり文" * 3, "e\u0301a\u0308" * 20, "👍 ok 👍 " * 6,
                                  "x" * 60])
@pytest.mark.parametrize("width", [100, 60, 30, 19])
def test_columns_are_aligned_whatever_the_width_of_characters(text, width):
    each = (width - 3) // 2
    for line in sample.columns([text, "right"], width).splitlines():
        left, bar, _ = line.partition(" │")
        assert bar and sample.width_of(left) == each and sample.width_of(line) <= width
    left = [line.partition(" │")[0] for line in sample.columns([text, ""], width).splitlines()]
    assert "".join(left).replace(" ", "") == text.replace(" ", "")

@pytest.mark.parametrize("width", [10, 1, 0])
def test_a_very_narrow_terminal_shows_all_text(width):
    assert sample.columns(["A\nleft", "B\nright"], width) == "A\nleft\n\nB\nright"
    cells = [["'漢'", "1 x"], ["'bb'", "22 yyy"]]
    words = sample.gloss(cells, width).split()
    assert words == ["'漢'", "1", "x", "'bb'", "22", "yyy"]
    assert sample.wrap("漢字", 1) == ["漢", "字"] and sample.wrap("", 5) == [""]

def test_a_text_ends_at_end_of_text_and_appears_as_it_comes(cocomix, monkeypatch):
    folder, model, _, tokenizer = cocomix
    tokens, end = [104, 195, 169, 105, tokenizer.eot_token, 106], tokenizer.eot_token
    shown = []  # after each token
    def stream(gpt, idx, *args, stop=None, **options):
        for token in tokens:
            yield torch.tensor([[token]])
            shown.append(sys.stdout.getvalue())
            if token == stop:
                return
    monkeypatch.setattr(sample, "stream", stream)
    status, out, err = run(sample.main, folder, "--device=cpu", "--start=a")
    assert status == 0 and out.endswith("\nahéi\n"), (out, err)
    assert [text[-3:] for text in shown[:4]] == ["\nah", "\nah", "ahé", "héi"]
    status, out, err = run(sample.main, folder, "--device=cpu", "--start=a", "--stop=false")
    assert status == 0 and out.endswith("\nahéi<|endoftext|>j\n"), err
    assert end not in tokens[:4]

@pytest.mark.cuda
def test_reading_and_steering_run_on_a_gpu(cocomix, tmp_path):
    shutil.copy(cocomix[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    assert run(concepts.main, tmp_path, "--device=cuda", "--tokens=4000")[0] == 0
    content = load_checkpoint(tmp_path)
    on_gpu = index_of_run(tmp_path, content, load_model(content), pytest.fail, CPU)
    index, difference = cocomix[2], (on_gpu.labelled - cocomix[2].labelled).abs().sum()
    assert difference <= 0.1 * index.labelled.sum()  # bfloat16
    status, _, err = run(sample.main, tmp_path, "--device=cuda", "--steer", "--inspect",
                         "--max_new_tokens=8")
    assert status == 0, err

@pytest.mark.parametrize("argv, message", [
    (["--steer=None", "--steer_sweep"], "steer='None': no concept matches"),
    (["--steer", "error", "--steer_sweep"], "no run error; a concept to sweep needs =, as in "
                                            "--steer=error"),
    (["17", "--steer_sweep"], "as in --steer=17"),
    (["again"], "unexpected argument 'again'")])
def test_what_cannot_be_steered_is_named(cocomix, argv, message):
    status, _, err = run(sample.main, cocomix[0], *argv, "--device=cpu")
    assert status == 1 and message in err, err

def test_titles_are_as_wide_as_the_screen(cocomix, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sample, "plan", lambda *_: {"模型": {}, "b": {3: 2.0}})
    status, out, err = run(sample.main, cocomix[0], "--steer=3:2", "--model=run", "--device=cpu",
                           "--max_new_tokens=1")
    titles = [line for line in out.splitlines() if line.startswith("── ")]
    assert status == 0 and len(titles) == 2, err
    assert [sample.width_of(title) for title in titles] == [60, 60]
