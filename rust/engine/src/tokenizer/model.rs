//! A tokenizer's model: ours over flat tables, or the `tokenizers` crate's where ours does not cover it. Ours
//! are models to the crate too, so that its pipeline runs over them where the fast one does not.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::bpe::BpeTrainer;
use tokenizers::tokenizer::{Model as LibraryModel, Token};

use super::bpe::{self, Bpe};
use super::table::{MAX_IDS, MAX_MERGES, NONE, Pairs, Table};
use super::unigram::{self, Unigram};
use super::wordpiece::WordPiece;

/// One of the models, with its vocabulary.
#[derive(Debug)]
pub(crate) enum Model {
    Bpe {
        model: Box<Bpe>,
        /// Tokens of a byte-level vocabulary that are no bytes: never made from text.
        odd: Odd,
    },
    WordPiece(Box<WordPiece>),
    Unigram(Box<Unigram>),
    Library(Box<tokenizers::Tokenizer>),
}

/// Tokens that stand beside a table.
#[derive(Debug, Default)]
pub(crate) struct Odd {
    ids: HashMap<String, u32>,
    tokens: BTreeMap<u32, String>,
}

/// Buffers that a thread keeps between words.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub bpe: bpe::Work,
    unigram: unigram::Work,
    bytes: Vec<u8>,
}

/// Two tokens that are merged, as the file spells them.
pub(crate) type Merge<'a> = (Cow<'a, str>, Cow<'a, str>);

/// The tokens of a BPE vocabulary.
#[derive(Debug)]
pub(crate) struct Tokens {
    table: Table,
    odd: Odd,
    byte_level: bool,
}

/// What a BPE model is made of; tokens and merges as the file spells them.
pub(crate) struct BpeSource<'a> {
    /// `None`: they cannot be held here.
    pub tokens: Option<Tokens>,
    pub merges: Vec<Merge<'a>>,
    pub unknown: Option<&'a str>,
    pub fuse_unknown: bool,
    pub byte_fallback: bool,
    pub whole_words: bool,
}

impl Model {
    /// `None` where the tokens or merges are more, other or less plain than ours hold.
    pub fn bpe(source: BpeSource<'_>) -> Option<Self> {
        let vocabulary = source.tokens?;
        let pairs = vocabulary.pairs(&source.merges)?;
        let id_of = |token: &str| vocabulary.id(token);
        // An unknown token that is not there is an error at the first unknown character.
        let unknown = match source.unknown {
            Some(token) => Some(id_of(token)?),
            None => None,
        };
        let fallback = source.byte_fallback.then(|| fallback(id_of));
        let Tokens {
            table: tokens,
            odd,
            byte_level,
        } = vocabulary;
        let mut bytes = [NONE; 256];
        for (byte, id) in bytes.iter_mut().enumerate() {
            if byte_level || byte < 128 {
                *id = tokens.get(&[byte as u8]).unwrap_or(NONE);
            }
        }
        let mut pairs = pairs;
        if byte_level {
            pairs.note_bytes(&bytes);
        }
        let model = Box::new(Bpe {
            mark: tokens.get("\u{2581}".as_bytes()),
            tokens,
            pairs,
            byte_level,
            bytes,
            fallback,
            unknown,
            fuse_unknown: source.fuse_unknown,
            whole_words: source.whole_words,
        });
        // Bytes spelled in a byte-level vocabulary: of the byte-level character, not of the text.
        let plain = !(model.byte_level && model.fallback.is_some());
        plain.then_some(Self::Bpe { model, odd })
    }

