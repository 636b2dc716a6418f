"""Uses the compute server as OpenAI's own Python package does.

    openai_client.py http://HOST:PORT/v1 TOKEN

The server holds the model `chat`, which has a chat template, and its adapter `style`. Needs the package openai. Exits with 0
when everything answered as it should.
"""

import sys

import openai

# Short, for a context of 48 tokens that are letters.
MESSAGES = [{"role": "system", "content": "ok"}, {"role": "user", "content": "hi?"}]


def client(token=None, **options):
    return openai.OpenAI(base_url=sys.argv[1], api_key=token or sys.argv[2], max_retries=0, timeout=60, **options)


def models(api):
    assert [model.id for model in api.models.list()] == ["chat", "chat:style"]
    assert api.models.retrieve("chat:style").owned_by == "candle"


def chat(api):
    answer = api.chat.completions.create(model="chat", messages=MESSAGES, max_completion_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("length", "stop")
    usage = answer.usage
    assert usage.completion_tokens <= 12 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens

    stream = api.chat.completions.create(
        model="chat",
        messages=MESSAGES,
        max_completion_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content, (text, choice.message.content)
    assert chunks[0].choices[0].delta.role == "assistant"
    # All but what the cache knew of the prompt, which it did not the first time.
    streamed = chunks[-1].usage
    assert not chunks[-1].choices and streamed.prompt_tokens_details.cached_tokens >= usage.prompt_tokens // 16 * 16 - 16
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason

    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    same = api.chat.completions.create(model="chat", messages=parts, max_tokens=12, temperature=0)
    assert same.choices[0].message.content == choice.message.content


def several(api):
    def ask(**options):
        options = {"model": "chat", "messages": MESSAGES, "max_tokens": 8, "temperature": 1, **options}
        return [choice.message.content for choice in api.chat.completions.create(**options).choices]

    three = ask(n=3, seed=5)
    assert three == ask(n=3, seed=5) and len(set(three)) > 1, three
    assert three == [ask(seed=seed)[0] for seed in (5, 6, 7)]
    # An adapter that has not been trained answers as its model does.
    assert ask(seed=5) == ask(seed=5, model="chat:style")


def logprobs(api):
    answer = api.chat.completions.create(
        model="chat", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob
        assert bytes(token.bytes).decode() == token.token
    forced = api.chat.completions.create(
        model="chat", messages=MESSAGES, max_tokens=3, temperature=0, logit_bias={"9": 100}
    )
    assert forced.choices[0].message.content == "bbb", forced


def completions(api):
    answer = api.completions.create(model="chat", prompt=["a fox", "a dog"], n=2, max_tokens=5, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text == "".join(choice.logprobs.tokens) for choice in answer.choices)
    text = answer.choices[0].text
    streamed = api.completions.create(model="chat", prompt="a fox", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    stop = text[1]
    stopped = api.completions.create(model="chat", prompt="a fox", max_tokens=5, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)] and stopped.choices[0].finish_reason == "stop"


def response_format(api):
    def ask(form, **options):
        options = {"model": "chat", "messages": MESSAGES, "max_tokens": 12, "temperature": 1, **options}
        return api.chat.completions.create(response_format=form, **options).choices[0]

    # The model knows letters and little else, so that a choice between words is all that it can be held to.
    form = {"type": "regex", "regex": "yes|no"}
    answers = [ask(form, seed=seed) for seed in range(4)]
    assert all(answer.message.content in ("yes", "no") and answer.finish_reason == "stop" for answer in answers), answers
    assert ask({"type": "text"}, seed=1).message.content
    bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "nonsense"}}}
    expect(openai.BadRequestError, lambda: ask(bad))
    expect(openai.BadRequestError, lambda: ask({"type": "nonsense"}))


def embeddings(api):
    one = api.embeddings.create(model="chat", input="a fox")
    (vector,) = [embedding.embedding for embedding in one.data]
    assert abs(sum(x * x for x in vector) - 1) < 1e-3 and one.usage.prompt_tokens == len("a fox")
    plain = api.embeddings.create(model="chat", input="a fox", encoding_format="float").data[0].embedding
    assert all(abs(x - y) < 1e-6 for x, y in zip(plain, vector, strict=True))
    several = api.embeddings.create(model="chat", input=["a dog", "a fox", "fox"])
    assert [embedding.index for embedding in several.data] == [0, 1, 2]
    assert all(abs(x - y) < 1e-6 for x, y in zip(several.data[1].embedding, vector, strict=True))
    assert several.usage.total_tokens == len("a dog") + len("a fox") + len("fox")
    expect(openai.BadRequestError, lambda: api.embeddings.create(model="chat", input="x", dimensions=2), "dimensions")
    expect(openai.NotFoundError, lambda: api.embeddings.create(model="no", input="x"), "model", "model_not_found")


def leaves_early(api):
    with api.completions.create(model="chat", prompt="a", max_tokens=40, stream=True) as stream:
        for _ in stream:
            break


def expect(kind, call, param=None, code=None):
    try:
        call()
    except kind as error:
        assert (error.param, error.code) == (param, code), (error.param, error.code, error)
        return error
    raise AssertionError(f"no {kind.__name__}")


def errors(api):
    def ask(**options):
        return api.chat.completions.create(**{"model": "chat", "messages": MESSAGES, "max_tokens": 2, **options})

    expect(openai.NotFoundError, lambda: ask(model="nobody"), "model", "model_not_found")
    expect(openai.NotFoundError, lambda: api.models.retrieve("nobody"), "model", "model_not_found")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    expect(openai.BadRequestError, lambda: ask(tools=tools), "tools")
    expect(openai.BadRequestError, lambda: ask(extra_body={"colour": "red"}), "colour")
    expect(openai.BadRequestError, lambda: ask(n=0), "n")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]}]
    expect(openai.BadRequestError, lambda: ask(messages=image), "messages[0].content[0].type")
    assert "temperature" in str(expect(openai.BadRequestError, lambda: ask(temperature=-1)))
    expect(openai.AuthenticationError, lambda: client("wrong").models.list(), None, "invalid_api_key")


def main():
    api = client()
    for test in (models, chat, several, logprobs, completions, response_format, embeddings, leaves_early, errors):
        test(api)


main()
