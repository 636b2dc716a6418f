//! Whose turn it is: work that waits, in the order of arrival for each caller, and in turns between callers.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::access::Caller;
use crate::transactions::Connection;

/// Work of several callers. First tenants take turns, then the sessions of a tenant: who has least running is next, and
/// among equals who has waited longest since the last turn.
pub(super) struct TurnQueue<T> {
    /// In the order of arrival.
    waiting: VecDeque<(Caller, T)>,
    /// When tenants and sessions that have work waiting had their last turn.
    tenants: HashMap<Arc<str>, u64>,
    sessions: HashMap<(Arc<str>, Connection), u64>,
    turn: u64,
}

impl<T> Default for TurnQueue<T> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            tenants: HashMap::new(),
            sessions: HashMap::new(),
            turn: 0,
        }
    }
}

/// Work that runs for a tenant, and for a session of it.
#[derive(Default)]
pub(super) struct Running<'a> {
    tenants: HashMap<&'a str, usize>,
    sessions: HashMap<(&'a str, Connection), usize>,
}

impl<'a> FromIterator<&'a Caller> for Running<'a> {
    fn from_iter<I: IntoIterator<Item = &'a Caller>>(callers: I) -> Self {
        let mut running = Self::default();
        for caller in callers {
            *running.tenants.entry(caller.name()).or_default() += 1;
            *running
                .sessions
                .entry((&**caller.name(), caller.session()))
                .or_default() += 1;
        }
        running
    }
}

impl<T> TurnQueue<T> {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whose work waits.
    pub(super) fn callers(&self) -> impl Iterator<Item = &Caller> {
        self.waiting.iter().map(|(caller, _)| caller)
    }

    pub(super) fn push(&mut self, caller: Caller, work: T) {
        self.waiting.push_back((caller, work));
    }

    /// Position of the work that is next, while `running` runs.
    pub(super) fn next(&self, running: &Running<'_>) -> Option<usize> {
        let rank = |caller: &Caller| {
            let session = (&**caller.name(), caller.session());
            (
                running.tenants.get(&**caller.name()).copied().unwrap_or(0),
                self.tenants.get(caller.name()).copied().unwrap_or(0),
                running.sessions.get(&session).copied().unwrap_or(0),
                self.sessions
                    .get(&(Arc::clone(caller.name()), caller.session()))
                    .copied()
                    .unwrap_or(0),
            )
        };
        // The first of equals is the oldest.
        let ranked = self
            .waiting
            .iter()
            .enumerate()
            .map(|(at, (caller, _))| (rank(caller), at));
        ranked.min().map(|(_, at)| at)
    }

    pub(super) fn get(&self, at: usize) -> Option<&T> {
        self.waiting.get(at).map(|(_, work)| work)
    }

    /// Takes work out of the queue: its caller's turn.
    pub(super) fn take(&mut self, at: usize) -> Option<T> {
        let (caller, work) = self.waiting.remove(at)?;
        self.turn += 1;
        self.tenants.insert(Arc::clone(caller.name()), self.turn);
        self.sessions
            .insert((Arc::clone(caller.name()), caller.session()), self.turn);
        self.forget_others();
        Some(work)
    }

    /// Takes out what `leaves` is true of.
    pub(super) fn remove_if(&mut self, leaves: impl Fn(&Caller, &T) -> bool) -> Vec<T> {
        let (left, kept): (VecDeque<_>, VecDeque<_>) =
            self.waiting.drain(..).partition(|(caller, work)| leaves(caller, work));
        self.waiting = kept;
        left.into_iter().map(|(_, work)| work).collect()
    }

    /// Only those that wait have turns to take.
    fn forget_others(&mut self) {
        let waiting: HashSet<(&str, Connection)> = self
            .waiting
            .iter()
            .map(|(caller, _)| (&**caller.name(), caller.session()))
            .collect();
        self.sessions
            .retain(|(tenant, session), _| waiting.contains(&(&**tenant, *session)));
        let tenants: HashSet<&str> = waiting.iter().map(|(tenant, _)| *tenant).collect();
        self.tenants.retain(|tenant, _| tenants.contains(&**tenant));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(tenant: &str, session: Connection) -> Caller {
        Caller::named(tenant, Some(session))
    }

    /// The work in the order of its turns, `width` at a time of which the oldest ends first.
    fn order(queue: &mut TurnQueue<usize>, callers: &[Caller], width: usize) -> Vec<usize> {
        let (mut order, mut active) = (Vec::new(), VecDeque::new());
        loop {
            let next = queue.next(&active.iter().map(|work: &usize| &callers[*work]).collect());
            let Some(work) = next.and_then(|at| queue.take(at)) else {
                return order;
            };
            order.push(work);
            active.push_back(work);
            if active.len() == width {
                active.pop_front();
            }
        }
    }

    fn queue(callers: &[Caller]) -> TurnQueue<usize> {
        let mut queue = TurnQueue::default();
        for (work, caller) in callers.iter().enumerate() {
            queue.push(caller.clone(), work);
        }
        queue
    }

    #[test]
    fn a_late_session_is_next_whatever_waits_of_another() {
        let mut callers = vec![caller("", 1); 20];
        callers.push(caller("", 2));
        for width in [1, 4] {
            let order = order(&mut queue(&callers), &callers, width);
            assert!(order[..2].contains(&20), "{order:?}");
            let mut flood = order;
            flood.retain(|work| *work != 20);
            assert!(flood.is_sorted(), "{flood:?}");
        }
    }

    #[test]
    fn tenants_share_equally_however_many_sessions_they_have() {
        // Ten sessions of one tenant, one of another, six requests each.
        let callers: Vec<Caller> = (0..60)
            .map(|work| caller("many", work % 10))
            .chain((0..6).map(|_| caller("one", 77)))
            .collect();
        for width in [1, 2, 4] {
            let order = order(&mut queue(&callers), &callers, width);
            assert_eq!(order.len(), 66);
            let of_one = order[..12].iter().filter(|work| **work >= 60).count();
            assert!((5..=6).contains(&of_one), "{width}: {order:?}");
            let mut sessions: Vec<Connection> = order.iter().map(|work| callers[*work].session()).collect();
            sessions.retain(|session| *session != 77);
            assert_eq!(
                sessions[..10].iter().collect::<HashSet<_>>().len(),
                10,
                "{width}: {order:?}"
            );
        }
    }

    #[test]
    fn only_callers_that_wait_are_remembered() {
        let callers: Vec<Caller> = (0..5).map(|session| caller("t", session)).collect();
        let mut queue = queue(&callers);
        assert_eq!(queue.remove_if(|caller, _| caller.session() == 3), [3]);
        order(&mut queue, &callers, 1);
        assert_eq!((queue.len(), queue.tenants.len(), queue.sessions.len()), (0, 0, 0));
    }
}
