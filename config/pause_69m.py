# Pause vectors, a baseline for cocomix_69m.py: equal active parameters, same batches.
method = "pause"
out_dir = "out/pause_69m"
insert_layer = 3         # interleave pause vectors at the input of the 4th block
n_layer = 8
n_head = 8
n_embd = 624             # CoCoMix: 512
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
