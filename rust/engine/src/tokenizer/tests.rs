//! Tests of tokenizer.rs.

mod differential;

use super::*;

/// A tokenizer of whole words, to test decoders with.
fn words(words: &[&str], specials: &[&str], decoder: &Json) -> Arc<Tokenizer> {
    let ids = |(id, word): (usize, &&str)| (word.to_string(), Json::from(id));
    let vocab: serde_json::Map<String, Json> = words.iter().enumerate().map(ids).collect();
    let added = specials.iter().map(|s| {
        serde_json::json!({"id": vocab[*s], "content": s, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    });
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": added.collect::<Vec<_>>(), "decoder": decoder,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]}
    });
    Arc::new(Tokenizer::from_bytes("test", json.to_string().as_bytes()).unwrap())
}

/// The crate's own decoding of a tokenizer's parts, its model ours.
fn library(tokenizer: &Tokenizer) -> tokenizers::Tokenizer {
    let words = tokenizers::models::wordlevel::WordLevel::builder()
        .vocab(
            (0..VOCAB.len())
                .map(|id| (VOCAB[id].to_owned(), id as u32))
                .collect(),
        )
        .unk_token(VOCAB[0].to_owned())
        .build()
        .unwrap();
    let mut library = tokenizers::Tokenizer::new(words);
    let decoder: Option<DecoderWrapper> =
        serde_json::from_value(tokenizer.parts.decoder.clone()).unwrap();
    library.with_decoder(decoder);
    library
        .add_tokens(tokenizer.parts.added_tokens.clone())
        .unwrap();
    library
}

fn decoder(json: &str) -> Json {
    serde_json::from_str(json).unwrap()
}

/// What each push gives, and last what finish gives.
fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special);
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

const LLAMA: &str = r#"{"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
const BYTE_LEVEL: &str =
    r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}"#;
const VOCAB: [&str; 24] = [
    "<unk>", "</s>", "▁a", "b", "##c", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x41>",
    "<0xFF>", "Ġd", "ð", "Ł", "ĺ", "Ģ", "é", "</w>", "e</w>", "n't", "|", " x ", ".",
];

#[test]
fn the_streamed_and_the_whole_text_are_the_crates_for_every_decoder() {
    let metaspace =
        r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false}"#;
    let bytes_metaspace =
        format!(r#"{{"type": "Sequence", "decoders": [{{"type": "ByteFallback"}}, {metaspace}]}}"#);
    let fused_first = format!(
        r#"{{"type": "Sequence", "decoders": [{{"type": "Fuse"}}, {metaspace}, {{"type": "WordPiece", "prefix": "a", "cleanup": true}}]}}"#
    );
    let decoders = [
        "null",
        LLAMA,
        BYTE_LEVEL,
        metaspace,
        r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}"#,
        r###"{"type": "WordPiece", "prefix": "##", "cleanup": true}"###,
        r###"{"type": "WordPiece", "prefix": "##", "cleanup": false}"###,
        r#"{"type": "BPEDecoder", "suffix": "</w>"}"#,
        r#"{"type": "CTC", "pad_token": "<unk>", "word_delimiter_token": "|", "cleanup": true}"#,
        &bytes_metaspace,
        &fused_first,
        r#"{"type": "Strip", "content": " ", "start": 1, "stop": 1}"#,
    ];
    let mut random = 1u64;
    for json in decoders {
        let tokenizer = words(&VOCAB, &["</s>"], &decoder(json));
        for round in 0..400 {
            let mut ids = Vec::new();
            for _ in 0..1 + round % 23 {
                random = random
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                ids.push((random >> 33) as u32 % VOCAB.len() as u32);
            }
            let skip = round % 2 == 0;
            if skip && ids.iter().all(|&id| id == 1) {
                continue; // nothing to decode: BPEDecoder of the crate overflows
            }
            let whole = library(&tokenizer).decode(&ids, skip).unwrap();
            assert_eq!(
                stream(&tokenizer, &ids, skip).concat(),
                whole,
                "{json} {ids:?}"
            );
            assert_eq!(
                tokenizer.decode(&ids, skip).unwrap(),
                whole,
                "{json} {ids:?}"
            );
        }
    }
}

#[test]
fn an_emoji_over_four_byte_tokens_comes_whole() {
    let tokenizer = words(&VOCAB, &[], &decoder(LLAMA));
    assert_eq!(
        stream(&tokenizer, &[6, 7, 8, 9, 3], false),
        ["", "", "", "", "😀b", ""]
    );
    assert_eq!(
        stream(&tokenizer, &[3, 6, 7, 8, 9], false),
        ["b", "", "", "", "", "😀"]
    );
}

