//! Full pages by the tokens that they hold and all tokens before them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::page::{PAGE_POSITIONS, Page};

/// The weights that pages were computed with: only sequences of the same scope share pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope(pub(super) EntryId);

/// Number of a page in the index, or of the beginning of a scope. Never used twice.
pub(super) type EntryId = u64;

/// A page's place: the page before it, which stands for all tokens before, and its own tokens. They are compared, not
/// only their hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    pub(super) parent: EntryId,
    pub(super) tokens: [u32; PAGE_POSITIONS],
}

#[derive(Debug)]
struct Entry {
    page: Arc<Page>,
    place: Place,
    /// Indexed pages right behind this one.
    children: usize,
    /// When a sequence last asked for it.
    used: u64,
}

/// A tree of pages under each scope.
#[derive(Debug, Default)]
pub(super) struct PrefixIndex {
    entries: HashMap<EntryId, Entry>,
    places: HashMap<Place, EntryId>,
    /// Pages without indexed pages behind them, by when they were used: in this order they are evicted, but for those that
    /// sequences hold, of which there are as many as sequences at most.
    leaves: BTreeMap<u64, EntryId>,
    /// The weights of each name, and the scope that they have now.
    scopes: HashMap<Box<str>, ([u64; 2], Scope)>,
}

/// Counts uses in all pools, so that their pages can be compared. No two pages are used at one time.
static CLOCK: AtomicU64 = AtomicU64::new(0);
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

fn now() -> u64 {
    CLOCK.fetch_add(1, Ordering::Relaxed)
}

fn new_id() -> EntryId {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

impl PrefixIndex {
    /// The scope of the weights `name` in their present `version`. Pages of another version are forgotten.
    pub(super) fn scope(&mut self, name: &str, version: [u64; 2]) -> Scope {
        match self.scopes.get(name) {
            Some((held, scope)) if *held == version => return *scope,
            Some((_, Scope(root))) => {
                let root = *root;
                self.forget(root);
            }
            None => {}
        }
        let scope = Scope(new_id());
        self.scopes.insert(name.into(), (version, scope));
        scope
    }

    /// Forgets the pages of all scopes but those whose version is to be kept.
    pub(super) fn retain_scopes(&mut self, keep: impl Fn([u64; 2]) -> bool) {
        let mut stale = Vec::new();
        self.scopes.retain(|_, (version, scope)| {
            let kept = keep(*version);
            stale.extend((!kept).then_some(scope.0));
            kept
        });
        stale.into_iter().for_each(|root| self.forget(root));
    }

    /// Removes all pages behind `root`.
    fn forget(&mut self, root: EntryId) {
        let mut children: HashMap<EntryId, Vec<EntryId>> = HashMap::new();
        for (id, entry) in &self.entries {
            children.entry(entry.place.parent).or_default().push(*id);
        }
        let mut doomed = vec![root];
        while let Some(id) = doomed.pop() {
            doomed.extend(children.remove(&id).unwrap_or_default());
            self.remove(id);
        }
    }

    fn remove(&mut self, id: EntryId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.places.remove(&entry.place);
        self.leaves.remove(&entry.used);
        if let Some(parent) = self.entries.get_mut(&entry.place.parent) {
            parent.children -= 1;
            if parent.children == 0 {
                self.leaves.insert(parent.used, entry.place.parent);
            }
        }
        Some(entry)
    }

    /// The page that holds `tokens` behind `parent`.
    pub(super) fn find(&mut self, parent: EntryId, tokens: &[u32; PAGE_POSITIONS]) -> Option<(EntryId, Arc<Page>)> {
        let place = Place {
            parent,
            tokens: *tokens,
        };
        let id = *self.places.get(&place)?;
        let entry = self.entries.get_mut(&id)?;
        let before = std::mem::replace(&mut entry.used, now());
        if self.leaves.remove(&before).is_some() {
            self.leaves.insert(entry.used, id);
        }
        Some((id, Arc::clone(&entry.page)))
    }

    /// Adds a full page behind `parent`; none where that has been forgotten. If the place is taken, the page there is
    /// returned, which holds the same.
    pub(super) fn insert(
        &mut self,
        parent: EntryId,
        tokens: &[u32; PAGE_POSITIONS],
        page: &Arc<Page>,
    ) -> Option<(EntryId, Arc<Page>)> {
        if let Some(found) = self.find(parent, tokens) {
            return Some(found);
        }
        match self.entries.get_mut(&parent) {
            Some(entry) => {
                entry.children += 1;
                self.leaves.remove(&entry.used);
            }
            None if self.scopes.values().any(|(_, scope)| scope.0 == parent) => {}
            None => return None,
        }
        let (id, place) = (
            new_id(),
            Place {
                parent,
                tokens: *tokens,
            },
        );
        let entry = Entry {
            page: Arc::clone(page),
            place,
            children: 0,
            used: now(),
        };
        self.leaves.insert(entry.used, id);
        self.entries.insert(id, entry);
        self.places.insert(place, id);
        Some((id, Arc::clone(page)))
    }

    /// Pages indexed.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Pages that nothing but the index holds.
    pub(super) fn unused(&self) -> usize {
        let unused = self
            .entries
            .values()
            .filter(|entry| Arc::strong_count(&entry.page) == 1);
        unused.count()
    }

    /// When the page that would be evicted first was used; none when all are in use.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.first_unused(0).map(|(used, _)| used)
    }

    /// Of the pages that no sequence holds, nor one behind it, the one used longest ago at `from` or later.
    fn first_unused(&self, from: u64) -> Option<(u64, EntryId)> {
        let mut leaves = self.leaves.range(from..).map(|(used, id)| (*used, *id));
        leaves.find(|(_, id)| self.entries.get(id).is_some_and(Entry::is_unused))
    }

    /// Removes at most `count` pages that no sequence holds, those first that were not asked for the longest, and never
    /// one before a page that stays. Returns the number.
    pub(super) fn evict(&mut self, count: usize) -> usize {
        let (mut evicted, mut from) = (0, 0);
        while evicted < count
            && let Some((used, id)) = self.first_unused(from)
        {
            let parent = self.remove(id).map(|entry| entry.place.parent);
            evicted += 1;
            // The page before was used earlier, if no sequence has asked for it alone since.
            let parent = parent.and_then(|parent| self.entries.get(&parent));
            from = parent.map_or(used, |parent| parent.used.min(used));
        }
        evicted
    }
}

impl Entry {
    /// Whether nothing but the index holds the page.
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.page) == 1
    }
}
