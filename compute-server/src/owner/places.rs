//! Places in a model's queue: whoever has many of them leaves some for others.

use crate::access::Caller;
use crate::error::{Error, Result};

/// How many places a session, or a tenant, may have for each that it leaves free. So one alone can have nearly all of them,
/// several share them evenly, and the last one is not for those who have others.
const FOR_EACH_FREE: usize = 16;

/// A queue.
pub(super) struct Queue<'a> {
    /// What waits in it: generation, embedding.
    pub(super) kind: &'static str,
    pub(super) model: &'a str,
    /// Places in all.
    pub(super) places: usize,
    /// Whose work waits.
    pub(super) waiting: Vec<&'a Caller>,
}

impl Queue<'_> {
    /// Refuses so many further pieces of work of `caller` for which there are no places.
    ///
    /// # Errors
    /// `Limit`.
    pub(super) fn check(&self, caller: &Caller, wanted: usize) -> Result<()> {
        let free = self.places.saturating_sub(self.waiting.len());
        let further = match wanted {
            1 => format!("a further {}", self.kind),
            wanted => format!("{wanted} further {}s", self.kind),
        };
        if wanted > free {
            return Err(self.full(format!("{further} in the queue of model \"{}\"", self.model)));
        }
        let of_tenant = || self.waiting.iter().filter(|other| other.name() == caller.name());
        let of_session = of_tenant().filter(|other| other.session() == caller.session());
        let mut held = vec![("session", of_session.count())];
        // Where no tokens are asked for, everybody is one tenant.
        if !caller.name().is_empty() {
            held.push(("tenant", of_tenant().count()));
        }
        match held.into_iter().find(|(_, held)| wanted > share(*held, free)) {
            None => Ok(()),
            Some((whose, held)) => Err(self.full(format!(
                "{further} of a {whose} that has {held} in the queue of model \"{}\", where others are to find places too,",
                self.model
            ))),
        }
    }

    fn full(&self, what: String) -> Error {
        Error::Limit {
            what,
            limit: self.places as u64,
            flag: "max-queue",
        }
    }
}

/// Of the `free` places those that one may take who has `held` others.
fn share(held: usize, free: usize) -> usize {
    let most = (FOR_EACH_FREE * free).saturating_sub(held) / (FOR_EACH_FREE + 1);
    most.max(usize::from(held == 0)).min(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places that each caller gets when they ask for one in turns, until nobody gets any more.
    fn filled(callers: &[Caller], places: usize) -> Vec<usize> {
        let (mut waiting, mut got) = (Vec::new(), vec![0; callers.len()]);
        loop {
            let before = waiting.len();
            for (caller, got) in callers.iter().zip(&mut got) {
                let queue = Queue {
                    kind: "generation",
                    model: "m",
                    places,
                    waiting: waiting.clone(),
                };
                if queue.check(caller, 1).is_ok() {
                    waiting.push(caller);
                    *got += 1;
                }
            }
            if waiting.len() == before {
                return got;
            }
        }
    }

    fn sessions(tenant: &str, count: u64) -> Vec<Caller> {
        (0..count).map(|session| Caller::named(tenant, Some(session))).collect()
    }

    #[test]
    fn nobody_fills_a_queue_alone_and_a_late_caller_finds_a_place() {
        for places in [2, 3, 16, 17, 100, 1024] {
            for count in [1, 2, 5] {
                let got = filled(&sessions("", count), places);
                let all: usize = got.iter().sum();
                assert!(all < places || count >= places as u64, "{places} {got:?}");
                assert!(
                    got.iter().max().unwrap() - got.iter().min().unwrap() <= 1,
                    "{places} {got:?}"
                );
                // The places that were left are for others.
                let mut with_others = sessions("", count);
                with_others.extend(sessions("late", 1));
                let late = *filled(&with_others, places).last().unwrap();
                assert!(late >= 1 || count >= places as u64, "{places} {count}");
            }
        }
        assert_eq!(filled(&sessions("", 1), 1), [1]);
        assert_eq!(filled(&sessions("", 1), 1024), [963]);
        assert_eq!(filled(&sessions("", 2), 1024), [496, 496]);
    }

    #[test]
    fn many_sessions_of_a_tenant_leave_places_for_another_tenant() {
        let got = filled(&sessions("many", 50), 100);
        assert_eq!(got.iter().sum::<usize>(), 94);
        // Without tokens everybody is the same tenant, and only sessions count.
        let got = filled(&sessions("", 50), 100);
        assert_eq!(got.iter().sum::<usize>(), 99);
    }

    #[test]
    fn a_refusal_says_whether_the_queue_is_full_or_the_share() {
        let (one, other) = (Caller::named("ann", Some(1)), Caller::named("ann", Some(2)));
        let queue = |count| Queue {
            kind: "embedding",
            model: "m",
            places: 4,
            waiting: vec![&one; count],
        };
        let refusal = |count, caller, wanted| queue(count).check(caller, wanted).unwrap_err().to_string();
        let share = "a further embedding of a session that has 3 in the queue of model \"m\", where others are to find \
                     places too, exceeds the limit of 4 set by --max-queue";
        assert_eq!(refusal(3, &one, 1), share);
        assert!(refusal(3, &other, 1).contains("of a tenant that has 3"));
        assert!(refusal(4, &other, 1).starts_with("a further embedding in the queue of model \"m\" exceeds"));
        assert!(refusal(0, &one, 5).starts_with("5 further embeddings in the queue"));
        assert!(queue(3).check(&Caller::named("bob", Some(3)), 1).is_ok());
    }
}
