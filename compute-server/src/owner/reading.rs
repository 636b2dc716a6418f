//! Streams of tensor chunks: parameters, gradients, logits. A chunk is made when the client has room for it.

use std::collections::{HashSet, VecDeque};

use candle_compute_proto::v1;
use candle_models::{DType, KeyValueCache, ParameterInfo};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::View;
use super::overlay::Overlay;
use super::state::{Owner, Versions};
use crate::chunks::{self, CHUNK_ELEMENTS};
use crate::error::{Error, Result};
use crate::requests::{Phase, RequestGuard};

/// Tokens whose logits are computed at a time.
const LOGITS_BLOCK: usize = 64;

/// Which chunks are wanted.
#[derive(Debug, Default, Clone)]
pub(crate) struct Selection {
    names: Option<HashSet<String>>,
    chunks: Option<HashSet<u32>>,
    /// Leave data and norm out.
    pub(crate) without_data: bool,
}

impl Selection {
    /// The selection of a request; all when it has none.
    pub(crate) fn new(selection: Option<v1::TensorSelection>) -> Self {
        let selection = selection.unwrap_or_default();
        Self {
            names: (!selection.names.is_empty()).then(|| selection.names.into_iter().collect()),
            chunks: (!selection.chunks.is_empty()).then(|| selection.chunks.into_iter().collect()),
            without_data: selection.without_data,
        }
    }

    /// The next wanted parameter and chunk from `next` on, which is moved behind them.
    pub(crate) fn next(&self, parameters: &[ParameterInfo], next: &mut (usize, usize)) -> Option<(usize, usize)> {
        while let Some(parameter) = parameters.get(next.0) {
            if parameter.is_listed() && self.names.as_ref().is_none_or(|names| names.contains(&parameter.name)) {
                while next.1 < chunks::count(parameter) {
                    let found = *next;
                    next.1 += 1;
                    let number = u32::try_from(found.1).unwrap_or(u32::MAX);
                    if self.chunks.as_ref().is_none_or(|chunks| chunks.contains(&number)) {
                        return Some(found);
                    }
                }
            }
            *next = (next.0 + 1, 0);
        }
        None
    }
}

/// What a chunk is made of.
enum Source {
    Parameters(Selection),
    Gradients(Selection),
    Logits { tokens: Vec<u32>, cache: KeyValueCache },
}

/// One stream of chunks.
pub(crate) struct ChunkReader {
    view: View,
    source: Source,
    /// Parameter and chunk to be looked at next.
    next: (usize, usize),
    ended: bool,
    /// State that the first chunk saw; the others must be of the same.
    fingerprint: Option<(Versions, u64)>,
    pending: VecDeque<Message>,
    output: mpsc::Sender<Message>,
    request: Option<RequestGuard>,
}

/// A chunk, the error that ends the stream, or the message without a chunk that ends it well.
pub(crate) type Message = Result<v1::ReadGradientsResponse>;

impl ChunkReader {
    fn new(view: View, source: Source, output: mpsc::Sender<Message>) -> Self {
        let pending = VecDeque::new();
        Self {
            view,
            source,
            next: (0, 0),
            ended: false,
            fingerprint: None,
            pending,
            output,
            request: None,
        }
    }

    /// A stream of parameters.
    pub(crate) fn parameters(view: View, selection: Selection, output: mpsc::Sender<Message>) -> Self {
        Self::new(view, Source::Parameters(selection), output)
    }

    /// A stream of the accumulated gradient.
    pub(crate) fn gradients(view: View, selection: Selection, output: mpsc::Sender<Message>) -> Self {
        Self::new(view, Source::Gradients(selection), output)
    }

    /// Ends it with an error.
    pub(super) fn end(self, error: Error) {
        // Where the channel is full, its receiver misses the last message and reports that the model is gone.
        let _ = self.output.try_send(Err(error));
    }

    /// Sends what waits, as far as there is room; false when the client is gone.
    fn flush(&mut self) -> bool {
        while let Some(chunk) = self.pending.pop_front() {
            match self.output.try_send(chunk) {
                Ok(()) => {}
                Err(TrySendError::Full(chunk)) => {
                    self.pending.push_front(chunk);
                    return true;
                }
                Err(TrySendError::Closed(_)) => return false,
            }
        }
        !self.output.is_closed()
    }

