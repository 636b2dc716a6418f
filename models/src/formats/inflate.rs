//! Deflated data as a stream that can be taken up again where it was left (RFC 1951).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use miniz_oxide::inflate::stream::{InflateState, inflate};
use miniz_oxide::{DataFormat, MZError, MZFlush, MZStatus};

/// Bytes read from the file at once.
const BUFFER: usize = 1 << 16;

/// Reads a part of a file without moving the file's own position.
#[derive(Debug)]
pub(super) struct Section<'a> {
    file: &'a File,
    pub(super) position: u64,
    pub(super) end: u64,
}

impl<'a> Section<'a> {
    /// The bytes from `start` up to `end`.
    pub(super) fn new(file: &'a File, start: u64, end: u64) -> Self {
        Self {
            file,
            position: start,
            end,
        }
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.position)).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..wanted], self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

/// A place in a deflated stream: the decompressor with its window, and where its next byte of input lies.
#[derive(Clone)]
pub(super) struct Place {
    state: Box<InflateState>,
    position: u64,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Place")
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// Inflates a section.
pub(super) struct Inflate<'a> {
    input: Section<'a>,
    buffer: Box<[u8]>,
    begin: usize,
    end: usize,
    state: Box<InflateState>,
    finished: bool,
}

impl<'a> Inflate<'a> {
    /// From the beginning of a stream without header.
    pub(super) fn new(input: Section<'a>) -> Self {
        Self::over(input, InflateState::new_boxed(DataFormat::Raw))
    }

    /// From a place within the stream that ends before `end`.
    pub(super) fn resumed(file: &'a File, place: &Place, end: u64) -> Self {
        Self::over(Section::new(file, place.position, end), place.state.clone())
    }

    fn over(input: Section<'a>, state: Box<InflateState>) -> Self {
        Self {
            input,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            begin: 0,
            end: 0,
            state,
            finished: false,
        }
    }

    /// Where the stream stands.
    pub(super) fn place(&self) -> Place {
        Place {
            state: self.state.clone(),
            position: self.position(),
        }
    }

    /// Where the next byte of input lies in the file.
    pub(super) fn position(&self) -> u64 {
        self.input.position - (self.end - self.begin) as u64
    }
}

impl Read for Inflate<'_> {
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        while !self.finished && !output.is_empty() {
            if self.begin == self.end {
                self.begin = 0;
                self.end = self.input.read(&mut self.buffer)?;
            }
            let dry = self.begin == self.end;
            let result = inflate(
                &mut self.state,
                &self.buffer[self.begin..self.end],
                output,
                MZFlush::None,
            );
            self.begin += result.bytes_consumed;
            match result.status {
                Ok(MZStatus::StreamEnd) => self.finished = true,
                Ok(_) | Err(MZError::Buf) => {}
                Err(_) => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the deflated data is damaged",
                    ));
                }
            }
            if result.bytes_written > 0 {
                return Ok(result.bytes_written);
            }
            if dry && !self.finished {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(0)
    }
}
