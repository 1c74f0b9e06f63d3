# Books on two CPU cores: python results/run.py results/books-cpu (make books). A BPE of 4096
# trained on them; one concept model
# and its SAE; then all methods on the same tokens in the same order, as many active parameters,
# three seeds for the methods.
import os
import shlex

# a folder with books-train.jsonl.xz and books-val.jsonl.xz
books = shlex.quote(os.environ.get("BOOKS", "../shared/corpus"))
out = "out/books-cpu"
prepare = ([f"data/text/prepare.py --input {books}/books-train.jsonl.xz --val "
    f"{books}/books-val.jsonl.xz --tokenizer=bpe:4096 --out=data/books4096"])
shape = ("--dataset=data/books4096 --n_layer=4 --n_head=2 --block_size=256 --embedding_std=0.08 "
    "--batch_size=8")
learner = (f"{shape} --max_iters=600 --learning_rate=4e-3 --warmup_iters=30 --eval_interval=50 "
    f"--eval_iters=10")
before = {
    # wider than its students, five times their tokens
    "gpt": f"train.py {shape} --n_embd=192 --n_head=3 --max_iters=3000 --learning_rate=3e-3 "
        f"--warmup_iters=100 --eval_interval=500 --eval_iters=10",
    "sae": "sae.py config/stdlib_sae.py --dataset=data/books4096 "
        "--concept_model=out/books-cpu/gpt --max_tokens=1000000",
    # a weaker concept model: no wider than its students, no longer trained
    "gpt_weak": f"train.py {shape} --n_embd=128 --max_iters=600 --learning_rate=4e-3 "
        f"--warmup_iters=30 --eval_interval=200 --eval_iters=10",
    "sae_weak": "sae.py config/stdlib_sae.py --dataset=data/books4096 "
        "--concept_model=out/books-cpu/gpt_weak --max_tokens=1000000",
}
every = "--concept_layer=1 --concept_k=16"
guided = (f"train.py {learner} --insert_layer=2 --concept_model=out/books-cpu/gpt "
    f"--sae=out/books-cpu/sae")
ntp, cocomix = f"{guided} --n_embd=144", f"{guided} --n_embd=128 --method=cocomix"
# chosen on Python source, with one seed
tuned = (f"{cocomix} --mix=interleave_residual --select=activation --concept_weight=1 "
    f"--concept_lr_scale=3")
weak = tuned.replace("out/books-cpu/gpt", "out/books-cpu/gpt_weak").replace("out/books-cpu/sae",
    "out/books-cpu/sae_weak")
runs = {
    "NTP": ntp,
    "CoCoMix": cocomix,
    "CoCoMix, tuned": tuned,
    "KD": f"{ntp} --method=kd",
    "KD, weight 1": f"{ntp} --method=kd --kd_weight=1",
    "CoCoMix, residual": f"{cocomix} --mix=interleave_residual",
    "Pause": f"{ntp} --method=pause",
    # what the tuned form owes to what
    "CoCoMix, weight 1": f"{cocomix} --concept_weight=1",
    "tuned, weight 0.1": f"{tuned} --concept_weight=0.1",
    "tuned, rate × 1": f"{tuned} --concept_lr_scale=1",
    "tuned, attribution": f"{tuned} --select=attribution",
    "tuned, nothing mixed in": f"{tuned} --mix=none",
    "tuned + KD, weight 1": f"{tuned} --method=cocomix_kd --kd_weight=1",
    # these once
    "Pause, residual": f"{ntp} --method=pause --mix=interleave_residual",
    "tuned, weight 3": f"{tuned} --concept_weight=3",
    "tuned, insertion at block 3": f"{tuned} --insert_layer=3",
    "tuned, attribution lower": f"{tuned} --select=attribution --attribution_sign=lower",
    "tuned, attribution abs": f"{tuned} --select=attribution --attribution_sign=abs",
    "tuned, weak concept model": weak,
}
once = tuple(runs)[13:]
short = ("NTP", "CoCoMix", "CoCoMix, tuned", "KD", "KD, weight 1", "tuned + KD, weight 1")
panels = {
    "the methods (Pause lies far above)": ["NTP", "KD", "CoCoMix", "CoCoMix, residual",
        "CoCoMix, tuned"],
    "more weight": ["NTP", "CoCoMix, weight 1", "CoCoMix, tuned", "KD, weight 1", "tuned + KD, "
        "weight 1"],
    "which concepts are labels": ["NTP", "CoCoMix, tuned", "tuned, attribution", "tuned, "
        "attribution lower", "tuned, attribution abs"],
    "what the tuned form owes to what": ["NTP", "CoCoMix, tuned", "tuned, weight 0.1", "tuned, "
        "weight 3", "tuned, rate × 1", "tuned, nothing mixed in", "tuned, weak concept model",
            "Pause, residual"],
}
claims = {
    "CoCoMix under NTP": ("CoCoMix", "NTP"),
    "CoCoMix under KD": ("CoCoMix", "KD"),
    "CoCoMix under pause vectors": ("CoCoMix", "Pause"),
    "h + ĉ: under NTP": ("CoCoMix, residual", "NTP"),
    "h + ĉ: under the extra positions alone": ("CoCoMix, residual", "Pause, residual"),
    "weight 1: under NTP": ("CoCoMix, weight 1", "NTP"),
    "weight 1: under weight 0.1": ("CoCoMix, weight 1", "CoCoMix"),
    "h + ĉ: under ĉ": ("CoCoMix, residual", "CoCoMix"),
    "tuned: under NTP": ("CoCoMix, tuned", "NTP"),
    "tuned: under KD": ("CoCoMix, tuned", "KD"),
    "tuned: under KD of weight 1": ("CoCoMix, tuned", "KD, weight 1"),
    "tuned: weight 1 under weight 0.1": ("CoCoMix, tuned", "tuned, weight 0.1"),
    "tuned: rate × 3 under rate × 1": ("CoCoMix, tuned", "tuned, rate × 1"),
    "tuned: attribution under activation": ("tuned, attribution", "CoCoMix, tuned"),
    "tuned: raising attribution under lowering": ("tuned, attribution", "tuned, attribution lower"),
    "tuned: a strong concept model under a weak one": ("CoCoMix, tuned", "tuned, weak concept "
        "model"),
    "tuned: a weak concept model under NTP": ("tuned, weak concept model", "NTP"),
    "tuned: mixing under none": ("CoCoMix, tuned", "tuned, nothing mixed in"),
    "tuned: with KD of weight 1 under KD of weight 1": ("tuned + KD, weight 1", "KD, weight 1"),
}
seeds = (1337, 1, 2)
after = {
    "eval.txt": "eval.py " + " ".join(f"{out}/{row}-1337" for row in ("ntp", "kd_weight_1",
        "cocomix", "cocomix_tuned")) + " --tokens=500_000",
    "samples.txt": f"sample.py {out}/cocomix_tuned-1337 --start='She looked at the old man and' "
        f"--num_samples=3 --max_new_tokens=80",
    "inspect.txt": f"sample.py {out}/cocomix_tuned-1337 --start='She looked at the old man and' "
        f"--max_new_tokens=40 --inspect",
    "steered.txt": f"sample.py {out}/cocomix_tuned-1337 --start='She looked at the old man and' "
        f"--max_new_tokens=60 --steer",
}
at_once = 2  # runs side by side, one thread each
