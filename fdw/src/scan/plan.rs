//! The plan: the expressions that give inputs, what is still to be checked, and what the query reads.
#![allow(unsafe_code)]

use std::ptr::null_mut;

use pgrx::prelude::*;

use super::clauses::{Planned, plain_clauses, strip_casts};
use crate::error::OrReport;
use crate::nodes::{integer_list, integers, items};
use crate::relation::Role;
use crate::table::definition;

/// What the planner found out, as it travels in the plan: lists of integers, which PostgreSQL can copy and cache.
#[derive(Clone, Debug)]
pub(super) struct Private {
    /// Attribute of each input, in the order of the plan's expressions.
    pub(super) attributes: Vec<i32>,
    /// Whether each input is an array of alternatives.
    pub(super) any: Vec<bool>,
    /// Attributes that the query reads; 0 is all of them.
    pub(super) needed: Vec<i32>,
    /// Attributes of inputs that a clause speaks of without giving them a value.
    pub(super) unusable: Vec<i32>,
    /// Rows that the query can use at most, if that is known and small.
    pub(super) limit: Option<usize>,
}

impl Private {
    pub(super) fn store(&self) -> *mut pg_sys::List {
        let lists = [
            integer_list(self.attributes.iter().copied()),
            integer_list(self.any.iter().map(|any| i32::from(*any))),
            integer_list(self.needed.iter().copied()),
            integer_list(self.unusable.iter().copied()),
            integer_list(self.limit.map(|limit| limit as i32)),
        ];
        // SAFETY: appends to NIL or to the list made before.
        lists
            .into_iter()
            .fold(null_mut(), |all, list| unsafe { pg_sys::lappend(all, list.cast()) })
    }

    /// Rows that a query can use at most.
    ///
    /// # Safety
    /// `root` is the planner's.
    pub(super) unsafe fn limit(root: *mut pg_sys::PlannerInfo) -> Option<usize> {
        // SAFETY: the caller's promise.
        let limit = Some(unsafe { (*root).limit_tuples });
        limit
            .filter(|limit| (0.0..1024.0).contains(limit))
            .map(|limit| limit as usize)
    }

    /// Reads what `store` wrote.
    ///
    /// # Safety
    /// `store` made the list.
    pub(super) unsafe fn load(list: *mut pg_sys::List) -> Self {
        // SAFETY: the caller's promise: five lists of integers.
        let lists: Vec<Vec<i32>> = unsafe {
            items::<pg_sys::List>(list)
                .into_iter()
                .map(|list| integers(list))
                .collect()
        };
        let list = |index: usize| lists.get(index).cloned().unwrap_or_default();
        Self {
            attributes: list(0),
            any: list(1).into_iter().map(|any| any != 0).collect(),
            needed: list(2),
            unusable: list(3),
            limit: list(4).first().map(|limit| *limit as usize),
        }
    }
}

/// Callback: makes the plan of the chosen path.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn get_foreign_plan(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    table: pg_sys::Oid,
    _path: *mut pg_sys::ForeignPath,
    target_list: *mut pg_sys::List,
    scan_clauses: *mut pg_sys::List,
    outer_plan: *mut pg_sys::Plan,
) -> *mut pg_sys::ForeignScan {
    let (relation, _) = definition(table).or_report();
    let planned = Planned {
        root,
        rel,
        table,
        relation,
    };
    // SAFETY: the planner passes valid structures; everything is made in its memory context.
    unsafe {
        let clauses = plain_clauses(scan_clauses);
        let given = planned.choose(&clauses);
        let mut expressions: *mut pg_sys::List = null_mut();
        let mut quals: *mut pg_sys::List = null_mut();
        let mut recheck: *mut pg_sys::List = null_mut();
        for one in &given {
            expressions = pg_sys::lappend(expressions, pg_sys::copyObjectImpl(one.value.cast()));
        }
        let mut unusable = Vec::new();
        for clause in &clauses {
            let gives = given.iter().find(|one| one.clause == *clause);
            // What gives an input holds for every row by construction. Rechecking a long ANY would cost a second.
            if gives.is_some_and(|one| relation.columns()[one.column].role == Role::Input) {
                recheck = pg_sys::lappend(recheck, clause.cast());
                continue;
            }
            quals = pg_sys::lappend(quals, clause.cast());
            unusable.extend(
                planned
                    .unusable(*clause)
                    .filter(|(_, column)| given.iter().all(|one| one.column != *column)),
            );
        }
        let private = Private {
            attributes: given.iter().map(|one| i32::from(one.attribute)).collect(),
            any: given.iter().map(|one| one.any).collect(),
            needed: planned.read_attributes((*(*rel).reltarget).exprs, quals),
            unusable: unusable.into_iter().map(|(attribute, _)| attribute).collect(),
            limit: Private::limit(root),
        };
        let scan_index = (*rel).relid;
        pg_sys::make_foreignscan(
            target_list,
            quals,
            scan_index,
            expressions,
            private.store(),
            null_mut(),
            recheck,
            outer_plan,
        )
    }
}

impl Planned {
    /// Attributes that expressions read.
    unsafe fn attributes(&self, node: *mut pg_sys::Node) -> Vec<i32> {
        // SAFETY: the expression is valid; the set lives in the planner's memory context.
        unsafe {
            let mut set: *mut pg_sys::Bitmapset = null_mut();
            pg_sys::pull_varattnos(node, (*self.rel).relid, &mut set);
            let mut found = Vec::new();
            let mut member = -1;
            loop {
                member = pg_sys::bms_next_member(set, member);
                if member < 0 {
                    return found;
                }
                found.push(member + pg_sys::FirstLowInvalidHeapAttributeNumber);
            }
        }
    }

    /// Attributes that the query reads, once each.
    unsafe fn read_attributes(&self, targets: *mut pg_sys::List, quals: *mut pg_sys::List) -> Vec<i32> {
        // SAFETY: lists of expressions are expressions.
        let mut all = unsafe { self.attributes(targets.cast()) };
        // SAFETY: as above.
        all.extend(unsafe { self.attributes(quals.cast()) });
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Inputs that a clause asks something of which no server can be told, with their columns. `IS NULL` asks for the
    /// default and is no such thing.
    pub(super) unsafe fn unusable(&self, clause: *mut pg_sys::Node) -> impl Iterator<Item = (i32, usize)> + use<> {
        // SAFETY: the clause is a valid expression.
        let attributes = unsafe {
            let null_test = pgrx::is_a(clause, pg_sys::NodeTag::T_NullTest)
                && self
                    .column(strip_casts((*clause.cast::<pg_sys::NullTest>()).arg.cast()))
                    .is_some();
            if null_test { Vec::new() } else { self.attributes(clause) }
        };
        let (relation, table) = (self.relation, self.table);
        attributes.into_iter().filter_map(move |attribute| {
            let column =
                crate::table::column_of(relation, table, i16::try_from(attribute).ok().filter(|one| *one > 0)?)?;
            (relation.columns()[column].role == Role::Input).then_some((attribute, column))
        })
    }
}