    fn is_cancelled(&self) -> bool {
        self.request.as_ref().is_some_and(|request| request.is_cancelled())
    }
}

impl Owner {
    /// Adds a stream of parameters or gradients.
    pub(super) fn add_reader(&mut self, mut reader: ChunkReader) {
        // Of an adapter its own parameters alone.
        reader.next.0 = self.model.decoder.own_parameters().start;
        self.readers.push(reader);
    }

    /// Adds a stream of the logits of one sequence.
    ///
    /// # Errors
    /// For tokens that the model cannot read.
    pub(crate) fn read_logits(
        &mut self,
        view: View,
        tokens: Vec<u32>,
        output: mpsc::Sender<Message>,
        request: RequestGuard,
    ) -> Result<()> {
        let decoder = self.decoder(&view)?;
        decoder.check_tokens(&tokens, decoder.config().context_length)?;
        let cache = decoder.new_cache();
        request.set_phase(Phase::Running);
        let mut reader = ChunkReader::new(view, Source::Logits { tokens, cache }, output);
        reader.request = Some(request);
        self.readers.push(reader);
        Ok(())
    }

    /// Makes the next chunk of every stream that has room; false when none had.
    pub(super) fn serve_readers(&mut self) -> bool {
        let mut worked = false;
        for mut reader in std::mem::take(&mut self.readers) {
            if !reader.flush() {
                continue;
            }
            if reader.is_cancelled() {
                reader.end(Error::Cancelled);
                continue;
            }
            while reader.pending.is_empty() && !reader.ended {
                worked = true;
                if let Err(error) = self.produce(&mut reader) {
                    reader.ended = true;
                    reader.pending.push_back(Err(error));
                } else if reader.ended {
                    reader.pending.push_back(Ok(v1::ReadGradientsResponse::default()));
                }
                reader.ended |= !reader.flush();
                if matches!(reader.source, Source::Logits { .. }) {
                    break;
                }
            }
            if !(reader.ended && reader.pending.is_empty()) {
                self.readers.push(reader);
            }
        }
        worked
    }

    /// Makes the next chunk, or marks the end.
    fn produce(&mut self, reader: &mut ChunkReader) -> Result<()> {
        let micro_batches = self
            .visible_parts(&reader.view)
            .iter()
            .map(|part| part.gradient.micro_batches())
            .sum();
        let fingerprint = (self.versions, micro_batches);
        let same = match (reader.fingerprint.get_or_insert(fingerprint), &reader.source) {
            (_, Source::Logits { .. }) => true,
            (first, Source::Parameters(_)) => first.0.weights == fingerprint.0.weights,
            (first, Source::Gradients(_)) => *first == fingerprint,
        };
        if !same {
            return Err(Error::Stale(format!(
                "model \"{}\" was changed while it was read",
                self.shared.name
            )));
        }
        match &reader.source {
            Source::Parameters(_) => self.produce_parameter(reader),
            Source::Gradients(_) => self.produce_gradient(reader, micro_batches),
            Source::Logits { .. } => self.produce_logits(reader),
        }
    }

