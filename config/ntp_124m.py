# Next-token prediction, a baseline for cocomix_124m.py: equal active parameters, same batches.
method = "ntp"
out_dir = "out/ntp_124m"
n_layer = 12
n_head = 12
n_embd = 864             # CoCoMix: 768
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
