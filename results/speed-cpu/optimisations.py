"""Each fast path next to the plain formula it replaces: predicted and measured, at the 69M shape.

    python results/speed-cpu/optimisations.py             # writes optimisations.md

The prediction is what the counts say, before measuring: operations, or bytes where a path only
moves numbers. Plain and fast alternate; the ratio is the median over the rounds. Every pair is
checked to give the same numbers. All keep freed memory (support.device.keep_freed_memory), also the
plain formulas; the last line shows what that alone does.
"""
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F

import bench
import train
from concepts import ConceptModel
from model import GPT, ModelConfig
from sae import SAE
from support import kernels
from support.accounting import flops_per_token
from support.cli import parse
from support.device import keep_freed_memory
from support.kernels import TopK
from support.reference import concept_loss

HERE = Path(__file__).resolve().parent
N, D, C, V = 512, 512, 32768, 50257  # positions, width, concepts, vocabulary
K, LABELS, T, TURNS = 32, 4, 256, 7  # concepts kept, labels, context, rounds
torch.manual_seed(0)

def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)

def staged_topk():
    z = torch.randn(N, C)
    return ("TopK of 32 768 in stages", "1.2 passes over z and 1/32 of a sort", None,
            lambda: z.topk(K), lambda: kernels.topk(z, K))

def label_loss():
    z, labels = torch.randn(N, C, requires_grad=True), torch.randint(C, (N, LABELS))

    def plain():
        loss = concept_loss(z[None], labels[None])
        return loss, *gradients(loss, z)

    def fast():
        loss = (z.logsumexp(-1) - z.gather(-1, labels).mean(-1)).mean()
        return loss, *gradients(loss, z)
    return ("label loss: one logsumexp, four gathers", "passes over z: 4 → 1", 4.0, plain, fast)

def head(N, name):
    x, y = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))
    weight = torch.randn(V, D).mul_(0.02).requires_grad_()

    def plain():
        loss = F.cross_entropy(x @ weight.T, y)
        return loss, *gradients(loss, x, weight)

    def fast():
        loss, _ = kernels.linear_cross_entropy(x, weight, y)
        return loss, *gradients(loss, x, weight)
    return name, "the same products; 4 fewer passes over (N, V)", 1.2, plain, fast

def concept_head():
    x, labels = torch.randn(N, D, requires_grad=True), torch.randint(C, (N, LABELS))
    weight = torch.randn(C, D).mul_(0.02).requires_grad_()
    bias = torch.zeros(C, requires_grad=True)

    def plain():
        z = x @ weight.T + bias
        top = z.topk(K)
        dense = torch.zeros_like(z).scatter(-1, top.indices, top.values)
        loss = concept_loss(z[None], labels[None])
        return loss, *gradients(loss + dense.sum() * 1e-3, x, weight, bias)

    def fast():
        top, loss = kernels.linear_topk(x, weight, bias, K, labels)
        return loss, *gradients(loss + top.values.sum() * 1e-3, x, weight, bias)
    return ("concept head: TopK, label loss and gradient in one",
            "the same products; about 12 fewer passes over (N, C)", 1.5, plain, fast)

def compress():
    z, weight = torch.randn(N, C), torch.randn(C, D).mul_(0.02).requires_grad_()
    top = kernels.topk(z, K)
    values = top.values.clone().requires_grad_()

    def plain():
        dense = torch.zeros(N, C).scatter(-1, top.indices, values)
        out = dense @ weight
        return out, *gradients(out.sum(), values, weight)

    def fast():
        out = kernels.sparse_decode(TopK(values, top.indices), weight)
        return out, *gradients(out.sum(), values, weight)
    return ("compress: only the kept rows",
            "products 6 N C d → 6 N k d, then only the (C, d) gradient counts", C / K / 20,
            plain, fast)

def attribution():
    sae, grad = SAE(768, C, K).requires_grad_(False), torch.randn(N, 768)
    top, rows = kernels.topk(torch.randn(N, C), K), torch.arange(N)[:, None]
    return ("attribution at the active concepts", "products 2 N C d → 2 N k d, but gathered",
            C / K / 10,
            lambda: top.values * (grad @ sae.decoder.T)[rows, top.indices],
            lambda: top.values * kernels.gathered_dot(top.indices, sae.decoder, grad))

