"""Words of textual inversion: how prompts are cut where they stand, their files, and text encoders that learn them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.architecture import TextArchitecture
from library.models.added_words import LayeredWords, Word, add_vectors, add_words, read_layered_word, read_word
from library.models.build import build_text_encoder
from library.options import OptionError
from library.text.added_words import LAYERS, WordTokenizer
from library.text.tokens import ClipTokenizer
from library.text.weighted_tokens import weighted_tokens
from library.text.word_names import check_name

FLAG = "--textual_inversion_embeddings"
WORDS = {"Zwork-v2": (50000, 50001, 50002), "zwork": (50003,), "私の絵": (50004,), "my  style": (50005,)}
TOKENIZER = WordTokenizer("eos", WORDS)
PLAIN = ClipTokenizer("eos")
ENCODER = TextArchitecture(49408, 77, 64, 64, layers=1, heads=1, activation="gelu")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a zwork, oil", ["a", (50003,), ", oil"]),
        ("ZWORK", [(50003,)]),
        ("a zwork-V2 zwork", ["a", (50000, 50001, 50002), (50003,)]),  # the longer word first
        ("zworks zwork_1 azwork", ["zworks zwork_1 azwork"]),  # inside of no other word
        ("zwork-v2.", [(50000, 50001, 50002), "."]),
        ("私の絵です", [(50004,), "です"]),  # no blanks between words there
        ("in my\nStyle", ["in", (50005,)]),
        ("zwork zwork", [(50003,), (50003,)]),
    ],
)
def test_words_are_found(text, pieces):
    expected = [token for piece in pieces for token in (piece if isinstance(piece, tuple) else PLAIN.encode(piece))]
    assert TOKENIZER.encode(text) == expected
    assert TOKENIZER.lengths([text, "a"]) == [len(expected), 1]
    assert TOKENIZER.windows([text], 1)[0, 0].tolist() == PLAIN.layout(expected, 1)[0]


def test_other_tokenizers_know_nothing_of_it():
    before = PLAIN.encode("a zwork")
    assert all(token < 49408 for token in before)
    assert ClipTokenizer("eos").encode("a zwork") == before
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode("a zwork-v2") == TOKENIZER.encode("a zwork-v2")


@pytest.mark.parametrize(("before", "is_next"), [(72, False), (73, True), (74, True), (75, True)])
def test_a_word_is_never_split_between_windows(before, is_next):
    prompt = "cat " * before + "(zwork-v2:1.5) cat"
    first, *rest = weighted_tokens(TOKENIZER, prompt, 3).windows
    word = tuple((token, 1.5) for token in WORDS["Zwork-v2"])
    home = rest[0] if is_next else first
    assert home[:3] == word if is_next else home[-3:] == word
    assert weighted_tokens(TOKENIZER, prompt, 1).num_cut == (4 if is_next else 1)


def test_captions_lose_a_word_as_a_whole():
    (window,) = TOKENIZER.windows(["cat " * 74 + "zwork-v2"], 1)[0]
    assert window.max() < 50000 and (window == PLAIN.encode("cat")[0]).sum() == 74


@pytest.mark.parametrize("name", ["cat", "Cat", " "])
def test_names_that_have_a_meaning(name):
    with pytest.raises(OptionError, match=f"{FLAG}: cat.pt (would be the word|has no name)"):
        check_name(FLAG, name, "cat.pt")


# ---------------------------------------------------------------------------------------------- files


def parameters() -> torch.nn.ParameterDict:
    return torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 8))})


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("safetensors", {"emb_params": torch.ones(2, 8)}),
        ("bin", {"<zwork>": torch.ones(2, 8)}),
        ("pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 8)}, "name": "x", "step": 9}),
        ("pt", {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters()}),
        ("pt", {"string_to_param": {"*": torch.nn.Parameter(torch.ones(2, 8))}}),
    ],
    ids=["safetensors", "diffusers", "web ui", "first program", "parameter"],
)
def test_layouts(tmp_path: Path, suffix: str, content: dict) -> None:
    path = tmp_path / f"zwork.{suffix}"
    save_file(content, path) if suffix == "safetensors" else torch.save(content, path)
    word = read_word(str(path), FLAG)
    assert (word.name, word.num_vectors) == ("zwork", 2)
    assert torch.equal(word.vectors[0], torch.ones(2, 8)) and not word.vectors[0].requires_grad


def test_one_vector_may_have_no_row(tmp_path: Path) -> None:
    torch.save({"<zwork>": torch.ones(8)}, tmp_path / "zwork.bin")
    assert read_word(str(tmp_path / "zwork.bin"), FLAG).vectors[0].shape == (1, 8)


def test_the_layout_of_sdxl(tmp_path: Path) -> None:
    save_file({"clip_g": torch.ones(3, 16), "clip_l": torch.ones(3, 8)}, tmp_path / "zwork.safetensors")
    word = read_word(str(tmp_path / "zwork.safetensors"), FLAG)
    assert [vectors.shape for vectors in word.vectors] == [(3, 8), (3, 16)] and word.num_vectors == 3


LAYERED = {name: torch.full((2, 8), float(index)) for index, name in enumerate(LAYERS)}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"a": torch.ones(76, 8)}, "has 76 vectors, and a prompt's window holds 75"),
        ({"a": torch.full((1, 8), torch.nan)}, r"holds NaN or infinity \(a\)"),
        ({"a": 3}, "holds no vectors"),
        ({"clip_l": torch.ones(1, 8), "clip_g": torch.ones(2, 16)}, "another number of vectors for each text encoder"),
        (LAYERED, "name it with --XTI_embeddings"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: dict, problem: str) -> None:
    torch.save(content, tmp_path / "zwork.pt")
    with pytest.raises(OptionError, match=f"^{FLAG}: .*zwork.pt .*{problem}"):
        read_word(str(tmp_path / "zwork.pt"), FLAG)


def test_layered_words(tmp_path: Path) -> None:
    torch.save(LAYERED, tmp_path / "zwork.pt")
    word = read_layered_word(str(tmp_path / "zwork.pt"), "--XTI_embeddings")
    assert word.num_vectors == 2 and word.vectors[0].shape == (32, 8)
    assert word.vectors[0][:, 0].tolist() == [float(index // 2) for index in range(32)]
    torch.save({name: LAYERED[name] for name in LAYERS[:15]}, tmp_path / "cut.pt")
    with pytest.raises(OptionError, match=r"--XTI_embeddings: .*it lacks \['OUT11'\]"):
        read_layered_word(str(tmp_path / "cut.pt"), "--XTI_embeddings")
    torch.save({"*": torch.ones(1, 8)}, tmp_path / "usual.pt")
    with pytest.raises(OptionError, match="name a usual one with --textual_inversion_embeddings"):
        read_layered_word(str(tmp_path / "usual.pt"), "--XTI_embeddings")


def test_ids_for_each_layer() -> None:
    words = LayeredWords(((50000, 2),))
    ids = torch.tensor([[1, 50000, 50001, 50032]])
    variants = words.variants(ids)
    assert [variant.tolist() for variant in variants[:2]] == [[[1, 50000, 50001, 50032]], [[1, 50002, 50003, 50032]]]
    assert len(variants) == 16 and variants[15].tolist() == [[1, 50030, 50031, 50032]]
    assert len(words.variants(torch.tensor([[1, 50032]]))) == 1


# ---------------------------------------------------------------------------------------------- text encoders


def word(name: str, *sizes: tuple[int, int]) -> Word:
    return Word(name, f"{name}.pt", tuple(torch.randn(size) for size in sizes))


def test_words_are_taught() -> None:
    encoder = build_text_encoder(ENCODER).half()
    old = encoder.get_input_embeddings().weight.detach().clone()
    first, second = word("Zwork", (2, 64)), word("zwerk", (1, 64))
    (tokenizer,) = add_words([PLAIN], [encoder], [first, second], FLAG)
    (tokenizer,) = add_words([tokenizer], [encoder], [word("zwark", (1, 64))], FLAG)
    weight = encoder.get_input_embeddings().weight
    assert torch.equal(weight[:49408], old) and weight.dtype == torch.half
    assert torch.equal(weight[49408:49411], torch.cat([first.vectors[0], second.vectors[0]]).half())
    assert tokenizer.encode("zwork zwerk zwork1 zwark") == [49408, 49409, 49410, 49409, 49411]
    assert tokenizer.pad_id == PLAIN.pad_id
    ids = torch.tensor([[49406, 49410, 49407]])
    assert encoder(ids).isfinite().all()


def test_vectors_can_go_on_learning() -> None:
    encoder = build_text_encoder(ENCODER)
    assert add_vectors(encoder, torch.zeros(1, 64)) == 49408
    assert encoder.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ([(1, 768)], r"was made for SD 1.x \(vectors of 768\), and the model is a model with one text encoder"),
        ([(1, 1024)], "was made for SD 2.x"),
        ([(1, 768), (1, 1280)], r"was made for SDXL \(vectors of 768 and 1280\)"),
    ],
)
def test_words_of_other_models_are_refused(sizes, problem) -> None:
    with pytest.raises(OptionError, match=f"^{FLAG}: zwork.pt {problem}"):
        add_words([PLAIN], [build_text_encoder(ENCODER)], [word("zwork", *sizes)], FLAG)
