# CoCoMix at GPT-2's size, 150M active parameters. Not in the paper.
method = "cocomix"
out_dir = "out/cocomix_124m"
dataset = "openwebtext"
concept_model = "gpt2"   # frozen, 124M parameters; labels come from it
sae = "openai"           # its published SAE, 32768 concepts
concept_layer = 5        # the SAE reads the output of GPT-2's 6th block
attr_k = 4               # label concepts per position
concept_weight = 0.1
insert_layer = 5         # predict and interleave concepts at the input of the 6th block
concept_k = 32           # predicted concepts kept by TopK
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 512         # sequences: 0.5M tokens per step
max_tokens = 20_000_000_000
learning_rate = 6e-4     # peak; warm-up over 1/300 of the steps, cosine decay to a tenth
