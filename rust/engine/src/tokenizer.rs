//! Text to ids, and ids to text as UTF-8 completes. Home of the `tokenizers` crate, whose ids these are;
//! knows no model.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use serde_json::Value as Json;
use tokenizers::tokenizer::PostProcessor;
use tokenizers::{
    AddedToken, DecoderWrapper, PaddingParams, PaddingStrategy, PostProcessorWrapper,
    TruncationParams,
};

use crate::error::{Error, Result};

mod added;
mod around;
mod bpe;
mod decode;
mod fast;
mod json;
mod library;
mod model;
mod normal;
mod split;
mod table;
mod trie;
mod unigram;
mod wordpiece;
mod words;

use added::Added;
use around::Around;
pub use decode::Detokenizer;
use decode::Stage;
use fast::{Fast, Request};
use library::Library;
pub use library::{Encoding, Options, Wishes};
pub(crate) use model::{BpeSource, Model, Tokens};
use normal::Normal;
use split::Splitter;

/// The largest `tokenizer.json` that is read; the largest known one has 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;
/// The largest of the small files beside it (configuration, chat templates).
const MAX_SIDE_FILE_BYTES: u64 = 16 << 20;
/// A padding length or a post-processor beyond these is a broken or hostile file.
const MAX_PADDING: usize = 1 << 20;
const MAX_ADDED_BY_TEMPLATE: usize = 1024;
/// Below this many bytes of text a batch is encoded on the caller's thread: starting one costs about 50 us.
const PARALLEL_BYTES: usize = 64 << 10;

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
/// Ids are those of Hugging Face `tokenizers`. Most are found without it: its pipeline runs, over the
/// same tables, for what [`fast`] does not cover, and for offsets. Truncation and padding that the file
/// sets are honoured.
#[derive(Debug)]
pub struct Tokenizer {
    path: String,
    model: Arc<Model>,
    added: Added,
    parts: Parts,
    normal: Normal,
    fast: Option<Fast>,
    /// What the post-processor puts around a text's ids, where that is all it does.
    around: Option<Around>,
    library: OnceLock<std::result::Result<Box<Library>, String>>,
    stages: Vec<Stage>,
    vocab_size: usize,
    known: Known,
}

