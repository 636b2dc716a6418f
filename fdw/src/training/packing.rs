//! Batches from documents.

use candle_compute_proto::v1::Sequence;

use super::documents::Reader;
use crate::error::{Error, Result};

/// A target that contributes nothing.
pub(super) const IGNORED: i64 = -100;

/// How documents become sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PackingKind {
    /// Every document is a sequence of its own, which attends to nothing else; a longer one is cut into several.
    Documents,
    /// Documents follow each other, and sequences of one length are cut from that, whatever they cut through.
    Concatenate,
}

impl PackingKind {
    const ALL: [Self; 2] = [Self::Documents, Self::Concatenate];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Documents => "documents",
            Self::Concatenate => "concatenate",
        }
    }

    /// The kind of that name.
    pub(super) fn named(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::bad_value(format!("packing is \"{name}\"; it must be one of {names}"))
        })
    }
}

/// How documents become batches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    kind: PackingKind,
    /// Tokens of a sequence, at most.
    length: usize,
    /// Tokens of a batch, at most.
    budget: usize,
}

/// A place in the documents of one pass over them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    /// Documents that are done with.
    pub(super) document: i64,
    /// Tokens of the next one that are done with.
    pub(super) offset: usize,
}

impl Packing {
    /// Batches of `rows` times `length` tokens.
    ///
    /// # Errors
    /// 22023 for sequences too short to have a target.
    pub(super) fn new(kind: PackingKind, length: i32, rows: i32) -> Result<Self> {
        if kind == PackingKind::Concatenate && length < 2 {
            return Err(Error::bad_value(
                "sequence_length must be at least 2 with packing => 'concatenate'",
            ));
        }
        let length = length as usize;
        Ok(Self {
            kind,
            length,
            budget: length.saturating_mul(rows as usize),
        })
    }

    /// The packing that measures a loss: documents, in batches of about `tokens`.
    pub(super) fn for_evaluation(&self, tokens: usize) -> Self {
        Self {
            kind: PackingKind::Documents,
            length: self.length,
            budget: self.length.max(tokens),
        }
    }

    /// The next batch; `position` moves behind what it takes. Empty at the end of the documents. The last batch may be
    /// smaller.
    pub(super) fn batch(&self, reader: &mut Reader<'_>, position: &mut Position) -> Result<Vec<Sequence>> {
        match self.kind {
            PackingKind::Documents => self.documents(reader, position),
            PackingKind::Concatenate => self.concatenated(reader, position),
        }
    }

    /// Whole documents, as long as they fit. A document longer than a sequence is cut into pieces; each piece's last token
    /// predicts the next piece's first, so that no target is lost. A piece without any target is left out.
    fn documents(&self, reader: &mut Reader<'_>, position: &mut Position) -> Result<Vec<Sequence>> {
        let mut batch = Vec::new();
        let mut tokens = 0;
        while let Some(document) = reader.front()? {
            let total = document.tokens.len();
            // The last token predicts nothing.
            if position.offset + 1 >= total {
                reader.advance();
                *position = Position {
                    document: position.document + 1,
                    offset: 0,
                };
                continue;
            }
            let end = total.min(position.offset + self.length);
            if tokens + end - position.offset > self.budget {
                break;
            }
            let targets: Vec<i64> = (position.offset..end).map(|index| document.target(index + 1)).collect();
            if targets.iter().any(|target| *target != IGNORED) {
                tokens += end - position.offset;
                batch.push(sequence(document.tokens[position.offset..end].iter().copied(), targets));
            }
            position.offset = end;
        }
        Ok(batch)
    }

    /// Rows of tokens as they come.
    fn concatenated(&self, reader: &mut Reader<'_>, position: &mut Position) -> Result<Vec<Sequence>> {
        let mut batch = Vec::new();
        while batch.len() * self.length < self.budget {
            let (mut tokens, mut targets) = (Vec::with_capacity(self.length), Vec::with_capacity(self.length));
            while tokens.len() < self.length {
                let Some(document) = reader.front()? else { break };
                let end = document.tokens.len().min(position.offset + self.length - tokens.len());
                for index in position.offset..end {
                    if !tokens.is_empty() {
                        targets.push(document.target(index));
                    }
                    tokens.push(document.tokens[index]);
                }
                position.offset = end;
                if end == document.tokens.len() {
                    reader.advance();
                    *position = Position {
                        document: position.document + 1,
                        offset: 0,
                    };
                }
            }
            if tokens.len() < 2 {
                break;
            }
            targets.push(IGNORED);
            batch.push(sequence(tokens.into_iter(), targets));
        }
        Ok(batch)
    }
}

fn sequence(tokens: impl Iterator<Item = i32>, targets: Vec<i64>) -> Sequence {
    Sequence {
        token_ids: tokens.map(i64::from).collect(),
        targets,
        has_targets: true,
        loss_weight: None,
    }
}
