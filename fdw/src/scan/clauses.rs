//! Which clauses of a query give a relation its inputs: `column = expression` and `column = ANY (expression)`, where the
//! expression is free of the table's own columns and not volatile.
#![allow(unsafe_code)]

use std::ffi::CStr;

use pgrx::{is_a, pg_sys};

use crate::nodes::items;
use crate::relation::{Relation, Role};
use crate::table::column_of;

/// A foreign table as the planner sees it.
#[derive(Clone, Copy)]
pub(super) struct Planned {
    pub(super) root: *mut pg_sys::PlannerInfo,
    pub(super) rel: *mut pg_sys::RelOptInfo,
    pub(super) table: pg_sys::Oid,
    pub(super) relation: &'static dyn Relation,
}

/// A clause that gives an input.
#[derive(Clone, Copy)]
pub(super) struct Given {
    /// Position in the relation's columns.
    pub(super) column: usize,
    /// Attribute number in the table.
    pub(super) attribute: i16,
    /// Whether the expression is an array of alternatives.
    pub(super) any: bool,
    /// The expression.
    pub(super) value: *mut pg_sys::Node,
    /// The whole clause.
    pub(super) clause: *mut pg_sys::Node,
}

/// The column without the casts around it. Casts of the column are inverted by casting the value to the column's type.
///
/// # Safety
/// `node` is a valid expression.
pub(super) unsafe fn strip_casts(mut node: *mut pg_sys::Node) -> *mut pg_sys::Node {
    // SAFETY: each node is read as what its tag says it is.
    unsafe {
        loop {
            if is_a(node, pg_sys::NodeTag::T_RelabelType) {
                node = (*node.cast::<pg_sys::RelabelType>()).arg.cast();
            } else if is_a(node, pg_sys::NodeTag::T_FuncExpr) {
                let call = node.cast::<pg_sys::FuncExpr>();
                let cast = matches!(
                    (*call).funcformat,
                    pg_sys::CoercionForm::COERCE_IMPLICIT_CAST | pg_sys::CoercionForm::COERCE_EXPLICIT_CAST
                );
                match items::<pg_sys::Node>((*call).args).first() {
                    Some(argument) if cast => node = *argument,
                    _ => return node,
                }
            } else {
                return node;
            }
        }
    }
}

/// The operands of `a = b` or `a = ANY (b)`.
unsafe fn equality(clause: *mut pg_sys::Node) -> Option<(*mut pg_sys::Node, *mut pg_sys::Node, bool)> {
    // SAFETY: the clause is read as what its tag says it is.
    unsafe {
        let (arguments, operator, any) = if is_a(clause, pg_sys::NodeTag::T_OpExpr) {
            let expression = clause.cast::<pg_sys::OpExpr>();
            ((*expression).args, (*expression).opno, false)
        } else if is_a(clause, pg_sys::NodeTag::T_ScalarArrayOpExpr) {
            let expression = clause.cast::<pg_sys::ScalarArrayOpExpr>();
            if !(*expression).useOr {
                return None;
            }
            ((*expression).args, (*expression).opno, true)
        } else {
            return None;
        };
        let name = pg_sys::get_opname(operator);
        if name.is_null() || CStr::from_ptr(name).to_bytes() != b"=" {
            return None;
        }
        match items::<pg_sys::Node>(arguments)[..] {
            [left, right] => Some((left, right, any)),
            _ => None,
        }
    }
}

/// The column and its value in what the planner makes of `column = true` and `column = false`: the bare column, and its
/// negation.
unsafe fn truth_value(clause: *mut pg_sys::Node) -> Option<(*mut pg_sys::Node, bool)> {
    // SAFETY: the clause is read as what its tag says it is.
    unsafe {
        if is_a(clause, pg_sys::NodeTag::T_Var) {
            return Some((clause, true));
        }
        if !is_a(clause, pg_sys::NodeTag::T_BoolExpr) {
            return None;
        }
        let expression = clause.cast::<pg_sys::BoolExpr>();
        match items::<pg_sys::Node>((*expression).args)[..] {
            [negated]
                if (*expression).boolop == pg_sys::BoolExprType::NOT_EXPR && is_a(negated, pg_sys::NodeTag::T_Var) =>
            {
                Some((negated, false))
            }
            _ => None,
        }
    }
}

