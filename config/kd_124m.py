# Knowledge distillation, a baseline for cocomix_124m.py: equal active parameters, same batches.
method = "kd"
out_dir = "out/kd_124m"
n_layer = 12
n_head = 12
n_embd = 864             # CoCoMix: 768
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
