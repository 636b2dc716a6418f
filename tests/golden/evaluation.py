"""Makes the tiny GPT-2 with a tokenizer in `evaluation/`, and `evaluation.golden.json`: what evaluations of it must find.

Run by developers only: `python tests/golden/evaluation.py` with torch, transformers and tokenizers installed.

Texts are read as transformers' guide to perplexity of fixed-length models reads them, in windows whose beginnings are
`stride` tokens apart, but for one thing: the token behind a window is predicted, too, so that with a stride of the whole
context every token but a text's first is predicted. Questions are scored as lm-evaluation-harness does it.
"""

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
FOLDER = HERE / "evaluation"
CONTEXT = 20
END = "<|endoftext|>"

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "",
    "x",
    "Naïve cafés: ¿qué? 日本語 🦊",
    "A text that is a good deal longer than the context of the model, so that it is read in several windows, of which "
    "every one but the last is full; and the last one may hold a single token.",
]
QUESTIONS = [
    ("The quick brown fox", ["jumps over", "sleeps", "is a dog"], 0),
    ("The dog does ", ["not mind", "mind the fox", "sleep"], 1),
    ("", ["A text", "the dog"], 1),
    ("It is read in several windows, of which every one but the last is full, and so on and on; the last one",
     ["is full", " may hold a token", "日本語"], 2),
    ("One choice", ["only"], 0),
]


def make_model():
    """A model whose weights are large enough that every token matters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS + [context for context, _, _ in QUESTIONS], trainer)
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "ln_" in name and name.endswith("weight")
            parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter) if norm else 0.4 * torch.randn_like(parameter))
    FOLDER.mkdir(exist_ok=True)
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    return GPT2LMHeadModel.from_pretrained(FOLDER).double().eval(), tokenizer


def scores(model, inputs, targets):
    """Log-likelihood of the targets of the last inputs, and how many of them are the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([inputs])).logits[0, len(inputs) - len(targets):]
    targets = torch.tensor(targets)
    log_probabilities = logits.log_softmax(-1).gather(-1, targets[:, None])
    return log_probabilities.sum().item(), (logits.argmax(-1) == targets).sum().item()


def evaluate_texts(model, tokenizer, stride, start_token):
    total, tokens, correct, rows = 0.0, 0, 0, []
    for text in TEXTS:
        ids = [0] * start_token + tokenizer.encode(text).ids
        begin, done, row = 0, 0, 0.0
        while done < len(ids) - 1:
            end = min(begin + CONTEXT, len(ids) - 1)
            found, right = scores(model, ids[begin:end], ids[done + 1:end + 1])
            row, correct = row + found, correct + right
            begin, done = begin + stride, end
        rows.append({"tokens": done, "loss": -row / done if done else None})
        total, tokens = total + row, tokens + done
    size = sum(len(text.encode()) for text in TEXTS)
    return {
        "stride": stride, "start_token": start_token, "rows": rows, "tokens": tokens, "bytes": size,
        "loss": -total / tokens, "perplexity": math.exp(-total / tokens),
        "bits_per_byte": -total / math.log(2) / size, "next_token_accuracy": correct / tokens,
    }


def evaluate_questions(model, tokenizer):
    rows, right, right_norm = [], 0, 0
    for context, choices, answer in QUESTIONS:
        found = []
        for choice in choices:
            # A space between the two unless there is one; white space at the end of the context is the choice's.
            stripped = context.rstrip()
            continuation = context[len(stripped):] + choice
            if continuation == choice and not choice[0].isspace():
                continuation = " " + choice
            whole = tokenizer.encode(stripped + continuation).ids
            before = len(tokenizer.encode(stripped).ids)
            ids = ([] if stripped else [0]) + whole
            length = len(whole) - before
            inputs = ids[-(CONTEXT + 1):][:-1]
            found.append(scores(model, inputs, ids[-length:])[0])
        per_byte = [likelihood / len(choice.encode()) for likelihood, choice in zip(found, choices)]
        best, best_norm = found.index(max(found)), per_byte.index(max(per_byte))
        right, right_norm = right + (best == answer), right_norm + (best_norm == answer)
        rows.append({"log_likelihoods": found, "choice": best, "choice_norm": best_norm})
    return {"rows": rows, "accuracy": right / len(QUESTIONS), "accuracy_norm": right_norm / len(QUESTIONS)}


def main():
    model, tokenizer = make_model()
    golden = {
        "texts": TEXTS,
        "questions": [{"context": c, "choices": o, "answer": a} for c, o, a in QUESTIONS],
        "of_texts": [evaluate_texts(model, tokenizer, stride, start)
                     for stride, start in [(CONTEXT, False), (7, False), (CONTEXT, True)]],
        "of_questions": evaluate_questions(model, tokenizer),
    }
    path = HERE / "evaluation.golden.json"
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
