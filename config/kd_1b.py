# Knowledge distillation, a baseline for cocomix_1b.py: equal active parameters, same batches.
method = "kd"
out_dir = "out/kd_1b"
dataset = "openwebtext"
concept_model = "gpt2"   # the teacher: frozen, 124M parameters
n_layer, n_head, n_embd = 24, 16, 2096  # n_embd of CoCoMix: 2048
batch_size, block_size = 1024, 1024  # 1M tokens per step
max_tokens = 20_000_000_000
learning_rate = 2e-4     # peak; warm-up over 1/300 of the steps, cosine decay to a tenth
eval_interval = 500
