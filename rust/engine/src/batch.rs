//! One step's tokens, flat: what to run, where it stands, where its keys and values live.

use crate::error::Result;

pub use hfcore_kernels::attention::{PAGE, Span};

/// One step: the rows of all running sequences, one after the other.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    pub spans: Vec<Span>,
    pub pages: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub outputs: Vec<u32>,
}

impl Batch {
    /// Empty it, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
        self.pages.clear();
        self.outputs.clear();
    }

    /// Add one sequence's next tokens, which stand at `start..` and live in `pages`.
    pub fn push(&mut self, tokens: &[u32], start: usize, pages: &[u32], long: bool) {
        debug_assert!((start + tokens.len()).div_ceil(PAGE) <= pages.len());
        self.spans.push(Span {
            first_row: self.tokens.len(),
            rows: tokens.len(),
            first_page: self.pages.len(),
            pages: pages.len(),
            start,
            long,
        });
        self.tokens.extend_from_slice(tokens);
        self.positions
            .extend((start..start + tokens.len()).map(|p| p as u32));
        self.pages.extend_from_slice(pages);
    }
}

/// What the engine asks of a decoder.
pub trait Forward: Send {
    fn vocab_size(&self) -> usize;
    /// Run one step; returns the logits of `batch.outputs`, `[outputs, vocab_size]`.
    fn forward(&mut self, batch: &Batch) -> Result<&[f32]>;
}
