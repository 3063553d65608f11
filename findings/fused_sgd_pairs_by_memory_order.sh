#!/usr/bin/env bash
# torch 2.13.0: `SGD(fused=True)` on a CPU takes the gradient of another element where strides differ.
#
# Guess: a fused step looks at strides as the loop over parameters does, or refuses gradients laid out otherwise; Adam,
# AdamW and Adagrad, fused on a CPU likewise, are right.
# Seen: SGD goes through both memories in their own order. `backward()` lays gradients out as their parameters, so that
# it does no harm there. Gradients from `torch.autograd.grad` or `torch.func.grad` that are put into `p.grad` (closures of
# one's own, meta-learning, gradient surgery) may be transposed: then weights are stepped by the gradients of others,
# without a word. A module in channels_last with contiguous gradients goes the same way.
#
# Run: findings/fused_sgd_pairs_by_memory_order.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

slope = torch.arange(12.0).reshape(4, 3)


def step(kind, fused, by_backward):
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    loss = (weight.T * slope).sum()  # the gradient is slope.T
    if by_backward:
        loss.backward()
    else:
        (weight.grad,) = torch.autograd.grad(loss, weight)
    strides = weight.grad.stride()
    assert torch.equal(weight.grad, slope.T)
    kind([weight], lr=1.0, fused=fused).step()
    return weight.detach(), strides


for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
    for by_backward in (True, False):
        plain, strides = step(kind, False, by_backward)
        fused, _ = step(kind, True, by_backward)
        same = torch.allclose(plain, fused)
        print(f"{kind.__name__}, gradient with strides {strides}: fused equals the loop: {same}")
        assert same is not (kind is torch.optim.SGD and not by_backward)
weight, _ = step(torch.optim.SGD, True, False)
print("stepped by", (-weight).int().tolist(), "where the gradient is", slope.T.int().tolist())
assert torch.equal(-weight, slope.reshape(3, 4))
PYTHON