    /// WordPiece, or with no prefix a model of whole words.
    pub fn words(
        tokens: &[(Cow<'_, str>, u32)],
        unknown: &str,
        prefix: Option<String>,
        longest: usize,
    ) -> Option<Self> {
        let tokens = table(tokens.iter().map(|(token, id)| (token.as_ref(), *id)))?;
        let unknown = tokens.get(unknown.as_bytes())?;
        Some(Self::WordPiece(Box::new(WordPiece {
            tokens,
            unknown,
            prefix,
            longest,
        })))
    }

    /// Unigram: tokens and scores in order of ids.
    pub fn unigram(
        entries: &[(Cow<'_, str>, f64)],
        unknown: Option<u32>,
        byte_fallback: bool,
    ) -> Option<Self> {
        let ids = 0u32..;
        let tokens = table(
            entries
                .iter()
                .zip(ids)
                .map(|((token, _), id)| (token.as_ref(), id)),
        )?;
        let scores = entries.iter().map(|(_, score)| *score).collect();
        let fallback = byte_fallback.then(|| fallback(|token| tokens.get(token.as_bytes())));
        let model = Unigram::new(tokens, scores, unknown, fallback)?;
        Some(Self::Unigram(Box::new(model)))
    }

    /// A model without tokens.
    pub(super) fn none() -> Self {
        Self::WordPiece(Box::new(WordPiece {
            tokens: Table::with_capacity(0, 0),
            unknown: 0,
            prefix: None,
            longest: 0,
        }))
    }

    fn table(&self) -> Option<&Table> {
        match self {
            Self::Bpe { model, .. } => Some(&model.tokens),
            Self::WordPiece(model) => Some(&model.tokens),
            Self::Unigram(model) => Some(&model.tokens),
            Self::Library(_) => None,
        }
    }

    /// How many tokens there are, added ones not counted.
    pub fn len(&self) -> usize {
        let odd = match self {
            Self::Bpe { odd, .. } => odd.tokens.len(),
            Self::Library(model) => model.get_model().get_vocab_size(),
            _ => 0,
        };
        odd + self.table().map_or(0, Table::len)
    }

    /// The highest id plus one, added tokens not counted.
    pub fn end(&self) -> usize {
        let odd = match self {
            Self::Bpe { odd, .. } => odd.tokens.keys().max().copied(),
            Self::Library(model) => model.get_model().get_vocab().into_values().max(),
            _ => None,
        };
        let odd = odd.map_or(0, |id| id as usize + 1);
        odd.max(self.table().map_or(0, Table::end))
    }

    /// The id of a token as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Bpe { model, odd } if model.byte_level => {
                let mut bytes = Vec::new();
                match alphabet_bytes(token, &mut bytes) {
                    true => model.tokens.get(&bytes),
                    false => odd.ids.get(token).copied(),
                }
            }
            Self::Library(model) => model.get_model().token_to_id(token),
            _ => self.table()?.get(token.as_bytes()),
        }
    }

    /// The token of an id as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        match self {
            Self::Bpe { model, odd } if model.byte_level => match model.tokens.bytes(id) {
                Some(bytes) => Some(bytes.iter().map(|&byte| alphabet_char(byte)).collect()),
                None => odd.tokens.get(&id).cloned(),
            },
            Self::Library(model) => model.get_model().id_to_token(id),
            _ => String::from_utf8(self.table()?.bytes(id)?.to_vec()).ok(),
        }
    }

    /// The bytes of a token of a byte-level vocabulary of ours.
    pub fn byte_level_bytes(&self, id: u32) -> Option<&[u8]> {
        match self {
            Self::Bpe { model, .. } if model.byte_level => model.tokens.bytes(id),
            _ => None,
        }
    }

    /// Append the ids of a word, in bytes of text. `None`: it holds what the model cannot encode.
    pub(super) fn encode(&self, word: &[u8], work: &mut Work, ids: &mut Vec<u32>) -> Option<()> {
        match self {
            Self::Bpe { model, .. } => model.encode(word, &mut work.bpe, ids),
            Self::WordPiece(model) => model.encode(word, &mut work.bytes, |id, _| ids.push(id)),
            Self::Unigram(model) => {
                model.encode(word, &|_| false, &mut work.unigram, |id, _| ids.push(id))?;
            }
            Self::Library(_) => return None,
        }
        Some(())
    }

    /// Append the ids of a word, of which none is `banned` where the model has another way to say it.
    pub(super) fn encode_without(
        &self,
        word: &[u8],
        banned: &dyn Fn(u32) -> bool,
        work: &mut Work,
        ids: &mut Vec<u32>,
    ) -> Option<()> {
        match self {
            Self::Bpe { model, .. } => {
                model.encode_without(word, banned, &mut work.bpe, ids);
            }
            Self::WordPiece(model) => {
                let unknown = model.unknown;
                model.encode(word, &mut work.bytes, |id, _| {
                    ids.push(if banned(id) { unknown } else { id });
                });
            }
            Self::Unigram(model) => {
                model.encode(word, banned, &mut work.unigram, |id, _| ids.push(id))?;
            }
            Self::Library(_) => return None,
        }
        Some(())
    }
}

impl Odd {
    fn insert(&mut self, token: &str, id: u32) -> Option<()> {
        let twice = self.ids.insert(token.to_owned(), id).is_some();
        let taken = self.tokens.insert(id, token.to_owned()).is_some();
        (!twice && !taken && (id as usize) < MAX_IDS).then_some(())
    }
}

fn table<'a>(tokens: impl Iterator<Item = (&'a str, u32)> + Clone) -> Option<Table> {
    let (count, size) = tokens.clone().fold((0, 0), |(count, size), (token, _)| {
        (count + 1, size + token.len())
    });
    if count > MAX_IDS / 2 {
        return None;
    }
    let mut table = Table::with_capacity(count, size);
    for (token, id) in tokens {
        table.insert(token.as_bytes(), id)?;
    }
    Some(table)
}

