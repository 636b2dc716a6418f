//! How far a dataset has come: its row of `candle.dataset_conversions`, changed in the transaction of each batch.

use pgrx::PgSqlErrorCode;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::procedure::{execute, run};

/// A document to be stored.
pub(super) struct Row {
    pub(super) id: i64,
    pub(super) tokens: Vec<i32>,
    pub(super) mask: Option<Vec<bool>>,
}

/// A dataset that is being made.
pub(super) struct Conversion {
    name: String,
    model: String,
    /// Rows stored.
    pub(super) rows: i64,
    /// Id of the last of them.
    pub(super) last_id: Option<i64>,
    /// Counts over the rows stored.
    pub(super) counts: Counts,
}

/// What a report counts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Tokens for the model that the dataset was tokenized for before; None for texts.
    pub(super) tokens_before: Option<i64>,
    pub(super) tokens_after: i64,
    /// Rows whose text is not given back byte for byte.
    pub(super) inexact: i64,
    /// Rows whose mask had to cover more than it did.
    pub(super) masks_widened: i64,
}

impl Counts {
    /// Adds what one batch counted.
    pub(super) fn add(&mut self, other: Counts) {
        self.tokens_before = match (self.tokens_before, other.tokens_before) {
            (None, None) => None,
            (a, b) => Some(a.unwrap_or(0) + b.unwrap_or(0)),
        };
        self.tokens_after += other.tokens_after;
        self.inexact += other.inexact;
        self.masks_widened += other.masks_widened;
    }
}

impl Conversion {
    /// Goes on with the dataset of this name for this model if it is unfinished and comes from the same `source`, else begins
    /// it.
    ///
    /// # Errors
    /// 42710 where it is finished, or comes from something else; 40001 where another session begins it.
    pub(super) fn open(name: &str, model: &str, source: &str) -> Result<Self> {
        let key = || [name.into(), model.into()];
        let stored = execute(
            "SELECT FROM candle.dataset WHERE name = $1 AND model = $2 LIMIT 1",
            &key(),
        )? > 0;
        let statement = "SELECT source, finished, rows, last_id, tokens_before, tokens_after, inexact, masks_widened
            FROM candle.dataset_conversions WHERE name = $1 AND model = $2";
        let found = run(statement, &key(), |rows| {
            let Some(row) = rows.into_iter().next() else {
                return Ok(None);
            };
            let number = |column| Ok::<i64, pgrx::spi::Error>(row.get::<i64>(column)?.unwrap_or_default());
            let conversion = Self {
                name: name.to_string(),
                model: model.to_string(),
                rows: number(3)?,
                last_id: row.get::<i64>(4)?,
                counts: Counts {
                    tokens_before: row.get::<i64>(5)?,
                    tokens_after: number(6)?,
                    inexact: number(7)?,
                    masks_widened: number(8)?,
                },
            };
            let same = row.get::<String>(1)?.as_deref() == Some(source) && row.get::<bool>(2)? == Some(false);
            Ok(Some((conversion, same)))
        })?;
        match found {
            Some((conversion, true)) if stored || conversion.rows == 0 => Ok(conversion),
            _ if stored => {
                let code = PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT;
                Err(
                    Error::new(code, format!("dataset \"{name}\" exists already for model \"{model}\"")).hint(
                        "Give another name, or delete it first: DELETE FROM candle.dataset WHERE name = '…' AND model = '…'.",
                    ),
                )
            }
            // Its rows were deleted: nothing of it is left.
            _ => Self::begin(name, model, source),
        }
    }

    fn begin(name: &str, model: &str, source: &str) -> Result<Self> {
        // Not what another session has begun since: that has rows.
        execute(
            "DELETE FROM candle.dataset_conversions c WHERE name = $1 AND model = $2
                AND NOT EXISTS (SELECT FROM candle.dataset d WHERE d.name = c.name AND d.model = c.model)",
            &[name.into(), model.into()],
        )?;
        // Waits for a session that is about to begin it as well.
        let begun = execute(
            "INSERT INTO candle.dataset_conversions (name, model, source) VALUES ($1, $2, $3)
                ON CONFLICT (name, model) DO NOTHING",
            &[name.into(), model.into(), source.into()],
        )?;
        if begun == 0 {
            return Err(made_elsewhere(name, model));
        }
        Ok(Self {
            name: name.to_string(),
            model: model.to_string(),
            rows: 0,
            last_id: None,
            counts: Counts::default(),
        })
    }

    /// Stores a batch and notes how far that is.
    ///
    /// # Errors
    /// 40001 where another session makes the same dataset; 23505 for an id that comes again.
    pub(super) fn store(&mut self, rows: Vec<Row>, counts: Counts) -> Result<()> {
        let before = self.rows;
        self.rows += rows.len() as i64;
        self.last_id = rows.last().map(|row| row.id).or(self.last_id);
        self.counts.add(counts);
        // First, since it waits for another session's batch and finds it: rows of both would be the same.
        self.save(before, false)?;
        insert(&self.name, &self.model, rows)
    }

    /// Notes that all is stored.
    ///
    /// # Errors
    /// As [`store`](Self::store).
    pub(super) fn finish(&self) -> Result<()> {
        self.save(self.rows, true)
    }

    fn save(&self, before: i64, finished: bool) -> Result<()> {
        let statement = "UPDATE candle.dataset_conversions
            SET rows = $4, finished = $5, last_id = $6, tokens_before = $7, tokens_after = $8, inexact = $9,
                masks_widened = $10, updated_at = pg_catalog.clock_timestamp()
            WHERE name = $1 AND model = $2 AND rows = $3 AND NOT finished";
        let arguments: [DatumWithOid<'_>; 10] = [
            self.name.as_str().into(),
            self.model.as_str().into(),
            before.into(),
            self.rows.into(),
            finished.into(),
            self.last_id.into(),
            self.counts.tokens_before.into(),
            self.counts.tokens_after.into(),
            self.counts.inexact.into(),
            self.counts.masks_widened.into(),
        ];
        if execute(statement, &arguments)? == 1 {
            return Ok(());
        }
        Err(made_elsewhere(&self.name, &self.model))
    }
}

fn made_elsewhere(name: &str, model: &str) -> Error {
    let code = PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE;
    let message = format!("another session makes the dataset \"{name}\" for model \"{model}\"");
    Error::new(code, message).hint("Let one session make it at a time.")
}

fn insert(name: &str, model: &str, rows: Vec<Row>) -> Result<()> {
    let statement = "INSERT INTO candle.dataset (name, model, id, tokens, loss_mask) VALUES ($1, $2, $3, $4, $5)";
    let insert = |client: &mut pgrx::spi::SpiClient<'_>| {
        for row in rows {
            let arguments: [DatumWithOid<'_>; 5] = [
                name.into(),
                model.into(),
                row.id.into(),
                row.tokens.into(),
                row.mask.into(),
            ];
            client.update(statement, None, &arguments)?;
        }
        Ok::<(), pgrx::spi::Error>(())
    };
    Spi::connect_mut(insert).map_err(|error| {
        let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
        Error::new(code, "cannot store rows of a dataset").detail(error.to_string())
    })
}
