//! Added tokens: found in a text before anything else is done with it, and left out of or kept in what is
//! decoded. The rules (and the oddities) are those of the `tokenizers` crate's `AddedVocabulary`.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use regex_syntax::hir::ClassUnicode;
use serde::Deserialize;
use tokenizers::AddedToken;

use super::model::Model;
use super::trie::{NO_TOKEN, ROOT, Trie};

/// Longer tokens are left to the library, whose search does not depend on their length.
const LONGEST: usize = 256;

/// An entry of `added_tokens`. Its id is only a wish: the vocabulary's counts.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Entry {
    #[serde(rename = "id")]
    pub _id: u32,
    pub content: String,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub normalized: bool,
    pub special: bool,
}

impl From<Entry> for AddedToken {
    fn from(entry: Entry) -> Self {
        Self {
            content: entry.content,
            single_word: entry.single_word,
            lstrip: entry.lstrip,
            rstrip: entry.rstrip,
            normalized: entry.normalized,
            special: entry.special,
        }
    }
}

/// The added tokens of a tokenizer.
#[derive(Debug, Default)]
pub(crate) struct Added {
    ids: HashMap<String, u32>,
    by_id: BTreeMap<u32, Token>,
    special: HashSet<String>,
    /// The ids that decoding leaves out when asked to.
    special_ids: HashSet<u32>,
    /// Those that plain text must not become, in order.
    control: Vec<u32>,
}

#[derive(Debug)]
struct Token {
    token: AddedToken,
    /// What is looked for and what decoders get: normalised if the token says so.
    spelled: String,
}

impl Added {
    /// Give each token its id and its spelling, in order.
    pub fn new(
        tokens: Vec<AddedToken>,
        model: &Model,
        normalize: &dyn Fn(&str) -> Option<String>,
    ) -> Option<Self> {
        let mut added = Self::default();
        let mut next = u32::try_from(model.len()).ok()?;
        let mut spellings: HashMap<u32, String> = HashMap::new();
        for token in tokens {
            let known = added.ids.get(&token.content).copied();
            let same =
                known.is_some_and(|id| added.by_id.get(&id).map(|t| &t.token) == Some(&token));
            if token.content.is_empty() || same {
                continue;
            }
            let id = match known.or_else(|| model.id(&token.content)) {
                Some(id) => id,
                None => {
                    next += 1;
                    next - 1
                }
            };
            if token.normalized {
                let spelled = normalize(&token.content)?;
                if spelled != token.content {
                    spellings.insert(id, spelled);
                }
            }
            added.ids.insert(token.content.clone(), id);
            if token.special {
                added.special.insert(token.content.clone());
            }
            let spelled = spellings.get(&id).unwrap_or(&token.content).clone();
            added.by_id.insert(id, Token { token, spelled });
        }
        added.find_special(model);
        Some(added)
    }

    /// The same, of a tokenizer of the library.
    pub fn of_library(library: &tokenizers::Tokenizer, model: &Model) -> Self {
        let vocabulary = library.get_added_vocabulary();
        let mut added = Self::default();
        for (&id, token) in vocabulary.get_added_tokens_decoder() {
            let spelled = vocabulary.simple_id_to_token(id);
            let spelled = spelled.unwrap_or_else(|| token.content.clone());
            let token = token.clone();
            added.by_id.insert(id, Token { token, spelled });
        }
        for (content, &id) in vocabulary.get_vocab() {
            added.ids.insert(content.clone(), id);
            if vocabulary.is_special_token(content) {
                added.special.insert(content.clone());
            }
        }
        added.find_special(model);
        added
    }

    fn find_special(&mut self, model: &Model) {
        let by_token = self.special.iter().filter_map(|token| model.id(token));
        let ids: HashSet<u32> = by_token.filter(|id| !self.by_id.contains_key(id)).collect();
        let own = self
            .by_id
            .iter()
            .filter(|(_, t)| self.special.contains(&t.spelled));
        self.special_ids = own.map(|(&id, _)| id).chain(ids).collect();
        let control = self.by_id.iter().filter(|(_, token)| token.is_control());
        self.control = control.map(|(&id, _)| id).collect();
    }

    /// The id of a token by its content.
    pub fn id(&self, content: &str) -> Option<u32> {
        self.ids.get(content).copied()
    }

    /// How decoders get a token.
    pub fn token(&self, id: u32) -> Option<&str> {
        self.by_id.get(&id).map(|token| token.spelled.as_str())
    }

    /// Whether decoding with `skip_special_tokens` leaves an id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Whether an id is an added token that plain text must not become: a special one, or one of several
    /// characters that are not all white space.
    #[inline]
    pub fn is_control(&self, id: u32) -> bool {
        let (Some(first), Some(last)) = (self.control.first(), self.control.last()) else {
            return false;
        };
        (first..=last).contains(&&id) && self.control.binary_search(&id).is_ok()
    }

    /// The highest id plus one.
    pub fn end(&self) -> usize {
        let ids = self.ids.values().max();
        ids.map_or(0, |&id| id as usize + 1)
    }

    /// Whether each token can be told from the others: the crate refuses files where not.
    pub fn is_searchable(&self) -> bool {
        let mut seen = HashSet::new();
        self.by_id.values().all(|Token { token, spelled }| {
            !spelled.is_empty() && seen.insert((token.normalized, spelled))
        })
    }

    /// The tokens looked for in the text as it is, and those in the normalised text. `None` when the
    /// library has to do it.
    pub fn finders(&self) -> Option<(Option<Finder>, Option<Finder>)> {
        Some((self.finder(false)?, self.finder(true)?))
    }

