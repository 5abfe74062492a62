//! Schema or grammar -> the tokens that may come next, those that must, and an end in time (llguidance). Knows no model.
//!
//! A constrained text always ends within its budget: `closing` knows the shortest way to the end from every place, and no
//! token is taken after which that way would be too long.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{
    InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv,
};
use llguidance::{ParserFactory, TokenParser};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

mod aside;
mod closing;
mod schema;

pub use aside::Aside;
pub use schema::rule as schema_rule;

use closing::{Analysis, Piece, Tracker, fewest_tokens};

/// Compiled grammars kept for later requests.
const CACHED: usize = 64;
/// A grammar's source.
const MAX_GRAMMAR_BYTES: usize = 2 << 20;
/// Characters of a number: more digits than this say nothing to a double, and a weak model never stops.
const MAX_NUMERAL: usize = 16;

/// What a request may spend on following its grammar, on the whole and for each token: the other requests of the same
/// step wait meanwhile. Measured by benches/bench_constraint.py.
const ALLOWANCE: Duration = Duration::from_secs(1);
const ALLOWANCE_PER_TOKEN: Duration = Duration::from_millis(10);
/// llguidance's own limits on one mask: a fifth and a quarter of what it allows. All 1,000 schemas of tests/test_schemas.py
/// stay within them.
const MASK_ITEMS: usize = 10_000;
const MASK_FUEL: u64 = 50_000;

/// What a text must be. Choice and regex match the whole text.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    JsonSchema(Value),
    JsonObject,
    Regex(String),
    Choice(Vec<String>),
    /// llguidance's dialect of Lark.
    Lark(String),
}

impl Source {
    /// As a Lark grammar.
    ///
    /// # Errors
    /// `InvalidRequest`, see `schema_rule`; an empty choice.
    pub fn lark(&self) -> Result<String> {
        Ok(match self {
            Self::JsonSchema(schema) => format!("start: {}", schema_rule(schema)?),
            Self::JsonObject => format!(
                "start: {}",
                schema_rule(&serde_json::json!({"type": "object"}))?
            ),
            Self::Regex(regex) => format!("start: /{}/", llguidance::regex_to_lark(regex, "dw")),
            Self::Choice(texts) if texts.is_empty() || texts.iter().any(String::is_empty) => {
                return Err(Error::InvalidRequest(
                    "choice must be a list of texts, none empty".into(),
                ));
            }
            Self::Choice(texts) => {
                let texts: Vec<String> = texts
                    .iter()
                    .map(|text| Value::from(text.as_str()).to_string())
                    .collect();
                format!("start: {}", texts.join(" | "))
            }
            Self::Lark(lark) => lark.clone(),
        })
    }
}

/// A vocabulary as llguidance sees it.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
    /// Whether the tokenizer spells a piece of text as it would within a longer one.
    canonical: bool,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let ids = self.tokenizer.encode(text, false).unwrap_or_default();
            match self.trie.decode_raw(&ids) == text.as_bytes() {
                true => ids,
                false => self.trie.greedy_tokenize(text.as_bytes()),
            }
        })
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.canonical
    }
}

impl Vocabulary {
    fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, eos_ids: &[u32]) -> Result<Self> {
        let bytes = |id: u32| {
            let mut word = tokenizer.token_bytes(id).unwrap_or_default();
            if tokenizer.is_special(id) || eos_ids.contains(&id) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
            word
        };
        let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(bytes).collect();
        let spelled = words.iter().any(|word| word.len() == 1);
        let (true, Some(eos)) = (spelled, eos_ids.first().copied()) else {
            return Err(Error::Unsupported {
                what: "grammar",
                name: "with this vocabulary".into(),
                supported: "byte-level and byte-fallback vocabularies with an end token".into(),
            });
        };
        let trie =
            TokTrie::from(&TokRxInfo::new(vocab_size as u32, eos), &words).with_eos_tokens(eos_ids);
        // A vocabulary that puts a space before every text would put one before every piece.
        let canonical = tokenizer
            .encode("{", false)
            .is_ok_and(|ids| trie.decode_raw(&ids) == b"{");
        Ok(Self {
            trie,
            tokenizer,
            canonical,
        })
    }
}

