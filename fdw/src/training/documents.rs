//! Reads the documents of a source one after the other, tokenizing many at a time.

use std::collections::VecDeque;

use candle_compute_proto::v1::TokenizeTextsRequest;

use super::progress::Progress;
use super::source::{Body, Source};
use crate::client::{Client, read};
use crate::error::{Error, Result};
use crate::procedure::{Cursor, CursorRow};
use crate::transaction;

/// Rows fetched at a time.
const ROWS_PER_FETCH: i64 = 64;

/// Bytes of texts that are tokenized by one call, at least one text.
const BYTES_PER_CALL: usize = 4 << 20;

/// A document, tokenized.
pub(super) struct Document {
    pub(super) tokens: Vec<i32>,
    /// For each token whether it counts as a target; None: all do.
    mask: Option<Vec<bool>>,
}

impl Document {
    /// What is to be predicted where the document's token `index` comes next: that token, or -100.
    pub(super) fn target(&self, index: usize) -> i64 {
        let counts = || self.mask.as_ref().is_none_or(|mask| mask[index]);
        match self.tokens.get(index) {
            Some(token) if counts() => i64::from(*token),
            _ => super::packing::IGNORED,
        }
    }
}

/// What tokenizing needs.
#[derive(Clone, Copy)]
pub(crate) struct Tokenizing<'a> {
    pub(crate) client: &'a Client,
    pub(crate) model: &'a str,
    pub(crate) progress: &'a Progress,
}

/// The documents of an open cursor.
pub(super) struct Reader<'a> {
    tokenizing: Tokenizing<'a>,
    cursor: Cursor,
    body: Body,
    waiting: VecDeque<Document>,
    ended: bool,
}

/// A row before it is tokenized.
enum Raw {
    Text(String),
    Tokens(Vec<i32>, Option<Vec<bool>>),
}

impl<'a> Reader<'a> {
    /// Reads on from where the cursor is.
    pub(super) fn new(tokenizing: Tokenizing<'a>, source: &Source, cursor: Cursor) -> Self {
        Self {
            tokenizing,
            cursor,
            body: source.body,
            waiting: VecDeque::new(),
            ended: false,
        }
    }

    /// The document that comes next; None at the end.
    pub(super) fn front(&mut self) -> Result<Option<&Document>> {
        while self.waiting.is_empty() && !self.ended {
            let body = self.body;
            let rows = self.cursor.fetch(ROWS_PER_FETCH, |row| raw(row, body))?;
            self.ended = rows.is_empty();
            self.tokenize(rows)?;
        }
        Ok(self.waiting.front())
    }

    /// Goes on to the next document.
    pub(super) fn advance(&mut self) {
        self.waiting.pop_front();
    }

    fn tokenize(&mut self, rows: Vec<Raw>) -> Result<()> {
        let mut texts = Vec::new();
        for row in rows {
            match row {
                Raw::Text(text) => texts.push(text),
                Raw::Tokens(tokens, mask) => self.waiting.push_back(Document { tokens, mask }),
            }
        }
        let documents = tokenize(self.tokenizing, texts, false)?.into_iter();
        self.waiting.extend(documents.map(|document| Document {
            tokens: document.token_ids.into_iter().map(|token| token as i32).collect(),
            mask: None,
        }));
        Ok(())
    }
}

/// Tokenizes texts by as few calls as their size allows.
pub(crate) fn tokenize(
    tokenizing: Tokenizing<'_>,
    texts: Vec<String>,
    with_ends: bool,
) -> Result<Vec<candle_compute_proto::v1::TokenizedText>> {
    let mut documents = Vec::with_capacity(texts.len());
    let mut texts = texts.into_iter().peekable();
    while let Some(first) = texts.next() {
        let mut bytes = first.len();
        let mut call = vec![first];
        while let Some(text) = texts.next_if(|text| bytes + text.len() <= BYTES_PER_CALL) {
            bytes += text.len();
            call.push(text);
        }
        let count = call.len();
        let client = tokenizing.client;
        let request = TokenizeTextsRequest {
            transaction: transaction::reading(client.session)?,
            model: tokenizing.model.to_string(),
            texts: call,
            with_ends,
        };
        let answer = tokenizing
            .progress
            .wait(read!(client, inference.tokenize_texts(request)))?;
        if answer.texts.len() != count {
            return Err(Error::protocol("tokens for every text"));
        }
        documents.extend(answer.texts);
    }
    Ok(documents)
}

fn raw(row: &CursorRow, body: Body) -> Result<Raw> {
    match body {
        Body::Text => Ok(Raw::Text(row.get::<String>(1).unwrap_or_default())),
        Body::Tokens => {
            let tokens = row.get::<Vec<Option<i32>>>(1).unwrap_or_default();
            let tokens: Option<Vec<i32>> = tokens.into_iter().collect();
            let tokens = tokens.ok_or_else(|| Error::bad_value("an array of tokens contains NULL"))?;
            let Some(mask) = row.get::<Vec<Option<bool>>>(2) else {
                return Ok(Raw::Tokens(tokens, None));
            };
            let mask: Option<Vec<bool>> = mask.into_iter().collect();
            let mask = mask.ok_or_else(|| Error::bad_value("a loss_mask contains NULL"))?;
            if mask.len() != tokens.len() {
                return Err(Error::bad_value(format!(
                    "a loss_mask has {} elements, but its tokens are {}",
                    mask.len(),
                    tokens.len()
                )));
            }
            Ok(Raw::Tokens(tokens, Some(mask)))
        }
    }
}
