//! A tokenizer from GGUF metadata alone: byte-level BPE and SentencePiece BPE. Other kinds are refused by name.
//!
//! The ids are those of the model's own `tokenizer.json`, so that a GGUF file and its source agree. Where
//! llama.cpp does otherwise (it does not normalise to NFC), the source is followed.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value as Json, json};
use tokenizers::AddedToken;

use crate::error::{Error, Result};
use crate::tokenizer::{BpeSource, Known, Model, Parts, Tokenizer, Tokens};
use crate::weights::Value;

/// What errors call the source.
const NAME: &str = "GGUF metadata";
const SPACE: &str = "\u{2581}";

/// `tokenizer.ggml.token_type` of the GGUF specification.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// The keys that name a token, and what transformers calls it.
const NAMED_IDS: [(&str, &str); 7] = [
    ("bos_token_id", "bos_token"),
    ("eos_token_id", "eos_token"),
    ("unknown_token_id", "unk_token"),
    ("seperator_token_id", "sep_token"), // the specification's spelling
    ("padding_token_id", "pad_token"),
    ("cls_token_id", "cls_token"),
    ("mask_token_id", "mask_token"),
];

/// Control tokens that end a turn; files often name only one of theirs as `eos_token_id`.
const END_OF_TURN: [&str; 14] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
    "<EOT>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Splits of the byte-level vocabularies, as the models' `tokenizer.json` files write them.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const HAN_KANA: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK_CJK: &str = "[\u{4e00}-\u{9fa5}\u{0800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
const DEEPSEEK_PUNCTUATION: &str =
    "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
const DEEPSEEK_LETTERS: &str = "\\s?[\
    A-Za-z\u{00b5}\u{00c0}-\u{00d6}\u{00d8}-\u{00f6}\u{00f8}-\u{01ba}\u{01bc}-\u{01bf}\
    \u{01c4}-\u{0293}\u{0295}-\u{02af}\u{0370}-\u{0373}\u{0376}\u{0377}\u{037b}-\u{037d}\
    \u{037f}\u{0386}\u{0388}-\u{038a}\u{038c}\u{038e}-\u{03a1}\u{03a3}-\u{03f5}\
    \u{03f7}-\u{0481}\u{048a}-\u{052f}\u{0531}-\u{0556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\
    \u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\
    \u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\
    \u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\
    \u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\
    \u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\
    \u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\
    \u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\
    \u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\
    \u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\
    \u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\
    \u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\
    \u{118a0}-\u{118df}\u{1e900}-\u{1e943}\
    ]+";

/// How a byte-level vocabulary splits text before merging.
struct Rule {
    /// Normalise to NFC first.
    nfc: bool,
    /// A piece that is a token as a whole is that token, whatever the merges say.
    ignore_merges: bool,
    /// Begin texts with bos when the file does not say.
    add_bos: bool,
    /// Pre-tokenizers in order, the change to byte-level characters among them.
    splits: Vec<Json>,
}

/// The names of `tokenizer.ggml.pre` that [`tokenizer`] knows.
pub const PRE_TOKENIZERS: &str = "default, gpt-2, phi-2, gigachat, a.x-4.0, mellum, modern-bert, exaone4, trillion, \
    granite-docling, olmo, mpt, smollm, starcoder, refact, codeshell, exaone, minerva-7b, \
    command-r, llama-bpe, llama3, llama-v3, falcon3, falcon-h1, pixtral, midm-2.0, lfm2, \
    dbrx, smaug-bpe, chatglm-bpe, glm4, qwen2, deepseek-r1-qwen, megrez, stablelm2, \
    hunyuan, grok-2, qwen35, seed-coder, bailingmoe, gpt-4o, o200k, llama4, tekken, \
    deepseek-llm, deepseek-coder, deepseek-v3, hunyuan-dense, falcon";

fn rule(pre: &str) -> Option<Rule> {
    let exactly = |splits| Rule {
        nfc: false,
        ignore_merges: false,
        add_bos: false,
        splits,
    };
    let plain = |splits: Vec<Json>| exactly(splits.into_iter().chain([bytes()]).collect());
    let nfc = |rule: Rule| Rule { nfc: true, ..rule };
    let whole_words = |rule: Rule| Rule {
        ignore_merges: true,
        ..rule
    };
    let digits = |individual: bool| json!({"type": "Digits", "individual_digits": individual});
    Some(match pre {
        // No model's own rule: what llama.cpp does with files that name none.
        "default" => plain(vec![
            split(r"[\p{P}$+<=>^~|]+"),
            split(GPT2),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
        ]),
        "gpt-2" | "phi-2" | "gigachat" | "a.x-4.0" | "mellum" | "exaone4" | "trillion"
        | "granite-docling" => plain(vec![split(GPT2)]),
        "olmo" | "mpt" | "modern-bert" => nfc(plain(vec![split(GPT2)])),
        "smollm" | "starcoder" | "refact" | "codeshell" | "exaone" | "minerva-7b" => {
            plain(vec![digits(true), split(GPT2)])
        }
        "command-r" => nfc(plain(vec![digits(true), split(GPT2)])),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
        | "lfm2" => Rule {
            add_bos: true,
            ..whole_words(plain(vec![split(LLAMA3)]))
        },
        "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => plain(vec![split(LLAMA3)]),
        "qwen2" | "deepseek-r1-qwen" | "megrez" => nfc(plain(vec![split(QWEN2)])),
        "stablelm2" | "hunyuan" | "grok-2" => plain(vec![split(QWEN2)]),
        "qwen35" => nfc(plain(vec![split(QWEN35)])),
        "seed-coder" => plain(vec![split(SEED_CODER)]),
        "bailingmoe" => plain(vec![split(BAILING)]),
        "gpt-4o" | "o200k" | "llama4" => whole_words(plain(vec![split(O200K)])),
        "tekken" => Rule {
            add_bos: true,
            ..whole_words(plain(vec![split(TEKKEN)]))
        },
        "deepseek-llm" => plain(vec![
            split("[\r\n]"),
            split(DEEPSEEK_LETTERS),
            split(DEEPSEEK_PUNCTUATION),
            split(r"\s+$"),
            split(DEEPSEEK_CJK),
            digits(false),
        ]),
        "deepseek-coder" => plain(vec![
            split("[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split(DEEPSEEK_CJK),
            digits(true),
        ]),
        "deepseek-v3" | "hunyuan-dense" => plain(vec![
            split(r"\p{N}{1,3}"),
            split(HAN_KANA),
            split(DEEPSEEK_V3),
        ]),
        // Here the digits are looked for after the change to byte-level characters, some of which (such as
        // the superscript two) count as numbers.
        "falcon" => exactly(vec![
            json!({"type": "Punctuation", "behavior": "Contiguous"}),
            split(GPT2),
            bytes(),
            digits(false),
            split("[0-9][0-9][0-9]"),
        ]),
        _ => return None,
    })
}

fn split(regex: &str) -> Json {
    json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
}

/// One character per byte.
fn bytes() -> Json {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    })
}

/// Build the tokenizer that the `tokenizer.*` keys of a GGUF file describe.
///
/// Errors: [`Error::ModelFile`] when keys are missing, of another type or disagree;
/// [`Error::Unsupported`] for a tokenizer model or pre-tokenizer this engine does not have.
pub fn tokenizer(metadata: &HashMap<String, Value>) -> Result<Tokenizer> {
    let source = Source::read(metadata)?;
    match source.text("model")? {
        Some("gpt2") => byte_level(source),
        Some("llama") => sentencepiece(source),
        Some(name) => Err(Error::Unsupported {
            what: "tokenizer model",
            name: name.to_owned(),
            supported: "gpt2, llama".to_owned(),
        }),
        None => Err(bad("no tokenizer.ggml.model".to_owned())),
    }
}

/// Byte-level BPE (`tokenizer.ggml.model` = `gpt2`).
fn byte_level(source: Source) -> Result<Tokenizer> {
    let pre = source.text("pre")?.unwrap_or("default");
    let rule = rule(pre).ok_or_else(|| Error::Unsupported {
        what: "pre-tokenizer",
        name: pre.to_owned(),
        supported: PRE_TOKENIZERS.to_owned(),
    })?;
    let merges = source
        .strings("merges")?
        .ok_or_else(|| bad("no tokenizer.ggml.merges".to_owned()))?;
    let merges = merges
        .iter()
        .map(|merge| pair(merge))
        .collect::<Result<Vec<_>>>()?;
    let model = Model::bpe(BpeSource {
        tokens: Tokens::new(&source.with_ids(), true),
        merges: merges.iter().map(|&(a, b)| (a.into(), b.into())).collect(),
        unknown: None,
        fuse_unknown: false,
        byte_fallback: false,
        whole_words: rule.ignore_merges,
    });
    let Some(model) = model else {
        return Err(source.why_no_model(&merges));
    };
    let mut parts = Parts {
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": rule.splits}),
        decoder: bytes(),
        ..Parts::default()
    };
    if rule.nfc {
        parts.normalizer = json!({"type": "NFC"});
    }
    finish(&source, model, parts, rule.add_bos)
}

/// SentencePiece BPE with scores (`tokenizer.ggml.model` = `llama`).
fn sentencepiece(source: Source) -> Result<Tokenizer> {
    let scores = source
        .scores()?
        .ok_or_else(|| bad("no tokenizer.ggml.scores".to_owned()))?;
    let merges = merges_by_score(&source, scores);
    let model = Model::bpe(BpeSource {
        tokens: Tokens::new(&source.with_ids(), false),
        merges: merges.iter().map(|&(a, b)| (a.into(), b.into())).collect(),
        unknown: source.named.get("unk_token").map(String::as_str),
        fuse_unknown: true,
        byte_fallback: true,
        whole_words: false,
    });
    let Some(model) = model else {
        return Err(source.why_no_model(&merges));
    };
    let leading_space = source.flag("add_space_prefix")?.unwrap_or(true);
    let to_marks = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let to_spaces = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
    let mut normal = vec![to_marks];
    let mut decoders = vec![
        to_spaces,
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if leading_space {
        normal.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let parts = Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normal}),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        ..Parts::default()
    };
    finish(&source, model, parts, true)
}