#[test]
fn byte_level_characters_wait_for_their_last_byte_only() {
    let tokenizer = words(&VOCAB, &[], &decoder(BYTE_LEVEL));
    assert_eq!(
        stream(&tokenizer, &[13, 14, 15, 16, 12], false),
        ["", "", "", "😀", " d", ""]
    );
    assert_eq!(
        stream(&tokenizer, &[13, 14, 3], false),
        ["", "", "\u{fffd}b", ""]
    );
    assert_eq!(stream(&tokenizer, &[13, 14], false), ["", "", "\u{fffd}"]);
}

#[test]
fn one_wrong_byte_makes_its_whole_run_wrong_as_in_the_whole_text() {
    let tokenizer = words(&VOCAB, &[], &decoder(LLAMA));
    assert_eq!(
        stream(&tokenizer, &[10, 11, 3], false),
        ["", "", "\u{fffd}\u{fffd}b", ""]
    );
}

#[test]
fn only_the_first_space_of_a_text_is_dropped() {
    let tokenizer = words(&VOCAB, &[], &decoder(LLAMA));
    assert_eq!(stream(&tokenizer, &[5, 2, 2], false), ["", " a", " a", ""]);
}

#[test]
fn special_tokens_in_the_middle_leave_no_trace_when_skipped() {
    let tokenizer = words(&VOCAB, &["</s>"], &decoder(LLAMA));
    assert_eq!(
        stream(&tokenizer, &[1, 2, 1, 2], true),
        ["", "a", "", " a", ""]
    );
    assert_eq!(stream(&tokenizer, &[1, 2], false), ["</s>", " a", ""]);
    // A skipped token does not end a run of bytes.
    assert_eq!(stream(&tokenizer, &[6, 7, 1, 8, 9], true).concat(), "😀");
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(2) && !tokenizer.is_special(99));
}

#[test]
fn a_detokenizer_starts_anew_after_finish() {
    let tokenizer = words(&VOCAB, &[], &decoder(LLAMA));
    let mut detokenizer = Detokenizer::new(tokenizer, true);
    for _ in 0..2 {
        assert_eq!(detokenizer.push(2), "a");
        assert_eq!(detokenizer.push(6), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
    }
}

#[test]
fn an_id_outside_the_vocabulary_is_refused_with_both_numbers_and_streams_nothing() {
    let tokenizer = words(&VOCAB, &[], &decoder(LLAMA));
    let error = tokenizer.decode(&[2, 24], true).unwrap_err().to_string();
    assert_eq!(
        error,
        "token id must be below the vocabulary size 24, got 24"
    );
    assert_eq!(stream(&tokenizer, &[2, 24, 3], true), ["a", "", "b", ""]);
}

#[test]
fn token_bytes_are_what_a_token_adds_to_a_text() {
    let tokenizer = words(&VOCAB, &["</s>"], &decoder(LLAMA));
    let bytes = |id| tokenizer.token_bytes(id).unwrap();
    assert_eq!(
        (bytes(1), bytes(2), bytes(6)),
        (b"</s>".to_vec(), b" a".to_vec(), vec![0xf0])
    );
    let tokenizer = words(&VOCAB, &["</s>"], &decoder(BYTE_LEVEL));
    assert_eq!(tokenizer.token_bytes(12).unwrap(), b" d");
    assert_eq!(tokenizer.token_bytes(14).unwrap(), [0x9f]);
    assert_eq!(tokenizer.token_bytes(24), None);
}

#[test]
fn the_byte_level_alphabet_is_gpt2s() {
    let mut bytes: Vec<u8> = (0x21..=0x143).filter_map(model::alphabet_byte).collect();
    bytes.sort_unstable();
    assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    assert_eq!(model::alphabet_byte('Ġ' as u32), Some(b' '));
    assert_eq!(model::alphabet_byte('Ċ' as u32), Some(b'\n'));
    assert_eq!(model::alphabet_byte('▁' as u32), None);
    let back = |byte| model::alphabet_byte(model::alphabet_char(byte) as u32);
    assert!((0..=255).all(|byte| back(byte) == Some(byte)));
}

#[test]
fn a_batch_on_many_threads_is_each_text_alone_in_order() {
    let tokenizer = words(&VOCAB, &[], &Json::Null);
    let texts: Vec<String> = (0..300)
        .map(|i| format!("b é . {} ", VOCAB[i % 24]).repeat(40))
        .collect();
    assert!(texts.iter().map(String::len).sum::<usize>() > PARALLEL_BYTES);
    let alone: Vec<_> = texts
        .iter()
        .map(|t| tokenizer.encode(t, true).unwrap())
        .collect();
    assert_eq!(tokenizer.encode_batch(&texts, true).unwrap(), alone);
    assert_eq!(
        tokenizer.encode_batch(&texts[..1], true).unwrap(),
        alone[..1]
    );
}

#[test]
fn a_tokenizer_and_its_streams_may_change_threads() {
    fn sendable<T: Send>() {}
    fn shareable<T: Send + Sync>() {}
    shareable::<Tokenizer>();
    sendable::<Detokenizer>();
}

#[test]
fn offsets_count_code_points() {
    let tokenizer = words(&VOCAB, &[], &Json::Null);
    assert_eq!(
        tokenizer.offsets("é 😀 b").unwrap(),
        [(0, 1), (2, 3), (4, 5)]
    );
}

#[test]
fn a_longest_length_cuts_the_text_and_turns_padding_off() {
    let json = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {"z": {"id": "z", "ids": [1], "tokens": ["z"]}},
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "z", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "z": 1}, "unk_token": "a"}}"#;
    let load = || Tokenizer::from_bytes("test", json.as_bytes()).unwrap();
    assert_eq!(load().encode("a a", true).unwrap().len(), 9);
    let cut = load().with_max_tokens(Some(3)).unwrap();
    assert_eq!(cut.encode("a a a a", true).unwrap(), [0, 0, 1]);
    let whole = load().with_max_tokens(None).unwrap();
    assert_eq!(whole.encode("a a a a", true).unwrap(), [0, 0, 0, 0, 1]);
    let error = load().with_max_tokens(Some(1)).unwrap_err().to_string();
    assert_eq!(
        error,
        "max_tokens must be more than the 1 special tokens of a text, got 1"
    );
}

