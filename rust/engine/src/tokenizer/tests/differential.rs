//! Ours beside the `tokenizers` crate itself, on texts from a seeded generator: the tokenizers of the cases
//! where they are there, and small ones with odd flags everywhere.

use std::path::PathBuf;

use serde_json::json;

use super::*;

/// A small generator of numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn one_of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

const WORDS: [&str; 60] = [
    "the",
    "Hello",
    "WORLD",
    "I'm",
    "can't",
    "'S",
    "'ll",
    "'ſ",
    "it's",
    "naïve",
    "e\u{301}",
    "\u{301}",
    "\u{302}\u{327}a",
    "ﬁ",
    "Ⅷ",
    "½",
    "²",
    "１２３",
    "12345678",
    "3.14",
    "0x1F",
    "a_b",
    "--",
    "!!!",
    "?!\n",
    "\r\n",
    "\n\n\n",
    "\t",
    "  ",
    "      ",
    "\u{a0}",
    "\u{3000}",
    "\u{200b}",
    "\u{feff}",
    "\u{85}",
    "日本語",
    "漢字かな",
    "한국어",
    "\u{1112}\u{1161}\u{11ab}",
    "ไทย",
    "ß",
    "İ",
    "Σίσυφος",
    "русский",
    "हिन्दी",
    "عربي",
    "👨\u{200d}👩\u{200d}👧",
    "🇩🇪",
    "❤\u{fe0f}",
    "😀",
    "▁",
    "▁▁▁",
    "Ġ",
    "<|",
    "</s>",
    "<s>",
    "[INST]",
    "\u{0}",
    "\u{7f}",
    "http://a.b/c?d=e&f",
];

/// A text: words, runs, characters from anywhere, and the tokens given.
fn text(random: &mut Random, tokens: &[String]) -> String {
    let mut text = String::new();
    for _ in 0..1 + random.below(14) {
        match random.below(12) {
            0..=5 => text.push_str(random.one_of(&WORDS)),
            6 => text.push(' '),
            7 => {
                let run =
                    random.one_of(&[" ", "\n", "a", "é", "=", "▁", "漢", "\u{301}", "9", " \n"]);
                text.push_str(&run.repeat(1 + random.below(70)));
            }
            8 => (0..random.below(6)).for_each(|_| {
                let c = match random.below(3) {
                    0 => random.below(0x250),
                    1 => random.below(0x3100),
                    _ => random.below(0x11_0000),
                };
                text.extend(u32::try_from(c).ok().and_then(char::from_u32));
            }),
            9 if !tokens.is_empty() => text.push_str(&tokens[random.below(tokens.len())]),
            10 => text.push_str(&format!(" {}", random.one_of(&WORDS))),
            _ => {
                let word = random.one_of(&WORDS).to_uppercase();
                text.push_str(&word.to_lowercase());
                text.push_str(&word);
            }
        }
    }
    text
}

/// Ids, offsets, special tokens, decoding and streaming, ours and the crate's.
fn compare(name: &str, json: &[u8], rounds: usize, seed: u64) {
    let ours = Arc::new(Tokenizer::from_bytes(name, json).unwrap());
    let theirs = tokenizers::Tokenizer::from_bytes(json).unwrap();
    let mut tokens: Vec<String> = theirs
        .get_added_tokens_decoder()
        .into_values()
        .map(|t| t.content)
        .collect();
    tokens.sort();
    let mut random = Random(seed);
    let mut before = String::new();
    for round in 0..rounds {
        // What was met before comes again, and goes on otherwise.
        let mut text = text(&mut random, &tokens);
        if random.below(2) == 0 {
            text = format!("{before}{text}");
        }
        before.clear();
        if text.len() < 2000 {
            before.push_str(&text);
        }
        let special = round % 2 == 0;
        let expected = guarded(|| theirs.encode_char_offsets(text.as_str(), special));
        let Ok(expected) = expected else {
            assert!(ours.encode(&text, special).is_err(), "{name}: {text:?}");
            continue;
        };
        let ids = ours.encode(&text, special).unwrap();
        assert_eq!(ids, expected.get_ids(), "{name}: {text:?}");
        let encoding = ours
            .encode_with(&text, None, &ours.own_options(special), true)
            .unwrap();
        assert_eq!(encoding.ids, ids, "{name}: {text:?}");
        let place = |&(start, end): &(usize, usize)| (start as u32, end as u32);
        let offsets: Vec<_> = expected.get_offsets().iter().map(place).collect();
        assert_eq!(encoding.offsets, offsets, "{name}: {text:?}");
        let mut any: Vec<u32> = ids.clone();
        any.extend((0..8).map(|_| random.below(ours.vocab_size()) as u32));
        let kept = |ids: &[u32]| ids.iter().any(|&id| !(special && ours.is_special(id)));
        for ids in [ids, any].iter().filter(|ids| kept(ids)) {
            let whole = theirs.decode(ids, special).unwrap();
            assert_eq!(ours.decode(ids, special).unwrap(), whole, "{name}: {ids:?}");
            assert_eq!(
                stream(&ours, ids, special).concat(),
                whole,
                "{name}: {ids:?}"
            );
        }
    }
}