fn fallback(id_of: impl Fn(&str) -> Option<u32>) -> Box<[u32; 256]> {
    let mut ids = Box::new([NONE; 256]);
    for (byte, id) in ids.iter_mut().enumerate() {
        *id = id_of(&format!("<0x{byte:02X}>")).unwrap_or(NONE);
    }
    ids
}

/// How many tokens are looked up side by side.
const BATCH: usize = 32;

/// The bytes and hashes of some tokens.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// The end of each token's bytes; those of an odd one are empty.
    ends: Vec<usize>,
    hashes: Vec<u64>,
}

impl Batch {
    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
        self.hashes.clear();
    }

    /// Add a token; `false` for one that is not of a byte-level alphabet, but should be.
    fn push(&mut self, token: &str, byte_level: bool, table: &Table) -> bool {
        let start = self.bytes.len();
        let plain = match byte_level {
            true => push_alphabet_bytes(token, &mut self.bytes),
            false => {
                self.bytes.extend_from_slice(token.as_bytes());
                true
            }
        };
        if !plain {
            self.bytes.truncate(start);
        }
        self.hashes.push(table.hash(&self.bytes[start..]));
        self.ends.push(self.bytes.len());
        plain
    }

    fn range(&self, at: usize) -> std::ops::Range<usize> {
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[at]
    }

    /// Hash and bytes of a token that is not odd.
    fn get(&self, at: usize) -> Option<(u64, &[u8])> {
        let range = self.range(at);
        (!range.is_empty()).then(|| (self.hashes[at], &self.bytes[range]))
    }
}

/// Merges are resolved on two threads from so many on.
const MANY_MERGES: usize = 1 << 15;

