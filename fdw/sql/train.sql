CREATE PROCEDURE candle.train(
    model text,
    query text,
    steps integer,
    batch_size integer DEFAULT 8,
    sequence_length integer DEFAULT NULL,
    learning_rate double precision DEFAULT NULL,
    seed bigint DEFAULT 0
)
LANGUAGE plpgsql AS $train$
#variable_conflict use_variable
DECLARE
    tokens_per_sequence integer;
    tokens_per_step integer;
    separator integer[];
    buffer integer[] := '{}';
    body text;
    texts bigint;
    epoch bigint := 0;
    taken integer := 0;
    step bigint;
    loss double precision;
    -- Inside BEGIN … COMMIT the caller decides; elsewhere every step is kept once it is taken.
    commits boolean := candle.can_commit();
BEGIN
    IF model IS NULL OR query IS NULL OR coalesce(steps, 0) < 1 OR coalesce(batch_size, 0) < 1
        OR coalesce(sequence_length, 1) < 1 THEN
        RAISE EXCEPTION 'model and query must be given, and steps, batch_size and sequence_length be at least 1'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    tokens_per_sequence := candle.context_length(model);
    -- Checked here, since a step that can never be taken would first gather its tokens.
    IF sequence_length > tokens_per_sequence THEN
        RAISE EXCEPTION 'sequence_length is %, more than the context length % of model "%"',
            sequence_length, tokens_per_sequence, model
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    tokens_per_sequence := coalesce(sequence_length, tokens_per_sequence);
    tokens_per_step := tokens_per_sequence * batch_size;
    -- Texts are told apart by the end-of-text token, where the tokenizer has it.
    separator := candle.tokenize(model, '<|endoftext|>');
    IF cardinality(separator) <> 1 THEN
        separator := '{}';
    END IF;
    WHILE taken < steps LOOP
        texts := 0;
        -- Another order with every pass over the texts, the same one for the same seed.
        FOR body IN EXECUTE format(
            E'SELECT t.body::text FROM (%s\n) AS t(body) WHERE t.body IS NOT NULL AND t.body::text <> %L '
            'ORDER BY hashtextextended(t.body::text, %s)',
            rtrim(query, E'; \t\n'), '', seed + epoch)
        LOOP
            texts := texts + 1;
            buffer := buffer || candle.tokenize(model, body) || separator;
            WHILE taken < steps AND cardinality(buffer) >= tokens_per_step LOOP
                SELECT s.step, s.loss INTO step, loss
                FROM candle.train_step(model, buffer[:tokens_per_step], tokens_per_sequence, learning_rate) AS s;
                buffer := buffer[tokens_per_step + 1:];
                taken := taken + 1;
                IF commits THEN
                    COMMIT;
                END IF;
                IF taken = 1 OR taken = steps OR taken % greatest(1, steps / 10) = 0 THEN
                    RAISE NOTICE 'step % (% of %): loss %', step, taken, steps, round(loss::numeric, 4);
                END IF;
            END LOOP;
            EXIT WHEN taken >= steps;
        END LOOP;
        IF texts = 0 THEN
            RAISE EXCEPTION 'the query gives no texts to train on' USING ERRCODE = 'no_data_found';
        END IF;
        epoch := epoch + 1;
    END LOOP;
END
$train$;

COMMENT ON PROCEDURE candle.train IS
    'Trains a model on the first column of a query, one optimizer step after the other';
