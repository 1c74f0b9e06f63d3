"""Tokens/s of generation with the KV cache and without, 256 new tokens after a prompt of 8, both ways alternating in one
process; and of a sweep of 12 factors in one call beside 12 calls.

    python results/stdlib-steering/speed.py out/stdlib/cocomix
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from model import load_checkpoint, load_model


def seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


model = load_model(load_checkpoint(sys.argv[1]))
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of 3\n")
print(f"{'samples':>8} {'with cache':>12} {'without':>10}    times")
for samples in (1, 4, 8):
    prompt = torch.randint(model.config.vocab_size, (samples, 8))
    with_cache, without = zip(*[[seconds(lambda: model.generate(prompt, 256, top_k=200, use_cache=cache)) for cache in (True, False)] for _ in range(3)])
    new = samples * 256
    print(f"{samples:8} {new / statistics.median(with_cache):7,.0f} tok/s {new / statistics.median(without):5,.0f} tok/s {statistics.median(b / a for a, b in zip(with_cache, without)):6.1f}")

prompt, sweep = torch.randint(model.config.vocab_size, (1, 128)), torch.ones(12, 1, model.config.n_concepts)
sweep[:, 0, 17] = torch.linspace(-10, 10, 12)
together, apart = zip(*[[seconds(lambda: model.generate(prompt, 64, top_k=200, scale=sweep)), seconds(lambda: [model.generate(prompt, 64, top_k=200, scale=s[0]) for s in sweep])]
                        for _ in range(3)])
print(f"\na sweep of 12 factors, prompt of 128, 64 new tokens: {statistics.median(together):.2f} s in one call, {statistics.median(apart):.2f} s in 12: {statistics.median(b / a for a, b in zip(together, apart)):.1f} times")
