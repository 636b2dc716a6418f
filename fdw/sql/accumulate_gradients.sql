CREATE FUNCTION candle.accumulate_gradients(model text, from_schema text, to_schema text) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $accumulate$
#variable_conflict use_variable
DECLARE
    added bigint;
BEGIN
    IF model IS NULL OR from_schema IS NULL OR to_schema IS NULL THEN
        RAISE EXCEPTION 'model, from_schema and to_schema must not be NULL'
            USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF from_schema = to_schema THEN
        RAISE EXCEPTION 'from_schema and to_schema are both "%"', from_schema
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'The gradient of one server is added to that of another.';
    END IF;
    -- All rows of a model's gradient have the same weight; without data they cost next to nothing.
    EXECUTE format('SELECT g.tokens FROM %I.gradients AS g WHERE g.model = $1 LIMIT 1', from_schema)
        INTO added USING model;
    IF added IS NULL THEN
        RETURN 0;
    END IF;
    EXECUTE format(
        'INSERT INTO %I.gradients '
        '(model, parameter, chunk, shape, dtype, elements, data, tokens, micro_batches, loss) '
        'SELECT g.model, g.parameter, g.chunk, g.shape, g.dtype, g.elements, g.data, g.tokens, g.micro_batches, g.loss '
        'FROM %I.gradients AS g WHERE g.model = $1', to_schema, from_schema)
        USING model;
    RETURN added;
END
$accumulate$;

COMMENT ON FUNCTION candle.accumulate_gradients IS
    'Adds the gradient of a model on one server to that of the model of the same name on another';
