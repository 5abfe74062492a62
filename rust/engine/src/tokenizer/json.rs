//! `tokenizer.json` in one pass, its strings borrowed. What is not plain here is left to the `tokenizers`
//! crate, which then says what is wrong with it.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;
use tokenizers::{PaddingParams, TruncationParams};

use super::Parts;
use super::added::Entry;
use super::model::{BpeSource, Model, Tokens};
use super::split::is_byte_level;

/// Files from so many bytes on are read by two threads.
const LARGE: usize = 1 << 20;

/// The file, but for its model's tables. `M` reads the merges.
#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "M: Deserialize<'de>"))]
struct File<'a, M> {
    #[serde(default, borrow)]
    version: Option<Cow<'a, str>>,
    #[serde(default)]
    truncation: Option<TruncationParams>,
    #[serde(default)]
    padding: Option<PaddingParams>,
    #[serde(default)]
    added_tokens: Vec<Entry>,
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    #[serde(default)]
    post_processor: Json,
    #[serde(default)]
    decoder: Json,
    #[serde(borrow)]
    model: ModelFile<'a, M>,
}

#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "M: Deserialize<'de>"))]
struct ModelFile<'a, M> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    vocab: Vocab<'a>,
    #[serde(default = "none")]
    merges: Option<M>,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default, borrow)]
    unk_token: Option<Cow<'a, str>>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
    #[serde(default)]
    max_input_chars_per_word: Option<usize>,
    #[serde(default)]
    unk_id: Option<u32>,
}

fn none<M>() -> Option<M> {
    None
}

/// The merges alone.
#[derive(Debug, Deserialize)]
struct Second<'a> {
    #[serde(borrow)]
    model: SecondModel<'a>,
}

#[derive(Debug, Deserialize)]
struct SecondModel<'a> {
    #[serde(default, borrow)]
    merges: Option<Merges<'a>>,
}

