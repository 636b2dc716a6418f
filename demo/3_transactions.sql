--
-- 3. Checkpoint, ROLLBACK, restore
--
INSERT INTO llm.checkpoints (model, tag) VALUES ('gpt', 'good') RETURNING model, step, tag, bytes, path;

CREATE VIEW fingerprint AS
SELECT model, md5(string_agg(md5(data), '' ORDER BY parameter, chunk)) AS weights FROM llm.parameters GROUP BY model;
SELECT weights FROM fingerprint WHERE model = 'gpt';

-- a step far too large, tried inside a transaction
BEGIN;
INSERT INTO llm.batches (model, tokens) SELECT 'gpt', tokens FROM samples ORDER BY id LIMIT 4;
INSERT INTO llm.optimizer_steps (model, learning_rate) VALUES ('gpt', 10);
SELECT step FROM llm.models WHERE name = 'gpt';
SELECT completion AS ruined FROM llm.generations WHERE model = 'gpt' AND prompt = 'convert' AND max_tokens = 8;
ROLLBACK;

-- nothing happened
SELECT step FROM llm.models WHERE name = 'gpt';
SELECT weights FROM fingerprint WHERE model = 'gpt';

-- unload the model, and restore it under another name
DELETE FROM llm.models WHERE name = 'gpt';
INSERT INTO llm.models (name, source)
SELECT 'restored', format('checkpoint://%s/%s', model, step) FROM llm.checkpoints WHERE tag = 'good';
SELECT name, step FROM llm.models;
SELECT weights FROM fingerprint WHERE model = 'restored';
SELECT completion FROM llm.generations WHERE model = 'restored' AND prompt = 'convert' AND max_tokens = 12;

