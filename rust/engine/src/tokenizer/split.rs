//! How a normalised text is cut into the words that a model encodes, each alone: `pre_tokenizer`, and for
//! models that take a whole text as one word, places that no merge can cross.

use std::collections::HashSet;

use regex_syntax::hir::{ClassUnicode, ClassUnicodeRange};
use serde_json::Value as Json;
use unicode_categories::UnicodeCategories;

use super::bpe::Bpe;
use super::model::alphabet_char;
use super::words::{Pattern, character, class, width};

/// GPT-2's split, which a byte-level pre-tokenizer does by itself.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// A way to cut a text into words.
#[derive(Debug)]
pub(super) enum Splitter {
    /// One after the other; with `space`, to a text that does not begin with a space one is added first.
    Stages {
        stages: Vec<Stage>,
        space: bool,
    },
    Metaspace(Metaspace),
    /// The text is one word.
    Whole,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// Matches and gaps; without `gaps` the text between matches is dropped, without `matches` these.
    Pattern {
        pattern: Box<Pattern>,
        matches: bool,
        gaps: bool,
    },
    /// Matches and gaps, some of them joined.
    Joined {
        pattern: Box<Pattern>,
        join: Join,
        /// Gaps count as matches, and matches as gaps.
        invert: bool,
    },
    /// Numeric characters from others.
    Digits { individual: bool },
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Join {
    /// Those of a kind that lie side by side.
    Alike,
    /// A match to the gap before it, or to the one behind.
    Before,
    Behind,
}

/// Spaces become a mark, and each mark begins a word.
#[derive(Debug)]
pub(super) struct Metaspace {
    mark: char,
    prepend: Prepend,
    /// Cut before each mark.
    pub split: bool,
    /// White space is dropped first, and each word between marked.
    words: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Prepend {
    Always,
    First,
    Never,
}

impl Splitter {
    /// What a `pre_tokenizer` of `tokenizer.json` says; `None` for what is not done here. `no_spaces`: the
    /// texts it gets hold none.
    pub fn new(json: &Json, no_spaces: bool) -> Option<Self> {
        if json.is_null() {
            return Some(Self::Whole);
        }
        let mut parts = Vec::new();
        flatten(json, &mut parts)?;
        let of_type =
            |part: &Json, name: &str| part.get("type").and_then(Json::as_str) == Some(name);
        if let [part] = parts.as_slice()
            && of_type(part, "Metaspace")
        {
            return Metaspace::new(part, false).map(Self::Metaspace);
        }
        if let [first, part] = parts.as_slice()
            && of_type(first, "WhitespaceSplit")
            && of_type(part, "Metaspace")
        {
            return Metaspace::new(part, true).map(Self::Metaspace);
        }
        let (mut stages, mut space) = (Vec::new(), false);
        let mut byte_level = false;
        for part in parts {
            let flag = |key: &str, default: Option<bool>| match part.get(key) {
                None => default,
                Some(value) => value.as_bool(),
            };
            match part.get("type")?.as_str()? {
                "ByteLevel" if !byte_level => {
                    byte_level = true;
                    flag("trim_offsets", None)?;
                    if flag("add_prefix_space", None)? {
                        // After a cut it is each piece that gets a space.
                        space = stages.is_empty().then_some(true)?;
                    }
                    if flag("use_regex", Some(true))? {
                        stages.push(isolated(Pattern::new(GPT2)?));
                    }
                }
                // What comes behind sees bytes as characters.
                "Digits" if byte_level => {
                    let regex = match flag("individual_digits", None)? {
                        true => r"\p{N}",
                        false => r"\p{N}+",
                    };
                    stages.push(isolated(Pattern::of_bytes(regex, alphabet_char)?));
                }
                "Split" if byte_level => {
                    let regex = part.get("pattern")?.get("Regex")?.as_str()?;
                    let pattern = Pattern::of_bytes(regex, alphabet_char)?;
                    let behavior = part.get("behavior")?.as_str()?;
                    stages.push(Stage::new(pattern, behavior, flag("invert", None)?)?);
                }
                _ if byte_level => return None,
                "Digits" => stages.push(Stage::Digits {
                    individual: flag("individual_digits", None)?,
                }),
                "Whitespace" => {
                    let pattern = Pattern::of_library(r"\w+|[^\w\s]+")?;
                    stages.push(Stage::new(pattern, "Removed", true)?);
                }
                "WhitespaceSplit" => stages.push(white_space()?),
                "BertPreTokenizer" => {
                    stages.push(white_space()?);
                    stages.push(isolated(Pattern::of_class(punctuation()?)?));
                }
                "Punctuation" => {
                    let behavior = part
                        .get("behavior")
                        .map_or(Some("Isolated"), Json::as_str)?;
                    let pattern = Pattern::of_class(punctuation()?)?;
                    stages.push(Stage::new(pattern, behavior, false)?);
                }
                "CharDelimiterSplit" => {
                    let delimiter = part.get("delimiter")?.as_str()?;
                    let one = delimiter.chars().count() == 1;
                    let pattern = one.then(|| Pattern::new(&escaped(delimiter)))??;
                    stages.push(Stage::new(pattern, "Removed", false)?);
                }
                "Split" => {
                    let invert = flag("invert", None)?;
                    let what = part.get("pattern")?;
                    let behavior = part.get("behavior")?.as_str()?;
                    let text = what.get("String").and_then(Json::as_str);
                    if no_spaces && text == Some(" ") && !invert {
                        JOINS_AND_CUTS.contains(&behavior).then_some(())?;
                        continue;
                    }
                    let pattern = match text {
                        Some("") => return None,
                        Some(text) => Pattern::new(&escaped(text))?,
                        None => Pattern::new(what.get("Regex")?.as_str()?)?,
                    };
                    stages.push(Stage::new(pattern, behavior, invert)?);
                }
                _ => return None,
            }
        }
        match stages.is_empty() && !space {
            true => Some(Self::Whole),
            false => Some(Self::Stages { stages, space }),
        }
    }
}

/// Whether a pre-tokenizer gives its model byte-level characters and nothing else.
pub(super) fn is_byte_level(json: &Json) -> bool {
    let mut parts = Vec::new();
    if json.is_null() || flatten(json, &mut parts).is_none() {
        return false;
    }
    let name = |part: &&Json| {
        part.get("type")
            .and_then(Json::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let after = parts
        .iter()
        .map(name)
        .skip_while(|name| name != "ByteLevel")
        .skip(1);
    let keeps = ["Split", "Digits", "Punctuation"];
    parts.iter().map(name).any(|name| name == "ByteLevel")
        && after.into_iter().all(|name| keeps.contains(&name.as_str()))
}

fn flatten<'j>(json: &'j Json, parts: &mut Vec<&'j Json>) -> Option<()> {
    match json.get("type")?.as_str()? {
        "Sequence" => {
            let inner = json.get("pretokenizers")?.as_array()?;
            inner.iter().try_for_each(|part| flatten(part, parts))
        }
        _ => {
            parts.push(json);
            Some(())
        }
    }
}

/// What is done to the matches of a split, but for those alike that are joined.
const JOINS_AND_CUTS: [&str; 4] = [
    "MergedWithPrevious",
    "MergedWithNext",
    "Isolated",
    "Removed",
];

fn isolated(pattern: Pattern) -> Stage {
    Stage::Pattern {
        pattern: Box::new(pattern),
        matches: true,
        gaps: true,
    }
}

/// Words between white space.
fn white_space() -> Option<Stage> {
    Stage::new(Pattern::new(r"\s+")?, "Removed", false)
}

/// A text as the regular expression that finds it.
fn escaped(text: &str) -> String {
    let mut regex = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\n' => regex.push_str("\\n"),
            '\r' => regex.push_str("\\r"),
            '\t' => regex.push_str("\\t"),
            _ => {
                if c.is_ascii_punctuation() {
                    regex.push('\\');
                }
                regex.push(c);
            }
        }
    }
    regex
}

/// Punctuation to the crate: ASCII's, and what was punctuation in the Unicode of its tables.
pub(super) fn punctuation() -> Option<ClassUnicode> {
    let mut known = class(r"[\p{P}\p{S}]", false)?;
    known.push(ClassUnicodeRange::new('!', '~'));
    // A mark by now.
    known.push(ClassUnicodeRange::new('\u{111c9}', '\u{111c9}'));
    let is = |c: char| c.is_ascii_punctuation() || c.is_punctuation();
    let all = known.ranges().iter();
    let found = all.flat_map(|range| (range.start()..=range.end()).filter(|&c| is(c)));
    Some(ClassUnicode::new(
        found.map(|c| ClassUnicodeRange::new(c, c)),
    ))
}

impl Stage {
    /// What a split of this behaviour does; `invert`: gaps count as matches.
    fn new(pattern: Pattern, behavior: &str, invert: bool) -> Option<Self> {
        let pattern = Box::new(pattern);
        let join = match behavior {
            "Isolated" => return Some(isolated(*pattern)),
            "Removed" => {
                return Some(Self::Pattern {
                    pattern,
                    matches: invert,
                    gaps: !invert,
                });
            }
            "Contiguous" => Join::Alike,
            "MergedWithPrevious" => Join::Before,
            "MergedWithNext" => Join::Behind,
            _ => return None,
        };
        Some(Self::Joined {
            pattern,
            join,
            invert,
        })
    }

