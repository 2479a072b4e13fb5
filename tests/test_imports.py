"""What the first use of fastpost imports beside torch: nothing that takes torch a second and that nobody asked for."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("sympy", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo", "transformers", "triton")
FIRST_USES = {
    "SAM": "fastpost.SAM",
    "a step of SAM": """
class Descent(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])

w = torch.ones(3, requires_grad=True)
sam = fastpost.SAM([w], Descent, lr=0.1, rho=0.05)
w.square().sum().backward()
sam.first_step(zero_grad=True)
w.square().sum().backward()
sam.second_step(zero_grad=True)
""",
    "R3F": """
fastpost.R3F
a = torch.randn(3, 5, requires_grad=True)
fastpost.r3f_loss(a, a + 0.1, torch.tensor([0, 1, 2])).loss.backward()
""",
    "symmetric_kl": """
a = torch.randn(3, 5, requires_grad=True)
fastpost.symmetric_kl(a, a.detach() + 0.1).backward()
""",
    "noise": "fastpost.add_noise(torch.ones(3), 0.1, seed=1)",
    "signs": "fastpost.negate_grads_([torch.ones(3, requires_grad=True)])",
}
# torch.optim's own methods import the compiler when they are first called (SGD's step as well): not ours to save.
PRELUDE = """
import sys, types, torch
for name, method in list(vars(torch.optim.Optimizer).items()):
    if isinstance(method, types.FunctionType) and hasattr(method, "__wrapped__"):
        setattr(torch.optim.Optimizer, name, method.__wrapped__)
before = set(sys.modules)
import fastpost
"""


def test_first_uses_import_nothing_heavy() -> None:
    after_each = 'print("{}", *sorted(set(sys.modules) - before), sep=",")'
    program = "\n".join([PRELUDE, *(f"{code}\n{after_each.format(use)}" for use, code in FIRST_USES.items())])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    uses = [line.split(",") for line in done.stdout.splitlines()]
    assert [use for use, *_ in uses] == list(FIRST_USES)
    for use, *new in uses:
        assert "fastpost" in new, use
        assert not {module for module in new if module.startswith(HEAVY)}, use


def test_sharded_tensors_are_known_as_soon_as_there_can_be_any() -> None:
    program = """
import torch
from fastpost.distributed import is_sharded
assert not is_sharded(torch.ones(2))
import torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert is_sharded(DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,))))
assert not is_sharded(torch.ones(2))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
