"""Where a step's time goes, by kind of kernel: NTP next to CoCoMix.

    python results/speed-cpu/kernels.py            # after make demo; writes kernels.md

Labels come from disk, so the concept model takes no part. The rate of the matrix products is that
of their own FLOPs, without attention's. `mul_` counts as the optimizer's: it is mostly clipping.
"""
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch.profiler import ProfilerActivity, profile

import bench
from support.accounting import flops_per_token
from support.cli import parse
from support.device import keep_freed_memory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KINDS = {
    "products": ("mm", "addmm", "addmm_", "bmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",
                  "_scaled_dot_product_flash_attention_for_cpu_backward"),
    "TopK, sorting, sparse sums": ("topk", "sort", "searchsorted", "amax", "gather",
                                   "_embedding_bag", "_embedding_bag_forward_only",
                                   "_embedding_bag_per_sample_weights_backward"),
    "optimizer, clipping": ("_fused_adamw_", "linalg_vector_norm", "mul_"),
    "GELU, LayerNorm": ("gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward")}
SMALL = ("--batch_size=2", "--block_size=256")
ROWS = (("stdlib_ntp", 30, ()), ("stdlib_cocomix", 30, ("--labels=disk",)), ("ntp_69m", 4, SMALL),
        ("cocomix_69m", 4, ("--labels=disk", *SMALL)))  # config, steps, keys

def measure(name, steps, keys):
    """A line of the table."""
    cfg, _ = parse(bench.Config, [str(ROOT / f"config/{name}.py"), *keys], most=0)
    row = bench.Row(name, cfg, torch.device("cpu"))
    for _ in range(steps):  # until the process has taken all the memory that it keeps
        row.step()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        for _ in range(steps):
            row.step()
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total / steps / 1e3
             for event in measured.key_averages()}
    ms = {kind: sum(spent.pop(kernel, 0) for kernel in kernels) for kind, kernels in KINDS.items()}
    rest, tokens = sum(spent.values()), cfg.batch_size * cfg.block_size
    whole, gflop = sum(ms.values()) + rest, row.flops * tokens / 1e9
    products = flops_per_token(row.model, block_size=1) * tokens / 1e9
    cells = [name, *(f"{value:.1f}" for value in (gflop, whole, *ms.values(), rest)),
             f"{products / ms['products'] * 1e3:.0f}", f"{gflop / whole * 1e3:.0f}"]
    return "| " + " | ".join(cells) + " |"

def main():
    keep_freed_memory()
    titles = ["row", "GFLOP a step", "all", *KINDS, "the rest", "GFLOP/s of the products", "of all"]
    lines = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
             "ms of a step, under the profiler", "", "| " + " | ".join(titles) + " |",
             "| --- |" + " ---: |" * (len(titles) - 1)]
    print("\n".join(lines))
    for row in ROWS:
        lines.append(measure(*row))
        print(lines[-1], flush=True)
    (HERE / "kernels.md").write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