/// Added tokens, the template around a text, and the names: the same for both kinds.
fn finish(
    source: &Source,
    model: Model,
    mut parts: Parts,
    default_add_bos: bool,
) -> Result<Tokenizer> {
    let added = source
        .tokens
        .iter()
        .zip(&source.types)
        .filter_map(|(token, &kind)| {
            let special = kind == CONTROL || kind == UNKNOWN;
            (special || kind == USER_DEFINED)
                .then(|| AddedToken::from(token.as_ref(), special).normalized(false))
        });
    parts.added_tokens = added.collect();

    let around = |flag: &str, id: &str, default: bool| -> Result<Option<&String>> {
        let asked = source.flag(flag)?;
        match (asked.unwrap_or(default), source.named.get(id)) {
            (false, _) => Ok(None),
            (true, None) if asked.is_none() => Ok(None),
            (true, None) => Err(bad(format!(
                "tokenizer.ggml.{flag} is true, but there is no {id}"
            ))),
            (true, token) => Ok(token),
        }
    };
    let bos = around("add_bos_token", "bos_token", default_add_bos)?;
    let eos = around("add_eos_token", "eos_token", false)?;
    if bos.is_some() || eos.is_some() {
        parts.post_processor = template(&model, bos, eos);
    }

    let id = |name: &str| source.named.get(name).and_then(|t| model.id(t));
    let known = Known {
        special_tokens: source.named.clone(),
        bos_id: id("bos_token"),
        eos_ids: end_ids(source, &model, id("bos_token"), id("eos_token"))?,
        chat_templates: chat_templates(source.metadata),
        response_template: None,
    };
    Tokenizer::of_parts(NAME, model, parts, known)?
        .ok_or_else(|| bad("its tokens make no tokenizer".to_owned()))
}

