//! The planner's estimates and paths: a plain scan, and scans that take inputs from other tables of a join.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::null_mut;

use pgrx::prelude::*;

use super::clauses::{Given, Planned, plain_clauses, strip_casts};
use crate::error::OrReport;
use crate::nodes::items;
use crate::relation::Role;
use crate::table::definition;

/// Added to paths that cannot run, or would ignore an input that a join gives, so that they are the last resort.
/// Far above the 1e10 that the planner itself adds for what `enable_nestloop = off` and its like rule out.
const LAST_RESORT: f64 = 1.0e15;

/// Cost of handling a row.
pub(super) const ROW_COST: f64 = 0.01;

/// Callback: estimates how many rows the table's own clauses give.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn get_foreign_rel_size(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    table: pg_sys::Oid,
) {
    let (relation, _) = definition(table).or_report();
    let planned = Planned {
        root,
        rel,
        table,
        relation,
    };
    // SAFETY: the planner passes valid structures.
    unsafe {
        let given = planned.choose(&planned.own_clauses());
        let rows = relation.estimate().rows * calls(&given);
        (*rel).rows = rows;
        (*rel).tuples = rows;
    }
}

/// Callback: adds the paths.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn get_foreign_paths(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    table: pg_sys::Oid,
) {
    let (relation, _) = definition(table).or_report();
    let planned = Planned {
        root,
        rel,
        table,
        relation,
    };
    // SAFETY: the planner passes valid structures; relid sets and paths live in its memory context.
    unsafe {
        let own = planned.own_clauses();
        let given = planned.choose(&own);
        // Where the query says beforehand which values a join may ask for, one scan works on all of them at a time,
        // which beats a call per row of the other table.
        let mut joins = planned.join_clauses();
        joins.retain(|(_, join)| given.iter().all(|own| own.column != join.column));
        let ignored = joins
            .iter()
            .any(|(_, join)| relation.columns()[join.column].role == Role::Input);
        planned.add((*rel).lateral_relids, &given, ignored || !planned.complete(&given));

        let mut outers: Vec<pg_sys::Relids> = Vec::new();
        let mut all: pg_sys::Relids = null_mut();
        for (outer, _) in &joins {
            all = pg_sys::bms_union(all, *outer);
            if !outers.iter().any(|other| pg_sys::bms_equal(*other, *outer)) {
                outers.push(*outer);
            }
        }
        if outers.len() > 1 && !outers.iter().any(|other| pg_sys::bms_equal(*other, all)) {
            outers.push(all);
        }
        for outer in outers {
            let info = pg_sys::get_baserel_parampathinfo(root, rel, outer);
            let mut clauses = own.clone();
            clauses.extend(plain_clauses((*info).ppi_clauses));
            let given = planned.choose(&clauses);
            if planned.complete(&given) {
                planned.add(outer, &given, false);
            }
        }
    }
}

/// Number of calls that the inputs make: alternatives multiply.
pub(super) unsafe fn calls(given: &[Given]) -> f64 {
    // SAFETY: the expressions are valid.
    let lists = given
        .iter()
        .filter(|one| one.any)
        .map(|one| unsafe { pg_sys::estimate_array_length(one.value) });
    lists.map(|length| f64::from(length.max(1))).product()
}

impl Planned {
    /// Whether every input that the relation needs is given.
    pub(super) fn complete(&self, given: &[Given]) -> bool {
        self.relation.required().iter().all(|group| {
            given
                .iter()
                .any(|one| group.contains(&self.relation.columns()[one.column].name))
        })
    }

    unsafe fn add(&self, outer: pg_sys::Relids, given: &[Given], last_resort: bool) {
        let estimate = self.relation.estimate();
        // SAFETY: the planner's structures are valid; the path is made in its memory context.
        unsafe {
            let calls = calls(given);
            let rows = estimate.rows * calls;
            let penalty = if last_resort { LAST_RESORT } else { 0.0 };
            let path = pg_sys::create_foreignscan_path(
                self.root,
                self.rel,
                null_mut(),
                rows,
                penalty + estimate.cost,
                penalty + estimate.cost * calls + rows * ROW_COST,
                null_mut(),
                outer,
                null_mut(),
                null_mut(),
            );
            pg_sys::add_path(self.rel, path.cast());
        }
    }

    /// The clauses by which other tables can give inputs, each with the tables that it takes them from.
    unsafe fn join_clauses(&self) -> Vec<(pg_sys::Relids, Given)> {
        let mut found = Vec::new();
        // SAFETY: the planner's structures are valid.
        unsafe {
            let mut consider = |restriction: *mut pg_sys::RestrictInfo| {
                if !pg_sys::join_clause_is_movable_to(restriction, self.rel) {
                    return;
                }
                let Some(given) = self.given((*restriction).clause.cast()) else {
                    return;
                };
                let tables = pg_sys::bms_union((*restriction).clause_relids, (*self.rel).lateral_relids);
                let outer = pg_sys::bms_del_member(tables, (*self.rel).relid as i32);
                if !outer.is_null() && pg_sys::bms_num_members(outer) > 0 {
                    found.push((outer, given));
                }
            };
            items::<pg_sys::RestrictInfo>((*self.rel).joininfo)
                .into_iter()
                .for_each(&mut consider);
            if (*self.rel).has_eclass_joins {
                for mut attribute in 1..=(*self.rel).max_attr {
                    let implied = pg_sys::generate_implied_equalities_for_column(
                        self.root,
                        self.rel,
                        Some(is_attribute),
                        (&raw mut attribute).cast(),
                        (*self.rel).lateral_referencers,
                    );
                    items::<pg_sys::RestrictInfo>(implied)
                        .into_iter()
                        .for_each(&mut consider);
                }
            }
        }
        found
    }
}

/// Callback: whether a member of an equivalence class is the attribute that `argument` points to.
#[pg_guard]
unsafe extern "C-unwind" fn is_attribute(
    _root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    _class: *mut pg_sys::EquivalenceClass,
    member: *mut pg_sys::EquivalenceMember,
    argument: *mut c_void,
) -> bool {
    // SAFETY: the planner passes valid structures, and `argument` is what the caller above gave.
    unsafe {
        let node = strip_casts((*member).em_expr.cast());
        if !pgrx::is_a(node, pg_sys::NodeTag::T_Var) {
            return false;
        }
        let var = node.cast::<pg_sys::Var>();
        (*var).varno as pg_sys::Index == (*rel).relid && (*var).varattno == *argument.cast::<i16>()
    }
}