    fn finder(&self, normalized: bool) -> Option<Option<Finder>> {
        let tokens: Vec<(&u32, &Token)> = self
            .by_id
            .iter()
            .filter(|(_, token)| token.token.normalized == normalized)
            .collect();
        match tokens.is_empty() {
            true => Some(None),
            false => Finder::new(&tokens).map(Some),
        }
    }
}

impl Token {
    fn is_control(&self) -> bool {
        let space = |c: char| c.is_whitespace() || c == '\u{2581}';
        let word = self.spelled.chars().nth(1).is_some() && !self.spelled.chars().all(space);
        self.token.special || word
    }
}

/// Finds added tokens in a text: the leftmost, of those the longest.
#[derive(Debug)]
pub(super) struct Finder {
    trie: Trie,
    flags: HashMap<u32, Flags>,
    /// Whether a byte begins a token.
    begins: Box<[bool; 256]>,
    /// The only byte that does.
    only: Option<u8>,
    /// `\w`, when a token asks for whole words.
    word: Option<ClassUnicode>,
}

#[derive(Debug, Clone, Copy)]
struct Flags {
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    control: bool,
}

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Text(Range<usize>),
    Token(u32),
    /// A token that ends before it begins: the library gives up there.
    Broken,
}

impl Finder {
    fn new(tokens: &[(&u32, &Token)]) -> Option<Self> {
        let patterns: Vec<(&[u8], u32)> = tokens
            .iter()
            .map(|(id, token)| (token.spelled.as_bytes(), **id))
            .collect();
        if patterns.iter().any(|(token, _)| token.len() > LONGEST) {
            return None;
        }
        let mut begins = Box::new([false; 256]);
        for (token, _) in &patterns {
            begins[*token.first()? as usize] = true;
        }
        let mut firsts = (0..=255).filter(|&byte: &u8| begins[byte as usize]);
        let only = firsts.next().filter(|_| firsts.next().is_none());
        let flags = |(id, token): &(&u32, &Token)| {
            let flags = Flags {
                single_word: token.token.single_word,
                lstrip: token.token.lstrip,
                rstrip: token.token.rstrip,
                control: token.is_control(),
            };
            (**id, flags)
        };
        let flags: HashMap<u32, Flags> = tokens.iter().map(flags).collect();
        let asked = flags.values().any(|flags| flags.single_word);
        let word = match asked {
            true => Some(super::words::class(r"\w", false)?),
            false => None,
        };
        Some(Self {
            trie: Trie::new(patterns)?,
            flags,
            begins,
            only,
            word,
        })
    }

    /// Call `part` for each part of `text`, in order, until it says no. Tokens are looked for where
    /// `allowed` says so of a place, an end, and whether it is more than white space.
    pub fn split(
        &self,
        text: &str,
        allowed: &dyn Fn(usize, usize, bool) -> bool,
        part: &mut dyn FnMut(Part) -> bool,
    ) -> bool {
        let (mut from, mut done) = (0, 0);
        while let Some((mut start, mut end, id)) = self.find(text.as_bytes(), from, allowed) {
            from = end;
            let Some(flags) = self.flags.get(&id) else {
                continue;
            };
            if flags.single_word && !self.is_single(text, start, end) {
                continue;
            }
            if flags.lstrip {
                start = text[..start].trim_end().len().max(done);
            }
            if flags.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if done < start && !part(Part::Text(done..start)) {
                return false;
            }
            // White space that the token before took is no part of this one, which may leave nothing.
            let more = match start.cmp(&end) {
                Ordering::Less => part(Part::Token(id)),
                Ordering::Equal => true,
                Ordering::Greater => part(Part::Broken),
            };
            if !more {
                return false;
            }
            done = end;
        }
        done == text.len() || part(Part::Text(done..text.len()))
    }

    #[inline]
    fn find(
        &self,
        text: &[u8],
        mut from: usize,
        allowed: &dyn Fn(usize, usize, bool) -> bool,
    ) -> Option<(usize, usize, u32)> {
        loop {
            from += match self.only {
                Some(only) => position(&text[from..], only)?,
                None => text[from..].iter().position(|&b| self.begins[b as usize])?,
            };
            let (mut state, mut found) = (ROOT, None);
            for (at, &byte) in text.iter().enumerate().skip(from) {
                let Some(next) = self.trie.step(state, byte) else {
                    break;
                };
                state = next;
                let id = self.trie.token(state);
                if id != NO_TOKEN {
                    let control = self.flags.get(&id).is_none_or(|flags| flags.control);
                    if allowed(from, at + 1, control) {
                        found = Some((from, at + 1, id));
                    }
                }
            }
            if found.is_some() {
                return found;
            }
            from += 1;
        }
    }

    fn is_single(&self, text: &str, start: usize, end: usize) -> bool {
        let word = |c: char| {
            let word = self.word.as_ref().map_or(&[][..], |word| word.ranges());
            let at = word.partition_point(|range| range.end() < c);
            word.get(at).is_some_and(|range| range.start() <= c)
        };
        let before = text[..start].chars().next_back();
        let after = text[end..].chars().next();
        !before.is_some_and(word) && !after.is_some_and(word)
    }
}

/// Where a byte is first, eight bytes at a time.
#[inline]
fn position(text: &[u8], byte: u8) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let wanted = ONES * u64::from(byte);
    let mut at = 0;
    let mut rest = text;
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        let equal = u64::from_le_bytes(*head) ^ wanted;
        let zero = equal.wrapping_sub(ONES) & !equal & (ONES << 7);
        if zero != 0 {
            return Some(at + (zero.trailing_zeros() / 8) as usize);
        }
        at += 8;
        rest = tail;
    }
    rest.iter().position(|&b| b == byte).map(|i| at + i)
}
