# The demo's baseline: a plain GPT with as many active parameters as config/stdlib_cocomix.py.
method = "ntp"
out_dir = "out/stdlib/ntp"
dataset = "stdlib"
n_layer = 4
n_head = 2
n_embd = 144
block_size = 256
embedding_std = 0.08     # about 1/sqrt(n_embd)
init_std = 0.046         # 0.02 * sqrt(768 / n_embd)
batch_size = 4
max_iters = 500
learning_rate = 4e-3     # as good as 8e-3, better than 2e-3 (results/stdlib-sweep)
beta2 = 0.99             # for small batches
warmup_iters = 50
eval_interval = 100
eval_iters = 10
