"""§6: what reads texts without being a receiver: bytes, and a small frozen sentence encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import LATENTWIRE as lw

CPU = torch.device("cpu")
TEXTS = ["", "a", "four", "seven b", "Zürich 🙂 2018\n", "é" * 5]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_come_back_and_know_their_characters(text):
    reader = lw.ByteReader(CPU)
    ids, spans = reader.pieces(text)
    assert ids == reader.ids(text) and len(ids) == len(spans) == -(-len(text.encode()) // 4)
    states = reader.states([ids or [reader.pad]], [0])
    assert states.hidden.dtype == torch.uint8 and states.hidden.shape[-1] == 4
    assert bytes(states.hidden[states.mask[:, None]].flatten().tolist()).rstrip(b"\xff").decode() == text
    for (start, end), number in zip(spans, ids, strict=True):
        own = int(number).to_bytes(4).rstrip(b"\xff")
        assert own in text[start:end].encode()


def test_a_text_that_is_no_unicode_is_still_read():
    assert lw.ByteReader(CPU).ids("\ud800x")


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory) -> Path:
    """A random two-layer BERT in a folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained(folder)
    return folder


def test_a_sentence_encoder_reads_as_the_library_does(sentence_model):
    from transformers import AutoModel

    reader = lw.SentenceReader(str(sentence_model), CPU, offline=True)
    texts = ["the cat sat", "a dog"]
    rows = [lw.sender_ids(reader, text, 64) for text in texts]
    states = reader.states(rows, [0])
    for row, hidden, mask in zip(rows, states.hidden[:, 0], states.mask, strict=True):
        whole = AutoModel.from_pretrained(sentence_model).eval()(torch.tensor([[*row, 3]])).last_hidden_state[0, :-1]
        assert torch.allclose(hidden[mask], whole, atol=1e-5)
    assert lw.sender_spans(reader, "the cat", 64)[1:] == reader.pieces("the cat")[1]


@pytest.mark.trains
@pytest.mark.parametrize("encoder", ["stq", "simple-st"])
def test_sentence_encoders_train_and_evaluate(encoder, sentence_model, tmp_path):
    words = [
        "--dataset",
        "toy",
        "--encoder",
        encoder,
        "--sentence_model",
        str(sentence_model),
        "--receiver",
        "tiny-qwen",
    ]
    sizes = ["--steps", "8", "--batch_size", "8", "--val_samples", "8", "--latent_len", "4", "--width", "32"]
    lw.train_main([*words, *sizes, "--output_dir", str(tmp_path / "run")])
    results = lw.eval_main(
        ["--checkpoint", str(tmp_path / "run"), "--num_samples", "12", "--methods", "bridge,control:zero"]
    )
    assert results["provenance"]["sender"]["family"] == "bert" and results["methods"]["bridge"]["errors"] == 0


def test_a_sentence_encoder_that_is_not_there_is_one_line():
    with pytest.raises(lw.LatentWireError, match="--sentence_model") as refused:
        lw.SentenceReader("./no-such-folder", CPU, offline=True)
    assert "\n" not in str(refused.value)
