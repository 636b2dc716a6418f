//! The scan's callbacks.
#![allow(unsafe_code)]

use std::sync::Arc;

use pgrx::prelude::*;

use super::inputs::{Binding, Combinations, Echo, Inputting, check, datum_of};
use super::plan::Private;
use super::state::{Calls, Event, Manner, Order, Totals};
use crate::client::connect;
use crate::error::{OrReport, Result};
use crate::resources;
use crate::table::{Table, effective_user};

/// The state of a scan. Belongs to its subtransaction, see `resources`.
pub(super) struct Scan {
    pub(super) table: Table,
    private: Private,
    bindings: Vec<Binding>,
    user: pg_sys::Oid,
    /// Holds the inputs' datums.
    memory: pg_sys::MemoryContext,
    /// Whether the query reads the attribute of each index.
    wanted: Vec<bool>,
    running: Option<(Calls<Echo>, Combinations)>,
    pub(super) totals: Totals,
}

/// Callback: prepares the scan; the server hears of it when the first row is asked for.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn begin_foreign_scan(node: *mut pg_sys::ForeignScanState, flags: i32) {
    if flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as i32 != 0 {
        return;
    }
    // SAFETY: the executor passes a scan of a plan that get_foreign_plan made; its per-query memory context outlives it.
    unsafe {
        let plan = (*node).ss.ps.plan.cast::<pg_sys::ForeignScan>();
        let table = Table::open((*node).ss.ss_currentRelation).or_report();
        let private = Private::load((*plan).fdw_private);
        let bindings = Binding::prepare(node.cast(), (*plan).fdw_exprs, &table, &private);
        let state = (*node).ss.ps.state;
        let memory = pg_sys::AllocSetContextCreateInternal(
            (*state).es_query_cxt,
            c"candle_fdw inputs".as_ptr(),
            pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
            pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        let whole_row = private.needed.contains(&0);
        let wanted = (0..table.attributes.len())
            .map(|index| whole_row || private.needed.contains(&(index as i32 + 1)))
            .collect();
        let user = effective_user(state, (*plan).scan.scanrelid);
        let scan = Scan {
            table,
            private,
            bindings,
            user,
            memory,
            wanted,
            running: None,
            totals: Totals::default(),
        };
        (*node).fdw_state = resources::own(scan).cast();
    }
}

/// Callback: the next row.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn iterate_foreign_scan(
    node: *mut pg_sys::ForeignScanState,
) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: begin_foreign_scan made the state, and no other reference to it exists while the callback runs.
    unsafe {
        let scan = &mut *(*node).fdw_state.cast::<Scan>();
        let slot = (*node).ss.ss_ScanTupleSlot;
        pg_sys::ExecClearTuple(slot);
        let context = (*node).ss.ps.ps_ExprContext;
        if scan.next(context, slot).or_report() {
            pg_sys::ExecStoreVirtualTuple(slot);
        }
        slot
    }
}

/// Callback: begins again; inputs may have changed.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn rescan_foreign_scan(node: *mut pg_sys::ForeignScanState) {
    // SAFETY: as above.
    let Some(scan) = (unsafe { (*node).fdw_state.cast::<Scan>().as_mut() }) else {
        return;
    };
    scan.running = None;
}

/// Callback: ends the scan, and with it what the server still does for it.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn end_foreign_scan(node: *mut pg_sys::ForeignScanState) {
    // SAFETY: as above; the pointer is not used again.
    unsafe {
        let scan = (*node).fdw_state.cast::<Scan>();
        (*node).fdw_state = std::ptr::null_mut();
        resources::release(scan);
    }
}

impl Scan {
    /// Fills the slot's arrays with the next row. False at the end.
    ///
    /// # Safety
    /// `context` and `slot` are the scan's, and the slot is empty.
    unsafe fn next(&mut self, context: *mut pg_sys::ExprContext, slot: *mut pg_sys::TupleTableSlot) -> Result<bool> {
        if self.running.is_none() {
            // SAFETY: the caller's promise.
            self.running = Some(unsafe { self.start(context)? });
        }
        let Some((calls, combinations)) = &mut self.running else {
            return Ok(false);
        };
        let (table, bindings) = (&self.table, &self.bindings);
        let mut source = Inputting {
            combinations,
            bindings,
            table,
        };
        let (row, echo) = loop {
            match calls.next(&mut source, &mut self.totals)? {
                Some(Event::Row(row, echo)) => break (row, echo),
                Some(Event::End(_)) => {}
                None => return Ok(false),
            }
        };
        for (index, wanted) in self.wanted.iter().enumerate() {
            let datum = match *wanted {
                true => datum_of(table, bindings, &row, &echo, index)?,
                false => None,
            };
            // SAFETY: the slot's arrays, like `wanted`, have one entry per attribute of the table.
            unsafe {
                *(*slot).tts_values.add(index) = datum.unwrap_or(pg_sys::Datum::null());
                *(*slot).tts_isnull.add(index) = datum.is_none();
            }
        }
        Ok(true)
    }

    /// Evaluates the inputs and opens the connection.
    unsafe fn start(&mut self, context: *mut pg_sys::ExprContext) -> Result<(Calls<Echo>, Combinations)> {
        check(&self.table, &self.private, &self.bindings)?;
        // SAFETY: no datum of the last run is used any more: its calls are gone.
        let combinations = unsafe {
            pg_sys::MemoryContextReset(self.memory);
            Combinations::evaluate(&self.bindings, context, self.memory, &self.table)?
        };
        let mut needed = vec![false; self.table.relation.columns().len()];
        for (attribute, wanted) in self.table.attributes.iter().zip(&self.wanted) {
            if let Some(attribute) = attribute {
                needed[attribute.column] |= wanted;
            }
        }
        let client = connect(self.table.session(self.user))?;
        let manner = Manner {
            order: Order::Arrival,
            limit: self.private.limit,
            share: false,
        };
        let calls = Calls::new(client, self.table.relation, Arc::from(needed), &manner);
        Ok((calls, combinations))
    }
}
