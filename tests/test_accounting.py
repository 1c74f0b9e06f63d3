"""Counts of parameters, FLOPs and bytes against what really runs."""
import pytest
import torch
from conftest import CountProducts, tiny_gpt
from test_reference import VARIANTS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train
from concepts import ConceptModel
from model import GPT, ModelConfig
from sae import SAE
from support.accounting import (
    activation_bytes,
    flops_per_token,
    label_flops_per_token,
    micro_batch,
    num_params,
    step_bytes,
)

def test_active_parameters_count_only_the_kept_rows_of_compress():
    plain, concept = num_params(tiny_gpt()), tiny_gpt(insert="concept")
    d, C, k = 24, 40, 5
    head = C * d + C
    assert num_params(concept) - plain == head + C * d + d + d
    assert num_params(concept, active=True) - plain == head + k * d + d + d

@pytest.mark.parametrize("insert, mix", VARIANTS)
def test_flops_are_those_of_the_matrix_products_that_run(insert, mix):
    model = tiny_gpt(torch.float32, insert=insert, mix=mix, vocab_size=64).requires_grad_(False)
    T, labels = 16, None
    x = torch.randint(64, (1, T))
    if insert == "concept":
        labels = torch.randint(40, (1, T, 4))
    elif insert == "hidden":
        labels = torch.randn(1, T, 20)
    with CountProducts() as counter:
        model(x, x, labels)
    c, d = model.config, 24
    positions = [2 if c.interleaved and i >= 1 else 1 for i in range(3)]
    queries = [*positions[:2], 1]
    pairs = sum(q * p for q, p in zip(queries, positions, strict=True))
    attention = 4 * d * pairs * T // 2  # half of the square: causal
    kept = 2 * d * c.concept_k if insert == "concept" and mix != "none" else 0  # no matrix product
    assert flops_per_token(model, backward=False) == counter.flops / T + attention + kept
    assert flops_per_token(model) == 3 * flops_per_token(model, backward=False)

def test_label_flops():
    gpt, sae = tiny_gpt(torch.float32), SAE(24, 40, 6)
    forward, encoder = flops_per_token(gpt, backward=False), 2 * 24 * 40
    lower = 2 * (24 * 24 ** 2 + 2 * 24 * 16)

    def flops(**choices):
        return label_flops_per_token(ConceptModel(gpt, sae, 1, **choices))
    attention = 2 * 24 * 16  # of the one upper block; its backward has twice as many products
    attributed = encoder + lower + 2 * (forward - lower) + attention
    assert flops() == flops(teaches=True) == attributed
    assert flops(select="activation") == encoder + lower
    assert flops(select="activation", teaches=True) == encoder + forward
    assert flops(target="hidden") == lower and flops(target="hidden", teaches=True) == forward
    assert flops(target="none", teaches=True) == forward and label_flops_per_token(None) == 0

class PyTorchsCount(TorchDispatchMode):
    """What FlopCounterMode counts; that class does not work with autograd.grad."""
    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

@pytest.mark.parametrize("concept_loss", [True, False])
def test_flops_of_a_backward(concept_loss):
    model, T = tiny_gpt(torch.float32, insert="concept", mix="add", vocab_size=64), 16
    model.requires_grad_(True).wpe.requires_grad_(False)
    x, labels = torch.randint(64, (1, T)), torch.randint(40, (1, T, 4)) if concept_loss else None
    with sdpa_kernel(SDPBackend.MATH), PyTorchsCount() as counter:
        out = model(x, x, labels)
        (out.loss + (out.concept_loss if concept_loss else 0)).backward()
    halved = 3 * 6 * 2 * 24 * T // 2  # of three blocks' six products of attention: causal
    kept = 3 * 2 * 24 * 5 + (-2 * 40 if concept_loss else 4 * 24 * 5)  # bias; no matrix products
    counted = flops_per_token(model, concept_loss=concept_loss)
    assert counted == counter.flops / T - halved + kept

