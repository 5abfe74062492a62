//! Text to ids, and ids to text as UTF-8 completes. Home of the `tokenizers` crate; knows no model.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::Value as Json;
use tokenizers::tokenizer::{Decoder, Model, PostProcessor};
use tokenizers::{DecoderWrapper, PaddingStrategy, TruncationParams};

use crate::error::{Error, Result};

/// The largest `tokenizer.json` that is read; the largest known one has 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;
/// The largest of the small files beside it (configuration, chat templates).
const MAX_SIDE_FILE_BYTES: u64 = 16 << 20;
/// A padding length or a post-processor beyond these is a broken or hostile file.
const MAX_PADDING: usize = 1 << 20;
const MAX_ADDED_BY_TEMPLATE: usize = 1024;
/// Below this many bytes of text a batch is encoded on the caller's thread: starting one costs about 50 us.
const PARALLEL_BYTES: usize = 16 << 10;

/// The named tokens of transformers' special tokens map that are single strings.
const SPECIAL_NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A tokenizer with the names and templates that travel with it. `Send + Sync`; share it by `Arc`.
///
/// Ids are those of Hugging Face `tokenizers`, which does the encoding. Truncation and padding that the
/// file sets are honoured.
#[derive(Debug)]
pub struct Tokenizer {
    path: String,
    inner: tokenizers::Tokenizer,
    stages: Vec<Stage>,
    vocab_size: usize,
    known: Known,
}

/// What is known of a tokenizer beside its pipeline.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// `"bos_token"` to `"<s>"` and so on.
    pub special_tokens: BTreeMap<String, String>,
    pub bos_id: Option<u32>,
    pub eos_ids: Vec<u32>,
    /// Name to Jinja source; `"default"` is the main one.
    pub chat_templates: BTreeMap<String, String>,
    /// What `tokenizer_config.json` says of the form of answers, unchecked.
    pub response_template: Option<Json>,
}

