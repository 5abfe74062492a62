//! Tests of vocab.rs.

use super::*;

type Metadata = HashMap<String, Value>;

fn strings(list: &[&str]) -> Value {
    Value::Strings(list.iter().map(|s| s.to_string()).collect())
}

fn metadata(entries: Vec<(&str, Value)>) -> Metadata {
    entries
        .into_iter()
        .map(|(k, v)| (format!("tokenizer.ggml.{k}"), v))
        .collect()
}

/// Byte-level BPE over `a`, `b`, a space and a newline.
fn gpt2(pre: &str) -> Metadata {
    metadata(vec![
        ("model", Value::String("gpt2".to_owned())),
        ("pre", Value::String(pre.to_owned())),
        (
            "tokens",
            strings(&[
                "<s>", "</s>", "a", "b", "Ġ", "Ċ", "ab", "Ġab", "<tool>", "1",
            ]),
        ),
        (
            "token_type",
            Value::Ints(vec![3, 3, 1, 1, 1, 1, 1, 1, 4, 1]),
        ),
        ("merges", strings(&["a b", "Ġ ab"])),
        ("bos_token_id", Value::Int(0)),
        ("eos_token_id", Value::Int(1)),
    ])
}

fn llama() -> Metadata {
    let tokens = [
        "<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁a", "▁ab",
        "<x>",
    ];
    metadata(vec![
        ("model", Value::String("llama".to_owned())),
        ("tokens", strings(&tokens)),
        (
            "token_type",
            Value::Ints(vec![2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 4]),
        ),
        (
            "scores",
            Value::Floats(vec![
                0., 0., 0., 0., 0., 0., -1e9, -1e9, -1e9, -2., -1., -3., 0.,
            ]),
        ),
        ("bos_token_id", Value::Int(1)),
        ("eos_token_id", Value::Int(2)),
        ("unknown_token_id", Value::Int(0)),
    ])
}

fn with(mut metadata: Metadata, key: &str, value: Value) -> Metadata {
    metadata.insert(format!("tokenizer.ggml.{key}"), value);
    metadata
}

fn without(mut metadata: Metadata, key: &str) -> Metadata {
    metadata.remove(&format!("tokenizer.ggml.{key}"));
    metadata
}

fn problem(metadata: &Metadata) -> String {
    match tokenizer(metadata).unwrap_err() {
        Error::ModelFile { problem, .. } => problem,
        other => panic!("not a model file error: {other}"),
    }
}

#[test]
fn every_pre_tokenizer_name_builds_and_splits() {
    for pre in PRE_TOKENIZERS.split(", ") {
        let tokenizer = tokenizer(&gpt2(pre)).unwrap_or_else(|e| panic!("{pre}: {e}"));
        let ids = tokenizer.encode("ab ab\n", false).unwrap();
        assert_eq!(ids, [6, 7, 5], "{pre}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "ab ab\n");
    }
}

#[test]
fn a_file_without_a_pre_tokenizer_name_has_the_default() {
    assert_eq!(
        tokenizer(&without(gpt2(""), "pre"))
            .unwrap()
            .encode("ab", true)
            .unwrap(),
        [6]
    );
}

#[test]
fn unknown_kinds_are_refused_by_name_with_what_is_known() {
    let error = tokenizer(&gpt2("klingon")).unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { what: "pre-tokenizer", name, supported }
        if name == "klingon" && supported.contains("qwen2")),
        "{error}"
    );
    let error = tokenizer(&with(
        gpt2("qwen2"),
        "model",
        Value::String("bert".to_owned()),
    ))
    .unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { what: "tokenizer model", name, .. } if name == "bert")
    );
}

