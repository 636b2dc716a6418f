//! Procedures that commit as they go, and cursors that outlive their commits. As plpgsql does it: a non-atomic SPI
//! connection, and portals that are pinned, which PostgreSQL holds over a commit and drops after an error.
#![allow(unsafe_code)]

use std::ffi::CString;

use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::SpiTupleTable;
use pgrx::{FromDatum, PgSqlErrorCode, pg_sys};

use crate::error::{Error, Result};

/// A running procedure.
pub(crate) struct Procedure {
    commits: bool,
    /// Lives as long as the procedure.
    memory: pg_sys::MemoryContext,
    /// Holds what one round of the procedure's work needs.
    round: pg_sys::MemoryContext,
}

/// A memory context within the present one.
fn new_memory(parent: pg_sys::MemoryContext) -> pg_sys::MemoryContext {
    // SAFETY: the parent is valid, and the name a constant.
    unsafe {
        pg_sys::AllocSetContextCreateInternal(
            parent,
            c"candle_fdw procedure".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        )
    }
}

impl Procedure {
    /// Enters a procedure, which may commit unless its caller is in a transaction block, a function or an exception clause.
    ///
    /// # Safety
    /// `call` is what PostgreSQL called the procedure with.
    pub(crate) unsafe fn enter(call: pg_sys::FunctionCallInfo) -> Result<Self> {
        // SAFETY: the caller's promise; a context that has the tag of a CallContext is one.
        let commits = unsafe {
            let context = (*call).context;
            !context.is_null()
                && (*context).type_ == pg_sys::NodeTag::T_CallContext
                && !(*context.cast::<pg_sys::CallContext>()).atomic
                && !pg_sys::IsSubTransaction()
        };
        let options = if commits { pg_sys::SPI_OPT_NONATOMIC as i32 } else { 0 };
        // SAFETY: finished when `self` is dropped, or by PostgreSQL after an error.
        if unsafe { pg_sys::SPI_connect_ext(options) } != pg_sys::SPI_OK_CONNECT as i32 {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
                "cannot connect to SPI",
            ));
        }
        // SAFETY: reads a variable of the backend: the connection's own context.
        let memory = unsafe { pg_sys::CurrentMemoryContext };
        Ok(Self {
            commits,
            memory,
            round: new_memory(memory),
        })
    }

    /// Does one round of the procedure's work and frees the memory that PostgreSQL's functions took for it.
    pub(crate) fn round<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        // SAFETY: the context lives as long as `self`; what work gives back is not in it.
        unsafe {
            let before = pg_sys::MemoryContextSwitchTo(self.round);
            let result = work();
            pg_sys::MemoryContextSwitchTo(before);
            pg_sys::MemoryContextReset(self.round);
            result
        }
    }

    /// Whether [`commit`](Self::commit) commits.
    pub(crate) fn commits(&self) -> bool {
        self.commits
    }

    /// Commits and begins the next transaction, where the procedure may; else nothing.
    pub(crate) fn commit(&self) {
        if self.commits {
            // SAFETY: the connection is not atomic and no subtransaction is open. What follows needs a snapshot, as it had
            // before.
            unsafe {
                pg_sys::SPI_commit();
                pg_sys::EnsurePortalSnapshotExists();
            }
        }
    }
}

impl Drop for Procedure {
    fn drop(&mut self) {
        // After an error PostgreSQL finishes the connection.
        if !std::thread::panicking() {
            // SAFETY: connected in `enter`, and everything connected since has finished.
            unsafe { pg_sys::SPI_finish() };
        }
    }
}

