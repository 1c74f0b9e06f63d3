# Next-token prediction, the baseline of config/cocomix_386m.py: as many active parameters, the same tokens in the same order.
method = "ntp"
out_dir = "out/ntp_386m"
dataset = "openwebtext"
n_layer = 24
n_head = 16
n_embd = 1072            # CoCoMix has 1024
block_size = 1024
batch_size = 512         # sequences: 0.5M tokens a step
max_tokens = 20_000_000_000
learning_rate = 3e-4     # falls to a tenth of it, after a warm-up over 1/300 of the steps
