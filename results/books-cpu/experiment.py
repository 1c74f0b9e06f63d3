# Books on two CPU cores: python results/run.py results/books-cpu (make books). A BPE of 4096 trained on them; one concept model
# and its SAE; then all methods on the same tokens in the same order, as many active parameters, three seeds each.
import os

books = os.environ.get("BOOKS", "../shared/corpus")  # a folder with books-train.jsonl.xz and books-val.jsonl.xz
out = "out/books-cpu"
prepare = [f"data/text/prepare.py --input {books}/books-train.jsonl.xz --val {books}/books-val.jsonl.xz --tokenizer=bpe:4096 --out=data/books4096"]
shape = "--dataset=data/books4096 --n_layer=4 --n_head=2 --block_size=256 --embedding_std=0.08 --batch_size=8"
learner = f"{shape} --max_iters=800 --learning_rate=4e-3 --warmup_iters=40 --eval_interval=50 --eval_iters=25"
before = {
    "gpt": f"train.py {shape} --n_embd=192 --n_head=3 --max_iters=1600 --learning_rate=3e-3 --warmup_iters=80 --eval_interval=200 --eval_iters=25",
    "sae": "sae.py config/stdlib_sae.py --dataset=data/books4096 --concept_model=out/books-cpu/gpt --max_tokens=1000000",
    # a weaker concept model: no wider and no longer trained than its students
    "gpt_weak": f"train.py {shape} --n_embd=128 --max_iters=600 --learning_rate=4e-3 --warmup_iters=40 --eval_interval=200 --eval_iters=25",
    "sae_weak": "sae.py config/stdlib_sae.py --dataset=data/books4096 --concept_model=out/books-cpu/gpt_weak --max_tokens=1000000",
}
every = "--concept_layer=1 --insert_layer=2 --concept_k=16"
guided = f"{learner} --concept_model=out/books-cpu/gpt --sae=out/books-cpu/sae"
weak = f"{learner} --concept_model=out/books-cpu/gpt_weak --sae=out/books-cpu/sae_weak"
ntp, cocomix = f"train.py {guided} --n_embd=144", f"train.py {guided} --n_embd=128 --method=cocomix"
runs = {
    "NTP": ntp,
    "KD": f"{ntp} --method=kd",
    "Pause": f"{ntp} --method=pause",
    "CoCoMix": cocomix,
    "CoCoMix, residual": f"{cocomix} --mix=interleave_residual",
    # which labels
    "residual, activation": f"{cocomix} --mix=interleave_residual --select=activation",
    "residual, lower": f"{cocomix} --mix=interleave_residual --attribution_sign=lower",
    "residual, abs": f"{cocomix} --mix=interleave_residual --attribution_sign=abs",
    # a weaker concept model than the student
    "residual, weak concept model": f"train.py {weak} --n_embd=128 --method=cocomix --mix=interleave_residual",
}
seeds = (1337, 1, 2)