#[test]
fn the_cases_tokenizers_give_the_crates_ids_offsets_and_texts() {
    let Some(folder) = std::env::var_os("HFCORE_CASES").map(PathBuf::from) else {
        eprintln!("skipped: HFCORE_CASES is not set");
        return;
    };
    let unpacked = std::env::temp_dir().join("hfcore_case_tokenizers");
    for folder in [folder.join("text/tokenizers"), unpacked] {
        let Ok(files) = fs::read_dir(&folder) else {
            continue;
        };
        for path in files.map(|file| file.unwrap().path()) {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            if path.extension().is_some_and(|e| e == "json") && name != "index" {
                compare(&name, &fs::read(&path).unwrap(), 60, 1);
            }
        }
    }
}

/// Added tokens with every mix of flags, one of them normalised to something else.
fn added(first: usize, normalized: bool) -> Json {
    let contents = ["<a>", " <b> ", "WORD", "ab", "\n\n", "<a><a>", "é"];
    let flag = |at: usize, bit: usize| (at * 7 + first) >> bit & 1 == 1;
    contents
        .iter()
        .enumerate()
        .map(|(at, content)| {
            json!({"id": 1000 + at, "content": content, "single_word": flag(at, 0), "lstrip": flag(at, 1),
                "rstrip": flag(at, 2), "normalized": normalized && flag(at, 3), "special": flag(at, 4)})
        })
        .collect()
}

/// A byte-level vocabulary of the alphabet and some merges.
fn byte_level() -> (Json, Json) {
    let mut tokens: Vec<String> = (0..=255)
        .map(|b| model::alphabet_char(b).to_string())
        .collect();
    let mut merges = Vec::new();
    let pairs = [
        "Ġ t",
        "h e",
        "Ġt he",
        "l l",
        "a a",
        "aa aa",
        "Ã ©",
        "Ġ Ġ",
        "ĠĠ ĠĠ",
        "Ċ Ċ",
        "1 2",
        "H e",
        "He ll",
        "â ĸ",
        "âĸ ģ",
        "w o",
        "Hell o",
        "Ġ a",
        "b c",
        "= =",
    ];
    for pair in pairs {
        let (a, b) = pair.split_once(' ').unwrap();
        tokens.push(format!("{a}{b}"));
        merges.push(json!([a, b]));
    }
    let vocab: serde_json::Map<String, Json> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, Json::from(id)))
        .collect();
    (Json::Object(vocab), Json::Array(merges))
}

/// What of a file tells it from the others.
fn shown(file: &Json) -> String {
    format!(
        "{} {} {}",
        file["model"]["type"], file["normalizer"], file["pre_tokenizer"]
    )
}

