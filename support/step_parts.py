"""Clocks, and where the time of a training step goes: its pieces, each timed alone (bench.py)."""
import statistics
import time

import torch

from support.activations import hidden_states
from support.kernels import linear_cross_entropy, linear_topk, normalize, sparse_decode
from support.reference import mix

def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

def clocked(f, device, times=1):
    """Mean seconds of f() over some calls."""
    start = clock(device)
    for _ in range(times):
        f()
    return (clock(device) - start) / times

def timed(f, device, times=3):
    """Median seconds of f(), after one call that is not counted."""
    f()
    return statistics.median(clocked(f, device) for _ in range(times))

def timed_backward(row, f, *inputs):
    """Median seconds of f(*inputs) and its backward, to the inputs and the model's weights."""
    def both():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        with row.autocast:
            out = f(*leaves)
        out.backward(torch.ones_like(out))
    return timed(both, row.device)

def concept_model_parts(row, x, y):
    """{piece: seconds} of what a step asks of the concept model."""
    cm, device, found = row.concept_model, row.device, {}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        def lower():
            return hidden_states(cm.gpt, x, cm.layer, cm.bf16)
        h, found["concept forward"] = lower(), timed(lower, device)
        if cm.target == "concept":
            h_in = normalize(h)[0].to(cm.sae.encoder.dtype)
            active = cm.sae.encode(h_in)
            found["TopK of the SAE"] = timed(lambda: cm.sae.encode(h_in), device)
            if cm.select == "attribution":
                grad, _ = cm.loss_gradient(h, y)
                found["concept backward"] = timed(lambda: cm.loss_gradient(h, y), device)
                found["attribution"] = timed(lambda: cm._choose(h_in, active, grad), device)
        if cm.teaches and "concept backward" not in found:
            found["concept forward"] += timed(lambda: cm._upper(h), device)
    return found

def mixer_parts(row, h, labels):
    """{piece: seconds} of the mixer's prediction and compression, forward and backward."""
    mixer, c = row.model.mixer, row.model.config
    if c.insert == "hidden":
        return {"hidden head and loss": timed_backward(row, lambda h: mixer(h, labels)[2], h)}
    if c.insert != "concept":
        return {}

    def predict(h):
        return linear_topk(h, mixer.predict.weight, mixer.predict.bias, c.concept_k, labels)

    def predict_and_sum(h):
        top, loss = predict(h)
        return top.values.sum() * 1e-3 + loss

    with row.autocast:
        top, _ = predict(h)
    found = {"concept head and loss": timed_backward(row, predict_and_sum, h)}
    if c.mix != "none":
        found["compress"] = timed_backward(
            row, lambda v, w: sparse_decode(top._replace(values=v), w), top.values, mixer.compress)
    return found

def parts(row):
    """{piece of a row's step: seconds}, scaled to the whole batch. Each runs alone on one micro
    batch, forward and, where the step has one, backward."""
    model, c = row.model, row.model.config
    x, y, targets = row.x[:row.micro], row.y[:row.micro], row.targets(slice(0, row.micro))
    found = {} if row.concept_model is None else concept_model_parts(row, x, y)
    h_final = h = model.embed(x).detach()
    lower = "blocks" if c.insert == "none" else "lower blocks"
    found[lower] = timed_backward(row, lambda h: model.forward_blocks(h, 0, c.insert_at), h)
    if c.insert != "none":
        h = model.forward_blocks(h, 0, c.insert_at).detach()
        found |= mixer_parts(row, h, targets.labels)

        def upper_blocks(h):  # h takes the place of ĉ
            return model.forward_blocks(mix(h, h, c.mix), c.insert_at, c.n_layer)
        h_final = upper_blocks(h).detach()
        found["upper blocks"] = timed_backward(row, upper_blocks, h)

    def head(h):
        return linear_cross_entropy(model.ln_f(h), model.wte.weight, y, c.vocab_size,
                                    targets.teacher, row.cfg.kd_weight)[0]
    found["head and loss"] = timed_backward(row, head, h_final)
    found = {name: seconds * len(row.x) / len(x) for name, seconds in found.items()}
    row.losses(slice(0, row.micro)).backward()
    found["optimizer"] = timed(row.update, row.device)
    row.optimizer.zero_grad(set_to_none=True)
    return found

def show_parts(row, step):
    """Print the parts of a row's step, which takes `step` seconds; → {part: seconds}."""
    found = parts(row)
    print(f"\n{row.name}: a step takes {step * 1e3:.1f} ms")
    lines = sorted(found.items(), key=lambda item: -item[1])
    for name, seconds in [*lines, ("all of these", sum(found.values()))]:
        print(f"  {name:24} {seconds * 1e3:9.2f} ms {seconds / step:7.1%}")
    return found
