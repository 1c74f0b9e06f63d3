"""The model against plain formulas, in float64: values and gradients."""
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import CountProducts, tiny_gpt
from model import DISTANCES, GPT, INSERTS, MIXES, Hidden, ModelConfig, Teacher, TopK, gathered_dot, linear_cross_entropy, linear_topk, sparse_decode, sparse_outer, topk

VARIANTS = [("none", "interleave")] + [(i, m) for i in INSERTS if i != "none" for m in MIXES if (i, m) != ("pause", "none")]


def batch(vocab=61, B=2, T=12, C=40):
    return torch.randint(vocab, (B, T)), torch.randint(vocab, (B, T)), torch.randint(C, (B, T, 4))


def dense_topk(z, k):
    values, indices = z.topk(k)
    return torch.zeros_like(z).scatter(-1, indices, values)


def plain_attention(attn, x):
    B, T, d = x.shape
    q, k, v = (t.view(B, T, attn.n_head, -1).transpose(1, 2) for t in attn.c_attn(x).split(d, -1))
    scores = (q @ k.transpose(-1, -2)) / (d // attn.n_head) ** 0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, d))


def plain_forward(model, idx, labels=None, scale=1.0):
    """(logits, concept loss) as the paper's steps say, dense: masks over all C, every position through every block."""
    c = model.config
    x, concept_loss = model.wte(idx) + model.wpe.weight[:idx.shape[1]], None
    for i, block in enumerate(model.h):
        if c.insert != "none" and i == c.insert_layer:
            m = model.inserted
            if c.insert == "pause":
                vector = m.vector.expand_as(x)
            elif c.insert == "hidden":
                mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, unbiased=True)
                first, second = m.predict[0], m.predict[2]
                g = F.gelu(((x - mean) / (std + 1e-5) - m.bias) @ first.weight.T + first.bias, approximate="tanh") @ second.weight.T + second.bias
                if labels is not None:
                    concept_loss = ((g - labels) ** 2).mean()
                if c.mix != "none":
                    vector = (g @ m.compress.weight.T + m.compress.bias + m.bias) * std + mean
            else:
                mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, unbiased=True)
                z = ((x - mean) / (std + 1e-5) - m.bias) @ m.predict.weight.T + m.predict.bias
                if labels is not None:
                    concept_loss = torch.stack([F.cross_entropy(z.flatten(0, 1), labels[..., j].flatten()) for j in range(labels.shape[-1])]).mean()
                if c.mix != "none":
                    vector = (dense_topk(z * scale, c.concept_k) @ m.compress + m.compress_bias + m.bias) * std + mean
            if c.mix == "add":
                x = x + vector
            elif c.mix != "none":
                second = x + vector if c.mix == "interleave_residual" else vector
                both = torch.empty(x.shape[0], 2 * x.shape[1], x.shape[2], dtype=x.dtype)
                both[:, 0::2], both[:, 1::2] = x, second
                x = both
        x = x + plain_attention(block.attn, block.ln_1(x))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    if c.interleaved:
        x = x[:, 1::2]
    return model.ln_f(x) @ model.wte.weight[:c.vocab_size].T, concept_loss


@pytest.mark.parametrize("insert, mix", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_equal_the_plain_formulas(insert, mix, bias):
    model = tiny_gpt(insert=insert, mix=mix, bias=bias)
    idx, targets, labels = batch()
    labels = labels if insert == "concept" else torch.randn(2, 12, 20, dtype=torch.float64) if insert == "hidden" else None
    logits, concept_loss = plain_forward(model, idx, labels)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    parameters = list(model.parameters())
    total = loss if concept_loss is None else loss + 0.3 * concept_loss
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    out = model(idx, targets, labels)
    torch.testing.assert_close(model(idx).logits, logits)
    torch.testing.assert_close(out.loss, loss)
    if labels is not None:
        torch.testing.assert_close(out.concept_loss, concept_loss)
    ours = torch.autograd.grad(out.loss if labels is None else out.loss + 0.3 * out.concept_loss, parameters, allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), ours, expected):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        torch.testing.assert_close(a.expand_as(b) if a.dim() == 0 else a, b.to(a.dtype).expand_as(a), msg=lambda m: f"{name}: {m}")


