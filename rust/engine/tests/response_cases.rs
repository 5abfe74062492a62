//! Which style of calls a checkpoint's files choose, on a tiny real checkpoint. Data from HFCORE_CASES; skipped
//! without it.

use std::fs;
use std::path::{Path, PathBuf};

use hfcore_engine::model::{Model, ModelOptions, Prompt};
use serde_json::{Value, json};

/// A copy of a checkpoint with `added` in its tokenizer's configuration, removed at the end.
struct Checkpoint(PathBuf);

impl Checkpoint {
    fn new(cases: &Path, name: &str, added: Value) -> Self {
        let folder = format!("hfcore-response-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        fs::create_dir_all(&folder).unwrap();
        for file in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        ] {
            let bytes = fs::read(cases.join("families/qwen2").join(file)).unwrap();
            fs::write(folder.join(file), bytes).unwrap();
        }
        fs::write(folder.join("tokenizer_config.json"), added.to_string()).unwrap();
        Self(folder)
    }

    /// The text of a forced call, its special tokens shown.
    fn call(&self, options: &ModelOptions, style: Option<&str>) -> String {
        let model = Model::open(&self.0, options, &|_, _| true).unwrap();
        let messages = json!([{"role": "user", "content": "Hi"}]);
        let request = json!({"tools": [{"name": "now"}], "tool_choice": "now", "tool_style": style, "max_tokens": 200});
        let mut ids = Vec::new();
        let mut names = Vec::new();
        for delta in model.submit(Prompt::Messages(messages), request).unwrap() {
            let delta = delta.unwrap();
            ids.extend(delta.token_ids);
            names.extend(delta.tool_calls.into_iter().filter_map(|call| call.name));
        }
        assert_eq!(names, ["now"]);
        model.tokenizer().decode(&ids, false).unwrap()
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_response_template_chooses_the_style_before_the_chat_template() {
    let Some(cases) = std::env::var_os("HFCORE_CASES") else {
        println!("skipped: HFCORE_CASES is not set");
        return;
    };
    let cases = PathBuf::from(cases);
    let chat = "{{ messages[0].content }}{% if tools %}<tool_call>{{ tools|length }}{% endif %}";
    let mistral = json!({"version": 1, "fields": {
        "content": {"close": "</s>"},
        "tool_calls": {"open_pattern": "\\[TOOL_CALLS\\](?P<name>\\w+)\\[ARGS\\]", "content": "json"}}});
    let named = "[TOOL_CALLS]now[ARGS]{}";
    let plain = ModelOptions::default();
    for (name, response, options, style, wanted) in [
        ("shown", mistral.clone(), &plain, None, named),
        ("none", Value::Null, &plain, None, "<tool_call>"),
        ("text", json!("[TOOL_CALLS]"), &plain, None, "<tool_call>"),
        (
            "later",
            json!({"version": 9, "fields": mistral["fields"]}),
            &plain,
            None,
            "<tool_call>",
        ),
        (
            "asked",
            mistral.clone(),
            &plain,
            Some("functools"),
            "functools[",
        ),
        (
            "given",
            mistral.clone(),
            &ModelOptions {
                chat_template: Some(chat.into()),
                ..ModelOptions::default()
            },
            None,
            "<tool_call>",
        ),
    ] {
        let config = json!({"chat_template": chat, "response_template": response, "eos_token": "<|im_end|>"});
        let text = Checkpoint::new(&cases, name, config).call(options, style);
        assert!(text.starts_with(wanted), "{name}: {text:?}");
    }
    // The older form, and a template that takes no tools: the system message shows the same style.
    let schema = json!({"type": "object", "properties": {
        "tool_calls": {"x-regex-iterator": "functools\\[(.*?)\\]"}}});
    let config = json!({"chat_template": "{{ messages[0].content }}", "response_schema": schema});
    let checkpoint = Checkpoint::new(&cases, "older", config);
    assert!(checkpoint.call(&plain, None).starts_with("functools["));
}

#[test]
fn a_random_model_keeps_the_bounds_of_strings_without_quotes_and_ends_in_time() {
    let Some(cases) = std::env::var_os("HFCORE_CASES") else {
        println!("skipped: HFCORE_CASES is not set");
        return;
    };
    let config = json!({"chat_template": "{{ messages[0].content }}{{ tools|length }}", "eos_token": "<|im_end|>"});
    let checkpoint = Checkpoint::new(&PathBuf::from(cases), "bounds", config);
    let model = Model::open(&checkpoint.0, &ModelOptions::default(), &|_, _| true).unwrap();
    let schema = json!({"type": "object", "required": ["code", "note", "maybe"], "properties": {
        "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]+$", "maxLength": 6},
        "note": {"type": "string", "minLength": 3, "maxLength": 12},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]}}});
    let tools = json!([{"name": "f", "parameters": schema}]);
    let styles = [
        "qwen3_coder",
        "glm",
        "glm_tight",
        "seed",
        "minimax",
        "deepseek_v32",
        "gemma",
    ];
    for (style, seed) in styles
        .iter()
        .flat_map(|style| (0..12).map(move |seed| (*style, seed)))
    {
        let request = json!({"tools": tools, "tool_choice": "required", "tool_style": style, "seed": seed,
            "temperature": 1.5, "max_tokens": if seed % 2 == 0 { 400 } else { 600 }});
        let messages = json!([{"role": "user", "content": "Hi"}]);
        let mut text = String::new();
        for delta in model.submit(Prompt::Messages(messages), request).unwrap() {
            let delta = delta.unwrap();
            text.extend(delta.tool_calls.into_iter().map(|call| call.arguments));
        }
        let context = format!("{style}, seed {seed}: {text}");
        let arguments: Value = serde_json::from_str(&text).expect(&context);
        let code = arguments["code"].as_str().expect(&context);
        let digits = code
            .get(3..)
            .filter(|digits| !digits.is_empty())
            .expect(&context);
        assert!(code.len() <= 6 && code.as_bytes()[2] == b'/', "{context}");
        assert!(
            code[..2].bytes().all(|b| b.is_ascii_uppercase()),
            "{context}"
        );
        assert!(digits.bytes().all(|b| b.is_ascii_digit()), "{context}");
        let note = arguments["note"].as_str().expect(&context).chars().count();
        assert!((3..=12).contains(&note), "{context}");
        let maybe = arguments["maybe"]
            .as_str()
            .map_or(0, |text| text.chars().count());
        assert!(
            maybe <= 4 && (arguments["maybe"].is_string() || arguments["maybe"].is_null()),
            "{context}"
        );
    }
}