def concept_model():
    gpt = GPT(ModelConfig(vocab_size=V))
    frozen = GPT(ModelConfig(vocab_size=V)).requires_grad_(False)
    frozen.load_state_dict(gpt.state_dict())
    frozen_concepts = ConceptModel(frozen, SAE(768, C, K).requires_grad_(False), 5)
    x, y = torch.randint(V, (2, N // T, T))

    def plain():
        h = gpt.forward_blocks(gpt.embed(x), 0, 6)
        h.retain_grad()
        logits = gpt.head(gpt.forward_blocks(h, 6, 12))
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        gpt.zero_grad(set_to_none=True)
        return h.grad

    def fast():
        with torch.no_grad():
            h = frozen.forward_blocks(frozen.embed(x), 0, 6)
        return frozen_concepts.loss_gradient(h, y)[0]
    # plain: forward 1, backward 2; fast: forward 1, and to their inputs the upper half and the head
    whole = flops_per_token(frozen, backward=False, block_size=T)
    lower = 6 * (24 * 768 ** 2 + 2 * 768 * T)
    return ("concept model: gradient for h only", "by FLOPs", 3 * whole / (2 * whole - lower),
            plain, fast)

def last_block():
    gpt = GPT(ModelConfig(block_size=T, vocab_size=V, n_layer=8, n_head=8, n_embd=D, insert="pause",
                          insert_layer=4))
    block, x = gpt.h[-1], torch.randn(N // T, 2 * T, D, requires_grad=True)

    def plain():
        out = block(x)[:, 1::2]
        return out, *gradients(out.sum(), x, *block.parameters())

    def fast():
        out = block(x, slice(1, None, 2))
        return out, *gradients(out.sum(), x, *block.parameters())
    predicted = 2 * (12 * D ** 2 + D * 2 * T) / (2 * 2 * D ** 2 + 10 * D ** 2 + D * 2 * T)
    return ("last block: queries and MLP at the concept positions", "by FLOPs, of this block",
            predicted, plain, fast)

def adamw():
    blocks = ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D)) * 8

    def optimizer(**how):
        torch.manual_seed(0)
        weights = [torch.randn(s, requires_grad=True) for s in ((V, D), (C, D), (C, D), *blocks)]
        for w in weights:
            w.grad = torch.ones_like(w)
        return weights, torch.optim.AdamW(weights, **how)
    (a, loop), (b, fused) = optimizer(foreach=False), optimizer(fused=True)

    def plain():
        loop.step()
        return a[0].detach()

    def fast():
        fused.step()
        return b[0].detach()
    return "AdamW, fused", "passes over memory: 16 → 7", 16 / 7, plain, fast

def sae_gradient():
    top, x = kernels.topk(torch.randn(2048, C), K), torch.randn(2048, 768)

    def plain():
        terms = (top.values[..., None] * x[:, None]).flatten(0, 1)
        return torch.zeros(C, 768).index_add_(0, top.indices.flatten(), terms)
    return ("SAE: decoder's gradient by sorted bags",
            "no (N, k, d) tensor written and read: 3 passes over it → 1", 3.0,
            plain, lambda: kernels.sparse_outer(top, x, C))

def ntp_step(keep):
    """Print the median seconds of NTP's forward and backward at the 69M shape, in this process."""
    if keep == "kept":
        keep_freed_memory()
    config = str(HERE.parents[1] / "config/ntp_69m.py")
    cfg, _ = parse(bench.Config, [config, "--batch_size=2", f"--block_size={T}"], most=0)
    row = bench.Row("ntp_69m", cfg, torch.device("cpu"))

    def step():
        train.accumulate(row, None, row.x, row.y, None)
        row.optimizer.zero_grad(set_to_none=True)
    step()
    print(statistics.median(bench.clocked(step) for _ in range(TURNS)))

def kept_memory():
    """A line of the table: each setting alternates in processes of its own, which cannot reuse each
    other's memory."""
    def seconds(keep):
        command = [sys.executable, __file__, keep]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return float(out.split()[-1])
    pairs = [(seconds("given back"), seconds("kept")) for _ in range(3)]
    return line_of("freed memory is kept (NTP, 69M: forward and backward)",
                   "else the kernel takes its pages and zeroes them for the next step", None, pairs)

def line_of(name, why, predicted, pairs):
    """A line of the table, from the (plain, fast) seconds of each round."""
    slow, quick = (statistics.median(t) * 1e3 for t in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    predicted = "–" if predicted is None else f"{predicted:.1f} ×"
    return f"| {name} | {why} | {predicted} | {ratio:.1f} × | {slow:.1f} | {quick:.1f} |"

def compare(name, why, predicted, plain, fast):
    """A line of the table, once both are known to give the same."""
    results = [(result,) if torch.is_tensor(result) else tuple(result)
               for result in (plain(), fast())]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    pairs = []
    for _ in range(TURNS):
        clocks = [time.perf_counter()]
        for f in (plain, fast):
            f()
            clocks.append(time.perf_counter())
        pairs.append((clocks[1] - clocks[0], clocks[2] - clocks[1]))
    return line_of(name, why, predicted, pairs)

IDEAS = (staged_topk, label_loss, concept_head, compress, attribution, concept_model,
         lambda: head(N, "next-token head: loss with its gradient, in chunks of 512"),
         lambda: head(4 * N, "the same at 4 N"), last_block, adamw, sae_gradient)

def main():
    keep_freed_memory()
    lines = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
             f"N = {N} positions, d = {D}, C = {C}, V = {V}", "",
             "| what | why it should be faster | predicted | measured | plain, ms | fast, ms |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]
    print("\n".join(lines))
    for idea in IDEAS:
        lines.append(compare(*idea()))
        print(lines[-1], flush=True)
    lines.append(kept_memory())
    print(lines[-1])
    (HERE / "optimisations.md").write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    ntp_step(sys.argv[1]) if sys.argv[1:] else main()
