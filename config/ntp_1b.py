# Next-token prediction, a baseline for cocomix_1b.py: equal active parameters, same batches.
method = "ntp"
out_dir = "out/ntp_1b"
n_layer = 24
n_head = 16
n_embd = 2096            # CoCoMix: 2048
batch_size = 1024        # sequences: 1M tokens per step
max_tokens = 20_000_000_000
learning_rate = 2e-4     # peak; warm-up over 1/300 of the steps, cosine decay to a tenth
eval_interval = 500