/// Byte-level BPE with several splits and normalisers.
fn byte_level_files() -> Vec<Json> {
    let (vocab, merges) = byte_level();
    let split = |regex: &str, behavior: &str, invert: bool| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert});
    let bytes = |space: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": space, "use_regex": regex});
    let several = |parts: Vec<Json>| json!({"type": "Sequence", "pretokenizers": parts});
    let o200k = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let cl100k = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
    let digits = |individual: bool| json!({"type": "Digits", "individual_digits": individual});
    let pre = [
        bytes(true, true),
        bytes(false, false),
        several(vec![split(o200k, "Isolated", false), bytes(false, false)]),
        several(vec![split(cl100k, "Isolated", false), bytes(false, false)]),
        several(vec![split(cl100k, "Removed", true), bytes(false, false)]),
        several(vec![
            split(r"\p{N}{1,3}", "Isolated", false),
            split("[一-龥぀-ゟ]+", "Removed", false),
            bytes(false, true),
        ]),
        several(vec![digits(true), bytes(false, true)]),
        several(vec![
            digits(false),
            split(r"\s+$", "Isolated", false),
            bytes(true, true),
        ]),
        several(vec![
            split("a+", "MergedWithPrevious", false),
            bytes(false, false),
        ]),
        several(vec![
            bytes(false, true),
            digits(false),
            split("[0-9][0-9][0-9]", "Isolated", false),
        ]),
        several(vec![
            json!({"type": "Punctuation", "behavior": "Contiguous"}),
            bytes(false, true),
        ]),
        several(vec![
            json!({"type": "Punctuation", "behavior": "Contiguous"}),
            bytes(false, true),
            digits(false),
            split("[0-9][0-9][0-9]", "Isolated", false),
        ]),
        several(vec![
            bytes(true, true),
            digits(true),
            split(r"\p{L}+|\S", "MergedWithNext", false),
        ]),
    ];
    let normal = [
        Json::Null,
        json!({"type": "NFC"}),
        json!({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}),
        json!({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}),
        json!({"type": "Replace", "pattern": {"String": "a"}, "content": "bb"}),
    ];
    let mut files = Vec::new();
    for (round, pre) in pre.iter().enumerate() {
        for (kind, normal) in normal.iter().enumerate() {
            files.push(json!({
                "version": "1.0", "added_tokens": added(round, kind != 3), "normalizer": normal,
                "pre_tokenizer": pre, "decoder": {"type": "ByteLevel", "add_prefix_space": true,
                "trim_offsets": true, "use_regex": true}, "post_processor": {"type": "ByteLevel",
                "add_prefix_space": true, "trim_offsets": round % 2 == 0, "use_regex": true},
                "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": kind == 1}
            }));
        }
    }
    files
}

#[test]
fn byte_level_tokenizers_with_odd_parts_give_the_crates_ids() {
    for file in byte_level_files() {
        compare(&shown(&file), file.to_string().as_bytes(), 25, 1);
    }
}

/// SentencePiece BPE in its several forms.
fn sentencepiece_files() -> Vec<Json> {
    let words = [
        "<unk>", "<s>", "▁", "a", "b", "c", "h", "e", "l", "o", "t", "漢", "é", "▁▁", "▁t", "he",
        "▁the", "ll", "aa", "o▁", "<0x0A>", "<0xC3>", "<0xA9>", "<", "s", ">", "<s", "▁a", "b▁",
    ];
    let merges = [
        "▁ ▁", "▁ t", "h e", "▁t he", "l l", "a a", "o ▁", "< s", "<s >", "▁ a", "b ▁",
    ];
    let vocab: serde_json::Map<String, Json> = words
        .iter()
        .enumerate()
        .map(|(id, word)| (word.to_string(), Json::from(id)))
        .collect();
    let legacy = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let gemma = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let meta = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let by_space = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
    let pipelines = [
        (legacy.clone(), Json::Null),
        (gemma, by_space),
        (Json::Null, meta("first", false)),
        (Json::Null, meta("always", true)),
        (Json::Null, meta("never", false)),
        (json!({"type": "NFC"}), meta("first", true)),
        (legacy, meta("always", true)),
        (
            json!({"type": "Strip", "strip_left": true, "strip_right": true}),
            meta("first", true),
        ),
    ];
    let mut files = Vec::new();
    for (round, (normal, pre)) in pipelines.iter().enumerate() {
        for kind in 0..4 {
            let unknown = if kind == 3 {
                Json::Null
            } else {
                Json::from("<unk>")
            };
            files.push(json!({
                "version": "1.0", "added_tokens": added(round + kind, true), "normalizer": normal, "pre_tokenizer": pre,
                "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"},
                "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
                "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unknown,
                "fuse_unk": kind % 2 == 0, "byte_fallback": kind != 2}
            }));
        }
    }
    files
}

#[test]
fn sentencepiece_tokenizers_with_odd_parts_give_the_crates_ids() {
    for file in sentencepiece_files() {
        compare(&shown(&file), file.to_string().as_bytes(), 40, 2);
    }
}