impl Tokenizer {
    /// Read one `tokenizer.json`. Special token names and chat templates stay empty.
    ///
    /// Errors: [`Error::ModelFile`] when the file is missing, too large or not a tokenizer.
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = read_capped(path, MAX_TOKENIZER_BYTES)?;
        Self::from_bytes(&path.display().to_string(), &bytes)
    }

    /// Parse the text of a `tokenizer.json`; `name` is what errors call it.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self> {
        // The crate panics on syntax errors inside some of its parts, so a cut file is found out first.
        serde_json::from_slice::<serde::de::IgnoredAny>(bytes)
            .map_err(|e| bad_file(name, format!("not JSON: {e}")))?;
        let inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|problem| bad_file(name, format!("not a tokenizer: {problem}")))?;
        let vocab_size = inner
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |&id| id as usize + 1);
        Self::new(name, inner, vocab_size, Known::default())
    }

    /// Read `tokenizer.json` and what lies beside it: `tokenizer_config.json`, `special_tokens_map.json`,
    /// `chat_template.jinja`, `chat_template.json`, `additional_chat_templates/*.jinja`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let mut tokenizer = Self::from_file(&dir.join("tokenizer.json"))?;
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Json::Null);
        let map = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or(Json::Null);
        let special_tokens = special_tokens(&config, &map);
        let id_of = |name: &str| {
            special_tokens
                .get(name)
                .and_then(|t| tokenizer.token_to_id(t))
        };
        let bos_id = id_of("bos_token");
        let eos_ids = id_of("eos_token").into_iter().collect();
        let chat_templates = chat_templates(dir, &config)?;
        let form = ["response_template", "response_schema"];
        let given = |key: &&str| config.get(*key).filter(|form| form.is_object()).cloned();
        let response_template = form.iter().find_map(given);
        tokenizer.known = Known {
            special_tokens,
            bos_id,
            eos_ids,
            chat_templates,
            response_template,
        };
        Ok(tokenizer)
    }

    /// A tokenizer from a finished pipeline whose highest id is below `vocab_size`.
    ///
    /// Errors: [`Error::ModelFile`] when the pipeline cannot work.
    pub(crate) fn new(
        path: &str,
        inner: tokenizers::Tokenizer,
        vocab_size: usize,
        known: Known,
    ) -> Result<Self> {
        check_limits(path, &inner)?;
        // A post-processor that names a token or a sequence it does not have panics on its first use.
        guarded(|| inner.encode_fast("", true))
            .map_err(|problem| bad_file(path, format!("cannot encode: {problem}")))?;
        let stages = stages(inner.get_decoder());
        Ok(Self {
            path: path.to_owned(),
            inner,
            stages,
            vocab_size,
            known,
        })
    }

    /// The same tokenizer with padding off and texts cut to `max_tokens` ids, special ones included
    /// (`None`: not cut), as sentence-transformers uses it.
    pub fn with_max_tokens(mut self, max_tokens: Option<usize>) -> Result<Self> {
        let added = self
            .inner
            .get_post_processor()
            .map_or(0, |p| p.added_tokens(false));
        if let Some(max) = max_tokens.filter(|&max| max <= added) {
            return Err(Error::InvalidRequest(format!(
                "max_tokens must be more than the {added} special tokens of a text, got {max}"
            )));
        }
        let truncation = max_tokens.map(|max_length| TruncationParams {
            max_length,
            ..TruncationParams::default()
        });
        self.inner.with_padding(None);
        guarded(|| self.inner.with_truncation(truncation).map(|_| ())).map_err(Error::Internal)?;
        Ok(self)
    }

    /// The ids of `text`; with `add_special_tokens`, between those its template puts around a text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens))
            .map_err(|problem| self.cannot("encode", problem))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of each text, each as [`encode`](Self::encode) alone gives it; on several threads when
    /// there is enough to do. Not padded to one length unless the file fixes that length.
    pub fn encode_batch(
        &self,
        texts: &[String],
        add_special_tokens: bool,
    ) -> Result<Vec<Vec<u32>>> {
        let total: usize = texts.iter().map(String::len).sum();
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if total < PARALLEL_BYTES {
            1
        } else {
            cores.min(texts.len())
        };
        if threads < 2 {
            return texts
                .iter()
                .map(|text| self.encode(text, add_special_tokens))
                .collect();
        }
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some((i, text)) = {
                let i = next.fetch_add(1, Ordering::Relaxed);
                texts.get(i).map(|text| (i, text))
            } {
                done.push((i, self.encode(text, add_special_tokens)));
            }
            done
        };
        let mut done = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut done = work();
            for other in others {
                done.extend(other.join().unwrap_or_default());
            }
            done
        });
        done.sort_by_key(|&(i, _)| i);
        if done.len() != texts.len() {
            return Err(Error::Internal(
                "a thread that encodes texts died".to_owned(),
            ));
        }
        done.into_iter().map(|(_, ids)| ids).collect()
    }

    /// Where each id of `text` (without special tokens) comes from: start and end in code points.
    pub fn offsets(&self, text: &str) -> Result<Vec<(u32, u32)>> {
        let encoding = guarded(|| self.inner.encode_char_offsets(text, false))
            .map_err(|problem| self.cannot("encode", problem))?;
        Ok(encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| (start as u32, end as u32))
            .collect())
    }

    /// The text of `ids`. Ids within the vocabulary that no token has (gaps) give nothing.
    ///
    /// Errors: [`Error::InvalidRequest`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(Error::InvalidRequest(format!(
                "token id must be below the vocabulary size {}, got {id}",
                self.vocab_size
            )));
        }
        let mut stages = self.stages.clone();
        let mut text = String::new();
        for &id in ids {
            self.step(&mut stages, id, skip_special_tokens, &mut text);
        }
        finish(&mut stages, &mut text);
        Ok(text)
    }

    /// Highest id plus one, added tokens included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as the vocabulary spells it: byte-level and SentencePiece marks included.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether decoding with `skip_special_tokens` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.id_to_token(id)
            .is_some_and(|t| self.inner.get_added_vocabulary().is_special_token(&t))
    }

    /// The bytes an id stands for within a text, where its decoder treats each token alone: byte-level
    /// vocabularies, and SentencePiece ones (a leading space stays). `None` for others and unknown ids.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.id_to_token(id)?;
        let added = self
            .inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .contains_key(&id);
        let byte_level = self
            .stages
            .iter()
            .any(|s| matches!(s, Stage::ByteLevel { .. }));
        let byte_fallback = self
            .stages
            .iter()
            .any(|s| matches!(s, Stage::ByteFallback { .. }));
        match (byte_level, byte_fallback) {
            (true, _) if added => Some(token.into_bytes()),
            (true, _) => Some(byte_level_bytes(&token)),
            (_, true) => Some(match fallback_byte(&token) {
                Some(byte) => vec![byte],
                None if added => token.into_bytes(),
                None => token.replace('\u{2581}', " ").into_bytes(),
            }),
            _ => None,
        }
    }

    /// `"bos_token"` to `"<s>"` and so on, as transformers' `special_tokens_map` has it (strings only).
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.known.special_tokens
    }

    /// The id that begins a text, where the files name one.
    pub fn bos_id(&self) -> Option<u32> {
        self.known.bos_id
    }

    /// The ids that end a completion, as far as the tokenizer's own files say; the first is `eos_token`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.known.eos_ids
    }

    /// Chat templates by name; `"default"` is the main one.
    pub fn chat_templates(&self) -> &BTreeMap<String, String> {
        &self.known.chat_templates
    }

    /// `response_template` (or the older `response_schema`) of `tokenizer_config.json`, as it stands there.
    pub fn response_template(&self) -> Option<&Json> {
        self.known.response_template.as_ref()
    }

    fn step(&self, stages: &mut [Stage], id: u32, skip_special: bool, out: &mut String) {
        let added = self.inner.get_added_vocabulary();
        // An added token that is normalised on the way in decodes from its normalised form.
        let token = added
            .simple_id_to_token(id)
            .or_else(|| self.inner.get_model().id_to_token(id));
        let Some(token) = token else { return };
        if !(skip_special && added.is_special_token(&token)) {
            feed(stages, token, out);
        }
    }

    fn cannot(&self, what: &str, problem: String) -> Error {
        bad_file(&self.path, format!("cannot {what}: {problem}"))
    }
}

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
enum Stage {
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

fn stages(decoder: Option<&DecoderWrapper>) -> Vec<Stage> {
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
fn feed(stages: &mut [Stage], token: String, out: &mut String) {
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
fn finish(mut stages: &mut [Stage], out: &mut String) {
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
fn fallback_byte(token: &str) -> Option<u8> {
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
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_level_byte)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte a character stands for in GPT-2's byte-level alphabet: printable Latin-1 stands for itself,
/// the 68 other bytes follow in order from U+0100.
fn byte_level_byte(c: char) -> Option<u8> {
    let byte = match c as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => code,
        code @ 0x100..=0x120 => code - 0x100,
        code @ 0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
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

/// Call into the crate, whose asserts on odd files must not unwind into the caller.
///
/// `AssertUnwindSafe`: a pipeline is not changed by encoding, but for caches that a panic leaves whole.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(panic_text(&*panic)),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "the tokenizer library panicked".to_owned())
}

fn check_limits(path: &str, inner: &tokenizers::Tokenizer) -> Result<()> {
    let added = inner
        .get_post_processor()
        .map_or(0, |p| p.added_tokens(false));
    if added > MAX_ADDED_BY_TEMPLATE {
        let problem = format!(
            "the post-processor adds {added} tokens to a text, at most {MAX_ADDED_BY_TEMPLATE} are allowed"
        );
        return Err(bad_file(path, problem));
    }
    if let Some(truncation) = inner.get_truncation() {
        let room = truncation.max_length.saturating_sub(added);
        if room <= truncation.stride {
            let problem = format!(
                "truncation to {} tokens leaves {room} for the text, more than the stride {} are needed",
                truncation.max_length, truncation.stride
            );
            return Err(bad_file(path, problem));
        }
    }
    let Some(padding) = inner.get_padding() else {
        return Ok(());
    };
    let fixed = match padding.strategy {
        PaddingStrategy::Fixed(n) => n,
        PaddingStrategy::BatchLongest => 0,
    };
    let longest = fixed.max(padding.pad_to_multiple_of.unwrap_or(0));
    if longest > MAX_PADDING {
        let problem = format!("padding to {longest} tokens, at most {MAX_PADDING} are allowed");
        return Err(bad_file(path, problem));
    }
    Ok(())
}

fn bad_file(path: &str, problem: String) -> Error {
    Error::ModelFile {
        path: path.to_owned(),
        problem,
    }
}

fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|e| bad_file(&name, e.to_string()))?;
    let mut bytes = Vec::new();
    file.take(cap + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| bad_file(&name, e.to_string()))?;
    if bytes.len() as u64 > cap {
        return Err(bad_file(&name, format!("larger than {cap} bytes")));
    }
    Ok(bytes)
}

/// A side file's text; `None` when there is no such file.
fn read_text(path: &Path) -> Result<Option<String>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = read_capped(path, MAX_SIDE_FILE_BYTES)?;
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|e| bad_file(&path.display().to_string(), format!("not UTF-8: {e}")))
}

