//! Text that remembers which of its bytes came from data: messages, tools, documents, variables.
//!
//! A render that does not ask for segments marks nothing, and then nothing here costs more than a
//! comparison with None. Where a text is made in a way that is not followed, all of it is data.

use std::ops::Range;
use std::sync::Arc;

use super::value::Value;

/// The bytes that came from data, in order and apart; None where none did.
pub(super) type Origin = Option<Arc<Vec<Range<usize>>>>;

/// The origin of a text that is data as a whole, however long it is.
pub(super) fn all_data() -> Origin {
    let whole = 0..usize::MAX;
    Some(Arc::new(Vec::from([whole])))
}

/// A string; `markup` marks text declared safe from HTML escaping.
#[derive(Clone, Debug)]
pub(super) struct Str {
    pub text: Arc<str>,
    pub markup: bool,
    pub origin: Origin,
}

impl From<&str> for Str {
    fn from(text: &str) -> Str {
        Str::from(Arc::from(text))
    }
}
impl From<Arc<str>> for Str {
    fn from(text: Arc<str>) -> Str {
        Str {
            text,
            markup: false,
            origin: None,
        }
    }
}

impl Str {
    /// A text made of this one in a way that is not followed: data as soon as this holds some.
    pub fn made_into(&self, text: impl Into<Arc<str>>) -> Str {
        Str {
            text: text.into(),
            markup: self.markup,
            origin: self.origin.as_ref().and_then(|_| all_data()),
        }
    }

    /// The bytes of `range`, which must lie on characters.
    pub fn part(&self, range: Range<usize>) -> Str {
        if range.len() == self.text.len() {
            return self.clone();
        }
        let mut cut = Text::default();
        cut.part(self, range);
        cut.finish(self.markup)
    }

    /// This text's part `inner`, which must be a slice of it.
    pub fn slice(&self, inner: &str) -> Str {
        let start = (inner.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize);
        let end = start + inner.len();
        match end <= self.text.len() {
            true => self.part(start..end),
            false => self.made_into(inner),
        }
    }
}

impl From<Str> for Value {
    fn from(text: Str) -> Value {
        Value::Str(text)
    }
}

/// A text being made.
#[derive(Default, Debug)]
pub(super) struct Text {
    pub text: String,
    data: Vec<Range<usize>>,
}

impl Text {
    pub fn with_capacity(bytes: usize) -> Text {
        Text {
            text: String::with_capacity(bytes),
            data: Vec::new(),
        }
    }

    /// Text of the template's own.
    pub fn own(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Text of this origin as a whole: data if there is any.
    pub fn made(&mut self, text: &str, origin: &Origin) {
        let start = self.text.len();
        self.text.push_str(text);
        if origin.is_some() {
            self.mark(start..self.text.len());
        }
    }

    /// Another text, with its origin.
    pub fn str(&mut self, text: &Str) {
        if text.origin.is_some() {
            return self.part(text, 0..text.text.len());
        }
        self.text.push_str(&text.text);
    }

    /// A part of another text, with its origin.
    pub fn part(&mut self, text: &Str, range: Range<usize>) {
        let start = self.text.len();
        self.text.push_str(&text.text[range.clone()]);
        for data in text.origin.iter().flat_map(|origin| origin.iter()) {
            let (from, to) = (data.start.max(range.start), data.end.min(range.end));
            if from < to {
                self.mark(start + from - range.start..start + to - range.start);
            }
        }
    }

    /// Take what stands behind `start` off again.
    pub fn take_from(&mut self, start: usize) -> Str {
        let mut taken = Text {
            text: self.text.split_off(start),
            data: Vec::new(),
        };
        while let Some(last) = self.data.pop() {
            if last.start < start {
                self.data.push(last.start..last.end.min(start));
                if last.end > start {
                    taken.data.push(0..last.end - start);
                }
                break;
            }
            taken.data.push(last.start - start..last.end - start);
        }
        taken.data.reverse();
        taken.finish(false)
    }

    fn mark(&mut self, range: Range<usize>) {
        match self.data.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if range.is_empty() => {}
            _ => self.data.push(range),
        }
    }

    pub fn finish(self, markup: bool) -> Str {
        Str {
            text: self.text.into(),
            markup,
            origin: (!self.data.is_empty()).then(|| Arc::new(self.data)),
        }
    }

    /// The text, and its parts in order with whether each is the template's own.
    pub fn into_segments(self) -> (String, Vec<(Range<usize>, bool)>) {
        let mut segments = Vec::with_capacity(2 * self.data.len() + 1);
        let mut at = 0;
        for data in self.data {
            if at < data.start {
                segments.push((at..data.start, true));
            }
            at = data.end;
            segments.push((data, false));
        }
        if at < self.text.len() {
            segments.push((at..self.text.len(), true));
        }
        (self.text, segments)
    }
}
