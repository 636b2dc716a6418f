CREATE TABLE candle.training_runs (
    run text PRIMARY KEY,
    server text NOT NULL,
    model text NOT NULL,
    arguments jsonb NOT NULL,
    steps bigint NOT NULL,
    done bigint NOT NULL DEFAULT 0,
    base_step bigint NOT NULL,
    model_step bigint NOT NULL,
    epoch bigint NOT NULL DEFAULT 0,
    document bigint NOT NULL DEFAULT 0,
    token_offset bigint NOT NULL DEFAULT 0,
    data_digest text NOT NULL DEFAULT '',
    loss double precision,
    tokens bigint NOT NULL DEFAULT 0,
    started_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamp with time zone NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE candle.training_runs IS
    'Runs of candle.train: how far each has come, and where in its data it goes on';

CREATE TABLE candle.training_evaluations (
    run text NOT NULL REFERENCES candle.training_runs ON DELETE CASCADE,
    run_step bigint NOT NULL,
    model text NOT NULL,
    step bigint NOT NULL,
    loss double precision NOT NULL,
    perplexity double precision NOT NULL,
    tokens bigint NOT NULL,
    created_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run, run_step)
);
COMMENT ON TABLE candle.training_evaluations IS 'Losses that runs of candle.train measured on their eval_query';

CREATE TABLE candle.dataset (
    name text NOT NULL,
    model text NOT NULL,
    id bigint NOT NULL,
    tokens integer[] NOT NULL CHECK (array_ndims(tokens) = 1 AND array_position(tokens, NULL) IS NULL),
    loss_mask boolean[] CHECK (cardinality(loss_mask) = cardinality(tokens) AND array_position(loss_mask, NULL) IS NULL),
    PRIMARY KEY (name, model, id)
);
COMMENT ON TABLE candle.dataset IS 'Tokenized documents: of each dataset, for each model that it was tokenized for';

CREATE TABLE candle.dataset_conversions (
    name text NOT NULL,
    model text NOT NULL,
    source text NOT NULL,
    finished boolean NOT NULL DEFAULT false,
    rows bigint NOT NULL DEFAULT 0,
    last_id bigint,
    tokens_before bigint,
    tokens_after bigint NOT NULL DEFAULT 0,
    inexact bigint NOT NULL DEFAULT 0,
    masks_widened bigint NOT NULL DEFAULT 0,
    updated_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (name, model)
);
COMMENT ON TABLE candle.dataset_conversions IS
    'What candle.tokenize_dataset and candle.retokenize_dataset made, how far they have come, and what changed';

-- pg_dump writes what these tables hold; that they exist, the extension says.
SELECT pg_catalog.pg_extension_config_dump('candle.training_runs', '');
SELECT pg_catalog.pg_extension_config_dump('candle.training_evaluations', '');
SELECT pg_catalog.pg_extension_config_dump('candle.dataset', '');
SELECT pg_catalog.pg_extension_config_dump('candle.dataset_conversions', '');
