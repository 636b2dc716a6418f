"""Makes the Unigram and WordPiece fixtures in text/, and what the reference implementations make of `text.py`'s texts.

    pip install tokenizers transformers sentencepiece gguf jinja2
    python tests/golden/word_tokenizers.py     (after text.py)

References: Google's `sentencepiece` for its models, transformers' BertTokenizer for vocab.txt, Hugging Face `tokenizers`
for tokenizer.json.
"""

import tempfile
from pathlib import Path

import sentencepiece
from text import CORPUS, HERE, cases, write_json
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer

# Rules of a table of characters: a ligature, a tab and a no-break space.
RULES = "FB01\t66 69\n9\t20\nA0\t20\nFF01\t21\n"


def sentencepiece_model(name, file, kind, **options):
    """A model in the folder `name`, and its ids. An unknown piece is written out as `<unk>`, as transformers does."""
    (HERE / name).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder, "rules.tsv")
        rules.write_text(RULES)
        if options.pop("rules", False):
            options["normalization_rule_tsv"] = str(rules)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=f"{folder}/model", model_type=kind, character_coverage=0.98,
            unk_id=0, bos_id=1, eos_id=2, minloglevel=2, user_defined_symbols=["<tool>"], **options,
        )
        (HERE / name / file).write_bytes(Path(folder, "model.model").read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / name / file))

    def decode(ids):
        if not options.get("byte_fallback"):
            text = "".join(model.id_to_piece(i) for i in ids).replace("▁", " ")
            return text.removeprefix(" ")
        return model.decode(ids)

    write_json(f"{name}.ids.json", cases(model.encode, decode))


def save(name, tokenizer):
    (HERE / name).mkdir(exist_ok=True)
    tokenizer.save(str(HERE / name / "tokenizer.json"), pretty=False)
    ids = cases(lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    write_json(f"{name}.ids.json", ids)


def unigram_json():
    """As transformers converts such models: Metaspace, an end token behind every text, unknown words."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)])
    save("unigram-json", tokenizer)


def word_piece_json():
    """Cased, with another prefix, nothing around a text, and no cleaning up."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"], continuing_subword_prefix="@@", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    tokenizer.model = models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix="@@")
    tokenizer.decoder = decoders.WordPiece(prefix="@@", cleanup=False)
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True)])
    save("word-piece-json", tokenizer)


def bert():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    for name, config in [("bert", {}), ("bert-cased", {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False})]:
        (HERE / name).mkdir(exist_ok=True)
        (HERE / name / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
        if config:
            write_json(f"{name}/tokenizer_config.json", config)
        options = {key: value for key, value in config.items() if key != "tokenizer_class"}
        reference = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, **options)
        decode = lambda ids: reference.backend_tokenizer.decode(ids, skip_special_tokens=False)
        write_json(f"{name}.ids.json", cases(lambda text: reference(text)["input_ids"], decode))


if __name__ == "__main__":
    sentencepiece_model(
        "unigram", "tokenizer.model", "unigram", vocab_size=420, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    )
    sentencepiece_model("unigram-rules", "spiece.model", "unigram", vocab_size=170, rules=True)
    sentencepiece_model("bpe-rules", "tokenizer.model", "bpe", vocab_size=260, rules=True)
    unigram_json()
    word_piece_json()
    bert()