#[derive(Debug)]
enum Vocab<'a> {
    Ids(Vec<(Cow<'a, str>, u32)>),
    Scores(Vec<(Cow<'a, str>, f64)>),
}

/// A vocabulary, read.
enum Tables<'a> {
    Bpe(Tokens),
    Other(Vocab<'a>),
}

/// Merges as pairs: of the older form, which has the halves in one string, too.
#[derive(Debug)]
struct Merges<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

/// Read a file; `None` for one that is left to the library. Of a large one the merges are read beside the rest.
pub(super) fn read(bytes: &[u8]) -> Option<(Parts, Model)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let several = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    if bytes.len() < LARGE || !several {
        let (mut file, tables) = first::<Merges<'_>>(text)?;
        let merges = file.model.merges.take();
        let model = model(&file.model, tables, merges)?;
        return Some((file.into_parts(), model));
    }
    std::thread::scope(|scope| {
        let merges = scope.spawn(|| serde_json::from_str::<Second<'_>>(text).ok());
        let (file, tables) = first::<IgnoredAny>(text)?;
        let merges = merges.join().ok()??.model.merges;
        let model = model(&file.model, tables, merges)?;
        Some((file.into_parts(), model))
    })
}

/// All but the merges, with what was made of the vocabulary.
fn first<'a, M: Deserialize<'a>>(text: &'a str) -> Option<(File<'a, M>, Tables<'a>)> {
    let mut file: File<'a, M> = serde_json::from_str(text).ok()?;
    if file
        .version
        .as_ref()
        .is_some_and(|version| version != "1.0")
    {
        return None;
    }
    let vocab = std::mem::replace(&mut file.model.vocab, Vocab::Ids(Vec::new()));
    let tables = match (file.model.kind.as_ref(), vocab) {
        ("BPE", Vocab::Ids(tokens)) => {
            Tables::Bpe(Tokens::new(&tokens, is_byte_level(&file.pre_tokenizer))?)
        }
        (_, vocab) => Tables::Other(vocab),
    };
    Some((file, tables))
}

impl<M> File<'_, M> {
    fn into_parts(self) -> Parts {
        Parts {
            added_tokens: self.added_tokens.into_iter().map(Into::into).collect(),
            normalizer: self.normalizer,
            pre_tokenizer: self.pre_tokenizer,
            post_processor: self.post_processor,
            decoder: self.decoder,
            truncation: self.truncation,
            padding: self.padding,
        }
    }
}

fn model<M>(
    file: &ModelFile<'_, M>,
    tables: Tables<'_>,
    merges: Option<Merges<'_>>,
) -> Option<Model> {
    let unknown = file.unk_token.as_deref();
    match (file.kind.as_ref(), tables) {
        ("BPE", Tables::Bpe(tokens)) => {
            let empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
            let plain = empty(&file.continuing_subword_prefix)
                && empty(&file.end_of_word_suffix)
                && file.dropout.is_none_or(|dropout| dropout == 0.0);
            let source = BpeSource {
                tokens: Some(tokens),
                merges: merges?.0,
                unknown,
                fuse_unknown: file.fuse_unk.unwrap_or(false),
                byte_fallback: file.byte_fallback.unwrap_or(false),
                whole_words: file.ignore_merges.unwrap_or(false),
            };
            plain.then(|| Model::bpe(source))?
        }
        ("WordPiece", Tables::Other(Vocab::Ids(tokens))) => {
            let prefix = file.continuing_subword_prefix.clone()?;
            Model::words(
                &tokens,
                unknown?,
                Some(prefix),
                file.max_input_chars_per_word?,
            )
        }
        ("WordLevel", Tables::Other(Vocab::Ids(tokens))) => {
            Model::words(&tokens, unknown?, None, 0)
        }
        ("Unigram", Tables::Other(Vocab::Scores(tokens))) => {
            Model::unigram(&tokens, file.unk_id, file.byte_fallback.unwrap_or(false))
        }
        _ => None,
    }
}

/// A string of the file: borrowed when it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        from.deserialize_str(Strings)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Vocab<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tokens with ids or scores")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut tokens = Vec::with_capacity(1 << 16);
                while let Some((Text(token), id)) = map.next_entry::<Text<'de>, u32>()? {
                    tokens.push((token, id));
                }
                Ok(Vocab::Ids(tokens))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut tokens = Vec::new();
                while let Some((Text(token), score)) = seq.next_element::<(Text<'de>, f64)>()? {
                    tokens.push((token, score));
                }
                Ok(Vocab::Scores(tokens))
            }
        }
        from.deserialize_any(Entries)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Merges<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Merges<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut merges = Vec::with_capacity(1 << 16);
                let mut joined = None;
                while let Some(Merge { left, right }) = seq.next_element()? {
                    // One form throughout; the library refuses a mix.
                    let here = right.is_none();
                    if joined.is_some_and(|joined| joined != here) {
                        return Err(A::Error::custom("merges of two forms"));
                    }
                    joined = Some(here);
                    match right {
                        Some(right) => merges.push((left, right)),
                        None if left.starts_with("#version") => {}
                        None => {
                            merges.push(halves(left).ok_or_else(|| {
                                A::Error::custom("a merge that is not two tokens")
                            })?)
                        }
                    }
                }
                Ok(Merges(merges))
            }
        }
        from.deserialize_seq(List)
    }
}

fn halves(merge: Cow<'_, str>) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
    match merge {
        Cow::Borrowed(merge) => {
            let (left, right) = merge
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' '))?;
            Some((left.into(), right.into()))
        }
        Cow::Owned(merge) => {
            let (left, right) = merge
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' '))?;
            Some((left.to_owned().into(), right.to_owned().into()))
        }
    }
}

struct Merge<'a> {
    left: Cow<'a, str>,
    right: Option<Cow<'a, str>>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Merge<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of tokens")
            }

            fn visit_borrowed_str<E>(self, left: &'de str) -> Result<Self::Value, E> {
                let left = Cow::Borrowed(left);
                Ok(Merge { left, right: None })
            }

            fn visit_str<E>(self, left: &str) -> Result<Self::Value, E> {
                let left = Cow::Owned(left.to_owned());
                Ok(Merge { left, right: None })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let missing = || A::Error::custom("a merge that is not two tokens");
                let Text(left) = seq.next_element()?.ok_or_else(missing)?;
                let Text(right) = seq.next_element()?.ok_or_else(missing)?;
                let right = Some(right);
                match seq.next_element::<Text<'de>>()? {
                    None => Ok(Merge { left, right }),
                    Some(_) => Err(missing()),
                }
            }
        }
        from.deserialize_any(Either)
    }
}
