//! Ids to text: each decoder of the `tokenizers` crate as a step that is fed token by token, so that a text
//! can be streamed and is the same as when decoded whole.

use std::sync::Arc;

use tokenizers::DecoderWrapper;
use tokenizers::tokenizer::Decoder;

use super::Tokenizer;
use super::model::alphabet_bytes;

/// The text of one sequence, token by token. What [`push`](Self::push) and [`finish`](Self::finish) give,
/// joined, is [`Tokenizer::decode`] of all the ids: no half characters, no U+FFFD for a character still to
/// come, no lost or doubled space.
///
/// Like transformers it decodes a completion from its own ids alone, not from the prompt's.
///
/// Bytes spelled as tokens (`<0xE2>`) are held until the run of them ends, since one wrong byte makes
/// every byte of the run U+FFFD; byte-level text is held for at most three bytes.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stages: Vec<Stage>,
    skip_special: bool,
    /// Special tokens that have text all the same.
    shown: Vec<u32>,
}

impl Detokenizer {
    /// Start a sequence; with `skip_special`, special tokens give no text.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let stages = tokenizer.stages.clone();
        Self {
            tokenizer,
            stages,
            skip_special,
            shown: Vec::new(),
        }
    }

    /// Give these special tokens their text, whatever becomes of others.
    pub fn showing(mut self, ids: Vec<u32>) -> Self {
        self.shown = ids;
        self
    }

    /// Take the next id; returns the text that is now certain, which may be empty. An id that the
    /// vocabulary does not have (a padded embedding row) gives nothing.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        let skip = self.skip_special && !self.shown.contains(&id);
        self.tokenizer.step(&mut self.stages, id, skip, &mut text);
        text
    }

    /// End the sequence; returns what was held back. The next push starts a new one.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        finish(&mut self.stages, &mut text);
        self.stages = self.tokenizer.stages.clone();
        text
    }
}

/// One step of a decoder, fed token by token. Each does what the decoder of the same name does to a whole
/// list; tests hold the two together.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    /// Each token alone.
    Each(Arc<DecoderWrapper>),
    /// The first token differs from the others.
    First {
        decoder: Arc<DecoderWrapper>,
        first: bool,
    },
    /// Equal neighbours are one (CTC).
    Distinct {
        decoder: Arc<DecoderWrapper>,
        last: Option<String>,
    },
    /// The last token differs from the others.
    Last {
        decoder: Arc<DecoderWrapper>,
        held: Option<String>,
    },
    /// Tokens like `<0xE2>`, gathered until the run of them ends.
    ByteFallback { run: Vec<u8> },
    /// Tokens of one character per byte, joined; the bytes of an unfinished character wait.
    ByteLevel { held: Vec<u8> },
    /// Characters cut from both ends of each token.
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    /// The same on the joined text: `start` counts down, the last `stop` characters wait.
    StripText {
        content: char,
        start: usize,
        stop: usize,
        held: String,
    },
    /// The joined text as one token, once it is whole: for decoders that rarely follow `Fuse`.
    Gather { text: String },
    /// No decoder: tokens with a space between.
    Spaced { first: bool },
}

/// The steps of a decoder; without one, tokens stand with a space between.
pub(super) fn stages(decoder: Option<&DecoderWrapper>) -> Vec<Stage> {
    let Some(decoder) = decoder else {
        return vec![Stage::Spaced { first: true }];
    };
    let mut stages = Vec::new();
    let mut fused = false;
    push_stages(decoder, &mut stages, &mut fused);
    stages
}

fn push_stages(decoder: &DecoderWrapper, stages: &mut Vec<Stage>, fused: &mut bool) {
    match (decoder, *fused) {
        (DecoderWrapper::Sequence(sequence), _) => {
            for decoder in sequence.get_decoders() {
                push_stages(decoder, stages, fused);
            }
            return;
        }
        (DecoderWrapper::Fuse(_), _) => {
            *fused = true;
            return;
        }
        (DecoderWrapper::Strip(s), true) => {
            let (content, start, stop) = (s.content, s.start, s.stop);
            stages.push(Stage::StripText {
                content,
                start,
                stop,
                held: String::new(),
            });
            return;
        }
        (_, true) => stages.push(Stage::Gather {
            text: String::new(),
        }),
        (_, false) => {}
    }
    *fused = matches!(decoder, DecoderWrapper::ByteLevel(_));
    let shared = Arc::new(decoder.clone());
    stages.push(match decoder {
        DecoderWrapper::WordPiece(_) | DecoderWrapper::Metaspace(_) => Stage::First {
            decoder: shared,
            first: true,
        },
        DecoderWrapper::CTC(_) => Stage::Distinct {
            decoder: shared,
            last: None,
        },
        DecoderWrapper::BPE(_) => Stage::Last {
            decoder: shared,
            held: None,
        },
        DecoderWrapper::ByteFallback(_) => Stage::ByteFallback { run: Vec::new() },
        DecoderWrapper::ByteLevel(_) => Stage::ByteLevel { held: Vec::new() },
        DecoderWrapper::Strip(s) => Stage::Strip {
            content: s.content,
            start: s.start,
            stop: s.stop,
        },
        _ => Stage::Each(shared),
    });
}

