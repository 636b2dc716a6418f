//! What of the log belongs to which model, so that its length can be bounded.

use std::collections::{BTreeMap, VecDeque};

/// Changes of one frame to one model.
#[derive(Debug, Clone, Copy)]
struct Logged {
    number: u64,
    bytes: u64,
    tokens: u64,
}

/// A model in the log.
#[derive(Debug, Default)]
pub(super) struct Track {
    changes: VecDeque<Logged>,
    bytes: u64,
    tokens: u64,
    base_bytes: u64,
    /// The frame that holds its base.
    pub(super) base_number: u64,
    /// The last frame that the base includes.
    pub(super) through: u64,
    /// The base's folder below `bases`, if it has one.
    pub(super) folder: Option<String>,
    /// Whether a new base is being saved.
    pub(super) saving: bool,
}

/// Models that have not been unloaded.
#[derive(Debug, Default)]
pub(super) struct Tracks(pub(super) BTreeMap<u64, Track>);

impl Tracks {
    /// Notes a base in frame `number` that includes everything up to frame `through`; returns the folder of the one before.
    pub(super) fn base(
        &mut self,
        model: u64,
        (number, through): (u64, u64),
        bytes: u64,
        folder: Option<String>,
    ) -> Option<String> {
        let track = self.0.entry(model).or_default();
        while let Some(first) = track.changes.front().filter(|first| first.number <= through).copied() {
            track.changes.pop_front();
            track.bytes -= first.bytes;
            track.tokens -= first.tokens;
        }
        track.base_bytes = bytes;
        (track.base_number, track.through) = (number, through);
        std::mem::replace(&mut track.folder, folder)
    }

    /// Notes changes.
    pub(super) fn change(&mut self, model: u64, number: u64, bytes: u64, tokens: u64) {
        let track = self.0.entry(model).or_default();
        track.changes.push_back(Logged { number, bytes, tokens });
        track.bytes += bytes;
        track.tokens += tokens;
    }

    /// Bytes and tokens of a model's changes since its base.
    pub(super) fn since_base(&self, model: u64) -> (u64, u64) {
        self.0.get(&model).map_or((0, 0), |track| (track.bytes, track.tokens))
    }

    /// Bytes that the models need of the log.
    pub(super) fn needed(&self) -> u64 {
        self.0.values().map(|track| track.bytes + track.base_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_takes_the_changes_that_it_includes() {
        let mut tracks = Tracks::default();
        assert_eq!(tracks.base(1, (1, 0), 7, None), None);
        for number in 1..=4 {
            tracks.change(1, number, 10, 100);
        }
        assert_eq!((tracks.since_base(1), tracks.needed()), ((40, 400), 47));
        assert_eq!(tracks.base(1, (5, 3), 5, Some("a".into())), None);
        assert_eq!((tracks.since_base(1), tracks.needed()), ((10, 100), 15));
        assert_eq!(tracks.base(1, (6, 4), 5, None), Some("a".into()));
        assert_eq!(tracks.since_base(1), (0, 0));
    }
}
