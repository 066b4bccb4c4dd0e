"""Networks of all kinds merged into files of models give the models that the same networks merged in memory give."""

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.weights import load_tensors
from library.options import OptionError
from networks import lora, oft
from networks.merge_lora import merge
from networks.weights.merge_options import MergeOptions
from tests.tiny_loras import layer_shapes
from tests.tiny_networks import perturb

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


def test_what_depends_on_the_weight_sees_it_as_it_was(tiny_sd1_path, tmp_path):
    """Two DoRA files add what each of them adds alone, in whatever order they are named."""
    name = next(name for name in layer_shapes("sd1") if name.startswith("lora_te"))
    key = f"cond_stage_model.transformer.{name.removeprefix('lora_te_')}.weight"
    key = key.replace("text_model_encoder_layers_0_self_attn_k_proj", "text_model.encoder.layers.0.self_attn.k_proj")
    generator = torch.Generator().manual_seed(1)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({f"{name}.lora_down.weight": torch.randn(4, 64, generator=generator),
                   f"{name}.lora_up.weight": torch.randn(64, 4, generator=generator),
                   f"{name}.dora_scale": torch.rand(64, 1, generator=generator)}, path)  # fmt: skip

    def merged(*files):
        output = tmp_path / "out.safetensors"
        files = tuple(map(str, files))
        merge(MergeOptions(sd_model=str(tiny_sd1_path), save_to=str(output), models=files, ratios=(1.0,) * len(files)))
        return load_tensors(output)[key]

    weight = load_tensors(tiny_sd1_path)[key]
    changes = [merged(path) - weight for path in paths]
    assert all(change.norm() > 0.1 for change in changes)
    torch.testing.assert_close(merged(*paths), weight + changes[0] + changes[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged(*reversed(paths)), merged(*paths), rtol=1e-5, atol=1e-6)


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
