//! Reading the log at the start of the server.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::frame::{self, Found, MAGIC, Next};
use super::messages::{Changes, Entry, FileChange, Header, Kind, LogBase, origin};
use crate::error::{Error, Result};

/// What a log holds.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// The models that were not unloaded, in the order of their numbers.
    pub(crate) models: Vec<LoggedModel>,
    /// Published transactions with the number of their writes, oldest first.
    pub(crate) published: Vec<(String, u64)>,
    /// What the last frame does to checkpoints: it may not have happened yet.
    pub(crate) files: Vec<FileChange>,
    /// Number of the last frame.
    pub(super) number: u64,
    /// Bytes of whole frames.
    pub(super) length: u64,
    /// Models that damage has just been found to concern.
    pub(super) newly_lost: Vec<(u64, String)>,
}

/// A model that is to be made again.
#[derive(Debug)]
pub(crate) struct LoggedModel {
    /// Its number.
    pub(crate) id: u64,
    base: Option<Location>,
    pub(super) base_number: u64,
    pub(super) through: u64,
    /// What happened to it since its base, in order.
    pub(crate) changes: Vec<LoggedChanges>,
    /// Why it cannot be made again.
    pub(crate) lost: Option<Lost>,
    file: Arc<File>,
}

/// Damage that concerns a model.
#[derive(Debug)]
pub(crate) struct Lost {
    /// A base that includes this frame makes up for it.
    number: u64,
    /// What happened.
    pub(crate) reason: String,
}

/// What one transaction did to a model.
#[derive(Debug)]
pub(crate) struct LoggedChanges {
    /// The frame.
    pub(crate) number: u64,
    /// Tokens to be computed.
    pub(crate) tokens: u64,
    /// Variant of the kernels they were computed with.
    pub(crate) simd: String,
    location: Location,
}

#[derive(Debug, Clone, Copy)]
struct Location {
    offset: u64,
    bytes: u64,
    checksum: u32,
}

impl LoggedModel {
    fn new(id: u64, file: &Arc<File>) -> Self {
        Self {
            id,
            base: None,
            base_number: 0,
            through: 0,
            changes: Vec::new(),
            lost: None,
            file: Arc::clone(file),
        }
    }

    /// How it begins.
    ///
    /// # Errors
    /// `Internal` when the log is damaged there.
    pub(crate) fn base(&self) -> Result<LogBase> {
        let location = self.base.ok_or_else(|| damaged("its beginning is missing"))?;
        decode(&self.file, location)
    }

    /// Reads changes.
    ///
    /// # Errors
    /// `Internal` when the log is damaged there.
    pub(crate) fn read(&self, changes: &LoggedChanges) -> Result<Changes> {
        decode(&self.file, changes.location)
    }

    /// Bytes of its base, and bytes and tokens of its changes.
    pub(super) fn sizes(&self) -> (u64, impl Iterator<Item = (u64, u64, u64)>) {
        let changes = self.changes.iter();
        let sizes = changes.map(|changes| (changes.number, changes.location.bytes, changes.tokens));
        (self.base.map_or(0, |location| location.bytes), sizes)
    }

    /// The folder of its base, if it has one. `Err` when that cannot be told.
    pub(super) fn folder(&self) -> Result<Option<String>> {
        Ok(match self.base()?.origin.and_then(|origin| origin.kind) {
            Some(origin::Kind::Saved(folder)) => Some(folder),
            _ => None,
        })
    }
}

fn damaged(what: &str) -> Error {
    Error::Internal(format!("the commit log is damaged: {what}"))
}

fn decode<M: prost::Message + Default>(file: &File, location: Location) -> Result<M> {
    let data = bytes_at(file, location)?;
    M::decode(data.as_slice()).map_err(|error| damaged(&format!("at byte {}: {error}", location.offset)))
}

fn bytes_at(file: &File, location: Location) -> Result<Vec<u8>> {
    let mut data = vec![0; usize::try_from(location.bytes).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut data, location.offset)
        .map_err(|error| Error::io("reading the commit log", error))?;
    match crc32fast::hash(&data) == location.checksum {
        true => Ok(data),
        false => Err(damaged(&format!(
            "the {} bytes from byte {} on do not have their checksum",
            location.bytes, location.offset
        ))),
    }
}

/// Locations of a frame's entries.
fn locations(found: &Found) -> impl Iterator<Item = (Entry, Location)> {
    let mut offset = found.data;
    found.header.entries.iter().map(move |entry| {
        let location = Location {
            offset,
            bytes: entry.bytes,
            checksum: entry.checksum,
        };
        offset += entry.bytes;
        (*entry, location)
    })
}

