//! The rows of the outer plan, read ahead: each with the calls that it gives the inputs of.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::rc::Rc;

use pgrx::pg_sys;

use crate::error::Result;
use crate::scan::inputs::{Binding, Combinations, Echo};
use crate::scan::state::{Begin, Source};
use crate::table::Table;

/// A row of the outer plan.
pub(super) struct OuterRow {
    /// Holds the row and what it gives. Freed with the executor's memory, unless it is before.
    memory: pg_sys::MemoryContext,
    pub(super) tuple: pg_sys::MinimalTuple,
    /// Whether it has found a match.
    pub(super) matched: Cell<bool>,
    /// Calls for it that have begun and not ended.
    calls: Cell<usize>,
    /// Whether all of them have begun.
    begun: Cell<bool>,
}

impl OuterRow {
    /// A call for it begins.
    fn begin_call(&self, is_last: bool) {
        self.calls.update(|calls| calls + 1);
        self.begun.set(is_last);
    }

    /// A call for it has ended; true when it was the last one to end.
    pub(super) fn end_call(&self) -> bool {
        self.calls.update(|calls| calls - 1);
        self.begun.get() && self.calls.get() == 0
    }

    /// Gives the memory back.
    ///
    /// # Safety
    /// Nothing of the row is used any more, and the executor's memory has not been freed.
    pub(super) unsafe fn free(&self) {
        // SAFETY: the caller's promise.
        unsafe { pg_sys::MemoryContextDelete(self.memory) }
    }
}

/// What comes back with the rows of a call.
#[derive(Clone)]
pub(super) struct Tag {
    pub(super) row: Rc<OuterRow>,
    pub(super) echo: Echo,
}

/// How far the outer plan has been read.
pub(super) struct OuterRows {
    pub(super) plan: *mut pg_sys::PlanState,
    /// The rows' memory belongs to it.
    pub(super) memory: pg_sys::MemoryContext,
    /// The row that gives further calls.
    pub(super) pending: Option<(Rc<OuterRow>, Combinations)>,
    pub(super) ended: bool,
}

/// The outer rows as calls.
pub(super) struct Ahead<'a> {
    pub(super) rows: &'a mut OuterRows,
    pub(super) bindings: &'a [Binding],
    pub(super) table: &'a Table,
    pub(super) context: *mut pg_sys::ExprContext,
    /// The node's slot, whose first columns are those of the outer plan.
    pub(super) slot: *mut pg_sys::TupleTableSlot,
}

impl Source for Ahead<'_> {
    type Tag = Tag;

    fn next(&mut self) -> Result<Option<Begin<Tag>>> {
        if self.rows.pending.is_none() && !self.read()? {
            return Ok(None);
        }
        let Some((row, combinations)) = &mut self.rows.pending else {
            return Ok(None);
        };
        let row = Rc::clone(row);
        let next = combinations.advance(self.bindings, self.table);
        let last = combinations.is_done();
        row.begin_call(last);
        if last {
            self.rows.pending = None;
        }
        let (inputs, echo) = match next {
            Some((inputs, echo)) => (Some(inputs), echo),
            None => (None, Echo::from([])),
        };
        Ok(Some(Begin {
            inputs,
            tag: Tag { row, echo },
        }))
    }
}

impl Ahead<'_> {
    /// Reads a row; false at the end.
    fn read(&mut self) -> Result<bool> {
        if self.rows.ended {
            return Ok(false);
        }
        // SAFETY: the plan is initialised and not at its end; the row is copied to memory of its own, where its inputs are
        // evaluated, too. An error that unwinds from here ends the transaction, which resets the current memory context.
        unsafe {
            let outer = pg_sys::ExecProcNode(self.rows.plan);
            if outer.is_null() || (*outer).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 != 0 {
                self.rows.ended = true;
                return Ok(false);
            }
            let memory = pg_sys::AllocSetContextCreateInternal(
                self.rows.memory,
                c"candle_fdw outer row".as_ptr(),
                pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
                pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
            );
            let before = pg_sys::MemoryContextSwitchTo(memory);
            let tuple = pg_sys::ExecCopySlotMinimalTuple(outer);
            pg_sys::MemoryContextSwitchTo(before);
            fill(self.slot, outer, |_| Ok(None))?;
            (*self.context).ecxt_scantuple = self.slot;
            let combinations = Combinations::evaluate(self.bindings, self.context, memory, self.table)?;
            let row = OuterRow {
                memory,
                tuple,
                matched: Cell::new(false),
                calls: Cell::new(0),
                begun: Cell::new(false),
            };
            self.rows.pending = Some((Rc::new(row), combinations));
            Ok(true)
        }
    }
}

/// Fills the node's slot: the columns of `outer`, then `inner` by number.
///
/// # Safety
/// Both slots are valid, and the columns of `outer` are the first of `slot`.
pub(super) unsafe fn fill(
    slot: *mut pg_sys::TupleTableSlot,
    outer: *mut pg_sys::TupleTableSlot,
    inner: impl Fn(usize) -> Result<Option<pg_sys::Datum>>,
) -> Result<()> {
    // SAFETY: the slots' arrays have one entry per column.
    unsafe {
        pg_sys::ExecClearTuple(slot);
        pg_sys::slot_getallattrs(outer);
        let columns = (*(*outer).tts_tupleDescriptor).natts as usize;
        for column in 0..columns {
            *(*slot).tts_values.add(column) = *(*outer).tts_values.add(column);
            *(*slot).tts_isnull.add(column) = *(*outer).tts_isnull.add(column);
        }
        for column in columns..(*(*slot).tts_tupleDescriptor).natts as usize {
            let datum = inner(column - columns)?;
            *(*slot).tts_values.add(column) = datum.unwrap_or(pg_sys::Datum::null());
            *(*slot).tts_isnull.add(column) = datum.is_none();
        }
        pg_sys::ExecStoreVirtualTuple(slot);
        Ok(())
    }
}