/// Grammars by their source, and the sources in order of age.
type Kept = (HashMap<String, Arc<Grammar>>, VecDeque<String>);

/// Compiles grammars for one vocabulary, and keeps them.
pub struct Grammars {
    vocabulary: Arc<Vocabulary>,
    factory: ParserFactory,
    /// Whether forced tokens are fed at once; off only to compare.
    forcing: bool,
    /// The latest last.
    kept: Mutex<Kept>,
}

impl Grammars {
    /// # Errors
    /// `Unsupported` for a vocabulary whose tokens are not known byte by byte.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        vocab_size: usize,
        eos_ids: &[u32],
        forcing: bool,
    ) -> Result<Self> {
        let vocabulary = Arc::new(Vocabulary::new(tokenizer, vocab_size, eos_ids)?);
        let env: TokEnv = vocabulary.clone();
        let able = InferenceCapabilities {
            ff_tokens: vocabulary.canonical,
            ..Default::default()
        };
        let slices = llguidance::earley::SlicedBiasComputer::json_slices();
        let mut factory = ParserFactory::new(&env, able, &slices).map_err(|error| {
            Error::Internal(format!("no grammars for this vocabulary: {error}"))
        })?;
        let limits = factory.quiet().limits_mut();
        limits.verbose_errors = false;
        limits.step_max_items = MASK_ITEMS;
        limits.step_lexer_fuel = MASK_FUEL;
        Ok(Self {
            vocabulary,
            factory,
            forcing,
            kept: Mutex::default(),
        })
    }

    /// Make a Lark grammar ready, or find it made.
    ///
    /// # Errors
    /// `InvalidRequest` for a grammar that cannot be read, is too large, or that no text meets.
    pub fn compile(&self, lark: &str) -> Result<Arc<Grammar>> {
        if let Some(grammar) = lock(&self.kept).0.get(lark) {
            return Ok(grammar.clone());
        }
        if lark.len() > MAX_GRAMMAR_BYTES {
            let size = lark.len();
            return Err(Error::InvalidRequest(format!(
                "a grammar must have at most {MAX_GRAMMAR_BYTES} bytes, got {size}"
            )));
        }
        let mut parser = self
            .factory
            .create_parser(TopLevelGrammar::from_lark(lark.to_string()))
            .map_err(|error| {
                Error::InvalidRequest(format!(
                    "the grammar cannot be used: {}",
                    plain(&error.to_string())
                ))
            })?;
        parser.start_without_prompt();
        let analysis = Analysis::new(parser.parser.grammar(), &self.vocabulary.trie).map(Arc::new);
        let least = match analysis
            .as_ref()
            .map(|analysis| Tracker::new(analysis).and_then(|t| t.way()))
        {
            None => None,
            Some(None) => {
                return Err(Error::InvalidRequest(
                    "the grammar cannot be used: no text meets it".into(),
                ));
            }
            Some(Some(way)) => {
                fewest_tokens(&self.vocabulary.trie, &way).map(|tokens| tokens.len())
            }
        };
        let grammar = Arc::new(Grammar {
            parser: Mutex::new(parser),
            analysis,
            least: least.unwrap_or(0),
            vocabulary: self.vocabulary.clone(),
            forcing: self.forcing,
        });
        self.keep(lark, &grammar);
        Ok(grammar)
    }

    fn keep(&self, lark: &str, grammar: &Arc<Grammar>) {
        let mut kept = lock(&self.kept);
        let (grammars, order) = &mut *kept;
        if grammars.insert(lark.to_string(), grammar.clone()).is_none() {
            order.push_back(lark.to_string());
        }
        if order.len() > CACHED
            && let Some(oldest) = order.pop_front()
        {
            grammars.remove(&oldest);
        }
    }

    /// A text as a Lark terminal: its characters, or the one special token that it names.
    pub fn literal(&self, text: &str) -> String {
        match self.special(text) {
            Some(id) => format!("<[{id}]>"),
            None => Value::from(text).to_string(),
        }
    }

    /// The special token that is written so.
    pub fn special(&self, text: &str) -> Option<u32> {
        let id = self.vocabulary.tokenizer.token_to_id(text)?;
        self.vocabulary.trie.is_special_token(id).then_some(id)
    }
}

