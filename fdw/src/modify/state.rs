//! The state of a statement that changes a table.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};

use pgrx::prelude::*;

use super::ahead::UnderWay;
use super::plan::{WHOLE_ROW, junk_name, refuse_on_conflict};
use crate::client::{Client, connect, wait};
use crate::error::{Error, OrReport, Result};
use crate::relation::{Assignments, Inputs, Row, Work, Writer};
use crate::resources;
use crate::table::{Table, effective_user};
use crate::transaction;
use crate::values::{Value, read, write};

/// A statement on one table. Belongs to its subtransaction, see `resources`.
pub(super) struct Change {
    pub(super) table: Table,
    pub(super) client: Client,
    /// Columns that identify a row, with their positions in the subplan's output.
    identity: Vec<(usize, i16)>,
    /// Position of the whole old row in the subplan's output, when RETURNING needs it.
    whole_row: i16,
    /// Columns that UPDATE sets.
    updated: Vec<&'static str>,
    /// Rows that the server takes while the statement goes on.
    pub(super) under_way: RefCell<Option<UnderWay>>,
    /// Rows that DELETE found, where they are handed over together.
    deleted: RefCell<Vec<Inputs>>,
    /// Number of the statement.
    pub(super) statement: u64,
    /// Holds rows that are handed back; reset with every call.
    memory: pg_sys::MemoryContext,
}

thread_local! {
    static STATEMENTS: Cell<u64> = const { Cell::new(0) };
}

/// Callback: prepares a statement.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn begin_foreign_modify(
    modify: *mut pg_sys::ModifyTableState,
    target: *mut pg_sys::ResultRelInfo,
    _private: *mut pg_sys::List,
    _subplan: i32,
    flags: i32,
) {
    if flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as i32 != 0 {
        return;
    }
    // SAFETY: the executor passes valid structures.
    unsafe { begin(modify, target).or_report() }
}

/// Callback: prepares COPY, or an INSERT that is routed to this table as a partition.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn begin_foreign_insert(
    modify: *mut pg_sys::ModifyTableState,
    target: *mut pg_sys::ResultRelInfo,
) {
    // SAFETY: the executor passes valid structures.
    unsafe {
        let plan = (*modify).ps.plan.cast::<pg_sys::ModifyTable>();
        if !plan.is_null() {
            refuse_on_conflict(plan).or_report();
        }
        begin(modify, target).or_report();
    }
}

/// Callback: ends the statement.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn end_foreign_modify(
    _state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
) {
    // SAFETY: `begin` made the pointer, or it is NULL; it is not used again.
    unsafe {
        let change = (*target).ri_FdwState.cast::<Change>();
        (*target).ri_FdwState = std::ptr::null_mut();
        let finish = |change: &Change| change.settle().and_then(|()| change.delete_together());
        let finished = change.as_ref().map_or(Ok(()), finish);
        resources::release(change);
        finished.or_report();
    }
}

unsafe fn begin(modify: *mut pg_sys::ModifyTableState, target: *mut pg_sys::ResultRelInfo) -> Result<()> {
    // SAFETY: the executor's structures are valid; the per-query memory context outlives the statement.
    unsafe {
        let table = Table::open((*target).ri_RelationDesc)?;
        let state = (*modify).ps.state;
        let client = connect(table.session(effective_user(state, (*target).ri_RangeTableIndex)))?;
        let memory = pg_sys::AllocSetContextCreateInternal(
            (*state).es_query_cxt,
            c"candle_fdw rows".as_ptr(),
            pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
            pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        let mut change = Change {
            client,
            identity: Vec::new(),
            whole_row: 0,
            updated: updated_columns(state, target, &table),
            under_way: RefCell::default(),
            deleted: RefCell::default(),
            statement: STATEMENTS.get() + 1,
            memory,
            table,
        };
        STATEMENTS.set(change.statement);
        let subplan = (*modify).ps.lefttree;
        if matches!(
            (*modify).operation,
            pg_sys::CmdType::CMD_UPDATE | pg_sys::CmdType::CMD_DELETE
        ) && !subplan.is_null()
        {
            let targets = (*(*subplan).plan).targetlist;
            for name in change.table.relation.identity() {
                let position = pg_sys::ExecFindJunkAttributeInTlist(targets, junk_name(name).as_ptr());
                let column = change
                    .table
                    .relation
                    .columns()
                    .iter()
                    .position(|column| column.name == *name);
                if let Some(column) = column.filter(|_| position > 0) {
                    change.identity.push((column, position));
                }
            }
            change.whole_row = pg_sys::ExecFindJunkAttributeInTlist(targets, WHOLE_ROW.as_ptr());
        }
        (*target).ri_FdwState = resources::own(change).cast();
        Ok(())
    }
}

/// The columns that an UPDATE sets: those that it names, and all that may be set where a trigger can set them too.
unsafe fn updated_columns(
    state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    table: &Table,
) -> Vec<&'static str> {
    let may = table.relation.writes().update;
    // SAFETY: the executor's structures are valid, and the index is in its range table.
    unsafe {
        let index = (*target).ri_RangeTableIndex;
        let trigger = (*target).ri_TrigDesc.as_ref();
        if index == 0 || trigger.is_some_and(|triggers| triggers.trig_update_before_row) {
            return may.to_vec();
        }
        let named = |column: &usize| {
            let attribute = *column as i32 + 1 - pg_sys::FirstLowInvalidHeapAttributeNumber;
            pg_sys::bms_is_member(attribute, (*pg_sys::exec_rt_fetch(index, state)).updatedCols)
        };
        let attributes = table.attributes.iter().enumerate();
        attributes
            .filter(|(index, _)| named(index))
            .filter_map(|(_, attribute)| Some(table.relation.columns()[attribute.as_ref()?.column].name))
            .collect()
    }
}

