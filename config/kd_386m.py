# Knowledge distillation, a baseline for cocomix_386m.py: equal active parameters, same batches.
method = "kd"
out_dir = "out/kd_386m"
n_layer = 24
n_head = 16
n_embd = 1072            # CoCoMix: 1024
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
learning_rate = 3e-4     # peak; warm-up over 1/300 of the steps, cosine decay to a tenth