impl Tokens {
    /// Tokens as the file spells them, with their ids. `None` where they are more, or less plain, than is held here.
    pub fn new(source: &[(Cow<'_, str>, u32)], byte_level: bool) -> Option<Self> {
        if source.len() > MAX_IDS / 2 {
            return None;
        }
        let size = source.iter().map(|(token, _)| token.len()).sum();
        let mut table = Table::with_capacity(source.len(), size);
        let mut odd = Odd::default();
        let mut batch = Batch::default();
        for some in source.chunks(BATCH) {
            batch.clear();
            for (token, id) in some {
                if token.is_empty() {
                    return None;
                }
                if !batch.push(token, byte_level, &table) {
                    odd.insert(token, *id)?;
                }
            }
            table.warm(&batch.hashes);
            for (at, (_, id)) in some.iter().enumerate() {
                if let Some((hash, token)) = batch.get(at) {
                    table.insert_hashed(hash, token, *id)?;
                }
            }
        }
        let clash = |&id: &u32| table.bytes(id).is_some();
        (!odd.tokens.keys().any(clash)).then_some(Self {
            table,
            odd,
            byte_level,
        })
    }

    fn id(&self, token: &str) -> Option<u32> {
        if !self.byte_level {
            return self.table.get(token.as_bytes());
        }
        let mut bytes = Vec::new();
        match alphabet_bytes(token, &mut bytes) {
            true => self.table.get(&bytes),
            false => self.odd.ids.get(token).copied(),
        }
    }

    /// The merges by the ids of their tokens. `None` when one names a token that is not there.
    fn pairs(&self, merges: &[Merge<'_>]) -> Option<Pairs> {
        if merges.len() > MAX_MERGES {
            return None;
        }
        let several = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
        let (first, second) = match several && merges.len() > MANY_MERGES {
            true => merges.split_at(merges.len() / 2),
            false => (merges, &[][..]),
        };
        let (first, second) = std::thread::scope(|scope| {
            let second = (!second.is_empty()).then(|| scope.spawn(|| self.resolve(second)));
            let first = self.resolve(first);
            (
                first,
                second.map_or(Some(Vec::new()), |second| second.join().ok()?),
            )
        });
        let mut pairs = Pairs::with_capacity(merges.len());
        for found in [first?, second?] {
            for some in found.chunks(BATCH / 2) {
                pairs.warm(some);
                for &(left, right, merged) in some {
                    pairs.push(left, right, merged)?;
                }
            }
        }
        Some(pairs)
    }

    /// The ids of both tokens of each merge, and of what they make.
    fn resolve(&self, merges: &[Merge<'_>]) -> Option<Vec<(u32, u32, u32)>> {
        let tokens = &self.table;
        let mut batch = Batch::default();
        let mut found = Vec::with_capacity(merges.len());
        // Files list merges in order of what they make, so the next is mostly known without a search.
        let mut last = 0;
        for some in merges.chunks(BATCH / 2) {
            batch.clear();
            for (a, b) in some {
                batch.push(a, self.byte_level, tokens);
                batch.push(b, self.byte_level, tokens);
            }
            tokens.warm(&batch.hashes);
            for (at, (a, b)) in some.iter().enumerate() {
                let (Some((left, first)), Some((right, second))) =
                    (batch.get(2 * at), batch.get(2 * at + 1))
                else {
                    found.push((self.id(a)?, self.id(b)?, self.id(&format!("{a}{b}"))?));
                    continue;
                };
                let joined = &batch.bytes[batch.range(2 * at).start..batch.range(2 * at + 1).end];
                let near = [last, last + 1]
                    .into_iter()
                    .find(|&id| tokens.bytes(id) == Some(joined));
                last = match near {
                    Some(id) => id,
                    None => tokens.get(joined)?,
                };
                let left = tokens.get_hashed(left, first)?;
                found.push((left, tokens.get_hashed(right, second)?, last));
            }
        }
        Some(found)
    }
}

/// The bytes that a token of GPT-2's byte-level alphabet stands for; `false` when it has other characters.
pub(super) fn alphabet_bytes(token: &str, bytes: &mut Vec<u8>) -> bool {
    bytes.clear();
    push_alphabet_bytes(token, bytes)
}

#[inline]
fn push_alphabet_bytes(token: &str, bytes: &mut Vec<u8>) -> bool {
    let text = token.as_bytes();
    let mut at = 0;
    loop {
        // Most are letters that stand for themselves.
        let rest = &text[at..];
        let plain = rest.iter().position(|byte| !matches!(byte, 0x21..=0x7e));
        let plain = plain.unwrap_or(rest.len());
        bytes.extend_from_slice(&rest[..plain]);
        at += plain;
        let Some(&first) = text.get(at) else {
            return true;
        };
        // Of the two-byte characters only those below U+0144 are of the alphabet.
        let (code, width) = match first {
            0..0x80 => (u32::from(first), 1),
            _ => super::words::character(text, at),
        };
        match alphabet_byte(code) {
            Some(byte) => bytes.push(byte),
            None => return false,
        }
        at += width;
    }
}

/// The byte a character stands for in GPT-2's byte-level alphabet: printable Latin-1 stands for itself,
/// the 68 other bytes follow in order from U+0100.
#[inline]
pub(super) fn alphabet_byte(code: u32) -> Option<u8> {
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The other way round.
pub(super) fn alphabet_char(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0..=0x20 => code + 0x100,
        0x7f..=0xa0 => code - 0x7f + 0x121,
        _ => 0x143,
    };
    char::from_u32(code).unwrap_or('\u{fffd}')
}

/// A model of ours as the crate sees it.
#[derive(Debug, Clone)]
pub(super) struct Shared(pub Arc<Model>);

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

impl Shared {
    fn tokens(&self, text: &str, work: &mut Work) -> Option<Vec<Token>> {
        let mut tokens = Vec::new();
        let mut add = |id: u32, span: (usize, usize)| {
            let value = self.0.token(id).unwrap_or_default();
            tokens.push(Token::new(id, value, span));
        };
        match &*self.0 {
            Model::Bpe { model, .. } => {
                let mut bytes = Vec::new();
                let word = match model.byte_level {
                    true if !alphabet_bytes(text, &mut bytes) => {
                        // Other characters get here from odd normalisers only, and have no token.
                        if model.unknown.is_some() {
                            return None;
                        }
                        let known = |c: &char| alphabet_byte(*c as u32).is_some();
                        let known: String = text.chars().filter(known).collect();
                        alphabet_bytes(&known, &mut bytes);
                        bytes.as_slice()
                    }
                    true => bytes.as_slice(),
                    false => text.as_bytes(),
                };
                let mut start = 0;
                for symbol in model.encode_spans(word, &mut work.bpe) {
                    let end = start + symbol.length as usize;
                    add(symbol.id, (start, end));
                    start = end;
                }
            }
            Model::WordPiece(model) => model.encode(text.as_bytes(), &mut work.bytes, add),
            Model::Unigram(model) => {
                model.encode(text.as_bytes(), &|_| false, &mut work.unigram, add)?;
            }
            Model::Library(_) => return None,
        }
        Some(tokens)
    }
}

impl LibraryModel for Shared {
    type Trainer = BpeTrainer;

    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        WORK.with_borrow_mut(|work| self.tokens(text, work))
            .ok_or_else(|| "the text holds characters that the vocabulary cannot say".into())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        let ids = 0..self.0.end() as u32;
        ids.filter_map(|id| Some((self.0.token(id)?, id))).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a shared model is not saved".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}