/// Reads all headers of a log. A last frame that is not whole was never answered, and is left out. Damage in the middle
/// concerns the models that there were at that point, and no others.
pub(super) fn scan(file: &Arc<File>) -> Result<Recovered> {
    let failed = |error| Error::io("reading the commit log", error);
    let length = file.metadata().map_err(failed)?.len();
    let mut magic = [0; MAGIC.len()];
    if length < MAGIC.len() as u64 || file.read_exact_at(&mut magic, 0).is_err() || magic != *MAGIC {
        return Err(damaged(
            "it does not begin as one; move commits/log away to start without it",
        ));
    }
    let mut scan = Scan {
        file,
        models: BTreeMap::new(),
        recovered: Recovered::default(),
    };
    let mut offset = MAGIC.len() as u64;
    loop {
        match frame::read(file, offset, length).map_err(failed)? {
            Next::End => break,
            Next::Frame(found) if found.end == length && !is_whole(file, &found) => {
                cut_off(offset, length);
                break;
            }
            Next::Frame(found) => {
                scan.add(&found);
                offset = found.end;
            }
            Next::Damage => match frame::search(file, offset, length).map_err(failed)? {
                None => {
                    cut_off(offset, length);
                    break;
                }
                Some(next) => {
                    scan.damage(offset, next);
                    offset = next;
                }
            },
        }
    }
    Ok(scan.finish(offset))
}

fn is_whole(file: &File, found: &Found) -> bool {
    locations(found).all(|(_, location)| bytes_at(file, location).is_ok())
}

fn cut_off(offset: u64, length: u64) {
    let bytes = length - offset;
    tracing::warn!(
        offset,
        bytes,
        "the commit log ends in an unfinished frame, which is cut off: its transaction was not committed"
    );
}

struct Scan<'a> {
    file: &'a Arc<File>,
    models: BTreeMap<u64, LoggedModel>,
    recovered: Recovered,
}

impl Scan<'_> {
    fn add(&mut self, found: &Found) {
        let Header {
            number,
            transaction,
            writes,
            simd,
            files,
            earlier,
            ..
        } = &found.header;
        self.recovered.number = self.recovered.number.max(*number);
        let earlier = earlier
            .iter()
            .map(|published| (published.transaction.clone(), published.writes));
        self.recovered.published.extend(earlier);
        if !transaction.is_empty() {
            self.recovered.published.push((transaction.clone(), *writes));
        }
        self.recovered.files.clone_from(files);
        for (entry, location) in locations(found) {
            let model = self
                .models
                .entry(entry.model)
                .or_insert_with(|| LoggedModel::new(entry.model, self.file));
            match Kind::try_from(entry.kind).unwrap_or(Kind::Lost) {
                Kind::Changes => model.changes.push(LoggedChanges {
                    number: *number,
                    tokens: entry.tokens,
                    simd: simd.clone(),
                    location,
                }),
                Kind::Base => {
                    model.base = Some(location);
                    (model.base_number, model.through) = (*number, entry.through);
                    model.changes.retain(|changes| changes.number > entry.through);
                    model.lost.take_if(|lost| lost.number <= entry.through);
                }
                Kind::Drop => drop(self.models.remove(&entry.model)),
                Kind::Lost => {
                    let reason = bytes_at(self.file, location)
                        .ok()
                        .and_then(|text| String::from_utf8(text).ok());
                    model.lost = Some(Lost {
                        number: *number,
                        reason: reason.unwrap_or_else(|| "the commit log was damaged".to_owned()),
                    });
                }
            }
        }
    }

    /// Notes that what stands between two offsets cannot be read.
    fn damage(&mut self, from: u64, to: u64) {
        let reason =
            format!("the bytes {from} to {to} of the commit log are damaged: what was committed there is not known");
        tracing::error!(
            from,
            to,
            models = self.models.len(),
            "a part of the commit log is damaged"
        );
        // The frame that follows has a larger number than all that is missing; a base saved after it includes that.
        let number = self.recovered.number + 1;
        for model in self.models.values_mut() {
            self.recovered.newly_lost.push((model.id, reason.clone()));
            model.lost = Some(Lost {
                number,
                reason: reason.clone(),
            });
        }
    }

    fn finish(mut self, length: u64) -> Recovered {
        let models = self.models;
        self.recovered
            .newly_lost
            .retain(|(id, _)| models.get(id).is_some_and(|model| model.lost.is_some()));
        self.recovered.models = models.into_values().collect();
        self.recovered.length = length;
        self.recovered
    }
}
