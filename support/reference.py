"""All of CoCoMix, dense and plain: the place to start reading. Nothing here is fast.

Plain functions on the parameters of a GPT (model.py) and an SAE (sae.py). The steps, from "LLM
Pretraining with Continuous Concepts" (arXiv 2502.08524) and its official code:

    norm(h) = (h - μ) / (σ + 1e-5), over features. TopK keeps the k largest entries, zeroes others.
    h_con: the frozen model's state after block `layer`; h: the trained model's before insert_layer.

    1  c = ReLU(TopK(W_enc (norm(h_con) - b_pre) + b_lat))          the frozen model's concepts
    2  a_i = c_i · ⟨W_dec,i , g⟩,  g = ∂(next-token loss) / ∂h_con  attribution (eq. 1)
    3  labels = the attr_k concepts with the largest a_i
    4  z = M (norm(h) - b) + b_M                                    prediction (eq. 2)
       L_concept = mean over the labels of CE(z, label)
    5  ĉ = (W TopK(z) + b_W + b) · σ + μ,  μ and σ of h             compression (eq. 3)
    6  (h_1, ĉ_1, …, h_T, ĉ_T) → upper blocks → logits at the ĉ positions
    7  total = next-token loss + λ L_concept                        (eq. 4)

The paper's equations omit norm, b, σ and μ; the official code has them. The fast code (concepts.py,
model.py, support/kernels.py) computes the same from the active concepts only. One exception: where
fewer than attr_k of them have a_i > 0, step 3 here picks inactive ones, as the official code does.
tests/test_reference.py holds both equal elsewhere, in float64, and to the official numbers.

Shapes: B sequences, T tokens, C concepts, V vocabulary; d features, which differ between models.
"""
import torch
import torch.nn.functional as F

def normalize(h):
    """h (…, d) → ((h - μ) / (σ + 1e-5), μ, σ); σ is the unbiased standard deviation."""
    mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    return (h - mean) / (std + 1e-5), mean, std

def next_token_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

# The transformer: GPT-2

def embed(gpt, idx):
    return gpt.wte(idx) + gpt.wpe.weight[:idx.shape[1]]

def attention(attn, x):
    B, T, d = x.shape
    q, k, v = (t.view(B, T, attn.n_head, -1).transpose(1, 2) for t in attn.c_attn(x).split(d, -1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attn.c_proj(y.transpose(1, 2).flatten(2))

def run_blocks(gpt, x, start, stop):
    for block in gpt.h[start:stop]:
        x = x + attention(block.attn, block.ln_1(x))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    return x

def head(gpt, x):
    return gpt.ln_f(x) @ gpt.wte.weight[:gpt.config.vocab_size].T  # tied; later rows are padding

# Steps 1 to 3: the frozen concept model and its SAE choose the labels

def sae_preactivations(sae, x):
    """Normalised hidden states (…, d) → c_pre (…, C)."""
    return F.linear(x - sae.pre_bias, sae.encoder, sae.latent_bias)

def sae_encode(sae, x):
    """Step 1: normalised hidden states (…, d) → c (…, C), at most k of them not zero."""
    c_pre = sae_preactivations(sae, x)
    values, indices = c_pre.topk(sae.k)
    return torch.zeros_like(c_pre).scatter(-1, indices, values.relu())

def attribution(sae, c, grad):
    """Step 2: a (…, C). This is the official code's form; eq. 1 has c_pre in place of c."""
    return c * (grad @ sae.decoder.T)  # row i of sae.decoder is W_dec,i

def concept_attribution(gpt, sae, layer, idx, targets):
    """Steps 1 and 2: tokens and targets (B, T) → a (B, T, C). h_con is the output of block `layer`.
    A full backward, as in the official code: weights of gpt that require gradients accumulate them;
    where those of sae do, a keeps its graph."""
    h = run_blocks(gpt, embed(gpt, idx), 0, layer + 1)
    h.requires_grad_().retain_grad()
    logits = head(gpt, run_blocks(gpt, h, layer + 1, len(gpt.h)))
    next_token_loss(logits, targets).backward()
    return attribution(sae, sae_encode(sae, normalize(h.detach())[0]), h.grad)

def choose_labels(a, attr_k=4):
    """Step 3: the concepts whose growth would raise the loss most, (B, T, attr_k)."""
    return a.topk(attr_k).indices

# Steps 4 to 6: the trained model predicts concepts, compresses them and mixes them in

def concept_logits(mixer, h):
    """Step 4: z (B, T, C), predicted from the normalised h minus one learned vector b."""
    return mixer.predict(normalize(h)[0] - mixer.pre_bias)

def concept_loss(z, labels):
    """Step 4: the mean of attr_k cross-entropies; z (B, T, C), labels (B, T, attr_k)."""
    each = [F.cross_entropy(z.flatten(0, 1), label.flatten()) for label in labels.unbind(-1)]
    return sum(each) / len(each)

def continuous_concept(mixer, z, h):
    """Step 5: ĉ (B, T, d) = (W TopK(z) + b_W + b) · σ + μ. TopK keeps values as they are (no ReLU);
    μ and σ of h come back as in the SAE's decoder."""
    values, indices = z.topk(mixer.k)
    kept = torch.zeros_like(z).scatter(-1, indices, values)
    _, mean, std = normalize(h)
    return (kept @ mixer.compress + mixer.compress_bias + mixer.pre_bias) * std + mean

def forward(model, idx, labels):
    """Steps 4 to 6: tokens (B, T), labels (B, T, attr_k) → (logits (B, T, V), L_concept)."""
    h = run_blocks(model, embed(model, idx), 0, model.config.insert_layer)
    z = concept_logits(model.mixer, h)
    loss = concept_loss(z, labels)
    c = continuous_concept(model.mixer, z, h)
    x = torch.stack((h, c), dim=2).flatten(1, 2)  # (B, 2T, d)
    x = run_blocks(model, x, model.config.insert_layer, len(model.h))
    return head(model, x[:, 1::2]), loss  # read at the ĉ positions

def step_losses(model, gpt, sae, layer, idx, targets, attr_k=4, concept_weight=0.1):
    """Steps 1 to 7: tokens and targets (B, T) → (total, next-token loss, L_concept, a)."""
    a = concept_attribution(gpt, sae, layer, idx, targets)
    logits, concept = forward(model, idx, choose_labels(a, attr_k))
    next_token = next_token_loss(logits, targets)
    return next_token + concept_weight * concept, next_token, concept, a
