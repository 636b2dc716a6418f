--
-- 2. Train a small GPT on texts that every Postgres holds: what functions, operators and settings do
--
CREATE TABLE corpus AS
SELECT row_number() OVER (ORDER BY md5(text)) AS id, text
FROM (SELECT description FROM pg_description UNION SELECT short_desc FROM pg_settings) AS texts (text);
SELECT count(*) AS texts, sum(length(text)) AS characters FROM corpus;

-- a tokenizer (byte-level BPE) learnt from the table, and a model made from nothing
CALL candle.train_tokenizer('words', 'SELECT text FROM corpus', 1024);
INSERT INTO llm.models (name, seed, config) VALUES ('gpt', 1,
    '{"architecture": "gpt2", "layers": 4, "width": 128, "heads": 4, "context_length": 64,
      "tokenizer": "words", "beta2": 0.95, "max_grad_norm": 1}');
SELECT name, architecture, parameters, vocabulary, context_length, step, status FROM llm.models;
SELECT token_id, token FROM llm.tokens WHERE model = 'gpt' AND input = 'convert timestamp to text' ORDER BY position;

-- before training it babbles
SELECT prompt, completion FROM llm.generations
WHERE model = 'gpt' AND prompt = ANY (ARRAY['convert', 'Sets the', 'number of']) AND max_tokens = 12;

-- the texts as one stream of tokens, cut into rows of 64
CREATE TABLE samples AS
SELECT n / 64 AS id, array_agg(token_id ORDER BY n) AS tokens
FROM (SELECT token_id, row_number() OVER (ORDER BY id, position) - 1 AS n
      FROM corpus JOIN llm.tokens ON input = text || '<|endoftext|>' WHERE model = 'gpt') AS stream
GROUP BY n / 64;
SELECT count(*) AS rows, sum(cardinality(tokens)) AS tokens FROM samples;

-- an INSERT runs forward and backward; an INSERT into optimizer_steps applies AdamW. Chance is ln(1024) = 6.93
INSERT INTO llm.batches (model, tokens) SELECT 'gpt', tokens FROM samples ORDER BY id LIMIT 3 RETURNING loss, token_count;
SELECT parameter, shape, norm FROM llm.gradients WHERE model = 'gpt' AND parameter LIKE 'transformer.h.0.%' ORDER BY 1;
INSERT INTO llm.optimizer_steps (model, learning_rate) VALUES ('gpt', 0.0001) RETURNING step, loss, grad_norm;

-- 600 steps over 8 rows each, warming up and then slowing down; every step is committed
SELECT setseed(0.5);
DO $$
BEGIN
    FOR i IN 1..600 LOOP
        INSERT INTO llm.batches (model, tokens) SELECT 'gpt', tokens FROM samples ORDER BY random() LIMIT 8;
        INSERT INTO llm.optimizer_steps (model, learning_rate) VALUES ('gpt', 0.0015 * least(i / 50.0, 1.1 - i / 600.0));
        COMMIT;
    END LOOP;
END $$;
SELECT step, round(loss::numeric, 3) AS loss, round(grad_norm::numeric, 3) AS grad_norm, tokens,
       round(duration_ms::numeric) AS ms
FROM llm.optimizer_steps WHERE model = 'gpt' AND (step < 3 OR step % 60 = 1) ORDER BY step;

-- after training
SELECT prompt, completion FROM llm.generations
WHERE model = 'gpt' AND prompt = ANY (ARRAY['convert', 'Sets the', 'number of']) AND max_tokens = 12;
SELECT completion FROM generate_series(1, 4) AS seeds (s) JOIN llm.generations ON seed = s
WHERE model = 'gpt' AND prompt = 'Sets the maximum' AND temperature = 0.8 AND stop = ARRAY['<|endoftext|>'] AND max_tokens = 20;
-- what it finds likely, and what not: perplexity
SELECT input, round(exp(-avg(logprob))::numeric, 1) AS perplexity FROM llm.token_scores
WHERE model = 'gpt' AND input = ANY (ARRAY['greater than or equal', 'equal than or greater', 'colourless green ideas'])
GROUP BY input ORDER BY perplexity;

