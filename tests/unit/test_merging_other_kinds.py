"""Networks of all kinds merged into files of models give the models that the same networks merged in memory give."""

import pytest
import torch
from safetensors.torch import save_file

from library.options import OptionError
from networks import lora, oft
from networks.merge_lora import merge
from networks.weights.merge_options import MergeOptions
from tests.tiny_loras import layer_shapes
from tests.tiny_networks import outputs, perturb

RATIO = 0.7


def load(kind, path):
    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.families.sdxl import StableDiffusionXL
    from library.models.options import AttentionOptions

    family = StableDiffusionXL() if kind == "sdxl" else StableDiffusion()
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    model = family.load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)
    encoders = list(model.text_encoders)
    return (encoders if len(encoders) > 1 else encoders[0]), model.unet


def parameters(text_encoder, unet):
    encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
    return {f"{number}.{name}": parameter.detach().clone() for number, module in enumerate((unet, *encoders))
            for name, parameter in module.named_parameters()}  # fmt: skip


def of_all_kinds(kind):
    """A LoHa, LoKr, DoRA, LoCon with a middle, difference with bias, norm and plain LoRA, one layer each."""
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    shapes = layer_shapes(kind)
    text = [name for name in shapes if name.startswith("lora_te")]
    linear = [name for name, shape in shapes.items() if name.startswith("lora_unet") and len(shape) == 2]
    convs = [name for name, shape in shapes.items() if shape[2:] == (3, 3)]
    found = {}

    def add(name, **parts):
        found.update({f"{name}.{part.replace('__', '.')}": tensor for part, tensor in parts.items()})

    out, ins = shapes[linear[0]]
    add(linear[0], alpha=torch.tensor(2.0), hada_w1_a=numbers(out, 4), hada_w1_b=numbers(4, ins),
        hada_w2_a=numbers(out, 4), hada_w2_b=numbers(4, ins))  # fmt: skip
    out, ins = shapes[text[0]]
    add(text[0], lokr_w1=numbers(2, 2), lokr_w2=numbers(out // 2, ins // 2))
    out, ins = shapes[text[-1]]
    add(text[-1], lora_down__weight=numbers(4, ins), lora_up__weight=numbers(out, 4), dora_scale=numbers(out, 1).abs())
    out, ins, *_ = shapes[convs[0]]
    add(convs[0], lora_down__weight=numbers(4, ins, 1, 1), lora_mid__weight=numbers(4, 4, 3, 3),
        lora_up__weight=numbers(out, 4, 1, 1), alpha=torch.tensor(1.0))  # fmt: skip
    add(convs[1], diff=numbers(*shapes[convs[1]]), diff_b=numbers(shapes[convs[1]][0]))
    fused = next(name for name in text if name.endswith("_q_proj") and name != text[0])
    add(fused, diff=numbers(*shapes[fused]), diff_b=numbers(shapes[fused][0]))
    out, ins = shapes[linear[1]]
    add(linear[1], lora_down__weight=numbers(4, ins), lora_up__weight=numbers(out, 4))
    conv_in = "input_blocks_0_0" if kind == "sdxl" else "conv_in"
    add(f"lora_unet_{conv_in}", diff=numbers({"sd1": 32, "sd2": 64, "sdxl": 32}[kind], 4, 3, 3))
    prefix = text[0].partition("_layers_")[0]
    add(f"{prefix}_layers_1_layer_norm2", w_norm=numbers(64), b_norm=numbers(64))
    return found


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("network", ["all kinds", "oft"])
def test_as_merged_in_memory(kind, network, request, tmp_path):
    path = request.getfixturevalue(f"tiny_{kind}_path")
    file, output = tmp_path / "network.safetensors", tmp_path / "out.safetensors"
    text_encoder, unet = load(kind, path)
    before = parameters(text_encoder, unet)
    if network == "oft":
        created = oft.create_network(
            1.0, 4, 0.05, None, text_encoder, unet, enable_all_linear="True", enable_conv="True"
        )
        perturb(created, std=0.1)
        created.save_weights(file, None, {})
    else:
        save_file(of_all_kinds(kind), file)
    module = oft if network == "oft" else lora
    made, tensors = module.create_network_from_weights(RATIO, file, None, text_encoder, unet, for_inference=True)
    made.merge_to(text_encoder, unet, tensors)
    expected = parameters(text_encoder, unet)
    merge(MergeOptions(sd_model=str(path), save_to=str(output), models=(str(file),), ratios=(RATIO,)))
    found = parameters(*load(kind, output))
    changed = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert len(changed) == (len(made.adapters) if network == "oft" else 12) > 10
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-6)
        if name not in changed:
            assert torch.equal(found[name], before[name])


def beside_others(kind):
    """A module of each layer that LoRA stands on in attentions: LoRA, DoRA, (IA)^3, or a difference with a bias."""
    generator = torch.Generator().manual_seed(len(kind))
    found = {}
    for name, (out, ins, *_) in layer_shapes("sd1").items():
        if "attn" not in name:
            continue
        if kind == "ia3":
            parts = {"weight": torch.rand(out, generator=generator), "on_input": torch.tensor(False)}
        elif kind == "diff":
            parts = {"diff": torch.randn(out, ins, generator=generator) * 0.05}
            if name.endswith("to_out_0"):
                parts["diff_b"] = torch.randn(out, generator=generator)
        else:
            parts = {"lora_down.weight": torch.randn(4, ins, generator=generator) * 0.2,
                     "lora_up.weight": torch.randn(out, 4, generator=generator) * 0.2}  # fmt: skip
            if kind == "dora":
                parts["dora_scale"] = torch.rand(out, 1, generator=generator) + 0.5
        found |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return found


def difference(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kinds", ["lora oft", "lora dora", "oft lora dora", "diff oft", "lora ia3"])
def test_networks_beside_each_other_do_the_same_applied_and_merged(kinds, tiny_sd1_path, tmp_path):
    """In their order: hooked, merged in memory, calculated beforehand, and merged into a file."""
    kinds = kinds.split()
    ratios = tuple(float(number) for number in range(1, len(kinds) + 1))
    files, modules = [], [oft if kind == "oft" else lora for kind in kinds]
    models = load("sd1", tiny_sd1_path)
    for kind in kinds:
        files.append(str(tmp_path / f"{kind}.safetensors"))
        if kind == "oft":
            created = oft.create_network(1.0, 4, 0.05, None, *models)
            perturb(created, std=0.1)
            created.save_weights(files[-1], None, {})
        else:
            save_file(beside_others(kind), files[-1])

    def networks(models):
        for module, file, ratio in zip(modules, files, ratios, strict=True):
            yield module.create_network_from_weights(ratio, file, None, *models, for_inference=True)

    with torch.no_grad():
        applied, calculated = [], load("sd1", tiny_sd1_path)
        for found, hooked in ((models, applied), (calculated, [])):
            for network, tensors in networks(found):
                network.apply_to(*found)
                network.load_state_dict(tensors, strict=False)
                hooked.append(network.eval().requires_grad_(False))
            for network in hooked if found is calculated else ():
                network.pre_calculation()
        expected = outputs(*models)
        in_memory, output = load("sd1", tiny_sd1_path), tmp_path / "out.safetensors"
        for network, tensors in networks(in_memory):
            network.merge_to(*in_memory, tensors)
        merge(MergeOptions(sd_model=str(tiny_sd1_path), save_to=str(output), models=tuple(files), ratios=ratios))
        for found in (calculated, in_memory, load("sd1", output)):
            for output_of_part, expected_of_part in zip(outputs(*found), expected, strict=True):
                assert difference(output_of_part, expected_of_part) < 2e-3
        for index in range(len(applied)):
            applied[index].set_multiplier(0.0)
            assert difference(outputs(*models)[1], expected[1]) > 0.02
            applied[index].set_multiplier(ratios[index])


def test_mistakes(tiny_sd1_path, tmp_path):
    unet = [name for name in layer_shapes("sd1") if name.endswith("attn1_to_q")]
    to_q = unet[0]  # has no bias
    rows = layer_shapes("sd1")[to_q][0]
    file, output = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    for tensors, problem in [
        ({f"{to_q}.diff_b": torch.ones(rows)}, f"changes the bias of {to_q}, which has none in {tiny_sd1_path}"),
        ({f"{to_q}.diff": torch.ones(rows, 3)}, "was made for another model family"),
        ({f"{to_q}.something": torch.ones(3)}, "is of a kind that is not known"),
        ({f"{to_q}.hada_w1_a": torch.ones(rows, 3)}, "is incomplete"),
        ({f"{to_q.replace('lora', 'oft')}.oft_blocks": torch.ones(3, 2, 2)}, "was made for another model"),
    ]:
        save_file(tensors, file)
        with pytest.raises(OptionError, match=problem):
            merge(MergeOptions(sd_model=str(tiny_sd1_path), save_to=str(output), models=(str(file),), ratios=(1.0,)))
        assert not output.exists()