fn read_json(path: &Path) -> Result<Option<Json>> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    let name = path.display().to_string();
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| bad_file(&name, format!("not JSON: {e}")))
}

/// Named tokens: those of `tokenizer_config.json`, then what only `special_tokens_map.json` has. Values are
/// strings or `{"content": ...}`. Named extras (`extra_special_tokens` as an object) count too.
fn special_tokens(config: &Json, map: &Json) -> BTreeMap<String, String> {
    let content = |value: &Json| {
        value
            .as_str()
            .or_else(|| value.get("content")?.as_str())
            .map(str::to_owned)
    };
    let mut named = BTreeMap::new();
    for source in [map, config] {
        for name in SPECIAL_NAMES {
            if let Some(token) = source.get(name).and_then(content) {
                named.insert(name.to_owned(), token);
            }
        }
        let extras = source.get("extra_special_tokens").and_then(Json::as_object);
        for (name, token) in extras.into_iter().flatten() {
            if let Some(token) = content(token) {
                named.insert(name.clone(), token);
            }
        }
    }
    named
}

/// Chat templates of a directory; later sources win, as in transformers: the configuration,
/// `chat_template.json`, `chat_template.jinja`, and beside them `additional_chat_templates/NAME.jinja`.
fn chat_templates(dir: &Path, config: &Json) -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    add_templates(&mut templates, config.get("chat_template"));
    let json = read_json(&dir.join("chat_template.json"))?;
    add_templates(
        &mut templates,
        json.as_ref().and_then(|j| j.get("chat_template")),
    );
    if let Some(source) = read_text(&dir.join("chat_template.jinja"))? {
        templates.insert("default".to_owned(), source);
    }
    let folder = dir.join("additional_chat_templates");
    if !folder.is_dir() {
        return Ok(templates);
    }
    let unreadable = |e: std::io::Error| bad_file(&folder.display().to_string(), e.to_string());
    for entry in fs::read_dir(&folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_stem().and_then(|s| s.to_str()).map(str::to_owned);
        if path.extension().is_none_or(|e| e != "jinja") {
            continue;
        }
        if let (Some(name), Some(source)) = (name, read_text(&path)?) {
            templates.insert(name, source);
        }
    }
    Ok(templates)
}

/// A template as a string, as `{name: source}`, or as a list of `{"name": ..., "template": ...}`.
fn add_templates(templates: &mut BTreeMap<String, String>, value: Option<&Json>) {
    match value {
        Some(Json::String(source)) => {
            templates.insert("default".to_owned(), source.clone());
        }
        Some(Json::Object(named)) => {
            for (name, source) in named {
                if let Some(source) = source.as_str() {
                    templates.insert(name.clone(), source.to_owned());
                }
            }
        }
        Some(Json::Array(list)) => {
            for item in list {
                let text = |key: &str| item.get(key).and_then(Json::as_str).map(str::to_owned);
                if let (Some(name), Some(source)) = (text("name"), text("template")) {
                    templates.insert(name, source);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