/// Unigram and WordPiece.
fn other_files() -> Vec<Json> {
    let mut files = Vec::new();
    let pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("a", -3.0),
        ("b", -3.0),
        ("ab", -5.5),
        ("▁the", -4.0),
        ("he", -4.5),
        ("t", -5.0),
        ("h", -5.0),
        ("e", -5.0),
        ("ll", -6.0),
        ("l", -6.0),
        ("o", -6.0),
        ("llo", -7.0),
        ("<0xC3>", -9.0),
        ("<0xA9>", -9.0),
        ("aa", -6.0),
    ];
    let meta =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    for fallback in [false, true] {
        files.push(json!({
            "version": "1.0", "added_tokens": added(3, true), "normalizer": null, "pre_tokenizer": meta, "decoder": meta,
            "model": {"type": "Unigram", "vocab": pieces, "unk_id": 0, "byte_fallback": fallback}
        }));
    }
    files.push(json!({
        "version": "1.0", "added_tokens": added(3, true), "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, meta]},
        "decoder": meta, "model": {"type": "Unigram", "vocab": pieces, "unk_id": 0}
    }));
    let words = [
        "[UNK]", "[CLS]", "[SEP]", "the", "hello", "##lo", "hel", "can", "'", "t", "!", "?",
        "world", "日", "12", "##34", "##5", "i", "m", "naive", "e", "##s",
    ];
    let vocab: serde_json::Map<String, Json> = words
        .iter()
        .enumerate()
        .map(|(id, word)| (word.to_string(), Json::from(id)))
        .collect();
    for lowercase in [true, false] {
        files.push(json!({
            "version": "1.0", "added_tokens": added(1, false), "normalizer": {"type": "BertNormalizer", "clean_text": true,
            "handle_chinese_chars": true, "strip_accents": null, "lowercase": lowercase},
            "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
            "truncation": {"max_length": 12, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": 4, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "[UNK]"},
            "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 20}
        }));
    }
    for (round, pre) in splits().iter().enumerate() {
        let (kind, prefix) = match round % 2 {
            0 => ("WordLevel", Json::Null),
            _ => ("WordPiece", Json::from("##")),
        };
        files.push(json!({
            "version": "1.0", "added_tokens": added(round, false), "normalizer": null, "pre_tokenizer": pre,
            "decoder": null, "post_processor": null,
            "model": {"type": kind, "vocab": vocab, "unk_token": "[UNK]",
            "continuing_subword_prefix": prefix, "max_input_chars_per_word": 20}
        }));
    }
    files
}

/// Every pre-tokenizer that cuts by characters, in every behaviour.
fn splits() -> Vec<Json> {
    let mut all = vec![
        json!({"type": "Whitespace"}),
        json!({"type": "WhitespaceSplit"}),
        json!({"type": "BertPreTokenizer"}),
        json!({"type": "Punctuation"}),
        json!({"type": "CharDelimiterSplit", "delimiter": "e"}),
        json!({"type": "CharDelimiterSplit", "delimiter": "!"}),
        json!({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"},
            {"type": "Digits", "individual_digits": true}]}),
    ];
    for behavior in [
        "Removed",
        "Isolated",
        "Contiguous",
        "MergedWithPrevious",
        "MergedWithNext",
    ] {
        all.push(json!({"type": "Punctuation", "behavior": behavior}));
        for invert in [false, true] {
            for pattern in [
                json!({"String": " "}),
                json!({"String": "l?"}),
                json!({"Regex": r"\s|e"}),
                json!({"Regex": "[a-z]+[0-9]?"}),
            ] {
                all.push(json!({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}));
            }
        }
    }
    all
}

#[test]
fn splits_by_characters_are_fast_and_give_the_crates_ids() {
    let files = other_files();
    let of_splits = &files[files.len() - splits().len()..];
    for file in of_splits {
        let bytes = file.to_string();
        let tokenizer = Tokenizer::from_bytes("test", bytes.as_bytes()).unwrap();
        assert!(tokenizer.fast.is_some(), "{}", shown(file));
        compare(&shown(file), bytes.as_bytes(), 60, 5);
    }
}

#[test]
fn punctuation_is_what_the_crate_takes_for_it() {
    use unicode_categories::UnicodeCategories as _;
    let class = split::punctuation().unwrap();
    let mut known = class
        .ranges()
        .iter()
        .flat_map(|range| range.start()..=range.end());
    let mut next = known.next();
    for c in '\0'..=char::MAX {
        let is = c.is_ascii_punctuation() || c.is_punctuation();
        assert_eq!(is, next == Some(c), "{c:?}");
        if is {
            next = known.next();
        }
    }
}

