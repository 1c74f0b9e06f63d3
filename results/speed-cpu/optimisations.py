"""Each fast path beside the plain formula it stands for: predicted and measured, at the 69M shape.

    python results/speed-cpu/optimisations.py             # writes optimisations.md

The prediction is what the counts say, made before measuring: operations, or bytes where a path only moves numbers. Plain and
fast take turns; the ratio is the median over the turns. Every pair is checked to give the same numbers. All keep the
memory that is freed (model.keep_freed_memory), the plain formulas, too; the last line is what that alone does.
"""
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import torch
import torch.nn.functional as F

import bench
import config
import model as m
from concepts import ConceptModel
from model import GPT, ModelConfig, TopK
from sae import SAE, normalize

N, D, C, V, K, LABELS, T, TURNS = 512, 512, 32768, 50257, 32, 4, 256, 7  # positions, width, concepts, vocabulary, kept, labels, context
torch.manual_seed(0)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def staged_topk():
    z = torch.randn(N, C)
    return "TopK of 32 768 in stages", "1.2 passes over z and 1/32 of a sort", None, lambda: z.topk(K), lambda: m.topk(z, K)


def label_loss():
    z, labels = torch.randn(N, C, requires_grad=True), torch.randint(C, (N, LABELS))

    def plain():
        loss = sum(F.cross_entropy(z, labels[:, j]) for j in range(LABELS)) / LABELS
        return loss, *gradients(loss, z)

    def fast():
        loss = (z.logsumexp(-1) - z.gather(-1, labels).mean(-1)).mean()
        return loss, *gradients(loss, z)
    return "label loss: one logsumexp, four gathers", "passes over z: 4 → 1", 4.0, plain, fast


def head(N, name):
    x, weight, y = torch.randn(N, D, requires_grad=True), torch.randn(V, D).mul_(0.02).requires_grad_(), torch.randint(V, (N,))

    def plain():
        loss = F.cross_entropy(x @ weight.T, y)
        return loss, *gradients(loss, x, weight)

    def fast():
        loss, _ = m.linear_cross_entropy(x, weight, y)
        return loss, *gradients(loss, x, weight)
    return name, "the same products; 4 fewer passes over (N, V)", 1.2, plain, fast


def concept_head():
    x, weight, bias, labels = torch.randn(N, D, requires_grad=True), torch.randn(C, D).mul_(0.02).requires_grad_(), torch.zeros(C, requires_grad=True), torch.randint(C, (N, LABELS))

    def plain():
        z = x @ weight.T + bias
        top = z.topk(K)
        dense = torch.zeros_like(z).scatter(-1, top.indices, top.values)
        loss = sum(F.cross_entropy(z, labels[:, j]) for j in range(LABELS)) / LABELS
        return loss, *gradients(loss + dense.sum() * 1e-3, x, weight, bias)

    def fast():
        top, loss = m.linear_topk(x, weight, bias, K, labels)
        return loss, *gradients(loss + top.values.sum() * 1e-3, x, weight, bias)
    return "concept head: TopK, label loss and gradient in one", "the same products; about 12 fewer passes over (N, C)", 1.5, plain, fast


def compress():
    z, weight = torch.randn(N, C), torch.randn(C, D).mul_(0.02).requires_grad_()
    top = m.topk(z, K)
    values = top.values.clone().requires_grad_()

    def plain():
        dense = torch.zeros(N, C).scatter(-1, top.indices, values)
        out = dense @ weight
        return out, *gradients(out.sum(), values, weight)

    def fast():
        out = m.sparse_decode(TopK(values, top.indices), weight)
        return out, *gradients(out.sum(), values, weight)
    return "compress: the kept rows alone", "products 6 N C d → 6 N k d, then the (C, d) gradient alone counts", C / K / 20, plain, fast


def attribution():
    sae, grad, top = SAE(768, C, K).requires_grad_(False), torch.randn(N, 768), m.topk(torch.randn(N, C), K)
    rows = torch.arange(N)[:, None]
    return ("attribution at the active concepts", f"products 2 N C d → 2 N k d, but gathered", C / K / 10,
            lambda: top.values * (grad @ sae.decoder.T)[rows, top.indices], lambda: top.values * m.gathered_dot(top.indices, sae.decoder, grad))


