# Pause vectors with KD, a baseline for cocomix_124m.py: equal active parameters, same batches.
method = "pause_kd"
out_dir = "out/pause_kd_124m"
insert_layer = 5         # interleave pause vectors at the input of the 6th block
n_layer = 12
n_head = 12
n_embd = 864             # CoCoMix: 768
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
