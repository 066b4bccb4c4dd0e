"""torch.compile with a network on the layers."""

import pytest
import torch

from library.models import float8
from library.options import OptionError
from library.train import compilation
from library.train.compilation import compile_unet
from networks.lora import LoRAModule


class Block(torch.nn.Module):
    """A convolution, its tokens through a linear layer, and back: what a U-Net's transformer does around attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.ModuleList([torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Linear(8, 8)])

    def forward(self, x_BCHW):
        hidden_BCHW = self.inner[0](x_BCHW)
        tokens = torch.tanh(self.inner[1](hidden_BCHW.flatten(2).transpose(1, 2)))
        return hidden_BCHW + tokens.transpose(1, 2).unflatten(2, hidden_BCHW.shape[2:])


def gradients(backend, *, in_8_bits):
    """(output, gradients of a LoRA) of a block; compiled unless `backend` is None."""
    block = Block().requires_grad_(False)
    modules = [LoRAModule(f"lora_{index}", layer, rank=2, alpha=1) for index, layer in enumerate(block.inner)]
    for module in modules:
        torch.nn.init.normal_(module.lora_up.weight, std=0.1)
        module.hook()
    if in_8_bits:
        float8.store(block)
    names = list(block.state_dict())
    if backend:
        compile_unet(block, backend, torch.device("cpu"))
        assert list(block.state_dict()) == names, "keys are what files are made of"
    out = block(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for module in modules for parameter in module.parameters())]


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_a_compiled_block_computes_the_same(in_8_bits):
    torch._dynamo.reset()
    plain, compiled = gradients(None, in_8_bits=in_8_bits), gradients("aot_eager", in_8_bits=in_8_bits)
    assert len(plain) == 5
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1 and not torch._dynamo.utils.counters["graph_break"]
    )
    for a, b in zip(plain, compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(OptionError, match="--dynamo_backend: nvprims_nvfuser.*inductor, eager"):
        compile_unet(torch.nn.Linear(1, 1), "nvprims_nvfuser", torch.device("cpu"))


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(OptionError, match="--torch_compile: inductor needs a C"):
        compile_unet(torch.nn.Linear(1, 1), "inductor", torch.device("cpu"))
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="--torch_compile: inductor needs the package triton"):
        compile_unet(torch.nn.Linear(1, 1), "inductor", torch.device("cuda"))
