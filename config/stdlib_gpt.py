# The demo's concept model: a plain GPT, wider and trained longer than the models it teaches.
method = "ntp"
out_dir = "out/stdlib/gpt"
dataset = "stdlib"
n_layer = 4
n_head = 2
n_embd = 160
block_size = 256
embedding_std = 0.08     # about 1/sqrt(n_embd)
init_std = 0.044         # 0.02 * sqrt(768 / n_embd); at 0.02 attention collapsed on some machines
batch_size = 4
max_iters = 800
learning_rate = 4e-3
beta2 = 0.99             # for small batches
warmup_iters = 80
eval_interval = 200
eval_iters = 16