def test_steering_scales_the_logits_before_topk():
    model = tiny_gpt(insert="concept")
    idx, *_ = batch()
    scale = torch.ones(40, dtype=torch.float64)
    scale[[3, 17]] = torch.tensor([-8.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(model(idx, scale=scale).logits, plain_forward(model, idx, scale=scale)[0])
    rows = torch.stack((scale, torch.ones_like(scale)))[:, None]  # another factor for each sequence
    torch.testing.assert_close(model(idx, scale=rows).logits[0], model(idx, scale=scale).logits[0])
    torch.testing.assert_close(model(idx, scale=rows).logits[1], model(idx).logits[1])


@pytest.mark.parametrize("insert, mix", VARIANTS)
def test_a_later_token_never_changes_an_earlier_logit(insert, mix):
    model = tiny_gpt(insert=insert, mix=mix)
    idx, *_ = batch()
    for t in range(1, idx.shape[1]):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + torch.randint(60, changed[:, t:].shape)) % 61
        before, after = model(idx).logits, model(changed).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])


@pytest.mark.parametrize("insert, mix", VARIANTS)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_generation_with_the_cache_equals_generation_without(insert, mix, temperature):
    model = tiny_gpt(insert=insert, mix=mix)
    sweep = torch.ones(2, 1, 40, dtype=torch.float64)
    sweep[:, 0, 7] = torch.tensor([-8.0, 8.0])
    for scale in (None, sweep) if insert == "concept" else (None,):
        for length in (1, 5, 16, 25) if scale is None else (5, 25):  # within block_size, up to it, and from a prompt beyond it
            idx = torch.randint(61, (2, length))
            with_cache, without = (model.generate(idx, 20, temperature, 20, scale, torch.Generator().manual_seed(1), cache) for cache in (True, False))
            assert torch.equal(with_cache, without)
            rows = 2 if scale is None else 4
            assert with_cache.shape == (rows, length + 20) and torch.equal(with_cache[:, :length], idx.repeat(rows // 2, 1))


@pytest.mark.parametrize("mix", ["interleave", "interleave_residual", "add"])
def test_a_sweep_equals_each_factor_alone_with_the_same_luck(mix):
    model = tiny_gpt(insert="concept", mix=mix)
    sweep = torch.ones(4, 1, 40, dtype=torch.float64)
    sweep[:, 0, [3, 17]] = torch.tensor([[-8.0, 5.0], [1.0, 1.0], [0.0, 9.0], [9.0, 0.0]], dtype=torch.float64)
    idx = torch.randint(61, (2, 7))
    together = model.generate(idx, 25, top_k=30, scale=sweep, generator=torch.Generator().manual_seed(3)).view(4, 2, -1)
    alone = [model.generate(idx, 25, top_k=30, scale=s[0], generator=torch.Generator().manual_seed(3)) for s in sweep]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together[1], model.generate(idx, 25, top_k=30, generator=torch.Generator().manual_seed(3)))  # factors of one steer nothing
    assert len({tuple(rows.flatten().tolist()) for rows in together}) > 1


def test_a_sweep_sends_the_prompt_through_the_lower_blocks_once():
    model, rows = tiny_gpt(insert="concept"), []
    model.h[0].register_forward_hook(lambda block, args, out: rows.append(tuple(args[0].shape[:2])))
    model.generate(torch.randint(61, (2, 7)), 3, scale=torch.ones(5, 1, 40, dtype=torch.float64))
    assert rows == [(2, 7), (10, 1), (10, 1)]


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    model = tiny_gpt(n_layer=1)
    idx = torch.randint(61, (1, 2))
    shares = (model(idx).logits[0, -1] / 0.7).softmax(-1)
    for top_k in (None, 5):
        expected = shares if top_k is None else torch.where(shares >= shares.topk(5).values[-1], shares, 0)
        drawn = model.generate(idx.expand(20_000, -1), 1, 0.7, top_k, generator=torch.Generator().manual_seed(0))[:, -1]
        found = torch.bincount(drawn, minlength=61) / 20_000
        assert (found - expected / expected.sum()).abs().max() < 0.012


@pytest.mark.parametrize("mix", MIXES)
def test_the_concepts_alone_are_those_of_the_whole_forward(mix):
    model, (idx, *_) = tiny_gpt(insert="concept", mix=mix), batch()
    scale = torch.ones(40, dtype=torch.float64)
    scale[5] = -9
    for s in (None, scale):
        alone, whole = model.concepts(idx, s), model(idx, scale=s).concepts
        assert torch.equal(alone.indices, whole.indices) and torch.equal(alone.values, whole.values)


@pytest.mark.slow
def test_generation_with_the_cache_is_eight_times_as_fast():
    """The demo's shape, 8 samples of 256 new tokens."""
    model = tiny_gpt(torch.float32, block_size=256, vocab_size=4096, n_layer=4, n_embd=128, insert="concept", mix="interleave_residual", insert_layer=2,
                     n_concepts=2048, concept_k=16)
    idx, seconds = torch.randint(4096, (8, 8)), []
    for use_cache in (True, False):
        started = time.perf_counter()
        model.generate(idx, 256, top_k=200, use_cache=use_cache)
        seconds.append(time.perf_counter() - started)
    assert seconds[1] >= 8 * seconds[0], seconds


def test_beyond_block_size_generation_goes_on_from_the_last_half():
    model = tiny_gpt(insert_layer=9)  # which a plain GPT does not look at
    idx = torch.randint(61, (1, 16))
    out = model.generate(idx, 6, temperature=0)
    for n in range(16, 22):  # at 17 tokens the window starts anew at 17 - 8 = 9
        window = out[:, 0:n] if n <= 16 else out[:, 9:n]
        assert out[0, n] == model(window).logits[0, -1].argmax()


def test_padding_is_never_sampled_and_never_in_the_loss():
    model = tiny_gpt(vocab_size=61)
    with torch.no_grad():
        model.wte.weight[61:] = 100.0
    idx, targets, _ = batch()
    assert model(idx).logits.shape[-1] == 61
    assert model(idx, targets).loss.item() == pytest.approx(F.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten()).item())
    assert model.generate(idx, 20, temperature=1.5).max() < 61
    model(idx, targets).loss.backward()
    assert model.wte.weight.grad[61:].abs().max() == 0


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_topk_equals_the_plain_formula(monkeypatch, chunk, bias):
    if chunk:  # several chunks, the last one short
        import model
        monkeypatch.setattr(model, "chunk_rows", lambda device, width: chunk)
    x = torch.randn(3, 10, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(50, dtype=torch.float64, requires_grad=True) if bias else None
    labels, mixture = torch.randint(50, (3, 10, 4)), torch.randn(3, 10, 6, dtype=torch.float64)
    labels[0, 0] = 7  # the same label four times
    inputs = [t for t in (x, w, b) if t is not None]
    z = F.linear(x, w, b)
    values, indices = z.topk(6)
    loss = (z.logsumexp(-1) - z.gather(-1, labels).mean(-1)).mean()
    expected = torch.autograd.grad(2 * loss + (values * mixture).sum(), inputs)
    top, ours = linear_topk(x, w, b, 6, labels)
    torch.testing.assert_close(top.values, values)
    assert torch.equal(top.indices, indices)
    torch.testing.assert_close(ours, loss)
    for a, e in zip(torch.autograd.grad(2 * ours + (top.values * mixture).sum(), inputs), expected):
        torch.testing.assert_close(a, e)
    top, none = linear_topk(x, w, b, 6)  # without labels: only through the kept values
    assert none is None
    for a, e in zip(torch.autograd.grad((top.values * mixture).sum(), inputs), torch.autograd.grad((F.linear(x, w, b).topk(6).values * mixture).sum(), inputs)):
        torch.testing.assert_close(a, e)


def test_a_second_backward_through_a_loss_is_an_error_and_never_a_wrong_gradient():
    x, w, labels = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True), torch.randint(50, (10, 4))
    _, loss = linear_topk(x, w, None, 6, labels)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * loss).backward()


