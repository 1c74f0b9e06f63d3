# CoCoMix, 386M active parameters.
method = "cocomix"
out_dir = "out/cocomix_386m"
dataset = "openwebtext"
concept_model = "gpt2"   # 124M, frozen: names the concepts
sae = "openai"           # its published SAE of 32768 concepts …
concept_layer = 5        # … after GPT-2's 6th block
attr_k = 4               # label concepts a position
concept_weight = 0.1
insert_layer = 5         # concepts are predicted and interleaved at the input of the 6th block
concept_k = 32           # predicted concepts are kept by TopK
n_layer = 24
n_head = 16
n_embd = 1024
block_size = 1024
batch_size = 512         # sequences: 0.5M tokens a step
max_tokens = 20_000_000_000
learning_rate = 3e-4     # falls to a tenth of it, after a warm-up over 1/300 of the steps
