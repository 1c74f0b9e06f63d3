"""Generation: cached and uncached, sweeps, sampling, text longer than the context."""
import time

import pytest
import torch
from conftest import tiny_gpt
from test_reference import VARIANTS

from support.engine import decoder, generate, read, stream
from support.tokens import load_tokenizer

def seeded(seed=1):
    return torch.Generator().manual_seed(seed)

@pytest.mark.parametrize("insert, mix", VARIANTS)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_generation_with_the_cache_equals_generation_without(insert, mix, temperature):
    model = tiny_gpt(insert=insert, mix=mix)
    sweep = torch.ones(2, 1, 40, dtype=torch.float64)
    sweep[:, 0, 7] = torch.tensor([-8.0, 8.0])
    for scale in (None, sweep) if insert == "concept" else (None,):
        # within block_size, up to it, and from a prompt beyond it
        for length in (1, 5, 16, 25) if scale is None else (5, 25):
            idx = torch.randint(61, (2, length))
            texts = [generate(model, idx, 20, temperature, 20, scale, seeded(), use_cache)
                     for use_cache in (True, False)]
            assert torch.equal(*texts)
            rows = 2 if scale is None else 4
            assert texts[0].shape == (rows, length + 20)
            assert torch.equal(texts[0][:, :length], idx.repeat(rows // 2, 1))

@pytest.mark.parametrize("mix", ["interleave", "interleave_residual", "add"])
def test_a_sweep_equals_each_factor_alone_with_the_same_random_numbers(mix):
    model = tiny_gpt(insert="concept", mix=mix)
    sweep = torch.ones(4, 1, 40, dtype=torch.float64)
    sweep[:, 0, [3, 17]] = torch.tensor([[-8, 5], [1, 1], [0, 9], [9, 0]], dtype=torch.float64)
    idx = torch.randint(61, (2, 7))
    together = generate(model, idx, 25, top_k=30, scale=sweep, generator=seeded()).view(4, 2, -1)
    for rows, scale in zip(together, sweep, strict=True):
        alone = generate(model, idx, 25, top_k=30, scale=scale[0], generator=seeded())
        assert torch.equal(rows, alone)
    plain = generate(model, idx, 25, top_k=30, generator=seeded())
    assert torch.equal(together[1], plain)  # factors of one change nothing
    assert len({tuple(rows.flatten().tolist()) for rows in together}) > 1

def test_a_sweep_runs_the_lower_blocks_once_over_the_prompt():
    model, shapes = tiny_gpt(insert="concept"), []
    model.h[0].register_forward_hook(lambda block, args, out: shapes.append(args[0].shape[:2]))
    scale = torch.ones(5, 1, 40, dtype=torch.float64)
    generate(model, torch.randint(61, (2, 7)), 3, scale=scale)
    assert shapes == [(2, 7), (10, 1), (10, 1)]

@pytest.mark.parametrize("top_k", [None, 5])
def test_tokens_are_drawn_with_the_models_probabilities(top_k):
    model = tiny_gpt(n_layer=1)
    idx = torch.randint(61, (1, 2))
    expected = (model(idx).logits[0, -1] / 0.7).softmax(-1)
    if top_k is not None:
        expected = torch.where(expected >= expected.topk(top_k).values[-1], expected, 0)
    drawn = generate(model, idx.expand(20_000, -1), 1, 0.7, top_k, generator=seeded(0))[:, -1]
    found = torch.bincount(drawn, minlength=61) / 20_000
    assert (found - expected / expected.sum()).abs().max() < 0.012

def test_beyond_block_size_generation_continues_from_the_last_half():
    model = tiny_gpt(insert_layer=9)  # not used by a plain GPT
    idx = torch.randint(61, (1, 16))
    out = generate(model, idx, 6, temperature=0)
    for n in range(16, 22):  # at 17 tokens the context restarts at 17 - 8 = 9
        window = out[:, :n] if n <= 16 else out[:, 9:n]
        assert out[0, n] == model(window).logits[0, -1].argmax()

def test_padding_is_never_sampled():
    model = tiny_gpt(vocab_size=61)
    with torch.no_grad():
        model.wte.weight[61:] = 100.0
    assert generate(model, torch.randint(61, (2, 12)), 20, temperature=1.5).max() < 61

def test_rows_end_at_the_stop_token_and_the_text_with_the_last_row():
    model, idx = tiny_gpt(), torch.randint(61, (3, 4))
    free = generate(model, idx, 40, generator=seeded())
    stop = free[0, 9].item()
    stopped = generate(model, idx, 40, generator=seeded(), stop=stop)
    ends = []
    for row, alone in zip(stopped, free, strict=True):
        new = alone[4:].tolist()
        end = new.index(stop) + 1 if stop in new else len(new)
        expected = new[:end] + [stop] * (40 - end)
        assert row[4:].tolist() == expected[:len(row) - 4]
        ends.append(end)
    assert stopped.shape[1] == 4 + max(ends)

@pytest.mark.parametrize("insert, mix", VARIANTS)
@pytest.mark.parametrize("sweep", [True, False])
def test_a_prompt_that_was_read_before_gives_the_same_text(insert, mix, sweep):
    model, idx, scale = tiny_gpt(insert=insert, mix=mix), torch.randint(61, (1, 6)), None
    if sweep and insert == "concept":
        scale = torch.ones(2, 1, 40, dtype=torch.float64)
        scale[1, 0, 7] = -8
    prompt = read(model, idx)
    expected = list(stream(model, idx, 25, scale=scale, generator=seeded()))
    for _ in range(2):  # the reading is not changed by its use
        found = stream(model, idx, 25, scale=scale, generator=seeded(), prompt=prompt)
        assert torch.equal(torch.cat(list(found)), torch.cat(expected))

def test_a_character_of_several_tokens_comes_whole():
    tokenizer = load_tokenizer("stdlib")
    text = "naïve 漢字 👍 \N{WOMAN}\u200d\N{PERSONAL COMPUTER}"
    decode, so_far = decoder(tokenizer), ""
    for token in tokenizer.encode_ordinary(text):
        so_far += decode(token)
        assert text.startswith(so_far)
    assert so_far == text
    assert decoder(tokenizer)(tokenizer.eot_token) == "<|endoftext|>"

@pytest.mark.slow
def test_generation_with_the_cache_is_eight_times_as_fast():
    """The demo's model, 8 samples of 256 new tokens."""
    model = tiny_gpt(torch.float32, block_size=256, vocab_size=4096, n_layer=4, n_embd=128,
                     insert="concept", mix="interleave_residual", insert_layer=2, n_concepts=2048,
                     concept_k=16)
    idx, seconds = torch.randint(4096, (8, 8)), []
    for use_cache in (True, False):
        started = time.perf_counter()
        generate(model, idx, 256, top_k=200, use_cache=use_cache)
        seconds.append(time.perf_counter() - started)
    assert seconds[1] >= 8 * seconds[0], seconds

def test_a_temperature_that_float32_has_not_is_greedy():
    model, idx = tiny_gpt(torch.float32), torch.randint(61, (2, 5))
    assert torch.equal(generate(model, idx, 6, 1e-50), generate(model, idx, 6, 0))