@pytest.mark.parametrize("attribution", ["code", "paper"])
def test_label_flops_are_those_of_the_flop_counter(attribution):
    gpt, T = tiny_gpt(torch.float32, vocab_size=64, n_layer=4).requires_grad_(False), 16
    concept_model = ConceptModel(gpt, SAE(24, 40, 6), 1, attribution=attribution)
    x = torch.randint(64, (1, T))
    with sdpa_kernel(SDPBackend.MATH), PyTorchsCount() as counter:
        concept_model.labels(x, x)
    square = 4 * 24 * T  # of a block's attention; causal is half of it
    halved = (2 + 2 + 4) * square // 2  # 2 lower blocks, 2 upper ones, their backward
    again = 2 * 24 * 40 if attribution == "paper" else 0  # c_pre, which is not kept
    assert label_flops_per_token(concept_model) == counter.flops / T - halved - again

def bytes_kept_for_the_backward(model, rows, bf16):
    """Bytes of the tensors that autograd keeps, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t
    x, labels = torch.randint(64, (rows, 128)), torch.randint(64, (rows, 128, 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        model(x, x, labels if model.config.insert == "concept" else None)
    return sum(kept.values())

@pytest.mark.parametrize("insert, mix", [("none", "interleave"), ("concept", "interleave"),
                                         ("concept", "add")])
@pytest.mark.parametrize("bf16", [True, False])
def test_activations_fit_their_estimate(insert, mix, bf16):
    model = GPT(ModelConfig(block_size=128, vocab_size=64, n_layer=10, n_head=4, n_embd=128,
                            insert=insert, mix=mix, insert_layer=1, n_concepts=64, concept_k=8))

    def growth(f):  # copies of weights are in both terms
        return f(6) - f(2)

    def kept():
        return growth(lambda rows: bytes_kept_for_the_backward(model, rows, bf16))

    def estimate():
        return growth(lambda rows: activation_bytes(model, rows * 128, bf16=bf16))
    plain_kept, plain_estimate = kept(), estimate()
    assert 0.75 * plain_estimate < plain_kept < plain_estimate
    model.checkpoint_blocks = True
    assert kept() < plain_kept / 3 and kept() < estimate() < 0.6 * plain_estimate

@pytest.mark.parametrize("insert", ["none", "concept"])
def test_the_largest_model_fits_80_gb(insert):
    mixer = dict(insert="concept", insert_layer=5, n_concepts=32768) if insert == "concept" else {}
    width = 2048 if insert == "concept" else 2096
    with torch.device("meta"):
        gpt2, sae = GPT(ModelConfig()).requires_grad_(False), SAE(768, 32768, 32)
        model = GPT(ModelConfig(n_layer=24, n_head=16, n_embd=width, **mixer))
    teacher = ConceptModel(gpt2, sae, 5, teaches=True)
    weights = 4 * sum(p.numel() for m in (model, gpt2, sae) for p in m.parameters())

    def gigabytes(rows):
        return (weights + step_bytes(model, teacher, rows * 1024)) / 1e9
    assert 1.3e9 < num_params(model, active=True) < 1.6e9
    assert gigabytes(4) < 72 < gigabytes(32)  # 90% of 80
    model.checkpoint_blocks = True
    assert gigabytes(16) < 72

def test_micro_batches_are_alike_and_follow_memory(monkeypatch):
    model, cpu = tiny_gpt(torch.float32, insert="concept"), torch.device("cpu")

    def size(rows, device, **keys):
        return micro_batch(train.Config(block_size=1024, **keys), rows, model, None, device)
    assert [size(12, cpu, micro_batch_size=n) for n in (1, 3, 5, 7, 99)] == [1, 3, 4, 6, 12]
    assert [size(rows, cpu) for rows in (12, 20, 7, 11)] == [6, 5, 7, 1]

    def need(rows):
        return step_bytes(model, None, rows * 1024)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for free, expected in ((need(12) / 0.9 + 1, 12), (need(12) / 0.9 - 1, 6),
                           (need(5) / 0.9 + 1, 4), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert size(12, gpu) == expected
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(need(12) / 0.9) + 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    assert size(12, gpu) == 12  # PyTorch holds the memory, but does not use it
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert size(128, gpu) == 64 and size(128, gpu, micro_batch_size=128) == 128
    assert size(12, gpu, micro_batch_size=3) == 3
    teacher = ConceptModel(tiny_gpt(torch.float32, n_layer=40, n_embd=240), SAE(240, 40, 6), 1)
    assert step_bytes(model, teacher, 1024) > need(1)  # a large concept model, a small student
