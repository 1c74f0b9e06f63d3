# Pause vectors with KD, a baseline for cocomix_69m.py: equal active parameters, same batches.
method = "pause_kd"
out_dir = "out/pause_kd_69m"
dataset = "openwebtext"
concept_model = "gpt2"   # the teacher: frozen, 124M parameters
kd_weight = 0.1
insert_layer = 3         # interleave pause vectors at the input of the 4th block
n_layer = 8
n_head = 8
n_embd = 624             # CoCoMix: 512
block_size = 1024
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
learning_rate = 6e-4     # peak; warm-up over 1/300 of the steps, cosine decay to a tenth
