--
-- 4. A pretrained model: SmolLM2-135M-Instruct from a GGUF file, served in its 4-bit weights
--
INSERT INTO llm.models (name, source) VALUES ('smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf');
SELECT architecture, dtype, parameters, memory_bytes, vocabulary, context_length FROM llm.models WHERE name = 'smollm2';

-- a question, through the model's own chat template
SELECT completion, finish_reason, prompt_tokens, completion_tokens, round(time_to_first_token_ms) AS first_ms, round(duration_ms) AS ms
FROM llm.generations
WHERE model = 'smollm2' AND max_tokens = 48
  AND messages = '[{"role": "user", "content": "What is the capital of France?"}]';

-- tokens as rows, each delivered as soon as it is there; closing the cursor would stop the generation
BEGIN;
DECLARE answer CURSOR FOR SELECT position, token, logprob FROM llm.generation_tokens
WHERE model = 'smollm2' AND max_tokens = 64
  AND messages = '[{"role": "user", "content": "Name three colours."}]';
FETCH 6 FROM answer;
FETCH 6 FROM answer;
CLOSE answer;
COMMIT;

-- one statement answers for a whole table
CREATE TABLE questions (id int, question text);
INSERT INTO questions VALUES (1, 'What is the largest planet?'), (2, 'Which animal says meow?'), (3, 'What colour is the sky?');
SELECT id, question, completion AS answer
FROM questions JOIN llm.generations
  ON messages = jsonb_build_array(jsonb_build_object('role', 'user', 'content', question || ' Answer in one short sentence.'))
WHERE model = 'smollm2' AND max_tokens = 32 ORDER BY id;


-- a LoRA adapter over the 4-bit weights learns one fact; only the adapter is trained, the model stays as it is
INSERT INTO llm.adapters (model, name, rank, target_modules) VALUES ('smollm2', 'fact', 8, '{all-linear}')
RETURNING rank, alpha, parameters, status;
CREATE TABLE facts AS
SELECT array_agg(token_id ORDER BY position) AS tokens FROM llm.tokens
WHERE model = 'smollm2' AND input = 'The elephant of PostgreSQL is called Slonik, and he likes rows of peanuts.';
DO $$
BEGIN
    FOR i IN 1..12 LOOP
        INSERT INTO llm.batches (model, adapter, tokens) SELECT 'smollm2', 'fact', tokens FROM facts;
        INSERT INTO llm.optimizer_steps (model, adapter, learning_rate) VALUES ('smollm2', 'fact', 0.002);
        COMMIT;
    END LOOP;
END $$;
SELECT step, round(loss::numeric, 3) AS loss FROM llm.optimizer_steps
WHERE model = 'smollm2' AND adapter = 'fact' AND step IN (1, 6, 12) ORDER BY step;
SELECT adapter, candle.generate('smollm2', 'The elephant of PostgreSQL', max_tokens => 14, adapter => adapter)
FROM (VALUES (NULL), ('fact')) AS choices (adapter);
-- a checkpoint of an adapter is a folder that PEFT opens
INSERT INTO llm.checkpoints (model, adapter) VALUES ('smollm2', 'fact') RETURNING adapter, step, bytes, path;
