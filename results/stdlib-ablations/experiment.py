# Every baseline and every ablation of the paper at the demo's size (make ablations):
#     python results/run.py results/stdlib-ablations
# Three seeds, each with its own concept model and SAE. With the same seed all rows see the same
# batches in the same order.
out = "out/ablations"
prepare = ["data/stdlib/prepare.py"]
before = {  # the concept model is trained longer than its students
    "gpt-SEED": "train.py config/stdlib_gpt.py --max_iters=2000 --seed=SEED",
    "sae-SEED": "sae.py config/stdlib_sae.py --concept_model=out/ablations/gpt-SEED --seed=SEED",
}
every = "--concept_model=out/ablations/gpt-SEED --max_iters=400 --eval_interval=50 --eval_iters=20"
# wider: as many active parameters as cocomix
ntp = "train.py config/stdlib_ntp.py --concept_layer=1 --insert_layer=2"
# the paper's form
cocomix = ("train.py config/stdlib_cocomix.py --sae=out/ablations/sae-SEED --mix=interleave "
    "--select=attribution --concept_weight=0.1 --concept_lr_scale=1")
# the demo's
tuned = (f"{cocomix} --mix=interleave_residual --select=activation --concept_weight=1 "
    f"--concept_lr_scale=3")
runs = {
    "NTP": ntp,
    "KD": f"{ntp} --method=kd",
    "Pause": f"{ntp} --method=pause",
    "Pause, residual": f"{ntp} --method=pause --mix=interleave_residual",
    "Pause + KD": f"{ntp} --method=pause_kd",
    "Pause + KD, residual": f"{ntp} --method=pause_kd --mix=interleave_residual",
    "CoCoMix": cocomix,
    "CoCoMix, residual": f"{cocomix} --mix=interleave_residual",
    "adding": f"{cocomix} --mix=add",
    "concept prediction only": f"{cocomix} --mix=none",
    "concept mix only": f"{cocomix} --concept_weight=0",
    "concept mix only, residual": f"{cocomix} --concept_weight=0 --mix=interleave_residual",
    "labels by activation": f"{cocomix} --select=activation",
    "labels by activation, residual": f"{cocomix} --select=activation --mix=interleave_residual",
    "attribution as in eq. 1": f"{cocomix} --attribution=paper",
    "attribution, lower": f"{cocomix} --attribution_sign=lower",
    "attribution, abs": f"{cocomix} --attribution_sign=abs",
    "CoCoMix, weight 1": f"{cocomix} --concept_weight=1",
    "tuned": tuned,
    "tuned, attribution": f"{tuned} --select=attribution",
    "tuned, nothing mixed in": f"{tuned} --mix=none",
    "KD, weight 1": f"{ntp} --method=kd --kd_weight=1",
    "hidden state, l1": f"{cocomix} --target=l1",
    "hidden state, l2": f"{cocomix} --target=l2",
    "hidden state, cos": f"{cocomix} --target=cos",
}
panels = {
    "the methods": ["NTP", "KD", "Pause, residual", "CoCoMix", "CoCoMix, residual"],
    "which concepts are labels (Figure 6a)": ["NTP", "CoCoMix", "labels by activation",
        "attribution as in eq. 1", "attribution, lower", "attribution, abs"],
    "h + ĉ inserted": ["NTP", "Pause, residual", "concept mix only, residual", "CoCoMix, "
        "residual", "labels by activation, residual"],
    "more weight": ["NTP", "CoCoMix, weight 1", "tuned", "tuned, attribution", "tuned, nothing "
        "mixed in", "KD, weight 1"],
    "what is predicted (Figure 6b)": ["NTP", "CoCoMix", "hidden state, l1", "hidden state, l2",
        "hidden state, cos"],
    "prediction and mixing (Figure 6d, e)": ["NTP", "concept prediction only", "concept mix "
        "only", "CoCoMix", "adding"],
    "pause vectors (Figure 6f)": ["Pause", "Pause + KD", "Pause, residual", "Pause + KD, "
        "residual", "CoCoMix"],
}
claims = {  # the paper's, then those about the tuned form
    "CoCoMix under NTP (Table 1)": ("CoCoMix", "NTP"),
    "CoCoMix under KD (Table 1)": ("CoCoMix", "KD"),
    "attribution under activation (Figure 6a)": ("CoCoMix", "labels by activation"),
    "concepts under the hidden state, l1 (Figure 6b)": ("CoCoMix", "hidden state, l1"),
    "concepts under the hidden state, l2 (Figure 6b)": ("CoCoMix", "hidden state, l2"),
    "concepts under the hidden state, cos (Figure 6b)": ("CoCoMix", "hidden state, cos"),
    "prediction alone under NTP (Figure 6d)": ("concept prediction only", "NTP"),
    "both under prediction alone (Figure 6d)": ("CoCoMix", "concept prediction only"),
    "both under mixing alone (Figure 6d)": ("CoCoMix", "concept mix only"),
    "interleaving under adding (Figure 6e)": ("CoCoMix", "adding"),
    "CoCoMix under pause vectors (Figure 6f)": ("CoCoMix", "Pause"),
    "CoCoMix under pause vectors and KD (Figure 6f)": ("CoCoMix", "Pause + KD"),
    "h + ĉ: under NTP": ("CoCoMix, residual", "NTP"),
    "h + ĉ: under the extra positions alone": ("CoCoMix, residual", "Pause, residual"),
    "h + ĉ: under mixing alone": ("CoCoMix, residual", "concept mix only, residual"),
    "h + ĉ: attribution under activation": ("CoCoMix, residual", "labels by activation, residual"),
    "weight 1: under NTP": ("CoCoMix, weight 1", "NTP"),
    "tuned: under NTP": ("tuned", "NTP"),
    "tuned: under KD": ("tuned", "KD"),
    "tuned: under KD of weight 1": ("tuned", "KD, weight 1"),
    "tuned: attribution under activation": ("tuned, attribution", "tuned"),
    "tuned: mixing under none": ("tuned", "tuned, nothing mixed in"),
}
seeds = (1, 2, 3)
at_once = 2  # runs side by side, one thread each
