//! `candle.accumulate_gradients`: distributed accumulation, in SQL over the tables `gradients` of two schemas.

use pgrx::prelude::*;

extension_sql_file!("../../sql/accumulate_gradients.sql", name = "accumulate_gradients");