impl Change {
    /// Writes: gives `work` where and in which transaction to write, and waits for it.
    pub(super) fn run<T>(&self, work: impl FnOnce(Writer) -> Work<T>) -> Result<T> {
        if self.table.relation.writes().immediate {
            return self.run_at_once(work);
        }
        let client = self.client.clone();
        let participant = self.table.relation.participant();
        let transaction = Some(transaction::writing_of(participant, &self.client)?);
        let outcome = wait(work(Writer {
            client,
            statement: self.statement,
            transaction,
        }))?;
        transaction::wrote_of(participant, self.client.session);
        Ok(outcome)
    }

    /// As [`run`](Self::run), outside of any transaction.
    fn run_at_once<T>(&self, work: impl FnOnce(Writer) -> Work<T>) -> Result<T> {
        wait(work(Writer {
            client: self.client.clone(),
            statement: self.statement,
            transaction: None,
        }))
    }

    /// The values that a row gives. Errors: a value for a column that the server computes.
    ///
    /// # Safety
    /// `slot` holds a row of the table.
    pub(super) unsafe fn inputs(&self, slot: *mut pg_sys::TupleTableSlot) -> Result<Inputs> {
        let columns = self.table.relation.columns();
        let mut inputs = Inputs::new(columns);
        // SAFETY: once all attributes are fetched, the arrays have one entry per attribute.
        unsafe {
            pg_sys::slot_getallattrs(slot);
            for (index, attribute) in self.table.attributes.iter().enumerate() {
                let Some(attribute) = attribute else { continue };
                if *(*slot).tts_isnull.add(index) {
                    continue;
                }
                let column = &columns[attribute.column];
                if !column.insertable {
                    let code = PgSqlErrorCode::ERRCODE_GENERATED_ALWAYS;
                    let message = format!("cannot insert a value into column \"{}\"", column.name);
                    return Err(Error::new(code, message)
                        .detail("The compute server computes it.")
                        .hint("Leave the column out, or give NULL."));
                }
                let datum = *(*slot).tts_values.add(index);
                inputs.set(
                    attribute.column,
                    read(column.name, column.kind, datum, attribute.sql_type)?,
                );
            }
        }
        Ok(inputs)
    }

    /// Keeps a row that DELETE found for its end; false where rows are deleted one by one.
    pub(super) fn keep_deleted(&self, row: &Inputs) -> bool {
        let keep = self.table.relation.writes().deleted_together;
        if keep {
            self.deleted.borrow_mut().push(row.clone());
        }
        keep
    }

    /// Hands over the rows that were kept.
    fn delete_together(&self) -> Result<()> {
        let rows = self.deleted.take();
        if rows.is_empty() {
            return Ok(());
        }
        let work = |writer| self.table.relation.delete_together(writer, rows);
        match self.table.relation.writes().deleted_at_once {
            true => self.run_at_once(work),
            false => self.run(work),
        }
    }

    /// What UPDATE sets, from the new row.
    ///
    /// # Safety
    /// `slot` holds a row of the table.
    pub(super) unsafe fn assignments(&self, slot: *mut pg_sys::TupleTableSlot) -> Result<Assignments> {
        let names = &self.updated;
        let columns = self.table.relation.columns();
        let mut inputs = Inputs::new(columns);
        // SAFETY: as in `inputs`.
        unsafe {
            pg_sys::slot_getallattrs(slot);
            for (index, attribute) in self.table.attributes.iter().enumerate() {
                let Some(attribute) = attribute else { continue };
                let column = &columns[attribute.column];
                if names.contains(&column.name) && !*(*slot).tts_isnull.add(index) {
                    let datum = *(*slot).tts_values.add(index);
                    inputs.set(
                        attribute.column,
                        read(column.name, column.kind, datum, attribute.sql_type)?,
                    );
                }
            }
        }
        Ok(Assignments {
            columns: names.clone(),
            values: inputs,
        })
    }

