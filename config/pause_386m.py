# Pause vectors, a baseline for cocomix_386m.py: equal active parameters, same batches.
method = "pause"
out_dir = "out/pause_386m"
dataset = "openwebtext"
insert_layer = 5         # interleave pause vectors at the input of the 6th block
n_layer, n_head, n_embd = 24, 16, 1072  # n_embd of CoCoMix: 1024
batch_size, block_size = 512, 1024  # 0.5M tokens per step
max_tokens = 20_000_000_000
learning_rate = 3e-4     # peak; warm-up over 1/300 of the steps, cosine decay to a tenth
