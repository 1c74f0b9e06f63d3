"""Tokens/s of generation with and without the KV cache, alternating in one process: 256 new tokens
after a prompt of 8; then a sweep of 12 factors in one call and in 12 calls.

    python results/stdlib-steering/speed.py out/stdlib/cocomix
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from model import load_model
from support.checkpoint import load_checkpoint
from support.engine import generate

def seconds(f, *args, **kwargs):
    started = time.perf_counter()
    f(*args, **kwargs)
    return time.perf_counter() - started

def report_cache(model, samples):
    prompt, new = torch.randint(model.config.vocab_size, (samples, 8)), samples * 256
    pairs = [[seconds(generate, model, prompt, 256, top_k=200, use_cache=cache)
              for cache in (True, False)] for _ in range(3)]
    cached, plain = (new / statistics.median(t) for t in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{samples:8} {cached:7,.0f} tok/s {plain:5,.0f} tok/s {ratio:6.1f}")

def report_sweep(model):
    prompt = torch.randint(model.config.vocab_size, (1, 128))
    sweep = torch.ones(12, 1, model.config.n_concepts)
    sweep[:, 0, 17] = torch.linspace(-10, 10, 12)

    def one_by_one():
        for scale in sweep:
            generate(model, prompt, 64, top_k=200, scale=scale[0])
    pairs = [(seconds(generate, model, prompt, 64, top_k=200, scale=sweep), seconds(one_by_one))
             for _ in range(3)]
    together, apart = (statistics.median(t) for t in zip(*pairs, strict=True))
    print(f"\na sweep of 12 factors, prompt of 128, 64 new tokens: {together:.2f} s in one call, "
          f"{apart:.2f} s in 12: {statistics.median(b / a for a, b in pairs):.1f} times")

def main(run):
    model = load_model(load_checkpoint(run))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of 3\n")
    print(f"{'samples':>8} {'with cache':>12} {'without':>10}    times")
    for samples in (1, 4, 8):
        report_cache(model, samples)
    report_sweep(model)

if __name__ == "__main__":
    main(*sys.argv[1:])
