# A plain GPT with GPT-2's shape, for training your own concept model. Next, its SAE and CoCoMix:
#     python sae.py --concept_model=out/gpt2_124m --dataset=openwebtext --out_dir=out/sae_gpt2_124m
#     python train.py config/cocomix_124m.py --concept_model=out/gpt2_124m --sae=out/sae_gpt2_124m \
#         --out_dir=out/cocomix_own_124m
method = "ntp"
out_dir = "out/gpt2_124m"
n_layer = 12
n_head = 12
n_embd = 768
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