/// `bos text eos`; for a pair, the same around each.
fn template(model: &Model, bos: Option<&String>, eos: Option<&String>) -> Json {
    let around = |sequence: &str, type_id: u32| -> Vec<Json> {
        let special = |token: &String| json!({"SpecialToken": {"id": token, "type_id": type_id}});
        let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
        bos.map(special)
            .into_iter()
            .chain([text])
            .chain(eos.map(special))
            .collect()
    };
    let special_tokens: serde_json::Map<String, Json> = bos
        .into_iter()
        .chain(eos)
        .map(|t| {
            (
                t.clone(),
                json!({"id": t, "ids": [model.id(t)], "tokens": [t]}),
            )
        })
        .collect();
    let single = around("A", 0);
    let pair: Vec<Json> = single.iter().cloned().chain(around("B", 1)).collect();
    json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens
    })
}

/// The ids that end a completion: `eos_token_id`, `eot_token_id`, `eom_token_id`, and control tokens whose
/// text says so. Without the last, chat files that name only `<eos>` would never stop.
fn end_ids(source: &Source, model: &Model, bos: Option<u32>, eos: Option<u32>) -> Result<Vec<u32>> {
    let mut ids: Vec<u32> = eos.into_iter().collect();
    for key in ["eot_token_id", "eom_token_id"] {
        ids.extend(source.id(key)?);
    }
    // In the harmony format `<|end|>` ends one message of several, not the turn.
    let has = |token| model.id(token).is_some();
    let harmony = has("<|return|>") && has("<|call|>");
    for token in END_OF_TURN {
        let Some(id) = model.id(token) else {
            continue;
        };
        let marked = source
            .types
            .get(id as usize)
            .is_some_and(|t| [CONTROL, USER_DEFINED].contains(t));
        if marked && bos != Some(id) && !(harmony && token == "<|end|>") {
            ids.push(id);
        }
    }
    let mut seen = Vec::new();
    ids.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    Ok(ids)
}