    fn produce_parameter(&mut self, reader: &mut ChunkReader) -> Result<()> {
        let Source::Parameters(selection) = &reader.source else {
            return Ok(());
        };
        // Writes that are staged without a step or a merge are read as they are: no copy of the model is needed for them.
        let recomputed = self.overlay(&reader.view).is_some_and(Overlay::is_recomputed);
        if recomputed {
            self.decoder(&reader.view)?;
        }
        let decoder = match recomputed {
            true => self.present_decoder(&reader.view),
            false => &self.model.decoder,
        };
        let Some((index, chunk)) = selection.next(decoder.parameters(), &mut reader.next) else {
            reader.ended = true;
            return Ok(());
        };
        let parameter = &decoder.parameters()[index];
        let mut message = chunks::describe(parameter, chunk);
        message.trainable = self.trainable(&reader.view)[index];
        if selection.without_data {
            message.dtype = chunks::dtype_of(parameter.dtype).into();
        } else if let Some(values) = self.staged_chunk(&reader.view, (index, chunk), || {
            Ok(decoder.read_elements(&parameter.name, chunks::range(parameter, chunk))?)
        })? {
            let dtype = chunks::dtype_of(parameter.dtype);
            message.dtype = dtype.into();
            chunks::fill(&mut message, &values, dtype);
        } else {
            let data = decoder.read_parameter(&parameter.name, chunks::range(parameter, chunk))?;
            message.dtype = match data.dtype {
                DType::F16 => v1::DataType::F16,
                DType::BF16 => v1::DataType::Bf16,
                _ => v1::DataType::F32,
            }
            .into();
            message.norm = data.norm;
            message.data = data.data.into();
        }
        reader.pending.push_back(Ok(v1::ReadGradientsResponse {
            chunk: Some(message),
            ..Default::default()
        }));
        Ok(())
    }

    fn produce_gradient(&mut self, reader: &mut ChunkReader, micro_batches: u64) -> Result<()> {
        let Source::Gradients(selection) = &reader.source else {
            return Ok(());
        };
        let parts = self.visible_parts(&reader.view);
        let parts: Vec<_> = parts.iter().map(|part| &part.gradient).collect();
        let trainable = self.trainable(&reader.view);
        let mut wanted = || selection.next(&self.shared.parameters, &mut reader.next);
        let next = std::iter::from_fn(|| wanted().filter(|_| !parts.is_empty())).find(|(index, _)| trainable[*index]);
        let Some((index, chunk)) = next else {
            reader.ended = true;
            return Ok(());
        };
        let tokens: u64 = parts.iter().map(|part| part.tokens()).sum();
        let loss_tokens: u64 = parts.iter().map(|part| part.loss_tokens()).sum();
        let loss = |part: &&candle_models::training::Gradient| part.loss().unwrap_or(0.0) * part.loss_tokens() as f64;
        let loss = (tokens > 0 && tokens == loss_tokens).then(|| parts.iter().map(loss).sum::<f64>() / tokens as f64);
        let message = chunks::gradient_chunk(&parts, &self.shared.parameters[index], chunk, selection.without_data)?;
        reader.pending.push_back(Ok(v1::ReadGradientsResponse {
            chunk: Some(message),
            tokens,
            micro_batches,
            loss,
            overflows: parts.iter().map(|part| part.overflows()).sum(),
            underflows: parts.iter().map(|part| part.underflows()).sum(),
        }));
        Ok(())
    }

    fn produce_logits(&mut self, reader: &mut ChunkReader) -> Result<()> {
        let decoder = self.decoder(&reader.view)?;
        let Source::Logits { tokens, cache } = &mut reader.source else {
            return Ok(());
        };
        let first = cache.len();
        let end = tokens.len().min(first + LOGITS_BLOCK);
        if first == end {
            reader.ended = true;
            return Ok(());
        }
        let output = &reader.output;
        let logits = decoder.next_logits(&tokens[first..end], cache, &|| output.is_closed())?;
        let logits = logits
            .flatten_all()
            .and_then(|flat| flat.to_vec1::<f32>())
            .map_err(candle_models::Error::from)?;
        let vocabulary = decoder.config().vocabulary;
        let shape = vec![tokens.len() as u64, vocabulary as u64];
        for (number, piece) in logits.chunks(CHUNK_ELEMENTS).enumerate() {
            let (chunk, offset) = (reader.next.1 + number, first * vocabulary + number * CHUNK_ELEMENTS);
            let message = chunks::f32_chunk("logits", &shape, chunk, offset, piece);
            reader.pending.push_back(Ok(v1::ReadGradientsResponse {
                chunk: Some(message),
                ..Default::default()
            }));
        }
        reader.next.1 += logits.len().div_ceil(CHUNK_ELEMENTS);
        if let Some(request) = &reader.request {
            request.set_progress(end as u64, tokens.len() as u64);
        }
        Ok(())
    }
}