    /// The next piece of `text` at `at`, which is below its length, and whether it is kept.
    #[inline]
    fn next(&self, text: &[u8], at: usize) -> (usize, bool) {
        match self {
            Self::Pattern {
                pattern,
                matches,
                gaps,
            } => {
                let (end, matched) = pattern.next(text, at);
                (end, if matched { *matches } else { *gaps })
            }
            Self::Joined {
                pattern,
                join,
                invert,
            } => {
                let piece = |at: usize| {
                    let (end, matched) = pattern.next(text, at);
                    (end, matched != *invert)
                };
                let (mut end, matched) = piece(at);
                let wanted = match join {
                    Join::Alike => Some(matched),
                    Join::Before => (!matched).then_some(true),
                    Join::Behind => matched.then_some(false),
                };
                while end < text.len()
                    && let (next, kind) = piece(end)
                    && Some(kind) == wanted
                {
                    end = next;
                    if !matches!(join, Join::Alike) {
                        break;
                    }
                }
                (end, true)
            }
            Self::Digits { individual } => {
                let numeric = |at: usize| {
                    let (c, width) = character(text, at);
                    (char::from_u32(c).is_some_and(char::is_numeric), at + width)
                };
                let (kind, mut end) = numeric(at);
                while !(kind && *individual)
                    && end < text.len()
                    && let (next, after) = numeric(end)
                    && next == kind
                {
                    end = after;
                }
                (end, true)
            }
        }
    }
}

/// Call `word` with the words of a text that stages cut, as ranges of it, until it says no.
#[inline]
pub(super) fn each_word(
    stages: &[Stage],
    text: &[u8],
    word: &mut impl FnMut(usize, usize) -> bool,
) -> bool {
    match stages {
        [] => text.is_empty() || word(0, text.len()),
        [stage] => {
            let mut at = 0;
            while at < text.len() {
                let (end, kept) = stage.next(text, at);
                if kept && !word(at, end) {
                    return false;
                }
                at = end;
            }
            true
        }
        _ => each_of(stages, text, 0, word),
    }
}

/// Whether a text can be cut at `at`, between two characters: a word ends there whatever stands around, and the
/// words before depend on no more than the character at `at`.
#[inline]
pub(super) fn is_seam(stages: &[Stage], text: &[u8], at: usize) -> bool {
    let mut certain = false;
    for stage in stages {
        match stage {
            Stage::Pattern { pattern, .. } => {
                let (apart, in_match) = pattern.parts(text, at);
                if !apart {
                    return false;
                }
                certain |= in_match;
            }
            Stage::Joined { .. } => return false,
            // A run that goes on behind `at` is cut there by who is certain, and goes on alike.
            Stage::Digits { .. } => {}
        }
    }
    certain
}

fn each_of(
    stages: &[Stage],
    text: &[u8],
    offset: usize,
    word: &mut dyn FnMut(usize, usize) -> bool,
) -> bool {
    let Some((stage, rest)) = stages.split_first() else {
        return word(offset, offset + text.len());
    };
    let mut at = 0;
    while at < text.len() {
        let (end, kept) = stage.next(text, at);
        if kept && !each_of(rest, &text[at..end], offset + at, word) {
            return false;
        }
        at = end;
    }
    true
}

impl Metaspace {
    fn new(json: &Json, words: bool) -> Option<Self> {
        let text = |key: &str| json.get(key).and_then(Json::as_str);
        let flag = |key: &str| {
            json.get(key)
                .filter(|value| !value.is_null())
                .map(Json::as_bool)
        };
        let mut chars = text("replacement")?.chars();
        let mark = chars.next().filter(|_| chars.next().is_none())?;
        let prepend = match (json.get("prepend_scheme"), text("prepend_scheme")) {
            (None, _) | (_, Some("always")) => Prepend::Always,
            (_, Some("first")) => Prepend::First,
            (_, Some("never")) => Prepend::Never,
            _ => return None,
        };
        // An older flag must not say otherwise; here it is left to the library.
        if flag("add_prefix_space").is_some_and(|flag| flag != Some(prepend != Prepend::Never)) {
            return None;
        }
        let split = flag("split").unwrap_or(Some(true))?;
        if words && !(split && prepend == Prepend::Always) {
            return None;
        }
        Some(Self {
            mark,
            prepend,
            split,
            words,
        })
    }

