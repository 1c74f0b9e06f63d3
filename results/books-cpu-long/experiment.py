# Attribution or activation, and CoCoMix against NTP, after twice the tokens: three rows of results/books-cpu with 1 200 steps in
# place of 600, after make books, whose concept model and SAE they use: python results/run.py results/books-cpu-long
out = "out/books-cpu-long"
every = """--dataset=data/books4096 --n_layer=4 --n_head=2 --block_size=256 --embedding_std=0.08 --batch_size=8 --max_iters=1200
           --learning_rate=4e-3 --warmup_iters=60 --eval_interval=100 --eval_iters=10 --insert_layer=2 --concept_layer=1 --concept_k=16
           --concept_model=out/books-cpu/gpt --sae=out/books-cpu/sae"""
tuned = "train.py --n_embd=128 --method=cocomix --mix=interleave_residual --concept_weight=1 --concept_lr_scale=3"
runs = {
    "NTP": "train.py --n_embd=144",
    "tuned, attribution": f"{tuned} --select=attribution",
    "CoCoMix, tuned": f"{tuned} --select=activation",
}
orders = {
    "tuned: under NTP": ("CoCoMix, tuned", "NTP"),
    "tuned: attribution under activation": ("tuned, attribution", "CoCoMix, tuned"),
}
at_once = 2  # runs side by side, one thread each