/// Runs a statement and reads its rows.
pub(crate) fn run<T>(
    statement: &str,
    arguments: &[DatumWithOid<'_>],
    read: impl FnOnce(SpiTupleTable<'_>) -> std::result::Result<T, pgrx::spi::Error>,
) -> Result<T> {
    Spi::connect_mut(|client| read(client.update(statement, None, arguments)?)).map_err(|error| {
        let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
        Error::new(code, "a statement of candle's own failed").detail(error.to_string())
    })
}

/// Runs a statement; how many rows it changed or found.
pub(crate) fn execute(statement: &str, arguments: &[DatumWithOid<'_>]) -> Result<usize> {
    run(statement, arguments, |rows| Ok(rows.len()))
}

/// A query given as text, for a place in parentheses.
pub(crate) fn subquery(query: &str) -> String {
    // A comment at its end must not swallow the parenthesis.
    format!("({}\n)", query.trim().trim_end_matches(';'))
}

/// A query whose rows are read over several transactions, in bounded memory.
pub(crate) struct Cursor {
    portal: pg_sys::Portal,
    /// Holds what the values of one fetch need.
    scratch: pg_sys::MemoryContext,
}

/// A row of a cursor.
pub(crate) struct CursorRow {
    tuple: pg_sys::HeapTuple,
    descriptor: pg_sys::TupleDesc,
}

impl CursorRow {
    /// The value of a column, from 1, whose type is that of `T`. None for NULL.
    pub(crate) fn get<T: FromDatum>(&self, column: i32) -> Option<T> {
        let mut null = false;
        // SAFETY: the tuple is of this descriptor, and the column's type is T's: the queries cast.
        unsafe {
            let datum = pg_sys::SPI_getbinval(self.tuple, self.descriptor, column, &mut null);
            T::from_datum(datum, null)
        }
    }
}

impl Cursor {
    /// Opens a query of the running procedure.
    pub(crate) fn open(procedure: &Procedure, query: &str) -> Result<Self> {
        let query = CString::new(query).map_err(|_| Error::bad_value("the query contains a NUL byte"))?;
        // SAFETY: a NUL-terminated query without arguments; the portal lives until it is closed, and the context as long as
        // the procedure's connection.
        unsafe {
            let portal = pg_sys::SPI_cursor_open_with_args(
                std::ptr::null(),
                query.as_ptr(),
                0,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                std::ptr::null(),
                false,
                pg_sys::CURSOR_OPT_NO_SCROLL as i32,
            );
            pg_sys::PinPortal(portal);
            let scratch = new_memory(procedure.memory);
            Ok(Self { portal, scratch })
        }
    }

    /// Passes over rows.
    pub(crate) fn skip(&mut self, count: i64) {
        // SAFETY: the portal is open.
        unsafe { pg_sys::SPI_cursor_move(self.portal, true, count) };
    }

    /// The next rows, at most `count`; none at the end.
    pub(crate) fn fetch<T>(&mut self, count: i64, read: impl Fn(&CursorRow) -> Result<T>) -> Result<Vec<T>> {
        // SAFETY: the portal is open; the table of its rows is valid until it is freed, and the values that were read own
        // what they hold.
        unsafe {
            pg_sys::SPI_cursor_fetch(self.portal, true, count);
            let (table, found) = (pg_sys::SPI_tuptable, pg_sys::SPI_processed as usize);
            let before = pg_sys::MemoryContextSwitchTo(self.scratch);
            let rows = (0..found).map(|index| {
                read(&CursorRow {
                    tuple: *(*table).vals.add(index),
                    descriptor: (*table).tupdesc,
                })
            });
            let rows = rows.collect();
            pg_sys::MemoryContextSwitchTo(before);
            pg_sys::MemoryContextReset(self.scratch);
            pg_sys::SPI_freetuptable(table);
            rows
        }
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        // After an error PostgreSQL drops pinned portals.
        if !std::thread::panicking() {
            // SAFETY: the portal was pinned in `open` and is open; the context was made there.
            unsafe {
                pg_sys::UnpinPortal(self.portal);
                pg_sys::SPI_cursor_close(self.portal);
                pg_sys::MemoryContextDelete(self.scratch);
            }
        }
    }
}
