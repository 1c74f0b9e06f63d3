# Knowledge distillation, a baseline for cocomix_69m.py: equal active parameters, same batches.
method = "kd"
out_dir = "out/kd_69m"
n_layer = 8
n_head = 8
n_embd = 624             # CoCoMix: 512
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