/// A pipeline as `tokenizer.json` says it, but for its model.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub added_tokens: Vec<AddedToken>,
    pub normalizer: Json,
    pub pre_tokenizer: Json,
    pub post_processor: Json,
    pub decoder: Json,
    pub truncation: Option<TruncationParams>,
    pub padding: Option<PaddingParams>,
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
        if let Some((parts, model)) = json::read(bytes)
            && let Some(tokenizer) = Self::of_parts(name, model, parts, Known::default())?
        {
            return Ok(tokenizer);
        }
        Self::from_library(name, bytes)
    }

    /// What is not read here, the library reads, or says what is wrong with it.
    fn from_library(name: &str, bytes: &[u8]) -> Result<Self> {
        // The crate panics on syntax errors inside some of its parts, so a cut file is found out first.
        serde_json::from_slice::<serde::de::IgnoredAny>(bytes)
            .map_err(|e| bad_file(name, format!("not JSON: {e}")))?;
        let library = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|problem| bad_file(name, format!("not a tokenizer: {problem}")))?;
        let parts = Parts {
            truncation: library.get_truncation().cloned(),
            padding: library.get_padding().cloned(),
            ..Parts::default()
        };
        check_limits(name, library.get_post_processor(), &parts)?;
        // A post-processor that names a token or a sequence it does not have panics on its first use.
        guarded(|| library.encode_fast("", true))
            .map_err(|problem| bad_file(name, format!("cannot encode: {problem}")))?;
        let stages = decode::stages(library.get_decoder());
        let post_processor = library.get_post_processor().cloned();
        let model = Model::Library(Box::new(library));
        let Model::Library(library) = &model else {
            return Err(Error::Internal("a tokenizer is not what it was".to_owned()));
        };
        let added = Added::of_library(library, &model);
        let pipeline = Library::of_tokenizer(library, post_processor);
        Ok(Self {
            path: name.to_owned(),
            vocab_size: model.end().max(added.end()),
            model: Arc::new(model),
            added,
            parts,
            normal: Normal::Steps(Vec::new()),
            fast: None,
            around: None,
            library: OnceLock::from(Ok(Box::new(pipeline))),
            stages,
            known: Known::default(),
        })
    }

    /// A tokenizer over a model of ours; `None` when the library must read it.
    ///
    /// Errors: [`Error::ModelFile`] when the pipeline cannot work.
    pub(crate) fn of_parts(
        path: &str,
        model: Model,
        parts: Parts,
        known: Known,
    ) -> Result<Option<Self>> {
        let wrapped = guarded(|| {
            let decoder: Option<DecoderWrapper> = serde_json::from_value(parts.decoder.clone())?;
            let post: Option<PostProcessorWrapper> =
                serde_json::from_value(parts.post_processor.clone())?;
            Ok((decoder, post, Normal::new(&parts.normalizer)?))
        });
        let Ok((decoder, post, normal)) = wrapped else {
            return Ok(None);
        };
        check_limits(path, post.as_ref(), &parts)?;
        let around = guarded(|| Around::new(post.as_ref()))
            .map_err(|problem| bad_file(path, format!("cannot encode: {problem}")))?;
        let normalize = |text: &str| Some(normal.apply(text)?.into_owned());
        let added = Added::new(parts.added_tokens.clone(), &model, &normalize);
        let Some(added) = added.filter(Added::is_searchable) else {
            return Ok(None);
        };
        let splitter = Splitter::new(&parts.pre_tokenizer, normal.removes(' '));
        let fast = splitter
            .filter(|_| normal.is_steady())
            .and_then(|splitter| Fast::new(&model, &normal, splitter, &added));
        let tokenizer = Self {
            path: path.to_owned(),
            vocab_size: model.end().max(added.end()),
            model: Arc::new(model),
            added,
            normal,
            fast,
            around,
            library: OnceLock::new(),
            stages: decode::stages(decoder.as_ref()),
            parts,
            known,
        };
        // What the pre-tokenizer says is checked by whoever reads it.
        match tokenizer.fast.is_some() && tokenizer.around.is_some() {
            true => Ok(Some(tokenizer)),
            false => Ok(tokenizer.library().is_ok().then_some(tokenizer)),
        }
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

    /// The same tokenizer with padding off and texts cut to `max_tokens` ids, special ones included
    /// (`None`: not cut), as sentence-transformers uses it.
    pub fn with_max_tokens(mut self, max_tokens: Option<usize>) -> Result<Self> {
        let added = self.library()?.added_tokens(false);
        if let Some(max) = max_tokens.filter(|&max| max <= added) {
            return Err(Error::InvalidRequest(format!(
                "max_tokens must be more than the {added} special tokens of a text, got {max}"
            )));
        }
        self.parts.padding = None;
        self.parts.truncation = max_tokens.map(|max_length| TruncationParams {
            max_length,
            ..TruncationParams::default()
        });
        Ok(self)
    }

    /// The ids of `text`; with `add_special_tokens`, between those its template puts around a text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let (truncation, padding) = (self.parts.truncation.as_ref(), self.parts.padding.as_ref());
        match self.encode_fast(text, add_special_tokens, truncation, padding) {
            Some(ids) => Ok(ids),
            None => {
                let options = self.own_options(add_special_tokens);
                Ok(self.encode_with(text, None, &options, false)?.ids)
            }
        }
    }

    /// The ids of a text or a pair of texts, encoded as `options` say.
    ///
    /// Errors: [`Error::InvalidRequest`] when the options cannot be met.
    pub fn encode_ids(
        &self,
        text: &str,
        pair: Option<&str>,
        options: &Options,
    ) -> Result<Vec<u32>> {
        let (truncation, padding) = (options.truncation.as_ref(), options.padding.as_ref());
        if let Some(truncation) = truncation {
            self.library()?
                .check(pair.is_some(), truncation)
                .map_err(Error::InvalidRequest)?;
        }
        let special = options.add_special_tokens;
        let fast = match pair {
            None => self.encode_fast(text, special, truncation, padding),
            Some(_) => None,
        };
        match fast {
            Some(ids) => Ok(ids),
            None => Ok(self.encode_with(text, pair, options, false)?.ids),
        }
    }

    /// The ids of a text of segments, each with whether its special and other added tokens are such
    /// (`true`: a template's text) or plain characters (`false`: what a user wrote). A token counts that begins
    /// and ends in a template's text. But for these the
    /// text is encoded as if it were whole, so that the ids are those of [`encode`](Self::encode) when no
    /// segment that is `false` holds the text of an added token. Added tokens of white space alone count as
    /// text everywhere. Nothing is put around it.
    ///
    /// Errors: [`Error::Unsupported`] for a tokenizer whose pipeline the library runs.
    pub fn encode_segments(&self, segments: &[(&str, bool)]) -> Result<Vec<u32>> {
        let text: String = segments.iter().map(|(text, _)| *text).collect();
        let mut trusted: Vec<(usize, usize)> = Vec::new();
        let mut start = 0;
        for (text, trust) in segments {
            let end = start + text.len();
            match trusted.last_mut() {
                Some(last) if *trust && last.1 == start => last.1 = end,
                _ if *trust => trusted.push((start, end)),
                _ => {}
            }
            start = end;
        }
        let inside = |at: usize| {
            let next = trusted.partition_point(|range| range.1 <= at);
            trusted.get(next).is_some_and(|range| range.0 <= at)
        };
        // A template may write a token around a role: `'<|' + role + '|>'`.
        let within = |start: usize, end: usize| start < end && inside(start) && inside(end - 1);
        let mut ids = Vec::with_capacity(16 + text.len() / 4);
        let fast = self.fast.as_ref();
        let request = self.request(Some(&within), usize::MAX);
        match fast.map(|fast| fast.encode(&text, &request, &mut ids)) {
            Some(Some(())) => Ok(ids),
            Some(None) => Err(self.cannot("encode", NO_TOKENS.to_owned())),
            None => Err(Error::Unsupported {
                what: "plain text in a conversation for the tokenizer",
                name: self.path.clone(),
                supported: "tokenizers whose pipeline is known".to_owned(),
            }),
        }
    }

    /// Forget the texts met so far, for tests of what is remembered.
    #[cfg(test)]
    fn forget(&self) {
        if let Some(fast) = &self.fast {
            fast.forget();
        }
    }

    fn request<'a>(
        &'a self,
        trusted: Option<&'a dyn Fn(usize, usize) -> bool>,
        limit: usize,
    ) -> Request<'a> {
        Request {
            model: &self.model,
            normal: &self.normal,
            added: &self.added,
            trusted,
            limit,
        }
    }

    /// The ids of `text`, cut and padded; `None` where that takes the library.
    fn encode_fast(
        &self,
        text: &str,
        add_special_tokens: bool,
        truncation: Option<&TruncationParams>,
        padding: Option<&PaddingParams>,
    ) -> Option<Vec<u32>> {
        let (fast, around) = (self.fast.as_ref()?, self.around.as_ref()?);
        let room = around.room(truncation, add_special_tokens)?;
        let side = around.side(add_special_tokens);
        let mut ids = Vec::with_capacity(16 + text.len() / 4);
        ids.extend_from_slice(&side.before);
        let start = ids.len();
        let request = self.request(None, room.limit(start));
        fast.encode(text, &request, &mut ids)?;
        room.cut(&mut ids, start);
        ids.extend_from_slice(&side.after);
        if let Some(padding) = padding {
            around::pad(&mut ids, padding);
        }
        Some(ids)
    }

    /// The ids of each text, each as [`encode`](Self::encode) alone gives it; on several threads when
    /// there is enough to do. Not padded to one length unless the file fixes that length.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        add_special_tokens: bool,
    ) -> Result<Vec<Vec<u32>>> {
        let total = texts.iter().map(|text| text.as_ref().len()).sum();
        let encode = |text: &T| self.encode(text.as_ref(), add_special_tokens);
        in_parallel(texts, total, encode)
    }

    /// The ids of several texts or pairs, padded to one length when `options` say so.
    pub fn encode_ids_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[(T, Option<T>)],
        options: &Options,
    ) -> Result<Vec<Vec<u32>>> {
        let size = |(text, pair): &(T, Option<T>)| {
            text.as_ref().len() + pair.as_ref().map_or(0, |pair| pair.as_ref().len())
        };
        let total = texts.iter().map(size).sum();
        let encode = |(text, pair): &(T, Option<T>)| {
            self.encode_ids(text.as_ref(), pair.as_ref().map(AsRef::as_ref), options)
        };
        let mut all = in_parallel(texts, total, encode)?;
        if let Some(padding) = &options.padding {
            let longest = all.iter().map(Vec::len).max().unwrap_or(0);
            all.iter_mut()
                .for_each(|ids| around::pad_to(ids, longest, padding));
        }
        Ok(all)
    }

    /// Ids and all that goes with them, of a text or a pair of texts.
    ///
    /// Errors: [`Error::InvalidRequest`] when the options cannot be met.
    pub fn encode_with(
        &self,
        text: &str,
        pair: Option<&str>,
        options: &Options,
        with_offsets: bool,
    ) -> Result<Encoding> {
        let library = self.library()?;
        if let Some(truncation) = &options.truncation {
            library
                .check(pair.is_some(), truncation)
                .map_err(Error::InvalidRequest)?;
        }
        guarded(|| library.encode(text, pair, options, with_offsets))
            .map_err(|problem| self.cannot("encode", problem))
    }

    /// The same of several texts or pairs, padded to one length when `options` say so.
    pub fn encode_batch_with<T: AsRef<str> + Sync>(
        &self,
        texts: &[(T, Option<T>)],
        options: &Options,
    ) -> Result<Vec<Encoding>> {
        let total = texts.iter().map(|(text, _)| text.as_ref().len()).sum();
        let encode = |(text, pair): &(T, Option<T>)| {
            let pair = pair.as_ref().map(AsRef::as_ref);
            self.encode_with(text.as_ref(), pair, options, true)
        };
        let mut all = in_parallel(texts, total, encode)?;
        if let Some(padding) = &options.padding {
            let longest = all
                .iter()
                .map(|encoding| encoding.ids.len())
                .max()
                .unwrap_or(0);
            all.iter_mut()
                .for_each(|encoding| encoding.pad(longest, padding));
        }
        Ok(all)
    }

    /// The options that `wishes` ask for, over those the file sets.
    ///
    /// Errors: [`Error::InvalidRequest`] for a wish that is unknown, or needs another one.
    pub fn options(&self, wishes: &Wishes<'_>, add_special_tokens: bool) -> Result<Options> {
        let pad = self.known.special_tokens.get("pad_token");
        let pad = pad.and_then(|token| Some((token.clone(), self.token_to_id(token)?)));
        let padding = wishes.padding(self.parts.padding.as_ref(), pad);
        let truncation = wishes.truncation(self.parts.truncation.as_ref());
        if let (Some(max), false, false) = (
            wishes.max_length,
            matches!(truncation, Ok(Some(_)) | Err(_)),
            wishes.padding == Some("max_length"),
        ) {
            return Err(Error::InvalidRequest(format!(
                "max_length needs a truncation or the padding \"max_length\", got {max} and neither"
            )));
        }
        Ok(Options {
            add_special_tokens,
            truncation: truncation.map_err(Error::InvalidRequest)?,
            padding: padding.map_err(Error::InvalidRequest)?,
        })
    }

    /// The options that the file sets: its truncation and padding.
    pub fn own_options(&self, add_special_tokens: bool) -> Options {
        Options {
            add_special_tokens,
            truncation: self.parts.truncation.clone(),
            padding: self.parts.padding.clone(),
        }
    }

    /// Where each id of `text` (without special tokens) comes from: start and end in code points.
    pub fn offsets(&self, text: &str) -> Result<Vec<(u32, u32)>> {
        let options = self.own_options(false);
        Ok(self.encode_with(text, None, &options, true)?.offsets)
    }

    /// The library's pipeline, built when first needed.
    fn library(&self) -> Result<&Library> {
        let built = self
            .library
            .get_or_init(|| guarded(|| Library::new(&self.model, &self.parts).map(Box::new)));
        match built {
            Ok(library) => Ok(library),
            Err(problem) => Err(bad_file(&self.path, format!("not a tokenizer: {problem}"))),
        }
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
        if let [Stage::ByteLevel { .. }] = self.stages.as_slice()
            && let Some(text) = self.decode_bytes(ids, skip_special_tokens)
        {
            return Ok(text);
        }
        let mut stages = self.stages.clone();
        let mut text = String::new();
        for &id in ids {
            self.step(&mut stages, id, skip_special_tokens, &mut text);
        }
        decode::finish(&mut stages, &mut text);
        Ok(text)
    }

    /// The texts of several lists of ids, each as [`decode`](Self::decode) alone gives it.
    pub fn decode_batch<T: AsRef<[u32]> + Sync>(
        &self,
        lists: &[T],
        skip_special_tokens: bool,
    ) -> Result<Vec<String>> {
        let total: usize = lists.iter().map(|ids| ids.as_ref().len()).sum();
        let decode = |ids: &T| self.decode(ids.as_ref(), skip_special_tokens);
        in_parallel(lists, total * 4, decode)
    }

    /// A byte-level text is its tokens' bytes.
    fn decode_bytes(&self, ids: &[u32], skip_special_tokens: bool) -> Option<String> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            match self.added.token(id) {
                _ if skip_special_tokens && self.added.is_special(id) => {}
                Some(token) => bytes.extend(decode::byte_level_bytes(token)),
                None => match self.model.byte_level_bytes(id) {
                    Some(token) => bytes.extend_from_slice(token),
                    None => bytes.extend(decode::byte_level_bytes(
                        &self.model.token(id).unwrap_or_default(),
                    )),
                },
            }
        }
        Some(match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        })
    }

    /// Highest id plus one, added tokens included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.added.id(token).or_else(|| self.model.id(token))
    }

    /// The token of an id as the vocabulary spells it: byte-level and SentencePiece marks included.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        // An added token that is normalised on the way in decodes from its normalised form.
        match self.added.token(id) {
            Some(token) => Some(token.to_owned()),
            None => self.model.token(id),
        }
    }

    /// Whether decoding with `skip_special_tokens` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.is_special(id)
    }

    /// The bytes an id stands for within a text, where its decoder treats each token alone: byte-level
    /// vocabularies, and SentencePiece ones (a leading space stays). `None` for others and unknown ids.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.id_to_token(id)?;
        let added = self.added.token(id).is_some();
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
            (true, _) => Some(decode::byte_level_bytes(&token)),
            (_, true) => Some(match decode::fallback_byte(&token) {
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
        if skip_special && self.added.is_special(id) {
            return;
        }
        if let Some(token) = self.id_to_token(id) {
            decode::feed(stages, token, out);
        }
    }

    fn cannot(&self, what: &str, problem: String) -> Error {
        bad_file(&self.path, format!("cannot {what}: {problem}"))
    }
}

