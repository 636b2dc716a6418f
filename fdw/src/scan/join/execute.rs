//! The node when it runs.
#![allow(unsafe_code)]

use std::rc::Rc;
use std::sync::Arc;

use pgrx::prelude::*;

use super::outer::{Ahead, OuterRow, OuterRows, Tag, fill};
use super::plan::JoinPrivate;
use crate::client::connect;
use crate::error::{OrReport, Result};
use crate::nodes::{items, make_node};
use crate::relation::Row;
use crate::resources;
use crate::scan::explain::{show_inputs, show_totals};
use crate::scan::inputs::{Binding, Echo, check, datum_of};
use crate::scan::state::{Calls, Event, Manner, Order, Totals};
use crate::table::{Table, effective_user};

/// PostgreSQL's state of the node, and ours.
#[repr(C)]
struct JoinState {
    node: pg_sys::CustomScanState,
    /// NULL where the plan is only explained. Belongs to its subtransaction, see `resources`.
    join: *mut Join,
}

struct Join {
    table: Table,
    private: JoinPrivate,
    bindings: Vec<Binding>,
    user: pg_sys::Oid,
    /// What a pair of rows has to fulfil to match.
    condition: *mut pg_sys::ExprState,
    /// Shows outer rows that were read before.
    outer: *mut pg_sys::TupleTableSlot,
    rows: OuterRows,
    calls: Option<Calls<Tag>>,
    /// An outer row whose memory is to be freed once the row before has been used.
    retired: Option<Rc<OuterRow>>,
    totals: Totals,
}

struct Methods(pg_sys::CustomExecMethods);

// SAFETY: nothing writes to it, and its pointers are to constants and functions.
unsafe impl Sync for Methods {}

static METHODS: Methods = Methods(pg_sys::CustomExecMethods {
    CustomName: c"Candle Join".as_ptr(),
    BeginCustomScan: Some(begin_custom_scan),
    ExecCustomScan: Some(exec_custom_scan),
    EndCustomScan: Some(end_custom_scan),
    ReScanCustomScan: Some(rescan_custom_scan),
    MarkPosCustomScan: None,
    RestrPosCustomScan: None,
    EstimateDSMCustomScan: None,
    InitializeDSMCustomScan: None,
    ReInitializeDSMCustomScan: None,
    InitializeWorkerCustomScan: None,
    ShutdownCustomScan: None,
    ExplainCustomScan: Some(explain_custom_scan),
});

/// Callback: makes the state.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn create_custom_scan_state(_plan: *mut pg_sys::CustomScan) -> *mut pg_sys::Node {
    // SAFETY: made in the executor's memory; the methods live for ever.
    unsafe {
        let state = make_node::<JoinState>(pg_sys::NodeTag::T_CustomScanState);
        (*state).node.methods = &raw const METHODS.0;
        state.cast()
    }
}