/// llguidance's message on one line, without its state.
fn plain(message: &str) -> String {
    let message = message.split("\n<").next().unwrap_or(message);
    message
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .take(500)
        .collect()
}

/// A compiled grammar. Requests clone its parser, which shares what it learns of the vocabulary.
pub struct Grammar {
    parser: Mutex<TokenParser>,
    /// None: the end of such a grammar's text cannot be foreseen.
    analysis: Option<Arc<Analysis>>,
    /// Tokens of its shortest text.
    least: usize,
    vocabulary: Arc<Vocabulary>,
    forcing: bool,
}

impl Grammar {
    /// The tokens that its shortest text takes.
    pub fn least_tokens(&self) -> usize {
        self.least
    }

    fn open(self: &Arc<Self>) -> Bound {
        Bound {
            parser: lock(&self.parser).clone(),
            tracker: self.analysis.as_ref().and_then(Tracker::new),
            grammar: self.clone(),
            complete: false,
            spent: Duration::ZERO,
            tokens: 0,
        }
    }
}

/// What a request's text must be, from its first token on.
#[derive(Clone)]
pub enum Rule {
    /// All of it.
    Grammar(Arc<Grammar>),
    /// Anything, until one of these markers. With `must`, one has to come before the text may end.
    Until {
        markers: Vec<(Marker, Rule)>,
        must: bool,
    },
}

/// What opens a constrained part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Marker {
    Text(String),
    Token(u32),
}

impl Rule {
    /// The tokens of the shortest text that obeys it; 0 where nothing has to come.
    pub fn least_tokens(&self) -> usize {
        match self {
            Self::Grammar(grammar) => grammar.least,
            Self::Until { must: false, .. } => 0,
            Self::Until {
                markers,
                must: true,
            } => markers
                .iter()
                .map(|(marker, rule)| marker.len() + rule.least_tokens())
                .min()
                .unwrap_or(0),
        }
    }
}

impl Marker {
    /// Tokens at most.
    fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Token(_) => 1,
        }
    }
}

/// One request's place in its rule.
pub struct Constraint {
    grammars: Arc<Grammars>,
    place: Place,
    /// The next mask, where it has come back already.
    made: Option<Result<SimpleVob>>,
}

enum Place {
    Bound(Box<Bound>),
    /// Within a grammar, whose mask is being made beside the model.
    Away(mpsc::Receiver<(Box<Bound>, Result<SimpleVob>)>),
    Free {
        markers: Vec<(Marker, Rule)>,
        must: bool,
        tail: Vec<u8>,
    },
}

/// Within a grammar.
struct Bound {
    grammar: Arc<Grammar>,
    parser: TokenParser,
    /// None: the end is not foreseen (any more).
    tracker: Option<Tracker>,
    complete: bool,
    /// The time that following it took so far, and for how many tokens.
    spent: Duration,
    tokens: u32,
}

impl Constraint {
    pub fn new(grammars: Arc<Grammars>, rule: &Rule) -> Self {
        let place = Place::at(rule);
        Self {
            grammars,
            place,
            made: None,
        }
    }

    /// Begin to make the next mask on another thread; `mask` waits for it. Nothing else may be asked before.
    pub fn prepare(&mut self, aside: &mut Aside) {
        // Of a step that was left half-way.
        if self.made.is_some() {
            return;
        }
        let free = Place::Free {
            markers: Vec::new(),
            must: false,
            tail: Vec::new(),
        };
        match std::mem::replace(&mut self.place, free) {
            Place::Bound(mut bound) if !bound.complete => {
                let (answer, place) = mpsc::sync_channel(1);
                self.place = Place::Away(place);
                aside.run(Box::new(move || {
                    let mask = bound.mask();
                    // Who asked may have gone.
                    let _ = answer.send((bound, mask));
                }));
            }
            place => self.place = place,
        }
    }

    /// What `mask` will give, if it was prepared, is there by now and no error.
    pub fn made(&mut self) -> Option<&[u32]> {
        if let Place::Away(place) = &self.place
            && let Ok((bound, mask)) = place.try_recv()
        {
            self.place = Place::Bound(bound);
            self.made = Some(mask);
        }
        self.made.as_ref()?.as_ref().ok().map(SimpleVob::as_slice)
    }

