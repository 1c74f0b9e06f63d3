"""The fast paths of support/kernels.py against the plain formulas, in float64, with gradients."""
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import kernels, reference
from support.kernels import (
    Teacher,
    TopK,
    gathered_dot,
    linear_cross_entropy,
    linear_topk,
    normalize,
    sparse_decode,
    sparse_outer,
    topk,
)

ROOT = Path(__file__).resolve().parents[1]

def normal(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)

def check_gradients(ours, expected, inputs):
    ours, expected = torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)

@pytest.fixture(params=[None, 7], ids=["one chunk", "chunks of 7 rows"])
def chunks(request, monkeypatch):
    """Rows in one chunk, or in several with a shorter one at the end."""
    if request.param:
        monkeypatch.setattr(kernels, "chunk_rows", lambda device, width: request.param)

# -- linear heads ----------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
def test_linear_topk_equals_the_plain_formula(chunks, bias):
    x, w, b = normal(3, 10, 8), normal(50, 8), normal(50) if bias else None
    labels, mixture = torch.randint(50, (3, 10, 4)), normal(3, 10, 6, grad=False)
    labels[0, 0] = 7  # the same label four times
    inputs = [t for t in (x, w, b) if t is not None]
    z = F.linear(x, w, b)
    values, indices = z.topk(6)
    expected = (z.logsumexp(-1) - z.gather(-1, labels).mean(-1)).mean()
    top, loss = linear_topk(x, w, b, 6, labels)
    torch.testing.assert_close(top.values, values)
    assert torch.equal(top.indices, indices)
    torch.testing.assert_close(loss, expected)
    check_gradients(2 * loss + (top.values * mixture).sum(),
                    2 * expected + (values * mixture).sum(), inputs)

@pytest.mark.parametrize("bias", [True, False])
def test_without_labels_the_gradient_comes_through_the_kept_values_only(chunks, bias):
    x, w, b = normal(3, 10, 8), normal(50, 8), normal(50) if bias else None
    mixture = normal(3, 10, 6, grad=False)
    top, loss = linear_topk(x, w, b, 6)
    assert loss is None
    expected = (F.linear(x, w, b).topk(6).values * mixture).sum()
    check_gradients((top.values * mixture).sum(), expected, [t for t in (x, w, b) if t is not None])

def test_a_second_backward_through_a_loss_is_an_error_and_never_a_wrong_gradient():
    x, w = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    _, loss = linear_topk(x, w, None, 6, torch.randint(50, (10, 4)))
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * loss).backward()

def test_linear_cross_entropy_equals_pytorchs(chunks):
    x, w, y = normal(2, 9, 8), normal(64, 8), torch.randint(50, (2, 9))
    expected = F.cross_entropy((x @ w[:50].T).flatten(0, 1), y.flatten())
    loss, kl = linear_cross_entropy(x, w, y, 50)  # the last 14 rows are padding
    assert kl is None
    torch.testing.assert_close(loss, expected)
    check_gradients(loss, expected, (x, w))

def test_the_loss_of_huge_logits_is_finite():
    x, w = normal(2, 9, 8, grad=False), normal(64, 8)
    assert linear_cross_entropy(x * 1e4, w, torch.randint(50, (2, 9)))[0].isfinite()

