# Next-token prediction, the baseline of config/cocomix_69m.py: as many active parameters, the same tokens in the same order.
method = "ntp"
out_dir = "out/ntp_69m"
dataset = "openwebtext"
n_layer = 8
n_head = 8
n_embd = 624             # CoCoMix has 512
block_size = 1024
batch_size = 512         # sequences: 0.5M tokens a step
max_tokens = 20_000_000_000
learning_rate = 6e-4     # falls to a tenth of it, after a warm-up over 1/300 of the steps
