# The demo's concept model: a plain GPT, larger and trained longer than its students.
method = "ntp"
out_dir = "out/stdlib/gpt"
dataset = "stdlib"
n_layer = 4
n_head = 5
n_embd = 160
block_size = 256
batch_size = 8
max_iters = 1000
learning_rate = 3e-3
warmup_iters = 50
eval_interval = 250
eval_iters = 8
