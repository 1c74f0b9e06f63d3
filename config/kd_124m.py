# Distillation from the concept model (KD), the baseline of config/cocomix_124m.py: as many active parameters, the same tokens in the same order.
method = "kd"
out_dir = "out/kd_124m"
dataset = "openwebtext"
concept_model = "gpt2"   # 124M, frozen: the teacher
kd_weight = 0.1
n_layer = 12
n_head = 12
n_embd = 864             # CoCoMix has 768
block_size = 1024
batch_size = 512         # sequences: 0.5M tokens a step
max_tokens = 20_000_000_000
learning_rate = 6e-4     # falls to a tenth of it, after a warm-up over 1/300 of the steps
