# The SAE of the demo's concept model: 2048 concepts, 16 active.
concept_model = "out/stdlib/gpt"
concept_layer = 1        # the second of 4 blocks
dataset = "stdlib"
out_dir = "out/stdlib/sae"
n_concepts = 2048
k = 16
k_aux = 64               # a power of two near half the width
max_tokens = 500_000
batch_size = 1024
learning_rate = 2e-3