def test_linear_cross_entropy_equals_pytorchs():
    x, w = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True), torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randint(50, (2, 9))
    ours, plain = linear_cross_entropy(x, w, y, 50)[0], F.cross_entropy((x @ w[:50].T).flatten(0, 1), y.flatten())
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(plain, (x, w))):
        torch.testing.assert_close(a, b)
    huge = linear_cross_entropy(x.detach() * 1e4, w, y)[0]
    assert torch.isfinite(huge)


@pytest.mark.parametrize("chunk", [None, 7])
def test_distillation_equals_the_plain_formula(monkeypatch, chunk):
    if chunk:
        import model
        monkeypatch.setattr(model, "chunk_rows", lambda device, width: chunk)
    x, w = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True), torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    teacher = Teacher(torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(70, 5, dtype=torch.float64))
    y, z = torch.randint(50, (2, 9)), x @ w[:50].T
    kl = F.kl_div(z.log_softmax(-1), (teacher.x @ teacher.weight[:50].T).softmax(-1), reduction="none").sum(-1).mean()
    plain = F.cross_entropy(z.flatten(0, 1), y.flatten()) + 0.3 * kl
    ours, our_kl = linear_cross_entropy(x, w, y, 50, teacher, 0.3)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(our_kl, kl)
    assert not our_kl.requires_grad
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(plain, (x, w))):
        torch.testing.assert_close(a, b)
    same, none = linear_cross_entropy(x, w, y, 50, Teacher(x.detach(), w.detach()), 0.3)
    assert none.abs() < 1e-12 and same.item() == pytest.approx(linear_cross_entropy(x, w, y, 50)[0].item())


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_hidden_state_is_predicted_by_the_chosen_distance_and_compressed(distance):
    config = ModelConfig(16, 61, 3, 2, 24, insert="hidden", hidden_size=20, distance=distance)
    module = Hidden(config).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    h, wanted = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 20, dtype=torch.float64)
    c, none, loss = module(h, wanted)
    mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    first, second, w = module.predict[0], module.predict[2], module.compress
    g = F.gelu(((h - mean) / (std + 1e-5) - module.bias) @ first.weight.T + first.bias, approximate="tanh") @ second.weight.T + second.bias
    torch.testing.assert_close(c, (g @ w.weight.T + w.bias + module.bias) * std + mean)
    each = {"l1": (g - wanted).abs().mean(-1), "l2": ((g - wanted) ** 2).mean(-1), "cos": 1 - (g * wanted).sum(-1) / g.norm(dim=-1) / wanted.norm(dim=-1)}[distance]
    torch.testing.assert_close(loss, each.mean())
    assert none is None and module(h)[2] is None