/// Run one token through the stages, to the end of `out`.
pub(super) fn feed(stages: &mut [Stage], token: String, out: &mut String) {
    let Some((stage, rest)) = stages.split_first_mut() else {
        out.push_str(&token);
        return;
    };
    match stage {
        Stage::Each(decoder) => feed_all(rest, chain(decoder, vec![token]), out),
        Stage::First {
            decoder,
            first: first @ true,
        } => {
            *first = false;
            feed_all(rest, chain(decoder, vec![token]), out);
        }
        Stage::First { decoder, .. } => {
            feed_all(
                rest,
                chain(decoder, vec![String::new(), token])
                    .into_iter()
                    .skip(1),
                out,
            );
        }
        Stage::Distinct { last, .. } if last.as_ref() == Some(&token) => {}
        Stage::Distinct { decoder, last } => {
            *last = Some(token.clone());
            feed_all(rest, chain(decoder, vec![token]), out);
        }
        Stage::Last { decoder, held } => {
            let Some(token) = held.replace(token) else {
                return;
            };
            feed_all(
                rest,
                chain(decoder, vec![token, String::new()])
                    .into_iter()
                    .take(1),
                out,
            );
        }
        Stage::ByteFallback { run } => match fallback_byte(&token) {
            Some(byte) => run.push(byte),
            None => {
                feed_all(rest, fallback_text(run), out);
                feed(rest, token, out);
            }
        },
        Stage::ByteLevel { held } => {
            held.extend(byte_level_bytes(&token));
            let text = complete_text(held);
            if !text.is_empty() {
                feed(rest, text, out);
            }
        }
        Stage::Strip {
            content,
            start,
            stop,
        } => {
            feed(rest, strip(&token, *content, *start, *stop).to_owned(), out);
        }
        Stage::StripText {
            content,
            start,
            stop,
            held,
        } => {
            held.push_str(&token);
            let text = settled_text(held, *content, start, *stop);
            if !text.is_empty() {
                feed(rest, text, out);
            }
        }
        Stage::Gather { text } => text.push_str(&token),
        Stage::Spaced { first } => {
            let token = if *first { token } else { format!(" {token}") };
            *first = false;
            feed(rest, token, out);
        }
    }
}

fn feed_all(stages: &mut [Stage], tokens: impl IntoIterator<Item = String>, out: &mut String) {
    for token in tokens {
        feed(stages, token, out);
    }
}

/// Let every stage give what it held back, in order.
pub(super) fn finish(mut stages: &mut [Stage], out: &mut String) {
    while let Some((stage, rest)) = stages.split_first_mut() {
        match stage {
            Stage::Last { decoder, held } => {
                if let Some(token) = held.take() {
                    feed_all(rest, chain(decoder, vec![token]), out);
                }
            }
            Stage::ByteFallback { run } => feed_all(rest, fallback_text(run), out),
            Stage::ByteLevel { held } => {
                let text = String::from_utf8_lossy(held).into_owned();
                feed(rest, text, out);
            }
            Stage::StripText {
                content,
                stop,
                held,
                ..
            } => {
                feed(rest, strip(held, *content, 0, *stop).to_owned(), out);
            }
            Stage::Gather { text } => feed(rest, std::mem::take(text), out),
            _ => {}
        }
        stages = rest;
    }
}

/// The crate's own decoder. None of those used here fails; if one ever did, its tokens go on unchanged.
fn chain(decoder: &DecoderWrapper, tokens: Vec<String>) -> Vec<String> {
    decoder.decode_chain(tokens.clone()).unwrap_or(tokens)
}

/// `<0xE2>` to its byte.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// A run of bytes as one token, or as one U+FFFD per byte when it is not UTF-8.
fn fallback_text(run: &mut Vec<u8>) -> Vec<String> {
    let run = std::mem::take(run);
    if run.is_empty() {
        return Vec::new();
    }
    String::from_utf8(run)
        .map(|text| vec![text])
        .unwrap_or_else(|e| vec!["\u{fffd}".to_owned(); e.as_bytes().len()])
}

/// The bytes of a byte-level token; of a token with any other character, its own UTF-8.
pub(super) fn byte_level_bytes(token: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    match alphabet_bytes(token, &mut bytes) {
        true => bytes,
        false => token.as_bytes().to_vec(),
    }
}

/// Take the finished characters off the front of `bytes`; wrong bytes become U+FFFD as in
/// `String::from_utf8_lossy`.
fn complete_text(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(e) => {
                let (valid, after) = rest.split_at(e.valid_up_to());
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                rest = after;
                let Some(wrong) = e.error_len() else { break };
                text.push('\u{fffd}');
                rest = &rest[wrong..];
            }
        }
    }
    let done = bytes.len() - rest.len();
    bytes.drain(..done);
    text
}

/// Cut up to `start` and `stop` characters `content` from the ends of `text`.
fn strip(text: &str, content: char, start: usize, stop: usize) -> &str {
    let mut text = text;
    for _ in 0..start {
        let Some(shorter) = text.strip_prefix(content) else {
            break;
        };
        text = shorter;
    }
    for _ in 0..stop {
        let Some(shorter) = text.strip_suffix(content) else {
            break;
        };
        text = shorter;
    }
    text
}

/// Take from `held` what no later text can change: the front without what `start` still cuts, up to the
/// last `stop` characters.
fn settled_text(held: &mut String, content: char, start: &mut usize, stop: usize) -> String {
    while *start > 0 && !held.is_empty() {
        if held.starts_with(content) {
            held.drain(..content.len_utf8());
            *start -= 1;
        } else {
            *start = 0;
        }
    }
    let end = match stop {
        0 => held.len(),
        _ => held.char_indices().nth_back(stop - 1).map_or(0, |(i, _)| i),
    };
    held.drain(..end).collect()
}
