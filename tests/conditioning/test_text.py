import pytest
import torch

from vidistill.checkpoint import CheckpointError, text_encoder
from vidistill.conditioning.text import NgramConfig, Ngrams


def test_tokens_are_the_same_for_ever_and_padded_with_zeros():
    tokens = Ngrams(NgramConfig(dim=16, length=6)).encode(["A red ball!", "a red ball"])
    assert tokens.shape == (2, 6, 48) and torch.equal(tokens[0], tokens[1])
    assert tokens[0, 3:].eq(0).all() and tokens[0, :3].abs().sum(-1).gt(0).all()


def test_a_word_is_told_from_itself_beside_another_word_and_resembles_its_relatives():
    read = Ngrams(NgramConfig(dim=64, length=8)).tokens
    a, b = read("red ball on blue ground"), read("blue ball on red ground")
    assert torch.equal(a[0, :64], b[3, :64]) and not torch.allclose(a[0], b[3])
    ball, balls, tree = (read(word)[0, :64] for word in ("moving", "moves", "circle"))
    near = torch.cosine_similarity
    assert near(ball, balls, dim=0) > near(ball, tree, dim=0) + 0.1


def test_a_record_names_its_encoder():
    encode = text_encoder({"text": {"kind": "ngrams", "dim": 8, "length": 3}})
    assert encode(["one two three four"]).shape == (1, 3, 24)
    assert text_encoder({"world": {}}) is None
    with pytest.raises(CheckpointError, match="known: ngrams, umt5"):
        text_encoder({"text": {"kind": "tea leaves"}})
    with pytest.raises(ValueError, match="multiple of 8"):
        NgramConfig(dim=12)