@pytest.mark.parametrize("C, k", [(131072, 32), (32768, 32), (32768, 1), (8192, 16), (8192, 5), (2048, 64), (10000, 32), (61, 61), (9, 4), (16384, 2000)])
def test_topk_in_stages_equals_topk(C, k):
    for z in (torch.randn(2, 3, C, dtype=torch.float64), -torch.arange(C).float().expand(1, C), torch.arange(C).float().expand(2, C).contiguous()):
        ours, plain = topk(z, k), z.topk(k)
        assert torch.equal(ours.values, plain.values) and torch.equal(ours.indices, plain.indices)
    ties = torch.randint(5, (4, C)).float()
    ours = topk(ties, k)
    assert torch.equal(ours.values, ties.topk(k).values) and torch.equal(ties.gather(-1, ours.indices), ours.values)
    assert all(len(set(row.tolist())) == k for row in ours.indices)


def test_sparse_products_equal_dense_ones():
    N, C, d, k = 20, 30, 6, 4
    z = torch.randn(N, C, dtype=torch.float64)
    values, indices = z.topk(k)
    S = torch.zeros_like(z).scatter(-1, indices, values)
    w, x = torch.randn(C, d, dtype=torch.float64), torch.randn(N, d, dtype=torch.float64)
    torch.testing.assert_close(sparse_decode(TopK(values, indices), w), S @ w)
    torch.testing.assert_close(gathered_dot(indices, w, x), (x @ w.T).gather(-1, indices))
    torch.testing.assert_close(sparse_outer(TopK(values, indices), x, C), S.T @ x)
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(TopK(v, indices), w), (values.requires_grad_(), w.requires_grad_()))


