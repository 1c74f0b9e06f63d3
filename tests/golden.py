"""The golden numbers of the official code (official.npz), loaded into our modules.

The file lacks one kind of tensor: each block's c_attn.bias (the name ends in "attn.bias", like the mask buffer's,
and was dropped with it). Nothing else is missing, so `python tests/golden.py` recovers the query and value biases
by Gauss-Newton from the numbers that are there, 96 to 128 unknowns from 1 152 to 4 848 equations at a time, and
writes them to official_biases.npz. (Key biases shift all scores of a query alike and change nothing: zeros.)
The fit ends at float32's rounding only if every formula on the way is the official one.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from concepts import ConceptModel
from model import GPT, ModelConfig, gpt2_state
from sae import SAE

G = np.load(HERE / "official.npz")
N_HEAD, LAYER = 4, int(G["concept_model/layer"])


def golden(name, dtype=torch.float64):
    t = torch.from_numpy(G[name])
    return t.to(dtype) if t.is_floating_point() else t


def weights(part):
    prefix = f"{part}/weights/"
    return {name.removeprefix(prefix): golden(name) for name in G.files if name.startswith(prefix) and G[name].dtype.kind in "fi"}


def gpt(part, **settings):
    """The GPT of a part in float64, c_attn biases from official_biases.npz where that exists."""
    state = gpt2_state(weights(part))
    d = state["wpe.weight"].shape[1]
    if "concept_predictor.weight" in state:
        state["inserted.predict.weight"], state["inserted.predict.bias"] = state.pop("concept_predictor.weight"), state.pop("concept_predictor.bias")
        state["inserted.compress"], state["inserted.compress_bias"] = state.pop("compress_layer.weight").T, state.pop("compress_layer.bias")
        state["inserted.bias"] = state.pop("pre_bias")
    biases = HERE / "official_biases.npz"
    for i in range(4):
        name = f"h.{i}.attn.c_attn.bias"
        state[name] = torch.from_numpy(np.load(biases)[f"{part}/{name}"]) if biases.is_file() else torch.zeros(3 * d)
    model = GPT(ModelConfig(block_size=64, vocab_size=101, n_layer=4, n_head=N_HEAD, n_embd=d, **settings)).double()
    model.load_state_dict(state)
    return model.eval()


def sae():
    state = weights("sae")
    settings = {"activation": "TopK", "activation_state_dict": {"k": int(state.pop("activation.k")), "postact_fn": "ReLU"}}
    return SAE.from_published({**state, **settings}).double().requires_grad_(False)


def concept_model(**choices):
    return ConceptModel(gpt("concept_model").requires_grad_(False), sae(), LAYER, **choices)


def cocomix():
    return gpt("cocomix", insert="concept", insert_layer=2, n_concepts=64, concept_k=8)


def official_loss(logits):
    """As the official code has it: no target for the last position."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), golden("x")[:, 1:].flatten())


def _fit(model, blocks, output, target):
    """Gauss-Newton on the query and value biases of the named blocks until output() meets target; the error left."""
    d = model.config.n_embd
    slots = [(model.h[i].attn.c_attn.bias, j) for i in blocks for j in [*range(d), *range(2 * d, 3 * d)]]
    with torch.no_grad():
        for bias in {b for b, _ in slots}:
            bias.zero_()
    def at(step, scale):
        with torch.no_grad():
            for (bias, j), s in zip(slots, step):
                bias[j] += scale * s
        return (output().detach() - target).flatten()
    residual = at([0.0] * len(slots), 0)
    for _ in range(30):
        columns = []
        for k in range(len(slots)):
            unit = [0.0] * len(slots)
            unit[k] = 1.0
            columns.append((at(unit, 1e-5) - at(unit, -2e-5)) / 2e-5)
            at(unit, 1e-5)
        step = torch.linalg.lstsq(torch.stack(columns, 1), -residual[:, None]).solution[:, 0].tolist()
        scale = 1.0
        while (new := at(step, scale)).norm() > residual.norm() and scale > 1e-4:
            at(step, -scale)
            scale /= 2
        if new.norm() > residual.norm() * (1 - 1e-9):
            break
        residual = new
        print(blocks, f"largest error {residual.abs().max():.2e}")
    return residual.abs().max().item()


if __name__ == "__main__":
    (HERE / "official_biases.npz").unlink(missing_ok=True)
    x = golden("x")
    teacher, student, found = concept_model(), cocomix(), {}
    m = teacher.gpt
    _fit(m, (0, 1), lambda: m.blocks(m.embed(x), 0, LAYER + 1)[0], golden("concept_model/h"))
    def gradient():
        h = m.blocks(m.embed(x), 0, LAYER + 1)[0].detach().requires_grad_()
        return torch.autograd.grad(official_loss(m.head(m.blocks(h, LAYER + 1, 4)[0])), h)[0] * 1e3
    _fit(m, (2, 3), gradient, golden("concept_model/grad") * 1e3)
    _fit(student, (0, 1), lambda: student.inserted.logits(student.blocks(student.embed(x), 0, 2)[0]), golden("cocomix/z"))
    _fit(student, (2, 3), lambda: student(x).logits, golden("cocomix/logits"))
    for part, model in (("concept_model", m), ("cocomix", student)):
        found |= {f"{part}/h.{i}.attn.c_attn.bias": model.h[i].attn.c_attn.bias.detach().numpy() for i in range(4)}
    np.savez_compressed(HERE / "official_biases.npz", **found)
