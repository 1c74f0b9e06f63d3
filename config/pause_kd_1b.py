# Pause vectors and distillation, the baseline of config/cocomix_1b.py: as many active parameters, the same tokens in the same order.
method = "pause_kd"
out_dir = "out/pause_kd_1b"
dataset = "openwebtext"
concept_model = "gpt2"   # 124M, frozen: the teacher
kd_weight = 0.1
insert_layer = 5         # pause vectors are interleaved at the input of the 6th block
n_layer = 24
n_head = 16
n_embd = 2096            # CoCoMix has 2048
block_size = 1024
batch_size = 1024        # sequences: 1M tokens a step
max_tokens = 20_000_000_000
learning_rate = 2e-4     # falls to a tenth of it, after a warm-up over 1/300 of the steps
eval_interval = 500