/// Callback: prepares the node and the outer plan; the server hears of it when the first row is asked for.
#[pg_guard]
unsafe extern "C-unwind" fn begin_custom_scan(
    node: *mut pg_sys::CustomScanState,
    estate: *mut pg_sys::EState,
    flags: i32,
) {
    // SAFETY: the executor passes a node of a plan that plan_custom_path made.
    unsafe {
        let plan = (*node).ss.ps.plan.cast::<pg_sys::CustomScan>();
        let outer = pg_sys::ExecInitNode(items::<pg_sys::Plan>((*plan).custom_plans)[0], estate, flags);
        (*node).custom_ps = pg_sys::lappend(std::ptr::null_mut(), outer.cast());
        if flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as i32 != 0 {
            return;
        }
        let private = JoinPrivate::load((*plan).custom_private);
        let index = member((*plan).custom_relids, private.rank);
        let table = Table::open(pg_sys::ExecOpenScanRelation(estate, index, flags)).or_report();
        let expressions = items::<pg_sys::List>((*plan).custom_exprs);
        let bindings = Binding::prepare(node.cast(), expressions[0], &table, &private.scan);
        let memory = pg_sys::AllocSetContextCreateInternal(
            (*estate).es_query_cxt,
            c"candle_fdw outer rows".as_ptr(),
            pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
            pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        let shown = pg_sys::ExecGetResultType(outer);
        let join = Join {
            condition: pg_sys::ExecInitQual(expressions[1], node.cast()),
            outer: pg_sys::ExecInitExtraTupleSlot(estate, shown, &raw const pg_sys::TTSOpsMinimalTuple),
            user: effective_user(estate, index),
            table,
            private,
            bindings,
            rows: OuterRows {
                plan: outer,
                memory,
                pending: None,
                ended: false,
            },
            calls: None,
            retired: None,
            totals: Totals::default(),
        };
        (*node.cast::<JoinState>()).join = resources::own(join);
    }
}

/// Callback: the next row.
#[pg_guard]
unsafe extern "C-unwind" fn exec_custom_scan(node: *mut pg_sys::CustomScanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: begin_custom_scan made the state, and no other reference to it exists while the callback runs.
    unsafe {
        let join = &mut *(*node.cast::<JoinState>()).join;
        let (slot, state) = ((*node).ss.ss_ScanTupleSlot, &(*node).ss.ps);
        let context = state.ps_ExprContext;
        loop {
            if !join.next(context, slot).or_report() {
                return std::ptr::null_mut();
            }
            if state.qual.is_null() || pg_sys::ExecQual(state.qual, context) {
                return match state.ps_ProjInfo.is_null() {
                    true => slot,
                    false => pg_sys::ExecProject(state.ps_ProjInfo),
                };
            }
        }
    }
}

/// Callback: ends the node, and with it what the server still does for it.
#[pg_guard]
unsafe extern "C-unwind" fn end_custom_scan(node: *mut pg_sys::CustomScanState) {
    // SAFETY: as above; the pointer is not used again.
    unsafe {
        let state = node.cast::<JoinState>();
        resources::release((*state).join);
        (*state).join = std::ptr::null_mut();
        pg_sys::ExecEndNode(items::<pg_sys::PlanState>((*node).custom_ps)[0]);
    }
}

/// Callback: begins again; parameters may have changed.
#[pg_guard]
unsafe extern "C-unwind" fn rescan_custom_scan(node: *mut pg_sys::CustomScanState) {
    // SAFETY: as above.
    unsafe {
        let Some(join) = (*node.cast::<JoinState>()).join.as_mut() else {
            return;
        };
        (join.calls, join.retired, join.rows.pending, join.rows.ended) = (None, None, None, false);
        pg_sys::MemoryContextReset(join.rows.memory);
        let outer = join.rows.plan;
        if !(*node).ss.ps.chgParam.is_null() {
            pg_sys::UpdateChangedParamSet(outer, (*node).ss.ps.chgParam);
        }
        // With changed parameters the plan begins again by itself.
        if (*outer).chgParam.is_null() {
            pg_sys::ExecReScan(outer);
        }
    }
}

/// Callback: EXPLAIN, as of a scan.
#[pg_guard]
unsafe extern "C-unwind" fn explain_custom_scan(
    node: *mut pg_sys::CustomScanState,
    _ancestors: *mut pg_sys::List,
    output: *mut pg_sys::ExplainState,
) {
    // SAFETY: as above, with a valid output.
    unsafe {
        let plan = (*node).ss.ps.plan.cast::<pg_sys::CustomScan>();
        let private = JoinPrivate::load((*plan).custom_private);
        let index = member((*plan).custom_relids, private.rank);
        if (*output).verbose {
            let table = (*pg_sys::exec_rt_fetch(index, (*node).ss.ps.state)).relid;
            show_inputs(table, &private.scan, output);
        }
        if let Some(join) = (*node.cast::<JoinState>()).join.as_ref()
            && (*output).analyze
        {
            show_totals(&join.totals, output);
        }
    }
}

/// The member of a set with so many below it.
unsafe fn member(set: *mut pg_sys::Bitmapset, rank: usize) -> pg_sys::Index {
    // SAFETY: a set of the plan.
    (0..=rank).fold(-1, |before, _| unsafe { pg_sys::bms_next_member(set, before) }) as pg_sys::Index
}

impl Join {
    /// Fills the slot with the next pair that matches, or an outer row without a match where those are wanted. False at the
    /// end.
    ///
    /// # Safety
    /// `context` and `slot` are the node's.
    unsafe fn next(&mut self, context: *mut pg_sys::ExprContext, slot: *mut pg_sys::TupleTableSlot) -> Result<bool> {
        loop {
            pgrx::check_for_interrupts!();
            // SAFETY: what the caller was given before has been used.
            unsafe {
                pg_sys::MemoryContextReset((*context).ecxt_per_tuple_memory);
                self.retired.take().iter().for_each(|row| row.free());
            }
            if self.calls.is_none() {
                self.calls = Some(self.start()?);
            }
            let Some(calls) = &mut self.calls else { return Ok(false) };
            let mut source = Ahead {
                rows: &mut self.rows,
                bindings: &self.bindings,
                table: &self.table,
                context,
                slot,
            };
            match calls.next(&mut source, &mut self.totals)? {
                None => return Ok(false),
                Some(Event::Row(row, tag)) => {
                    // SAFETY: the caller's promise.
                    unsafe { self.show(context, slot, &tag.row, Some((&row, &tag.echo)))? };
                    // SAFETY: the condition is prepared for this slot.
                    if self.condition.is_null() || unsafe { pg_sys::ExecQual(self.condition, context) } {
                        tag.row.matched.set(true);
                        return Ok(true);
                    }
                }
                Some(Event::End(tag)) if tag.row.end_call() => {
                    let alone = self.private.left && !tag.row.matched.get();
                    if alone {
                        // SAFETY: as above.
                        unsafe { self.show(context, slot, &tag.row, None)? };
                    }
                    self.retired = Some(tag.row);
                    if alone {
                        return Ok(true);
                    }
                }
                Some(Event::End(_)) => {}
            }
        }
    }

    /// Shows an outer row with a row of the relation, or with NULLs.
    unsafe fn show(
        &self,
        context: *mut pg_sys::ExprContext,
        slot: *mut pg_sys::TupleTableSlot,
        row: &OuterRow,
        inner: Option<(&Row, &Echo)>,
    ) -> Result<()> {
        // SAFETY: the row's memory is freed only after its last call has ended; new datums live as long as the pair.
        unsafe {
            pg_sys::ExecStoreMinimalTuple(row.tuple, self.outer, false);
            let before = pg_sys::MemoryContextSwitchTo((*context).ecxt_per_tuple_memory);
            let filled = fill(slot, self.outer, |column| {
                let Some((row, echo)) = inner else { return Ok(None) };
                let attribute = self.private.attributes[column] as usize - 1;
                datum_of(&self.table, &self.bindings, row, echo, attribute)
            });
            pg_sys::MemoryContextSwitchTo(before);
            (*context).ecxt_scantuple = slot;
            filled
        }
    }

    /// Opens the connection.
    fn start(&self) -> Result<Calls<Tag>> {
        check(&self.table, &self.private.scan, &self.bindings)?;
        let relation = self.table.relation;
        let mut needed = vec![false; relation.columns().len()];
        for attribute in &self.private.attributes {
            if let Some(Some(attribute)) = self.table.attributes.get(*attribute as usize - 1) {
                needed[attribute.column] = true;
            }
        }
        let client = connect(self.table.session(self.user))?;
        let manner = Manner {
            order: match self.private.ordered {
                true => Order::Inputs,
                false => Order::Arrival,
            },
            limit: self.private.scan.limit,
            share: true,
        };
        Ok(Calls::new(client, relation, Arc::from(needed), &manner))
    }
}
