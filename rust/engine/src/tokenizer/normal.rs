//! Normalisers as text to text. Those that are common are done here, with a look first whether they would
//! change anything; the others by the `tokenizers` crate.

use std::borrow::Cow;

use super::split::push_marked;
use super::words::character;
use serde_json::Value as Json;
use tokenizers::NormalizerWrapper;
use tokenizers::tokenizer::{NormalizedString, Normalizer as _};
use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// Characters below are their own NFC, and no two of them compose.
const FIRST_COMBINING: u8 = 0xcc; // the first byte of U+0300

/// What is done to a text before it is split.
#[derive(Debug)]
pub(super) enum Normal {
    /// The steps in order; none: the text stays as it is.
    Steps(Vec<Step>),
    Library {
        normalizer: Box<NormalizerWrapper>,
        /// A text gives the same whether or not it was cut from another. Not so for replacements of
        /// nothing, which the crate makes once more where a text begins.
        steady: bool,
    },
}

#[derive(Debug)]
pub(super) enum Step {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
    Lowercase,
    Prepend(String),
    Replace { from: String, to: String },
}

impl Normal {
    /// What a `normalizer` of `tokenizer.json` says. An error is the crate's.
    pub fn new(json: &Json) -> Result<Self, String> {
        let library: Option<NormalizerWrapper> =
            serde_json::from_value(json.clone()).map_err(|e| e.to_string())?;
        let Some(library) = library else {
            return Ok(Self::Steps(Vec::new()));
        };
        let mut steps = Vec::new();
        Ok(match read(json, &mut steps) {
            Some(()) => Self::Steps(steps),
            None => Self::Library {
                normalizer: Box::new(library),
                steady: is_steady(json),
            },
        })
    }

    /// The normalised text; `None` when the library fails.
    pub fn apply<'t>(&self, text: &'t str) -> Option<Cow<'t, str>> {
        match self {
            Self::Steps(steps) => {
                if let Some((before, mark)) = marks(steps) {
                    let mut marked = String::new();
                    if !text.is_empty() {
                        marked.reserve(before.len() + text.len() + text.len() / 2);
                        marked.push_str(before);
                    }
                    push_marked(text, mark, &mut marked);
                    return Some(Cow::Owned(marked));
                }
                let mut text = Cow::Borrowed(text);
                for step in steps {
                    if let Some(changed) = step.apply(&text) {
                        text = Cow::Owned(changed);
                    }
                }
                Some(text)
            }
            Self::Library { normalizer, .. } => {
                let mut normalized = NormalizedString::from(text);
                normalizer.normalize(&mut normalized).ok()?;
                Some(Cow::Owned(normalized.get().to_owned()))
            }
        }
    }

    /// Whether parts of a text can be normalised as texts of their own.
    pub fn is_steady(&self) -> bool {
        !matches!(self, Self::Library { steady: false, .. })
    }

    /// Whether the text always stays as it is, but for its canonical form.
    pub fn is_canonical(&self) -> bool {
        matches!(self, Self::Steps(steps) if steps.iter().all(|step| matches!(step, Step::Nfc)))
    }

    /// Whether no character `c` is left.
    pub fn removes(&self, c: char) -> bool {
        let Self::Steps(steps) = self else {
            return false;
        };
        let mut gone = false;
        for step in steps {
            match step {
                Step::Replace { from, to } => {
                    gone = (gone || from.chars().eq([c])) && !to.contains(c);
                }
                Step::Prepend(text) => gone &= !text.contains(c),
                Step::Nfc => {}
                _ => gone = false,
            }
        }
        gone
    }
}

fn is_steady(json: &Json) -> bool {
    match json {
        Json::Object(map) => {
            let replaces = map.contains_key("pattern");
            let from = map
                .get("pattern")
                .and_then(|pattern| pattern.get("String")?.as_str());
            let something = from.is_some_and(|from| !from.is_empty());
            (!replaces || something) && map.values().all(is_steady)
        }
        Json::Array(list) => list.iter().all(is_steady),
        _ => true,
    }
}

/// What is put before a text and the mark that spaces become, where that is all (SentencePiece).
fn marks(steps: &[Step]) -> Option<(&str, char)> {
    let (before, replace) = match steps {
        [Step::Prepend(before), replace] if !before.contains(' ') => (before.as_str(), replace),
        [replace] => ("", replace),
        _ => return None,
    };
    let Step::Replace { from, to } = replace else {
        return None;
    };
    let mut mark = to.chars();
    let mark = mark
        .next()
        .filter(|_| mark.next().is_none() && from == " ")?;
    Some((before, mark))
}