fn chat_templates(metadata: &HashMap<String, Value>) -> BTreeMap<String, String> {
    let mut templates = BTreeMap::new();
    for (key, value) in metadata {
        let Some(rest) = key.strip_prefix("tokenizer.chat_template") else {
            continue;
        };
        let name = if rest.is_empty() {
            Some("default")
        } else {
            rest.strip_prefix('.')
        };
        if let (Some(name), Value::String(source)) = (name, value) {
            templates.insert(name.to_owned(), source.clone());
        }
    }
    templates
}

/// Merges that act as SentencePiece's scores do: every way to make a token of two others, best score first,
/// then the longer left half, then the longer right one (transformers' order, which made the models'
/// `tokenizer.json` files). Control, unknown, unused and byte tokens are never merged into.
fn merges_by_score<'s>(source: &'s Source, scores: &[f32]) -> Vec<(&'s str, &'s str)> {
    let tokens: HashSet<&str> = source.tokens.iter().map(|token| token.as_ref()).collect();
    let mut found: Vec<(f32, usize, usize, &'s str)> = Vec::new();
    for ((token, &score), kind) in source.tokens.iter().zip(scores).zip(&source.types) {
        if [UNKNOWN, CONTROL, UNUSED, BYTE].contains(kind) || token.len() > MAX_SPLIT_TOKEN {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if tokens.contains(left) && tokens.contains(right) {
                found.push((score, left.chars().count(), right.chars().count(), token));
            }
        }
    }
    // Stable, so that equals stay in the order of ids.
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    let halves = |(_, left, _, token): (f32, usize, usize, &'s str)| {
        let at = token
            .char_indices()
            .nth(left)
            .map_or(token.len(), |(at, _)| at);
        token.split_at(at)
    };
    found.into_iter().map(halves).collect()
}

/// Longer tokens are not split into merges: the work grows with the square of the length, and no
/// SentencePiece vocabulary comes near.
const MAX_SPLIT_TOKEN: usize = 512;

fn pair(merge: &str) -> Result<(&str, &str)> {
    // The left half may be a space itself, so the separator is looked for after its first character.
    let first = merge.chars().next().map_or(0, char::len_utf8);
    let at = merge[first..].find(' ').map(|i| i + first);
    match at.map(|at| (&merge[..at], &merge[at + 1..])) {
        Some((left, right)) if !right.is_empty() => Ok((left, right)),
        _ => Err(bad(format!(
            "tokenizer.ggml.merges: {merge:?} is not two tokens"
        ))),
    }
}

/// The tokenizer's keys, read and found to agree.
struct Source<'a> {
    metadata: &'a HashMap<String, Value>,
    tokens: Vec<Cow<'a, str>>,
    types: Vec<i64>,
    /// transformers' name of a special token to its text.
    named: BTreeMap<String, String>,
}

impl<'a> Source<'a> {
    fn read(metadata: &'a HashMap<String, Value>) -> Result<Self> {
        let mut source = Self {
            metadata,
            tokens: Vec::new(),
            types: Vec::new(),
            named: BTreeMap::new(),
        };
        let tokens = source
            .strings("tokens")?
            .filter(|tokens| !tokens.is_empty());
        let tokens = tokens.ok_or_else(|| bad("no tokenizer.ggml.tokens".to_owned()))?;
        // Padding rows of some files have no text; they must not all be one token.
        let named = |(id, token): (usize, &'a String)| match token.as_str() {
            "" => Cow::Owned(format!("[EMPTY_{id}]")),
            token => Cow::Borrowed(token),
        };
        source.tokens = tokens.iter().enumerate().map(named).collect();
        source.types = source.token_types()?;
        for (key, name) in NAMED_IDS {
            if let Some(id) = source.id(key)? {
                source
                    .named
                    .insert(name.to_owned(), source.tokens[id as usize].to_string());
            }
        }
        if source.text("model")? == Some("llama") {
            source.name_defaults();
        }
        Ok(source)
    }