    /// Whether what is prepended depends on where in the whole text a piece begins.
    pub fn depends_on_place(&self) -> bool {
        self.prepend == Prepend::First
    }

    /// The mark.
    pub fn mark(&self) -> char {
        self.mark
    }

    /// The text with marks for spaces, into `marked`; `first`: it begins the whole text.
    pub fn mark_spaces(&self, text: &str, first: bool, marked: &mut String) {
        marked.clear();
        if self.words {
            for word in text
                .split(char::is_whitespace)
                .filter(|word| !word.is_empty())
            {
                if !word.starts_with(self.mark) {
                    marked.push(self.mark);
                }
                marked.push_str(word);
            }
            return;
        }
        let prepend = match self.prepend {
            Prepend::Always => true,
            Prepend::First => first,
            Prepend::Never => false,
        };
        if prepend && !text.starts_with([' ', self.mark]) {
            marked.push(self.mark);
        }
        push_marked(text, self.mark, marked);
    }
}

/// Append a text with `mark` for each space.
pub(super) fn push_marked(text: &str, mark: char, marked: &mut String) {
    marked.reserve(text.len() + text.len() / 2);
    let mut done = 0;
    for (at, _) in text.bytes().enumerate().filter(|&(_, byte)| byte == b' ') {
        marked.push_str(&text[done..at]);
        marked.push(mark);
        done = at + 1;
    }
    marked.push_str(&text[done..]);
}

/// Where a text that is one word to a BPE model can be cut all the same: before a mark, after a character
/// that no merged token has before one.
#[derive(Debug)]
pub(super) struct Cuts {
    mark: char,
    /// The mark, and the characters that some token has before it: those below 128, all in order.
    ascii: [bool; 128],
    joined: Vec<u32>,
    /// Which characters may stand side by side in a merged token: a bit for each of a pair's hashes, so that
    /// some that do not seem to. Empty where only marks are looked at.
    pairs: Vec<u64>,
}

/// Bits of [`Cuts::pairs`].
const PAIR_BITS: u32 = 20;

#[inline]
fn pair_bit(left: u32, right: u32) -> usize {
    let mixed = (u64::from(left) << 21 | u64::from(right)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (64 - PAIR_BITS)) as usize
}

impl Cuts {
    /// `None` where the model's merges may cross any place: then the text is merged as it is.
    pub fn new(model: &Bpe, mark: char) -> Option<Self> {
        let mut bytes = [0; 4];
        let mark_bytes = mark.encode_utf8(&mut bytes).as_bytes();
        let known = model.tokens.get(mark_bytes).is_some();
        // Characters that leave no symbol let their neighbours meet.
        let all_leave_one = model.unknown.is_some()
            || model
                .fallback
                .as_ref()
                .is_some_and(|ids| !ids.contains(&super::table::NONE));
        if model.byte_level || model.whole_words || !known || !all_leave_one || mark.is_ascii() {
            return None;
        }
        // An unknown character is fused with its neighbours, its bytes are not.
        let bytes_leave = model.fallback.as_ref();
        let by_pair = bytes_leave.is_some_and(|ids| !ids.contains(&super::table::NONE));
        let mut pairs = vec![0u64; if by_pair { 1 << (PAIR_BITS - 6) } else { 0 }];
        let mut joined = HashSet::new();
        let fallback = model.fallback.iter().flat_map(|ids| ids.iter().copied());
        let strange: HashSet<u32> = fallback.chain(model.unknown).collect();
        for &merged in model.pairs.results() {
            let token = model.tokens.bytes(merged)?;
            let token = std::str::from_utf8(token).ok()?;
            let mut before: Option<char> = None;
            for c in token.chars() {
                if let (true, Some(before)) = (c == mark, before) {
                    joined.insert(before as u32);
                }
                if let (true, Some(before)) = (by_pair, before) {
                    let bit = pair_bit(before as u32, c as u32);
                    pairs[bit / 64] |= 1 << (bit % 64);
                }
                before = Some(c);
            }
        }
        // Symbols that stand for other text than theirs must not take part in merges.
        let plain = model.pairs.parts().all(|id| !strange.contains(&id));
        let mut joined: Vec<u32> = joined.into_iter().collect();
        joined.sort_unstable();
        let mut ascii = [false; 128];
        for &c in &joined {
            if let Some(known) = ascii.get_mut(c as usize) {
                *known = true;
            }
        }
        plain.then_some(Self {
            mark,
            ascii,
            joined,
            pairs,
        })
    }