#[test]
fn stretches_that_come_again_are_known_and_the_same() {
    let mut random = Random(23);
    for file in [byte_level_files(), sentencepiece_files(), other_files()].concat() {
        let bytes = file.to_string();
        let tokenizer = Tokenizer::from_bytes("test", bytes.as_bytes()).unwrap();
        let again = Tokenizer::from_bytes("test", bytes.as_bytes()).unwrap();
        let mut conversation = String::new();
        for _ in 0..6 {
            conversation.push_str(&text(&mut random, &["<a>".to_owned(), "ab".to_owned()]));
            conversation.push_str(" the world can hello, it's the world.\nThe 12345 ");
            let ids = tokenizer
                .encode(&conversation, false)
                .map_err(|e| e.to_string());
            // One that has met nothing else.
            again.forget();
            let fresh = again
                .encode(&conversation, false)
                .map_err(|e| e.to_string());
            assert_eq!(ids, fresh, "{} {conversation:?}", shown(&file));
        }
    }
}

#[test]
fn unigram_and_wordpiece_give_the_crates_ids() {
    for file in other_files() {
        compare(&shown(&file), file.to_string().as_bytes(), 200, 3);
    }
}

/// A file with some of its bytes, or of its values, changed.
fn mutated(random: &mut Random, file: &Json) -> Vec<u8> {
    let mut file = file.clone();
    let odd = [
        Json::Null,
        json!(0),
        json!(-1),
        json!(4_294_967_295_u64),
        json!(1e300),
        json!(""),
        json!("▁"),
        json!("a"),
        json!([]),
        json!({}),
        json!(true),
        json!([["a", "b"]]),
        json!({"String": ""}),
        json!({"Regex": "(a*)*b|\\s+(?!\\S)|[[]"}),
    ];
    for _ in 0..random.below(4) {
        let mut place = &mut file;
        for _ in 0..random.below(6) {
            let size = match &*place {
                Json::Object(map) => map.len(),
                Json::Array(list) => list.len(),
                _ => 0,
            };
            if size == 0 {
                break;
            }
            let at = random.below(size);
            place = match place {
                Json::Object(map) => map.values_mut().nth(at).unwrap(),
                Json::Array(list) => &mut list[at],
                _ => unreachable!("only those have a size"),
            };
        }
        *place = odd[random.below(odd.len())].clone();
    }
    let mut bytes = file.to_string().into_bytes();
    for _ in 0..random.below(3) {
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[at] = random.next() as u8,
            1 => bytes.truncate(at.max(1)),
            2 => {
                let end = (at + random.below(40)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {
                let end = (at + random.below(40)).min(bytes.len() - 1);
                bytes.drain(at.min(end)..end);
            }
        }
    }
    bytes
}

/// Load, encode, decode and stream what may be broken: nothing panics, and where both can, both agree.
/// Returns whether both could.
fn try_file(random: &mut Random, bytes: &[u8]) -> bool {
    let Ok(ours) = Tokenizer::from_bytes("fuzz", bytes) else {
        return false;
    };
    let ours = Arc::new(ours);
    let theirs = guarded(|| tokenizers::Tokenizer::from_bytes(bytes));
    for _ in 0..4 {
        let text = text(random, &["<a>".to_owned(), " <b> ".to_owned()]);
        let ids = ours.encode(&text, true);
        let ids = ids.map_err(|e| e.to_string());
        let half = (0..=text.len() / 2)
            .rev()
            .find(|&at| text.is_char_boundary(at))
            .unwrap();
        let segments = [(&text[..half], true), (&text[half..], false)];
        let _ = ours.encode_segments(&segments);
        let any: Vec<u32> = (0..9).map(|_| random.next() as u32 % 400).collect();
        let any: Vec<u32> = any
            .into_iter()
            .filter(|&id| (id as usize) < ours.vocab_size())
            .collect();
        let whole = ours.decode(&any, false).unwrap();
        assert_eq!(stream(&ours, &any, false).concat(), whole);
        let Ok(theirs) = &theirs else { continue };
        let expected = guarded(|| theirs.encode_fast(text.as_str(), true));
        if let Ok(expected) = expected {
            let file = String::from_utf8_lossy(bytes);
            assert_eq!(ids.as_deref(), Ok(expected.get_ids()), "{text:?} {file}");
        }
    }
    theirs.is_ok()
}

/// Mutate files and texts for so long; returns how many files both could read.
fn fuzz(seconds: f64, most: usize, seed: u64) -> usize {
    let files: Vec<Json> = [byte_level_files(), sentencepiece_files(), other_files()].concat();
    let mut random = Random(seed);
    let start = std::time::Instant::now();
    let (mut tried, mut read) = (0, 0);
    while tried < most && start.elapsed().as_secs_f64() < seconds {
        let file = &files[random.below(files.len())];
        let bytes = mutated(&mut random, file);
        read += usize::from(try_file(&mut random, &bytes));
        tried += 1;
    }
    eprintln!(
        "{tried} files, {read} of them read by both, {:.0?}",
        start.elapsed()
    );
    read
}

#[test]
fn broken_files_and_texts_never_panic_and_never_give_other_ids() {
    assert!(fuzz(f64::MAX, 150, 11) > 20);
}

#[test]
#[ignore = "takes as long as HFCORE_FUZZ_SECONDS says"]
fn broken_files_for_minutes() {
    let seconds = std::env::var("HFCORE_FUZZ_SECONDS").map_or(60.0, |s| s.parse().unwrap());
    let seed = std::env::var("HFCORE_FUZZ_SEED").map_or(1, |s| s.parse().unwrap());
    assert!(fuzz(seconds, usize::MAX, seed) > 100);
}

#[test]
fn segments_give_the_ids_of_the_whole_text_unless_a_plain_one_holds_a_token() {
    let mut random = Random(17);
    for file in [byte_level_files(), sentencepiece_files(), other_files()].concat() {
        let bytes = file.to_string();
        let tokenizer = Tokenizer::from_bytes("test", bytes.as_bytes()).unwrap();
        if tokenizer.fast.is_none() {
            assert!(tokenizer.encode_segments(&[("a", true)]).is_err());
            continue;
        }
        for _ in 0..20 {
            let tokens = ["<a>", " <b> ", "WORD", "ab", "é"].map(str::to_owned);
            let text = text(&mut random, &tokens);
            let mut cuts: Vec<usize> = (0..3).map(|_| random.below(text.len() + 1)).collect();
            cuts.retain(|&at| text.is_char_boundary(at));
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]);
            // White space between tokens that both take it makes the crate give up.
            let Ok(whole) = tokenizer.encode_segments(&[(&text, true)]) else {
                assert!(tokenizer.encode(&text, false).is_err());
                continue;
            };
            let trusted: Vec<_> = pieces.clone().map(|piece| (piece, true)).collect();
            assert_eq!(
                tokenizer.encode_segments(&trusted).unwrap(),
                whole,
                "{text:?}"
            );
            let plain: Vec<_> = pieces.map(|piece| (piece, false)).collect();
            let Ok(plain) = tokenizer.encode_segments(&plain) else {
                continue;
            };
            let control = |id: &&u32| tokenizer.added.is_control(**id);
            let unknown = match &*tokenizer.model {
                Model::Bpe { model, .. } => model.unknown,
                _ => Some(0),
            };
            let found: Vec<_> = plain.iter().filter(control).collect();
            // A byte has no other way to be said.
            let byte = |id: u32| {
                tokenizer
                    .model
                    .byte_level_bytes(id)
                    .is_some_and(|b| b.len() == 1)
            };
            let only_unknown = found.iter().all(|id| Some(**id) == unknown || byte(**id));
            assert!(only_unknown, "{} {text:?} {found:?}", shown(&file));
            if !whole.iter().any(|id| control(&id)) && tokenizer.parts.truncation.is_none() {
                assert_eq!(plain, whole, "{} {text:?}", shown(&file));
            }
        }
    }
}

#[test]
fn a_token_counts_where_the_template_began_and_ended_it() {
    let files: Vec<Json> = [byte_level_files(), sentencepiece_files()].concat();
    let mut around = 0;
    for file in files {
        let tokenizer = Tokenizer::from_bytes("test", file.to_string().as_bytes()).unwrap();
        let Some(id) = tokenizer.token_to_id("<a>") else {
            continue;
        };
        let count = |parts: &[(&str, bool)]| {
            let ids = tokenizer.encode_segments(parts).unwrap_or_default();
            ids.iter().filter(|found| **found == id).count()
        };
        // Some make it of plain text too.
        if count(&[("<a>", true)]) == 0 || count(&[("<a>", false)]) > 0 {
            continue;
        }
        // None where the token is looked for in text that was normalised, whose places are not known.
        around += count(&[("<", true), ("a", false), (">", true)]);
        assert_eq!(count(&[("<", false), ("a>", true)]), 0, "{}", shown(&file));
        assert_eq!(count(&[("<a", true), (">", false)]), 0, "{}", shown(&file));
        assert_eq!(count(&[("<", true), ("a>", false), ("b>", true)]), 0);
    }
    assert!(around > 0);
}
