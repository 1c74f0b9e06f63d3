"""The official code's numbers (official.npz), loaded into our modules in float64."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from concepts import ConceptModel
from model import GPT, ModelConfig
from sae import SAE
from support.published import gpt2_state, read_sae

G = np.load(Path(__file__).with_name("official.npz"))
LAYER, INSERT_LAYER = int(G["concept_model/layer"]), 2

# the mixer's parameters under the official names; compress is stored transposed
MIXER = {"mixer.pre_bias": "pre_bias", "mixer.compress": "compress_layer.weight",
         "mixer.predict.weight": "concept_predictor.weight",
         "mixer.predict.bias": "concept_predictor.bias",
         "mixer.compress_bias": "compress_layer.bias"}

def golden(name):
    t = torch.from_numpy(G[name])
    return t.double() if t.is_floating_point() else t

def tensors(prefix):
    """The arrays under a prefix as tensors, by the rest of their names."""
    names = [n for n in G.files if n.startswith(prefix) and G[n].dtype.kind in "fi"]
    return {n.removeprefix(prefix): golden(n) for n in names}

def our_names(state):
    """Official weights or gradients → our names and layout."""
    state = gpt2_state(state)
    for ours, official in MIXER.items():
        if official in state:
            t = state.pop(official)
            state[ours] = t.T if ours == "mixer.compress" else t
    return state

def gpt(part, **settings):
    state = our_names(tensors(f"{part}/weights/"))
    d = state["wpe.weight"].shape[1]
    config = ModelConfig(block_size=64, vocab_size=101, n_layer=4, n_head=4, n_embd=d, **settings)
    model = GPT(config).double()
    model.load_state_dict(state)
    return model.eval()

def sae():
    weights = tensors("sae/weights/")
    k = int(weights.pop("activation.k"))
    settings = dict(activation="TopK", activation_state_dict=dict(k=k, postact_fn="ReLU"))
    state, k = read_sae({**weights, **settings}, "official.npz")
    model = SAE(state["encoder"].shape[1], len(state["encoder"]), k).double()
    model.load_state_dict(state)
    return model.requires_grad_(False)

def concept_model():
    return ConceptModel(gpt("concept_model").requires_grad_(False), sae(), LAYER)

def cocomix():
    return gpt("cocomix", insert="concept", insert_layer=INSERT_LAYER, n_concepts=64, concept_k=8)

def official_loss(logits):
    """The official code has no target for the last position."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), golden("x")[:, 1:].flatten())

def close(ours, name, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(ours.detach().double(), golden(name), atol=atol, rtol=rtol)

def check_gradients(model):
    """Every parameter's gradient is the official one."""
    official = our_names(tensors("cocomix/grads/"))
    assert official.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, official[name], atol=1e-5, rtol=1e-5,
                                   msg=lambda text, name=name: f"{name}: {text}")