    /// The columns that identify the row which the subplan found.
    ///
    /// # Safety
    /// `slot` is a row of the subplan.
    pub(super) unsafe fn identity(&self, slot: *mut pg_sys::TupleTableSlot) -> Result<Inputs> {
        let columns = self.table.relation.columns();
        let mut inputs = Inputs::new(columns);
        for (position, junk) in &self.identity {
            let column = &columns[*position];
            let attribute = self
                .table
                .attributes
                .iter()
                .flatten()
                .find(|attribute| attribute.column == *position);
            // SAFETY: once all attributes are fetched, the arrays have one entry per attribute, `junk` among them.
            unsafe {
                pg_sys::slot_getallattrs(slot);
                let index = *junk as usize - 1;
                if let Some(attribute) = attribute.filter(|_| !*(*slot).tts_isnull.add(index)) {
                    let datum = *(*slot).tts_values.add(index);
                    inputs.set(*position, read(column.name, column.kind, datum, attribute.sql_type)?);
                }
            }
        }
        Ok(inputs)
    }

    /// Puts a row as the server has it into the slot, for RETURNING and triggers.
    ///
    /// # Safety
    /// `slot` holds a row of the table.
    pub(super) unsafe fn fill(&self, slot: *mut pg_sys::TupleTableSlot, row: &Row) -> Result<()> {
        // SAFETY: the arrays have one entry per attribute; heap_form_tuple copies what they point to before the slot
        // lets go of its old row, and the copy lives until the next call.
        unsafe {
            pg_sys::slot_getallattrs(slot);
            let count = self.table.attributes.len();
            let mut values = std::slice::from_raw_parts((*slot).tts_values, count).to_vec();
            let mut nulls = std::slice::from_raw_parts((*slot).tts_isnull, count).to_vec();
            let before = pg_sys::MemoryContextSwitchTo(self.memory);
            for (index, attribute) in self.table.attributes.iter().enumerate() {
                let Some(attribute) = attribute else { continue };
                let value = &row[attribute.column];
                if *value == Value::Echo {
                    continue;
                }
                let name = self.table.relation.columns()[attribute.column].name;
                let datum = write(name, value, attribute.sql_type)?;
                nulls[index] = datum.is_none();
                values[index] = datum.unwrap_or(pg_sys::Datum::null());
            }
            let descriptor = (*slot).tts_tupleDescriptor;
            let tuple = pg_sys::heap_form_tuple(descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
            pg_sys::MemoryContextSwitchTo(before);
            pg_sys::ExecForceStoreHeapTuple(tuple, slot, false);
        }
        Ok(())
    }

    /// Frees the rows handed back by the call before.
    pub(super) fn forget_rows(&self) {
        // SAFETY: the context lives as long as the statement; the rows of the last call have been used.
        unsafe { pg_sys::MemoryContextReset(self.memory) };
    }

    /// Puts the whole old row that the subplan carries into the slot, for RETURNING.
    ///
    /// # Safety
    /// `found` is a row of the subplan, `slot` the slot that is handed back.
    pub(super) unsafe fn fill_old_row(&self, slot: *mut pg_sys::TupleTableSlot, found: *mut pg_sys::TupleTableSlot) {
        if self.whole_row <= 0 {
            return;
        }
        // SAFETY: the junk column is a composite value of the table's row type; the tuple is copied before it is stored.
        unsafe {
            pg_sys::slot_getallattrs(found);
            let index = self.whole_row as usize - 1;
            if *(*found).tts_isnull.add(index) {
                return;
            }
            let before = pg_sys::MemoryContextSwitchTo(self.memory);
            let row = pg_sys::pg_detoast_datum((*(*found).tts_values.add(index)).cast_mut_ptr());
            let mut tuple = pg_sys::HeapTupleData {
                t_len: pgrx::varlena::varsize(row) as u32,
                t_data: row.cast(),
                ..Default::default()
            };
            let copy = pg_sys::heap_copytuple(&mut tuple);
            pg_sys::MemoryContextSwitchTo(before);
            pg_sys::ExecForceStoreHeapTuple(copy, slot, false);
        }
    }
}