#[test]
fn bos_and_eos_surround_a_text_when_the_file_or_its_kind_says_so() {
    let ids = |metadata: &Metadata| tokenizer(metadata).unwrap().encode("ab", true).unwrap();
    let flag = |metadata, key, on| with(metadata, key, Value::Bool(on));
    assert_eq!(ids(&gpt2("llama-bpe")), [0, 6]);
    assert_eq!(ids(&gpt2("qwen2")), [6]);
    assert_eq!(ids(&flag(gpt2("llama-bpe"), "add_bos_token", false)), [6]);
    assert_eq!(
        ids(&flag(
            flag(gpt2("qwen2"), "add_bos_token", true),
            "add_eos_token",
            true
        )),
        [0, 6, 1]
    );
    assert_eq!(ids(&without(gpt2("llama-bpe"), "bos_token_id")), [6]);
    assert_eq!(ids(&llama()), [1, 11]);
    let asked = flag(
        without(gpt2("qwen2"), "bos_token_id"),
        "add_bos_token",
        true,
    );
    assert_eq!(
        problem(&asked),
        "tokenizer.ggml.add_bos_token is true, but there is no bos_token"
    );
}

#[test]
fn control_and_user_tokens_are_found_in_text_and_only_control_is_special() {
    let tokenizer = tokenizer(&gpt2("qwen2")).unwrap();
    let ids = tokenizer.encode("ab<tool>ab</s>", false).unwrap();
    assert_eq!(ids, [6, 8, 6, 1]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab<tool>ab");
    assert_eq!(tokenizer.special_tokens()["eos_token"], "</s>");
    assert_eq!(
        (
            tokenizer.bos_id(),
            tokenizer.eos_ids(),
            tokenizer.vocab_size()
        ),
        (Some(0), &[1][..], 10)
    );
}

#[test]
fn end_of_turn_tokens_end_a_completion_too() {
    let tokens = [
        "<s>",
        "</s>",
        "<end_of_turn>",
        "<|im_end|>",
        "x",
        "<|return|>",
        "<|call|>",
        "<|end|>",
    ];
    let file = metadata(vec![
        ("model", Value::String("gpt2".to_owned())),
        ("tokens", strings(&tokens)),
        ("token_type", Value::Ints(vec![3, 3, 3, 1, 1, 3, 3, 3])),
        ("merges", strings(&[])),
        ("eos_token_id", Value::Int(1)),
        ("eot_token_id", Value::Int(4)),
    ]);
    // Not the normal token of the same spelling, and not the end of a harmony message.
    assert_eq!(tokenizer(&file).unwrap().eos_ids(), [1, 4, 2, 5, 6]);
}

#[test]
fn scores_decide_the_merges() {
    let tokenizer = tokenizer(&llama()).unwrap();
    let source = llama();
    let source = Source::read(&source).unwrap();
    let merges = merges_by_score(&source, source.scores().unwrap().unwrap());
    assert_eq!(merges, [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]);
    assert_eq!(tokenizer.encode("ab a", false).unwrap(), [11, 10]);
    assert_eq!(tokenizer.decode(&[11, 10], false).unwrap(), "ab a");
}

#[test]
fn characters_without_a_token_become_bytes_or_unknown() {
    let tokenizer = tokenizer(&llama()).unwrap();
    assert_eq!(tokenizer.encode("aé\n", false).unwrap(), [10, 4, 5, 3]);
    assert_eq!(tokenizer.encode("a€", false).unwrap(), [10, 0]);
    assert_eq!(tokenizer.decode(&[10, 4, 5, 3], true).unwrap(), "aé\n");
}

#[test]
fn the_leading_space_is_the_files_choice() {
    let plain = tokenizer(&with(llama(), "add_space_prefix", Value::Bool(false))).unwrap();
    assert_eq!(plain.encode("ab<x>a", false).unwrap(), [9, 12, 7]);
    assert_eq!(plain.decode(&[10, 12], true).unwrap(), " a<x>");
    let spaced = tokenizer(&llama()).unwrap();
    assert_eq!(spaced.encode("ab<x>a", false).unwrap(), [11, 12, 10]);
}

#[test]
fn empty_tokens_are_told_apart() {
    let tokens = strings(&["<s>", "</s>", "a", "b", "Ġ", "Ċ", "ab", "Ġab", "", ""]);
    assert_eq!(
        tokenizer(&with(gpt2("qwen2"), "tokens", tokens))
            .unwrap()
            .vocab_size(),
        10
    );
}

#[test]
fn chat_templates_carry_their_names() {
    let mut file = gpt2("qwen2");
    file.insert(
        "tokenizer.chat_template".to_owned(),
        Value::String("main".to_owned()),
    );
    file.insert(
        "tokenizer.chat_template.tool_use".to_owned(),
        Value::String("tools".to_owned()),
    );
    file.insert(
        "tokenizer.chat_templates".to_owned(),
        strings(&["tool_use"]),
    );
    let tokenizer = tokenizer(&file).unwrap();
    let found: Vec<_> = tokenizer
        .chat_templates()
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(found, [("default", "main"), ("tool_use", "tools")]);
}

#[test]
fn keys_that_disagree_are_errors_that_name_what_came() {
    let cases = [
        (without(gpt2("qwen2"), "tokens"), "no tokenizer.ggml.tokens"),
        (without(gpt2("qwen2"), "model"), "no tokenizer.ggml.model"),
        (without(gpt2("qwen2"), "merges"), "no tokenizer.ggml.merges"),
        (without(llama(), "scores"), "no tokenizer.ggml.scores"),
        (
            with(gpt2("qwen2"), "tokens", Value::Int(3)),
            "tokens must be strings, got an integer",
        ),
        (
            with(gpt2("qwen2"), "tokens", strings(&[])),
            "no tokenizer.ggml.tokens",
        ),
        (
            with(gpt2("qwen2"), "pre", Value::Bool(true)),
            "pre must be a string, got a bool",
        ),
        (
            with(gpt2("qwen2"), "add_bos_token", Value::Int(1)),
            "must be a bool, got an integer",
        ),
        (
            with(gpt2("qwen2"), "bos_token_id", Value::Int(10)),
            "must be below the 10 tokens, got 10",
        ),
        (
            with(gpt2("qwen2"), "eos_token_id", Value::Int(-7)),
            "must be below the 10 tokens, got -7",
        ),
        (
            with(gpt2("qwen2"), "eom_token_id", Value::UInt(u64::MAX)),
            "got 18446744073709551615",
        ),
        (
            with(gpt2("qwen2"), "eot_token_id", Value::Float(1.0)),
            "must be an integer, got a float",
        ),
        (
            with(gpt2("qwen2"), "token_type", Value::Ints(vec![1])),
            "has 1 values for 10 tokens",
        ),
        (
            with(gpt2("qwen2"), "merges", strings(&["ab"])),
            "\"ab\" is not two tokens",
        ),
        (
            with(gpt2("qwen2"), "merges", strings(&[""])),
            "\"\" is not two tokens",
        ),
        (
            with(gpt2("qwen2"), "merges", strings(&["é"])),
            "\"é\" is not two tokens",
        ),
        (
            with(gpt2("qwen2"), "merges", strings(&["b a"])),
            "need \"ba\", which is no token",
        ),
        (
            with(gpt2("qwen2"), "merges", strings(&["q b"])),
            "need \"q\", which is no token",
        ),
        (
            with(gpt2("qwen2"), "merges", strings(&["<tool> ab"])),
            "\"<tool>ab\", which is no token",
        ),
        (
            with(llama(), "scores", Value::Floats(vec![0.0])),
            "has 1 values for 13 tokens",
        ),
        (
            with(llama(), "scores", Value::Floats(vec![f32::NAN; 13])),
            "not a number",
        ),
        (
            with(llama(), "scores", Value::Ints(vec![0; 13])),
            "must be floats, got integers",
        ),
        (
            with(llama(), "tokens", strings(&["a", "b", "a"])),
            "has 13 values for 3 tokens",
        ),
    ];
    for (file, wanted) in cases {
        let problem = problem(&file);
        assert!(
            problem.contains(wanted),
            "wanted {wanted:?}, got {problem:?}"
        );
    }
    let twice = without(
        with(gpt2("qwen2"), "tokens", strings(&["a", "b", "a"])),
        "token_type",
    );
    assert_eq!(
        problem(&twice),
        "tokenizer.ggml.tokens: \"a\" is both 0 and 2"
    );
}

#[test]
fn ids_written_as_none_are_none() {
    let file = with(gpt2("qwen2"), "bos_token_id", Value::Int(0xffff_ffff));
    assert_eq!(tokenizer(&file).unwrap().bos_id(), None);
}
