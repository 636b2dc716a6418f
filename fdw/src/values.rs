//! Values between PostgreSQL's datums and the protocol: read by the type that a datum really has, written in the type
//! that the column really has, converted through text where the two differ, never reinterpreted.

mod read;
mod write;

pub(crate) use read::{element_type, is_text, read, read_elements, type_name};
pub(crate) use write::write;

use pgrx::pg_sys;
use tonic::codegen::Bytes;

use crate::error::{Error, Result};

/// Type of a relation's column, independent of the type that a hand-made foreign table gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Jsonb,
    Boolean,
    Int,
    BigInt,
    Real,
    Double,
    IntArray,
    RealArray,
    TextArray,
    Bytea,
    Timestamp,
}

impl Kind {
    /// The SQL type that IMPORT FOREIGN SCHEMA gives the column.
    pub(crate) fn sql(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Jsonb => "jsonb",
            Self::Boolean => "boolean",
            Self::Int => "integer",
            Self::BigInt => "bigint",
            Self::Real => "real",
            Self::Double => "double precision",
            Self::IntArray => "integer[]",
            Self::RealArray => "real[]",
            Self::TextArray => "text[]",
            Self::Bytea => "bytea",
            Self::Timestamp => "timestamp with time zone",
        }
    }
}

/// A value of a row or an input.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// SQL's NULL.
    Null,
    /// The input as it was given; NULL where none was.
    Echo,
    Bool(bool),
    Int(i64),
    Real(f32),
    Double(f64),
    /// Text, or JSON as text.
    Text(String),
    Ints(Vec<i64>),
    /// Little-endian f32, as the server sends them.
    Reals(Bytes),
    Texts(Vec<String>),
    Bytes(Bytes),
    /// Microseconds since 2000-01-01 00:00 UTC, PostgreSQL's own count.
    Timestamp(i64),
}

impl Value {
    /// A text that is NULL when empty, as the protocol has it for absent ones.
    pub(crate) fn text_or_null(text: String) -> Self {
        if text.is_empty() { Self::Null } else { Self::Text(text) }
    }

    /// An unsigned count; what exceeds PostgreSQL's bigint is capped.
    pub(crate) fn count(count: u64) -> Self {
        Self::Int(i64::try_from(count).unwrap_or(i64::MAX))
    }

    /// A point in time.
    pub(crate) fn time(time: Option<prost_types::Timestamp>) -> Self {
        /// Seconds from the Unix epoch to PostgreSQL's.
        const EPOCH: i64 = 946_684_800;
        time.map_or(Self::Null, |time| {
            Self::Timestamp((time.seconds - EPOCH).saturating_mul(1_000_000) + i64::from(time.nanos) / 1000)
        })
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

macro_rules! value_from {
    ($($source:ty => $variant:ident),*) => {$(
        impl From<$source> for Value {
            fn from(value: $source) -> Self {
                Self::$variant(value.into())
            }
        }
    )*};
}
value_from!(bool => Bool, i32 => Int, i64 => Int, u32 => Int, f32 => Real, f64 => Double, String => Text, &str => Text);

/// Type of a table's column or of an input expression.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SqlType {
    /// Type as declared.
    pub(crate) oid: pg_sys::Oid,
    /// The type beneath a domain; else the same.
    pub(crate) base: pg_sys::Oid,
    /// Type modifier, -1 for none.
    pub(crate) modifier: i32,
}

impl SqlType {
    /// Looks up the type beneath `oid`.
    pub(crate) fn new(oid: pg_sys::Oid, modifier: i32) -> Self {
        Self {
            oid,
            base: read::base_type(oid),
            modifier,
        }
    }

    /// Refuses a column of a type that cannot hold what the relation's column holds.
    pub(crate) fn check(self, column: &str, kind: Kind) -> Result<()> {
        let category = read::category(self.base);
        let fits = match kind {
            Kind::Text => category == b'S',
            Kind::Jsonb => self.base == pg_sys::JSONBOID || self.base == pg_sys::JSONOID || category == b'S',
            Kind::Boolean => category == b'B',
            Kind::Int | Kind::BigInt | Kind::Real | Kind::Double => category == b'N',
            Kind::IntArray | Kind::RealArray => {
                category == b'A' && read::category(read::element_type(self.base)) == b'N'
            }
            Kind::TextArray => category == b'A' && read::category(read::element_type(self.base)) == b'S',
            Kind::Bytea => self.base == pg_sys::BYTEAOID,
            Kind::Timestamp => self.base == pg_sys::TIMESTAMPTZOID,
        };
        if fits {
            return Ok(());
        }
        let code = pgrx::PgSqlErrorCode::ERRCODE_FDW_INVALID_DATA_TYPE;
        Err(Error::new(
            code,
            format!(
                "column \"{column}\" has type {}, which cannot hold its values",
                read::type_name(self.oid)
            ),
        )
        .hint(format!("Declare it {}, as IMPORT FOREIGN SCHEMA does.", kind.sql())))
    }
}
