"""Where a step's time goes, by kind of kernel, NTP's beside CoCoMix's.

    python results/speed-cpu/kernels.py            # after make demo; writes kernels.md

Labels come from disk: the concept model takes no part. The rate of the products is that of their own FLOPs, attention's not among
them. `mul_` counts as the optimizer's, whose clipping it mostly is.
"""
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import torch
from torch.profiler import ProfilerActivity, profile

import bench
import config
from model import keep_freed_memory

KINDS = {"products": ("mm", "addmm", "addmm_", "bmm"), "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
         "TopK, sorting, sparse sums": ("topk", "sort", "searchsorted", "amax", "gather", "_embedding_bag", "_embedding_bag_forward_only", "_embedding_bag_per_sample_weights_backward"),
         "optimizer, clipping": ("_fused_adamw_", "linalg_vector_norm", "mul_"), "GELU, LayerNorm": ("gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward")}


def main():
    keep_freed_memory()
    lines = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; ms of a step, under the profiler", "",
             "| row | GFLOP a step | all | " + " | ".join(KINDS) + " | the rest | GFLOP/s of the products | of all |", "| --- |" + " ---: |" * (len(KINDS) + 5)]
    print("\n".join(lines))
    for name, steps, keys in (("stdlib_ntp", 30, ()), ("stdlib_cocomix", 30, ("--labels=disk",)), ("ntp_69m", 4, ("--batch_size=2", "--block_size=256")),
                              ("cocomix_69m", 4, ("--labels=disk", "--batch_size=2", "--block_size=256"))):
        cfg, _ = config.parse(bench.Config, [str(ROOT / f"config/{name}.py"), *keys], most=0)
        row = bench.Row(name, cfg, torch.device("cpu"))
        for _ in range(steps):  # until the process has taken all the memory that it keeps
            row.step()
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            for _ in range(steps):
                row.step()
        spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total / steps / 1e3 for event in measured.key_averages()}
        ms = {kind: sum(spent.pop(kernel, 0) for kernel in kernels) for kind, kernels in KINDS.items()}
        whole, tokens = sum(ms.values()) + sum(spent.values()), cfg.batch_size * cfg.block_size
        gflop, products = row.flops * tokens / 1e9, row.model.flops_per_token(block_size=1) * tokens / 1e9
        lines.append(f"| {name} | {gflop:.1f} | {whole:.1f} | " + " | ".join(f"{t:.1f}" for t in ms.values()) + f" | {sum(spent.values()):.1f} | {products / ms['products'] * 1e3:.0f} | {gflop / whole * 1e3:.0f} |")
        print(lines[-1], flush=True)
        del row
    (HERE / "kernels.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
