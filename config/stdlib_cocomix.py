# The demo's CoCoMix: the same batches and active parameters as config/stdlib_ntp.py. Four settings
# differ from the paper, whose form is behind NTP here (results/stdlib-ablations): h + ĉ is inserted
# instead of ĉ, labels are the most active concepts instead of those with the largest attribution,
# λ = 1, and the mixer has three times the learning rate. The paper's form:
#     python train.py config/stdlib_cocomix.py --mix=interleave --select=attribution \
#         --concept_weight=0.1 --concept_lr_scale=1
method = "cocomix"
mix = "interleave_residual"
select = "activation"
concept_weight = 1.0
concept_lr_scale = 3.0
out_dir = "out/stdlib/cocomix"
dataset = "stdlib"
concept_model = "out/stdlib/gpt"
sae = "out/stdlib/sae"
concept_layer = 1        # the second of 4 blocks
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
learning_rate = 4e-3     # as good as 8e-3, better than 2e-3 (results/stdlib-sweep)
beta2 = 0.99             # for small batches
warmup_iters = 50
eval_interval = 100
eval_iters = 10