#[test]
fn files_that_are_no_tokenizers_are_model_file_errors() {
    let model = r#""model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}"#;
    let post = |single: &str, tokens: &str| {
        format!(
            r#"{{"post_processor": {{"type": "TemplateProcessing", "single": [{single}], "pair": [], "special_tokens": {tokens}}}, {model}}}"#
        )
    };
    let merges = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}"#;
    let deep = "[".repeat(100_000);
    let padding = format!(
        r#"{{"padding": {{"strategy": {{"Fixed": 99999999999}}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}}, {model}}}"#
    );
    let truncation = format!(
        r#"{{"truncation": {{"max_length": 4, "strategy": "LongestFirst", "stride": 4}}, {model}}}"#
    );
    let files: [&[u8]; 13] = [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        br#"{"version": "2.0"}"#,
        br#"{"decoder": {"type": "Fuse""#,
        br#"{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}"#,
        merges.as_bytes(),
        deep.as_bytes(),
        padding.as_bytes(),
        truncation.as_bytes(),
        post(r#"{"SpecialToken": {"id": "z", "type_id": 0}}"#, "{}")
            .leak()
            .as_bytes(),
    ];
    for file in files {
        let error = Tokenizer::from_bytes("x.json", file).unwrap_err();
        assert!(
            matches!(&error, Error::ModelFile { path, .. } if path == "x.json"),
            "{error}"
        );
    }
    let second = post(r#"{"Sequence": {"id": "B", "type_id": 0}}"#, "{}");
    assert!(matches!(
        Tokenizer::from_bytes("x.json", second.as_bytes()),
        Err(Error::ModelFile { .. })
    ));
    let missing = Tokenizer::from_file(Path::new("/nowhere/tokenizer.json")).unwrap_err();
    assert!(matches!(missing, Error::ModelFile { .. }), "{missing}");
}

#[test]
fn a_directory_gives_names_ids_and_templates_as_transformers_reads_them() {
    let dir = std::env::temp_dir().join(format!("hfcore-tokenizer-{}", std::process::id()));
    let put = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    fs::create_dir_all(dir.join("additional_chat_templates")).unwrap();
    put(
        "tokenizer.json",
        r#"{"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<s>"}}"#,
    );
    put(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<s>", "lstrip": false}, "pad_token": null,
            "extra_special_tokens": {"image_token": "<img>"},
            "chat_template": [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}]}"#,
    );
    put(
        "special_tokens_map.json",
        r#"{"bos_token": "<other>", "eos_token": "</s>"}"#,
    );
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    assert_eq!(tokenizer.chat_templates()["default"], "old");
    put("chat_template.jinja", "new");
    put("additional_chat_templates/rag.jinja", "rag");
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    let templates: Vec<_> = tokenizer
        .chat_templates()
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(
        templates,
        [("default", "new"), ("rag", "rag"), ("tool_use", "tools")]
    );
    let names: Vec<_> = tokenizer
        .special_tokens()
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(
        names,
        [
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("image_token", "<img>")
        ]
    );
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_ids()),
        (Some(0), &[1][..])
    );
}
