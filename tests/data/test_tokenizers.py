"""Tokenizers: the sample's, any directory's, one of one's own."""

import json

import pytest
from text_files import EOS, batches, equal, save, texts
from transformers import AutoTokenizer

from nt_hf.cli import tokenizer as tokenizer_program
from nt_hf.data.tokenizers import check_vocabulary, load_tokenizer


def test_sample_tokenizer_is_t5_without_extras(tokenizer):
    published = [6536, 43, 118, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25]  # Transformers' T5 documentation
    assert tokenizer("Studies have been shown that owning a dog is good for you")["input_ids"] == published
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert max(tokenizer.get_vocab().values()) == 31_999


def test_vocabulary_is_checked_by_the_largest_id(tokenizer):
    check_vocabulary(tokenizer, 32_000)
    with pytest.raises(ValueError, match=r"^vocab_size=31999: .* 31999; accepted is 32000 or more$"):
        check_vocabulary(tokenizer, 31_999)


def test_tokenizer_needs_an_end_of_sequence_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(ValueError, match=r"^tokenizer='.*': has no eos_token"):
        load_tokenizer(str(tmp_path))


def test_unknown_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^tokenizer='.*none': there is no such directory$"):
        load_tokenizer(str(tmp_path / "none"))


def test_automatic_special_tokens_are_not_used(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    backend = json.loads(path.read_text())
    eos = {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    backend["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {"</s>": eos}
    }  # fmt: skip
    path.write_text(json.dumps(backend))
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert other("a")["input_ids"][-1] == EOS, "the test needs a tokenizer that adds </s>"
    source = save(tmp_path, [texts(20)])
    assert equal(*(list(batches(source, t, epochs=1)) for t in (tokenizer, other)))


def test_train_tokenizer_repeats_and_restores_text(tmp_path):
    main = tokenizer_program.main
    for name in ("a", "b"):
        main(["--data", "sample:validation", "--vocab_size", "600", "--output", str(tmp_path / name)])
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    check_vocabulary(tokenizer, 600)
    text = "  Spaces,\n\nbreaks and 漢字 \U0001f600 survive."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