fn read(json: &Json, steps: &mut Vec<Step>) -> Option<()> {
    let text = |key: &str| json.get(key)?.as_str().map(str::to_owned);
    steps.push(match json.get("type")?.as_str()? {
        "NFC" => Step::Nfc,
        "NFD" => Step::Nfd,
        "NFKC" => Step::Nfkc,
        "NFKD" => Step::Nfkd,
        "Lowercase" => Step::Lowercase,
        "Prepend" => Step::Prepend(text("prepend")?),
        "Replace" => {
            let from = json.get("pattern")?.get("String")?.as_str()?.to_owned();
            let to = text("content")?;
            (!from.is_empty()).then_some(Step::Replace { from, to })?
        }
        "Sequence" => {
            let parts = json.get("normalizers")?.as_array()?;
            return parts.iter().try_for_each(|part| read(part, steps));
        }
        _ => return None,
    });
    Some(())
}

impl Step {
    /// The changed text, `None` when it stays.
    fn apply(&self, text: &str) -> Option<String> {
        match self {
            Self::Prepend(before) => (!text.is_empty()).then(|| format!("{before}{text}")),
            Self::Replace { from, to } => {
                text.contains(from.as_str()).then(|| text.replace(from, to))
            }
            Self::Lowercase => Some(text.chars().flat_map(char::to_lowercase).collect()),
            Self::Nfc => (!is_nfc(text)).then(|| text.nfc().map(|(c, _)| c).collect()),
            _ if text.is_ascii() => None,
            Self::Nfd => Some(text.nfd().map(|(c, _)| c).collect()),
            Self::Nfkc => Some(text.nfkc().map(|(c, _)| c).collect()),
            Self::Nfkd => Some(text.nfkd().map(|(c, _)| c).collect()),
        }
    }
}

/// Whether a text is certainly its own canonical form. Only runs of characters that may not be are looked up.
fn is_nfc(text: &str) -> bool {
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte < FIRST_COMBINING {
            let ascii = bytes[at..]
                .first_chunk()
                .is_some_and(|b| u64::from_le_bytes(*b) & HIGH == 0);
            at += if ascii { 8 } else { 1 };
            continue;
        }
        let start = at;
        let mut plain = 0;
        while plain == 0 && bytes.get(at).is_some_and(|&byte| byte >= FIRST_COMBINING) {
            let (c, width) = character(bytes, at);
            match is_plain(c) {
                true => plain = width,
                false => at += width,
            }
        }
        if start < at && is_nfc_quick(text[start..at].chars()) != IsNormalized::Yes {
            return false;
        }
        at += plain;
    }
    true
}

/// Common characters that are their own canonical form and combine with none before them.
fn is_plain(c: u32) -> bool {
    matches!(
        c,
        0x400..=0x481 | 0x2010..=0x2027 | 0x2500..=0x25ff | 0x3041..=0x3096 | 0x30a1..=0x30fa
            | 0x4e00..=0x9fff | 0xac00..=0xd7a3
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use unicode_normalization_alignments::char::canonical_combining_class;

    #[test]
    fn plain_characters_begin_and_stay_as_they_are() {
        for c in (0..=0x11_0000)
            .filter(|&c| is_plain(c))
            .filter_map(char::from_u32)
        {
            assert_eq!(canonical_combining_class(c), 0, "{c:?}");
            assert!(is_nfc_quick([c].into_iter()) == IsNormalized::Yes, "{c:?}");
        }
    }

    #[test]
    fn texts_are_looked_at_in_runs_as_whole() {
        let texts = [
            "",
            "plain",
            "\u{e9}",
            "e\u{301}",
            "漢字e\u{301}",
            "漢\u{301}",
            "\u{327}\u{301}a",
            "\u{301}\u{327}a",
            "가\u{11a8}",
            "Привет, мир",
            "aaaaaaaaé漢字…ああ\u{3099}",
            "\u{2126}",
            "ไทย\u{e38}\u{301}",
            "👨\u{200d}👩",
        ];
        for text in texts {
            let whole = is_nfc_quick(text.chars()) == IsNormalized::Yes;
            assert_eq!(is_nfc(text), whole, "{text:?}");
        }
    }
}