    /// The end of the piece of `text` that begins at `at`.
    #[inline]
    pub fn next(&self, bytes: &[u8], at: usize) -> usize {
        let mut buffer = [0; 4];
        let mark = self.mark.encode_utf8(&mut buffer).as_bytes();
        let mut end = at + width(bytes[at]);
        while let Some(&byte) = bytes.get(end) {
            if byte < 0x80 {
                end += 1;
                continue;
            }
            let is_mark = byte == mark[0] && bytes[end..].starts_with(mark);
            let cut = match is_mark {
                true => !self.joins(bytes, end),
                false => !self.pairs.is_empty() && self.is_apart(bytes, end),
            };
            if cut {
                return end;
            }
            end += width(byte);
        }
        bytes.len()
    }

    /// Whether a text is always cut at `at`: there is a mark, and no token goes on across.
    #[inline]
    pub fn is_seam(&self, bytes: &[u8], at: usize) -> bool {
        bytes[at] >= 0x80 && character(bytes, at).0 == self.mark as u32 && !self.joins(bytes, at)
    }

    /// Whether no token has the characters before and after `end` side by side, both beyond ASCII.
    #[inline]
    fn is_apart(&self, bytes: &[u8], end: usize) -> bool {
        let mut before = end - 1;
        if bytes[before] < 0x80 {
            return false;
        }
        while bytes[before] & 0xc0 == 0x80 {
            before -= 1;
        }
        let bit = pair_bit(character(bytes, before).0, character(bytes, end).0);
        self.pairs[bit / 64] >> (bit % 64) & 1 == 0
    }

    /// Whether some token has the character before `end` before a mark.
    #[inline]
    fn joins(&self, bytes: &[u8], end: usize) -> bool {
        let mut before = end - 1;
        if let Some(&joined) = self.ascii.get(bytes[before] as usize) {
            return joined;
        }
        while bytes[before] & 0xc0 == 0x80 {
            before -= 1;
        }
        let (c, _) = character(bytes, before);
        self.joined.binary_search(&c).is_ok()
    }
}
