# The demo's CoCoMix: the same tokens in the same order as config/stdlib_ntp.py, as many active parameters.
#
# Four choices are not the paper's but the best we measured at this size (results/stdlib-ablations): h + ĉ is inserted in
# place of ĉ, labels are the strongest concepts in place of those with the largest attribution, λ is 1, and what predicts and
# compresses concepts learns three times as fast as the rest. The paper's form is
#     python train.py config/stdlib_cocomix.py --mix=interleave --select=attribution --concept_weight=0.1 --concept_lr_scale=1
method = "cocomix"
mix = "interleave_residual"
select = "activation"
concept_weight = 1.0
concept_lr_scale = 3.0
out_dir = "out/stdlib/cocomix"
dataset = "stdlib"
concept_model = "out/stdlib/gpt"
sae = "out/stdlib/sae"
concept_layer = 1        # of 4 blocks (0 to 3)
n_layer = 4
n_head = 2
n_embd = 128
insert_layer = 2
concept_k = 16
block_size = 256
embedding_std = 0.08     # about 1/sqrt(n_embd)
init_std = 0.049         # 0.02 * sqrt(768 / n_embd)
batch_size = 4
max_iters = 500
learning_rate = 4e-3     # the best of three, as for NTP (results/stdlib-sweep)
beta2 = 0.99             # batches are small
warmup_iters = 50
eval_interval = 100
eval_iters = 10
