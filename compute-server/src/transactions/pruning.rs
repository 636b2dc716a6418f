//! Which checkpoints go when one is published: a transaction that makes one deletes those that its model does not keep.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::transaction::{Transaction, Write, WriteKind};
use crate::app::App;
use crate::names::ModelKey;
use crate::owner::View;

impl App {
    /// Adds the deletions that the settings of the models ask for to the writes of a transaction.
    pub(super) fn prune(&self, transaction: &Transaction, writes: &mut Vec<Write>) {
        let made = writes.iter().filter_map(|write| match &write.kind {
            WriteKind::CreateCheckpoint(staged) => Some(staged.row.model.clone()),
            _ => None,
        });
        for name in made.collect::<BTreeSet<String>>() {
            let key = ModelKey::from_text(&name);
            let Some(model) = transaction.model(&key, self.registry.find(&key)) else {
                continue;
            };
            let retention = model.retention(&View::Transaction(Arc::clone(&transaction.id)));
            let mut newest = None;
            let rows = self.checkpoints.list().into_iter().filter(|row| row.model == name);
            let mut tagged: BTreeMap<u64, bool> = rows.map(|row| (row.step, !row.tag.is_empty())).collect();
            for write in writes.iter() {
                match &write.kind {
                    WriteKind::CreateCheckpoint(staged) if staged.row.model == name => {
                        newest = Some(staged.row.step);
                        tagged.insert(staged.row.step, !staged.row.tag.is_empty());
                    }
                    WriteKind::DeleteCheckpoint((model, step)) if *model == name => {
                        tagged.remove(step);
                    }
                    _ => {}
                }
            }
            let checkpoints: Vec<(u64, bool)> = tagged.into_iter().collect();
            let pruned = retention
                .pruned(&checkpoints)
                .into_iter()
                .filter(|step| Some(*step) != newest);
            writes.extend(pruned.map(|step| Write {
                subtransaction: 1,
                kind: WriteKind::DeleteCheckpoint((name.clone(), step)),
            }));
        }
    }
}
