# Weak to strong: the comparison of results/books-cpu at eight times the tokens, where students
# outgrow their concept model. Data, tokenizer, shapes and concept model are those of
# results/books-cpu, but each seed has a concept model and an SAE of its own:
#     python results/run.py results/books-cpu-long          (make books SIZE=cpu-long)
# About half an hour (NTP) to an hour (CoCoMix as published) a run, on one core.
import os
import shlex

# a folder with books-train.jsonl.xz and books-val.jsonl.xz
books = shlex.quote(os.environ.get("BOOKS", "../shared/corpus"))
out = "out/books-cpu-long"
prepare = [f"data/text/prepare.py --input {books}/books-train.jsonl.xz --val "
           f"{books}/books-val.jsonl.xz --tokenizer=bpe:4096 --out=data/books4096"]
shape = ("--dataset=data/books4096 --n_layer=4 --n_head=2 --block_size=256 --embedding_std=0.08 "
         "--batch_size=8 --eval_iters=20")
before = {
    "gpt-SEED": f"train.py {shape} --n_embd=192 --n_head=3 --max_iters=3000 --learning_rate=3e-3 "
                "--warmup_iters=100 --eval_interval=500 --seed=SEED",
    "sae-SEED": "sae.py config/stdlib_sae.py --dataset=data/books4096 "
                f"--concept_model={out}/gpt-SEED --max_tokens=1000000 --seed=SEED",
}
# 9.8M tokens; init_std and beta2 as in the demo: NTP ends lower with them (settings_*.jsonl)
every = (f"{shape} --max_iters=4800 --warmup_iters=100 --eval_interval=150 --beta2=0.99 "
         f"--concept_model={out}/gpt-SEED --sae={out}/sae-SEED --concept_layer=1 --insert_layer=2 "
         "--concept_k=16")
rate = "--learning_rate=4e-3"
ntp = "train.py --n_embd=144 --init_std=0.046"
cocomix = "train.py --n_embd=128 --init_std=0.049 --method=cocomix"  # as many active parameters
tuned = (f"{cocomix} --mix=interleave_residual --select=activation --concept_weight=1 "
         "--concept_lr_scale=3")

def schedule(command):
    return command.replace("train.py", "results/books-cpu-long/schedule.py") + " --until=2400"

runs = {
    "NTP": f"{ntp} {rate}",
    "CoCoMix, tuned": f"{tuned} {rate}",
    "KD, weight 1": f"{ntp} {rate} --method=kd --kd_weight=1",
    "tuned, nothing mixed in": f"{tuned} {rate} --mix=none",
    "tuned + KD, weight 1": f"{tuned} {rate} --method=cocomix_kd --kd_weight=1",
    "KD": f"{ntp} {rate} --method=kd",
    "CoCoMix": f"{cocomix} {rate}",
    # the concept model is asked during the first half only
    "KD, weight 1, half": f"{schedule(ntp)} {rate} --method=kd --kd_weight=1",
    "tuned, half": f"{schedule(tuned)} {rate}",
    # learning rates
    "NTP, rate 2e-3": f"{ntp} --learning_rate=2e-3",
    "NTP, rate 8e-3": f"{ntp} --learning_rate=8e-3",
    "tuned, rate 2e-3": f"{tuned} --learning_rate=2e-3",
    "tuned, rate 8e-3": f"{tuned} --learning_rate=8e-3",
}
once = tuple(runs)[9:]
short = tuple(runs)[:9]
panels = {
    "the methods": ["NTP", "KD", "KD, weight 1", "CoCoMix", "CoCoMix, tuned",
                    "tuned + KD, weight 1"],
    "what mixing in earns": ["NTP", "tuned, nothing mixed in", "CoCoMix, tuned"],
    "the first half only": ["NTP", "KD, weight 1", "KD, weight 1, half", "CoCoMix, tuned",
                            "tuned, half"],
    "learning rates": ["NTP", "NTP, rate 2e-3", "NTP, rate 8e-3", "CoCoMix, tuned",
                       "tuned, rate 2e-3", "tuned, rate 8e-3"],
}
claims = {
    "CoCoMix under NTP": ("CoCoMix", "NTP"),
    "CoCoMix under KD": ("CoCoMix", "KD"),
    "CoCoMix under KD of weight 1": ("CoCoMix", "KD, weight 1"),
    "KD under NTP": ("KD", "NTP"),
    "KD of weight 1 under NTP": ("KD, weight 1", "NTP"),
    "tuned: under NTP": ("CoCoMix, tuned", "NTP"),
    "tuned: under KD of weight 1": ("CoCoMix, tuned", "KD, weight 1"),
    "tuned: prediction alone under NTP": ("tuned, nothing mixed in", "NTP"),
    "tuned: mixing under none": ("CoCoMix, tuned", "tuned, nothing mixed in"),
    "tuned, half: under tuned": ("tuned, half", "CoCoMix, tuned"),
    "tuned, half: under NTP": ("tuned, half", "NTP"),
    "KD of weight 1, half: under KD of weight 1": ("KD, weight 1, half", "KD, weight 1"),
    "KD of weight 1, half: under NTP": ("KD, weight 1, half", "NTP"),
    "tuned, half: under KD of weight 1, half": ("tuned, half", "KD, weight 1, half"),
    "tuned: with KD of weight 1 under KD of weight 1": ("tuned + KD, weight 1", "KD, weight 1"),
    "tuned: with KD of weight 1 under without": ("tuned + KD, weight 1", "CoCoMix, tuned"),
}
seeds = (1337, 1)
after = {
    "gaps.txt": "results/books-cpu-long/gaps.py",
    "downstream.txt": "results/books-cpu-long/downstream.py " + " ".join(
        f"{out}/{row}-{seed}" for seed in seeds for row in (
            "gpt", "ntp", "cocomix_tuned", "kd_weight_1", "tuned_nothing_mixed_in",
            "tuned_kd_weight_1", "kd", "cocomix", "kd_weight_1_half", "tuned_half")),
}
at_once = 2  # runs side by side, one thread each