def test_distillation_equals_the_plain_formula(chunks):
    x, w, y = normal(2, 9, 8), normal(64, 8), torch.randint(50, (2, 9))
    teacher = Teacher(normal(2, 9, 5, grad=False), normal(70, 5, grad=False))
    z, p = x @ w[:50].T, (teacher.x @ teacher.weight[:50].T).softmax(-1)
    expected_kl = F.kl_div(z.log_softmax(-1), p, reduction="none").sum(-1).mean()
    expected = F.cross_entropy(z.flatten(0, 1), y.flatten()) + 0.3 * expected_kl
    loss, kl = linear_cross_entropy(x, w, y, 50, teacher, 0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(kl, expected_kl)
    assert not kl.requires_grad
    check_gradients(loss, expected, (x, w))

def test_a_model_that_is_its_own_teacher_has_no_kl(chunks):
    x, w, y = normal(2, 9, 8), normal(64, 8), torch.randint(50, (2, 9))
    loss, kl = linear_cross_entropy(x, w, y, 50, Teacher(x.detach(), w.detach()), 0.3)
    assert kl.abs() < 1e-12
    torch.testing.assert_close(loss, linear_cross_entropy(x, w, y, 50)[0])

# -- TopK and sparse products ----------------------------------------------------------------------

@pytest.mark.parametrize("C, k", [(131072, 32), (32768, 32), (32768, 1), (8192, 16), (8192, 5),
                                  (2048, 64), (10000, 32), (61, 61), (9, 4), (16384, 2000)])
def test_topk_in_stages_equals_topk(C, k):
    ascending = torch.arange(C).float().expand(2, C).contiguous()
    for z in (normal(2, 3, C, grad=False), -torch.arange(C).float().expand(1, C), ascending):
        ours, plain = topk(z, k), z.topk(k)
        assert torch.equal(ours.values, plain.values) and torch.equal(ours.indices, plain.indices)
    ties = torch.randint(5, (4, C)).float()
    ours = topk(ties, k)
    assert torch.equal(ours.values, ties.topk(k).values)
    assert torch.equal(ties.gather(-1, ours.indices), ours.values)
    assert all(len(set(row.tolist())) == k for row in ours.indices)

def test_sparse_products_equal_dense_ones():
    N, C, d, k = 20, 30, 6, 4
    z, w, x = normal(N, C, grad=False), normal(C, d), normal(N, d, grad=False)
    values, indices = z.topk(k)
    S = torch.zeros_like(z).scatter(-1, indices, values)
    torch.testing.assert_close(sparse_decode(TopK(values, indices), w), S @ w)
    torch.testing.assert_close(gathered_dot(indices, w, x), (x @ w.T).gather(-1, indices))
    torch.testing.assert_close(sparse_outer(TopK(values, indices), x, C), S.T @ x)

    def decode(values, w):
        return sparse_decode(TopK(values, indices), w)
    assert torch.autograd.gradcheck(decode, (values.requires_grad_(), w))

def test_sparse_outer_where_only_the_last_concept_is_kept():
    top = TopK(torch.ones(5, 1), torch.full((5, 1), 9))
    out = sparse_outer(top, torch.ones(5, 2), 10)
    assert torch.equal(out[:9], torch.zeros(9, 2)) and torch.equal(out[9], torch.full((2,), 5.0))

@pytest.mark.parametrize("longest", [1, 3, 7, 100])
def test_cut_bags_have_the_same_sums(longest, monkeypatch):
    top = TopK(normal(20, 4, grad=False), torch.randint(3, (20, 4)) * 7)  # few concepts, long bags
    x = normal(20, 6, grad=False)
    plain = sparse_outer(top, x, 30)
    monkeypatch.setattr(kernels, "longest_bag", lambda device: longest)
    torch.testing.assert_close(sparse_outer(top, x, 30), plain)
    assert torch.equal(sparse_outer(top, x, 30), sparse_outer(top, x, 30))

@pytest.mark.parametrize("width, masked", [(5, True), (5, False), (8, True)])
def test_padded_heads_give_the_same_attention(width, masked, monkeypatch):
    q, k, v = (normal(2, 3, 6, width) for _ in range(3))
    dtype = torch.float64 if masked else torch.float32  # the two cases that are padded
    inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    mask = torch.ones(6, 6).tril().bool() if masked else None
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=not masked)
    monkeypatch.setattr(kernels, "pads_heads", lambda device: True)
    ours = kernels.attention(*inputs, mask, causal=not masked)
    torch.testing.assert_close(ours, expected)
    mixture = torch.randn_like(ours)
    check_gradients((ours * mixture).sum(), (expected * mixture).sum(), inputs)

def test_normalize_equals_the_reference():
    h = normal(2, 5, 24)
    ours, expected = normalize(h), reference.normalize(h)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    mixture = normal(2, 5, 24, grad=False)
    check_gradients((ours[0] * mixture).sum() + ours[2].sum(),
                    (expected[0] * mixture).sum() + expected[2].sum(), [h])

# -- memory ----------------------------------------------------------------------------------------

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep freed memory")
def test_freed_memory_is_kept_on_a_cpu():
    program = """
import resource, torch
from support.device import pick_device
pick_device("cpu")
def faults():
    torch.ones(1 << 24).sum()  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = [faults() for _ in range(40)]
print(seen[-1] - seen[-11])
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                             text=True, check=True)
    assert int(process.stdout) < 2 * 16384  # pages; without it, ten times 16384

def test_in_bfloat16_all_chunks_add_to_the_weights_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "chunk_rows", lambda device, width: 7)
    x, w = torch.randn(40, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    y = torch.randint(50, (40,))
    expected = torch.autograd.grad(F.cross_entropy((x @ w[:50].T), y), (x, w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(x, w, y, 50)
    for ours, plain in zip(torch.autograd.grad(loss, (x, w)), expected, strict=True):
        assert (ours - plain).norm() < 0.03 * plain.norm()

def test_positions_without_targets_are_an_error():
    x, weight = torch.randn(2, 6, 4), torch.randn(9, 4)
    with pytest.raises(AssertionError, match="positions for targets"):
        linear_cross_entropy(x, weight, torch.zeros(2, 12, dtype=torch.long))