    /// The tokens allowed next, a bit each; none: any.
    ///
    /// # Errors
    /// `InvalidRequest` when the grammar is too costly to follow; `Internal` when making the mask panicked.
    pub fn mask(&mut self) -> Result<Option<SimpleVob>> {
        if let Some(mask) = self.made.take() {
            return mask.map(Some);
        }
        match &mut self.place {
            Place::Free { .. } => Ok(None),
            Place::Bound(bound) => bound.mask().map(Some),
            Place::Away(place) => {
                let lost = || Error::Internal("a grammar's mask was lost".into());
                let (bound, mask) = place.recv().map_err(|_| lost())?;
                self.place = Place::Bound(bound);
                mask.map(Some)
            }
        }
    }

    /// Whether stop strings and end tokens count here: not within a grammar.
    pub fn free(&self) -> bool {
        matches!(self.place, Place::Free { .. })
    }

    /// Whether an end token may come here where the text is free.
    pub fn may_end(&self) -> bool {
        !matches!(self.place, Place::Free { must: true, .. })
    }

    /// The text is complete: nothing can follow.
    pub fn complete(&self) -> bool {
        matches!(&self.place, Place::Bound(bound) if bound.complete)
    }

    /// Go on by a token after which `left` more may come; false, and nothing changed, if the text could not end then.
    pub fn take(&mut self, token: u32, left: usize) -> bool {
        match &mut self.place {
            Place::Bound(bound) => bound.take(token, left, true),
            Place::Free { .. } => self.enter(token, left),
            Place::Away(_) => false,
        }
    }

    /// The tokens that must come next, of which `left` may; they are taken.
    pub fn forced(&mut self, left: usize) -> Vec<u32> {
        let Place::Bound(bound) = &mut self.place else {
            return Vec::new();
        };
        if !bound.grammar.forcing || bound.complete {
            return Vec::new();
        }
        let mut taken = Vec::new();
        for token in bound.parser.compute_ff_tokens() {
            if bound.complete
                || taken.len() >= left
                || !bound.take(token, left - taken.len() - 1, true)
            {
                break;
            }
            taken.push(token);
        }
        taken
    }

    /// The next token of the shortest way to the end; taken, like the text after it, in any case.
    pub fn close(&mut self, left: usize) -> Option<u32> {
        let token = match &mut self.place {
            Place::Bound(bound) => {
                let way = bound.tracker.as_ref()?.way()?;
                let trie = &bound.grammar.vocabulary.trie;
                // Nothing left to write: the end itself.
                let tokens = fewest_tokens(trie, &way)?;
                let token = *tokens.first().unwrap_or(&trie.eos_token());
                return bound.take(token, left, false).then_some(token);
            }
            Place::Away(_) => return None,
            Place::Free { markers, tail, .. } => {
                let (marker, _) = markers.first()?;
                match marker {
                    Marker::Token(id) => *id,
                    Marker::Text(text) => {
                        let begun = begun(tail, text.as_bytes());
                        let rest = text.as_bytes()[begun..].to_vec();
                        let trie = &self.grammars.vocabulary.trie;
                        *fewest_tokens(trie, &[Piece::Bytes(rest)])?.first()?
                    }
                }
            }
        };
        self.enter(token, usize::MAX);
        Some(token)
    }

    /// In free text: note the token, and begin what a marker that it completes begins.
    fn enter(&mut self, token: u32, left: usize) -> bool {
        let trie = &self.grammars.vocabulary.trie;
        let Place::Free {
            markers,
            must,
            tail,
        } = &mut self.place
        else {
            return false;
        };
        let special = trie.is_special_token(token);
        let before = tail.len();
        if !special {
            tail.extend_from_slice(trie.token(token));
        }
        let hit = markers.iter().find_map(|(marker, rule)| match marker {
            Marker::Token(id) => (*id == token).then_some((true, rule)),
            Marker::Text(_) if special => None,
            Marker::Text(text) => {
                let at = find(tail, text.as_bytes())?;
                Some((at + text.len() == tail.len(), rule))
            }
        });
        match hit {
            // Text that runs on after the marker might not be what must follow it.
            Some((false, _)) => {
                tail.truncate(before);
                false
            }
            Some((true, rule)) if rule.least_tokens() > left => {
                tail.truncate(before);
                false
            }
            Some((true, rule)) => {
                self.place = Place::at(&rule.clone());
                true
            }
            None => {
                let room = markers
                    .iter()
                    .map(|(marker, rule)| marker.len() + rule.least_tokens());
                if *must && room.min().unwrap_or(0) > left {
                    tail.truncate(before);
                    return false;
                }
                let longest = markers
                    .iter()
                    .map(|(marker, _)| marker.len())
                    .max()
                    .unwrap_or(0);
                let cut = tail.len().saturating_sub(longest);
                tail.drain(..cut);
                true
            }
        }
    }
}