def test_sparse_outer_where_only_the_last_concept_is_kept():
    top = TopK(torch.ones(5, 1), torch.full((5, 1), 9))
    out = sparse_outer(top, torch.ones(5, 2), 10)
    assert torch.equal(out[:9], torch.zeros(9, 2)) and torch.equal(out[9], torch.full((2,), 5.0))


def test_active_parameters_count_only_the_kept_rows_of_compress():
    plain, concept = tiny_gpt(), tiny_gpt(insert="concept")
    d, C, k = 24, 40, 5
    assert concept.num_params() - plain.num_params() == (C * d + C) + C * d + d + d
    assert concept.num_params(active=True) - plain.num_params() == (C * d + C) + k * d + d + d


@pytest.mark.parametrize("insert, mix", VARIANTS)
def test_flops_are_those_of_the_matrix_products_that_run(insert, mix):
    model = tiny_gpt(torch.float32, insert=insert, mix=mix, vocab_size=64).requires_grad_(False)
    idx, targets, labels = batch(vocab=64, B=1, T=16)
    with CountProducts() as counter:
        model(idx, targets, labels if insert == "concept" else torch.randn(1, 16, 20) if insert == "hidden" else None)
    c, d, T = model.config, 24, 16
    positions = [2 if c.interleaved and i >= 1 else 1 for i in range(3)]
    queries = [1 if i == 2 else p for i, p in enumerate(positions)]
    attention = sum(4 * d * q * p * T // 2 for q, p in zip(queries, positions))  # half of the square: causal
    kept = 2 * d * c.concept_k if insert == "concept" and mix != "none" else 0   # an embedding bag, no product
    assert model.flops_per_token(backward=False) == counter.flops / 16 + attention + kept
    assert model.flops_per_token() == 3 * model.flops_per_token(backward=False)


def test_starts_as_gpt2_does():
    model = GPT(ModelConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128, insert="concept", n_concepts=600))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 16 ** 0.5, rel=0.05)
    assert model.inserted.predict.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.inserted.compress.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.inserted.bias.abs().max() == 0 and model.inserted.predict.bias.abs().max() == 0


def test_methods_start_from_the_same_shared_weights():
    states = []
    for insert in INSERTS:
        torch.manual_seed(5)
        states.append(GPT(ModelConfig(16, 61, 3, 2, 24, insert=insert, n_concepts=40, concept_k=5, hidden_size=20)).state_dict())
    for name in states[0]:
        assert all(torch.equal(state[name], states[0][name]) for state in states)


def test_gpt2_weights_load_from_a_folder_in_the_hubs_layout(tmp_path):
    from config import UserError
    from model import load_gpt
    model = tiny_gpt(torch.float32, n_embd=128, vocab_size=61)
    state = {}
    for name, t in model.state_dict().items():
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = t.T.contiguous() if conv else t[:61] if name == "wte.weight" else t
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)  # the mask buffer of old files
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded, tokenizer = load_gpt(str(tmp_path))
    assert tokenizer == "gpt2" and loaded.config.n_layer == 3 and loaded.config.block_size == 16 and loaded.config.vocab_size == 61
    idx = torch.randint(61, (2, 9))
    torch.testing.assert_close(loaded(idx).logits, model(idx).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not GPT-2's weights"):
        load_gpt(str(tmp_path))


@pytest.mark.slow
def test_gpt2_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-test.txt)")
    from model import load_gpt
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=128, n_head=2, n_layer=3, n_positions=32, vocab_size=211, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    theirs.save_pretrained(tmp_path / "folder")  # model.safetensors
    idx = torch.randint(211, (2, 32))
    for folder in (tmp_path, tmp_path / "folder"):
        ours, _ = load_gpt(str(folder))
        torch.testing.assert_close(ours(idx).logits, theirs(idx).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept with glibc alone")
def test_freed_memory_is_kept_on_a_cpu():
    program = """
import resource, torch
from model import pick_device
pick_device("cpu")
def faults():
    torch.ones(1 << 24).sum()  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = [faults() for _ in range(40)]
print(seen[-1] - seen[-11])
"""
    out = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    assert int(out) < 2 * 16384  # pages, of ten times as many
