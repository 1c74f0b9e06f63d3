# Learning rates at the demo's size: python results/run.py results/stdlib-sweep
# The same three rates for NTP and for CoCoMix, three seeds, each seed with its own concept model
# and SAE.
out = "out/sweep"
prepare = ["data/stdlib/prepare.py"]
before = {
    "gpt-SEED": "train.py config/stdlib_gpt.py --seed=SEED",
    "sae-SEED": "sae.py config/stdlib_sae.py --concept_model=out/sweep/gpt-SEED --seed=SEED",
}
ntp = "train.py config/stdlib_ntp.py"
cocomix = ("train.py config/stdlib_cocomix.py --concept_model=out/sweep/gpt-SEED "
    "--sae=out/sweep/sae-SEED")
paper = f"{cocomix} --mix=interleave --select=attribution --concept_weight=0.1 --concept_lr_scale=1"
runs = {f"{name}, {rate}": f"{command} --learning_rate={rate}" for name, command in (("NTP",
    ntp), ("CoCoMix", cocomix), ("paper's form", paper)) for rate in ("4e-3", "2e-3", "8e-3")}
once = ("paper's form, 4e-3", "paper's form, 2e-3", "paper's form, 8e-3")
panels = ({"NTP": ["NTP, 2e-3", "NTP, 4e-3", "NTP, 8e-3"], "CoCoMix": ["CoCoMix, 2e-3", "CoCoMix, "
    "4e-3", "CoCoMix, 8e-3"]})
seeds = (1, 2, 3)
at_once = 2  # runs side by side, one thread each
