# Books on one H200: python results/run.py results/books-h200 (make books SIZE=gpu). GPT-2's BPE,
# 45M tokens; a concept model of
# GPT-2's shape trained on them, its SAE, then the methods at the 69M shapes on the same tokens in
# the same order.
import os
import shlex

# a folder with books-train.jsonl.xz and books-val.jsonl.xz
books = shlex.quote(os.environ.get("BOOKS", "../shared/corpus"))
out = "out/books-h200"
prepare = ([f"data/text/prepare.py --input {books}/books-train.jsonl.xz --val "
    f"{books}/books-val.jsonl.xz --tokenizer=gpt2 --out=data/books"])
common = ("--dataset=data/books --block_size=1024 --batch_size=64 --warmup_iters=40 "
    "--eval_interval=50 --eval_iters=4")
before = {
    "gpt": f"train.py {common} --n_layer=12 --n_head=12 --n_embd=768 --max_tokens=90e6 "
        f"--learning_rate=1e-3",
    "sae": "sae.py --dataset=data/books --concept_model=out/books-h200/gpt --concept_layer=5 "
        "--n_concepts=32768 --k=32 --max_tokens=40e6 --batch_size=16384 --learning_rate=4e-4",
}
every = (f"{common} --concept_model=out/books-h200/gpt --sae=out/books-h200/sae --concept_layer=5 "
    f"--insert_layer=3 --max_tokens=45e6 --learning_rate=1e-3")
ntp, cocomix = "train.py config/ntp_69m.py", "train.py config/cocomix_69m.py"
tuned = (f"{cocomix} --mix=interleave_residual --select=activation --concept_weight=1 "
    f"--concept_lr_scale=3")
runs = {
    "NTP": ntp,
    "CoCoMix": cocomix,
    "CoCoMix, residual": f"{cocomix} --mix=interleave_residual",
    "KD": f"{ntp} --method=kd",
    "Pause": f"{ntp} --method=pause",
    "CoCoMix, tuned": tuned,
    "tuned, attribution": f"{tuned} --select=attribution",
    "tuned, attribution lower": f"{tuned} --select=attribution --attribution_sign=lower",
}