impl Planned {
    /// The input that a clause gives, if it gives one.
    ///
    /// # Safety
    /// `clause` is a valid expression of the query.
    pub(super) unsafe fn given(&self, clause: *mut pg_sys::Node) -> Option<Given> {
        // SAFETY: the caller's promise; the planner's structures are valid while it plans.
        unsafe {
            if let Some((side, truth)) = truth_value(clause) {
                let (attribute, column) = self.column(side)?;
                return Some(Given {
                    column,
                    attribute,
                    any: false,
                    value: pg_sys::makeBoolConst(truth, false),
                    clause,
                });
            }
            let (left, right, any) = equality(clause)?;
            let sides = [(left, right), (right, left)];
            // In `a = ANY (b)` only the left side can be a column that is compared.
            sides
                .into_iter()
                .take(if any { 1 } else { 2 })
                .find_map(|(side, value)| {
                    let (attribute, column) = self.column(strip_casts(side))?;
                    let index = (*self.rel).relid as i32;
                    let own = pg_sys::bms_is_member(index, pg_sys::pull_varnos(self.root, value));
                    let fit = !own && !pg_sys::contain_volatile_functions(value);
                    fit.then_some(Given {
                        column,
                        attribute,
                        any,
                        value,
                        clause,
                    })
                })
        }
    }

    /// Attribute number and position of a column that may take an input.
    ///
    /// # Safety
    /// `node` is a valid expression.
    pub(super) unsafe fn column(&self, node: *mut pg_sys::Node) -> Option<(i16, usize)> {
        // SAFETY: the caller's promise.
        unsafe {
            if !is_a(node, pg_sys::NodeTag::T_Var) {
                return None;
            }
            let var = node.cast::<pg_sys::Var>();
            if (*var).varno as pg_sys::Index != (*self.rel).relid || (*var).varattno <= 0 || (*var).varlevelsup != 0 {
                return None;
            }
            let column = column_of(self.relation, self.table, (*var).varattno)?;
            (self.relation.columns()[column].role != Role::Output).then_some(((*var).varattno, column))
        }
    }

    /// Of the clauses those that give inputs, one per column: a single value rather than a list of alternatives. What
    /// else is asked of the same column stays a filter.
    ///
    /// # Safety
    /// The clauses are valid expressions of the query.
    pub(super) unsafe fn choose(&self, clauses: &[*mut pg_sys::Node]) -> Vec<Given> {
        let mut chosen: Vec<Given> = Vec::new();
        for clause in clauses {
            // SAFETY: the caller's promise.
            let Some(given) = (unsafe { self.given(*clause) }) else {
                continue;
            };
            match chosen.iter_mut().find(|other| other.column == given.column) {
                Some(other) if other.any && !given.any => *other = given,
                Some(_) => {}
                None => chosen.push(given),
            }
        }
        chosen
    }

    /// The clauses on this table alone.
    ///
    /// # Safety
    /// Called while the query is planned.
    pub(super) unsafe fn own_clauses(&self) -> Vec<*mut pg_sys::Node> {
        // SAFETY: baserestrictinfo is a list of RestrictInfo.
        unsafe { plain_clauses((*self.rel).baserestrictinfo) }
    }
}

/// The clauses of a list of RestrictInfo, without those that do not depend on rows.
///
/// # Safety
/// `list` is NIL or a list of RestrictInfo.
pub(super) unsafe fn plain_clauses(list: *mut pg_sys::List) -> Vec<*mut pg_sys::Node> {
    // SAFETY: the caller's promise.
    unsafe {
        let restrictions = items::<pg_sys::RestrictInfo>(list).into_iter();
        restrictions
            .filter(|one| !(**one).pseudoconstant)
            .map(|one| (*one).clause.cast())
            .collect()
    }
}