def concept_model():
    gpt = GPT(ModelConfig(vocab_size=V))
    frozen = GPT(ModelConfig(vocab_size=V)).requires_grad_(False)
    frozen.load_state_dict(gpt.state_dict())
    it = ConceptModel(frozen, SAE(768, C, K).requires_grad_(False), 5)
    x, y = torch.randint(V, (2, N // T, T))

    def plain():
        h = gpt.blocks(gpt.embed(x), 0, 6)[0]
        h.retain_grad()
        F.cross_entropy(gpt.head(gpt.blocks(h, 6, 12)[0]).flatten(0, 1), y.flatten()).backward()
        gpt.zero_grad(set_to_none=True)
        return h.grad

    def fast():
        with torch.no_grad():
            h = frozen.blocks(frozen.embed(x), 0, 6)[0]
        return it.loss_gradient(h, y)[0]
    # forward 1, backward 2; without: the lower half forward, the upper half and the head forward and to their inputs
    whole = frozen.flops_per_token(backward=False, block_size=T)
    lower = 6 * (24 * 768 ** 2 + 2 * 768 * T)
    return "concept model: gradient for h alone", "by FLOPs", 3 * whole / (2 * whole - lower), plain, fast


def last_block():
    gpt = GPT(ModelConfig(block_size=T, vocab_size=V, n_layer=8, n_head=8, n_embd=D, insert="pause", insert_layer=4))
    block, x = gpt.h[-1], torch.randn(N // T, 2 * T, D, requires_grad=True)

    def plain():
        out = block(x)[:, 1::2]
        return out, *gradients(out.sum(), x, *block.parameters())

    def fast():
        out = block(x, slice(1, None, 2))
        return out, *gradients(out.sum(), x, *block.parameters())
    return "last block: queries and MLP at the concept positions", "by FLOPs, of the one block", 2 * (12 * D ** 2 + D * 2 * T) / (2 * 2 * D ** 2 + 10 * D ** 2 + D * 2 * T), plain, fast


def adamw():
    def optimizer(**how):
        torch.manual_seed(0)
        weights = [torch.randn(s, requires_grad=True) for s in ((V, D), (C, D), (C, D), *((3 * D, D), (D, D), (4 * D, D), (D, 4 * D)) * 8)]
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
    top, x = m.topk(torch.randn(2048, C), K), torch.randn(2048, 768)

    def plain():
        return torch.zeros(C, 768).index_add_(0, top.indices.flatten(), (top.values[..., None] * x[:, None]).flatten(0, 1))
    return "SAE: decoder's gradient by sorted bags", "no (N, k, d) tensor written and read: 3 passes over it → 1", 3.0, plain, lambda: m.sparse_outer(top, x, C)


def ntp_step(keep):
    """Median seconds of NTP's forward and backward at the 69M shape, in this process, with or without the memory kept."""
    if keep == "kept":
        m.keep_freed_memory()
    cfg, _ = config.parse(bench.Config, [str(HERE.parents[1] / "config/ntp_69m.py"), "--batch_size=2", f"--block_size={T}"], most=0)
    row = bench.Row("ntp_69m", cfg, torch.device("cpu"))

    def step():
        row.losses(slice(0, 2)).backward()
        row.optimizer.zero_grad(set_to_none=True)
    print(bench.timed(step, row.device, TURNS))


def kept_memory():
    """A line of the table: each setting in processes of its own, by turns, since what one keeps the other would find."""
    seconds = [[float(subprocess.run([sys.executable, __file__, keep], capture_output=True, text=True, check=True).stdout.split()[-1]) for keep in ("given back", "kept")] for _ in range(3)]
    slow, quick = (statistics.median(t) for t in zip(*seconds))
    return ("| freed memory is kept (NTP, 69M: forward and backward) | else the kernel takes its pages and zeroes them for the next step | – | "
            f"{statistics.median(a / b for a, b in seconds):.1f} × | {slow * 1e3:.1f} | {quick * 1e3:.1f} |")


def main():
    m.keep_freed_memory()
    lines = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; N = {N} positions, d = {D}, C = {C}, V = {V}", "",
             "| what | why it should be faster | predicted | measured | plain, ms | fast, ms |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    print("\n".join(lines))
    for idea in (staged_topk, label_loss, concept_head, compress, attribution, concept_model, lambda: head(N, "next-token head: loss with its gradient, in chunks of 512"),
                 lambda: head(4 * N, "the same at 4 N"), last_block, adamw, sae_gradient):
        name, why, predicted, plain, fast = idea()
        one, other = plain(), fast()
        for a, b in zip(*((t,) if torch.is_tensor(t) else tuple(t) for t in (one, other))):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
        seconds = []
        for _ in range(TURNS):
            turn = []
            for f in (plain, fast):
                start = time.perf_counter()
                f()
                turn.append(time.perf_counter() - start)
            seconds.append(turn)
        slow, quick = (statistics.median(t) for t in zip(*seconds))
        lines.append(f"| {name} | {why} | {'–' if predicted is None else f'{predicted:.1f} ×'} | {statistics.median(a / b for a, b in seconds):.1f} × | {slow * 1e3:.1f} | {quick * 1e3:.1f} |")
        print(lines[-1], flush=True)
    lines.append(kept_memory())
    print(lines[-1])
    (HERE / "optimisations.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    ntp_step(sys.argv[1]) if sys.argv[1:] else main()