    /// SentencePiece files may leave out the ids of the tokens everyone calls alike.
    fn name_defaults(&mut self) {
        for (name, token) in [
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("unk_token", "<unk>"),
        ] {
            if !self.named.contains_key(name) && self.tokens.iter().any(|t| t == token) {
                self.named.insert(name.to_owned(), token.to_owned());
            }
        }
    }

    fn with_ids(&self) -> Vec<(Cow<'_, str>, u32)> {
        let borrowed = self
            .tokens
            .iter()
            .map(|token| Cow::Borrowed(token.as_ref()));
        borrowed.zip(0..).collect()
    }

    /// What is wrong with tokens and merges that make no model.
    fn why_no_model(&self, merges: &[(&str, &str)]) -> Error {
        let mut ids: HashMap<&str, usize> = HashMap::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token, id) {
                let problem = format!("tokenizer.ggml.tokens: {token:?} is both {first} and {id}");
                return bad(problem);
            }
        }
        for (a, b) in merges {
            let made = format!("{a}{b}");
            let parts = [*a, *b, made.as_str()];
            if let Some(missing) = parts.into_iter().find(|part| !ids.contains_key(part)) {
                let problem = format!(
                    "tokenizer.ggml.merges: {a:?} {b:?} need {missing:?}, which is no token"
                );
                return bad(problem);
            }
        }
        bad(format!(
            "{} tokens and {} merges are more than a tokenizer holds",
            self.tokens.len(),
            merges.len()
        ))
    }

    fn token_types(&self) -> Result<Vec<i64>> {
        let count = self.tokens.len();
        let types = match self.get("token_type") {
            None => return Ok(vec![1; count]),
            Some(Value::Ints(types)) => types.clone(),
            Some(other) => return Err(wrong_type("token_type", "integers", other)),
        };
        self.same_count("token_type", types.len())?;
        Ok(types)
    }

    fn scores(&self) -> Result<Option<&'a [f32]>> {
        let scores = match self.get("scores") {
            None => return Ok(None),
            Some(Value::Floats(scores)) => scores,
            Some(other) => return Err(wrong_type("scores", "floats", other)),
        };
        self.same_count("scores", scores.len())?;
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            return Err(bad(format!(
                "tokenizer.ggml.scores: the score of {id} is not a number"
            )));
        }
        Ok(Some(scores))
    }

    fn same_count(&self, key: &str, count: usize) -> Result<()> {
        match self.tokens.len() {
            tokens if tokens == count => Ok(()),
            tokens => Err(bad(format!(
                "tokenizer.ggml.{key} has {count} values for {tokens} tokens"
            ))),
        }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&format!("tokenizer.ggml.{key}"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(key, "a string", other)),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong_type(key, "a bool", other)),
        }
    }

    fn strings(&self, key: &str) -> Result<Option<&'a [String]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Strings(strings)) => Ok(Some(strings)),
            Some(other) => Err(wrong_type(key, "strings", other)),
        }
    }

    /// A token's id, within the vocabulary. -1 and 2^32 - 1 are how files write "none".
    fn id(&self, key: &str) -> Result<Option<u32>> {
        let id = match self.get(key) {
            None | Some(Value::Int(-1 | 0xffff_ffff)) => return Ok(None),
            Some(Value::Int(id)) => i128::from(*id),
            Some(Value::UInt(id)) => i128::from(*id),
            Some(other) => return Err(wrong_type(key, "an integer", other)),
        };
        let count = self.tokens.len();
        u32::try_from(id)
            .ok()
            .filter(|&id| (id as usize) < count)
            .map(Some)
            .ok_or_else(|| {
                bad(format!(
                    "tokenizer.ggml.{key} must be below the {count} tokens, got {id}"
                ))
            })
    }
}

fn wrong_type(key: &str, wanted: &str, came: &Value) -> Error {
    let came = match came {
        Value::Bool(_) => "a bool",
        Value::Int(_) | Value::UInt(_) => "an integer",
        Value::Float(_) => "a float",
        Value::String(_) => "a string",
        Value::Bools(_) => "bools",
        Value::Ints(_) => "integers",
        Value::Floats(_) => "floats",
        Value::Strings(_) => "strings",
    };
    bad(format!("tokenizer.ggml.{key} must be {wanted}, got {came}"))
}

fn bad(problem: String) -> Error {
    Error::ModelFile {
        path: NAME.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests;