impl Place {
    fn at(rule: &Rule) -> Self {
        match rule {
            Rule::Grammar(grammar) => Self::Bound(Box::new(grammar.open())),
            Rule::Until { markers, must } => Self::Free {
                markers: markers.clone(),
                must: *must,
                tail: Vec::new(),
            },
        }
    }
}

impl Bound {
    fn mask(&mut self) -> Result<SimpleVob> {
        let start = Instant::now();
        let mask = self.parser.compute_mask();
        self.spent += start.elapsed();
        if self.spent > ALLOWANCE + ALLOWANCE_PER_TOKEN * self.tokens {
            return Err(Error::InvalidRequest(format!(
                "the grammar is too costly to follow: {} tokens took {:.1} s",
                self.tokens,
                self.spent.as_secs_f64()
            )));
        }
        mask.map_err(|error| {
            Error::InvalidRequest(format!(
                "the grammar cannot be followed: {}",
                plain(&error.to_string())
            ))
        })
    }

    /// See `Constraint::take`; without `checked` whatever room it leaves.
    fn take(&mut self, token: u32, left: usize, checked: bool) -> bool {
        let start = Instant::now();
        let taken = self.follow(token, left, checked);
        self.spent += start.elapsed();
        self.tokens += u32::from(taken);
        taken
    }

    fn follow(&mut self, token: u32, left: usize, checked: bool) -> bool {
        let trie = &self.grammar.vocabulary.trie;
        let ends = trie.eos_tokens().contains(&token);
        if !ends && !follow(&mut self.tracker, trie, token, left, checked) {
            return false;
        }
        let taken = self.parser.consume_token(token).is_ok();
        self.complete = ends || !taken || self.parser.check_stop().unwrap_or(true);
        true
    }
}

/// Move the tracker on, unless that leaves no room for an end.
fn follow(
    tracker: &mut Option<Tracker>,
    trie: &TokTrie,
    token: u32,
    left: usize,
    checked: bool,
) -> bool {
    let Some(this) = tracker else {
        return true;
    };
    let mark = this.mark();
    if !this.push(trie, token) {
        *tracker = None;
        return true;
    }
    let long = this.numeral() > MAX_NUMERAL || overflows(this.lexeme());
    if checked && (long || !this.way().is_some_and(|way| fits(trie, &way, left))) {
        this.back(mark);
        return false;
    }
    true
}

/// A number beyond what a double holds.
fn overflows(lexeme: &[u8]) -> bool {
    let text = std::str::from_utf8(lexeme).ok();
    text.and_then(|text| text.parse::<f64>().ok())
        .is_some_and(f64::is_infinite)
}

fn fits(trie: &TokTrie, way: &[Piece], left: usize) -> bool {
    let bytes: usize = way
        .iter()
        .map(|piece| match piece {
            Piece::Bytes(bytes) => bytes.len(),
            Piece::Token(_) => 1,
        })
        .sum();
    bytes <= left || fewest_tokens(trie, way).is_some_and(|tokens| tokens.len() <= left)
}

/// How much of a marker the end of a text has already.
fn begun(tail: &[u8], marker: &[u8]) -> usize {
    let longest = marker.len().saturating_sub(1).min(tail.len());
    (0..=longest)
        .rev()
        .find(|n| tail.ends_with(&marker[..*n]))
        .unwrap_or(0)
}

fn find(text: &[u8], marker: &[u8]) -> Option<usize> {
    text.windows(marker.len().max(1))
        .position(|window| window == marker)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests;