const NO_TOKENS: &str = "the text holds characters that the vocabulary cannot say";

/// What `work` makes of each item, in order; on several threads when there are bytes enough.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    bytes: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    let threads = match bytes < PARALLEL_BYTES {
        true => 1,
        false => cores.min(items.len()),
    };
    if threads < 2 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let share = || {
        let mut done = Vec::new();
        while let Some((i, item)) = {
            let i = next.fetch_add(1, Ordering::Relaxed);
            items.get(i).map(|item| (i, item))
        } {
            done.push((i, work(item)));
        }
        done
    };
    let mut done = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(share)).collect();
        let mut done = share();
        for other in others {
            done.extend(other.join().unwrap_or_default());
        }
        done
    });
    done.sort_by_key(|&(i, _)| i);
    if done.len() != items.len() {
        let problem = "a thread that encodes texts died";
        return Err(Error::Internal(problem.to_owned()));
    }
    done.into_iter().map(|(_, result)| result).collect()
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

fn check_limits(path: &str, post: Option<&PostProcessorWrapper>, parts: &Parts) -> Result<()> {
    let added = post.map_or(0, |p| p.added_tokens(false));
    if added > MAX_ADDED_BY_TEMPLATE {
        let problem = format!(
            "the post-processor adds {added} tokens to a text, at most {MAX_ADDED_BY_TEMPLATE} are allowed"
        );
        return Err(bad_file(path, problem));
    }
    if let Some(truncation) = &parts.truncation {
        let room = truncation.max_length.saturating_sub(added);
        if room <= truncation.stride {
            let problem = format!(
                "truncation to {} tokens leaves {room} for the text, more than the stride {} are needed",
                truncation.max_length, truncation.stride
            );
            return Err(bad_file(path, problem));
        }
    }
    let Some(padding) = &parts.padding else {
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
    let size = file.metadata().map_or(0, |known| known.len());
    let mut bytes = Vec::with_capacity(size.min(cap) as usize + 1);
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
