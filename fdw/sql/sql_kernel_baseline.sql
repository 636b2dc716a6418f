CREATE FUNCTION candle.sql_kernel_baseline(kernel text) RETURNS double precision
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $baseline$
DECLARE
    -- Operands, made before the clock starts: 48 x 48, or 32 rows of 768.
    square real[] := (SELECT array_agg(((n * 7919 % 2003) / 2003.0)::real ORDER BY n) FROM generate_series(1, 2304) n);
    x real[] := (SELECT array_agg(((n * 7919 % 2003) / 2003.0)::real ORDER BY n) FROM generate_series(1, 24576) n);
    -- 10^9 operations or bytes of the query.
    amount double precision;
    query text;
    started timestamptz;
    elapsed double precision;
    fastest double precision := 'infinity';
    result double precision;
BEGIN
    CASE kernel
        WHEN 'matmul' THEN
            amount := 2 * 48 ^ 3 / 1e9;
            query := 'WITH m AS (SELECT v, ((n - 1) / 48)::int AS i, ((n - 1) % 48)::int AS j
                                   FROM unnest($1) WITH ORDINALITY AS u (v, n))
                      SELECT max(p) FROM (SELECT sum(a.v * b.v) AS p FROM m a JOIN m b ON a.j = b.i GROUP BY a.i, b.j) s';
        WHEN 'linear' THEN
            amount := 4 * 24576 / 1e9;
            query := 'SELECT max(p) FROM
                          (SELECT sum(w.v * y.v) AS p FROM unnest($2) WITH ORDINALITY AS w (v, n)
                           JOIN unnest($2[1:768]) WITH ORDINALITY AS y (v, n) ON y.n = (w.n - 1) % 768 + 1
                           GROUP BY (w.n - 1) / 768) s';
        WHEN 'attention_forward' THEN
            -- Causal, 32 tokens, one head of 48: two products over half of the square of tokens.
            amount := 2 * 32 ^ 2 * 48 / 1e9;
            query := 'WITH m AS (SELECT v, ((n - 1) / 48)::int AS i, ((n - 1) % 48)::int AS j
                                   FROM unnest($1[1:1536]) WITH ORDINALITY AS u (v, n)),
                           s AS (SELECT a.i AS q, b.i AS k, exp(0.125 * sum(a.v * b.v)) AS e
                                   FROM m a JOIN m b ON a.j = b.j AND b.i <= a.i GROUP BY a.i, b.i),
                           z AS (SELECT q, sum(e) AS total FROM s GROUP BY q)
                      SELECT max(o) FROM
                          (SELECT sum(s.e / z.total * m.v) AS o FROM s JOIN z USING (q) JOIN m ON m.i = s.k
                           GROUP BY s.q, m.j) t';
        WHEN 'gelu_tanh' THEN
            amount := 8 * 24576 / 1e9;
            query := 'SELECT max(0.5::real * v * (1 + tanh(0.7978845608 * (v + 0.044715::real * v * v * v))))
                      FROM unnest($2) v';
        WHEN 'silu_gate' THEN
            amount := 12 * 24576 / 1e9;
            query := 'SELECT max(up * gate / (1 + exp(-gate))) FROM unnest($2, $2) AS u (gate, up)';
        WHEN 'rms_norm' THEN
            amount := 8 * 24576 / 1e9;
            query := 'SELECT max(v / sqrt(square + 1e-5)) FROM
                          (SELECT v, avg(v * v) OVER (PARTITION BY (n - 1) / 768) AS square
                           FROM unnest($2) WITH ORDINALITY AS u (v, n)) t';
        WHEN 'layer_norm' THEN
            amount := 8 * 24576 / 1e9;
            query := 'SELECT max((v - mean) / sqrt(variance + 1e-5)) FROM
                          (SELECT v, avg(v) OVER w AS mean, var_pop(v) OVER w AS variance
                           FROM unnest($2) WITH ORDINALITY AS u (v, n) WINDOW w AS (PARTITION BY (n - 1) / 768)) t';
        WHEN 'adamw' THEN
            amount := 28 * 24576 / 1e9;
            query := 'SELECT max(p * 0.99999::real - 0.001::real * m / (sqrt(v) + 1e-8)) + max(m) + max(v) FROM
                          (SELECT p, m + 0.1::real * (g - m) AS m, 0.999::real * v + 0.001::real * g * g AS v
                           FROM unnest($2, $2, $2, $2) AS u (p, m, v, g)) t';
        WHEN 'sum_of_squares' THEN
            amount := 4 * 24576 / 1e9;
            query := 'SELECT sum(v * v) FROM unnest($2) v';
        ELSE
            RETURN NULL;
    END CASE;
    FOR run IN 1..2 LOOP
        started := clock_timestamp();
        EXECUTE query INTO result USING square, x;
        elapsed := extract(epoch FROM clock_timestamp() - started);
        fastest := least(fastest, greatest(elapsed, 1e-6));
    END LOOP;
    RETURN amount / fastest;
END
$baseline$;
