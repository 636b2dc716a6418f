"""Greedy generation in llama.cpp, several sequences in one batch as its server runs them.

    llama_cpp_generate.py FILE.gguf SEQUENCES POSITIONS

SEQUENCES is the most that will be asked for, POSITIONS the room of each. Measures once per line of standard input,
{"sequences": n, "prompt": tokens, "tokens": decoded}, and answers {"decode": tokens/s, "prefill": tokens/s,
"seconds": of the whole}. Built with native flags (`CMAKE_ARGS=-DGGML_NATIVE=ON`), which is the fastest that it gets.
"""

import json
import os
import random
import sys
import time

import llama_cpp
import numpy

BATCH = 512


def open_model(file, sequences, positions):
    llama_cpp.llama_log_set(SILENT, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_load_model_from_file(file.encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = sequences * positions
    parameters.n_batch = parameters.n_ubatch = BATCH
    parameters.n_seq_max = sequences
    parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
    return model, llama_cpp.llama_new_context_with_model(model, parameters)


SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


def decode(context, batch, entries, vocabulary):
    """Reads (token, position, sequence, wants logits) and gives the most likely next tokens of those that want them."""
    batch.n_tokens = len(entries)
    for index, (token, position, sequence, wanted) in enumerate(entries):
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = wanted
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama_decode failed")
    chosen = {}
    for index, (_, _, sequence, wanted) in enumerate(entries):
        if wanted:
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, index), shape=(vocabulary,))
            chosen[sequence] = int(logits.argmax())
    return chosen


def measure(context, batch, vocabulary, sequences, prompt, tokens):
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    prompts = [[random.randrange(vocabulary) for _ in range(prompt)] for _ in range(sequences)]
    start = time.perf_counter()
    entries = [
        (token, position, sequence, position == prompt - 1)
        for sequence, one in enumerate(prompts)
        for position, token in enumerate(one)
    ]
    last = {}
    for begin in range(0, len(entries), BATCH):
        last |= decode(context, batch, entries[begin : begin + BATCH], vocabulary)
    prefilled = time.perf_counter()
    for step in range(tokens - 1):
        entries = [(last[sequence], prompt + step, sequence, True) for sequence in range(sequences)]
        last = decode(context, batch, entries, vocabulary)
    end = time.perf_counter()
    return {
        "decode": sequences * (tokens - 1) / (end - prefilled),
        "prefill": sequences * prompt / (prefilled - start),
        "seconds": end - start,
    }


def main():
    file, sequences, positions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model, context = open_model(file, sequences, positions)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
    for line in sys.stdin:
        work = json.loads(line)
        answer = measure(context, batch, vocabulary, work["sequences"], work["prompt"], work["tokens"])
        print(json.dumps(answer), flush=True)


main()
