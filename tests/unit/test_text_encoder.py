"""The text encoder: states of each layer, windows, names, gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from library.checkpoints.architecture import TextArchitecture
from library.models.build import build_text_encoder
from library.models.text_encoder import ProjectedTextEncoder, TextEncoder, clip_config, encode_windows, join_windows
from library.options import OptionError

ARCHITECTURE = TextArchitecture(1000, 77, 64, 96, layers=4, heads=2, activation="quick_gelu")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(ARCHITECTURE).eval()


@pytest.fixture(scope="module")
def reference(encoder: TextEncoder) -> CLIPTextModel:
    """transformers' own model with the same weights."""
    model = CLIPTextModel(clip_config(ARCHITECTURE)).eval()
    prefix = "" if next(iter(model.state_dict())).startswith("text_model.") else "text_model."
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in encoder.state_dict().items()})
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(1))


def test_names_are_the_classic_ones(encoder: TextEncoder):
    names = set(encoder.state_dict())
    assert "text_model.encoder.layers.3.self_attn.q_proj.weight" in names
    assert "text_model.embeddings.position_embedding.weight" in names
    assert "text_model.final_layer_norm.bias" in names
    assert len(names) == 4 + 4 * 16
    classes = {type(module).__name__ for _, module in encoder.named_modules()}
    assert {"CLIPAttention", "CLIPMLP"} <= classes


def test_last_state_equals_the_reference(encoder: TextEncoder, reference: CLIPTextModel):
    ids = random_ids(3, 77)
    with torch.no_grad():
        assert torch.allclose(encoder(ids), reference(ids).last_hidden_state, atol=1e-6)


@pytest.mark.parametrize("clip_skip", [1, 2, 4, 5])
def test_clip_skip_equals_the_references_hidden_states(clip_skip: int, encoder: TextEncoder, reference: CLIPTextModel):
    ids = random_ids(2, 77)
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states[-clip_skip]
        assert torch.allclose(encoder(ids, layer_from_end=clip_skip, normalized=False), hidden, atol=1e-6)
        normalized = encoder.text_model.final_layer_norm(hidden)
        assert torch.allclose(encode_windows(encoder, ids[:, None], clip_skip), normalized, atol=1e-6)


def test_no_clip_skip_is_the_last_layer(encoder: TextEncoder):
    ids = random_ids(1, 1, 77)
    assert torch.equal(encode_windows(encoder, ids, None), encode_windows(encoder, ids, 1))


def test_clip_skip_beyond_the_embeddings(encoder: TextEncoder):
    with pytest.raises(OptionError, match="--clip_skip: 6 is deeper than the text encoder's 4 layers"):
        encode_windows(encoder, random_ids(1, 1, 77), 6)


def test_windows_are_encoded_alone_and_joined(encoder: TextEncoder):
    ids = random_ids(2, 3, 77)
    with torch.no_grad():
        joined = encode_windows(encoder, ids, None)
        alone = torch.stack([encoder(ids[:, i]) for i in range(3)], dim=1)
    assert joined.shape == (2, 227, 64)
    assert torch.allclose(joined, join_windows(alone), atol=1e-6)


def test_join_keeps_first_begin_inner_states_and_last_end():
    states = torch.arange(2 * 77.0).reshape(1, 2, 77, 1)
    expected = [0, *range(1, 76), *range(78, 153), 153]
    assert join_windows(states).flatten().tolist() == expected
    assert join_windows(states[:, :1]).flatten().tolist() == list(range(77))


def test_later_tokens_do_not_change_earlier_states(encoder: TextEncoder):
    ids = random_ids(1, 77)
    other = ids.clone()
    other[:, 40:] = 7
    with torch.no_grad():
        assert torch.allclose(encoder(ids)[:, :40], encoder(other)[:, :40], atol=1e-6)
        assert not torch.allclose(encoder(ids)[:, 40:], encoder(other)[:, 40:], atol=1e-3)


def test_gradient_checkpointing_gives_the_same_gradients(encoder: TextEncoder):
    weight = encoder.text_model.encoder.layers[0].mlp.fc1.weight
    gradients, kept = [], []
    for switch in (encoder.gradient_checkpointing_disable, encoder.gradient_checkpointing_enable):
        switch()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            loss = encoder(random_ids(2, 77)).square().sum()
        (gradient,) = torch.autograd.grad(loss, [weight])
        gradients.append(gradient)
        kept.append(sum(sizes))
    encoder.gradient_checkpointing_disable()
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 3


def test_activation_is_the_familys():
    torch.manual_seed(0)
    quick = TextEncoder(ARCHITECTURE)
    plain = TextEncoder(TextArchitecture(1000, 77, 64, 96, layers=4, heads=2, activation="gelu"))
    plain.load_state_dict(quick.state_dict())
    ids = random_ids(1, 77)
    difference = (quick(ids) - plain(ids)).abs().max()
    assert 0 < difference < 0.1


# ------------------------------------------------------------------------------------- pooled state (SDXL)

PROJECTED = TextArchitecture(49410, 77, 64, 96, layers=3, heads=1, activation="gelu", projection=32)
END = 49407


@pytest.fixture(scope="module")
def projected() -> ProjectedTextEncoder:
    torch.manual_seed(0)
    encoder = build_text_encoder(PROJECTED).eval()
    assert isinstance(encoder, ProjectedTextEncoder)
    return encoder


def ids_with_end(*positions: int) -> torch.Tensor:
    ids = random_ids(len(positions), 77)
    for row, position in zip(ids, positions, strict=True):
        row[position:] = 0
        row[position] = END
    return ids


@torch.no_grad()
def test_pooled_state_equals_the_reference(projected: ProjectedTextEncoder):
    config = clip_config(PROJECTED)
    config.eos_token_id = END
    reference = CLIPTextModelWithProjection(config).eval()
    reference.load_state_dict(projected.state_dict())
    ids = ids_with_end(5, 76, 1)
    states, pooled = projected(ids, layer_from_end=2, normalized=False)
    expected = reference(ids, output_hidden_states=True)
    assert pooled.shape == (3, 32) and torch.allclose(pooled, expected.text_embeds, atol=1e-6)
    assert torch.allclose(states, expected.hidden_states[-2], atol=1e-6)
    for layer in (1, 3):
        assert torch.equal(projected(ids, layer_from_end=layer)[1], pooled)


@torch.no_grad()
def test_pooled_state_is_of_the_first_end_token_whatever_words_were_added(projected: ProjectedTextEncoder):
    ids = ids_with_end(6)
    expected = projected(ids)[1]
    later = ids.clone()
    later[0, 7:] = END  # the padding of other tokenizers
    assert torch.equal(projected(later)[1], expected)
    added = ids.clone()
    added[0, 3] = END + 1  # a word of textual inversion: the highest id
    assert not torch.allclose(projected(added)[1], expected)  # its word counts ...
    added[0, 7:] = END + 1
    before = projected(added)[1]
    added[0, 7:] = 0
    assert torch.equal(projected(added)[1], before)  # ... but the end token is read


def test_text_without_an_end_token_is_pooled_at_its_begin(projected: ProjectedTextEncoder):
    ids = random_ids(1, 77)
    changed = ids.clone()
    changed[0, 1:] = 5
    assert torch.equal(projected(ids)[1], projected(changed)[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter_of_a_projected_encoder(checkpointing: bool):
    torch.manual_seed(0)
    encoder = build_text_encoder(PROJECTED).train()
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    states, pooled = encoder(ids_with_end(8), layer_from_end=2, normalized=False)
    (states.square().mean() + pooled.square().mean()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
