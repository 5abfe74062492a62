//! One step's tokens, flat: what to run, where it stands, where its keys and values live.

use crate::error::Result;

pub use hfcore_kernels::attention::{PAGE, Span};

/// One step: the rows of all running sequences, one after the other.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    pub spans: Vec<Span>,
    /// The adapter of each span, if it has one.
    pub adapters: Vec<Option<u32>>,
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
        self.adapters.clear();
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
        self.adapters.push(None);
        self.tokens.extend_from_slice(tokens);
        self.positions
            .extend((start..start + tokens.len()).map(|p| p as u32));
        self.pages.extend_from_slice(pages);
    }

    /// The sequence that was added last runs with this adapter.
    pub fn adapt(&mut self, adapter: Option<u32>) {
        if let Some(last) = self.adapters.last_mut() {
            *last = adapter;
        }
    }

    /// For each adapter that is used its rows, ascending, and which of `outputs` are among them.
    pub fn adapted(&self) -> Vec<Adapted> {
        let mut found: Vec<Adapted> = Vec::new();
        for (span, adapter) in self.spans.iter().zip(&self.adapters) {
            let Some(adapter) = *adapter else {
                continue;
            };
            let rows = span.first_row as u32..(span.first_row + span.rows) as u32;
            let at = found.iter().position(|a| a.adapter == adapter);
            let at = at.unwrap_or_else(|| {
                found.push(Adapted {
                    adapter,
                    rows: Vec::new(),
                    outputs: Vec::new(),
                });
                found.len() - 1
            });
            let outputs = (0..).zip(&self.outputs);
            let outputs = outputs.filter(|(_, row)| rows.contains(row));
            found[at].outputs.extend(outputs.map(|(i, _): (u32, _)| i));
            found[at].rows.extend(rows.clone());
        }
        found
    }

    /// The spans of `outputs` alone, as if there were no other rows.
    pub fn output_spans(&self, out: &mut Vec<Span>) {
        out.clear();
        let mut rows = (0..).zip(&self.outputs).peekable();
        for span in &self.spans {
            let end = span.first_row + span.rows;
            while let Some((first_row, &row)) = rows.next_if(|(_, row)| (**row as usize) < end) {
                let start = span.start + row as usize - span.first_row;
                match out.last_mut() {
                    // The next row of the same sequence.
                    Some(last)
                        if last.first_page == span.first_page
                            && last.start + last.rows == start =>
                    {
                        last.rows += 1;
                    }
                    _ => out.push(Span {
                        first_row,
                        rows: 1,
                        start,
                        ..*span
                    }),
                }
            }
        }
    }
}

/// The rows of a step that run with one adapter.
#[derive(Debug, PartialEq, Eq)]
pub struct Adapted {
    pub adapter: u32,
    pub rows: Vec<u32>,
    /// Places in `Batch::outputs`.
    pub outputs: Vec<u32>,
}

/// What the engine asks of a decoder.
pub trait Forward: Send {
    fn vocab_size(&self) -> usize;
    /// Run one step; returns the logits of `batch.outputs`, `[outputs, vocab_size]`. Those of tokens that a row does not
    /// allow may be minus infinity; none where the caller is gone.
    fn forward(&mut self, batch: &Batch, caller: &mut dyn Caller) -> Result<&[f32]>;
    /// Bytes of a page of its cache, over all layers; none where it does not give them away.
    fn page_bytes(&self) -> Option<usize> {
        None
    }
    /// Add a page's bytes to `out`.
    fn read_page(&self, _page: u32, _out: &mut Vec<u8>) {}
    /// Overwrite a page with `page_bytes` bytes.
    fn write_page(&mut self, _page: u32, _bytes: &[u8]) {}
}

/// Who wants a step, as the decoder that runs it may ask.
pub trait Caller {
    /// Which tokens a row may become: asked once the layers have run, when what is worked out beside them is there. For the row at `outputs[output]`: bit `i % 32` of word `i / 32` allows token `i`, and those beyond the last word
    /// are not allowed. None: any, or it is not known yet.
    fn allowed(&mut self, output: usize) -> Option<&[u32]>;
    /// Whether nobody wants the step any more: asked before each layer.
    fn gone(&mut self) -> bool;
}

/// Every row may become any token, and all is wanted.
impl Caller for () {
    fn gone(&mut self) -> bool {
        false
    }
    fn allowed(&mut self, _output: usize) -> Option<&[u32]> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_outputs_stand_where_their_rows_stood() {
        let mut batch = Batch::default();
        batch.push(&[1; 5], 10, &[0], false);
        batch.push(&[1; 3], 0, &[1], true);
        batch.push(&[1], 40, &[2, 3, 4], false);
        batch.outputs = vec![1, 3, 4, 5, 8];
        let mut spans = Vec::new();
        batch.output_spans(&mut spans);
        let short = |s: &Span| (s.first_row, s.rows, s.first_page, s.pages, s.start, s.long);
        assert_eq!(
            spans.iter().map(short).collect::<Vec<_>>(),
            [
                (0, 1, 0, 1, 11, false),
                (1, 2, 0, 1, 13, false),
                (3, 1, 1, 1, 0, true),
                (4, 1, 2, 3, 40, false),
            ]
        );
        batch.outputs.clear();
        batch.output_spans(&mut spans);
        assert_eq!(spans, []);
    }

    #[test]
    fn rows_of_one_adapter_are_together() {
        let mut batch = Batch::default();
        for (rows, adapter) in [(2, Some(7)), (1, None), (2, Some(3)), (1, Some(7))] {
            batch.push(&vec![1; rows], 0, &[0], false);
            batch.adapt(adapter);
        }
        batch.outputs = vec![1, 2, 5];
        let found = batch.adapted();
        let of = |a: &Adapted| (a.adapter, a.rows.clone(), a.outputs.clone());
        assert_eq!(
            found.iter().map(of).collect::<Vec<_>>(),
            [(7, vec![0, 1, 5], vec![0, 2]), (3, vec![3, 4], vec![])]
        );
    }
}
