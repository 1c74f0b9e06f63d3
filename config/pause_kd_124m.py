# Pause vectors with KD, a baseline for cocomix_124m.py: equal active parameters, same batches.
method = "pause_kd"
out_dir = "out/pause_kd_124m"
dataset = "openwebtext"
concept_model = "gpt2"   # the teacher: frozen, 124M parameters
kd_weight = 0.1
insert_layer = 5         # interleave pause vectors at the input of the 6th block
n_layer = 12
n_head = 12
n_embd = 864             # CoCoMix: 768
block_size = 1024
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
learning_rate = 6e-4     # peak; warm-up over 1/300 of the steps, cosine decay to a tenth
