--
-- 1. Connect: a compute server becomes a foreign server, its tables a schema
--
CREATE EXTENSION candle_fdw;
CREATE SERVER compute FOREIGN DATA WRAPPER candle_fdw OPTIONS (endpoint :'endpoint');
CREATE SCHEMA llm;
IMPORT FOREIGN SCHEMA candle FROM SERVER compute INTO llm;
SELECT name, kind, description, threads, simd FROM llm.devices;

