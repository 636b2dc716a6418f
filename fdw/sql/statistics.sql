CREATE VIEW candle.stat_requests AS
SELECT id, kind, model, phase, done, total, pg_catalog.to_timestamp(started_at) AS started_at
FROM candle.stat_get_requests();
COMMENT ON VIEW candle.stat_requests IS 'Work that the compute server of candle_fdw.server does or has queued';

CREATE VIEW candle.stat_metrics AS
SELECT name, labels::jsonb AS labels, value FROM candle.stat_get_metrics();
COMMENT ON VIEW candle.stat_metrics IS 'What is measured of the compute server of candle_fdw.server and of its models';

CREATE VIEW candle.stat_models AS
SELECT m.name, m.architecture, m.dtype, m.device, m.status, m.parameters, m.memory_bytes, m.context_length, m.step,
       s.requests_running::bigint, s.requests_waiting::bigint, s.requests_finished::bigint,
       s.prompt_tokens::bigint, s.cached_tokens::bigint, s.generation_tokens::bigint, s.kv_cache_bytes::bigint,
       s.first_token_seconds / nullif(s.first_tokens, 0) * 1000 AS mean_time_to_first_token_ms,
       s.duration_seconds / nullif(s.durations, 0) * 1000 AS mean_duration_ms,
       s.loss
FROM candle.stat_get_models() AS m
LEFT JOIN (
    -- A model's adapters count as the model, but for the loss.
    SELECT g.labels::jsonb ->> 'model_name' AS name,
           sum(g.value) FILTER (WHERE g.name = 'candle_requests_running') AS requests_running,
           sum(g.value) FILTER (WHERE g.name = 'candle_requests_waiting') AS requests_waiting,
           sum(g.value) FILTER (WHERE g.name = 'candle_requests_finished_total') AS requests_finished,
           sum(g.value) FILTER (WHERE g.name = 'candle_prompt_tokens_total') AS prompt_tokens,
           sum(g.value) FILTER (WHERE g.name = 'candle_prefix_cache_hits_total') AS cached_tokens,
           sum(g.value) FILTER (WHERE g.name = 'candle_generation_tokens_total') AS generation_tokens,
           sum(g.value) FILTER (WHERE g.name = 'candle_kv_cache_bytes') AS kv_cache_bytes,
           sum(g.value) FILTER (WHERE g.name = 'candle_time_to_first_token_seconds_sum') AS first_token_seconds,
           sum(g.value) FILTER (WHERE g.name = 'candle_time_to_first_token_seconds_count') AS first_tokens,
           sum(g.value) FILTER (WHERE g.name = 'candle_request_duration_seconds_sum') AS duration_seconds,
           sum(g.value) FILTER (WHERE g.name = 'candle_request_duration_seconds_count') AS durations,
           max(g.value) FILTER (WHERE g.name = 'candle_training_loss'
                                  AND NOT pg_catalog.jsonb_exists(g.labels::jsonb, 'adapter')) AS loss
    FROM candle.stat_get_metrics() AS g
    GROUP BY 1
) AS s ON s.name = m.name;
COMMENT ON VIEW candle.stat_models IS
    'The models of the compute server of candle_fdw.server: what they are, what they do, and what they have done';

-- A view's functions run as whoever asks. Besides this, the foreign server has to be granted to the one who asks.
REVOKE ALL ON FUNCTION candle.stat_get_requests(), candle.stat_get_metrics(), candle.stat_get_models() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION candle.stat_get_requests(), candle.stat_get_metrics(), candle.stat_get_models() TO pg_monitor;
GRANT USAGE ON SCHEMA candle TO pg_monitor;
GRANT SELECT ON candle.stat_requests, candle.stat_metrics, candle.stat_models TO pg_monitor;
