"""Choices that only a GPU can decide: two exact forms of the same kernel, timed.

    python results/gpu_kernels.py                   # prints a Markdown table
    python results/gpu_kernels.py --device=cpu --tokens=256 --repeats=1

The last interleaved block's attention, forward and backward: of the ĉ positions under a mask, or of
all positions without one (support.kernels.skips_mask). The sum over the positions that kept each
concept, where one concept is kept at half of all positions: in whole bags, or cut
(support.kernels.longest_bag).
"""
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.runtime import run

import torch
from torch.utils.benchmark import timer

from model import Attention, ModelConfig
from support import kernels
from support.cli import key, parse
from support.device import pick_device

@dataclass(frozen=True)
class Config:
    device: str = key("auto", "cpu, cuda, cuda:1 or mps; auto: the fastest available")
    tokens: int = key(32768, "in a micro batch", low=256)
    repeats: int = key(20, "of which the median is shown", low=1)

def last_block(device, tokens, d, skip):
    """A function that runs the last block's attention once, of width d, in bfloat16."""
    block_size = min(1024, tokens)
    attn = Attention(ModelConfig(n_embd=d, n_head=d // 64)).to(device)
    x = torch.randn(tokens // block_size, 2 * block_size, d, device=device, requires_grad=True)

    def once():
        with (mock.patch.object(kernels, "skips_mask", lambda _: skip),
              torch.autocast(device.type, torch.bfloat16)):
            attn(x, queries=slice(1, None, 2)).sum().backward()
    return once

def skewed_sum(device, tokens, d, longest):
    """A function that sums once; one of 32,768 concepts is kept at half of all positions."""
    indices = torch.randint(1, 32768, (tokens, 32), device=device)
    indices[::2, 0] = 0
    top = kernels.TopK(torch.randn(tokens, 32, device=device), indices)
    x = torch.randn(tokens, d, device=device)

    def once():
        with mock.patch.object(kernels, "longest_bag", lambda _: longest):
            kernels.sparse_outer(top, x, 32768)
    return once

def milliseconds(functions, repeats):
    """The median time of each function; they take turns."""
    times = [[] for _ in functions]
    for turn in range(repeats + 2):  # the first two warm up
        for function, found in zip(functions, times, strict=True):
            start = timer()
            function()
            found += [timer() - start] * (turn > 1)
    return [1e3 * statistics.median(found) for found in times]

def main(argv):
    cfg, _ = parse(Config, argv, __doc__, most=0, files=False)
    device = pick_device(cfg.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, {cfg.tokens} tokens, ms\n\n| what | width | one form | ms | other form | ms |")
    print("| --- | ---: | --- | ---: | --- | ---: |")
    for d in (512, 768, 1024, 2048):
        forms = [last_block(device, cfg.tokens, d, skip) for skip in (False, True)]
        masked, full = milliseconds(forms, cfg.repeats)
        print(f"| last block | {d} | masked | {masked:.2f} | all positions | {full:.2f} |",
              flush=True)
    for d in (512, 1024):
        forms = [skewed_sum(device, cfg.tokens, d, longest) for longest in (None, 1024)]
        whole, cut = milliseconds(forms, cfg.repeats)
        print(f"| sum by concept | {d} | whole bags | {whole:.2f} | cut at 1,024 | {cut:.2f} |",
              flush=True)

if __name__ == "__main__":
    run(main)
